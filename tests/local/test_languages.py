"""What each language of the local runtime does beyond the contract, and all kinds of results."""

from __future__ import annotations

import json
import time

import pytest

from executions.errors import RunTimedOut, Unsupported
from tests.backends.contract import results, text, value
from tests.local.attack import sandbox
from tests.node import RunningNode

PICTURE = "from PIL import Image\nimport io\nb = io.BytesIO()\nImage.new('RGB', (4, 4)).save(b, '{0}')\n"
SHOWN = {
    "html": ("from IPython.display import HTML\nHTML('<b>x</b>')", "text/html", "<b>x</b>"),
    "markdown": ("from IPython.display import Markdown\nMarkdown('# x')", "text/markdown", "# x"),
    "latex": ("from IPython.display import Latex\nLatex('$x$')", "text/latex", "$x$"),
    "svg": ("from IPython.display import SVG\nSVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>')", "image/svg+xml", "<svg"),
    "png": (PICTURE.format("png") + "from IPython.display import Image as I\nI(b.getvalue())", "image/png", "iVBOR"),
    "jpeg": (PICTURE.format("jpeg") + "from IPython.display import Image as I\nI(b.getvalue())", "image/jpeg", "/9j/"),
    "javascript": ("from IPython.display import Javascript\nJavascript('1')", "application/javascript", "1"),
    "sympy": ("import sympy\nsympy.Symbol('x') ** 2", "text/latex", "$"),
}  # fmt: skip
CHARTS = {
    "line": "plt.plot([1, 2, 3], [4, 5, 6])",
    "scatter": "plt.scatter([1, 2, 3], [4, 5, 6])",
    "bar": "plt.bar(['a', 'b'], [1, 2])",
    "pie": "plt.pie([1, 2], labels=['a', 'b'])",
    "box_and_whisker": "plt.boxplot([[1, 2, 3], [2, 3, 9]], patch_artist=True)",
}


@pytest.fixture
def backend(node: RunningNode):
    return node.backend


async def cell(backend, handle, code: str, language: str = "javascript", **options):
    options.setdefault("timeout_seconds", 30)
    return [event async for event in backend.run_code(handle, code, language=language, **options)]


async def collect(events, said: list) -> None:
    async for event in events:
        said.append(event)


def errors(events) -> list[tuple[str, str]]:
    return [(event.data["name"], event.data["value"]) for event in events if event.kind == "error"]


# results of Python


@pytest.mark.parametrize("kind", SHOWN)
async def test_a_rich_result_comes_in_its_own_kind(backend, kind):
    code, mime, beginning = SHOWN[kind]
    async with sandbox(backend) as handle:
        (shown,) = results(await cell(backend, handle, code, "python"))

    assert shown[mime].startswith(beginning)


@pytest.mark.parametrize("kind", CHARTS)
async def test_a_chart_comes_with_the_numbers_that_it_was_drawn_from(backend, kind):
    code = f"import matplotlib.pyplot as plt\n_ = {CHARTS[kind]}\nplt.title('T')\nplt.show()"
    async with sandbox(backend) as handle:
        (shown,) = results(await cell(backend, handle, code, "python"))

    chart = shown["e2b/chart"]
    assert (chart["type"], chart["title"]) == (kind, "T")
    assert chart["elements"]
    assert shown["image/png"].startswith("iVBOR")


# JavaScript and TypeScript


async def test_names_may_be_declared_again_as_in_a_notebook(backend):
    async with sandbox(backend) as handle:
        for code in ("let x = 1; const y = 1; class A {}", "let x = 2; const y = 3; class A { z = 4 }"):
            assert errors(await cell(backend, handle, code)) == []

        assert value(await cell(backend, handle, "x + y + new A().z")) == "9"


async def test_await_and_imports_stand_at_the_top_level(backend):
    code = (
        "import fs, { statSync as stat } from 'fs'\nimport * as os from 'node:os';\nimport 'path'\n"
        "const { join } = await import('node:path');\n"
        "[await new Promise((done) => setTimeout(() => done(1), 10)), ...[fs.statSync, stat, os.cpus, join].map((f) => typeof f)]"
    )
    async with sandbox(backend) as handle:
        (shown,) = results(await cell(backend, handle, code))
        required = await cell(backend, handle, "require('node:path').basename('/a/b')")

    assert shown["application/json"] == [1, *["function"] * 4]
    assert value(required) == "b"


async def test_modules_of_the_sandbox_are_imported(backend):
    async with sandbox(backend) as handle:
        await backend.write_file(handle, "/home/user/one.mjs", b"export default (await import('./two.mjs')).two + 1")
        await backend.write_file(handle, "/home/user/two.mjs", b"export const two = 2")
        await backend.write_file(handle, "/home/user/three.ts", b"export const three: number = 3")
        events = await cell(backend, handle, "import one from './one.mjs'; one + require('./three.ts').three")

    assert value(events) == "6"


