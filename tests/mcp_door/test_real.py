"""The real product with its local runtime: data, plots, packages and files as an agent gets them."""

from __future__ import annotations

import base64

import pytest

from tests.mcp_door.conftest import text
from tests.mcp_door.test_servers import connected

DATA = """
import pandas as pd, matplotlib.pyplot as plt
frame = pd.DataFrame({"country": ["Chad", "Peru"], "people": [18, 34]})
plt.bar(frame["country"], frame["people"])
plt.show()
frame
"""


@pytest.fixture
def mcp(product):
    return lambda: connected(product.url + "/mcp", product.key)


async def test_a_plot_is_an_image_and_a_table_is_data_the_same_as_over_rest(product, mcp):
    async with mcp() as client:
        result = await client.call_tool("execute_code", {"code": DATA, "keep_session": False})

    assert not result.is_error, text(result)
    images = [part for part in result.content if part.type == "image"]
    assert [image.mime_type for image in images] == ["image/png"]
    assert base64.b64decode(images[0].data).startswith(b"\x89PNG")
    with product.http() as http:
        over_rest = http.get(f"/api/v1/executions/{result.structured_content['id']}").json()
    assert result.structured_content == over_rest
    table = over_rest["results"][-1]
    assert table["text/html"].count("<tr") == 3
    assert table["e2b/data"] == {"country": ["Chad", "Peru"], "people": [18, 34]}
    assert "Chad" in text(result)


async def test_variables_are_kept_and_a_missing_package_is_installed_as_the_hint_says(mcp):
    async with mcp() as client:
        first = await client.call_tool("execute_code", {"code": "x = 20\nimport emoji"})
        session = {"session_id": first.structured_content["session_id"]}
        installed = await client.call_tool("install_package", {"packages": ["emoji"], **session})
        second = await client.call_tool(
            "execute_code", {"code": "import emoji\nx + len(emoji.emojize(':snake:'))", **session}
        )
        around = await client.call_tool("get_environment", session)
        await client.call_tool("end_session", session)

    assert first.is_error
    assert "ModuleNotFoundError: No module named 'emoji'" in text(first)
    assert "install_package can add emoji" in text(first)
    assert installed.structured_content["packages"][0]["name"] == "emoji", text(installed)
    assert "value: 21" in text(second)
    assert [package["name"] for package in around.structured_content["installed"]] == ["emoji"]


async def test_files_go_in_come_out_and_are_run(mcp):
    async with mcp() as client:
        files = {"in.csv": "a,b\n1,2\n", "raw.bin": {"base64": base64.b64encode(b"\x00\xff").decode()}}
        first = await client.call_tool(
            "execute_code", {"code": "open('in.csv').read() + str(len(open('raw.bin', 'rb').read()))", "files": files}
        )
        session = {"session_id": first.structured_content["session_id"]}
        written = await client.call_tool(
            "write_file", {"path": "job.py", "content": "import sys\nprint('é' * int(sys.argv[1]))", **session}
        )
        ran = await client.call_tool("run_script", {"path": "job.py", "args": ["5"], **session})
        part = await client.call_tool("read_file", {"path": "job.py", "offset_bytes": 11, "max_bytes": 8, **session})
        half = await client.call_tool("read_file", {"path": "job.py", "offset_bytes": 18, "max_bytes": 1, **session})
        binary = await client.call_tool("read_file", {"path": "raw.bin", **session})
        await client.call_tool(
            "execute_code", {"code": "import matplotlib.pyplot as p; p.plot([1]); p.savefig('plot.png')", **session}
        )
        image = await client.call_tool("read_file", {"path": "plot.png", **session})
        listed = await client.call_tool("list_files", session)
        missing = await client.call_tool("read_file", {"path": "nowhere", **session})
        await client.call_tool("end_session", session)

    assert "a,b\\n1,2\\n2" in text(first), text(first)
    assert written.structured_content == {"path": "job.py", "size_bytes": 41}
    assert ran.structured_content["logs"]["stdout"] == "ééééé\n"
    assert (part.structured_content["content"], part.structured_content["next_offset_bytes"]) == ("print('", 18)
    assert (half.structured_content["encoding"], half.structured_content["next_offset_bytes"]) == ("base64", 19)
    assert binary.structured_content["encoding"] == "base64"
    assert [p.type for p in image.content] == ["text", "image"]
    assert {"in.csv", "raw.bin", "job.py", "plot.png"} <= {f["name"] for f in listed.structured_content["files"]}
    assert missing.structured_content["code"] == "file_not_found"


async def test_numbers_that_json_does_not_have_still_arrive(mcp):
    async with mcp() as client:
        code = "import pandas as pd; pd.DataFrame({'a': [1.0, float('nan'), float('inf')]})"
        result = await client.call_tool("execute_code", {"code": code, "keep_session": False})

    assert not result.is_error
    assert "NaN" in text(result)
