"""What the scripted models do, whatever the framework: keep a session, stumble, read the error, mend it, end the session."""

from __future__ import annotations

import re


def next_step(told: list[str]) -> tuple[str, dict[str, str]] | str:
    """The next tool and its arguments, or the answer, by what the tools have told so far; nothing is known but that."""
    if not told:
        return "execute_code", {"code": "x = 6"}
    session = re.findall(r"session_id\W+(\w+)", told[0])[0]
    here = {"session_id": session}
    if len(told) == 1:
        return "execute_code", {"code": "x * y", **here}
    name = re.findall(r"name '(\w)' is not defined", told[1])[0]
    if len(told) == 2:
        return "execute_code", {"code": f"{name} = 7; x * {name}", **here}
    value = re.findall(r"(?:value: |text/plain\W+)(\d+)", told[2])[0]
    return ("end_session", here) if len(told) == 3 else f"{value} in {session}"
