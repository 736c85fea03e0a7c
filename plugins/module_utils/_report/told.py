# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell whether a hypervisor has told what its modules tell: it is another machine, and the controller believes nothing.

On the controller a text or a mapping may be of a class of Ansible's own.
"""

from __future__ import annotations

from typing import Any


def fits(found: Any, shape: Any) -> bool:
    """Return whether this has the members of a shape: a class, a mapping of shapes, or a list of one."""
    if isinstance(shape, dict):
        return isinstance(found, dict) and all(name in found and fits(found[name], one) for name, one in shape.items())
    if isinstance(shape, list):
        return isinstance(found, (list, tuple)) and all(fits(one, shape[0]) for one in found)
    if shape is int:
        # True is an int, too.
        return isinstance(found, int) and not isinstance(found, bool) and found >= 0
    return isinstance(found, shape)
