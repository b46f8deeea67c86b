"""Where a sandbox's own folders lie: the same for all, but in the reduced mode, which has no mounts to put them there."""

from __future__ import annotations

import os

HOME, TMP = "/home/user", "/tmp"  # as everybody names them

LAYER = "/opt/packages"  # what this agent's sandboxes find there from the beginning

home, tmp = HOME, TMP  # where they are
reduced = False  # no mount hides the rest of the machine
ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def settle(plan: dict) -> None:
    """Called once, when the sandbox knows which one it is."""
    global home, tmp, reduced
    if plan.get("reduced"):
        home, tmp, reduced = plan["home"], plan["tmp"], True


def packages() -> str:
    """What is installed into this sandbox while it lives."""
    return f"{home}/.packages"


def found(path: str) -> str:
    """Where this path is; a name that everybody uses leads to the sandbox's own folder."""
    if reduced and (path + "/").startswith(home + "/"):
        return path
    for name, place in ((HOME, home), (TMP, tmp)):
        if place != name and (path == name or path.startswith(name + "/")):
            return place + path[len(name) :]
    return path


def outside(path: str) -> bool:
    """Whether following this path leaves the sandbox's own folders; only asked where no mount hides the rest."""
    try:
        real = os.path.realpath(path)
    except OSError:  # a link of /proc that is not ours to read
        return True
    return not any((real + "/").startswith(place + "/") for place in (home, tmp))


def split(path: str) -> tuple[str, str]:
    """One of the sandbox's own folders, and the path below it."""
    place = tmp if path.startswith(tmp + "/") else home
    return place, os.path.relpath(path, place)
