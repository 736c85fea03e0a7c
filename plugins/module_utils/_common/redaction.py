# SPDX-License-Identifier: GPL-3.0-or-later

"""Take secrets out of QEMU's file names, command lines and error texts: they are read by more people than QEMU's own.

Only what is secret is hidden, and always in the same way: names that tell two files from each other still do.

Reference: QEMU 7.2, qemu-options.hx for the command line, docs/system/secrets.rst for what is secret in it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


REMOVED = "<removed>"
"""What stands where a secret stood."""
ITEM = re.compile(r"(?:[^,]|,,)+")
"""One C(key=value) of an option; a comma that belongs to a value is doubled."""
STRING = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'((?:[^'\\]|\\.)*)'")
"""A string in QEMU's JSON, which may stand in single quotes."""
IMPLIED = {"-object": "qom-type", "-fw_cfg": "name"}
"""The key that an option's first item may come without."""
NAMES = ("id", "node-name", "name")
"""The keys that tell the objects of one option from each other."""
IMAGES = frozenset(
    {
        *("", "-hda", "-hdb", "-hdc", "-hdd", "-cdrom", "-fda", "-fdb", "-sd", "-pflash", "-mtdblock"),
        *("-kernel", "-initrd", "-dtb", "-bios"),
    }
)
"""Options whose value is the name of one file, though it may look like keys and values; some need no option."""
TEXTS = frozenset({"-append", "-incoming"})
"""Options whose value is one text."""
PAYLOADS = {("-object", "secret"): "data", ("-fw_cfg", None): "string", ("-set", None): "data"}
"""The key that is a secret in one kind of option (and object) only."""
_QEMU = r"(?:[\w-]{0,64}[-_])?(?:password|passphrase|passwd)|secret|auth|(?:[rt]x)?cookie|token|osk|=keyvalue-pairs"
SECRET_KEY = re.compile(_QEMU)
"""Keys with a secret for a value. Others, as C(password-secret) and C(passwordid), name an object that holds it."""
LONGEST = 16384
"""Characters of the longest text that is read: two names of files, of 4096 each, and what is said of them."""
HARMLESS = frozenset({"", "on", "off", "true", "false", "yes", "no", "none", "null"})
"""Values of such keys that are no secret: C(-vnc :1,password=on) says only that there is one."""
_WORD = (
    r"\w{0,32}pass(?:word|wd|phrase)|pass(?:code)?|pwd|(?:root|user)pw|(?<!-)secret|token|credentials?|signature|sig|auth|(?:[rt]x)?cookie"
    r"|psk|(?:api|access|private|secret|account)[-_]?key|password-crypted|wireless_wpa"
)
IN_NAMES = (
    # user:password@ of a URL; iSCSI has % for the colon.
    r"(://[^/\s:%@]*[:%])[^/\s]+(?=@)",
    # The signature of a URL that lets everybody in who knows it.
    rf"(?i)([?&](?:[\w.-]{{0,64}}[-_])?(?:{_WORD}|key)=)[^&#\s]+",
    r"(\brbd:.{0,512}?:key=)(?:[^:\\]|\\.)+",
)
"""Secrets within names of files; the group is what comes before them."""
IN_TEXTS = (
    *IN_NAMES,
    r"(\bio\.systemd\.credential(?:\.binary)?:[^=]*=)(?s:.+)",
    r"(\bsystemd\.set_credential(?:_binary)?=[^:\s]*:)\S+",
    # Of the kernel's command line: user:password@, as dracut has it.
    r"(\biscsi:[^:/\s@]*:)[^@/\s]+(?=@)",
    r"(\b(?i:bearer|basic)\s+)[\w.~+/=-]{8,}",
    rf"(?i)((?<!\S)--(?:[\w-]{{0,64}}-)?(?:{_WORD})\s+|\bsshpass\s+-p\s*|\bcurl\s.{{0,256}}?-u\s*[^\s:]+:)\S+",
    r"(-----BEGIN [A-Z ]*PRIVATE KEY-----)(?s:.+?)(?=-----END|\Z)",
)
"""Secrets within texts, in the same way."""
MEMBER = (
    rf"([\"'](?:[\w-]{{0,64}}\.){{0,16}}(?:{_QEMU})[\"']\s*:\s*)"
    r"(\"(?:[^\"\\]|\\.)*\"?|'(?:[^'\\]|\\.)*'?|[\[{](?s:.*)|[^\s,}\]]+)"
)
"""A secret within JSON that was cut off."""
SETTING = rf"(?i)(?<![\w-])((?:[\w./-]{{0,64}}[-_./])?(?:{_WORD})=)(\"[^\"]*\"?|'[^']*'?|[^\s\"']+)"
"""A secret within a text as it is given to a kernel or to a program."""
_NOTE = (
    r"\w{0,32}pass(?:word|wd|phrase)|pass(?:code)?|pwd|pw|secret|\w{0,32}token|credentials?|psk"
    r"|(?:api|access|private|secret|account|licen[cs]e)[-_ ]?key"
)
NOTE = (
    rf"(?i)(?<![\w-])((?:[\w./-]{{0,64}}[-_./])?(?:{_NOTE})(?:[^\S\n]+(?:for|of)[^\S\n]+[\w.@-]{{1,64}})?"
    r"[^\S\n]*[:=][^\S\n]*)(\"[^\"]*\"?|'[^']*'?|[^\s\"'][^\n]*)"
)
"""A secret that a person has noted (C(root password: ...)). It may have blanks, and ends with its line."""
SECRET_NAME = re.compile(
    r"(?i).*(?:passw(?:or)?d|passphrase|passcode|(?<!by)(?<!com)(?<!tres)(?<!sur)(?<!over)(?<!under)(?<!multi)pass|pwd"
    r"|secret|token|credentials?|psk|(?:api|access|private|secret|account|encryption)[-_]?key)(?:[-_]?(?:hash|value))?"
)
"""What people call a secret, each in a way of their own, such as C(dbPassword) and C(ADMIN_PASS)."""
SIGN = re.compile(r"[\s:=]")
"""What stands before each of these secrets, or right behind its key."""


