"""docs/mcp.md: every example is run against the real product, every tool and argument stands in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

from mcp import Client, StdioServerParameters

from executions.mcp.tools import TOOLS
from tests.mcp_door.test_servers import connected
from tests.product import HOME

PAGE = (HOME / "docs" / "mcp.md").read_text()
OVER_HTTP, OVER_STDIO, PROBLEM = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.S))


async def test_the_http_configuration_connects(product):
    configured = OVER_HTTP["mcpServers"]["sandgate"]
    url = configured["url"].replace("http://127.0.0.1:8000", product.url)
    token = configured["headers"]["Authorization"].replace("sg_…", product.key).removeprefix("Bearer ")

    async with connected(url, token) as client:
        assert (await client.list_tools()).tools


async def test_the_process_configuration_connects(product):
    configured = OVER_STDIO["mcpServers"]["sandgate"]
    names = {"PATH": os.environ["PATH"], "SANDGATE_DATA": str(product.data), "SANDGATE_API_KEY": product.key}
    assert configured["env"].keys() <= names.keys()
    parameters = StdioServerParameters(command=sys.executable, args=configured["args"], env=names, cwd=HOME)

    async with Client(parameters) as client:
        result = await client.call_tool("execute_code", {"code": "6 * 7", "keep_session": False})

    assert result.content[0].text.startswith("value: 42\n")


def test_the_python_example_prints_what_it_computes(product):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names = {"PATH": os.environ["PATH"], "SANDGATE_URL": product.url, "SANDGATE_API_KEY": product.key}

    done = subprocess.run([sys.executable, "-c", program], env=names, capture_output=True, text=True, timeout=60)

    assert done.stdout.startswith("value: 42\n"), done.stderr


async def test_the_error_is_the_one_that_is_shown(product):
    async with connected(product.url + "/mcp", product.key) as client:
        result = await client.call_tool("execute_code", {"code": "1", "language": "cobol"})

    assert result.structured_content | {"request_id": "req_…"} == PROBLEM


def test_every_tool_and_argument_is_in_the_table():
    rows = {cells[1].strip(" `"): cells[2] for line in PAGE.splitlines() if len(cells := line.split("|")) == 5}

    documented = {name: re.findall(r"`(\w+)`", rows.get(name, "")) for name in TOOLS}

    assert documented == {name: list(tool.arguments.model_fields) for name, tool in TOOLS.items()}
