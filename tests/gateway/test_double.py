"""E2B's double, as E2B's own SDK sees it: a cloud that is well, late, full, forgetful, or gone."""

from __future__ import annotations

import asyncio
import time

import e2b.exceptions as wrong
import httpx
import pytest
from e2b_code_interpreter import AsyncSandbox, Sandbox

from executions.gateway.double.faults import Faults, seconds
from tests.double import running_double


@pytest.fixture
def box(double):
    made = Sandbox.create(timeout=120, metadata={"of": "the test"}, **double.options())
    yield made
    made.kill()


def once(double, **more):
    """The SDK's options without its own retries."""
    return double.options() | {"retries": 0} | more


# A cloud that is well


def test_runs_code_commands_and_files(box):
    ran = box.run_code("#> out\n#!> err\n#= 42")
    failed = box.run_code("#! ValueError: no")
    context = box.create_code_context(language="python", cwd="/tmp")
    told = box.commands.run("echo  #> hello")
    box.files.write("/home/user/a/b.txt", "hello")

    assert (ran.logs.stdout, ran.logs.stderr, ran.text) == (["out\n"], ["err\n"], "42")
    assert (failed.error.name, failed.error.value) == ("ValueError", "no")
    assert box.run_code("#= 1", context=context).text == "1"
    assert (told.stdout, told.exit_code) == ("hello\n", 0)
    assert box.files.read("a/b.txt") == "hello"
    assert [entry.path for entry in box.files.list("/home/user/a")] == ["/home/user/a/b.txt"]


def test_a_command_is_ended_by_its_timeout_and_by_a_signal(box):
    with pytest.raises(wrong.TimeoutException):
        box.commands.run("sleep 60  #~ 60", timeout=0.5)
    running = box.commands.run("sleep 60  #~ 60", background=True)
    assert box.commands.kill(running.pid)
    with pytest.raises(Exception, match=r"signal: killed|exited with code -1"):
        running.wait()

    assert box.commands.list() == []


def test_lives_pauses_and_ends_as_asked(double, box):
    paused = box.pause(), box.pause()
    with pytest.raises(wrong.TimeoutException):
        box.run_code("#= 1")
    back = Sandbox.connect(box.sandbox_id, **double.options())
    ran = back.run_code("#= 1").text
    ended = box.kill(), box.kill()

    assert paused == (True, False)
    assert ran == "1"
    assert ended == (True, False)
    with pytest.raises(wrong.SandboxNotFoundException):
        Sandbox.connect(box.sandbox_id, **double.options())


def test_its_own_timeout_ends_a_sandbox_in_mid_run(double):
    box = Sandbox.create(timeout=1, **double.options())
    with pytest.raises(wrong.TimeoutException, match=r"killed|not found"):
        box.run_code("#> on\n#~ 30")

    (told,) = [one for one in double.meter()["sandboxes"] if one["sandboxID"] == box.sandbox_id]
    assert (told["state"], told["why"]) == ("ended", "timeout")
    assert told["seconds"] == pytest.approx(1, abs=0.01)


def test_the_meter_charges_allocated_seconds_by_size(double):
    box = Sandbox.create(timeout=60, **double.options())
    box.run_code("#~ 0.3")
    box.kill()

    (told,) = [one for one in double.meter()["sandboxes"] if one["sandboxID"] == box.sandbox_id]
    assert told["why"] == "killed"
    assert 0.3 <= told["seconds"] < 3
    assert told["nano_usd"] == pytest.approx(told["seconds"] * (2 * 14_000 + 4_500 / 2), abs=2)


def test_one_key_does_not_see_the_sandboxes_of_another():
    with running_double("--key", "e2b_0e") as double:
        box = Sandbox.create(**double.options())
        other = double.options() | {"api_key": "e2b_0e"}

        assert Sandbox.list(**other).next_items() == []
        with pytest.raises(wrong.SandboxNotFoundException):
            Sandbox.connect(box.sandbox_id, **other)
        with pytest.raises(wrong.AuthenticationException):
            Sandbox.create(**double.options() | {"api_key": "e2b_0f"})


async def test_pages_are_listed_to_the_end_and_filtered(double):
    made = await asyncio.gather(
        *(AsyncSandbox.create(metadata={"n": str(n), "é &": "=1"}, **double.options()) for n in range(105))
    )
    pages = AsyncSandbox.list(limit=100, **double.options())
    listed = [info.sandbox_id for _ in range(2) for info in await pages.next_items()]
    from e2b_code_interpreter import SandboxQuery

    query = SandboxQuery(metadata={"n": "7", "é &": "=1"})
    seven = await AsyncSandbox.list(query=query, **double.options()).next_items()
    await asyncio.gather(*(box.kill() for box in made))

    assert not pages.has_next
    assert {box.sandbox_id for box in made} <= set(listed)
    assert [info.sandbox_id for info in seven] == [made[7].sandbox_id]


def test_a_repeated_create_is_the_same_sandbox(double):
    first = Sandbox.create(idempotency_key="once", **double.options())
    second = Sandbox.create(idempotency_key="once", **double.options())
    with pytest.raises(wrong.SandboxException) as refused:
        Sandbox.create(timeout=7, idempotency_key="once", **once(double))
    first.kill()

    assert first.sandbox_id == second.sandbox_id
    assert refused.value.status_code == 422


