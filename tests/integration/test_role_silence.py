# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs that backed up nothing, or did not hear what was asked for, and are no success."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

VERBS = ("backup", "status", "verify", "prune", "cancel", "restore")


@pytest.fixture
def hypervisor(directory: Path) -> Hypervisor:
    return Hypervisor(directory)


@pytest.mark.parametrize("options", [(), ("--check",)], ids=["", "check"])
def test_a_hypervisor_without_vms(hypervisor: Hypervisor, directory: Path, options: tuple[str, ...]) -> None:
    pattern = str(directory / "*.qmp")
    play = hypervisor.run(*options, sockets=[pattern])
    assert play.rc == 2, play.output
    assert f"no VM was found, so nothing was backed up: no socket matches vm_backup_sockets: {pattern}" in play.output
    assert "set vm_backup_allow_empty: true" in play.output
    play = hypervisor.run(*options, sockets=[pattern], allow_empty=True)
    assert play.rc == 0, play.output


@pytest.mark.parametrize("verb", VERBS)
def test_a_pattern_that_matches_no_host(hypervisor: Hypervisor, verb: str) -> None:
    play = hypervisor.play(verb, "-e", "vm_backup_hosts=hpyervisors", restore_vm="web01")
    assert play.rc != 0, play.output
    assert "no host of the inventory matches 'hpyervisors', so nothing was done" in play.output


def test_a_limit_that_leaves_no_host(directory: Path) -> None:
    hypervisor = Hypervisor(directory, hosts=("hv1", "hv2"))
    play = hypervisor.play("status", "-e", "vm_backup_hosts=hv1", "--limit", "hv2")
    assert play.rc != 0, play.output
    assert "none of the hosts that match 'hv1' is left by --limit hv2, so nothing was done" in play.output


def test_a_limit_of_a_file_that_leaves_no_host(directory: Path) -> None:
    hypervisor = Hypervisor(directory, hosts=("hv1", "hv2"))
    (directory / "some.retry").write_text("hv2\n\n")
    play = hypervisor.play("status", "-e", "vm_backup_hosts=hv1", "--limit", f"@{directory / 'some.retry'}")
    assert play.rc != 0, play.output
    assert "none of the hosts that match 'hv1' is left by --limit @" in play.output


def test_a_name_that_nobody_knows_does_not_keep_the_report_back(
    vms: Vms, hypervisor: Hypervisor, directory: Path
) -> None:
    vm = vms.start(name="web01")
    play = hypervisor.run(sockets=[str(vm.monitor)], names=["web01", "wbe02"], report_dir=str(directory / "reports"))
    assert play.rc == 2, play.output
    assert "no hypervisor of this run has a VM of the name wbe02" in play.output
    assert (directory / "reports" / "s1.json").exists()


def test_check_mode_with_a_vm_that_would_fail(vms: Vms, hypervisor: Hypervisor, directory: Path) -> None:
    good = vms.start(name="web01")
    listed = [{"monitor": str(good.monitor)}, {"monitor": str(directory / "gone.qmp"), "name": "db01"}]
    play = hypervisor.run("--check", vms=listed)
    assert play.rc == 2, play.output
    assert "start   web01" in play.output
    assert "hv1: no set s1 of db01; the reasons are above." in play.output
    assert hypervisor.run("--check", vms=listed[:1]).rc == 0
    assert not hypervisor.sets.path.exists()


@pytest.mark.parametrize("variable", ["metrics_dir", "report_dir"])
def test_where_nothing_could_be_told_of_the_sets(
    vms: Vms, hypervisor: Hypervisor, directory: Path, variable: str
) -> None:
    vm = vms.start(name="web01")
    place = directory / "metrics"
    place.write_text("a file")
    play = hypervisor.run(**{"sockets": [str(vm.monitor)], variable: str(place)})
    assert play.rc == 2, play.output
    assert f"vm_backup_{variable} is '{place}'" in play.output
    assert not hypervisor.sets.path.exists()
    place.rename(directory / "file")
    (directory / "real").mkdir()
    place.symlink_to(directory / "real")
    play = hypervisor.run(**{"sockets": [str(vm.monitor)], variable: str(place)})
    assert play.rc == 0, play.output
    assert list(place.iterdir())


@pytest.mark.parametrize("verb", VERBS)
def test_a_variable_that_nobody_hears(hypervisor: Hypervisor, verb: str) -> None:
    play = hypervisor.play(verb, names=["web01"], exlude_disks=["vdb"], restore_vm="web01", sockets=["/nowhere/*"])
    assert play.rc == 2, play.output
    said = "vm_backup_exlude_disks is not a variable of this role: did you mean vm_backup_exclude_disks?"
    assert said in play.output
    assert not hypervisor.sets.path.exists()


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_missing_is_told_in_one_line(hypervisor: Hypervisor, verb: str) -> None:
    play = hypervisor.play(verb, repository="")
    assert play.rc == 2, play.output
    assert "vm_backup_repository is missing. Give the absolute path of the directory of the sets" in play.output
    assert "argument_spec" not in play.output
    assert max(map(len, play.output.splitlines())) < 400


def test_the_vm_that_is_to_be_restored_is_missing(hypervisor: Hypervisor) -> None:
    play = hypervisor.play("restore", restore_directory="/nowhere")
    assert play.rc == 2, play.output
    assert "vm_backup_restore_vm is missing. Name the VM, as it is called in the repository" in play.output
    assert "argument_spec" not in play.output


def test_names_choose_among_the_vms_of_all_hypervisors(vms: Vms, directory: Path) -> None:
    one, two = vms.start(name="web01"), vms.start(vms.disk(1), name="db01")
    both = Hypervisor(directory, hosts={"hv1": sockets(one), "hv2": sockets(two)})
    play = both.run(names=["db*"])
    assert play.rc == 0, play.output
    assert both.sets.path.joinpath("db01", "s1").is_dir()
    assert not both.sets.path.joinpath("web01").exists()
    play = both.run(exclude_names=["db01"])
    assert play.rc == 0, play.output
    assert both.sets.path.joinpath("web01", "s1").is_dir()
    play = both.run(names=["web01", "wbe02"])
    assert play.rc == 2, play.output
    assert "vm_backup_names: no hypervisor of this run has a VM of the name wbe02." in play.output
    # The other verbs, whose hypervisors share the repository.
    for verb, variables in (("verify", {"id": ""}), ("prune", {"keep": {"last": 1}}), ("status", {})):
        play = both.play(verb, exclude_names=["web*"], **variables)
        assert play.rc == 0, play.output
        assert "web01" not in play.output
    assert both.play("status", names=["web*", "db01"], max_age="52w").rc == 0
    assert both.play("cancel", names=["nosuch"]).rc == 2


def sockets(vm: Qemu) -> dict[str, t.Any]:
    return {"vm_backup_sockets": [str(vm.monitor)]}
