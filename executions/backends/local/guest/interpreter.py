"""Port 49999: E2B's code interpreter. Cells stream as lines of JSON; a client that leaves interrupts its cell."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import wire

from . import places
from .contexts import Context
from .http import Refused, Request
from .languages import ALIASES, LANGUAGES, absent

KEEPALIVE_SECONDS = 5
CONTEXTS_LIMIT = 32


def default_context(agent: Any, language: str) -> Context:
    """The context of a language when none is named; made at first use, its id stays."""
    language = _home(language)
    if language not in agent.defaults:
        agent.defaults[language] = _add(agent, language, places.home).id
    return agent.contexts[agent.defaults[language]]


def _add(agent: Any, language: str, cwd: str) -> Context:
    if language not in LANGUAGES:
        raise Refused(400, f"Unknown language {language!r}; there are {', '.join(LANGUAGES)}")
    if language in absent:
        raise Refused(400, absent[language])
    if len(agent.contexts) >= CONTEXTS_LIMIT:
        raise Refused(429, f"A sandbox has at most {CONTEXTS_LIMIT} contexts")
    context = Context(agent, secrets.token_hex(16), language, cwd)
    agent.contexts[context.id] = context
    return context


def _home(language: str) -> str:
    """The language whose default context it uses."""
    return LANGUAGES[language].like or language if language in LANGUAGES else language


def _language(value: Any) -> str:
    language = str(value or "python").lower()
    return ALIASES.get(language, language)


def handler(agent: Any) -> Callable[[Request], Awaitable[None]]:
    async def handle(request: Request) -> None:
        match (request.method, *request.path.strip("/").split("/")):
            case ("GET", "health"):
                await request.answer(200, '"OK"')
            case ("POST", "execute"):
                await _execute(agent, request)
            case ("GET", "contexts"):
                await request.answer(200, [context.described() for context in agent.contexts.values()])
            case ("POST", "contexts"):
                await _create(agent, request)
            case ("POST", "contexts", identifier, "restart"):
                context = _known(agent, identifier)
                await _end(context)
                await request.answer(200)
            case ("POST", "contexts", identifier, "interrupt"):  # not E2B's: answers when nothing of it runs any more
                context, run = _default_or_known(agent, identifier), (await request.json()).get("run", "")
                if not run or run == context.run:
                    await context.interrupt()
                await request.answer(200, {"lost": run in context.lost})
            case ("DELETE", "contexts", identifier):
                context = _known(agent, identifier)
                await _end(context)
                del agent.contexts[identifier]
                agent.defaults = {language: other for language, other in agent.defaults.items() if other != identifier}
                await request.answer(200)
            case _:
                raise Refused(404, "Not found")

    return handle


def _known(agent: Any, identifier: str) -> Context:
    if identifier not in agent.contexts:
        raise Refused(404, f"Context {identifier} not found")
    return agent.contexts[identifier]


def _default_or_known(agent: Any, identifier: str) -> Context:
    """`identifier` may also be a language: its default context."""
    return _known(agent, agent.defaults.get(_home(_language(identifier)), identifier))


async def _create(agent: Any, request: Request) -> None:
    body = await request.json()
    cwd = body.get("cwd") or places.home
    if not isinstance(cwd, str) or not os.path.isdir(cwd := places.found(cwd)):
        raise Refused(400, f"cwd {cwd!r} does not exist")
    context = _add(agent, _language(body.get("language")), cwd)
    try:
        context.start()
    except OSError as problem:
        del agent.contexts[context.id]
        raise Refused(500, f"The context could not be started: {problem}") from None
    await request.answer(200, context.described())


async def _end(context: Context) -> None:
    context.end()
    await context.ended.wait()


def _strings(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refused(422, "env_vars is not an object")
    return {str(name): str(content) for name, content in value.items() if content is not None}


async def _execute(agent: Any, request: Request) -> None:
    body = await request.json()
    code, identifier = body.get("code"), body.get("context_id")
    if not isinstance(code, str):
        raise Refused(422, "code is not a string")
    env = _strings(body.get("env_vars"))
    if identifier and body.get("language"):
        raise Refused(400, "Only one of context_id or language can be provided")
    language = _language(body.get("language"))
    context = _known(agent, str(identifier)) if identifier else default_context(agent, language)
    cell = (code, env, context.language if identifier else language, str(body.get("run") or ""))
    gone = asyncio.create_task(request.gone())
    try:
        await _stream(context, cell, request, gone)
    finally:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)


async def _stream(context: Context, cell: tuple, request: Request, gone: asyncio.Task) -> None:
    request.begin(200, "application/x-ndjson")
    if not await _acquired(context.lock, request, gone):
        return
    try:
        try:
            await context.begin(*cell)
        except OSError as problem:
            await request.send(_line(type="error", name="ContextFailed", value=str(problem), traceback=""))
            await request.end()
            return
        ended = False
        while not ended:
            if not context.arrived.is_set():
                await _arrival(context, request, gone)
            if gone.done():
                return
            events = context.take()
            ended = bool(events) and events[-1]["type"] in ("end", "died")
            await request.send(b"".join(_translated(event) for event in events))
        await request.end()
    finally:
        if context.idle.is_set():
            context.agent.running.discard(context.id)
            context.lock.release()
        else:
            context.stopping = asyncio.create_task(_stop(context))


async def _stop(context: Context) -> None:
    try:
        await context.interrupt()
    finally:
        context.agent.running.discard(context.id)
        context.lock.release()


async def _arrival(context: Context, request: Request, gone: asyncio.Task) -> None:
    """Wait for events or for the client's leaving, with a sign of life every few seconds."""
    arrived = asyncio.ensure_future(context.arrived.wait())
    try:
        while True:
            done, _ = await asyncio.wait(
                {arrived, gone}, timeout=KEEPALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if done:
                return
            await request.send(_line(type="keepalive"))
    finally:
        arrived.cancel()


async def _acquired(lock: asyncio.Lock, request: Request, gone: asyncio.Task) -> bool:
    """Wait for the context's turn; False when the client left before."""
    if not lock.locked():
        return await lock.acquire()  # at once
    acquiring = asyncio.ensure_future(lock.acquire())
    while True:
        if acquiring.done() and not gone.done():
            return True
        await asyncio.wait({acquiring, gone}, timeout=KEEPALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            if acquiring.done():
                lock.release()
            acquiring.cancel()
            return False
        if not acquiring.done():
            await request.send(_line(type="keepalive"))


def _line(**event: Any) -> bytes:
    return json.dumps(event).encode() + b"\n"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _translated(event: dict[str, Any]) -> bytes:
    """E2B's line for an event of a context; nothing for one that is malformed."""
    match event["type"]:
        case "stdout" | "stderr" as kind:
            now = datetime.now(UTC).isoformat()
            return _line(type=kind, text=_text(event.get("text")), timestamp=now)
        case "result" if isinstance(event.get("mime"), dict):
            return _line(
                type="result", is_main_result=event.get("main") is True, **_reserved(wire.to_e2b(event["mime"]))
            )
        case "error":
            return _line(type="error", **{name: _text(event.get(name)) for name in ("name", "value", "traceback")})
        case "count" if isinstance(event.get("execution_count"), int):
            return _line(type="number_of_executions", execution_count=event["execution_count"])
        case "died":
            said = "Context was restarted; its variables are lost."
            restarted = _line(type="error", name="ContextRestarting", value=said, traceback="", status=event["status"])
            return restarted + _line(type="end_of_execution")
        case "end":
            return _line(type="end_of_execution")
    return b""


def _reserved(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in ("type", "is_main_result")}
