"""The simulated backend keeps the contract of backends, as far as something that runs nothing can."""

from __future__ import annotations

import pytest

from executions.backends.scripted import ScriptedBackend
from tests.backends.contract import BackendContract


class TestScripted(BackendContract):
    @pytest.fixture
    def backend(self):
        return ScriptedBackend("scripted of the contract", {})


async def test_the_meter_counts_every_machine_from_its_birth_to_its_death():
    contract, backend = BackendContract(), ScriptedBackend("metered", {})
    async with contract.sandbox(backend) as handle:
        await contract.run(backend, handle, "#~ 0.2")
    counted = backend.metered_seconds()

    assert counted == pytest.approx(0.2, abs=0.15)
    assert backend.metered_seconds() == counted
