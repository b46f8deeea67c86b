"""One account at one E2B: the SDK's own calls to its API, each sent once, and what became of them in this product's words."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib import import_module
from typing import Any

from django.conf import settings

from executions.errors import (
    BackendError,
    BackendUnavailable,
    ContextUnknown,
    FileRefused,
    SandboxLost,
    SandgateError,
    Unsupported,
)

CLOUD = "e2b.app"
ASK_SECONDS = 10  # for one call to the API; who asks, asks again
LATE_SECONDS = 0.05  # on top of twice what an answer usually takes
_heard: ContextVar[list[Any]] = ContextVar("heard")


@cache
def sdk() -> Any:
    """E2B's SDK, with room for a thousand streams to one address."""
    for name, value in {
        "E2B_MAX_CONNECTIONS": "4096",  # the SDK's own 200 would queue runs behind runs
        "E2B_MAX_KEEPALIVE_CONNECTIONS": "256",  # its own 20 would close what the next run opens again
        "E2B_CONNECTION_RETRIES": "1",  # its own 3 take two seconds before the next backend is tried
    }.items():
        os.environ.setdefault(name, value)
    import e2b_code_interpreter

    return e2b_code_interpreter


async def loaded() -> Any:
    """The SDK. Loading takes about a second, for which the event loop is not held."""
    return sdk() if "e2b_code_interpreter" in sys.modules else await asyncio.to_thread(sdk)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the API said; `parsed` is the SDK's object where it could be read."""

    status: int
    parsed: Any
    message: str
    retry_after: float

    @property
    def perhaps(self) -> bool:
        """Whether a create that was answered like this may have made something."""
        return self.parsed is None and self.status not in (400, 401, 403, 404, 429, 503)


