# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Of this machine's files a throwaway VM gets firmware, and what the caller allows; nothing else is even opened."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._verify import boot_files
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.boot_files import FIRMWARE, BootFiles


@pytest.fixture
def work(tmp_path: Path) -> Path:
    path = tmp_path / "work"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    path = tmp_path / "kernels"
    path.mkdir()
    (path / "vmlinuz").write_bytes(b"kernel")
    (path / "vmlinuz").chmod(0o600)
    return path


@pytest.mark.parametrize(
    "path",
    [
        "/usr/share/OVMF/OVMF_CODE_4M.fd",
        "/usr/share/ovmf/x64/OVMF_VARS.fd",
        "/usr/share/AAVMF/AAVMF_CODE.fd",
        "/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd",
        "/usr/share/edk2-ovmf/x64/OVMF.fd",
        "/usr/share/qemu/edk2-x86_64-code.fd",
        "/usr/share/qemu-efi-aarch64/QEMU_EFI.fd",
        "/usr/share/qemu-kvm/bios.bin",
        "/usr/share/pve-edk2-firmware/OVMF_CODE.fd",
        "/usr/share/seabios/bios-256k.bin",
        "/usr/local/share/qemu/bios.bin",
        "/usr/lib/ipxe/qemu/pxe-virtio.rom",
    ],
)
def test_where_distributions_have_firmware(path: str) -> None:
    assert FIRMWARE.match(path)


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "/usr/share/doc/x", "/srv/usr/share/qemu/x", "/usr/share/qemu", "/usr/share/x/qemu/y"]
)
def test_where_something_else_is(path: str) -> None:
    assert not FIRMWARE.match(path)


def test_a_kernel_of_the_caller_is_copied(work: Path, kernels: Path) -> None:
    """QEMU can open the copy, whoever it runs as, and nobody can change it any more."""
    for allowed in (kernels, kernels / "vmlinuz"):
        with BootFiles(str(work), [str(allowed)]) as files:
            name = files.kernel(str(kernels / "vmlinuz"), "-kernel")
            [fd] = files.inherited
            assert name == f"/proc/self/fd/{fd}"
            (kernels / "vmlinuz").write_bytes(b"another")
            assert Path(name).read_bytes() == b"kernel"
            assert (work / "kernel").stat().st_mode & 0o777 == 0o444
            assert files.sets == []
        (work / "kernel").unlink()
        (kernels / "vmlinuz").write_bytes(b"kernel")


def test_a_flash_chip_is_copied(work: Path, kernels: Path) -> None:
    with BootFiles(str(work), [str(kernels)]) as files:
        name = files.flash(str(kernels / "vmlinuz"), "flash0")
        [fd] = files.inherited
        assert (name, files.sets) == (f"/dev/fdset/{fd}", [fd])
        os.write(fd, b"K")
        assert (work / "flash0").read_bytes() == b"Kernel"
        assert (kernels / "vmlinuz").read_bytes() == b"kernel"
        # The VM is started without one that is not on this machine.
        assert files.flash(str(kernels / "gone"), "flash1") == ""


def refused(work: Path, path: str, allowed: Path, *, flash: bool) -> str:
    with BootFiles(str(work), [str(allowed)]) as files, pytest.raises(BackupError) as error:
        (files.flash if flash else files.kernel)(path, "kernel")
    assert files.inherited == []
    assert os.listdir(work) == []
    assert repr(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("flash", [True, False])
def test_what_a_set_names_beside_that_is_refused(work: Path, kernels: Path, flash: bool) -> None:
    canary = work.parent / "canary"
    canary.write_text("secret")
    (kernels / "link").symlink_to(canary)
    (work.parent / "kernels-of-others").mkdir()
    (work.parent / "kernels-of-others" / "x").touch()
    os.mkfifo(kernels / "pipe")
    for path in (
        str(canary),
        str(kernels / "link"),
        str(kernels / "pipe"),
        str(kernels),
        f"{kernels}/../canary",
        str(work.parent / "kernels-of-others" / "x"),
        "/dev/null",
        f"/proc/{os.getpid()}/environ",
        f"/usr/share/qemu/../../..{canary}",
    ):
        said = refused(work, path, kernels, flash=flash)
        assert "is no firmware of this machine, so it was not read" in said or "cannot be opened" in said
        assert "boot_files" in said


def test_relative_and_missing_paths(work: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kernels)
    assert "is no firmware" in refused(work, "vmlinuz", kernels, flash=False)
    assert "cannot be opened: No such file" in refused(work, str(kernels / "none"), kernels, flash=False)
    assert "cannot be opened: No such file" in refused(work, "", kernels, flash=False)


def test_sizes(work: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = kernels / "large"
    large.touch()
    os.truncate(large, boot_files.LARGEST_FLASH + 1)
    assert "has 64.0 MiB, and 64.0 MiB is the most" in refused(work, str(large), kernels, flash=True)
    os.truncate(large, boot_files.LARGEST + 1)
    assert re.search(r"has 1\.0 GiB, and 1\.0 GiB is the most", refused(work, str(large), kernels, flash=False))
    monkeypatch.setattr(boot_files, "MIN_FREE", 1 << 60)
    with (
        BootFiles(str(work), [str(kernels)]) as files,
        pytest.raises(BackupError, match="no room for its kernel; give a"),
    ):
        files.kernel(str(kernels / "vmlinuz"), "-kernel")


def test_a_socket_listens(work: Path) -> None:
    with BootFiles(str(work)) as files:
        assert files.inherited == [files.listen("agent")]
        assert (work / "agent").is_socket()