@pytest.mark.parametrize(
    ("code", "plain", "as_json"),
    [
        ("({ a: [1, null, 'é'] })", "{ a: [ 1, null, 'é' ] }", {"a": [1, None, "é"]}),
        ("[1, [2]]", "[ 1, [ 2 ] ]", [1, [2]]),
        ("'text'", "text", None),
        ("1n", "1n", None),
        ("-0", "-0", None),
        ("null", "null", None),
        ("new Map([[1, 2]])", "Map(1) { 1 => 2 }", None),
        ("const o = {}; o.o = o; o", "<ref *1> { o: [Circular *1] }", None),
        ("Promise.resolve(5)", "5", None),
        ("for (let i = 0; i < 3; i++) i", "2", None),
    ],
)
async def test_a_value_is_inspected_and_plain_ones_are_json(backend, code, plain, as_json):
    async with sandbox(backend) as handle:
        (shown,) = results(await cell(backend, handle, code))

    assert shown["text/plain"] == plain
    assert shown.get("application/json") == as_json


async def test_output_of_the_console_and_of_children_keeps_its_order(backend):
    code = (
        "for (let i = 0; i < 10; i++) { console.log('out', i); console.error('err', i) }\n"
        "require('child_process').execSync('echo child; echo wrong >&2', { stdio: 'inherit' }); undefined"
    )
    async with sandbox(backend) as handle:
        events = await cell(backend, handle, code)

    said = [(event.kind, event.data["text"]) for event in events if event.kind in ("stdout", "stderr")]
    wanted = [[("stdout", f"out {i}\n"), ("stderr", f"err {i}\n")] for i in range(10)]
    assert said[:20] == [line for lines in wanted for line in lines]
    assert sorted(said[20:]) == [("stderr", "wrong\n"), ("stdout", "child\n")]


@pytest.mark.parametrize(
    ("code", "error", "where"),
    [
        ("function f() {\n  throw new RangeError('far')\n}\nf()", ("RangeError", "far"), "at f (cell-1.js:2:9)"),
        ("let a = 1\nx y", ("SyntaxError", "Unexpected identifier 'y'"), "cell-1.js:2:3"),
        ("await Promise.reject(new Error('late'))", ("Error", "late"), "cell-1.js:1"),
        ("throw { a: 1 }", ("Error", "{ a: 1 }"), "{ a: 1 }"),
    ],
)
async def test_an_error_says_where(backend, code, error, where):
    async with sandbox(backend) as handle:
        events = await cell(backend, handle, code)

    assert errors(events) == [error]
    (traceback,) = [event.data["traceback"] for event in events if event.kind == "error"]
    assert where in traceback
    assert "javascript.cjs" not in traceback
    assert "node:inspector" not in traceback


async def test_an_error_that_nobody_waits_for_is_told_and_the_context_lives(backend):
    code = (
        "globalThis.kept = 5; Promise.reject(new Error('first'));\n"
        "setTimeout(() => { throw new Error('second') }, 1); await new Promise((done) => setTimeout(done, 50))"
    )
    async with sandbox(backend) as handle:
        events = await cell(backend, handle, code)
        after = await cell(backend, handle, "kept")

    assert "Uncaught Error: first" in text(events, "stderr")
    assert "Uncaught Error: second" in text(events, "stderr")
    assert value(after) == "5"


@pytest.mark.parametrize(
    "code",
    [
        "await new Promise(() => {})",
        "await 1; while (true) {}",
        "while (true) console.log('x')",
        "await 1; while (true) console.log('x')",
        "require('child_process').execSync('sleep 600')",
        "Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0)",
    ],
)
async def test_an_interrupted_cell_keeps_the_variables_and_the_console(backend, code):
    async with sandbox(backend) as handle:
        await cell(backend, handle, "let kept = 5")
        with pytest.raises(RunTimedOut):
            await cell(backend, handle, code, timeout_seconds=0.4)
        garbage = await cell(
            backend, handle, "for (let i = 0; i < 300; i++) new Array(1e4).fill({}); console.log(kept)"
        )

    assert text(garbage) == "5\n"


async def test_a_loop_after_the_outside_was_awaited_ends_its_context_and_that_is_said(backend):
    said: list = []
    code = "let kept = 1; await new Promise((done) => setTimeout(done, 1)); while (true) {}"
    async with sandbox(backend) as handle:
        with pytest.raises(RunTimedOut):
            await collect(backend.run_code(handle, code, language="javascript", timeout_seconds=0.5), said)
        after = await cell(backend, handle, "typeof kept")

    assert [name for name, _ in errors(said)] == ["ContextRestarting"]
    assert value(after) == "undefined"


async def test_a_cell_that_ends_node_or_uses_up_its_heap_says_so(backend):
    async with sandbox(backend, memory_mib=256) as handle:
        ended = await cell(backend, handle, "process.exit(3)")
        full = await cell(backend, handle, "const all = []; while (true) all.push(new Array(1e5).fill(1.5))")
        after = await cell(backend, handle, "1 + 1")

    assert [name for name, _ in errors(ended)] == ["ContextRestarting"]
    assert [name for name, _ in errors(full)] in (["OutOfMemory"], ["ContextRestarting"])
    assert value(after) == "2"


