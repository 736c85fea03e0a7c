# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# shellcheck shell=bash

# For the scripts beside it: a temporary folder, a version of QEMU unpacked in it, and a client of its monitor.
# A script ends with 0 where the software behaves as it says, 1 where it does not any more, 2 where that cannot be told.

set -euo pipefail
work=$(mktemp -d "${TMPDIR:-/tmp}/finding.XXXXXX")

box=
clean_up() {
  cd /
  # It pays no heed to SIGTERM. What it has started goes with it.
  [ -z "$box" ] || { kill -KILL "$box" && wait "$box" || true; } 2>/dev/null
  awk -v work="$work/" 'index($2, work) == 1 {print $2}' /proc/self/mounts | tac | xargs -r umount --lazy
  rm -rf --one-file-system "$work"
}
trap clean_up EXIT

cannot_tell() {
  echo "cannot tell: $*" >&2
  exit 2
}

# unpack DIRECTORY "SUITE..." PACKAGE[=VERSION]...: unpack these (Debian's) and all that they need from the mirror that the
# machine's own apt uses, signatures checked. Nothing is installed.
# A VERSION may end with *: Debian serves one revision of an upstream version, and replaces it.
unpack() {
  local root=$1 suites=$2 mirror suite package apt=$work/apt
  local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  shift 2
  mirror=$(apt-get --print-uris update 2>/dev/null | sed -n "s,^'\(.*/debian\)/dists/.*/InRelease'.*,\1,p" | sed -n 1p)
  [ -n "$mirror" ] && [ -r "$keyring" ] || cannot_tell "this machine's apt has no mirror of Debian"
  mkdir -p "$apt"/{lists,archives}/partial "$root/usr"
  : >"$apt/status"
  for suite in $suites; do
    echo "deb [signed-by=$keyring] $mirror${suite%%/*} ${suite#*/} main"
  done >"$apt/sources"
  cat >"$apt/apt.conf" <<END
Dir::State "$apt"; Dir::State::lists "$apt/lists"; Dir::State::status "$apt/status";
Dir::Cache "$apt"; Dir::Cache::archives "$apt/archives";
Dir::Etc::SourceList "$apt/sources"; Dir::Etc::SourceParts "/dev/null"; Dir::Etc::Preferences "/dev/null";
APT::Default-Release "$(basename "${suites%% *}")"; APT::Install-Recommends "false"; APT::Sandbox::User ""; Acquire::Languages "none";
#clear APT::Update::Post-Invoke; #clear APT::Update::Post-Invoke-Success; #clear DPkg::Pre-Install-Pkgs;
END
  export APT_CONFIG=$apt/apt.conf
  apt-get -qq update >&2 || cannot_tell "Debian cannot be read"
  apt-get -qq -y --download-only install "$@" >&2 || cannot_tell "not served any more, one of: $*"
  unset APT_CONFIG
  for package in bin lib lib64 sbin; do
    # All has moved into /usr, but packages may still name the old places.
    mkdir "$root/usr/$package"
    ln -s "usr/$package" "$root/$package"
  done
  for package in "$apt"/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x -C "$root" --no-same-owner --keep-directory-symlink --exclude=./usr/share/{doc,man,locale}
  done
  rm -rf "$apt"
}

# The packages of a version of QEMU.
packages() {
  echo "qemu-system-x86=$1" "qemu-system-common=$1" "qemu-system-data=${1%+b[0-9]*}" "qemu-utils=$1"
}

