# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Leave the sets of a plan to a worker: a process on the hypervisor that makes them whether anybody waits or not.

It is a fork of the module, and does what a call with C(state=completed) does: its memory is the repository and QEMU,
and one that is killed is a killed module. There is one for each repository at a time, by a lock that ends with it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import secrets
import shutil
import sys
import time
import zipfile
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from .._common.errors import BackupError, Refused, in_words, warn, why
from .._common.formats import Word, utc_now
from .._common.options import check_options
from .._host.priority import give_way
from .._host.process import PROC_FDS, PROCESSES, Process, spaces
from .._host.scope import enter_scope, offers_scopes
from .._host.worker import run_in_worker
from .._plan.model import Action, parse_plan
from .board import Board
from .outcome import BAD, UNFINISHED, Outcome, VmState, failure, outcome_of, told
from .worker_place import SOON, Standing, Who, WorkerPlace, all_of, gives_way, print_result, vms_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, NoReturn

    from ansible.module_utils.basic import AnsibleModule

    from .._plan.model import Plan

    Result = Coroutine[Any, Any, dict[str, Any]]
    Main = Callable[[AnsibleModule, Board], Result]
    Alone = Callable[[AnsibleModule], Result]


ORDERS = ("takeover", "supersede", "adopt")
"""What a worker that was left without it does not do."""
SETTINGS = (
    *("max_vms", "bandwidth", "timeout", "offline_timeout", "stall_timeout"),
    *("nice", "ionice", "cpu_weight", "trust_others"),
)
"""What holds for all VMs of a worker, beside the plan."""
WORDS = 2000
"""Bytes of what a worker says when it begins: why it cannot, or what it warns of."""
FAILS, WARNS = b"!", b"?"
YIELDING = 5.0
"""Seconds that a worker waits at most until one that gives way to it has ended."""


class Detach(Word):
    """Whether sets are left to a worker."""

    NEVER = "never"
    PREFERRED = "preferred"
    REQUIRED = "required"


def leave(module: AnsibleModule, main: Main) -> None:
    """Leave the sets to a worker that does C(main), and end the module with how far it is.

    Return where this call has to make them itself, because the repository has a worker with other sets or for another
    path, or the new one has died at once.
    """
    try:
        check_options(module.argument_spec, module.params)
        plan = parse_plan(module.params["plan"])
        place = WorkerPlace.of(plan.repository)
        key = _begin(module, main, plan, place) or _join(module, plan, place)
        found = place.follow(key, module.params["slice"]) if key else Standing(None, running=False)
        if key and not found.running and not found.result and module.params["detach"] == Detach.REQUIRED:
            raise BackupError(f"detach: the worker ended before it began; read its last output in {place.log}")
        refusal = gives_way(found.result)
        if refusal and module.params["detach"] == Detach.REQUIRED:
            raise BackupError(refusal)
    except (BackupError, OSError) as error:
        said = str(error) if isinstance(error, BackupError) else f"detach: no worker could begin: {why(error)}"
        if isinstance(error, Refused) or module.params["detach"] == Detach.REQUIRED:
            module.fail_json(msg=said)
        warn(module, f"{said}; this call makes the sets itself")
        return
    if found.running or (found.result and not refusal):
        _tell(module, plan, found, key)


def _tell(module: AnsibleModule, plan: Plan, found: Standing, key: str) -> None:
    """End the module with what the worker says of the VMs of this plan, which may be some of its own."""
    if found.result and all_of(found.result, plan.id, [vm.name for vm in plan.vms]):
        print_result(found.result)
    by_name: dict[str, list[Outcome]] = {}
    for outcome in map(outcome_of, vms_of(found.result) if found.result else found.vms):
        by_name.setdefault(outcome.name, []).append(outcome)
    if any(vm.name not in by_name for vm in plan.vms):
        # It has failed as a whole.
        print_result(found.result)
    outcomes = [by_name[vm.name].pop(0) for vm in plan.vms]
    result: dict[str, Any] = {
        "changed": any(outcome.changed for outcome in outcomes),
        **told(outcomes, "started"),
        "qmp": [],
    }
    if any(outcome.state in UNFINISHED for outcome in outcomes):
        module.exit_json(**result, worker=key)
    error = failure(outcomes, plan.id, "started")
    if error:
        module.fail_json(msg=error, **result)
    module.exit_json(**result)


