# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Say what the fields of a document hold, and read it by that: what is odd is refused while it is read.

The fields of a dataclass have their rules as metadata. Others may have written the file: nothing in it is believed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from datetime import datetime
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, ClassVar, TypeVar

from .formats import SCHEMA, Word
from .redaction import redact_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

T = TypeVar("T")

BELOW = 1 << 63
"""Numbers are smaller than this: the kernel has no larger sizes."""
LONG = 1 << 16
"""Characters of the longest text."""
MANY = 4096
"""Entries of the longest list."""
MISSING = dataclasses.MISSING
RULE = "rule"
"""The key of a rule in the metadata of a field."""
SHOWN = 60
"""Characters that are told of a value that is refused."""


class DocumentError(ValueError):
    """A file does not say what a file of its kind says."""


class NewerSchema(DocumentError):
    """A later release of the collection wrote the file."""


class FieldRule:
    """What a field holds. C(read) returns its value as the program has it; DocumentError where it is none."""

    what = ""

    def read(self, value: Any) -> Any:
        raise NotImplementedError

    def refuse(self, value: Any) -> DocumentError:
        """Return the error for a value that is none."""
        if isinstance(value, (dict, list)):
            kind = f"a list of {len(value)}" if isinstance(value, list) else "a mapping"
            return DocumentError(f"{kind} is not {self.what}")
        told = repr(value)
        return DocumentError(f"{told[:SHOWN]}{'...' * (len(told) > SHOWN)} is not {self.what}")


class Text(FieldRule):
    """A text of C(least) to C(most) characters; of one line of a C(pattern), where that is given."""

    def __init__(self, what: str = "a text", least: int = 0, most: int = LONG, pattern: str = "") -> None:
        self.what, self.least, self.most, self.pattern = what, least, most, pattern

    @cached_property
    def fits(self) -> Any:
        """Match a whole text; None without a pattern. To compile them all takes long, and few are used at a time."""
        return re.compile(self.pattern).fullmatch if self.pattern else None

    def read(self, value: Any) -> str:
        if isinstance(value, str) and self.least <= len(value) <= self.most and (not self.fits or self.fits(value)):
            return value
        raise self.refuse(value)


class Said(Text):
    """What others have said, such as QEMU's reason for an error. Version 0.1.0 has left secrets in that."""

    def read(self, value: Any) -> str:
        return redact_text(super().read(value))


TIME_PATTERN = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{3})?Z"
TIME_FORM = re.compile(TIME_PATTERN)


class Time(FieldRule):
    """A time in UTC (ISO 8601), as utc_now() writes it; or nothing, where it may be C(empty)."""

    what = "a time, such as 2026-11-22T01:30:00Z"

    def __init__(self, empty: bool = False) -> None:
        self.empty = empty
        self.pattern = f"({TIME_PATTERN})?" if empty else TIME_PATTERN

    def read(self, value: Any) -> str:
        if self.empty and value == "":
            return ""
        try:
            if isinstance(value, str) and TIME_FORM.fullmatch(value):
                datetime.fromisoformat(value[:-1])
                return value
        except ValueError:
            pass
        raise self.refuse(value)


class Whole(FieldRule):
    """A whole number from C(least) on."""

    def __init__(self, least: int = 0, below: int = BELOW) -> None:
        self.least, self.below = least, below
        self.what = f"a whole number from {least} on"

    def read(self, value: Any) -> int:
        if isinstance(value, int) and value is not True and value is not False and self.least <= value < self.below:
            return value
        raise self.refuse(value)


class Number(FieldRule):
    """A number that is not negative."""

    what = "a number from 0 on"

    def read(self, value: Any) -> float:
        if not isinstance(value, (float, int)) or isinstance(value, bool) or not 0 <= value < BELOW:
            raise self.refuse(value)
        return value


