"""What goes out of sandboxes: the rules of a request, the record of connections, and what the code is told about both."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from django.db.models import Max

from executions import backends, network
from executions.backends.base import EgressRecord
from executions.errors import BackendError, Forbidden, Invalid
from executions.models import Agent, Egress, Execution, Sandbox
from executions.states import EgressVerdict

log = logging.getLogger(__name__)
ASK_SECONDS = 5
UNREACHED = {  # how programs say that they reached nobody
    "ClientConnectorDNSError", "ClientConnectorError", "ConnectError", "ConnectTimeout", "ConnectTimeoutError", "ConnectionError",
    "ConnectionRefusedError", "HTTPError", "MaxRetryError", "NameResolutionError", "NewConnectionError", "ProxyError", "URLError",
    "gaierror", "herror",
}  # fmt: skip
UNREACHED_WORDS = (
    "network is unreachable",
    "could not resolve",
    "name resolution",
    "fetch failed",
    "error sending request",
)


def allowed(agent: Agent, asked: list[str] | None) -> list[str]:
    """The rules of a new sandbox: the agent's, or fewer where that is asked for. Raises Invalid, Forbidden."""
    try:
        own = network.Rules(agent.network_allow)
    except ValueError as problem:
        raise Invalid(f"Agent {agent.name} has a network rule that is none: {problem}", field="network") from None
    if asked is None:
        return [str(rule) for rule in own.rules]
    try:
        texts = network.normalised(asked)
    except ValueError as problem:
        raise Invalid(f"network: {problem}", field="network") from None
    for text in texts:
        if not own.cover(network.parse(text)):
            said = f"allowed are: {own}" if own else "its network is off"
            raise Forbidden(
                f"network: agent {agent.name} may not reach {text}; {said}.",
                field="network",
                remedy="Ask for no more than the agent has, or have an operator allow it: Agents, in the admin.",
            )
    return texts


def words(allow: Sequence[str]) -> str:
    """The rules in a few words: "off", or what may be reached."""
    return ", ".join(allow) if allow else "off"


def hint(agent: str, allow: Sequence[str], name: str, value: str, rows: Sequence[Egress]) -> str:
    """What to do about code that reached nobody, where the network's rules may be why; empty for other errors."""
    if name not in UNREACHED and not any(said in value.lower() for said in UNREACHED_WORDS):
        return ""
    if not allow:
        return f"Network is off for agent {agent}; an operator can allow hosts."
    denied = next((row for row in reversed(rows) if row.verdict == EgressVerdict.DENIED and row.reason), None)
    return f"Network: {denied.reason.rstrip('.')}. An operator can allow more." if denied else ""


async def ask(sandbox: Sandbox, *, after: int, final: bool) -> list[EgressRecord]:
    """What went out since record `after`; [] where nothing could have, or where the backend cannot tell now."""
    backend = backends.get(sandbox.backend)
    if not sandbox.network_allow or sandbox.handle is None or not backend.capabilities.egress:
        return []
    try:
        async with asyncio.timeout(ASK_SECONDS):
            return await backend.egress(sandbox.handle, after=after, final=final)
    except (BackendError, OSError, TimeoutError) as e:
        log.warning("egress_unknown", extra={"sandbox_id": sandbox.pk, "error": str(e)})
        return []


def last_known(sandbox: Sandbox) -> int:
    """The number of the last record that is stored."""
    return Egress.objects.filter(sandbox=sandbox).aggregate(last=Max("number"))["last"] or 0


def store(sandbox: Sandbox, records: list[EgressRecord], execution: Execution | None) -> None:
    """Keep them, once; of an execution where one is known."""
    Egress.objects.bulk_create(
        [
            Egress(
                sandbox=sandbox, execution=execution, number=r.number, host=r.host[:255], port=r.port, address=r.address[:45],
                verdict=r.verdict, reason=r.reason[:300], bytes_out=r.bytes_out, bytes_in=r.bytes_in, times=r.times, at=r.at,
            )
            for r in records
        ],
        ignore_conflicts=True,
    )  # fmt: skip


def store_found(sandbox: Sandbox, records: list[EgressRecord]) -> None:
    """Keep what was found between runs, or in the middle of one, whose it then is."""
    running = list(Execution.objects.open().filter(sandbox=sandbox)[:2])
    store(sandbox, records, running[0] if len(running) == 1 else None)