def _begin(module: AnsibleModule, main: Main, plan: Plan, place: WorkerPlace) -> str:
    """Fork the worker; return its key, or nothing where the repository has one."""
    fd = place.take()
    if fd is None:
        return ""
    try:
        return _fork(module, main, plan, place, fd)
    finally:
        # The worker has it, too.
        os.close(fd)


def _fork(module: AnsibleModule, main: Main, plan: Plan, place: WorkerPlace, lock: int) -> str:
    with suppress(FileNotFoundError):
        os.unlink(place.stop)
    _load_payload()
    key = secrets.token_hex(8)
    sys.stdout.flush()
    sys.stderr.flush()
    source, sink = os.pipe()
    if os.fork() == 0:
        os.close(source)
        _live(module, main, place, lock, sink, key)
    os.close(sink)
    # It says who it is, or why it cannot begin.
    said = os.read(source, WORDS)
    os.close(source)
    kind, text = said[:1], os.fsdecode(said[1:])
    if kind == FAILS:
        raise BackupError(f"detach: the worker of {plan.repository} could not begin: {text}")
    if kind == WARNS:
        for warning in text.split("\n"):
            warn(module, warning)
    return key


def _wanted(module: AnsibleModule, plan: Plan) -> list[str]:
    """Return a digest of what is asked for each VM: only the same set may be taken for the one that is wanted."""
    settings = repr((plan.id, plan.policy, [module.params[name] for name in SETTINGS]))
    return [hashlib.sha256(f"{settings}{vm.request}".encode()).hexdigest() for vm in plan.vms]


def _leaves_out(found: Standing, plan: Plan) -> bool:
    """Tell whether a worker is done with a VM that this plan would bring to its set: it has failed, or was skipped."""
    names = {vm.name for vm in plan.vms}
    wanted = {vm.name for vm in plan.vms if vm.action != Action.SKIP}
    return any(
        (vm["state"] in BAD and vm["name"] in names) or (vm["state"] == VmState.SKIPPED and vm["name"] in wanted)
        for vm in found.vms
    )


def _join(module: AnsibleModule, plan: Plan, place: WorkerPlace) -> str:
    """Return the key of the worker that makes the same sets; nothing where it makes others, or leaves one out."""
    found = place.look()
    who = found.who
    ordered = any(module.params[order] for order in ORDERS)
    if who and found.running and not ordered and not _leaves_out(found, plan):
        others = Counter(_wanted(module, plan)) - Counter(who.wanted)
        if not others:
            return who.key
    if module.params["detach"] == Detach.REQUIRED:
        raise Refused(
            "detach",
            (
                f"process {who.pid} makes the sets {who.id} in {plan.repository} since {who.since}"
                if who
                else f"another process begins to make sets in {plan.repository}"
            )
            + "; wait until it ends, run the backup without detach, or cancel all sets in progress",
        )
    return ""


# The worker


def _load_payload() -> None:
    """Load all that Ansible has packed for this module, which it removes when the module has ended."""
    payload = next((part for part in sys.path if zipfile.is_zipfile(part)), None)
    if not payload:
        return
    with zipfile.ZipFile(payload) as packed:
        names = [name[: -len(".py")].replace("/", ".") for name in packed.namelist() if name.endswith(".py")]
    for name in names:
        if name.startswith("ansible") and not name.endswith("__init__"):
            # What needs a library that is not here is met without it, too, and says so then.
            with suppress(ImportError):
                importlib.import_module(name)
    # Whoever begins anew in a process of its own, as a guard does, loads it from here.
    fd = os.memfd_create("payload")
    os.set_inheritable(fd, True)
    with open(payload, "rb") as source, open(fd, "wb", closefd=False) as sink:
        shutil.copyfileobj(source, sink)
    sys.path[sys.path.index(payload)] = f"{PROC_FDS}{fd}"