class Flag(FieldRule):
    """True or false."""

    what = "true or false"

    def read(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise self.refuse(value)
        return value


class OneOf(FieldRule):
    """One of some words, which may be members of an enumeration."""

    def __init__(self, *words: str) -> None:
        self.words = {str(word): word for word in words}
        self.what = "one of: {}".format(", ".join(self.words))

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise self.refuse(value)
        return self.words[value]


class Newer(FieldRule):
    """A word of an enumeration, or one that a later release may have added to it."""

    what = "a word"
    pattern = "[a-z][a-z0-9_-]{0,31}"
    _fits = re.compile(pattern).fullmatch

    def __init__(self, kind: type[Word]) -> None:
        self.kind = kind
        self._words = {str(word): word for word in kind}

    def read(self, value: Any) -> Any:
        if not isinstance(value, str) or not (value in self._words or self._fits(value)):
            raise self.refuse(value)
        return self._words.get(value, value)


class Maybe(FieldRule):
    """What another rule says, or null."""

    def __init__(self, rule: FieldRule) -> None:
        self.rule = rule
        self._read = rule.read

    def read(self, value: Any) -> Any:
        return None if value is None else self._read(value)


class Several(FieldRule):
    """A list of C(least) to C(most) entries of another rule, as a tuple, or as it stands in JSON."""

    def __init__(self, rule: FieldRule, least: int = 0, most: int = MANY, plain: bool = False) -> None:
        self.rule, self.least, self.most, self.plain = rule, least, most, plain
        self.what = f"a list of {least} to {most}"

    def read(self, value: Any) -> Any:
        if not isinstance(value, list) or not self.least <= len(value) <= self.most:
            raise self.refuse(value)
        read = self.rule.read
        found = [read(one) for one in value]
        return found if self.plain else tuple(found)


class Names(FieldRule):
    """A few texts by their names."""

    what = "a few texts by their names"

    def read(self, value: Any) -> dict[str, str]:
        if not isinstance(value, dict) or len(value) > MANY or not all(isinstance(one, str) for one in value.values()):
            raise self.refuse(value)
        return value


class Fields(FieldRule):
    """A mapping, each of whose fields has a rule. It is read as a dict without others.

    All are C(needed), or else what is missing is left out.
    """

    what = "a mapping"

    def __init__(self, needed: bool = True, **rules: FieldRule) -> None:
        self.needed, self.rules = needed, rules

    def read(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.refuse(value)
        name, values = "", {}
        try:
            for name, rule in self.rules.items():
                if name in value:
                    values[name] = rule.read(value[name])
                elif self.needed:
                    raise DocumentError("it is missing")
        except DocumentError as error:
            raise DocumentError(f"{name}: {error}") from None
        return values


class Part(FieldRule):
    """An object with the fields of a dataclass, which may have C(fault()) to say what does not go together."""

    what = "a mapping"

    def __init__(self, cls: type[Any]) -> None:
        self.cls = cls
        self._fault = getattr(cls, "fault", None)
        self._last: Any = None

    @cached_property
    def _entries(self) -> list[Any]:
        """Of each field its name, rule and default, and which texts need no other look: their lengths and pattern."""
        return [
            (entry.name, rule.read, _default(entry), *((text.least, text.most, text.fits) if text else (0, -1, None)))
            for entry in dataclasses.fields(self.cls)
            for rule in (entry.metadata[RULE],)
            for text in (_text(rule),)
        ]

    @cached_property
    def _all_texts(self) -> bool:
        return all(isinstance(entry.metadata[RULE], Text) for entry in dataclasses.fields(self.cls))

    def read(self, value: Any) -> Any:
        if not isinstance(value, dict):
            raise self.refuse(value)
        last = self._last
        if last and value == last.__dict__:
            return last
        # A frozen dataclass sets its fields slowly. This dict shares its names with those of all others of the class.
        made = object.__new__(self.cls)
        name, values = "", made.__dict__
        try:
            for name, read, default, least, most, fits in self._entries:
                one = value.get(name, MISSING)
                # Most fields are texts, and thousands of documents are read at a time: a call for each takes longer.
                if one.__class__ is str and least <= len(one) <= most and (fits is None or fits(one)):
                    values[name] = one
                elif one is not MISSING:
                    values[name] = read(one)
                elif default is not MISSING:
                    values[name] = default
                else:
                    raise DocumentError("it is missing")
        except DocumentError as error:
            raise DocumentError(f"{name}: {error}") from None
        fault = self._fault(made) if self._fault else ""
        if fault:
            raise DocumentError(fault)
        if self._all_texts:
            # All sets of a VM name the same one. Texts equal nothing but themselves, while 1 equals true.
            self._last = made
        return made


def _default(entry: dataclasses.Field[Any]) -> Any:
    made = entry.default_factory
    return entry.default if made is MISSING else made()


def _text(rule: FieldRule) -> Text | None:
    """Return the rule of the texts that a rule takes as they are."""
    rule = rule.rule if isinstance(rule, Maybe) else rule
    return rule if isinstance(rule, Text) and not isinstance(rule, Said) else None


def holds(rule: FieldRule) -> Mapping[str, Any]:
    """Return the metadata of a field of this rule."""
    return {RULE: rule}


@lru_cache(maxsize=None)
def part(cls: type[Any]) -> Part:
    """Return the rule for an object of a dataclass."""
    return Part(cls)


TOKEN = "[A-Za-z0-9][A-Za-z0-9-]{0,63}"
"""What is drawn by lot, such as an attempt: it becomes a part of names."""
TEXT = holds(Text())
SAID = holds(Said())
NAME = holds(Text("a name", least=1))
TIME = holds(Time())
SIZE = holds(Whole())
INODE = holds(Whole(below=2 * BELOW))
SECONDS = holds(Number())
FLAG = holds(Flag())
NUMBER_OF_SCHEMA = holds(Whole(1))


class Document:
    """A dataclass that stands in a file of its own, of C(MOST) bytes at most. It has a field C(schema)."""

    MOST: ClassVar[int] = 1 << 16

    @classmethod
    def parse(cls: type[T], found: Any) -> T:
        """Return the document that this is, without what a later release has added to the same schema."""
        check_schema(found)
        return part(cls).read(found)  # type: ignore[arg-type, no-any-return]


def check_schema(found: Any) -> None:
    """Raise DocumentError for what has no schema number, and NewerSchema for one that is not known yet."""
    number = found.get("schema") if isinstance(found, dict) else None
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise DocumentError("it has no schema number")
    if number > SCHEMA:
        raise NewerSchema(f"its schema {number} is newer than this collection; update vmfleet.backup")


def load(raw: bytes) -> Any:
    """Return what a JSON file says: of two fields of one name the last, as all programs do. Raises DocumentError."""
    try:
        text = raw.decode("utf-8").strip(BLANKS)
        found, end = JSON.raw_decode(text)
        if end < len(text):
            raise ValueError("there is more text after the end of its JSON")
        # One character is looked for much faster than two.
        if "\\" in text and "\\u" in text:
            _check_texts(found)
    except RecursionError:
        raise DocumentError("it is nested too deep") from None
    except ValueError as error:
        raise error if isinstance(error, DocumentError) else DocumentError(f"it is not JSON: {error}") from None
    return found


def _check_texts(found: Any) -> None:
    """Raise DocumentError for a text that no file name can be: with a zero, or with half a character."""
    rest = [found]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            rest += [*one, *one.values()]
        elif isinstance(one, list):
            rest += one
        elif isinstance(one, str) and "\0" in one:
            raise DocumentError("it has a text with a zero byte")
        elif isinstance(one, str):
            one.encode("utf-8", "surrogateescape")


def _whole(digits: str) -> int:
    if len(digits) > 20:  # more than a number has
        raise DocumentError("it has a number that is too large")
    return int(digits)


def _refuse_constant(text: str) -> None:
    raise DocumentError(f"it has a number {text}")


BLANKS = " \t\n\r"
# Other releases of Python refuse a number of thousands of digits, which takes them long, by themselves.
LIMITED = hasattr(sys, "set_int_max_str_digits")
JSON = json.JSONDecoder(parse_int=None if LIMITED else _whole, parse_constant=_refuse_constant)
