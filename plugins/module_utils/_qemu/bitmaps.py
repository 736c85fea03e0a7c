# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Add, merge and remove dirty bitmaps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._common.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from .monitor import Monitor


def bitmap_add(node: str, name: str, persistent: bool) -> dict[str, Any]:
    """Return the action of a transaction that adds a bitmap to a node."""
    return {"type": "block-dirty-bitmap-add", "data": {"node": node, "name": name, "persistent": persistent}}


def bitmap_merge(node: str, target: str, name: str, below: Iterable[str]) -> dict[str, Any]:
    """Return the action that adds to a node's bitmap C(target) what its bitmap C(name) and those of C(below) mark.

    C(below) are other nodes with a bitmap of that name.
    """
    sources: list[Any] = [name, *({"node": layer, "name": name} for layer in below)]
    return {"type": "block-dirty-bitmap-merge", "data": {"node": node, "target": target, "bitmaps": sources}}


async def remove_bitmaps(monitor: Monitor, bitmaps: Iterable[tuple[str, str]]) -> None:
    """Remove bitmaps, each given as node and name; one that is gone already is none to remove.

    Raises CommandError for one that stays, being in use, after all others have been removed.
    """
    wanted = [{"node": node, "name": name} for node, name in bitmaps]
    if len(wanted) > 1:
        actions = [{"type": "block-dirty-bitmap-remove", "data": bitmap} for bitmap in wanted]
        try:
            await monitor.execute("transaction", {"actions": actions})
        except CommandError:
            # One of them is gone or in use. The others can still be removed.
            pass
        else:
            return
    await _remove_bitmaps_singly(monitor, wanted)


async def _remove_bitmaps_singly(monitor: Monitor, wanted: Iterable[dict[str, str]]) -> None:
    refused: CommandError | None = None
    for bitmap in wanted:
        try:
            await monitor.execute("block-dirty-bitmap-remove", bitmap)
        except CommandError as error:
            if await _has_bitmap(monitor, **bitmap):
                refused = refused or error
    if refused:
        raise refused


async def _has_bitmap(monitor: Monitor, node: str, name: str) -> bool:
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    return any(
        entry["node-name"] == node and any(bitmap.get("name") == name for bitmap in entry.get("dirty-bitmaps", []))
        for entry in nodes
    )
