# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Say the commands of qemu-img that look at an image that is there, read it to its end, or copy it.

Reference: QEMU 7.2, docs/tools/qemu-img.rst.
"""

from __future__ import annotations


def info_command(path: str, image_format: str = "", shared: bool = False, layers: bool = False) -> list[str]:
    """Return C(qemu-img info). If not C(shared), it fails on an image that somebody else has open for writing.

    With C(layers) it tells of all that the image is made of.
    """
    command = ["qemu-img", "info", "--output=json"]
    if shared:
        command.append("-U")
    if layers:
        command.append("--backing-chain")
    if image_format:
        command += ["-f", image_format]
    return [*command, "--", path]


def read_command(source: str, size: int) -> list[str]:
    """Return the command that reads all of an image, and unpacks what is compressed; C(size) is the disk's, in bytes.

    What is known to be zero is not read.
    """
    command = ["qemu-img", "convert", "-U", "-n", "--target-is-zero", "-m", "16", "-W", "--target-image-opts"]
    return [*command, "--", source, f"driver=null-co,size={size}"]


def convert_command(
    source: str, target: str, target_format: str, onto_device: bool = False, compression: str = "none"
) -> list[str]:
    """Return C(qemu-img convert) of a chain, by its name. A device is not made anew, but written onto.

    Nobody writes to the source, but a QEMU whose VM is paused may still have it open, and locked.
    """
    command = ["qemu-img", "convert", "-U", "-m", "16", "-O", target_format]
    if onto_device:
        command.append("-n")
    # Compressed clusters are written in order only.
    command += ["-W"] if compression == "none" else ["-c", "-o", f"compression_type={compression}"]
    return [*command, "--", source, target]


def compare_command(one: str, other: str) -> list[str]:
    """Return C(qemu-img compare) of two chains, by their names. It fails where a guest sees a difference."""
    return ["qemu-img", "compare", "-U", "--", one, other]


def map_command(path: str, image_format: str, shared: bool = False) -> list[str]:
    """Return C(qemu-img map). If not C(shared), it fails on an image that somebody else has open for writing."""
    return ["qemu-img", "map", "--output=json", *(["-U"] if shared else []), "-f", image_format, "--", path]


def options_command(image_format: str) -> list[str]:
    """Return the command that lists a format's creation options. It succeeds only for formats that can be created."""
    return ["qemu-img", "create", "-f", image_format, "-o", "help"]


def bitmap_command(change: str, path: str, image_format: str, name: str) -> list[str]:
    """Return C(qemu-img bitmap), which adds or removes one in an image that nobody else has open."""
    return ["qemu-img", "bitmap", f"--{change}", "-f", image_format, "--", path, name]
