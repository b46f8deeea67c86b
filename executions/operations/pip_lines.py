"""`%pip install` in a cell goes the way of every installation: decided, fetched outside, put in place before the cell runs."""

from __future__ import annotations

import asyncio
import re
import shlex

from executions import backends, packages
from executions.errors import SandgateError
from executions.models import Execution
from executions.operations.install import install_into
from executions.operations.submit import caller_of

LINE = re.compile(r"^[%!]\s*(?:(?:uv|python3?\s+-m)\s+)?pip3?\s+install\b(.*)$")
HARMLESS = {"-q", "--quiet", "-U", "--upgrade", "--user", "--no-input", "--disable-pip-version-check"}
MOST_LINES = 20
QUOTES = ('"""', "'''")


async def heeded(execution: Execution) -> str:
    """The code to run: its lines that install are carried out now, and say in their place what became of that.

    Only lines that begin at the margin count, outside of longer texts: nothing else is sure to be run.
    """
    code = execution.code
    sandbox = execution.sandbox
    if "pip" not in code or execution.language != "python" or sandbox is None:
        return code
    if not backends.get(sandbox.backend).capabilities.packages:
        return code
    lines, open_quote, carried_out = code.split("\n"), "", 0
    until = asyncio.get_running_loop().time() + execution.timeout_seconds  # of all lines together
    for number, line in enumerate(lines):
        if not open_quote and (found := LINE.match(line)):
            carried_out += 1
            if carried_out > MOST_LINES:
                text, ok = f"Not installed: at most {MOST_LINES} such lines of a cell are carried out.", False
            else:
                text, ok = await _carried_out(execution, found[1], until)
            where = "" if ok else ", file=__import__('sys').stderr"
            lines[number] = f"print({text!r}{where})"
            continue
        open_quote = _open_after(line, open_quote)
    return "\n".join(lines)


def _open_after(line: str, quote: str) -> str:
    """The long quote that is open at the end of this line, where `quote` was open before."""
    at = 0
    while True:
        found = [(line.find(q, at), q) for q in ((quote,) if quote else QUOTES)]
        found = [one for one in found if one[0] >= 0]
        if not found:
            return quote
        at, q = min(found)
        at += len(q)
        quote = "" if quote else q


async def _carried_out(execution: Execution, arguments: str, until: float) -> tuple[str, bool]:
    """One sentence, and whether all is there now."""
    try:
        words = [word for word in shlex.split(arguments, comments=True) if word not in HARMLESS]
        asked = packages.requirements_of(words)
        if not asked:
            return "Nothing to install: name the packages.", False
        assert execution.sandbox is not None
        async with asyncio.timeout_at(until):
            done = await install_into(caller_of(execution), execution.sandbox, asked, execution)
    except ValueError:
        return "That line cannot be read.", False
    except TimeoutError:
        return "The packages were not fetched in time; run the line again.", False
    except SandgateError as e:
        return e.sentence(), False
    return f"Importable now: {', '.join(str(p) for p in done.packages if p.requested)}", True