class Account:
    """OPTIONS: API_KEY; DOMAIN, API_URL, SANDBOX_URL (empty: E2B's cloud)."""

    def __init__(self, options: dict[str, Any]) -> None:
        domain = options.get("DOMAIN") or CLOUD
        self.key: str = options.get("API_KEY") or ""
        self.settings: dict[str, Any] = {  # the SDK asks the environment for whatever is empty: nothing is
            "api_key": self.key,
            "domain": domain,
            "api_url": options.get("API_URL") or f"https://api.{domain}",
            "debug": False,
        }
        self._sandbox_url = options.get("SANDBOX_URL") or None
        self._client: Any = None
        self._addresses: Any = None
        self._seals: Any = None
        self._waiting: dict[object, float] = {}  # when each prompt question was asked, oldest first
        self._failed_at = self._heard_at = 0.0  # when the latest was asked that nobody, that somebody has answered
        self._usual_seconds = 0.1

    def config(self, **more: Any) -> Any:
        """The SDK's connection to this account's sandboxes."""
        made = sdk().ConnectionConfig(**self.settings, **more)
        made._sandbox_url = self._sandbox_url  # its argument would fall back to the environment
        return made

    def url(self, e2b_id: str, domain: str | None, port: int) -> str:
        """Where a port of this account's sandbox is."""
        self._addresses = self._addresses or self.config()
        return str(self._addresses.get_sandbox_url(e2b_id, domain, port))

    # whether anybody answers

    @contextmanager
    def asking(self, *, prompt: bool = False) -> Iterator[None]:
        """One question to this E2B, until its answer begins; what raises was not answered. `prompt`: it usually is, at once."""
        began, mine = time.monotonic(), object()
        if prompt:
            self._waiting[mine] = began
        try:
            yield
        except asyncio.CancelledError:
            raise
        except BaseException:
            self._failed_at = max(self._failed_at, began)
            raise
        else:
            self._heard_at = max(self._heard_at, began)
            if prompt:
                self._usual_seconds += (time.monotonic() - began - self._usual_seconds) / 8
        finally:
            self._waiting.pop(mine, None)

    @property
    def is_doubtful(self) -> bool:
        """Whether a question has failed, or waits for longer than they ever do, and none that was asked later was answered."""
        while (first := next(iter(self._waiting), None)) and self._waiting[first] < self._heard_at:
            del self._waiting[first]
        patience = LATE_SECONDS + 2 * self._usual_seconds
        is_late = first is not None and time.monotonic() - self._waiting[first] > patience
        return is_late or self._failed_at > self._heard_at

    async def ask(self, call: str, *args: Any, seconds: float = ASK_SECONDS, **fields: Any) -> Answer:
        """One request. BackendUnavailable where nobody answered, with `perhaps` where it may have been done all the same."""
        import httpx

        client = await self._api()
        heard: list[Any] = []
        _heard.set(heard)
        parsed = None
        try:
            with self.asking():
                try:
                    async with asyncio.timeout(seconds):
                        response = await import_module(f"e2b.api.client.api.sandboxes.{call}").asyncio_detailed(
                            *args, client=client, **fields
                        )
                    parsed = response.parsed if response.status_code < 300 else None
                except Exception:  # the SDK raises whatever an answer that it cannot read leads to
                    if not heard:
                        raise
        except TimeoutError:
            raise BackendUnavailable(f"E2B did not answer within {seconds:g} s.", perhaps=True) from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as e:
            raise BackendUnavailable(self.said(e)) from None
        except Exception as e:
            raise BackendUnavailable(self.said(e), perhaps=True) from None
        (response,) = heard
        retry_after = response.headers.get("Retry-After", "")
        return Answer(
            response.status_code,
            parsed,
            self.hidden(_message(response.content)),
            float(retry_after) if retry_after.isdecimal() else 0.0,
        )

    async def _api(self) -> Any:
        if self._client is None:
            await loaded()
            from e2b.api.client_async import get_api_client

            client = get_api_client(self.config(retries=0, request_timeout=0))  # `ask` keeps the time
            client.get_async_httpx_client().event_hooks["response"].append(_note)
            self._client = client
        return self._client

    def refused(self, answer: Answer, otherwise: type[BackendError] = BackendError) -> BackendError:
        """What a refusal means for a sandbox that is there."""
        if answer.status == 404:
            return SandboxLost(f"E2B answered 404: {answer.message}")
        wait = answer.retry_after or None
        return otherwise(f"E2B answered {answer.status}: {answer.message}", retry_after=wait)

    # errors

    @contextmanager
    def translated(self, otherwise: type[BackendError] = BackendError) -> Iterator[None]:
        """Turn what the SDK raises, which has several roots, into this product's words."""
        try:
            yield
        except SandgateError:
            raise
        except Exception as e:
            raise self._ours(e, otherwise) from None  # the original may quote what was sent

    def _ours(self, e: Exception, otherwise: type[BackendError]) -> BackendError:
        known, said = sdk(), self.said(e)
        if otherwise is BackendUnavailable:
            return BackendUnavailable(said)
        match e:
            case known.SandboxNotRunningException() | known.SandboxNotFoundException():
                return SandboxLost(said)
            case known.FileNotFoundException():
                return FileRefused(said, missing=True)
            case known.InvalidArgumentException() | known.NotEnoughSpaceException():
                return FileRefused(said)
            case known.NotFoundException():
                return ContextUnknown(said)
            case known.TimeoutException() if "was not found" in said or "was killed" in said:
                return SandboxLost(said)
            case known.SandboxException() if str(e).startswith("400 "):
                return Unsupported(said)
        return otherwise(said)

    def said(self, e: BaseException) -> str:
        return self.hidden(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")

    def hidden(self, text: str) -> str:
        """The text without this account's key."""
        return text.replace(self.key, "…") if self.key else text

    # tokens: each opens one sandbox, and rows hold them only under this installation's secret

    def _fernet(self) -> Any:
        if self._seals is None:
            from cryptography.fernet import Fernet

            secret = sha256(b"sandbox token:" + settings.SECRET_KEY.encode()).digest()
            self._seals = Fernet(urlsafe_b64encode(secret))
        return self._seals

    def sealed(self, token: str) -> str:
        return self._fernet().encrypt(token.encode()).decode() if token else ""

    def opened(self, sealed: str) -> str | None:
        """The token; None where it was sealed under another secret."""
        from cryptography.fernet import InvalidToken

        try:
            return self._fernet().decrypt(sealed.encode()).decode() if sealed else ""
        except InvalidToken:
            return None


async def _note(response: Any) -> None:
    """Keep the answer beside what the SDK makes of it: its headers, and its text where there is no sense in it."""
    await response.aread()
    if (heard := _heard.get(None)) is not None:
        heard[:] = [response]


def _message(content: bytes) -> str:
    text = content.decode(errors="replace")
    try:
        text = str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:300]