async def test_typescript_shares_the_javascript_context_and_refuses_what_is_no_typescript(backend):
    async with sandbox(backend) as handle:
        await cell(backend, handle, "let shared = 1")
        seen = await cell(backend, handle, "const more: number = shared + 1; more", "ts")
        wrong = await cell(backend, handle, "let n: number = = 3", "typescript")
        untyped = await cell(backend, handle, "let n: number = 3")
        made = await backend.create_context(handle, language="typescript")
        typed = [event async for event in backend.run_code(handle, "let m: number = 3; m", context_id=made["id"])]

    assert value(seen) == "2"
    assert [name for name, _ in errors(wrong)] == ["SyntaxError"]
    assert [name for name, _ in errors(untyped)] == ["SyntaxError"]
    assert value(typed) == "3"


async def test_commands_have_the_node_of_the_cells(backend):
    async with sandbox(backend) as handle:
        events = [event async for event in backend.run_command(handle, "node -p process.version", timeout_seconds=30)]
        there = await cell(backend, handle, "process.version")

    assert text(events).strip() == value(there)


async def test_a_first_cell_of_javascript_does_not_keep_anybody_waiting(backend):
    async def first() -> float:
        async with sandbox(backend) as handle:
            began = time.monotonic()
            await cell(backend, handle, "1 + 1")
            return time.monotonic() - began

    assert min([await first() for _ in range(5)]) < 0.5  # 60 to 90 ms where nobody else computes


# which languages there are


async def test_the_node_says_which_languages_its_templates_have(backend, node):
    noted = json.loads((node.run_dir / "languages" / "default").read_text())

    assert backend.capabilities.languages == set(noted) | {"python", "bash", "javascript", "typescript"}
    assert {"python", "bash", "javascript", "typescript"} <= set(noted)


async def test_a_language_that_the_machine_lacks_is_refused_with_the_command_that_installs_it(backend):
    packages = {"java": "default-jdk-headless", "r": "r-base-core"}
    lacking = [(name, packages[name]) for name in packages if name not in backend.capabilities.languages]
    if not lacking:
        pytest.skip("this machine has every language")
    async with sandbox(backend) as handle:
        for language, package in lacking:
            with pytest.raises(Unsupported, match=f"apt-get install -y {package}"):
                await cell(backend, handle, "1", language)
            with pytest.raises(Unsupported, match=f"apt-get install -y {package}"):
                await backend.create_context(handle, language=language)


async def test_a_language_that_nobody_knows_is_refused(backend):
    async with sandbox(backend) as handle:
        with pytest.raises(Unsupported, match="Unknown language 'cobol'"):
            await cell(backend, handle, "1", "cobol")


# Java and R, where they are


@pytest.fixture
def java(backend):
    if "java" not in backend.capabilities.languages:
        pytest.skip("Java is not installed on this machine")


@pytest.mark.usefixtures("java")
async def test_java_shows_values_and_refuses_what_does_not_compile(backend):
    async with sandbox(backend) as handle:
        listed = await cell(
            backend, handle, "import java.time.*;\nvar n = 2;\nList.of(1, n).stream().map(i -> i + 1).toList()", "java"
        )
        shown = await cell(backend, handle, 'String s = "a" + n;\ns', "java")
        wrong = await cell(backend, handle, 'int x = "text";', "java")
        unknown = await cell(backend, handle, "Nothing there = null;", "java")
        thrown = await cell(backend, handle, "int half(int n) { return n / 0; }\nhalf(1)", "java")

    assert value(listed) == "[2, 3]"
    assert value(shown) == "a2"
    assert "incompatible types" in errors(wrong)[0][1]
    assert "class Nothing" in errors(unknown)[0][1]
    assert errors(thrown) == [("java.lang.ArithmeticException", "/ by zero")]


@pytest.mark.usefixtures("java")
async def test_java_stops_asleep_and_stays_within_its_memory(backend):
    async with sandbox(backend) as handle:
        await cell(backend, handle, "int kept = 5;", "java")
        with pytest.raises(RunTimedOut):
            await cell(backend, handle, "Thread.sleep(600_000);", "java", timeout_seconds=0.4)
        full = await cell(
            backend, handle, "var all = new ArrayList<int[]>(); while (true) all.add(new int[1_000_000]);", "java"
        )
        after = await cell(backend, handle, "kept", "java")

    assert errors(full) == [("java.lang.OutOfMemoryError", "Java heap space")]
    assert value(after) == "5"


async def test_r_prints_what_is_visible_and_shows_what_it_draws(backend):
    if "r" not in backend.capabilities.languages:
        pytest.skip("R is not installed on this machine")
    async with sandbox(backend) as handle:
        events = await cell(backend, handle, "1:3\nwarning('w')\nplot(1:3)\ndata.frame(a = 1:2)", "r")

    assert text(events) == "[1] 1 2 3\n"
    assert text(events, "stderr") == "Warning: w\n"
    assert ["image/png" in mime for mime in results(events)] == [False, True]
