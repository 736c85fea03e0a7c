# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Secrets are taken out of a command line, and nothing else."""

from __future__ import annotations

import json

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.vm_config import REMOVED, redact

R = REMOVED


def options(*values: str) -> list[str]:
    return ["qemu-system-x86_64", *values]


@pytest.mark.parametrize(
    ("given", "expected", "removed"),
    [
        pytest.param(
            ["-object", "secret,id=s0,data=hunter2"],
            ["-object", f"secret,id=s0,data={R}"],
            ["-object s0: data"],
            id="secret",
        ),
        pytest.param(
            ["--object", "qom-type=secret,data=hunter2,,hunter3,id=s0,format=raw"],
            ["--object", f"qom-type=secret,data={R},id=s0,format=raw"],
            ["-object s0: data"],
            id="secret with a comma in it, two dashes, its type by name",
        ),
        pytest.param(
            ["-object", '{"qom-type": "secret", "id": "s", "data": "hunter2"}'],
            ["-object", json.dumps({"qom-type": "secret", "id": "s", "data": R})],
            ["-object s: data"],
            id="secret in JSON",
        ),
        pytest.param(
            ["-object", "{'qom-type':'secret','id':'s','data':'it\\'s \"hunter2\"'}"],
            ["-object", json.dumps({"qom-type": "secret", "id": "s", "data": R})],
            ["-object s: data"],
            id="secret in QEMU's JSON with single quotes",
        ),
        pytest.param(
            ["-object", '{"qom-type":"secret","id":"s","data":"hunter2"'],
            ["-object", R],
            ["-object"],
            id="JSON that cannot be read",
        ),
        pytest.param(
            ["-blockdev", '{"driver":"https","node-name":"n0","url":"https://h/x","password":"hunter2","auth":["x"]}'],
            [
                "-blockdev",
                json.dumps({"driver": "https", "node-name": "n0", "url": "https://h/x", "password": R, "auth": R}),
            ],
            ["-blockdev n0: password", "-blockdev n0: auth"],
            id="blockdev in JSON",
        ),
        pytest.param(
            ["-blockdev", '{"driver":"raw","children":[{"cookie":"hunter2"}],"file":{"passphrase":12345}}'],
            ["-blockdev", json.dumps({"driver": "raw", "children": [{"cookie": R}], "file": {"passphrase": R}})],
            ["-blockdev: children.0.cookie", "-blockdev: file.passphrase"],
            id="deep in JSON, and a number",
        ),
        pytest.param(
            ["-blockdev", "driver=raw,node-name=n0,file.driver=https,file.url=https://a:hunter2@h/x,file.cookie=k=v"],
            [
                "-blockdev",
                f"driver=raw,node-name=n0,file.driver=https,file.url=https://a:{R}@h/x,file.cookie={R}",
            ],
            ["-blockdev n0: file.url", "-blockdev n0: file.cookie"],
            id="blockdev with keys",
        ),
        pytest.param(
            ["-drive", 'if=none,id=d0,file=json:{"driver":"qcow2",,"file":{"driver":"ftp",,"password":"hunter2"}}'],
            [
                "-drive",
                f'if=none,id=d0,file=json:{{"driver": "qcow2",, "file": {{"driver": "ftp",, "password": "{R}"}}}}',
            ],
            ["-drive d0: file.file.password"],
            id="drive with JSON for a file name",
        ),
        pytest.param(
            ["-drive", "file=nbd://user:hunter2@host:10809/x,format=raw"],
            ["-drive", f"file=nbd://user:{R}@host:10809/x,format=raw"],
            ["-drive: file"],
            id="credentials in a URL",
        ),
        pytest.param(
            ["-drive", "file=https://user:p@ss,,word@host/a,,b.img,id=d0"],
            ["-drive", f"file=https://user:{R}@host/a,,b.img,id=d0"],
            ["-drive d0: file"],
            id="password with commas and an at sign",
        ),
        pytest.param(
            ["-drive", "file=iscsi://user%hunter2@host/iqn.2026-11.example:x/1,id=d0"],
            ["-drive", f"file=iscsi://user%{R}@host/iqn.2026-11.example:x/1,id=d0"],
            ["-drive d0: file"],
            id="iSCSI URL",
        ),
        pytest.param(
            ["-drive", "file=https://h/x.img?sv=2026&sig=hunter2&se=1,id=d0"],
            ["-drive", f"file=https://h/x.img?sv=2026&sig={R}&se=1,id=d0"],
            ["-drive d0: file"],
            id="signed URL",
        ),
        pytest.param(
            ["-drive", r"file=rbd:pool/img:id=admin:key=AQB\:hunter2==:conf=/etc/ceph.conf,id=d0"],
            ["-drive", f"file=rbd:pool/img:id=admin:key={R}:conf=/etc/ceph.conf,id=d0"],
            ["-drive d0: file"],
            id="RBD name with its key",
        ),
        pytest.param(
            ["-cdrom", "https://user:hun,ter2@host/x.iso?X-Amz-Signature=abc", "http://u:hunter2@h/y?z=1"],
            ["-cdrom", f"https://user:{R}@host/x.iso?X-Amz-Signature={R}", f"http://u:{R}@h/y?z=1"],
            ["-cdrom", "image"],
            id="images without keys",
        ),
        pytest.param(
            ["-iscsi", "user=me,password=hunter2,initiator-name=iqn.x"],
            ["-iscsi", f"user=me,password={R},initiator-name=iqn.x"],
            ["-iscsi: password"],
            id="iSCSI",
        ),
        pytest.param(
            ["-spice", "port=5900,password=hunter2,x509-key-password=hunter3,seamless-migration=on"],
            ["-spice", f"port=5900,password={R},x509-key-password={R},seamless-migration=on"],
            ["-spice: password", "-spice: x509-key-password"],
            id="SPICE",
        ),
        pytest.param(
            ["-fw_cfg", "opt/org.example/token,string=hunter2", "-fw_cfg", "name=opt/b,string=a,,b,file=/x"],
            ["-fw_cfg", f"opt/org.example/token,string={R}", "-fw_cfg", f"name=opt/b,string={R},file=/x"],
            ["-fw_cfg opt/org.example/token: string", "-fw_cfg opt/b: string"],
            id="firmware configuration",
        ),
        pytest.param(
            ["-smbios", "type=11,value=io.systemd.credential:passwd.root=hunter2,,\nx,value=plain=1"],
            ["-smbios", f"type=11,value=io.systemd.credential:passwd.root={R},value=plain=1"],
            ["-smbios: value"],
            id="systemd's credentials",
        ),
        pytest.param(
            ["-set", "drive.d0.file.password=hunter2"],
            ["-set", f"drive.d0.file.password={R}"],
            ["-set: drive.d0.file.password"],
            id="set",
        ),
        pytest.param(
            ["-append", "ro password=open,x inst.ks=http://a:hunter2@h/ks"],
            ["-append", f"ro password=open,x inst.ks=http://a:{R}@h/ks"],
            ["-append"],
            id="kernel arguments, where only a URL is one",
        ),
    ],
)
def test_secrets_are_removed(given: list[str], expected: list[str], removed: list[str]) -> None:
    assert redact(options(*given)) == (options(*expected), removed)
    assert "hunter" not in json.dumps(redact(options(*given)))


