"""Packages that a policy does not decide alone: they wait for a person, who sees all that is known about them."""

from __future__ import annotations

from typing import Any

from django.db import IntegrityError, transaction
from django.utils import timezone

from executions import audit
from executions.errors import ApprovalPending, Conflict, PackageDenied
from executions.keys import Caller
from executions.models import Agent, Approval, Execution, Sandbox
from executions.packages import index
from executions.packages.decide import Item
from executions.states import Answer, ApprovalState


def ask(
    caller: Caller,
    agent: Agent,
    sandbox: Sandbox | None,
    execution: Execution | None,
    asked: list[str],
    items: list[Item],
) -> None:
    """Return where nothing needs a person's word, or it was given for exactly these wheels. Raises ApprovalPending, PackageDenied."""
    granted = _granted(agent)
    open_ones = []
    for item in items:
        if item.answer != Answer.ASK:
            continue
        by = granted.get((item.name, item.version, item.sha256))
        if by is None:
            open_ones.append(item)
        else:
            item.answer, item.reason = Answer.ALLOW, by
    if not open_ones:
        return
    roll = index.digest_of(agent.pk, sorted((item.name, item.version, item.sha256) for item in open_ones))
    refused = Approval.objects.filter(roll=roll, state=ApprovalState.DENIED).select_related("decided_by").last()
    if refused is not None:
        said = f"{refused.decided_by} has denied {_names(open_ones)}: {refused.reason or 'no reason given'}."
        raise PackageDenied(said, package=open_ones[0].name)
    why = " ".join(dict.fromkeys(item.reason for item in open_ones))[:500]
    waiting = _waiting(caller, agent, sandbox, execution, asked, items, why, roll)
    raise ApprovalPending(
        f"{why} It waits for a person as {waiting.pk}; nothing has been installed.",
        approval_id=waiting.pk,
        packages=[item.named for item in open_ones],
    )


def _names(items: list[Item]) -> str:
    return ", ".join(item.named for item in items)


def _granted(agent: Agent) -> dict[tuple[str, str, str], str]:
    """The wheels that were approved for this agent, and the sentence that says by whom."""
    found = {}
    given = Approval.objects.filter(agent=agent, state=ApprovalState.APPROVED).select_related("decided_by")
    for approval in given.order_by("decided_at"):
        for pin in approval.pins:
            said = f"{approval.decided_by} has approved {pin['name']} {pin['version']} for agent {agent.name}"
            found[pin["name"], pin["version"], pin["sha256"]] = said
    return found


def _waiting(
    caller: Caller,
    agent: Agent,
    sandbox: Sandbox | None,
    execution: Execution | None,
    asked: list[str],
    items: list[Item],
    why: str,
    roll: str,
) -> Approval:
    """The row that waits: the one that there is, or a new one."""
    pending = Approval.objects.filter(roll=roll, state=ApprovalState.PENDING)
    if found := pending.first():
        return found
    try:
        with transaction.atomic(durable=True):
            return Approval.objects.create(
                team=agent.team, agent=agent, sandbox=sandbox, execution=execution, key=caller.key, actor=caller.person,
                asked=asked, pins=[item.facts() for item in items], why=why, roll=roll,
            )  # fmt: skip
    except IntegrityError:  # its twin was a moment faster
        return pending.get()


@transaction.atomic
def settle(approval: Approval, *, caller: Caller, approve: bool, reason: str) -> Approval:
    """A person's word. What is approved may be installed by this agent from now on. Raises Conflict where it was given before."""
    state = ApprovalState.APPROVED if approve else ApprovalState.DENIED
    fields: dict[str, Any] = {
        "state": state, "decided_at": timezone.now(), "decided_by": caller.person, "reason": reason[:200],
    }  # fmt: skip
    if not Approval.objects.filter(pk=approval.pk, state=ApprovalState.PENDING).update(**fields):
        raise Conflict("Somebody has decided already.")
    pins = [f"{pin['name']} {pin['version']}" for pin in approval.pins]
    audit.record(
        f"packages_{state}", caller=caller, subject=approval.pk, after={"agent": approval.agent_id, "packages": pins},
        reason=reason,
    )  # fmt: skip
    approval.refresh_from_db()
    return approval