# qemu VERSION SUITE...: unpack just this version. Then "$QEMU" is QEMU, and "$IMG" qemu-img.
qemu() {
  local version=$1 package loader
  shift
  # shellcheck disable=SC2046 # several words
  unpack "$work/root" "$*" $(packages "$version")
  loader=$(find "$work/root" -name 'ld-linux-x86-64.so.2' | sed -n 1p)
  for package in system-x86_64 img; do
    cat >"$work/qemu-$package" <<END
#!/bin/sh
export QEMU_MODULE_DIR=$work/root/usr/lib/x86_64-linux-gnu/qemu
exec "$loader" --library-path "$work/root/usr/lib/x86_64-linux-gnu:$work/root/lib/x86_64-linux-gnu" "$work/root/usr/bin/qemu-$package" "\$@"
END
    chmod +x "$work/qemu-$package"
  done
  export QEMU=$work/qemu-system-x86_64 IMG=$work/qemu-img
  cd "$work"
  "$IMG" --version | sed -n 1p
}

# libvirt VERSION QEMU-VERSION SUITE...: unpack these, and start libvirtd in a box: with its own processes, network, and file
# systems, of which $work/root is the first. Then `inside COMMAND...` runs something there, where the module domain is, too.
libvirt() {
  local version=$1 qemu=$2 root=$work/root package packages=()
  shift 2
  [ "$(id -u)" = 0 ] || cannot_tell "this needs root, to start libvirt in a box"
  for package in libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients; do packages+=("$package=$version"); done
  # shellcheck disable=SC2046 # several words
  unpack "$root" "$*" "${packages[@]}" $(packages "$qemu") bash coreutils dash iproute2 mount python3
  echo "root:x:0:0:root:/root:/bin/bash
libvirt-qemu:x:64055:64055::/var/lib/libvirt:/bin/false" >"$root/etc/passwd"
  echo "root:x:0:
kvm:x:106:
tss:x:107:
libvirt-qemu:x:64055:" >"$root/etc/group"
  echo "127.0.0.1 localhost box" >"$root/etc/hosts"
  printf '%s: files\n' hosts passwd group >"$root/etc/nsswitch.conf"
  rm -rf "$root/var/run"
  ln -s ../run "$root/var/run"
  ln -sf dash "$root/usr/bin/sh"
  mkdir -p "$root"/{proc,sys,dev,run,tmp,root,old,lab} "$root"/var/{cache,log}/libvirt "$root/var/lib/libvirt"
  chmod 0777 "$root/lab"
  cp "$work"/{vm,domain}.py "$root/lab/"
  # This is process 1 of the box, and all in it end with it.
  cat >"$root/start" <<'END'
hostname box
mount -t tmpfs tmpfs /run
ip link set lo up
virtlogd -d
libvirtd -d
while sleep 1; do :; done
END
  unshare --mount --pid --net --uts --fork --kill-child bash -c '
    set -e
    mount --make-rprivate /
    mount --bind "$1" "$1"
    mount --rbind /dev "$1/dev"
    mount --rbind /sys "$1/sys"
    mount -t proc proc "$1/proc"
    cd "$1"
    pivot_root . old
    umount --lazy /old
    exec bash /start' box "$root" >"$work/box.log" 2>&1 </dev/null &
  box=$!
  for _ in $(seq 100); do
    inside virsh -q version >"$work/version" 2>/dev/null && break
    sleep 0.2
  done
  [ -s "$work/version" ] || cannot_tell "libvirt does not start: $(cat "$work/box.log")"
  sed -n 's/^Using library: //p; s/^Running hypervisor: //p' "$work/version"
}

inside() {
  nsenter --target "$(cat "/proc/$box/task/$box/children" | cut -d' ' -f1)" --mount --pid --net --uts \
    env -i PATH=/usr/sbin:/usr/bin HOME=/root LC_ALL=C QEMU=qemu-system-x86_64 IMG=qemu-img PYTHONPATH=/lab \
    timeout --foreground -k 5 120 "$@"
}

# The Python module vm: VM(arguments...).run(command, **arguments), .io(drive, command),
# .reach(job, status...), .wait(job), .end().
cat >"$work/vm.py" <<'END'
import json, os, socket, subprocess, sys, time

SECONDS = 60  # for one answer, and for one job
started = []


