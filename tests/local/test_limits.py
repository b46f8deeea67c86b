"""Reaching a limit has a name that the node confirms, and costs no more than it must."""

from __future__ import annotations

from typing import Any

import pytest

from executions.backends.local import limits
from executions.backends.local.node.runs import disk_mib
from executions.errors import CpuExceeded
from executions.states import NamedLimit
from tests.local.attack import run, sandbox, value
from tests.node import RunningNode

EAT = "held = []\nwhile True:\n    held.append(bytearray(b'x' * (8 << 20)))"
FILL = "with open('/tmp/a', 'wb', buffering=0) as f:\n    while True: f.write(b'x' * (1 << 20))"


@pytest.fixture
def backend(node: RunningNode):
    return node.backend


async def error(backend, handle, code: str, **options: Any) -> dict[str, Any]:
    """The error of a run, which must have one."""
    events = [event async for event in backend.run_code(handle, code, timeout_seconds=30, **options)]
    (found,) = [event.data for event in events if event.kind == "error"]
    return found


async def usage(backend, handle, code: str, **options: Any) -> dict[str, int]:
    events = [event async for event in backend.run_code(handle, code, timeout_seconds=30, **options)]
    return events[-1].data


async def test_out_of_memory_ends_the_context_and_not_the_sandbox(backend):
    async with sandbox(backend, memory_mib=256) as handle:
        await run(backend, handle, "kept = 5")
        found = await error(backend, handle, EAT)
        after = await value(backend, handle, "'kept' in globals()")

    assert found["reason"] == NamedLimit.OUT_OF_MEMORY
    assert found["name"] in ("OutOfMemory", "MemoryError")
    if found["name"] == "OutOfMemory":
        assert "more than 256 MiB" in found["value"]
        assert "variables are lost" in found["value"]
        assert after is False


async def test_a_context_that_ends_by_itself_is_not_out_of_memory(backend):
    async with sandbox(backend, memory_mib=256) as handle:
        found = await error(backend, handle, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")

    assert found["name"] == "ContextRestarting"
    assert "reason" not in found


@pytest.mark.parametrize("claim", ["MemoryError()", "OSError(28, 'No space left on device')", "OSError(11, 'EAGAIN')"])
async def test_a_limit_that_was_not_reached_is_not_named(backend, claim):
    async with sandbox(backend) as handle:
        assert "reason" not in await error(backend, handle, f"raise {claim}")


@pytest.mark.parametrize("name", ["OutOfMemory", "ContextRestarting"])
async def test_code_cannot_claim_the_agents_words(backend, name):
    async with sandbox(backend) as handle:
        found = await error(
            backend, handle, f"class {name}(Exception): reason = 'out_of_memory'\nraise {name}('status')"
        )

    assert found["name"] == name
    assert "reason" not in found


async def test_a_full_disk_is_named_and_the_variables_stay(backend):
    async with sandbox(backend, disk_mib=32) as handle:
        await run(backend, handle, "kept = 5")
        found = await error(backend, handle, FILL)

        assert (found["name"], found["reason"]) == ("OSError", NamedLimit.DISK_FULL)
        assert await value(backend, handle, "kept") == 5


async def test_a_disk_without_inodes_is_full(backend):
    async with sandbox(backend, disk_mib=16) as handle:
        found = await error(backend, handle, "for n in range(10**6): open(f'/tmp/{n}', 'w').close()")

    assert found["reason"] == NamedLimit.DISK_FULL


async def test_the_disk_is_full_before_the_memory_is(backend):
    async with sandbox(backend, memory_mib=256, disk_mib=4096) as handle:
        found = await error(backend, handle, FILL)

        assert found["reason"] == NamedLimit.DISK_FULL
        assert await value(backend, handle, "1 + 1") == 2


@pytest.mark.parametrize(("memory", "size"), [(64, 16), (256, 128), (512, 384), (4096, 3968)])
def test_a_disk_in_memory_leaves_room_to_live(memory, size):
    assert disk_mib(1 << 20, memory) == size
    assert disk_mib(10, memory) == 10


async def test_a_giant_sparse_file_is_refused_and_the_context_lives(backend):
    async with sandbox(backend, disk_mib=32) as handle:
        await run(backend, handle, "kept = 5")
        found = await error(backend, handle, "f = open('/tmp/sparse', 'wb')\nf.seek(1 << 40)\nf.write(b'x')\nf.flush()")

        assert found["reason"] == NamedLimit.DISK_FULL
        assert await value(backend, handle, "kept") == 5


@pytest.mark.parametrize(
    "code",
    [
        "import os, time\nwhile True:\n    if os.fork() == 0:\n        time.sleep(600)",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
    ],
    ids=["processes", "threads"],
)
async def test_too_many_processes_are_named(backend, code):
    async with sandbox(backend, processes=40) as handle:
        found = await error(backend, handle, code)

    assert found["reason"] == NamedLimit.TOO_MANY_PROCESSES


async def test_too_many_files_are_named(backend):
    async with sandbox(backend) as handle:
        found = await error(backend, handle, "held = [open('/dev/null') for _ in range(5000)]")

    assert (found["name"], found["reason"]) == ("OSError", NamedLimit.TOO_MANY_FILES)


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, resource.getrlimit(resource.RLIMIT_CPU))\nwhile True: pass",
        "import subprocess\nsubprocess.run(['bash', '-c', 'trap \"\" INT; while :; do :; done'])",
    ],
    ids=["loop", "rlimit", "child"],
)
async def test_cpu_time_has_an_end_and_the_variables_stay(backend, code):
    async with sandbox(backend) as handle:
        await run(backend, handle, "kept = 5")
        used = []
        with pytest.raises(CpuExceeded):
            await collect(backend.run_code(handle, code, timeout_seconds=60, cpu_seconds=0.5), used)

        assert 0.5 <= used[-1].data["cpu_us"] / 1e6 < 2
        assert await value(backend, handle, "kept") == 5