@pytest.mark.parametrize(
    "given",
    [
        pytest.param([], id="nothing"),
        pytest.param(["-object", "secret,id=s0,file=/etc/key,,s,format=base64"], id="secret in a file"),
        pytest.param(["-object", '{"qom-type":"secret","id":"masterKey0","file":"/run/key.aes"}'], id="libvirt's key"),
        pytest.param(["-object", "memory-backend-file,id=data,mem-path=/x,data=y"], id="object that is no secret"),
        pytest.param(["-object", "tls-creds-x509,id=t,dir=/etc/pki,passwordid=s0"], id="name of a secret"),
        pytest.param(["-blockdev", '{"driver": "luks",  "key-secret":"s0","file":"f0"}'], id="JSON as it was"),
        pytest.param(["-drive", "file=/a,,b.img,encrypt.key-secret=s0,if=none,id=d0,,"], id="doubled commas"),
        pytest.param(["-drive", "file=ssh://root@host/x.img?host_key_check=no"], id="user in a URL"),
        pytest.param(["-drive", 'file=json:{"driver":"raw",,"file":{"password-secret":"s0"}}'], id="JSON file name"),
        pytest.param(["-vnc", "127.0.0.1:1,password=on,password-secret=s0,tls-creds=t"], id="VNC"),
        pytest.param(["-vnc", ":1,password"], id="VNC's flag"),
        pytest.param(["-spice", "port=1,password="], id="empty password"),
        pytest.param(["-blockdev", '{"driver":"x","password":null,"token":true}'], id="no value in JSON"),
        pytest.param(["-chardev", "socket,id=c0,path=/run/web01.qga,server=on,wait=off"], id="chardev"),
        pytest.param(["-chardev", "socket,id=c0,host=::1,port=4444"], id="chardev over TCP"),
        pytest.param(["-smbios", "type=1,serial=ds=nocloud;s=http://[fe80::1]:80/"], id="SMBIOS"),
        pytest.param(["-kernel", "/boot/vmlinuz,password=x", "-append", "console=ttyS0 secret=1,token=2"], id="kernel"),
        pytest.param(["-S", "-name", "guest=web01,debug-threads=on", "-m", "4G", "disk,secret=x.img"], id="others"),
        pytest.param(["-fw_cfg", "name=opt/x,file=/y"], id="firmware configuration from a file"),
    ],
)
def test_the_rest_stays_as_it_is(given: list[str]) -> None:
    assert redact(options(*given)) == (options(*given), [])
