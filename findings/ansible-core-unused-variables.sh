#!/usr/bin/env bash
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# ansible-core 2.18.19 works out each variable that a template names, also one that stands in a branch which is not taken. Where
# such a variable fails, as with the filter "mandatory", the task fails, and the reason that the template was to tell is lost.
# From 2.19 on (2.19.14, 2.21.5) it is worked out only where it is used. A filter within the template itself waits in both.
#   2.18.19, in a variable: there is no plan
#   2.18.19, in the template: the host is down
#   2.19.14, in a variable: the host is down
#   2.19.14, in the template: the host is down

. "$(dirname "$(readlink -f "$0")")/lib.sh"
cat >"$work/variable.yml" <<'END_OF_PLAY'
- hosts: localhost
  connection: local
  gather_facts: false
  vars:
    problem: the host is down
    plan: "{{ planned.plan | mandatory('there is no plan') }}"
  tasks:
    - ansible.builtin.debug:
        msg: "said: {{ problem or plan }}"
END_OF_PLAY
# shellcheck disable=SC2016 # nothing is expanded
sed -e '/^    plan:/d' -e "s/problem or plan/problem or (planned.plan | mandatory('there is no plan'))/" \
  "$work/variable.yml" >"$work/template.yml"

said() { # said VERSION PLAY: what the task says, or fails with
  local found
  found=$(cd "$work" && HOME=$work ANSIBLE_HOME=$work/ansible ANSIBLE_LOCALHOST_WARNING=False ANSIBLE_NOCOLOR=1 LC_ALL=C.UTF-8 \
    PATH=$work/$1/bin:$PATH ansible-playbook -i localhost, "$2.yml" 2>&1) || true
  grep -oE 'said: the host is down|there is no plan\. |there is no plan"' <<<"$found" | sed -n '1s/^said: //; 1s/[." ]*$//p'
}

for version in 2.18.19 2.19.14; do
  python3 -m venv "$work/$version" &&
    "$work/$version/bin/python" -m pip install -qq --disable-pip-version-check "ansible-core==$version" >&2 ||
    cannot_tell "ansible-core $version cannot be installed"
  for play in variable template; do
    where=$([ "$play" = variable ] && echo "in a variable" || echo "in the template")
    echo "$version, $where: $(said "$version" "$play")"
  done
done | tee "$work/seen"
[ "${PIPESTATUS[0]}" = 0 ] || exit 2
diff <(sed -n 's/^#   \(2\..*\)/\1/p' "$0") "$work/seen"
