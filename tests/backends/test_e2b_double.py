"""The E2B backend against E2B's double: the contract once more, and what it makes of everything that goes wrong there."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from executions.backends.base import SandboxSpec
from executions.backends.e2b import E2BBackend
from executions.errors import BackendError, BackendUnavailable, SandboxLost, SandboxMissing, SandboxRefused
from tests.backends.contract import BackendContract, text, value
from tests.double import KEY
from tests.product import HOME

contract = BackendContract()
contract.template = "code-interpreter-v1"


class Simulated(E2BBackend):
    """On the double nothing runs."""

    capabilities = replace(E2BBackend.capabilities, executes=False)


@pytest.fixture
def backend(double) -> E2BBackend:
    return Simulated("double", {"API_KEY": double.key, "API_URL": double.url, "SANDBOX_URL": double.url})


class TestDouble(BackendContract):
    template = "code-interpreter-v1"

    @pytest.fixture
    def backend(self, double):
        return Simulated("double", {"API_KEY": double.key, "API_URL": double.url, "SANDBOX_URL": double.url})


async def run(backend, handle, code="#= 1", **options):
    return [event async for event in backend.run_code(handle, code, **options)]


# births


async def test_a_create_says_whose_it_is_for_how_long_and_what_it_may_reach(double, backend):
    spec = contract.spec(env={"A": "1"}, metadata={"sandgate_agent": "agt_1"}, network_allow=("data.example",))
    async with contract.sandbox(backend, **vars_of(spec)) as handle:
        from e2b_code_interpreter import Sandbox

        info = Sandbox.connect(handle["e2b_id"], **double.options()).get_info()
        told = double.live()[spec.sandbox_id]

    assert info.metadata == {"sandgate_agent": "agt_1", "managed_by": "sandgate", "sandgate_sandbox": spec.sandbox_id}
    assert info.network["allow_out"] == ["data.example"]
    assert info.network["deny_out"] == ["0.0.0.0/0"]
    assert told["templateID"] == "code-interpreter-v1"


def vars_of(spec: SandboxSpec) -> dict:
    return {name: getattr(spec, name) for name in ("sandbox_id", "env", "metadata", "network_allow")}


@pytest.mark.parametrize(("status", "retry_after"), [(429, 3), (503, 7), (503, None), (429, None)])
async def test_a_refusal_carries_how_long_to_wait(double, backend, status, retry_after):
    refusal = {"status": status, "share": 1, "on": "create"} | ({"retry_after": retry_after} if retry_after else {})
    double.tell(refuse=[refusal])
    with pytest.raises(BackendUnavailable) as refused:
        await backend.create(contract.spec())

    assert refused.value.facts["retry_after"] == retry_after
    assert not refused.value.facts["perhaps"]


async def test_a_full_plan_is_said_in_e2bs_words(double, backend):
    async with contract.sandbox(backend):
        double.tell(concurrent=1)
        with pytest.raises(BackendUnavailable, match="maximum number of concurrent E2B sandboxes"):
            await backend.create(contract.spec())


async def test_an_unknown_template_is_no_outage(backend):
    with pytest.raises(SandboxRefused, match="template 'mine' not found"):
        await backend.create(contract.spec(template="mine"))


async def test_a_sandbox_whose_answer_was_lost_is_found_and_used(double, backend):
    double.tell(loses=1)
    spec = contract.spec()
    handle = await backend.create(spec)
    double.tell(loses=0)

    assert value(await run(backend, handle)) == "1"
    assert list(double.live()).count(spec.sandbox_id) == 1
    await backend.kill(handle)


async def test_a_create_is_never_repeated(double, backend):
    double.tell(refuse=[{"status": 502, "share": 1, "on": "create"}])
    before = double.asked("create")
    with pytest.raises(BackendUnavailable) as refused:
        await backend.create(contract.spec())

    assert double.asked("create") - before == 1
    assert refused.value.facts["perhaps"]


async def test_silence_costs_little_and_a_slow_boot_is_waited_for(double, backend):
    double.tell(create_ms=[3000, 3000])
    handle = await backend.create(contract.spec())
    await backend.kill(handle)
    double.tell(down="swallow")
    began = time.monotonic()
    with pytest.raises(BackendUnavailable) as refused:
        await backend.create(contract.spec())

    assert time.monotonic() - began < 5
    assert refused.value.facts["perhaps"]


async def test_packets_that_are_dropped_cost_as_little():
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf:  # a full backlog: the kernel drops what comes
        port = deaf.getsockname()[1]
        held = [socket.socket() for _ in range(4)]
        for one in held:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        silent = E2BBackend("silent", {"API_KEY": KEY, "API_URL": f"http://127.0.0.1:{port}"})
        began = time.monotonic()
        with pytest.raises(BackendUnavailable):
            await silent.create(contract.spec())
        for one in held:
            one.close()

    assert time.monotonic() - began < 5


async def test_a_create_whose_caller_left_is_found_by_our_id(double, backend, monkeypatch):
    double.tell(create_ms=[400, 400])
    spec, asking, ask = contract.spec(), asyncio.Event(), backend.account.ask

    async def noted(*args, **fields):
        asking.set()
        return await ask(*args, **fields)

    monkeypatch.setattr(backend.account, "ask", noted)
    creating = asyncio.ensure_future(backend.create(spec))
    await asking.wait()
    creating.cancel()

    assert await backend.kill_by_id(spec.sandbox_id)
    assert spec.sandbox_id not in double.live()
    told = [one for one in double.meter()["sandboxes"] if one["metadata"].get("sandgate_sandbox") == spec.sandbox_id]
    assert [one["why"] for one in told] == ["killed"]


# lives


async def test_pauses_cost_nothing_and_keep_the_sandbox(double, backend):
    async with contract.sandbox(backend) as handle:
        await backend.pause(handle)
        await backend.pause(handle)
        before = double.live()[handle["sandbox_id"]]
        with pytest.raises(SandboxLost):
            await run(backend, handle)
        after = double.live()[handle["sandbox_id"]]
        await backend.resume(handle, timeout_seconds=60)
        again = value(await run(backend, handle))

    assert before["state"] == after["state"] == "paused"
    assert before["nano_usd"] == after["nano_usd"]
    assert again == "1"


async def test_samples_are_what_e2b_measures(backend):
    async with contract.sandbox(backend) as handle:
        (sample,) = await backend.samples(handle)

    assert (sample.cpu_count, sample.memory_limit_bytes) == (2, 512 << 20)
    assert 0 < sample.memory_bytes < sample.memory_limit_bytes
    with pytest.raises(SandboxLost):
        await backend.samples(handle)


@pytest.mark.parametrize("verb", ["pause", "connect"])
async def test_what_is_gone_is_lost(backend, verb):
    handle = await backend.create(contract.spec())
    await backend.kill(handle)
    with pytest.raises(SandboxLost):
        await getattr(backend, verb)(handle)
    with pytest.raises(SandboxLost):
        await backend.resume(handle, timeout_seconds=60)
    with pytest.raises(SandboxLost):
        await backend.set_timeout(handle, 60)


async def test_a_kill_that_hangs_is_not_confirmed(double, backend, monkeypatch):
    monkeypatch.setattr("executions.backends.e2b.backend.KILL_SECONDS", (0.3, 0.2, 0.1))
    async with contract.sandbox(backend) as handle:
        double.tell(kill_hangs=1)
        with pytest.raises(BackendError) as hung:
            await backend.kill(handle)
        double.tell(kill_hangs=0)

    assert not isinstance(hung.value, SandboxLost)


async def test_a_kill_that_is_not_answered_is_asked_for_again_beside_the_first(double, backend, monkeypatch):
    monkeypatch.setattr("executions.backends.e2b.backend.KILL_SECONDS", (60, 59.5, 59))
    ask, asked = backend.account.ask, []

    async def noted(call, *args, **fields):
        asked.append(call)
        if len(asked) == 2:  # by now the first hangs
            double.tell(kill_hangs=0)
        return await ask(call, *args, **fields)

    async with contract.sandbox(backend) as handle:
        double.tell(kill_hangs=1)
        with monkeypatch.context() as patch:
            patch.setattr(backend.account, "ask", noted)
            assert await backend.kill(handle)

        assert asked == ["delete_sandboxes_sandbox_id"] * 2
        assert handle["sandbox_id"] not in double.live()


# code and outages


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr("executions.backends.e2b.backend.QUIET_SECONDS", 0.5)


async def into_the_outage(double, backend, handle) -> None:
    """Everything that a run asks of the sandbox is refused before it is sent, and works again afterwards."""
    before = double.asked("execute")
    for asked in (
        run(backend, handle),
        backend.write_file(handle, "/home/user/a", b"1"),
        anext(backend.run_command(handle, "true")),
    ):
        with pytest.raises(BackendUnavailable) as never:
            await asked
        assert never.value.facts["nothing_sent"]
    assert double.asked("execute") == before

    double.tell(down="")
    assert value(await run(backend, handle)) == "1"


@pytest.mark.parametrize("down", ["reset", "swallow"])
async def test_after_a_question_that_failed_code_is_sent_only_where_a_sandbox_answers(double, backend, hasty, down):
    async with contract.sandbox(backend) as handle:
        await run(backend, handle)
        double.tell(down=down)
        assert not (await backend._look(0.2)).ok

        await into_the_outage(double, backend, handle)


async def test_while_a_sandbox_is_silent_code_is_sent_only_where_another_answers(double, backend, hasty):
    async with contract.sandbox(backend) as handle:
        await run(backend, handle)
        double.tell(down="swallow")
        lost = asyncio.create_task(run(backend, handle))
        while not backend.account.is_doubtful:
            await asyncio.sleep(0.01)

        await into_the_outage(double, backend, handle)
        lost.cancel()


async def test_where_e2b_answers_no_question_goes_before_the_code(double, backend, monkeypatch):
    async with contract.sandbox(backend) as handle:
        double.tell(kill_hangs=1)
        killing = asyncio.create_task(backend.kill(handle))  # which is slow, and says nothing of sandboxes

        async def greet(*_):
            raise AssertionError("It was asked for.")

        with monkeypatch.context() as patch:
            patch.setattr(Simulated, "_greet", greet)
            for _ in range(3):
                await run(backend, handle)
        killing.cancel()
        double.tell(kill_hangs=0)


# streams


async def test_a_sandbox_that_was_never_there_has_run_nothing(double, backend):
    double.tell(forgets=1)
    handle = await backend.create(contract.spec())
    with pytest.raises(SandboxMissing):
        await run(backend, handle)


async def test_a_cut_stream_is_an_error_of_ours_and_the_sandbox_works_on(double, backend):
    async with contract.sandbox(backend) as handle:
        double.tell(cuts=1)
        with pytest.raises(BackendError, match="broke") as cut:
            await run(backend, handle, "#> a\n#~ 5\n#> b")
        double.tell(cuts=0)
        after = await run(backend, handle)

    assert not isinstance(cut.value, SandboxLost)
    assert value(after) == "1"


async def test_a_sandbox_that_vanishes_in_mid_run_is_lost_at_once(double, backend):
    async with contract.sandbox(backend) as handle:
        began, events = time.monotonic(), backend.run_code(handle, "#> on\n#~ 30")
        said = [await anext(events), await anext(events)]
        double.vanish(handle["e2b_id"])
        with pytest.raises(SandboxLost):
            await anext(events)

    assert text(said) == "on\n"
    assert time.monotonic() - began < 5


async def test_silence_in_mid_run_is_asked_about(double, backend, monkeypatch):
    monkeypatch.setattr("executions.backends.e2b.stream.QUIET_SECONDS", 0.2)
    monkeypatch.setattr("executions.backends.e2b.backend.CHECK_SECONDS", 0.3)
    async with contract.sandbox(backend) as handle:
        quiet = await run(backend, handle, "#~ 1\n#= 1")
        double.tell(down="swallow")
        with pytest.raises(BackendError):
            await run(backend, handle, timeout_seconds=60)
        double.tell(down="")

    assert value(quiet) == "1"


# aliases and secrets


async def test_two_aliases_share_nothing(double, backend):
    other = E2BBackend("elsewhere", {"API_KEY": "e2b_wrong", "API_URL": double.url, "SANDBOX_URL": double.url})
    async with contract.sandbox(backend) as handle:
        with pytest.raises(BackendUnavailable, match="401"):
            await other.create(contract.spec())
        assert (await other.check()).ok is False
        assert value(await run(backend, handle)) == "1"


async def test_a_token_is_asked_for_where_the_secret_has_changed(double, backend, settings):
    async with contract.sandbox(backend) as handle:
        settings.SECRET_KEY = "another" * 10
        moved = double.backend()

        assert value(await run(moved, handle)) == "1"
        assert moved.account.opened(handle["token"]) is None


@contextmanager
def everything_logged():
    """All that anybody logs, down to DEBUG."""
    held, handler = io.StringIO(), None
    handler = logging.StreamHandler(held)
    root, levels = logging.getLogger(), {}
    names = [None, "e2b", "e2b_code_interpreter", "httpx", "httpcore", "pyqwest", "pyqwest.access"]
    for name in names:
        levels[name] = logging.getLogger(name).level
        logging.getLogger(name).setLevel(logging.DEBUG)
    root.addHandler(handler)
    try:
        yield held
    finally:
        root.removeHandler(handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


async def test_no_secret_is_in_a_log_an_error_or_a_handle(double, backend):
    errors: list[str] = []

    async def tried(work):
        try:
            return await work
        except Exception as e:
            errors.append(repr(e) + str(getattr(e, "facts", "")))

    with everything_logged() as logged:
        async with contract.sandbox(backend) as handle:
            await run(backend, handle, "#> a")
            await contract.command(backend, handle, "#> a")
            await tried(backend.create(contract.spec(template="nothing")))
            for fault in ({"down": "reset"}, {"down": "503"}, {"down": "", "cuts": 1}):
                double.tell(**fault)
                await tried(backend.create(contract.spec()))
                await tried(backend.kill({**handle, "e2b_id": "i0"}))
                await tried(run(backend, handle))
                await tried(backend.check())
            double.forget()
    token = backend.account.opened(handle["token"])
    told = logged.getvalue() + json.dumps(handle) + "".join(errors)

    assert token
    assert len(errors) >= 5
    assert KEY not in told
    assert token not in told


def test_the_sdk_is_given_room_for_a_thousand_streams():
    code = "from executions.backends.e2b import account; account.sdk(); import e2b.api; print(e2b.api.max_connections)"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("E2B_")}
    said = subprocess.run([sys.executable, "-c", code], cwd=HOME, env=clean, capture_output=True, text=True, check=True)

    assert int(said.stdout) >= 1000
