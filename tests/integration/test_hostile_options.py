# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""All modules: bad values of options are refused by the option's name, before anything has changed."""

from __future__ import annotations

import copy
import os
import re
import tempfile
import typing as t
from contextlib import ExitStack
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import snapshot
from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Chain
from ansible_collections.vmfleet.backup.tests.harness.modules import NAMES, run_module, succeed

Values = dict[str, t.Any]

HUGE = 1 << 64
CONTROL = "a\x1b[2Jb"
NUL = "a\0b"
UNENCODABLE = "\ud800"
"""Half of a character, which has no bytes. Ansible itself stumbles over it where it is an option of its own."""
LONG = "x" * 300
LIST_OF_NAMES: list[list[str]] = [[], [""], [CONTROL], ["nosuch"], [NAME, "nosuch"], [UNENCODABLE]]


class World:
    """A repository with three sets of a VM that runs, places of all sorts, and the arguments of calls that are good."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self.chain = Chain(Vms(directory, stack), directory)
        succeed("backup_set", {"plan": self.plan(repository=str(directory / "outer"), create_repository=True)})
        for name in ("where", "outer/other"):
            (directory / name).mkdir()
        self.held = create(directory / "held.qcow2", MIB)
        stack.callback(os.close, os.open(self.held, os.O_RDONLY))
        (directory / "canary").write_text("nobody touches this")
        self.places = {
            "{dir}": str(directory),
            "{repo}": str(self.chain.library.path),
            "{where}": str(directory / "where"),
            "{outer}": str(directory / "outer"),
            "{held}": str(self.held),
            "{monitor}": str(self.chain.vm.monitor),
        }

    def plan(self, **options: t.Any) -> Values:
        given = {"repository": str(self.chain.library.path), "id": "s9", "reserve": "0"}
        vms = [{"monitor": str(self.chain.vm.monitor)}]
        return dict(succeed("backup_plan", {**given, "vms": vms, **options})["plan"])

    def arguments(self, module: str, changes: Values) -> Values:
        """The arguments of a good call with these changes."""
        if module == "backup_set" and "plan" in changes:
            changes = {**changes, "plan": _changed(self.plan(), changes["plan"])}
        if module == "backup_set" and "repository" in changes:
            return dict(self._placed({"state": "cancelled", **changes}))
        given = {"plan": self.plan()} if module == "backup_set" else copy.deepcopy(GOOD[module])
        return dict(self._placed({**given, **changes}))

    def _placed(self, value: t.Any) -> t.Any:
        if isinstance(value, str):
            for place, path in self.places.items():
                value = value.replace(place, path)
        if isinstance(value, dict):
            return {name: self._placed(each) for name, each in value.items() if each is not None}
        return [self._placed(each) for each in value] if isinstance(value, list) else value

    def state(self) -> object:
        """All that a call could have changed."""
        vm = self.chain.vm
        return snapshot(self.directory), vm.block_jobs, vm.qmp.execute("query-jobs"), vm.fdsets, vm.bitmaps("n0")


def _changed(plan: Values, changes: t.Any) -> t.Any:
    """A plan with these changes; those of VMs and disks are made to each of them."""
    if not isinstance(changes, dict):
        return changes
    return {
        **plan,
        **{
            name: [_changed(each, value) for each in plan[name]]
            if name in ("vms", "disks") and isinstance(value, dict)
            else _changed(plan[name], value)
            if isinstance(plan.get(name), dict) and isinstance(value, dict)
            else value
            for name, value in changes.items()
        },
    }


GOOD: dict[str, Values] = {
    "backup_follow": {"repository": "{repo}"},
    "backup_info": {"repository": "{repo}"},
    "backup_metrics": {"repository": "{repo}", "id": "s3", "directory": "{where}"},
    "backup_plan": {"repository": "{repo}", "vms": [{"monitor": "{monitor}"}], "reserve": "0"},
    "backup_prune": {"repository": "{repo}", "keep_last": 1},
    "backup_report": {"directory": "{where}", "id": "s3", "hypervisors": {}},
    "backup_restore": {"repository": "{repo}", "vm": NAME, "directory": "{where}"},
    "backup_verify": {"repository": "{repo}"},
    "block_job": {"monitor": "{monitor}", "job_id": "nosuch", "state": "paused"},
    "block_job_info": {"monitor": "{monitor}"},
    "drive_backup": {"monitor": "{monitor}", "device": "drive0", "target": "{where}/t.qcow2"},
    "vm_info": {"monitors": ["{monitor}"]},
}

REPOSITORY = ["", "relative", "./relative", "{dir}/nosuch", "{dir}/canary", "{where}", NUL, CONTROL, f"/{LONG}"]
PLACES = ["relative", "unix:", "tcp:nowhere", "tcp:h:0", "tcp:h:99999", "libvirt:", "libvirt:a/b"]
MONITOR = ["", *PLACES, f"/{NUL}", f"/{CONTROL}", f"libvirt:{NUL}"]
LIBVIRT_URI = [
    "",
    "qemu",
    "qemu+ssh://hv2/system",
    "qemu://hv2/system",
    "qemu:///system#x",
    f"qemu:///system?{CONTROL}",
]
SET_ID = ["", "../s1", "a/b", ".s1", NUL, CONTROL, LONG]
SIZE = [-1, "-5M", "nan", "inf", "1e400", HUGE, "5 parsecs", "", "fast"]
COUNT = [-1, "nan", "inf", HUGE, 1.5, "", "many"]
TIME = ["-1", -1, "nan", "inf", "", "soon", "5w", "1e9", "9" * 400, "9" * 30 + "d", "10 m 5 s", CONTROL]


def one(option: str, *values: t.Any, **others: t.Any) -> list[tuple[str, Values]]:
    """A case for each value of an option."""
    return [(option, {option: value, **others}) for value in values]


def disk(option: str, **values: t.Any) -> tuple[str, Values]:
    """A restore of one disk."""
    return option, {"directory": None, "disks": [{"name": "drive0", "target": "{where}/d.qcow2", **values}]}


def drive(option: str, **values: t.Any) -> tuple[str, Values]:
    """A copy of one drive of a list."""
    drives = [{"device": "drive0", "target": "{where}/d.qcow2", **values}]
    return option, {"device": None, "target": None, "drives": drives}


PERIODS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
PLANS: list[Values] = [
    *({"id": value} for value in ("../x", "", 5)),
    *({"repository": value} for value in ("relative", "", 5, f"/{NUL}")),
    *({name: 5} for name in ("run", "vms", "policy", "space", "warnings", "create_repository")),
    *({"vms": value} for value in ([5], [{}])),
    *({"policy": {"speed": value}} for value in ("fast", -1, HUGE)),
    *({"policy": {"max_chain": value}} for value in ("x", 0, HUGE)),
    *({"policy": {"reserve": value}} for value in ("nan", 5, "")),
    *({"policy": {name: "x"}} for name in ("offline", "tracking", "checksum", "encrypted_source")),
    *({"policy": {name: 5}} for name in ("compression", "encrypted_source")),
    *({"vms": {name: 5}} for name in ("name", "monitor", "identity", "include_disks", "agent")),
    {"vms": {"name": ""}},
    *({"vms": {name: "x"}} for name in ("monitor", "action", "wanted", "quiesce", "agent")),
    {"vms": {"disks": [5]}},
    *({"vms": {"disks": {name: value}}} for name, value in (("name", 5), ("bytes", "x"), ("target", "../../x.qcow2"))),
]
"""What somebody has changed in a plan by hand."""


TABLE: dict[str, list[tuple[str, Values]]] = {
    "backup_follow": [
        *one("repository", "", "relative", NUL, CONTROL, f"/{LONG}"),
        *one("worker", ""),
        *one("wait", -1, "nan", "soon"),
    ],
    "backup_info": [*one("repository", *REPOSITORY), *one("names", *LIST_OF_NAMES), *one("names", "", 5, {"a": 1})],
    "backup_metrics": [
        *one("repository", "", "relative", "{where}"),
        *one("id", *SET_ID),
        *one("directory", "", "relative", "{dir}/nosuch", "{dir}/canary", "{repo}", "{repo}/web01", NUL),
        *one("results", [{}], [{"name": 5, "state": "failed"}], [{"name": "x"}], "x", [5]),
        *one("results", [{"name": "x", "state": "failed", "changed": "x", "frozen_ms": "y"}]),
    ],
    "backup_plan": [
        *one("repository", *REPOSITORY),
        *one("repository", "{outer}/other", "{repo}/web01", "{repo}/new", create_repository=True),
        *one("create_repository", "perhaps", 5),
        *one("id", *SET_ID),
        ("vms", {"vms": []}),
        ("sockets", {"vms": None, "sockets": []}),
        *one("vms", [{}], [5]),
        *(("vms|monitor", {"vms": [{"monitor": monitor}]}) for monitor in MONITOR),
        *(("name", {"vms": [{"monitor": "{monitor}", "name": name}]}) for name in ("", CONTROL, NUL, UNENCODABLE)),
        *(("agent", {"vms": [{"monitor": "{monitor}", "agent": agent}]}) for agent in ("", "relative", NUL, CONTROL)),
        *(("level", {"vms": [{"monitor": "{monitor}", "level": level}]}) for level in ("", "most")),
        *one("sockets", ["relative/*.qmp"], ["*"], [""], [f"/{NUL}"], [f"/{CONTROL}"], vms=None),
        *one("libvirt_uri", *LIBVIRT_URI),
        *one("include_disks", [""], [CONTROL], [NUL]),
        *one("exclude_disks", [""], [CONTROL]),
        *one("level", "", "FULL", 5),
        *one("max_chain", 0, *COUNT),
        *one("tracking", "maybe", ""),
        *one("quiesce", "", "always"),
        *one("compression", "", "lzma"),
        *one("speed", *SIZE),
        *one("reserve", "", "-1", "-5%", "100%", "nan%", "inf", "nan", "5 %%", "1e400", str(HUGE), "most", "9999P"),
        *one("offline", "", "ignore"),
        *one("encrypted_source", ""),
    ],
    "backup_prune": [
        *one("repository", *REPOSITORY),
        *one("names", *LIST_OF_NAMES),
        *one("names", [], ["nosuch"], [NAME, "nosuch"], [""], None, keep_last=0, forget=True),
        *(case for period in PERIODS for case in one(f"keep_{period}", *COUNT)),
        *one("keep_within", "", "0d", "-1d", "14", "14m", "nan", "1.5d", "9" * 30 + "y", CONTROL, 14),
        ("keep_last", {"keep_last": 0}),
        *one("protect", ["nosuch"], [""], ["s1", "nosuch"], ["../s1"], [CONTROL]),
        *one("unprotect", ["nosuch"], [""], ["s1", "nosuch"]),
        ("unprotect", {"protect": ["s1"], "unprotect": ["s1"]}),
        ("protect", {"keep_last": 0, "protect": ["nosuch"], "names": [NAME]}),
        *one("consolidate", "perhaps"),
    ],
    "backup_report": [
        *one("directory", "", "relative", "{dir}/canary", "{dir}/canary/x", "{repo}", "{repo}/reports", NUL, CONTROL),
        *one("id", *SET_ID),
        *one("hypervisors", "x", []),
        *one("errors", "x"),
        *one("pending", {"a": 1}),
    ],
    "backup_restore": [
        *one("repository", *REPOSITORY),
        *one("vm", "", "nosuch", "../web01", CONTROL, NUL),
        *one("id", "nosuch", "s9", *SET_ID),
        *one("before", "", "yesterday", "0", "2026-13-01", "2026-02-30", "2026-11-22T25:00", "nan", "9" * 40, CONTROL),
        *one("before", "1970-01-01", "0001-01-01T00:00:00+23:59", "2026-11-22T00:00:00+99:00"),
        ("before", {"id": "s1", "before": "2026-11-22"}),
        *one("directory", "", "relative", "~nobodyhere", "{dir}/nosuch", "{dir}/canary", "{repo}", "{outer}"),
        *one("directory", NUL, CONTROL),
        ("disks", {"disks": [{"name": "drive0", "target": "{where}/d"}]}),
        *one("disks", [], [{}], [5], directory=None),
        *one("disks", [{"name": "nosuch", "target": "{where}/d"}], directory=None),
        disk("name", name=""),
        disk("name", name=CONTROL),
        *(disk("target", target=path) for path in ("", "relative", "{where}", "{where}/no/such", "/dev/null")),
        *(disk("target", target=path) for path in ("{repo}/x", "{outer}/x.qcow2", "{outer}/other/x")),
        *(disk("target", target="{where}/" + name) for name in (LONG, NUL, CONTROL, UNENCODABLE)),
        disk("format", format="vmdk"),
        ("target", {**disk("target", target="{held}")[1], "overwrite": True}),
        *one("method", "", "clone"),
        ("format", {**disk("format", format="raw")[1], "method": "overlay"}),
        *one("state", "", "gone"),
        *one("vm", "nosuch", directory=None, state="absent", disks=[{"name": "drive0", "target": "{where}/d"}]),
        *one("disks", [], directory=None, state="absent"),
        *one("directory", "relative", "{repo}", state="absent"),
        ("target", {"state": "absent", "directory": None, "disks": [{"name": "drive0", "target": "relative"}]}),
    ],
    "backup_set": [
        *one("repository", *REPOSITORY),
        *one("names", *LIST_OF_NAMES, repository="{repo}"),
        *one("names", *LIST_OF_NAMES[:4], None, repository="{repo}", state="untracked"),
        ("names", {"names": [NAME], "plan": {}}),
        *one("plan", "x", [], 5),
        *(("plan", {"plan": changes}) for changes in PLANS),
        *one("max_vms", *COUNT),
        *one("bandwidth", *SIZE),
        *one("slice", -1, "nan", "inf", "-inf", "1e400", "", "soon"),
        *one("timeout", *TIME),
        *one("stall_timeout", *TIME),
        *one("state", "", "done"),
        *one("progress", "", "loud"),
        *one("slice", 5, state="started"),
        *one("nice", -1, 20, "nan", "low"),
        *one("ionice", "", "realtime"),
        *one("cpu_weight", -1, 0, 10001, "", "nan", "idle"),
        *one("detach", "", "perhaps"),
        *one("detach", "preferred", repository="{repo}", state="cancelled"),
        *one("worker", ""),
    ],
    "backup_verify": [
        *one("repository", *REPOSITORY),
        *one("names", *LIST_OF_NAMES),
        *one("id", *SET_ID),
        *one("id", "nosuch"),
        *one("depth", "", "deep"),
        *one("boot_timeout", 0, *COUNT),
        *one("boot_agent", "perhaps"),
        ("boot_agent", {"depth": "boot", "boot_agent": False}),
        *one("boot_pattern", "(", "*", depth="boot"),
        *one("boot_options", ["-nic", "user"], ["-daemonize"], [NUL], [""], depth="boot"),
        *one("qemu", "", "relative/qemu", "/no/such/qemu", "{dir}", "{dir}/canary", NUL, depth="boot"),
        *one("tmpdir", "", "relative", "{dir}/nosuch", "{dir}/canary", "{repo}", "{repo}/web01", NUL, depth="boot"),
        *one("boot_timeout", -1, HUGE, "nan", depth="boot"),
        *one("boot_files", [""], ["relative"], ["/no/such"], [f"/{CONTROL}"], depth="boot"),
        *one("boot_user", "", "nosuch", CONTROL, depth="boot"),
    ],
    "block_job": [
        *one("monitor", *MONITOR),
        *one("libvirt_uri", *LIBVIRT_URI),
        *one("job_id", "", CONTROL, NUL, "nosuch"),
        *one("state", "", "stopped"),
        *one("speed", *SIZE, state=None),
        ("state", {"state": None}),
    ],
    "block_job_info": [
        *one("monitor", *MONITOR),
        *one("libvirt_uri", *LIBVIRT_URI),
        *one("type", "", "copy"),
        *one("job_id", "", CONTROL, NUL),
    ],
    "drive_backup": [
        *one("monitor", *MONITOR),
        *one("libvirt_uri", *LIBVIRT_URI),
        *one("device", "", "nosuch", CONTROL, NUL),
        *one("target", "", "relative", "~/t", "json:{}", "nbd://h", "{where}", "{where}/no/such", f"{{where}}/{LONG}"),
        *one("target", "{where}/a\0b", f"{{where}}/{CONTROL}"),
        *one("target", "{repo}/x", "{repo}/web01/s3/x"),
        *one("target", "{outer}/other/x.qcow2", "{dir}/canary", "{held}"),
        *one("target", "{held}", overwrite=True),
        *one("receipt", "", "relative", "{where}/no/such", "{repo}/r.json", "{repo}/web01/r.json"),
        *one("receipt", "{where}/a\0b", CONTROL),
        *one("format", "", "nosuch", "luks", CONTROL, NUL, "-h"),
        *one("mode", "", "new"),
        *one("mode", "existing"),
        *one("speed", *SIZE),
        *one("on_source_error", "", "panic"),
        *one("sync", "", "none"),
        *one("bitmap", "", "nosuch", CONTROL, NUL, LONG * 4, sync="incremental"),
        *one("bitmap_mode", "", "never"),
        *one("compress", "perhaps"),
        *one("job_id", "", "1x", "a b", CONTROL, NUL, LONG * 4),
        ("drives", {"drives": [], "device": None, "target": None}),
        *one("drives", [{}], [5], [{"device": "drive0"}], device=None, target=None),
        drive("speed", speed=-1),
        drive("speed", speed=HUGE),
        drive("target", target="relative"),
        drive("target", target=""),
        drive("job_id", job_id=""),
        drive("receipt", receipt="relative"),
        *one("completion_mode", ""),
        *one("state", "", "done"),
        *one("timeout", *TIME),
        *one("stall_timeout", *TIME),
        *one("on_timeout", "", "wait"),
    ],
    "vm_info": [
        *one("monitors", [], [""], ["relative"], ["tcp:x"], [f"/{NUL}"], [f"/{CONTROL}"], [5], {"a": 1}),
        *one("sockets", [], [""], ["relative/*"], ["*"], [f"/{NUL}"], [f"/{CONTROL}"], [UNENCODABLE], monitors=None),
        *one("libvirt_uri", *LIBVIRT_URI),
    ],
}

CASES = [(module, option, values) for module, cases in TABLE.items() for option, values in cases]


def _name(value: object) -> str:
    return re.sub(r"[^ -~]", "?", str(value))[:60]


class Worlds:
    """Has a world for the next call: the same one, as long as no call has changed it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._world: World | None = None

    def take(self) -> World:
        world, self._world = self._world, None
        if world is None:
            path = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vmfleet-test-"))
            world = World(Path(path), self._stack)
        return world

    def give_back(self, world: World) -> None:
        self._world = world


@pytest.fixture(scope="module")
def worlds() -> t.Iterator[Worlds]:
    with ExitStack() as stack:
        yield Worlds(stack)


def test_every_module_is_here() -> None:
    assert sorted(TABLE) == NAMES
    assert len(CASES) >= 164


@pytest.mark.parametrize(("module", "option", "values"), CASES, ids=_name)
def test_refused(worlds: Worlds, monkeypatch: pytest.MonkeyPatch, module: str, option: str, values: Values) -> None:
    world = worlds.take()
    # What a relative path leads to is seen there.
    monkeypatch.chdir(world.directory)
    arguments = world.arguments(module, values)
    before = world.state()
    result = run_module(module, arguments)
    assert result["rc"] != 0, result
    assert result.get("failed") is True
    assert "exception" not in result, result["exception"]
    assert "internal error" not in result["msg"]
    assert re.search(rf"(?<![\w-])({option})\b", result["msg"]), result["msg"]
    assert world.state() == before
    worlds.give_back(world)
