# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# shellcheck shell=bash

# For the scripts beside it: a temporary folder, a version of QEMU unpacked in it, and a client of its monitor.
# A script ends with 0 where the software behaves as it says, 1 where it does not any more, 2 where that cannot be told.

set -euo pipefail
work=$(mktemp -d "${TMPDIR:-/tmp}/finding.XXXXXX")

clean_up() {
  cd /
  awk -v work="$work/" 'index($2, work) == 1 {print $2}' /proc/self/mounts | tac | xargs -r umount --lazy
  rm -rf --one-file-system "$work"
}
trap clean_up EXIT

cannot_tell() {
  echo "cannot tell: $*" >&2
  exit 2
}

# qemu VERSION SUITE...: unpack just this version (Debian's) from the mirror that the machine's own apt uses, signatures
# checked. Nothing is installed. Then "$QEMU" is QEMU, and "$IMG" qemu-img.
qemu() {
  local version=$1 mirror suite apt=$work/apt loader
  local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  shift
  mirror=$(apt-get --print-uris update 2>/dev/null | sed -n "s,^'\(.*/debian\)/dists/.*/InRelease'.*,\1,p" | sed -n 1p)
  [ -n "$mirror" ] && [ -r "$keyring" ] || cannot_tell "this machine's apt has no mirror of Debian"
  mkdir -p "$apt"/{lists,archives}/partial "$work/root"
  : >"$apt/status"
  for suite in "$@"; do
    echo "deb [signed-by=$keyring] $mirror${suite%%/*} ${suite#*/} main"
  done >"$apt/sources"
  cat >"$apt/apt.conf" <<END
Dir::State "$apt"; Dir::State::lists "$apt/lists"; Dir::State::status "$apt/status";
Dir::Cache "$apt"; Dir::Cache::archives "$apt/archives";
Dir::Etc::SourceList "$apt/sources"; Dir::Etc::SourceParts "/dev/null"; Dir::Etc::Preferences "/dev/null";
APT::Default-Release "${1#*/}"; APT::Install-Recommends "false"; APT::Sandbox::User ""; Acquire::Languages "none";
#clear APT::Update::Post-Invoke; #clear APT::Update::Post-Invoke-Success; #clear DPkg::Pre-Install-Pkgs;
END
  export APT_CONFIG=$apt/apt.conf
  apt-get -qq update >&2 || cannot_tell "Debian cannot be read"
  apt-get -qq -y --download-only install "qemu-system-x86=$version" "qemu-system-common=$version" \
    "qemu-system-data=${version%+b[0-9]*}" "qemu-utils=$version" >&2 || cannot_tell "QEMU $version is not served any more"
  unset APT_CONFIG
  local package
  for package in "$apt"/archives/*.deb; do dpkg-deb --fsys-tarfile "$package" | tar -x -C "$work/root" --no-same-owner --keep-directory-symlink; done
  rm -rf "$apt"
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

    def ask(self, command, **arguments):
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.stream.write(json.dumps({"execute": command, "arguments": named}) + "\n")
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
