"""Of the seven checks of the agents' doors: those that need the whole product."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.e2e.doors import Mcp, Rest, Websocket
from tests.mcp_door.test_servers import connected
from tests.product import Product

BOTH = """
import pandas as pd, matplotlib.pyplot as plt
frame = pd.DataFrame({"country": ["Chad", "Peru"], "people": [18, 34]})
plt.bar(frame["country"], frame["people"])
plt.show()
frame
"""


async def test_one_plot_and_one_dataframe_are_identical_over_rest_mcp_and_websocket(product: Product):
    async with Rest(product) as rest, Mcp(product) as mcp, Websocket(product, product.sign_in_url) as socket:
        told: dict[str, Any] = {}
        for door in (rest, mcp, socket):
            session = await rest.open("local")
            told[door.name] = (await door.run(session, BOTH))["results"]
            await rest.end(session)

    plot, table = told["REST"]
    assert plot["image/png"]
    assert table["e2b/data"] == {"country": ["Chad", "Peru"], "people": [18, 34]}
    assert told["MCP"] == told["REST"]
    assert told["websocket"] == told["REST"]


async def test_run_script_on_a_path_that_exists_only_on_the_server_is_file_not_found(product: Product):
    mine = product.data / "secret.py"
    mine.write_text("print('read on the host')")
    here = Path(__file__).resolve()

    async with connected(product.url + "/mcp", product.key) as mcp:
        session = (await mcp.call_tool("execute_code", {"code": "1"})).structured_content["session_id"]
        answers = await asyncio.gather(
            *(mcp.call_tool("run_script", {"path": str(path), "session_id": session}) for path in (mine, here))
        )
        await mcp.call_tool("end_session", {"session_id": session})

    for answer in answers:
        assert answer.is_error
        assert "read on the host" not in str(answer)
        assert answer.content[0].text.startswith("file_not_found: "), answer.content[0].text