async def collect(events, said: list) -> None:
    async for event in events:
        said.append(event)


async def test_waiting_takes_no_cpu_time(backend):
    async with sandbox(backend) as handle:
        events = backend.run_code(handle, "import time\ntime.sleep(1)\n1", cpu_seconds=0.5)

        assert [event.kind async for event in events][-1] == "usage"


async def test_usage_is_of_the_run_and_not_of_the_sandbox(backend):
    async with sandbox(backend) as handle:
        large = await usage(backend, handle, "x = bytearray(b'x' * (100 << 20))\nfor _ in range(10**7): pass")
        await run(backend, handle, "del x")
        small = await usage(backend, handle, "1")

    assert large["peak_memory_bytes"] > 100 << 20
    assert small["peak_memory_bytes"] < 100 << 20
    assert large["cpu_us"] > 10 * small["cpu_us"]


async def test_runs_at_the_same_time_each_see_the_peak(backend):
    async with sandbox(backend) as handle:
        other = await backend.create_context(handle, language="python")
        code = "import time\nx = bytearray(b'x' * (80 << 20))\ndel x\nprint('freed', flush=True)\ntime.sleep(1)"
        async for event in backend.run_code(handle, code):
            if event.kind == "stdout":
                later = await usage(backend, handle, "1", context_id=other["id"])
            before = event.data

    assert before["peak_memory_bytes"] > 80 << 20
    assert later["peak_memory_bytes"] < 80 << 20


@pytest.mark.parametrize(
    ("name", "said", "limit"),
    [
        ("MemoryError", "", "out_of_memory"),
        ("_ArrayMemoryError", "Unable to allocate 7 GiB", "out_of_memory"),
        ("OSError", "[Errno 24] Too many open files: 'x'", "too_many_files"),
        ("BlockingIOError", "[Errno 11] Resource temporarily unavailable", "too_many_processes"),
        ("RuntimeError", "can't start new thread", "too_many_processes"),
        ("FileNotFoundError", "[Errno 2] No such file", None),
        ("ValueError", "it says [Errno 28] somewhere", None),
    ],
)
def test_which_limit_an_exception_speaks_of(name, said, limit):
    assert limits.suspected(name, said) == limit


async def test_cpu_time_of_a_command_has_an_end_too(backend):
    async with sandbox(backend) as handle:
        with pytest.raises(CpuExceeded):
            await collect(backend.run_command(handle, "while :; do :; done", cpu_seconds=0.5), [])
        left = await value(
            backend,
            handle,
            "import glob\n[p for p in glob.glob('/proc/[0-9]*/cmdline') if b'do :' in open(p, 'rb').read()]",
        )

    assert left == []


@pytest.mark.parametrize(
    "command", ["yes x | head -c 30000000", "yes x | head -c 30000000 >&2; yes y | head -c 9000000"]
)
async def test_output_of_a_command_is_cut_like_a_cells_and_it_goes_on(backend, command):
    async with sandbox(backend, output_bytes=1 << 20) as handle:
        events = [event async for event in backend.run_command(handle, f"{command}; touch /tmp/end; exit 3")]
        said = "".join(event.data["text"] for event in events if event.kind in ("stdout", "stderr"))

        assert 1 << 20 < len(said) < 2 << 20
        assert said.count("passed the limit of 1048576 bytes") == 1
        assert [event.data["exit_code"] for event in events if event.kind == "exit"] == [3]
        assert await value(backend, handle, "__import__('os').path.exists('/tmp/end')")
