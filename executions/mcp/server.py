"""The SDK's side: a server that lists and calls tools for whoever asks, over HTTP or standard input and output."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import structlog
from django.conf import settings
from mcp.server.lowlevel.server import Server
from mcp.server.stdio import stdio_server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    BlobResourceContents,
    CallToolRequestParams,
    CallToolResult,
    ImageContent,
    ListResourcesResult,
    ListResourceTemplatesResult,
    ListToolsResult,
    PaginatedRequestParams,
    ReadResourceRequestParams,
    ReadResourceResult,
    Resource,
    ResourceLink,
    ResourceTemplate,
    TextContent,
    TextResourceContents,
    Tool,
    ToolAnnotations,
)

from executions import demand, operations, traces
from executions.errors import SandgateError, ours
from executions.hop import rows
from executions.keys import Caller
from executions.mcp import answers, resources, tools
from executions.mcp.call import Call

log = structlog.get_logger(__name__)
INSTRUCTIONS = (
    "Run code in isolated sandboxes. execute_code returns a session_id: pass it again to keep variables and files. "
    "Errors begin with a code and say what to do; get_environment tells languages, limits and the budget that is left."
)
# The low-level Server, and not MCPServer: lists differ per caller, arguments are parsed as at every other door,
# and MCPServer would configure the root logger.
_going_on: set[asyncio.Task[Any]] = set()  # the loop alone would let go of calls whose caller went away


def build(caller_of: Callable[[Any], Any], *, cancels: bool) -> Server:
    """`caller_of(context)` is the Caller of one request, or awaits to it; `cancels`: a cancelled call ends its run."""

    async def caller_in(context: Any) -> Caller:
        found = caller_of(context)
        return await found if asyncio.iscoroutine(found) else found

    async def list_tools(context: Any, params: PaginatedRequestParams | None) -> ListToolsResult:
        caller = await caller_in(context)
        assert caller.agent is not None
        offer = await rows(operations.offer, caller)
        await rows(demand.wish, caller.agent)  # who lists tools is about to call one
        said = tools.words(offer)
        return ListToolsResult(
            tools=[
                Tool(
                    name=name,
                    title=tool.title,
                    description=tool.description.format_map(said),
                    input_schema=tools.input_schema(name, tool, caller.agent, offer),
                    output_schema=tools.output_schema(tool),
                    annotations=ToolAnnotations(
                        title=tool.title,
                        read_only_hint=tool.reads_only,
                        destructive_hint=tool.destroys,
                        open_world_hint=False,
                    ),
                )
                for name, tool in tools.seen_by(caller.agent).items()
            ]
        )

    async def call_tool(context: Any, params: CallToolRequestParams) -> CallToolResult:
        async def work() -> CallToolResult:
            try:
                caller = traced(await caller_in(context), context)
                call = Call(caller, report=reporter(context), cancels=cancels)
                return as_result(await tools.answer(call, params.name, params.arguments or {}))
            except SandgateError as e:  # the key of a stdio server was revoked
                return as_result(answers.refusal(e, ""))
            except Exception as e:
                log.exception("tool_failed", tool=params.name)
                return as_result(answers.refusal(ours(e), ""))

        task = asyncio.create_task(work())  # a task of its own: a caller that goes away ends nothing
        _going_on.add(task)
        task.add_done_callback(_going_on.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if cancels:
                task.cancel()
            raise

    async def list_resources(context: Any, params: PaginatedRequestParams | None) -> ListResourcesResult:
        with as_protocol_error():
            caller = await caller_in(context)
            found, after = await rows(resources.listed, caller, params.cursor if params else None)
        return ListResourcesResult(resources=[as_link(link, Resource) for link in found], next_cursor=after)

    async def list_templates(context: Any, params: PaginatedRequestParams | None) -> ListResourceTemplatesResult:
        return ListResourceTemplatesResult(
            resource_templates=[
                ResourceTemplate(uri_template=uri, name=name, description=says, mime_type=mime)
                for uri, (name, says, mime) in resources.TEMPLATES.items()
            ]
        )

    async def read_resource(context: Any, params: ReadResourceRequestParams) -> ReadResourceResult:
        with as_protocol_error():
            found = await resources.read(await caller_in(context), params.uri)
        if found.text is not None:
            content: Any = TextResourceContents(uri=params.uri, mime_type=found.mime, text=found.text)
        else:
            content = BlobResourceContents(uri=params.uri, mime_type=found.mime, blob=found.base64)
        return ReadResourceResult(contents=[content])

    return Server(
        "sandgate",
        title="Sandgate",
        version="0.1.0",
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
        on_list_resources=list_resources,
        on_list_resource_templates=list_templates,
        on_read_resource=read_resource,
        get_tool_input_schema=lambda name: None,  # no argument is mirrored in a header
    )


def traced(caller: Caller, context: Any) -> Caller:
    """In the trace that the call names in its `_meta`, which is nearer than the request's own; one that is none is passed over."""
    parent = (context.meta or {}).get("traceparent")
    trace_id = traces.trace_of(parent) if isinstance(parent, str) else ""
    return replace(caller, trace_id=trace_id) if trace_id else caller


