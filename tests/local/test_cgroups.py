"""What is left of nodes that were killed, on a folder that only looks like control groups."""

from __future__ import annotations

import secrets

from executions.backends.local.node import cgroups


def test_only_empty_groups_of_dead_nodes_are_swept_away(tmp_path):
    dead, alive, used = (f"sandgate-{secrets.token_hex(6)}" for _ in range(3))
    for name in (dead, alive, used):
        (tmp_path / name / "sandbox").mkdir(parents=True)
    (tmp_path / used / "sandbox" / "process").touch()  # rmdir refuses, as the kernel does while a process is inside
    claim = cgroups._claimed(alive.removeprefix("sandgate-"))
    assert claim is not None

    with claim:
        cgroups.sweep(tmp_path, 2, unused_seconds=3600)
        assert (tmp_path / dead).exists()
        cgroups.sweep(tmp_path, 2, unused_seconds=0)

    assert not (tmp_path / dead).exists()
    assert (tmp_path / alive / "sandbox").exists()
    assert (tmp_path / used / "sandbox" / "process").exists()


def test_a_name_is_claimed_once():
    name = secrets.token_hex(6)
    first = cgroups._claimed(name)
    assert first is not None

    with first:
        assert cgroups._claimed(name) is None
    again = cgroups._claimed(name)
    assert again is not None
    again.close()
