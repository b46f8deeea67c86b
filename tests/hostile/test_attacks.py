"""Every attack of the suite on the local runtime; `manage.py attest` runs the same table."""

from __future__ import annotations

import pytest

from executions import attacks


@pytest.mark.parametrize("attack", attacks.ALL, ids=lambda attack: attack.name)
async def test_is_blocked(arena, attack):
    finding = await arena.try_(attack)

    assert finding.verdict == "blocked", finding.seen


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
