"""What an agent gets from each tool."""

from __future__ import annotations

import pytest

from executions import operations
from executions.mcp.tools import TOOLS
from executions.models import Execution, Sandbox
from tests.mcp_door.conftest import connected, text

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_code_runs_and_says_what_it_printed_and_what_it_is_worth(key, mode):
    async with connected(key, mode=mode) as mcp:
        result = await mcp.call_tool("execute_code", {"code": "#> hello\n#!> careful\n#= 42"})

    shape = result.structured_content
    assert not result.is_error
    assert shape["state"] == "succeeded"
    assert shape["logs"] == {"stdout": "hello\n", "stderr": "careful\n"}
    assert shape["results"] == [{"text/plain": "42"}]
    assert text(result).startswith("hello\nstderr:\ncareful\nvalue: 42\n")
    assert shape["id"] in text(result)
    assert shape["session_id"] in text(result)
