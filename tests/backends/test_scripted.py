"""The simulated backend keeps the contract of backends, as far as something that runs nothing can."""

from __future__ import annotations

import pytest

from executions.backends.base import Limits
from executions.backends.scripted import ScriptedBackend
from executions.errors import SandboxLost
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


async def test_money_is_metered_by_size_and_a_pause_is_free(monkeypatch):
    contract, backend = BackendContract(), ScriptedBackend("priced", {})
    now = 1000.0
    monkeypatch.setattr("executions.backends.scripted.time.monotonic", lambda: now)
    handle = await backend.create(contract.spec(limits=Limits(cpu_count=2, memory_mib=512)))
    now += 10
    await backend.pause(handle)
    now += 1000
    await backend.resume(handle, timeout_seconds=100)
    now += 5
    await backend.kill(handle)
    now += 1000

    assert backend.metered_seconds() == 15
    assert backend.metered_nano_usd() == 15 * (2 * 14_000 + 4_500 // 2)


async def test_a_machine_that_nobody_ends_is_charged_to_its_timeout(monkeypatch):
    contract, backend = BackendContract(), ScriptedBackend("left alone", {})
    now = 1000.0
    monkeypatch.setattr("executions.backends.scripted.time.monotonic", lambda: now)
    await backend.create(contract.spec(timeout_seconds=30))
    now += 500

    assert backend.metered_seconds() == 30
    assert await backend.list() == []


async def test_a_paused_machine_is_listed_and_runs_nothing():
    contract, backend = BackendContract(), ScriptedBackend("paused", {})
    async with contract.sandbox(backend) as handle:
        await backend.pause(handle)
        with pytest.raises(SandboxLost):
            await contract.run(backend, handle, "#= 1")
        listed = [item.handle for item in await backend.list()]
        await backend.resume(handle, timeout_seconds=60)
        after = await contract.run(backend, handle, "#= 1")

    assert listed == [handle]
    assert after[-1].data["mime"] == {"text/plain": "1"}


async def test_files_are_kept_with_the_machine():
    contract, backend = BackendContract(), ScriptedBackend("files", {})
    async with contract.sandbox(backend) as handle:
        await backend.write_file(handle, "a/b.txt", b"12")
        back = [piece async for piece in backend.read_file(handle, "/home/user/a/b.txt")]
        listed = [(entry.path, entry.type) for entry in await backend.list_files(handle, "/home/user", depth=2)]

    assert back == [b"12"]
    assert listed == [("/home/user/a", "directory"), ("/home/user/a/b.txt", "file")]
