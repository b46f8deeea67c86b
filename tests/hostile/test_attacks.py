"""Every attack of the suite on the local runtime; `manage.py attest` runs the same table."""

from __future__ import annotations

import os

import pytest

from executions import attacks

# Without control groups nobody counts what the kernel holds for a process, or how much of the processors it takes.
OPEN_TO_USERS = {
    "memory_bomb_in_the_kernel": {"open"},
    "memory_bomb_in_children": {"open", "blocked"},  # the watchdog comes up to 100 ms late
    "cpu_beyond_its_share": {"open", "blocked"},  # others may be busy, too
}


@pytest.mark.parametrize("attack", attacks.ALL, ids=lambda attack: attack.name)
async def test_is_blocked(arena, attack):
    finding = await arena.try_(attack)

    expected = OPEN_TO_USERS.get(attack.name, {"blocked"}) if os.geteuid() else {"blocked"}
    assert finding.verdict in expected, finding.seen


async def test_an_attack_that_gets_through_is_called_open(arena):
    finding = await arena.try_(
        attacks.Attack("reads_a_file", ("none",), code="attempt('/etc/hostname', lambda: open('/etc/hostname').read())")
    )

    assert (finding.verdict, finding.wall) == ("open", "none")
    assert "sandbox" in finding.seen


async def test_a_probe_that_breaks_is_not_called_blocked(arena):
    for code in ("raise LookupError", "def", "import os\nos._exit(0)"):
        assert (await arena.try_(attacks.Attack("breaks", ("none",), code=code, fresh=True))).verdict == "open"


async def test_a_neighbour_that_suffers_is_noticed(arena):
    async def steal(arena, handle, ran):
        await arena.value(arena.neighbour, f"import os\nos.unlink('/tmp/{arena.marker}')")
        return "stolen"

    finding = await arena.try_(attacks.Attack("steals", ("none",), judge=steal))
    await arena.value(arena.neighbour, f"open('/tmp/{arena.marker}', 'w').write('{arena.marker}') and None")

    assert finding.verdict == "open"
    assert "neighbour" in finding.seen
