"""What to type for a wall of the local runtime that this machine does not let stand."""

from __future__ import annotations

import os
import sys
from pathlib import Path

NODE_AS_ROOT = "sudo .venv/bin/python manage.py sandbox_node   (and: manage.py serve --no-node)"
APPARMOR = """\
sudo tee /etc/apparmor.d/sandgate <<'EOF'
abi <abi/4.0>,
include <tunables/global>
profile sandgate {python} flags=(unconfined) {{
  userns,
}}
EOF
sudo apparmor_parser -r /etc/apparmor.d/sandgate   (then start again)"""
CONTAINER = """\
docker run --cap-add SYS_ADMIN --security-opt seccomp=unconfined --security-opt apparmor=unconfined \\
  --security-opt systempaths=unconfined …   (gives the container more rights: a machine of its own is better)"""


def remedy(wall: str, proc: Path = Path("/proc"), uid: int | None = None) -> str:
    """The command for this machine; empty where there is none. `proc` and `uid` are what is looked at."""
    uid = os.geteuid() if uid is None else uid
    match wall:
        case "namespaces":
            return _namespaces(proc, uid)
        case "uid" | "readonly_root":
            return NODE_AS_ROOT if uid else ""
        case "cgroups":
            return (
                "systemd-run --user --scope -p Delegate=yes make run"
                if uid
                else "mount | grep cgroup   (they must be writable)"
            )
        case "landlock":
            return "uname -r; cat /sys/kernel/security/lsm   (Linux 6.12 or later, started with lsm=landlock,… in its command line)"
    return ""


def _namespaces(proc: Path, uid: int) -> str:
    kernel = proc / "sys/kernel"
    if _number(proc / "sys/user/max_user_namespaces") == 0:
        return "sudo sysctl -w user.max_user_namespaces=15000"
    if uid and _number(kernel / "unprivileged_userns_clone") == 0:
        return "sudo sysctl -w kernel.unprivileged_userns_clone=1"
    if uid and _number(kernel / "apparmor_restrict_unprivileged_userns") == 1:
        return APPARMOR.format(python=os.path.realpath(sys.executable))
    if "\nSeccomp:\t2" in "\n" + _text(proc / "self/status"):
        return CONTAINER
    return NODE_AS_ROOT if uid else "see the sentence above"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    said = _text(path).strip()
    return int(said) if said.isdigit() else None
