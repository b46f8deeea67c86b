"""The three doors of a running product behind one verb each, so that one script can be told to all of them."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx
from websockets.asyncio.client import connect

from tests.product import Product


class Rest:
    """Programs: plain HTTP with a key."""

    name = "REST"

    def __init__(self, product: Product) -> None:
        self.http = httpx.AsyncClient(
            base_url=product.url,
            headers={"Authorization": f"Bearer {product.key}"},
            timeout=120,
            trust_env=False,
        )

    async def __aenter__(self) -> Rest:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.http.aclose()

    async def open(self, route: str) -> str:
        """A session on this backend."""
        answer = await self.http.post("/api/v1/sessions", json={"route": [route], "timeout_seconds": 600})
        assert answer.status_code == 201, answer.text
        assert answer.json()["backend"] == route
        return answer.json()["id"]

    async def put(self, session: str, path: str, data: bytes) -> None:
        answer = await self.http.put(f"/api/v1/sessions/{session}/files", params={"path": path}, content=data)
        assert answer.status_code == 201, answer.text

    async def install(self, session: str, package: str) -> None:
        answer = await self.http.post(f"/api/v1/sessions/{session}/packages", json={"packages": [package]})
        assert answer.status_code == 200, answer.text

    async def run(self, session: str, code: str, timeout_seconds: int = 60) -> dict[str, Any]:
        body = {"code": code, "session_id": session, "timeout_seconds": timeout_seconds}
        answer = await self.http.post("/api/v1/executions", json=body)
        assert answer.status_code == 201, answer.text
        return answer.json()

    async def record(self, execution_id: str) -> dict[str, Any]:
        return (await self.http.get(f"/api/v1/executions/{execution_id}")).json()

    async def end(self, session: str) -> None:
        assert (await self.http.delete(f"/api/v1/sessions/{session}")).status_code == 204


class Mcp:
    """Agents: the official client over streamable HTTP."""

    name = "MCP"

    def __init__(self, product: Product) -> None:
        self.product = product

    async def __aenter__(self) -> Mcp:
        from contextlib import AsyncExitStack

        import httpx2
        from mcp import ClientSession
        from mcp.client.streamable_http import streamable_http_client

        self.stack = AsyncExitStack()
        client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self.product.key}"}, timeout=120, trust_env=False
        )
        await self.stack.enter_async_context(client)
        streams = await self.stack.enter_async_context(
            streamable_http_client(f"{self.product.url}/mcp", http_client=client)
        )
        self.session = await self.stack.enter_async_context(ClientSession(streams[0], streams[1]))
        await self.session.initialize()
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.stack.aclose()

    async def call(self, tool: str, **arguments: Any) -> Any:
        return await self.session.call_tool(tool, arguments)

    async def put(self, session: str, path: str, data: bytes) -> None:
        text = data.decode()
        answer = await self.call("write_file", session_id=session, path=path, content=text)
        assert not answer.is_error, answer

    async def install(self, session: str, package: str) -> None:
        answer = await self.call("install_package", packages=[package], session_id=session)
        assert not answer.is_error, answer

    async def run(self, session: str, code: str, timeout_seconds: int = 60) -> dict[str, Any]:
        answer = await self.call("execute_code", code=code, session_id=session, timeout_seconds=timeout_seconds)
        return answer.structured_content


class Websocket:
    """People: the console's socket, after signing in by the one-time link."""

    name = "websocket"

    def __init__(self, product: Product, sign_in_url: str) -> None:
        self.product, self.sign_in_url = product, sign_in_url
        self.number = 0

    async def __aenter__(self) -> Websocket:
        self.http = httpx.AsyncClient(base_url=self.product.url, timeout=60, trust_env=False, follow_redirects=True)
        page = await self.http.get(self.sign_in_url)
        if "csrfmiddlewaretoken" in page.text and "sessionid" not in self.http.cookies:
            token = page.text.split('name="csrfmiddlewaretoken" value="')[1].split('"')[0]
            await self.http.post(
                self.sign_in_url, data={"csrfmiddlewaretoken": token}, headers={"Referer": self.product.url}
            )
        assert "sessionid" in self.http.cookies
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.http.aclose()

    async def run(self, session: str, code: str, timeout_seconds: int = 60) -> dict[str, Any]:
        self.number += 1
        asked = {"type": "execute_request", "client_id": f"c{self.number}-{session}", "code": code}
        shape: dict[str, Any] = {"results": [], "mains": [], "logs": {"stdout": "", "stderr": ""}, "error": None}
        cookies = "; ".join(f"{k}={v}" for k, v in self.http.cookies.items())
        url = self.product.url.replace("http://", "ws://") + f"/ws/sessions/{session}"
        headers = {"Cookie": cookies}
        async with (
            asyncio.timeout(timeout_seconds + 30),
            connect(url, origin=self.product.url, additional_headers=headers, max_size=None, proxy=None) as socket,
        ):
            await socket.send(json.dumps({"type": "subscribe", "after_seq": 0}))
            await socket.send(json.dumps({**asked, "timeout_seconds": timeout_seconds}))
            mine = None
            async for raw in socket:
                said = json.loads(raw)
                if said["type"] == "notice":
                    raise AssertionError(said)
                if said["type"] == "execution" and said["client_id"] == asked["client_id"]:
                    mine = shape["id"] = said["execution_id"]
                if mine is None or said.get("execution_id") != mine:
                    continue
                match said["type"]:
                    case "state" if said["state"] not in ("queued", "starting", "running"):
                        return shape | {"state": said["state"]}
                    case "stdout" | "stderr" as stream:
                        shape["logs"][stream] += said["text"]
                    case "result":
                        shape["results"].append(said["mime"])
                        shape["mains"].append(said["main"])
                    case "error":
                        shape["error"] = {k: said[k] for k in ("name", "value", "traceback")}
                if said["seq"]:
                    await socket.send(json.dumps({"type": "ack", "seq": said["seq"], "execution_id": mine}))
        raise AssertionError("the socket closed before the run had ended")


def png_size(bundle: dict[str, Any]) -> tuple[int, int]:
    """Pixels of a PNG, read from its header."""
    data = base64.b64decode(bundle["image/png"])
    assert data.startswith(b"\x89PNG")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
