"""The last screen of a start: at the first one it is the whole tutorial."""

from __future__ import annotations

from typing import Any

from django.conf import settings

from executions.backends.base import Check
from executions.operations import FirstStart


def first(start: FirstStart, local: str) -> str:
    """Everything a newcomer types next. Shown once: it holds the one key and the one link."""
    url, key = settings.PUBLIC_URL, start.token
    return f"""
Sandgate is running on {url}

Sign in, as its first operator (the link works once):
  {url}{start.sign_in_path}

For a program (this key is shown once):
export SANDGATE_URL={url}
export SANDGATE_API_KEY={key}

Run code:
curl -s $SANDGATE_URL/api/v1/executions -H "Authorization: Bearer $SANDGATE_API_KEY" \\
  -H "Content-Type: application/json" -d '{{"code": "1+1"}}'

An MCP client:
{{"mcpServers": {{"sandgate": {{"type": "http", "url": "{url}/mcp", "headers": {{"Authorization": "Bearer {key}"}}}}}}}}

E2B's SDKs, unchanged:
export E2B_API_URL={url}/e2b
export E2B_SANDBOX_URL={url}/e2b
export E2B_API_KEY=e2b_{key.removeprefix("sg_")}

{local}
{e2b()}
Ctrl-C ends it; make run starts it again."""


def again(local: str) -> str:
    """A later start: where things are, without any secret."""
    url = settings.PUBLIC_URL
    return f"""
Sandgate is running on {url}   (console; operators: /admin/, programs: /api/docs, agents: /mcp)
Cannot sign in? python manage.py sign_in_link
{local}
{e2b()}
Ctrl-C ends it."""


def e2b() -> str:
    if settings.E2B_API_KEY:
        return "E2B: the key is set; code runs there first, on the local runtime when E2B cannot."
    return "E2B: no key, so code runs on the local runtime. With E2B: export E2B_API_KEY=e2b_… and start again."


def walls(check: Check, refusal: str = "") -> str:
    """The local runtime's walls on this machine; what is missing, with what to type."""
    if refusal:
        lower = f"SANDGATE_ISOLATION_FLOOR={check.isolation} make run"
        return (
            f"Local runtime: makes no sandboxes, as {refusal.partition(';')[0]}.\n"
            "  → python manage.py doctor   (what to type for the full walls)\n"
            f"  → {lower}   (with weaker ones: docs/local-runtime.md says what they do not stop)"
        )
    if not check.ok:
        return f"Local runtime: not ready. {check.detail}\n  → python manage.py doctor"
    standing = [name for name, state in check.walls.items() if state is True]
    named = "REDUCED ISOLATION, for code that you trust" if check.isolation == "reduced" else check.isolation
    lines = [f"Local runtime: {named}. Walls that stand: {', '.join(standing) or 'none'}."]
    lines += [f"  missing: {name}: {sentence(state)}" for name, state in check.walls.items() if state is not True]
    return "\n".join(lines)


def sentence(state: Any) -> str:
    return str(state) if state else "not on this machine"