def cannot_tell(*error):
    """What nobody has foreseen ends all, and is not taken for a change of behaviour."""
    sys.stdout.flush()
    sys.__excepthook__(*error)
    for process in started:
        process.kill()
    os._exit(2)


sys.excepthook = cannot_tell


class VM:
    def __init__(self, *arguments):
        for path in ("qmp", "log"):
            if os.path.exists(path):
                os.unlink(path)
        base = [os.environ["QEMU"], "-machine", "none", "-nodefaults", "-display", "none"]
        self.process = subprocess.Popen([*base, "-qmp", "unix:qmp,server=on,wait=off", *arguments], stdout=open("log", "w"), stderr=2)
        started.append(self.process)
        while True:
            try:
                self.socket = socket.socket(socket.AF_UNIX)
                self.socket.settimeout(SECONDS)
                self.socket.connect("qmp")
                break
            except OSError:
                assert self.process.poll() is None, "QEMU did not start"
                time.sleep(0.05)
        self.stream = self.socket.makefile("rw")
        self.events = []
        self.stream.readline()
        self.run("qmp_capabilities")

    @staticmethod
    def words(command, arguments):
        return json.dumps({"execute": command, "arguments": {name.replace("_", "-"): value for name, value in arguments.items()}})

    def ask(self, command, **arguments):
        self.stream.write(self.words(command, arguments) + "\n")
        self.stream.flush()
        while True:
            answer = json.loads(self.stream.readline())
            if "event" not in answer:
                return answer
            self.events.append(answer)

    def run(self, command, **arguments):
        answer = self.ask(command, **arguments)
        assert "return" in answer, answer
        return answer["return"]

    def io(self, drive, command):
        return self.run("human-monitor-command", command_line=f'qemu-io {drive} "{command}"')

    def reach(self, job, *wanted):
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            found = next(each for each in self.run("query-jobs") if each["id"] == job)
            if found["status"] in wanted:
                return found
            time.sleep(0.05)
        raise TimeoutError(found)

    def wait(self, job):
        found = self.reach(job, "concluded")
        self.run("job-dismiss", id=job)
        return found.get("error", "")

    def end(self):
        self.run("quit")
        self.process.wait()


def image(path, size, *options):
    subprocess.run([os.environ["IMG"], "create", "-q", "-f", "qcow2", *options, path, size], check=True)


def same(one, other):
    return subprocess.run([os.environ["IMG"], "compare", "-U", one, other], stdout=subprocess.DEVNULL).returncode == 0
END

# The Python module domain, for the box: Domain(image) is a domain of libvirt with one disk, which its emulator runs without
# KVM. It can do what a VM can.
cat >"$work/domain.py" <<'END'
import json, os, subprocess
from vm import SECONDS, VM

XML = """<domain type='qemu'><name>D</name><memory unit='MiB'>64</memory>
<os><type arch='x86_64' machine='pc'>hvm</type></os>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator><memballoon model='none'/>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/><target dev='vda' bus='virtio'/></disk>
</devices></domain>"""
DISK = "/machine/peripheral/virtio-disk0/virtio-backend"


class Domain(VM):
    def __init__(self, image):
        with open("D.xml", "w") as file:
            file.write(XML.format(os.path.abspath(image)))
        self.virsh("define", "D.xml")
        self.virsh("start", "D")

    def virsh(self, *words):
        done = subprocess.run(["virsh", "-q", *words], stdout=-1, stderr=-2, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def ask(self, command, **arguments):
        return json.loads(self.virsh("qemu-monitor-command", "D", self.words(command, arguments)))

    def io(self, command):
        return super().io(f"-d {DISK}", command)

    def node(self):
        """The node that the guest writes to."""
        [found] = [each for each in self.run("query-block") if each.get("qdev") == DISK]
        return found["inserted"]

    def end(self):
        self.virsh("destroy", "D")
        self.virsh("undefine", "D", "--snapshots-metadata")
END
