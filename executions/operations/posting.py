"""One signed message to an address outside: resolved once, checked, and sent to what was checked; no redirect is followed."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import socket
import ssl
from functools import cache
from urllib.parse import SplitResult, urlsplit

from django.conf import settings

from executions import network

CONNECT_SECONDS = 5
WHOLE_SECONDS = 15
READ_BYTES = 300  # of an answer; what is beyond is never read
SECRET = "whsec_"


class NotSent(Exception):
    """It may not go there, or nobody took it; with one sentence, and the HTTP status where there was an answer."""

    def __init__(self, said: str, status: int | None = None) -> None:
        super().__init__(said)
        self.status = status


def checked(url: str) -> SplitResult:
    """An address that a message may be sent to, as far as it can be seen without asking for its name. Raises ValueError."""
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise ValueError("it has characters that belong into no address.")
    parts = urlsplit(url)
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ValueError("that is no https:// address.")
    if "@" in parts.netloc or parts.fragment:
        raise ValueError("a user name or a fragment cannot be part of it.")
    if parts.port == 0:
        raise ValueError("0 is no port.")
    host = network.target(parts.hostname)
    if not isinstance(host, str):
        _permitted(parts.scheme, str(host))
    return parts


def _permitted(scheme: str, address: str) -> None:
    """Public addresses over https, and any over either in the networks that the operator names. Raises ValueError."""
    plain = ipaddress.ip_address(address)
    plain = getattr(plain, "ipv4_mapped", None) or plain
    if network.lies_in(str(plain), settings.WEBHOOK_NETWORKS):
        return
    if not network.is_public(plain):
        raise ValueError(f"{address} is not public; an operator can allow it with SANDGATE_WEBHOOK_NETWORKS.")
    if scheme != "https":
        raise ValueError("over the public internet it must be https.")


async def _resolved(parts: SplitResult) -> str:
    """One address of the host that a message may go to. Raises NotSent."""
    host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise NotSent(f"{host} has no address.") from None
    refused = f"{host} has no address."
    for *_, place in found:
        address = str(place[0])
        try:
            _permitted(parts.scheme, address)
            return address
        except ValueError as problem:
            refused = f"{host}: {problem}"
    raise NotSent(refused)


def signature(secret: str, message_id: str, timestamp: str, body: bytes) -> str:
    """As the Standard Webhooks say: HMAC-SHA256 over id.timestamp.body."""
    key = base64.b64decode(secret.removeprefix(SECRET))
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


@cache
def _trust() -> ssl.SSLContext:
    return ssl.create_default_context()


async def post(url: str, headers: dict[str, str], body: bytes) -> int:
    """The status of the answer, which is one of 2xx. Raises NotSent for everything else."""
    import httpx  # not before there is something to send

    try:
        parts = checked(url)
    except ValueError as problem:
        raise NotSent(str(problem)) from None
    try:
        async with asyncio.timeout(WHOLE_SECONDS):
            there = httpx.URL(url)
            headers = headers | {
                "Host": there.netloc.decode(),
                "Content-Type": "application/json",
                "User-Agent": "Sandgate",
            }
            to = there.copy_with(host=await _resolved(parts))
            transport = httpx.AsyncHTTPTransport(verify=_trust(), trust_env=False)
            async with httpx.AsyncClient(transport=transport, trust_env=False, timeout=CONNECT_SECONDS) as client:
                sni = {"sni_hostname": str(parts.hostname)}
                async with client.stream("POST", to, headers=headers, content=body, extensions=sni) as answer:
                    if answer.is_success:
                        return answer.status_code
                    said = await _beginning(answer)
                    raise NotSent(f"Answered {answer.status_code} {said}".strip(), answer.status_code)
    except TimeoutError:
        raise NotSent(f"No answer within {WHOLE_SECONDS} s.") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as problem:
        raise NotSent(f"{type(problem).__name__}: {problem}") from None


async def _beginning(answer) -> str:
    """As much of a refusal as is worth keeping; bytes as they come, so that nothing unfolds."""
    read = b""
    async for piece in answer.aiter_raw(READ_BYTES):
        read += piece
        if len(read) >= READ_BYTES:
            break
    return " ".join("".join(c if c.isprintable() else " " for c in read[:READ_BYTES].decode(errors="replace")).split())