def reporter(context: Any) -> Callable[[float, str], Any] | None:
    """Tells the client about progress, where it asked for it; a client that is gone is no failure."""
    if (context.meta or {}).get("progress_token") is None:
        return None

    async def report(seconds: float, message: str) -> None:
        with contextlib.suppress(Exception):
            await context.session.report_progress(round(seconds, 1), None, message)

    return report


def as_result(answer: answers.Answer) -> CallToolResult:
    images = [ImageContent(data=data, mime_type=kind) for kind, data in answer.images]
    links = [as_link(link, ResourceLink) for link in answer.links]
    return CallToolResult(
        content=[TextContent(text=answer.text), *images, *links],
        structured_content=answer.structured,
        is_error=answer.is_error,
    )


def as_link(link: resources.Link, kind: Any) -> Any:
    return kind(
        uri=link.uri, name=link.name, description=link.description or None, mime_type=link.mime, size=link.size_bytes
    )


@contextlib.contextmanager
def as_protocol_error() -> Iterator[None]:
    """Resources have no error results: what is refused is a JSON-RPC error whose data is the problem that REST would send."""
    try:
        yield
    except SandgateError as e:
        raise MCPError(INVALID_PARAMS if e.theirs else INTERNAL_ERROR, e.sentence(), e.problem()) from None


@contextlib.asynccontextmanager
async def over_http(*, caller_of: Callable[[Any], Any]) -> AsyncIterator[Any]:
    """The ASGI app, while its task groups live. Stateless: any process answers any request."""
    server, most = build(caller_of, cancels=False), settings.DATA_UPLOAD_MAX_MEMORY_SIZE
    looked = TransportSecuritySettings(enable_dns_rebinding_protection=False)  # by the door
    streaming, plain = (
        StreamableHTTPSessionManager(
            server, stateless=True, json_response=json, security_settings=looked, max_request_body_size=most
        )
        for json in (False, True)
    )

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        """An event stream, with its tasks and buffers, is made for those alone who want to hear of progress."""
        body, more = bytearray(), True
        while more and len(body) <= most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        begun = [{"type": "http.request", "body": bytes(body), "more_body": more}]

        async def again() -> Any:
            return begun.pop() if begun else await receive()

        await (streaming if b"progressToken" in body else plain).handle_request(scope, again, send)

    async with streaming.run(), plain.run():
        yield handle


async def over_stdio(*, caller_of: Callable[[Any], Any]) -> None:
    """Serve one client on standard input and output until it closes them."""
    server = build(caller_of, cancels=True)
    async with stdio_server() as (incoming, outgoing):
        await server.run(incoming, outgoing, server.create_initialization_options())
