# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which names of a disk last: its own, and that of its device."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.device_names import lasting_names, qdev_id


@pytest.mark.parametrize(
    ("name", "qdev", "names"),
    [
        ("vda", "/machine/peripheral/virtio-disk0/virtio-backend", ("vda", "virtio-disk0")),
        ("virtio-disk0", "/machine/peripheral/virtio-disk0/virtio-backend", ("virtio-disk0",)),
        ("sda", "scsi0-0-0-0", ("sda", "scsi0-0-0-0")),
        ("sdb", "/machine/peripheral/usb-disk2/usb-disk2.0/legacy[0]", ("sdb", "usb-disk2")),
        ("nvram", "/machine/system.flash1", ("nvram", "/machine/system.flash1")),
        # They are counted anew at each start.
        ("drive0", "/machine/peripheral-anon/device[3]/virtio-backend", ("drive0",)),
        ("drive0", "/machine/unattached/device[23]", ("drive0",)),
        ("n0", "", ("n0",)),
    ],
)
def test_names_that_last(name: str, qdev: str, names: tuple[str, ...]) -> None:
    assert lasting_names(name, qdev) == names


def test_ids_of_devices() -> None:
    assert qdev_id("/machine/peripheral/vd0/virtio-backend") == "vd0"
    assert qdev_id("ide0-0-1") == "ide0-0-1"
    assert qdev_id("/machine/system.flash1") == ""
