# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the test of the newcomer's road has to know beside the text: exceptions, each with its reason."""

from __future__ import annotations

README = "README.md"
ROLE = "roles/vm_backup/README.md"
ROLE_HYPERVISOR = "roles/hypervisor/README.md"
ROLE_SCHEDULE = "roles/schedule/README.md"


def guide(name: str) -> str:
    """Return the path of a guide."""
    return f"docs/docsite/rst/{name}.rst"


HV01, HV02, CONTROLLER = "hv01.example.com", "hv02.example.com", "controller"

BACKUP = "ansible-playbook -i inventory.yml vmfleet.backup.backup -e vm_backup_id="

NOT_RUN = {
    (README, "make demo"): "a check of its own",
    (README, "make demo LIBVIRT=1"): "a check of its own",
    (README, "make test"): "it runs this test",
    (guide("guide_worst_day"), "mount -o ro /dev/disk/by-label/backup /srv/backup"): "there is no such disk",
    (
        guide("guide_worst_day"),
        "mount -t nfs -o ro,vers=4.2,soft,timeo=300 backup.example.com:/backup /srv/backup",
    ): "there is no NFS server",
    (guide("guide_worst_day"), "less /root/web01.sh"): "it waits for a key",
    (ROLE_HYPERVISOR, "pip download --no-deps --dest files 'qemu.qmp>=0.0.4'"): "run before, where there is a network",
    (guide("host_rhel"), "semanage fcontext -a -t svirt_image_t '/srv/backup(/.*)?'"): "the kernel has no SELinux",
    (guide("host_rhel"), "restorecon -R /srv/backup"): "the kernel has no SELinux",
    (
        guide("guide_reports"),
        (
            "ansible-navigator run backup.yml -i inventory.yml -e vm_backup_report_dir=/srv/reports"
            " --execution-environment-volume-mounts /srv/reports:/srv/reports"
        ),
    ): "it starts a container",
    (guide("restoring"), "qmp-shell /run/vmfleet-monitors/web01.qmp"): "it waits for what is typed",
    (
        guide("restoring"),
        "losetup --find --show --partscan --read-only /var/tmp/vda.raw",
    ): "loop devices are the machine's, and would stay when the test is killed",
    (guide("restoring"), "mount -o ro,noload /dev/loop0p1 /mnt"): "needs the loop device",
    (guide("schedule"), "systemctl list-timers 'vmfleet-*'"): "systemd does not run here",
    (guide("schedule"), "journalctl -u vmfleet-backup"): "systemd does not run here",
}
"""Commands that are not run, and why."""

BLOCKS_NOT_RUN = {
    (guide("fleets"), "- name: Set up the backups in AWX"): "needs an AWX; test_awx_example.py looks at it",
    (
        guide("guide_reports"),
        (
            "# Alerts for Prometheus on what vm_backup_metrics_dir writes, for a backup each night and a verification"
            " each week."
        ),
    ): "rules of Prometheus; test_alerts.py looks at them",
}
"""Blocks of YAML that are not for Ansible here, by their first line, and why."""

WHERE = {
    README: HV02,
    guide("getting_started"): CONTROLLER,
    guide("guide_reports"): CONTROLLER,
    guide("schedule"): CONTROLLER,
}
"""Where the commands of a page are run, other than ansible's: else on the first hypervisor."""

HOMES = {guide("getting_started"): "/home/newcomer"}
"""Where $HOME of the controller is another directory than the one in the password file."""

ELSEWHERE = {
    (guide("restoring"), "virsh start web01"): HV02,
}
"""Commands that are run somewhere else than the others of their page."""

OLD01 = "s/app01-vda/old01/; s/app01/old01/; /<uuid>/d"
# It is ended when all is made new.
OLD01_WITHOUT_LIBVIRT = (
    "qemu-img create -q -f qcow2 old01.qcow2 8M && qemu-system-x86_64 -machine none -nodefaults -display none"
    " -daemonize -name old01 -drive if=none,id=vda,format=qcow2,file=old01.qcow2"
    " -qmp unix:/run/vmfleet-monitors/old01.qmp,server=on,wait=off -pidfile /root/walk/web01.pid"
)