def test_an_unknown_template_is_not_found(double):
    with pytest.raises(wrong.SandboxException, match="template 'nothing' not found") as refused:
        Sandbox.create("nothing", **once(double))

    assert refused.value.status_code == 404


# A cloud that is not


def test_a_boot_takes_as_long_as_e2bs():
    import random

    chance = random.Random(1)
    drawn = sorted(seconds(Faults().create_ms, chance) for _ in range(20_000))

    assert drawn[10_000] == pytest.approx(0.491, rel=0.02)
    assert drawn[19_800] == pytest.approx(0.740, rel=0.03)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (429, wrong.RateLimitException),
        (502, wrong.SandboxException),
        (503, wrong.ServiceBusyException),
        (504, wrong.SandboxException),
        (500, wrong.SandboxException),
        (401, wrong.AuthenticationException),
    ],
)
def test_refusals_are_what_the_sdk_makes_of_e2bs(double, status, kind):
    double.tell(refuse=[{"status": status, "share": 1, "on": "create"}])
    with pytest.raises(kind):
        Sandbox.create(**once(double))


def test_the_sdk_waits_as_long_as_a_refusal_says(double):
    double.tell(refuse=[{"status": 503, "share": 1, "on": "create", "retry_after": 1}])
    before, began = double.asked("create 503"), time.monotonic()
    with pytest.raises(wrong.ServiceBusyException):
        Sandbox.create(retries=1, **double.options())

    assert double.asked("create 503") - before == 2
    assert time.monotonic() - began >= 1


def test_a_plan_has_a_ceiling_and_a_rate():
    with running_double("--plan", "hobby", "--faults", '{"create_ms": [1, 1], "creations_per_second": 0}') as double:
        boxes = [Sandbox.create(**double.options()) for _ in range(20)]
        with pytest.raises(wrong.RateLimitException, match=r"maximum number of concurrent E2B sandboxes \(20\)"):
            Sandbox.create(**once(double))
        boxes[0].pause()  # what is paused does not count
        Sandbox.create(**once(double))
        double.tell(concurrent=0, creations_per_second=1)
        Sandbox.create(**once(double))
        with pytest.raises(wrong.RateLimitException, match="Rate limit exceeded"):
            Sandbox.create(**once(double))


def test_a_stream_that_is_cut_leaves_the_sandbox_alive(double, box):
    double.tell(cuts=1)
    with pytest.raises(httpx.RemoteProtocolError):
        box.run_code("#> a\n#~ 5\n#> b")
    double.tell(cuts=0)

    assert box.run_code("#= 1").text == "1"


def test_a_sandbox_that_vanishes_is_a_lost_one(double, box):
    heard = []
    with pytest.raises(wrong.TimeoutException, match="killed"):
        box.run_code("#> on\n#~ 30", on_stdout=lambda said: (heard.append(said), double.vanish(box.sandbox_id)))

    assert len(heard) == 1
    assert not box.is_running()


def test_a_share_of_the_sandboxes_vanishes_by_itself(double):
    double.tell(vanish=1, vanish_seconds=0.05)
    box = Sandbox.create(**double.options())
    with pytest.raises(wrong.TimeoutException):
        box.run_code("#~ 5")


def test_a_success_may_be_followed_by_not_found(double):
    double.tell(forgets=1)
    box = Sandbox.create(**double.options())

    assert not box.is_running()
    assert box.kill() is False


def test_an_answer_may_be_lost_though_the_sandbox_is_there(double):
    double.tell(loses=1)
    with pytest.raises(httpx.HTTPError):
        Sandbox.create(metadata={"mark": "lost answer"}, **once(double))

    (left,) = [one for one in double.live().values() if one["metadata"].get("mark") == "lost answer"]
    assert Sandbox.kill(left["sandboxID"], **double.options())


@pytest.mark.parametrize("fault", [{"swallows": 1}, {"down": "swallow"}])
def test_what_is_swallowed_is_never_answered(double, fault):
    double.tell(**fault)
    with pytest.raises(httpx.TimeoutException):
        Sandbox.create(request_timeout=0.5, **once(double))


def test_a_kill_that_hangs_kills_nothing(double, box):
    double.tell(kill_hangs=1)
    with pytest.raises(httpx.TimeoutException):
        box.kill(request_timeout=0.5)

    assert box.is_running()
    double.tell(kill_hangs=0)


def test_down_is_said_or_a_broken_connection(double):
    double.tell(down="503")
    with pytest.raises(wrong.ServiceBusyException):
        Sandbox.create(**once(double))
    double.tell(down="reset")
    with pytest.raises(httpx.HTTPError):
        Sandbox.create(**once(double))


@pytest.mark.parametrize(
    "fault", [{"nothing": 1}, {"vanish": "often"}, {"down": "slow"}, {"create_ms": [1]}, {"refuse": [{}]}, []]
)
def test_a_fault_that_is_none_is_refused_with_a_sentence(double, fault):
    answer = httpx.post(f"{double.url}/_double/faults", json=fault, trust_env=False)

    assert answer.status_code == 400
    assert answer.json()["message"]
