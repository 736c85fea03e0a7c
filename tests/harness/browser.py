# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A real browser without a window: Chromium, spoken to in its DevTools protocol over a pair of pipes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import shutil
import struct
import subprocess
import tempfile
import time
import typing as t
import zlib
from dataclasses import dataclass

from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE

if t.TYPE_CHECKING:
    from pathlib import Path

FLAGS = (
    "--headless",
    "--no-sandbox",  # root may not have one
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


@dataclass
class Picture:
    """A screenshot, one byte each of red, green and blue for a pixel."""

    width: int
    height: int
    rows: list[bytes]

    def at(self, x: int, y: int) -> tuple[int, int, int]:
        red, green, blue = self.rows[y][3 * x : 3 * x + 3]
        return red, green, blue

    @property
    def colours(self) -> set[bytes]:
        return {row[place : place + 3] for row in self.rows for place in range(0, len(row), 3)}

    @classmethod
    def decode(cls, png: bytes) -> Picture:
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        place, packed = 8, b""
        width = height = depth = 0
        while place < len(png):
            length, kind = struct.unpack_from(">I4s", png, place)
            body = png[place + 8 : place + 8 + length]
            if kind == b"IHDR":
                width, height, bits, colour = struct.unpack_from(">IIBB", body)
                assert bits == 8
                depth = {2: 3, 6: 4}[colour]
            packed += body if kind == b"IDAT" else b""
            place += length + 12
        raw, above, rows = zlib.decompress(packed), bytearray(width * depth), []
        for number in range(height):
            start = number * (width * depth + 1)
            above = _unfiltered(raw[start], bytearray(raw[start + 1 : start + 1 + width * depth]), above, depth)
            rows.append(bytes(value for place, value in enumerate(above) if depth == 3 or place % 4 != 3))
        return cls(width, height, rows)


def _unfiltered(kind: int, row: bytearray, above: bytearray, depth: int) -> bytearray:
    for place in range(len(row)):
        left = row[place - depth] if place >= depth else 0
        up, corner = above[place], above[place - depth] if place >= depth else 0
        row[place] = (row[place] + (0, left, up, (left + up) // 2, _paeth(left, up, corner))[kind]) & 255
    return row


def _paeth(left: int, up: int, corner: int) -> int:
    guess = left + up - corner
    return min((left, up, corner), key=lambda one: abs(guess - one))


class Browser:
    """One page at a time, as a device of some size shows it."""

    def __init__(self) -> None:
        self._profile = tempfile.mkdtemp(prefix="vmfleet-browser-")
        to_read, self._commands = os.pipe()
        self._answers, to_write = os.pipe()
        # The browser has its end of the conversation on the file descriptors 3 and 4.
        self._process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$@" 3<&{to_read} 4>&{to_write}',
                "bash",
                "chromium",
                *FLAGS,
                f"--user-data-dir={self._profile}",
            ],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._number = 0
        self._buffer = b""
        self._session = ""
        self.events: list[dict[str, t.Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            os.close(self._commands)
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **params: t.Any) -> dict[str, t.Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message: dict[str, t.Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, t.Any] = answer["result"]
                return result

    def open(self, path: Path, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """Show a file, as a window of this size or a phone does."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()

    def evaluate(self, expression: str) -> t.Any:
        """What a JavaScript expression is in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, width: int, height: int) -> bytes:
        """A PNG of the page's upper left corner."""
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        taken = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(taken["data"])

    @property
    def fetched(self) -> list[str]:
        """What the page has asked for."""
        return [
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]

    @property
    def complaints(self) -> list[str]:
        """What the browser has to say against the page."""
        return [event["params"]["entry"]["text"] for event in self.events if event["method"] == "Log.entryAdded"]

    def _next(self) -> dict[str, t.Any]:
        deadline = time.monotonic() + PATIENCE
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\0" not in self._buffer:
                assert selector.select(deadline - time.monotonic()), "the browser does not answer"
                read = os.read(self._answers, 1 << 20)
                assert read, "the browser has ended"
                self._buffer += read
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, t.Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message
