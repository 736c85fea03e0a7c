# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Remove secrets from what is written down of a VM."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .command_line import ITEM

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


REMOVED = "<removed>"
"""What stands where a secret stood."""
STRING = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'((?:[^'\\]|\\.)*)'")
"""A string in QEMU's JSON, which may stand in single quotes."""
IMPLIED = {"-object": "qom-type", "-fw_cfg": "name"}
"""The key that an option's first item may come without."""
NAMES = ("id", "node-name", "name")
"""The keys that tell the objects of one option from each other."""
PLAIN = frozenset(
    {
        *("", "-hda", "-hdb", "-hdc", "-hdd", "-cdrom", "-fda", "-fdb", "-sd", "-pflash", "-mtdblock"),
        *("-kernel", "-initrd", "-dtb", "-bios", "-append", "-incoming"),
    }
)
"""Options whose value is one name or text, though it may look like keys and values; an image's name needs no option."""
PAYLOADS = {("-object", "secret"): "data", ("-fw_cfg", None): "string"}
"""The key that is a secret in one kind of option (and object) only."""
SECRET_KEY = re.compile(r"(?:.*[-_])?(?:password|passphrase|passwd)|secret|auth|cookie|token")
"""Keys with a secret for a value. Others, as C(password-secret) and C(passwordid), name an object that holds it."""
HARMLESS = frozenset({"", "on", "off", "true", "false"})
"""Values of such keys that are no secret: C(-vnc :1,password=on) says only that there is one."""
EMBEDDED = (
    # user:password@ of a URL; iSCSI has % for the colon.
    re.compile(r"(://[^/\s:%@]*[:%])[^/\s]+(?=@)"),
    # The signature of a URL that lets everybody in who knows it.
    re.compile(
        r"(?i)([?&](?:[\w.-]*[-_])?(?:sig|signature|token|password|passwd|secret|auth|credential|key)=)[^&#\s]+"
    ),
    re.compile(r"(\Arbd:.*?:key=)(?:[^:\\]|\\.)+"),
    re.compile(r"(\Aio\.systemd\.credential(?:\.binary)?:[^=]*=)(?s:.+)"),
)
"""Secrets within values that are none; the group is what comes before them."""


def redact(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a QEMU command line without its secrets, and the names of what has been removed."""
    removed: list[str] = []
    cleaned = []
    option = ""
    for argument in arguments:
        if argument.startswith("-"):
            # QEMU takes --object for -object.
            option = "-" + argument.lstrip("-")
            cleaned.append(Redaction(option, removed).text("", argument))
        else:
            cleaned.append(_redact_value(option, argument, removed))
            option = ""
    return cleaned, removed


def _redact_value(option: str, argument: str, removed: list[str]) -> str:
    """Return the value of an option without its secrets. C(option) is empty for the name of an image."""
    if option in PLAIN:
        return Redaction(option or "image", removed).text("", argument)
    is_json = argument.startswith("{")
    fields = _read_json(argument) or {} if is_json else _fields(option, argument)
    name = next((fields[key] for key in NAMES if key in fields), "")
    payload = PAYLOADS.get((option, fields.get("qom-type")), "")
    redaction = Redaction(f"{option} {name}".rstrip(), removed, payload)
    return redaction.json("", argument) if is_json else redaction.items(argument)


def _fields(option: str, argument: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in ITEM.findall(argument):
        key, equals, value = item.partition("=")
        if equals:
            found[key] = value
        elif not found and option in IMPLIED:
            found[IMPLIED[option]] = key
    return found


def _read_json(text: str) -> Any:
    """Return what QEMU reads in its JSON; None where that cannot be told."""

    def in_double_quotes(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        return '"{}"'.format(match[1].replace("\\'", "'").replace('"', '\\"'))

    try:
        return json.loads(STRING.sub(in_double_quotes, text))
    except ValueError:
        return None


@dataclass(frozen=True)
class Redaction:
    """Takes the secrets out of what belongs to C(owner), and notes them in C(removed).

    C(payload) is a key that is secret here besides those that always are.
    """

    owner: str
    removed: list[str]
    payload: str = ""

    def items(self, argument: str) -> str:
        """Return C(key=value,...) of a command line without its secrets."""

        def cleaned(match: re.Match[str]) -> str:
            key, equals, value = match[0].partition("=")
            if not equals:
                key, value = "", key
            return key + equals + self.text(key, value.replace(",,", ",")).replace(",", ",,")

        return ITEM.sub(cleaned, argument)

    def json(self, key: str, text: str) -> str:
        """Return a JSON text without its secrets; unchanged where there is none in it."""
        tree = _read_json(text)
        if tree is None:
            # Nobody knows what it holds.
            return self._remove(key)
        known = len(self.removed)
        cleaned = self._tree(key, tree)
        return text if len(self.removed) == known else json.dumps(cleaned)

    def text(self, key: str, value: str) -> str:
        """Return the value of a key, or a value without one, without its secrets."""
        if self._secret(key):
            return value if value in HARMLESS else self._remove(key)
        if value.startswith("json:"):
            return "json:" + self.json(key, value[len("json:") :])
        cleaned = value
        for pattern in EMBEDDED:
            cleaned = pattern.sub(rf"\1{REMOVED}", cleaned)
        if cleaned != value:
            self._remove(key)
        return cleaned

    def _tree(self, key: str, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(key, value)
        if value is None or isinstance(value, bool):
            return value
        if self._secret(key):
            return self._remove(key)
        prefix = f"{key}." if key else ""
        if isinstance(value, dict):
            return {name: self._tree(prefix + name, below) for name, below in value.items()}
        if isinstance(value, list):
            return [self._tree(f"{prefix}{number}", below) for number, below in enumerate(value)]
        return value

    def _secret(self, key: str) -> bool:
        last = key.rpartition(".")[2]
        return last != "" and (last == self.payload or SECRET_KEY.fullmatch(last) is not None)

    def _remove(self, key: str) -> str:
        self.removed.append(f"{self.owner}: {key}" if key else self.owner)
        return REMOVED
