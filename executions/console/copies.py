"""One run as text to paste: curl, Python, MCP and E2B's SDK."""

from __future__ import annotations

import json
import shlex
from typing import Any

from django.conf import settings

from executions.models import Execution

FIRST = "print(sum(range(10)))"


def curl(code: str = FIRST, language: str = "python") -> str:
    body: dict[str, Any] = {"code": code}
    if language != "python":
        body["language"] = language
    return (
        f"curl -s {settings.PUBLIC_URL}/api/v1/executions \\\n"
        '  -H "Authorization: Bearer $SANDGATE_API_KEY" \\\n'
        '  -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )


def copies(execution: Execution) -> list[dict[str, str]]:
    code, language = execution.code, execution.language
    asked = {"code": code, "language": language, "timeout_seconds": execution.timeout_seconds}
    python = f"""import os
import requests

answer = requests.post(
    "{settings.PUBLIC_URL}/api/v1/executions",
    headers={{"Authorization": "Bearer " + os.environ["SANDGATE_API_KEY"]}},
    json={_literal(asked)},
    timeout={execution.timeout_seconds + 30},
)
answer.raise_for_status()
print(answer.json()["logs"]["stdout"])"""
    call = {"name": "execute_code", "arguments": asked}
    mcp = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}, indent=2, ensure_ascii=False)
    e2b = f"""# E2B_API_URL={settings.PUBLIC_URL}/e2b E2B_SANDBOX_URL={settings.PUBLIC_URL}/e2b
# E2B_API_KEY=e2b_… (a key of yours, with e2b_ instead of sg_)
from e2b_code_interpreter import Sandbox

with Sandbox.create() as sandbox:
    execution = sandbox.run_code({code!r}, language={language!r})
    print(execution.logs.stdout)"""
    return [
        {"id": "curl", "label": "curl", "language": "bash", "text": curl(code, language)},
        {"id": "python", "label": "Python", "language": "python", "text": python},
        {"id": "mcp", "label": "MCP", "language": "javascript", "text": mcp},
        {"id": "e2b", "label": "E2B SDK", "language": "python", "text": e2b},
    ]


def _literal(asked: dict[str, Any]) -> str:
    lines = "".join(f"        {name!r}: {value!r},\n" for name, value in asked.items())
    return "{\n" + lines + "    }"
