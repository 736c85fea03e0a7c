# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Stand-in for the bootstrap script that ansible-test would download: pip from the interpreter's own ensurepip."""

import ensurepip
import os
import subprocess
import sys

if __name__ == "__main__":
    ensurepip.bootstrap(default_pip=True)
    # ensurepip points pip at an empty configuration; the machine's own one names its index and its CA file.
    os.environ.pop("PIP_CONFIG_FILE", None)
    wanted = [arg for arg in sys.argv[1:] if arg.startswith("pip==")]
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted])
