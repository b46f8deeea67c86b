"""What every backend must do, as tests that each backend's test class inherits; skipped only by declared capability."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from executions.backends.base import Backend, Event, Handle, Limits, SandboxSpec
from executions.errors import ContextUnknown, CpuExceeded, FileRefused, RunTimedOut, SandboxLost
from tests.backends.cells import CELLS, Cells


def text(events: list[Event], kind: str = "stdout") -> str:
    return "".join(event.data["text"] for event in events if event.kind == kind)


def results(events: list[Event]) -> list[dict[str, Any]]:
    return [event.data["mime"] for event in events if event.kind == "result"]


def value(events: list[Event]) -> Any:
    """The text of the cell's value; fails with the error where there was one."""
    assert not [event.data for event in events if event.kind == "error"]
    return next(
        (event.data["mime"]["text/plain"] for event in events if event.kind == "result" and event.data["main"]), None
    )


class BackendContract:
    """Inherit it, give a `backend` fixture, and replace `template` or `spec` where the backend needs others."""

    template = "default"

    def spec(self, **fields: Any) -> SandboxSpec:
        made: dict[str, Any] = {
            "sandbox_id": "t" + secrets.token_hex(8),
            "template": self.template,
            "timeout_seconds": 120,
        }
        return SandboxSpec(**{**made, **fields})

    @asynccontextmanager
    async def sandbox(self, backend: Backend, **fields: Any) -> AsyncIterator[Handle]:
        handle = await backend.create(self.spec(**fields))
        try:
            yield handle
        finally:
            await backend.kill(handle)

    def need(self, backend: Backend, capability: str) -> None:
        if not getattr(backend.capabilities, capability):
            pytest.skip(f"{backend.alias} declares no {capability}")

    async def run(self, backend: Backend, handle: Handle, code: str, **options: Any) -> list[Event]:
        options.setdefault("timeout_seconds", 30)
        if "#" not in code:  # cells whose comments say what they do are for every backend, also simulated ones
            self.need(backend, "executes")
        return [event async for event in backend.run_code(handle, code, **options)]

    async def command(self, backend: Backend, handle: Handle, command: str, **options: Any) -> list[Event]:
        options.setdefault("timeout_seconds", 30)
        if "#" not in command:
            self.need(backend, "executes")
        return [event async for event in backend.run_command(handle, command, **options)]

    # code

    async def test_prints_and_answers_with_the_value(self, backend):
        async with self.sandbox(backend) as handle:
            events = await self.run(backend, handle, "print('hello')  #> hello\n6 * 7  #= 42")

        assert text(events) == "hello\n"
        assert value(events) == "42"
        assert [event.kind for event in events][:3] == ["count", "stdout", "result"]
        assert events[0].data == {"execution_count": 1}

    async def test_output_arrives_while_the_code_runs(self, backend):
        async with self.sandbox(backend) as handle:
            events = backend.run_code(
                handle, "import time\nprint('first', flush=True)  #> first\ntime.sleep(20)  #~ 20", timeout_seconds=60
            )
            async with asyncio.timeout(10):
                async for event in events:
                    if event.kind == "stdout":
                        break
            await events.aclose()

        assert event.data["text"] == "first\n"

    async def test_streams_and_results_keep_their_order(self, backend):
        code = (
            "import sys\nfrom IPython.display import display\n"
            "for i in range(20):\n    print('out', i)\n    print('err', i, file=sys.stderr)\n    display(i)"
        )
        async with self.sandbox(backend) as handle:
            events = await self.run(backend, handle, code)

        said = [
            (e.kind, e.data.get("text") or e.data["mime"]["text/plain"])
            for e in events
            if e.kind not in ("count", "usage")
        ]
        wanted = [[("stdout", f"out {i}\n"), ("stderr", f"err {i}\n"), ("result", str(i))] for i in range(20)]
        assert said == [step for steps in wanted for step in steps]

    async def test_subprocesses_stream_too_and_in_order(self, backend):
        code = "import subprocess\nprint('a')\nsubprocess.run(['echo', 'b'])\nprint('c')"
        async with self.sandbox(backend) as handle:
            events = await self.run(backend, handle, code)

        assert text(events) == "a\nb\nc\n"

    async def test_an_exception_is_an_error_event(self, backend):
        async with self.sandbox(backend) as handle:
            events = await self.run(
                backend, handle, "def f():\n    return 1 / 0\nf()  #! ZeroDivisionError: division by zero"
            )

        (error,) = [event.data for event in events if event.kind == "error"]
        assert (error["name"], error["value"]) == ("ZeroDivisionError", "division by zero")
        assert ("return 1 / 0" in error["traceback"]) == backend.capabilities.executes
        assert "\x1b" not in error["traceback"]

    async def test_a_syntax_error_is_an_error_event(self, backend):
        async with self.sandbox(backend) as handle:
            events = await self.run(backend, handle, "x x  #! SyntaxError: invalid syntax")

        assert [event.data["name"] for event in events if event.kind == "error"] == ["SyntaxError"]

    async def test_a_data_frame_comes_as_text_html_and_data(self, backend):
        async with self.sandbox(backend) as handle:
            events = await self.run(
                backend, handle, "import pandas as pd\npd.DataFrame({'a': [1, 2], 'b': ['x', None]})"
            )

        (mime,) = results(events)
        assert "<table" in mime["text/html"]
        assert mime["e2b/data"] == {"a": [1, 2], "b": ["x", None]}
        assert "a" in mime["text/plain"]

    async def test_a_plot_comes_as_png_and_chart(self, backend):
        code = "import matplotlib.pyplot as plt\nplt.plot([1, 2, 3], [4, 5, 6])\nplt.title('T')\nplt.show()"
        async with self.sandbox(backend) as handle:
            events = await self.run(backend, handle, code)

        (mime,) = results(events)
        assert mime["image/png"].startswith("iVBOR")
        assert mime["e2b/chart"]["type"] == "line"
        assert mime["e2b/chart"]["title"] == "T"

    async def test_a_plot_that_nobody_shows_comes_at_the_end_of_the_cell(self, backend):
        async with self.sandbox(backend) as handle:
            events = await self.run(backend, handle, "import matplotlib.pyplot as plt\nlines = plt.plot([1, 2])")

        assert ["image/png" in mime for mime in results(events)] == [True]

    async def test_a_list_or_dict_comes_as_json_too(self, backend):
        async with self.sandbox(backend) as handle:
            events = await self.run(backend, handle, "{'a': [1, None, 'é']}")

        assert results(events)[0]["application/json"] == {"a": [1, None, "é"]}

    async def test_state_is_kept_within_a_sandbox_and_never_between_two(self, backend):
        async with self.sandbox(backend) as one, self.sandbox(backend) as other:
            await self.run(backend, one, "secret = 7\nopen('/tmp/mark', 'w').write('x')")
            kept = await self.run(backend, one, "secret")
            foreign = await self.run(backend, other, "import os\n('secret' in globals(), os.path.exists('/tmp/mark'))")

        assert value(kept) == "7"
        assert value(foreign) == "(False, False)"

    async def test_two_sandboxes_draw_different_random_numbers(self, backend):
        code = "import random, uuid, numpy\n(random.random(), numpy.random.rand(), uuid.uuid4().hex)"
        async with self.sandbox(backend) as one, self.sandbox(backend) as other:
            drawn = [value(await self.run(backend, handle, code)).strip("()").split(", ") for handle in (one, other)]

        assert not set(drawn[0]) & set(drawn[1])

    async def test_awaits_at_the_top_level(self, backend):
        async with self.sandbox(backend) as handle:
            events = await self.run(backend, handle, "import asyncio\nawait asyncio.sleep(0.01, 'done')")

        assert value(events) == "'done'" or value(events) == "done"

    async def test_understands_magics_and_shell_lines(self, backend):
        async with self.sandbox(backend) as handle:
            events = await self.run(backend, handle, "%env MARK=1\n!echo shell $MARK")

        assert "shell 1" in text(events)

    async def test_unicode_survives_both_ways(self, backend):
        async with self.sandbox(backend) as handle:
            events = await self.run(backend, handle, "print('žluťoučký 🐍 \\u0000 ' + '🦀' * 1000)")

        assert text(events) == "žluťoučký 🐍 \x00 " + "🦀" * 1000 + "\n"

    async def test_five_megabytes_arrive_whole(self, backend):
        async with self.sandbox(backend) as handle:
            events = await self.run(backend, handle, "for i in range(5000):\n    print(f'{i:08d}' + 'x' * 1015)")

        said = text(events)
        assert len(said) == 5000 * 1024
        assert said.endswith("00004999" + "x" * 1015 + "\n")

    async def test_env_is_there_for_one_run(self, backend):
        async with self.sandbox(backend, env={"KEPT": "1"}) as handle:
            given = await self.run(
                backend, handle, "import os\n(os.environ['KEPT'], os.environ['ONCE'])", env={"ONCE": "it's"}
            )
            later = await self.run(backend, handle, "(os.environ['KEPT'], os.environ.get('ONCE'))")

        assert value(given) == """('1', "it's")"""
        assert value(later) == "('1', None)"

    # time

    @pytest.mark.parametrize(
        "code",
        [
            "while True: pass  #~ 600",
            "import time\ntime.sleep(600)  #~ 600",
            "while True:\n    try:\n        while True: pass\n    except KeyboardInterrupt: pass",
            "import subprocess\nsubprocess.run(['bash', '-c', 'trap \"\" INT TERM; while :; do sleep 1; done'])",
            "import os\nos.system('trap \"\" INT; sleep 600')",
            "import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')",
        ],
        ids=["loop", "sleep", "stubborn", "deaf_child", "os_system", "regex"],
    )
    async def test_what_runs_too_long_is_stopped_and_the_sandbox_still_works(self, backend, code):
        async with self.sandbox(backend) as handle:
            await self.run(backend, handle, "1  #= 1")
            with pytest.raises(RunTimedOut):
                await self.run(backend, handle, code, timeout_seconds=0.5)
            after = await self.run(backend, handle, "1 + 1  #= 2")

            assert value(after) == "2"
            await self.nothing_runs(backend, handle)

    async def nothing_runs(self, backend: Backend, handle: Handle) -> None:
        """Beside the context itself nothing of the stopped run is left."""
        if not (backend.capabilities.commands and backend.capabilities.executes):
            return
        left = await self.command(backend, handle, "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done")
        assert "sleep" not in text(left)

    async def test_an_interrupted_run_keeps_its_variables(self, backend):
        async with self.sandbox(backend) as handle:
            await self.run(backend, handle, "kept = 5")
            with pytest.raises(RunTimedOut):
                await self.run(backend, handle, "import time\ntime.sleep(600)", timeout_seconds=0.5)
            after = await self.run(backend, handle, "kept")

        assert value(after) == "5"

    async def test_closing_the_iterator_interrupts_the_code(self, backend):
        async with self.sandbox(backend) as handle:
            events = backend.run_code(handle, "n = 0\nwhile True:\n    n += 1\n    print(n)", timeout_seconds=60)
            async for event in events:
                if event.kind == "stdout":
                    break
            await events.aclose()
            first = await self.run(backend, handle, "n")
            second = await self.run(backend, handle, "n")

        assert value(first) == value(second)

    async def test_runs_of_one_context_wait_for_each_other(self, backend):
        async with self.sandbox(backend) as handle:
            await self.run(backend, handle, "log = []")
            code = "import time\nlog.append('begin')\ntime.sleep(0.05)\nlog.append('end')"
            await asyncio.gather(*(self.run(backend, handle, code) for _ in range(3)))
            events = await self.run(backend, handle, "log == ['begin', 'end'] * 3")

        assert value(events) == "True"

    # limits

    async def test_memory_that_is_used_up_is_named_and_the_sandbox_works_on(self, backend):
        self.need(backend, "run_limits")
        async with self.sandbox(backend, limits=Limits(memory_mib=256)) as handle:
            events = await self.run(backend, handle, "held = []\nwhile True: held.append(bytearray(b'x' * (8 << 20)))")
            after = await self.run(backend, handle, "1 + 1")

        assert [event.data.get("reason") for event in events if event.kind == "error"] == ["out_of_memory"]
        assert value(after) == "2"

    async def test_a_full_disk_is_named(self, backend):
        self.need(backend, "run_limits")
        async with self.sandbox(backend, limits=Limits(disk_mib=32)) as handle:
            events = await self.run(
                backend, handle, "with open('/tmp/x', 'wb', 0) as f:\n    while True: f.write(b'x' * (1 << 20))"
            )

        assert [event.data.get("reason") for event in events if event.kind == "error"] == ["disk_full"]

    async def test_cpu_time_that_is_used_up_stops_the_run(self, backend):
        self.need(backend, "run_limits")
        async with self.sandbox(backend) as handle:
            await self.run(backend, handle, "kept = 5")
            with pytest.raises(CpuExceeded):
                await self.run(backend, handle, "while True: pass", cpu_seconds=0.3)
            after = await self.run(backend, handle, "kept")

        assert value(after) == "5"

    # ends

    async def test_a_run_that_kills_its_interpreter_says_so_and_the_next_one_works(self, backend):
        async with self.sandbox(backend) as handle:
            died = await self.run(backend, handle, "import os\nos._exit(3)")
            after = await self.run(backend, handle, "1 + 1")

        assert [event.kind for event in died if event.kind == "error"] == ["error"]
        assert value(after) == "2"

    async def test_kill_is_confirmed_and_may_be_repeated(self, backend):
        handle = await backend.create(self.spec())

        assert await backend.kill(handle) is True
        assert await backend.kill(handle) is True

    async def test_a_pause_keeps_everything_and_both_ways_may_be_repeated(self, backend):
        self.need(backend, "pause")
        async with self.sandbox(backend) as handle:
            await backend.write_file(handle, "/home/user/kept", b"kept")
            await self.run(backend, handle, "kept = 41")

            await backend.pause(handle)
            await backend.pause(handle)
            await backend.resume(handle, timeout_seconds=60)
            await backend.resume(handle, timeout_seconds=60)

            assert b"".join([piece async for piece in backend.read_file(handle, "/home/user/kept")]) == b"kept"
            assert value(await self.run(backend, handle, "kept + 1  #= 42")) == "42"

    async def test_what_is_paused_is_killed_and_is_gone_then(self, backend):
        self.need(backend, "pause")
        handle = await backend.create(self.spec())
        await backend.pause(handle)

        assert await backend.kill(handle) is True

        for turn in (backend.pause(handle), backend.resume(handle, timeout_seconds=60)):
            with pytest.raises(SandboxLost):
                await turn

    async def test_a_killed_sandbox_is_lost(self, backend):
        handle = await backend.create(self.spec())
        await backend.kill(handle)

        with pytest.raises(SandboxLost):
            await self.run(backend, handle, "1  #= 1")
        with pytest.raises(SandboxLost):
            await backend.connect(handle)

    async def test_a_sandbox_killed_in_mid_run_is_lost(self, backend):
        handle = await backend.create(self.spec())
        events = backend.run_code(
            handle, "print('on')  #> on\nimport time\ntime.sleep(600)  #~ 600", timeout_seconds=60
        )
        async for event in events:
            if event.kind == "stdout":
                break
        await backend.kill(handle)

        with pytest.raises(SandboxLost):
            async for _ in events:
                pass

    async def test_lists_what_it_has_under_our_id(self, backend):
        spec = self.spec()
        await backend.create(spec)
        there = [listed.handle for listed in await backend.list() if listed.sandbox_id == spec.sandbox_id]
        assert len(there) == 1

        await backend.kill(there[0])  # what is listed may know less than create() did, but enough to end it
        gone = [listed.sandbox_id for listed in await backend.list()]

        assert spec.sandbox_id not in gone

    async def test_is_killed_by_our_id_when_its_handle_was_never_learned(self, backend):
        spec = self.spec()
        await backend.create(spec)

        assert await backend.kill_by_id(spec.sandbox_id) is True
        assert spec.sandbox_id not in [listed.sandbox_id for listed in await backend.list()]

    async def test_a_timeout_ends_the_sandbox(self, backend):
        async with self.sandbox(backend) as handle:
            await backend.set_timeout(handle, 1)
            with pytest.raises(SandboxLost):
                await self.run(backend, handle, "import time\ntime.sleep(600)  #~ 600", timeout_seconds=60)

    async def test_is_checked_without_raising(self, backend):
        check = await backend.check()

        assert check.ok, check.detail
        assert check.isolation == backend.isolation

    async def test_usage_is_measured(self, backend):
        self.need(backend, "metrics")
        async with self.sandbox(backend) as handle:
            events = await self.run(backend, handle, "x = 'a' * 50_000_000\nfor i in range(5_000_000): pass")

        (usage,) = [event.data for event in events if event.kind == "usage"]
        assert usage["cpu_us"] > 20_000
        assert usage["peak_memory_bytes"] > 50_000_000

    # files

    async def test_files_go_in_and_come_out(self, backend):
        self.need(backend, "files")
        content = bytes(range(256)) * 5000
        async with self.sandbox(backend) as handle:
            await backend.write_file(handle, "/home/user/a/b/c.bin", content)
            back = b"".join([piece async for piece in backend.read_file(handle, "a/b/c.bin")])
            seen = await self.run(backend, handle, "len(open('/home/user/a/b/c.bin', 'rb').read())")

        assert back == content
        assert value(seen) == str(len(content))

    async def test_files_are_streamed_in(self, backend):
        self.need(backend, "files")

        async def pieces():
            for _ in range(40):
                yield b"x" * 100_000

        async with self.sandbox(backend) as handle:
            await backend.write_file(handle, "/tmp/big", pieces())
            seen = await self.run(backend, handle, "import os\nos.path.getsize('/tmp/big')")

        assert value(seen) == "4000000"

    async def test_folders_are_listed(self, backend):
        self.need(backend, "files")
        async with self.sandbox(backend) as handle:
            await backend.write_file(handle, "/home/user/d/one.txt", b"1234")
            await backend.write_file(handle, "/home/user/d/sub/two.txt", b"")
            flat = await backend.list_files(handle, "/home/user/d")
            deep = await backend.list_files(handle, "/home/user/d", depth=2)
            await backend.remove_file(handle, "/home/user/d/one.txt")
            after = await backend.list_files(handle, "/home/user/d")

        assert [(entry.name, entry.type) for entry in flat] == [("one.txt", "file"), ("sub", "directory")]
        assert flat[0].size_bytes == 4
        assert [entry.path for entry in deep if entry.name == "two.txt"] == ["/home/user/d/sub/two.txt"]
        assert [entry.name for entry in after] == ["sub"]

    async def test_a_missing_file_is_refused_as_missing(self, backend):
        self.need(backend, "files")
        async with self.sandbox(backend) as handle:
            with pytest.raises(FileRefused) as refusal:
                [piece async for piece in backend.read_file(handle, "/home/user/nothing")]

        assert refusal.value.status == 404

    @pytest.mark.parametrize("path", ["../../etc/passwd", "/tmp/../etc/passwd", "a\0b", "/home/user/" + "x" * 5000, ""])
    async def test_a_path_that_is_none_is_refused(self, backend, path):
        self.need(backend, "files")
        async with self.sandbox(backend) as handle:
            with pytest.raises(FileRefused):
                await backend.write_file(handle, path, b"x")
            with pytest.raises(FileRefused):
                [piece async for piece in backend.read_file(handle, path)]

    async def test_a_fifo_or_device_is_refused_without_waiting(self, backend):
        self.need(backend, "files")
        async with self.sandbox(backend) as handle:
            await self.run(backend, handle, "import os\nos.mkfifo('/tmp/fifo')\nos.symlink('/dev/zero', '/tmp/zero')")
            for path in ("/tmp/fifo", "/tmp/zero"):
                with pytest.raises(FileRefused):
                    async with asyncio.timeout(5):
                        [piece async for piece in backend.read_file(handle, path)]
                with pytest.raises(FileRefused):
                    async with asyncio.timeout(5):
                        await backend.write_file(handle, path, b"x")

    # commands

    async def test_a_command_streams_and_ends_with_its_exit_code(self, backend):
        self.need(backend, "commands")
        async with self.sandbox(backend) as handle:
            events = await self.command(
                backend, handle, "pwd; echo $MARK; echo oops >&2; exit 3", cwd="/tmp", env={"MARK": "it's"}
            )

        assert text(events) == "/tmp\nit's\n"
        assert text(events, "stderr") == "oops\n"
        assert events[-1] == Event("exit", {"exit_code": 3})

    async def test_a_command_that_runs_too_long_is_stopped(self, backend):
        self.need(backend, "commands")
        async with self.sandbox(backend) as handle:
            with pytest.raises(RunTimedOut):
                await self.command(backend, handle, "trap '' TERM INT; sleep 600  #~ 600", timeout_seconds=0.5)
            await self.nothing_runs(backend, handle)

    async def test_a_command_finds_the_same_python(self, backend):
        self.need(backend, "commands")
        async with self.sandbox(backend) as handle:
            events = await self.command(
                backend, handle, "python -c 'import numpy; print(numpy.arange(3).sum())'; python3 -V"
            )

        assert text(events).startswith("3\nPython 3.")

    # contexts

    async def test_contexts_keep_apart_and_restart_forgets(self, backend):
        self.need(backend, "contexts")
        async with self.sandbox(backend) as handle:
            made = await backend.create_context(handle, language="python", cwd="/tmp")
            await self.run(backend, handle, "x = 'default'")
            await self.run(backend, handle, "x = 'made'", context_id=made["id"])
            seen = await self.run(backend, handle, "import os\n(x, os.getcwd())", context_id=made["id"])
            default = await self.run(backend, handle, "x")
            await backend.restart_context(handle, made["id"])
            forgotten = await self.run(backend, handle, "'x' in globals()", context_id=made["id"])
            listed = await backend.list_contexts(handle)

        assert value(seen) == "('made', '/tmp')"
        assert value(default).strip("'") == "default"
        assert value(forgotten) == "False"
        assert (made["language"], made["cwd"]) == ("python", "/tmp")
        assert made["id"] in [context["id"] for context in listed]

    async def test_a_removed_context_is_unknown(self, backend):
        self.need(backend, "contexts")
        async with self.sandbox(backend) as handle:
            made = await backend.create_context(handle, language="python")
            await backend.remove_context(handle, made["id"])

            with pytest.raises(ContextUnknown):
                await self.run(backend, handle, "1", context_id=made["id"])

    async def test_bash_keeps_its_state(self, backend):
        if "bash" not in backend.capabilities.languages:
            pytest.skip(f"{backend.alias} declares no bash")
        async with self.sandbox(backend) as handle:
            await self.run(backend, handle, "x=5; cd /tmp", language="bash")
            events = await self.run(backend, handle, "echo $x $PWD", language="bash")
            failed = await self.run(backend, handle, "echo oops >&2; false", language="bash")

        assert text(events) == "5 /tmp\n"
        assert text(failed, "stderr") == "oops\n"
        assert [event.kind for event in failed if event.kind == "error"] == ["error"]

    # languages

    def cells(self, backend: Backend, language: str) -> Cells:
        self.need(backend, "executes")
        if language not in backend.capabilities.languages:
            pytest.skip(f"{backend.alias} declares no {language}")
        return CELLS[language]

    @pytest.mark.parametrize("language", CELLS)
    async def test_a_language_keeps_its_state_and_says_what_happens(self, backend, language):
        cells = self.cells(backend, language)
        async with self.sandbox(backend) as handle:
            kept = await self.run(backend, handle, cells.keeps, language=language)
            asked = await self.run(backend, handle, cells.asks, language=language)
            said = await self.run(backend, handle, cells.says, language=language)
            failed = await self.run(backend, handle, cells.fails, language=language)

        assert value(kept) is None
        assert value(asked) == cells.answer
        assert (text(said), text(said, "stderr")) == ("out\n", "err\n")
        (error,) = [event.data for event in failed if event.kind == "error"]
        assert (error["name"], error["value"]) == cells.error
        assert "no" in error["traceback"]

    @pytest.mark.parametrize("language", CELLS)
    async def test_an_endless_loop_in_a_language_is_stopped_and_its_state_stays(self, backend, language):
        cells = self.cells(backend, language)
        async with self.sandbox(backend) as handle:
            await self.run(backend, handle, cells.keeps, language=language)
            with pytest.raises(RunTimedOut):
                await self.run(backend, handle, cells.loops, language=language, timeout_seconds=0.5)
            asked = await self.run(backend, handle, cells.asks, language=language)

        assert value(asked) == cells.answer

    @pytest.mark.parametrize("language", CELLS)
    async def test_env_is_there_for_one_run_in_a_language(self, backend, language):
        cells = self.cells(backend, language)
        async with self.sandbox(backend) as handle:
            given = await self.run(backend, handle, cells.env, language=language, env={"ONCE": "it's"})
            later = await self.run(backend, handle, cells.env, language=language)

        assert "it's" in value(given)
        assert "it's" not in (value(later) or "")

    @pytest.mark.parametrize("language", CELLS)
    async def test_contexts_of_a_language_keep_apart_and_restart_forgets(self, backend, language):
        self.need(backend, "contexts")
        cells = self.cells(backend, language)
        async with self.sandbox(backend) as handle:
            made = await backend.create_context(handle, language=language, cwd="/tmp")
            await self.run(backend, handle, cells.keeps, context_id=made["id"])
            inside = await self.run(backend, handle, cells.asks, context_id=made["id"])
            outside = await self.run(backend, handle, cells.asks, language=language)
            await backend.restart_context(handle, made["id"])
            forgotten = await self.run(backend, handle, cells.asks, context_id=made["id"])

        assert (made["language"], made["cwd"]) == (language, "/tmp")
        assert value(inside) == cells.answer
        for events in (outside, forgotten):
            assert [event.kind for event in events if event.kind in ("result", "error")] == ["error"]