BEFORE: dict[str, list[tuple[str, str]]] = {
    guide("guide_reports"): [(CONTROLLER, f"{BACKUP}2026-11-22 -e vm_backup_report_dir=/srv/reports")],
    guide("guide_worst_day"): [
        *((CONTROLLER, BACKUP + each) for each in ("2026-11-22", "tue", "wed")),
        (HV01, "mkdir /var/lib/images; truncate -s 64M /dev/vg0/web01"),
    ],
    guide("how_it_works"): [
        (HV01, "qemu-img create -q -f qcow2 vda.qcow2 4M"),
        (HV01, "printf secret > key"),
    ],
    guide("incremental_backups"): [(CONTROLLER, BACKUP + each) for each in ("first", "second")],
    guide("monitoring"): [
        (CONTROLLER, f"{BACKUP}first -e vm_backup_report_dir=/srv/reports"),
        (HV01, "mkdir -p /var/lib/monitoring"),
    ],
    guide("operating"): [(CONTROLLER, BACKUP + "first")],
    guide("powered_off"): [
        (HV01, "virsh destroy web01; virsh undefine web01"),
        (HV01, "qemu-img create -q -f qcow2 /var/lib/vms/web01.qcow2 8M"),
        (HV01, "truncate -s 8M /dev/vg0/web01-data"),
    ],
    guide("restoring"): [(CONTROLLER, BACKUP + "2026-11-22")],
    guide("retention"): [
        (CONTROLLER, BACKUP + "old"),
        # A VM that is gone in the end, and its sets are there.
        (HV02, "qemu-img create -q -f qcow2 /var/lib/libvirt/images/old01.qcow2 8M"),
        (HV02, f"virsh dumpxml app01 --inactive | sed '{OLD01}' | virsh define /dev/stdin"),
        (CONTROLLER, BACKUP + "before-upgrade"),
        (HV02, "virsh undefine old01"),
    ],
    guide("verifying"): [(CONTROLLER, BACKUP + "2026-11-22")],
    ROLE: [(HV01, OLD01_WITHOUT_LIBVIRT), (CONTROLLER, BACKUP + "before-upgrade")],
}
"""What has been done when a page begins."""

CHECK = "ansible-playbook -i inventory.yml vmfleet.backup.backup --check --limit hv01.example.com"
VERBS = {
    guide("retention"): "ansible-playbook -i inventory.yml vmfleet.backup.prune --check",
    # No guest is in these VMs; test_verify_boot.py starts some.
    guide("verifying"): "ansible-playbook -i inventory.yml vmfleet.backup.verify -e vm_backup_verify=manifest",
    ROLE_HYPERVISOR: "ansible-playbook -i inventory.yml playbook.yml",
}
"""What variables of a page are given to, other than CHECK."""

OVERLAY = (
    "ansible-playbook -i inventory.yml vmfleet.backup.restore --limit hv01.example.com -e vm_backup_restore_vm=web01"
    " -e vm_backup_restore_directory=/var/tmp/look -e vm_backup_restore_method=overlay -e vm_backup_checksum=false"
)
AGAIN = {
    # The text goes on from before the overlay was removed.
    (guide("restoring"), 'qemu-img rebase -p -b "" /var/tmp/look/vda.qcow2'): (CONTROLLER, OVERLAY),
}
"""What is done once more before a command."""

TASKS_BEFORE = {
    guide("guide_progress"): [
        {
            "name": "Plan",
            "vmfleet.backup.backup_plan": {
                "repository": "/srv/backup",
                "create_repository": True,
                "id": "by-tasks",
                "domains": ["*"],
            },
            "register": "planned",
        }
    ],
}
"""Tasks that a page's own tasks need before them."""

ENDS: dict[tuple[str, str], tuple[int, str]] = {
    (guide("fleets"), f"{BACKUP}2026-11-26 --limit 'hypervisors[100:199]'"): (
        1,
        "leaves us with no hosts to target",
    ),
    # The text says what is to be changed before, where libvirt has started the VM.
    (guide("guide_worst_day"), "sh /root/web01.sh"): (1, "is not a socket"),
}
"""Commands that end with another status than 0 here, and what they say then."""

SUBSTITUTIONS = {
    "ansible-galaxy collection install vmfleet.backup": (
        "ansible-galaxy collection install {tarball}",
        "what is to be published, and not what was",
    ),
    "2026-11-22T03:00:00Z": ("{now}", "what stands for a time at which there was a set"),
}
"""What is put in the place of what, and why."""

SHOWN = {
    (README, "Backup"),
    (README, "/srv/backup:"),
    (guide("getting_started"), "Backup"),
}
"""Blocks of text that show what the command before them prints, by their first word."""

THOROUGH = {
    *("roles/schedule/README.md", "roles/vm_backup/README.md"),
    *(guide(name) for name in ("consistency", "fleets", "guide_reports", "how_it_works", "incremental_backups")),
    *(guide(name) for name in ("monitoring", "operating", "retention", "schedule", "verifying")),
}
"""Pages whose commands are mostly those of README again: `make test` leaves them out, `make thorough` does not."""