def is_secret_name(name: str) -> bool:
    """Return whether what is called so is a secret: a variable, a setting, or an element of a document."""
    return SECRET_NAME.fullmatch(name) is not None


def redact_name(name: str) -> str:
    """Return the name of an image without its secrets. A path has none, and stays as it is."""
    if name.startswith("/") or ":" not in name:
        return name
    return Redaction("", []).name("", name)


def redact_text(text: str) -> str:
    """Return what was said, such as QEMU's reason for an error, without the secrets in it."""
    if len(text) > LONGEST:
        # Not in the middle of a word: half a secret is one, too.
        text = text[:LONGEST].rpartition(" ")[0] + " ..."
    start = text.find("json:{")
    while start >= 0:
        begin = start + len("json:")
        try:
            end = json.JSONDecoder().raw_decode(text, begin)[1]
        except (ValueError, RecursionError):
            break
        cleaned = Redaction("", []).json("", text[begin:end])
        text = text[:begin] + cleaned + text[end:]
        start = text.find("json:{", begin + len(cleaned))
    return _scrub(text)


def redact_values(found: dict[str, Any]) -> dict[str, Any]:
    """Return a command and its arguments without the secrets in them."""
    return {key: Redaction("", []).tree(key, value) for key, value in found.items()}


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
    if option in IMAGES:
        return Redaction(option or "image", removed).name("", argument)
    if option in TEXTS:
        return Redaction(option, removed).text("", argument)
    is_json = argument.startswith("{")
    fields = _read_json(argument) or {} if is_json else _fields(option, argument)
    name = next((fields[key] for key in NAMES if key in fields), "")
    payload = PAYLOADS.get((option, fields.get("qom-type")), "")
    if option == "-global" and SECRET_KEY.fullmatch(str(fields.get("property"))):
        payload = "value"
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
        return json.loads(STRING.sub(in_double_quotes, text) if "'" in text else text)
    except (ValueError, RecursionError):
        return None


def _hidden(match: re.Match[str]) -> str:
    value = match[2].strip("\"',;").lower()
    is_harmless = value in HARMLESS or value.startswith(REMOVED)
    return match[0] if is_harmless else match[1] + REMOVED


def _scrub(text: str, in_name: bool = False) -> str:
    """Return a text, or the name of a file, without the secrets in it."""
    if not SIGN.search(text):
        return text
    # They are compiled here, and kept by re: most modules never come here, and that takes longer than all the rest.
    for pattern in IN_NAMES if in_name else IN_TEXTS:
        text = re.sub(pattern, rf"\1{REMOVED}", text)
    text = re.sub(MEMBER, _hidden, text)
    return text if in_name else re.sub(SETTING, _hidden, text)


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
        # Nobody knows what it holds where it cannot be read.
        return self._remove(key) if tree is None else self._dumped(key, text, tree)

    def _dumped(self, key: str, text: str, tree: Any) -> str:
        known = len(self.removed)
        cleaned = self.tree(key, tree)
        return text if len(self.removed) == known else json.dumps(cleaned)

    def name(self, key: str, value: str) -> str:
        """Return the name of an image without its secrets."""
        text = value[len("json:") :] if value.startswith("json:") else ""
        tree = _read_json(text) if text else None
        if tree is not None:
            return "json:" + self._dumped(key, text, tree)
        # QEMU cuts long names off. What is left still tells one from another.
        return self._noted(key, value, _scrub(value, in_name=True))

    def text(self, key: str, value: str) -> str:
        """Return the value of a key, or a value without one, without its secrets."""
        if self._secret(key):
            return value if value in HARMLESS else self._remove(key)
        if value.startswith("json:"):
            return self.name(key, value)
        is_path = value.startswith("/") and not re.search(r"\s", value)
        return value if is_path else self._noted(key, value, _scrub(value))

    def note(self, key: str, value: str) -> str:
        """Return what a person may have written down, without its secrets."""
        if self._secret(key) or value.startswith("json:"):
            return self.text(key, value)
        return self._noted(key, value, re.sub(NOTE, _hidden, _scrub(value)))

    def tree(self, key: str, value: Any) -> Any:
        """Return what was read of JSON without its secrets."""
        if isinstance(value, str):
            return self.text(key, value)
        if value is None or isinstance(value, bool):
            return value
        if self._secret(key):
            return self._remove(key)
        prefix = f"{key}." if key else ""
        if isinstance(value, dict):
            return {name: self.tree(prefix + name, below) for name, below in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.tree(f"{prefix}{number}", below) for number, below in enumerate(value)]
        return value

    def _secret(self, key: str) -> bool:
        last = key.rpartition(".")[2]
        return last != "" and (last == self.payload or SECRET_KEY.fullmatch(last) is not None)

    def _noted(self, key: str, value: str, cleaned: str) -> str:
        # What has been here before is noted again: its owner was another one then.
        if cleaned != value or REMOVED in value:
            self._remove(key)
        return cleaned

    def _remove(self, key: str) -> str:
        self.removed.append(f"{self.owner}: {key}" if key else self.owner)
        return REMOVED
