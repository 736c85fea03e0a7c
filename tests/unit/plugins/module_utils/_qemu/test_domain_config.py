# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is kept of the XML of a domain, and what is taken out of it."""

from __future__ import annotations

from ansible_collections.vmfleet.backup.plugins.module_utils._common.redaction import REMOVED
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_config import LONGEST_KEPT, without_secrets
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_xml import parse_xml
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import UUID

OTHER = "0f0e3cde-4a29-4f1c-9a55-6b6f1b7c2d11"
PLAIN = f"""
<domain type='kvm'><name>web01</name><uuid>{UUID}</uuid>
  <os><type>hvm</type><cmdline>root=/dev/vda1</cmdline></os>
  <devices><graphics type='vnc' port='-1'/><graphics type='vnc' port='-1'/></devices>
</domain>"""
SECRETS = f"""
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>web01</name>
  <metadata><my:app xmlns:my='urn:my' token='hunter2'><my:url>ftp://me:hunter2@host/</my:url></my:app></metadata>
  <sysinfo type='fwcfg'><entry name='opt/key'>hunter2</entry></sysinfo>
  <sysinfo type='smbios'><oemStrings><entry>io.systemd.credential:passwd=hunter2</entry></oemStrings></sysinfo>
  <os><cmdline>quiet db_password=hunter2</cmdline></os>
  <devices>
    <disk type='network'><auth username='me'><secret type='ceph' uuid='{UUID}'/></auth>
      <source protocol='https' name='x' query='a=1&amp;token=hunter2'>
        <cookies><cookie name='a'>hunter2</cookie></cookies>
      </source></disk>
    <tpm><backend type='emulator'><encryption secret='{OTHER}'/></backend></tpm>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-object'/><qemu:arg value='secret,id=s0,data=hunter2'/>
    <qemu:env name='DB_PASSWORD' value='hunter2'/><qemu:env name='TZ' value='UTC'/>
  </qemu:commandline>
</domain>"""


def test_without_secrets_all_stays_as_it_is() -> None:
    removed: list[str] = []
    assert without_secrets(PLAIN, PLAIN, removed) == PLAIN
    assert removed == []


def test_what_libvirt_itself_has_left_out_is_named() -> None:
    removed: list[str] = []
    secure = PLAIN.replace("port='-1'", "port='-1' passwd='hunter2'", 1)
    assert without_secrets(PLAIN, secure, removed) == PLAIN
    assert removed == ["domain: devices/graphics@passwd"]
    assert without_secrets(PLAIN, "", removed) == PLAIN
    assert removed[1:] == ["domain: secrets, if it has any"]


def test_secrets_that_others_have_written_into_it() -> None:
    removed: list[str] = []
    kept = without_secrets(SECRETS, SECRETS, removed)
    assert "hunter2" not in kept + str(removed)
    assert removed == [
        f"domain: secret {UUID} of libvirt",
        f"domain: secret {OTHER} of libvirt",
        "domain, QEMU's -object s0: data",
        "domain, QEMU's environment DB_PASSWORD",
        "domain app: token",
        "domain url: url",
        "domain entry: entry",
        "domain entry: entry",
        "domain cmdline: cmdline",
        "domain source: query",
        "domain cookie: cookie",
    ]
    # Whoever writes metadata has words of their own.
    metadata = (
        "<a rootPassword='hunter2'><adminPass>hunter2</adminPass><API_KEY>hunter2</API_KEY><passwordHint/>"
        "<setting name='db_password' value='hunter2'/><policy password='yes' level='full'/></a>"
    )
    named: list[str] = []
    text = without_secrets(PLAIN.replace("<os>", f"<metadata>{metadata}</metadata><os>"), "", named)
    assert "hunter2" not in text
    assert 'password="yes" level="full"' in text
    assert named[1:] == [
        "domain a: rootPassword",
        "domain adminPass: adminPass",
        "domain API_KEY: API_KEY",
        "domain setting: value",
    ]
    # And what they write down.
    notes = (
        "<title>web, password: hunter2</title><metadata><n>token = hunter2</n><s name='bypass' value='x'/></metadata>"
    )
    named.clear()
    text = without_secrets(PLAIN.replace("<os>", f"{notes}<os>"), "", named)
    assert "hunter2" not in text
    assert 'name="bypass" value="x"' in text
    assert named[1:] == ["domain title: title", "domain n: n"]
    # All else is still there, and libvirt can read it.
    assert kept.count(REMOVED.replace("<", "&lt;").replace(">", "&gt;")) == 9
    assert '<qemu:env name="TZ" value="UTC"' in kept
    assert [element.tag for element in parse_xml(kept).iter()] == [element.tag for element in parse_xml(SECRETS).iter()]


def test_what_is_no_domain_is_not_kept() -> None:
    removed: list[str] = []
    assert without_secrets("<domain>", "", removed) == ""
    large = PLAIN.replace("web01", "x" * LONGEST_KEPT)
    assert without_secrets(large, large, removed) == ""
    assert len(removed) == 2
    assert all(entry.startswith("domain: all of it, as the XML") for entry in removed)