def _live(module: AnsibleModule, main: Main, place: WorkerPlace, lock: int, sink: int, key: str) -> NoReturn:
    """Live as the worker. It keeps C(lock) until its end."""
    status = 1
    try:
        os.setsid()
        plan = parse_plan(module.params["plan"])
        me = process_of(os.getpid())
        names = [vm.name for vm in plan.vms]
        wanted = _wanted(module, plan)
        who = Who(me.pid, me.start, spaces()[PROCESSES], key, plan.id, utc_now(), names, wanted, plan.run)
        # What the worker before has printed goes first: it is not to be taken for this one's.
        result = new_file(place.result)
        os.write(result, f"{key}\n".encode())
        os.pwrite(lock, json.dumps(who._asdict()).encode(), 0)
        # Ansible reads the module's output to its end, and would wait.
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), result, new_file(place.log))):
            os.dup2(file, number)
        warnings = _settle(module, f"{plan.repository}, sets {plan.id}", key)
        # They are in its result, too, which may be all that is told.
        for warning in warnings:
            warn(module, warning)
        _say(sink, WARNS, "\n".join(warnings))
    except BaseException as error:  # noqa: BLE001
        _say(sink, FAILS, in_words(error) if isinstance(error, OSError) else repr(error))
        os._exit(status)
    try:
        board = Board(place.progress, key, lambda uuid: _give_way(place, key, uuid))

        async def make(module: AnsibleModule) -> dict[str, Any]:
            try:
                return await main(module, board)
            finally:
                # Where a call hangs in the kernel, this process cannot end, but the one that waits for it can.
                os.close(lock)

        status = _make(module, make, plan)
    finally:
        os._exit(status)


def _give_way(place: WorkerPlace, key: str, uuid: str) -> None:
    """Raise Refused where the repository has another worker, to which it was given by another path.

    Of two that begin at the same time, at least one sees the other: each has put up its repository before it looks.
    Where both do, the one with the larger key gives way, and the other one waits for its end.
    """
    for other in (one for one in WorkerPlace.every() if one != place):
        deadline = time.monotonic() + YIELDING
        while True:
            found = other.look()
            who = found.who
            if not who or not found.running or found.repository != uuid:
                break
            if found.begun or who.key < key:
                raise Refused(
                    "detach",
                    f"process {who.pid} makes the sets {who.id} in the same repository, by another path, since"
                    f" {who.since}; wait until it ends, run the backup without detach, or cancel all sets in progress",
                    gives_way=True,
                )
            if time.monotonic() > deadline:
                # It has been stopped, or takes long to end. When it looks, it finds this one, and gives way.
                break
            time.sleep(SOON)


def _settle(module: AnsibleModule, sets: str, key: str) -> list[str]:
    """Give this process its own unit and its priorities; return what to warn of. What it starts later has the same."""
    params = module.params
    warnings = []
    stays = "systemd is not the init here, or this is not root"
    if offers_scopes():
        stays = enter_scope(f"vmfleet-backup-{key}.scope", f"Backup of VMs to {sets}", params["cpu_weight"])
        # Where somebody follows it, one that ends too early is replaced.
        if stays and params["detach"] == Detach.REQUIRED:
            warnings.append(f"detach: the worker ends with the session or the unit that it was started from: {stays}")
    if stays and params["cpu_weight"] is not None:
        warnings.append(f"cpu_weight: it is not set, because the worker has no unit of its own: {stays}")
    slow = give_way(params["nice"], params["ionice"])
    return [*warnings, *([f"ionice: the priority of the worker's I/O is not changed: {slow}"] if slow else [])]


def _say(sink: int, kind: bytes, text: str) -> None:
    """Tell the module that waits, be there anything to tell or not. It may have been killed."""
    with suppress(BrokenPipeError):
        os.write(sink, (kind + os.fsencode(text))[:WORDS] if text else b"")
    os.close(sink)


def process_of(pid: int) -> Process:
    """Return the process of this pid. Where /proc does not show those that are called so here, the pid has to do."""
    return Process.of(pid) or Process(pid, 0)


def new_file(path: str) -> int:
    """Make a file, or make it empty, and return its file descriptor."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)


def _make(
    module: AnsibleModule, main: Callable[[AnsibleModule], Coroutine[Any, Any, dict[str, Any]]], plan: Plan
) -> int:
    """Bring the sets to their end; return the exit status of the module."""
    module.params.update(state="completed", detach=Detach.NEVER, unattended=False, slice=0)
    module.log(f"vmfleet.backup: makes the sets {plan.id} in {plan.repository}")
    try:
        run_in_worker(module, main)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        how = "with failures" if status else "without failures"
        module.log(f"vmfleet.backup: the worker for the sets {plan.id} in {plan.repository} has ended {how}")
        return status
