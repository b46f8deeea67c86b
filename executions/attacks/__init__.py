"""Attacks on a sandbox as data, each written once: tests/hostile runs them, and `manage.py attest` on any backend.

An attack is code for the sandbox, the wall that should stop it, and a judge. Blocked means that every way failed *and*
the sandbox's neighbour, the backend and (unless the attack is suicide) the sandbox itself are whole afterwards.
No attack sends traffic beyond loopback or writes to a kernel file: opening it is the verdict.
"""

from __future__ import annotations

from executions.attacks.arena import Arena, Attack, Finding, Ran, Through

from executions.attacks import control, exhaustion, files, network, protocol, shares, visibility  # isort: skip

GROUPS: dict[str, tuple[Attack, ...]] = {
    "exhaustion": (*exhaustion.ATTACKS, *shares.ATTACKS),
    "visibility": visibility.ATTACKS,
    "control": control.ATTACKS,
    "files": files.ATTACKS,
    "network": network.ATTACKS,
    "protocol": protocol.ATTACKS,
}
ALL = tuple(attack for members in GROUPS.values() for attack in members)

__all__ = ["ALL", "GROUPS", "Arena", "Attack", "Finding", "Ran", "Through"]
