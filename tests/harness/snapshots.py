# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""External snapshots as libvirt takes and deletes them (9.0 and 12.9), and as QEMU alone does.

libvirt puts an empty bitmap onto the overlay for each persistent one that records on the layer below, with its name and
granularity, and merges the bitmaps of layers that it commits or pulls. QEMU alone does neither.
"""

from __future__ import annotations

import contextlib
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.images import qemu_img
from ansible_collections.vmfleet.backup.tests.harness.qemu import QmpError, wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

JOB = "layers"


def nodes(vm: Qemu) -> dict[str, dict[str, t.Any]]:
    """All block nodes by their names."""
    return {node["node-name"]: node for node in vm.qmp.execute("query-named-block-nodes", flat=True)}


def node_of(vm: Qemu, path: Path) -> str:
    """The name of the node that makes a disk of an image file."""
    [found] = [
        name
        for name, node in nodes(vm).items()
        if node["image"]["filename"] == str(path) and node["drv"] in ("qcow2", "raw")
    ]
    return found


def take(vm: Qemu, node: str, overlay: Path, name: str, like_libvirt: bool = True) -> None:
    """Put a new image on top of a node; the new node is called `name`."""
    image = nodes(vm)[node]["image"]
    backing = ["-b", image["filename"], "-F", image["format"]]
    qemu_img("create", "-q", "-f", "qcow2", *backing, overlay, str(image["virtual-size"]))
    options = {"driver": "qcow2", "node-name": name, "backing": None, "discard": "unmap"}
    vm.qmp.execute("blockdev-add", **options, file={"driver": "file", "filename": str(overlay), "discard": "unmap"})
    actions: list[dict[str, t.Any]] = [{"type": "blockdev-snapshot", "data": {"node": node, "overlay": name}}]
    for bitmap in vm.bitmaps(node).values() if like_libvirt else ():
        if usable(bitmap):
            copied = {"node": name, "name": bitmap["name"], "persistent": True, "granularity": bitmap["granularity"]}
            actions.append({"type": "block-dirty-bitmap-add", "data": copied})
    try:
        vm.qmp.execute("transaction", actions=actions)
    except QmpError:
        vm.qmp.execute("blockdev-del", node_name=name)
        raise


def commit(vm: Qemu, root: str, top: str, base: str, between: t.Sequence[str] = (), like_libvirt: bool = True) -> None:
    """Write the layers from `top` down to just above `base` into `base`; where `top` is the `root`, go on with `base`.

    `between` are the nodes between top and base.
    """
    # Not finished before the bitmaps are merged: until then, the base can be written to.
    more = {} if top == root else {"top-node": top, "auto-finalize": False}
    vm.qmp.execute("block-commit", job_id=JOB, device=root, base_node=base, **more)
    if top == root:
        wait_until(lambda: vm.job["ready"], "the commit")
    else:
        wait_until(lambda: vm.job["status"] == "pending", "the commit")
    sources = [top, *between]
    for name in set.intersection(*(set(vm.bitmaps(node)) for node in sources)) if like_libvirt else ():
        _merge(vm, sources, base, name)
    vm.qmp.execute("job-complete" if top == root else "job-finalize", id=JOB)
    wait_until(lambda: not vm.block_jobs, "the end of the commit")
    _forget(vm, sources)


def pull(vm: Qemu, top: str, layers: t.Sequence[str], base: str | None = None) -> None:
    """Copy what `layers` hold into `top`, down to above `base`, and merge the bitmaps that `top` has too."""
    names = vm.bitmaps(top)
    for name in names:
        _merge(vm, [node for node in layers if name in vm.bitmaps(node)], top, name)
    vm.qmp.execute("block-stream", job_id=JOB, device=top, **({"base-node": base} if base else {}))
    wait_until(lambda: not vm.block_jobs, "the end of the pull")
    _forget(vm, layers)


def _forget(vm: Qemu, layers: t.Sequence[str]) -> None:
    """Close the images that are layers no more, from the top on; QEMU itself closes those that it has opened."""
    for node in layers:
        if node in nodes(vm):
            vm.qmp.execute("blockdev-del", node_name=node)


def usable(bitmap: dict[str, t.Any]) -> bool:
    """Whether libvirt copies or merges a bitmap."""
    return bool(bitmap["persistent"] and bitmap["recording"] and not bitmap.get("inconsistent"))


def _merge(vm: Qemu, sources: t.Sequence[str], target: str, name: str) -> None:
    """Merge the bitmaps of this name into the target's, which is added where there is none."""
    found = [vm.bitmaps(node)[name] for node in sources]
    if not found or not all(usable(bitmap) for bitmap in found):
        return
    new = {"node": target, "name": name, "persistent": True, "granularity": found[0]["granularity"]}
    actions = [] if name in vm.bitmaps(target) else [{"type": "block-dirty-bitmap-add", "data": new}]
    merged = {"node": target, "target": name, "bitmaps": [{"node": node, "name": name} for node in sources]}
    actions.append({"type": "block-dirty-bitmap-merge", "data": merged})
    # A layer of another size, or an image that keeps no bitmaps: then there is none on the target.
    with contextlib.suppress(QmpError):
        vm.qmp.execute("transaction", actions=actions)
