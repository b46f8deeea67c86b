"""An operator in the admin; machines are scripted."""

from __future__ import annotations

import uuid
from datetime import timedelta

import pytest
from django.db import transaction
from django.utils import timezone

from executions import audit, keys
from executions.keys import Caller
from executions.models import (
    Advisory,
    Agent,
    AnswerRecord,
    Approval,
    Artifact,
    Attempt,
    Attestation,
    AuditHead,
    BackendState,
    Claim,
    CostTotal,
    Delivery,
    Egress,
    Event,
    Execution,
    IdempotencyRecord,
    LedgerEntry,
    Membership,
    MetricTotal,
    Package,
    PackageLock,
    PackagePolicy,
    Pool,
    ProviderCharge,
    Quota,
    Rate,
    Refusal,
    Sandbox,
    SignInLink,
    Team,
    Template,
    Transition,
    Usage,
    User,
    Webhook,
)
from executions.states import Scope, Unit, Window

PIN = {
    "name": "emoji", "version": "2", "sha256": "0" * 64, "size_bytes": 5, "licence": "", "published_at": None, "advisories": None,
    "needed_by": [], "answer": "ask", "reason": "<b>asked",
}  # fmt: skip

MODELS = [
    "advisory", "agent", "answerrecord", "apikey", "approval", "artifact", "attempt", "attestation", "auditevent", "audithead",
    "backendstate", "claim", "costtotal", "delivery", "egress", "event", "execution", "idempotencyrecord", "ledgerentry",
    "membership", "metrictotal", "package", "packagelock", "packagepolicy", "pool", "providercharge", "quota", "rate",
    "refusal", "sandbox", "signinlink", "team", "template", "transition", "usage", "user", "webhook",
]  # fmt: skip
CONFIGURATION = ["agent", "apikey", "membership", "packagepolicy", "pool", "quota", "rate", "team", "template", "user"]


@pytest.fixture(autouse=True)
def scripted(settings):
    settings.SANDBOXES = {"scripted": {"BACKEND": "executions.backends.scripted.ScriptedBackend", "OPTIONS": {}}}
    return settings.SANDBOXES["scripted"]["OPTIONS"]


@pytest.fixture
def operator(db):
    return User.objects.create_superuser("operator", "operator@example.org", "correct horse")


@pytest.fixture
def office(client, operator):
    """The operator's browser."""
    client.force_login(operator)
    return client


@pytest.fixture
def template(db):
    return Template.objects.create(name="default", languages=["python"])


def caller_of(agent: Agent) -> Caller:
    return Caller(team=agent.team, agent=agent, scopes=frozenset(Scope.values), door="rest")


@transaction.atomic
def a_run(agent: Agent, template: Template, *states: str, ago: timedelta = timedelta(), **fields) -> Execution:
    """An execution that has come this far, in a sandbox of its own."""
    states = states or ("queued", "starting", "running")
    now = timezone.now() - ago
    sandbox = fields.pop("sandbox", None) or a_sandbox(agent, template)
    given = {
        "code": "print(1)",
        "backend": "scripted",
        "created_at": now,
        "running_at": now,
        "heartbeat_at": now,
    } | fields
    ended = {"ended_at": now + timedelta(seconds=1)} if states[-1] not in ("queued", "starting", "running") else {}
    return Execution.born(
        *states, team=agent.team, agent=agent, sandbox=sandbox, code_sha256="0" * 64, **given, **ended
    )


@transaction.atomic
def a_sandbox(agent: Agent, template: Template, *states: str, **fields) -> Sandbox:
    given = {"leased_until": timezone.now() + timedelta(minutes=5), "backend": "scripted"} | fields
    return Sandbox.born(*(states or ("booting", "leased")), team=agent.team, agent=agent, template=template, **given)


def a_cost(agent: Agent, sandbox: Sandbox, nano_usd: int, **fields) -> Usage:
    given = {"backend": "scripted", "kind": "run", "duration_us": 1_000_000} | fields
    return Usage.objects.create(
        team=agent.team,
        agent=agent,
        sandbox=sandbox,
        rate_nano_usd_per_second=nano_usd,
        cost_nano_usd=nano_usd,
        **given,
    )


def one_of_everything(template: Template) -> dict:
    """One row of each kind, hanging on a team, agent, key and person of their own. Returns them by the model's name."""
    name = "n" + uuid.uuid4().hex[:12]
    team = Team.objects.create(name=name)
    person = User.objects.create_user(name, password=None)
    agent = Agent.objects.create(team=team, name=name, template=template, isolation_floor="none")
    key, _ = keys.make_key(team=team, agent=agent, name=name, created_by=person)
    execution = a_run(agent, template, "queued", "starting", "running", "succeeded", key=key, actor=person)
    sandbox = execution.sandbox
    quota = Quota.objects.create(agent=agent, unit=Unit.NANO_USD, window=Window.DAY, limit=10**9)
    Quota.objects.create(key=key, unit=Unit.CONCURRENT_EXECUTIONS, limit=4)
    who = {"team": team, "agent": agent, "key": key, "actor": person}
    pool = Pool.objects.create(backend="scripted", template=template, network_allow=[f"{name}.example"], target=2)
    webhook = Webhook.objects.create(team=team, url=f"https://{name}.example/<b>", secret="sealed")
    step = Transition.objects.filter(execution=execution).last()
    warm = a_sandbox(agent, template, "booting", "idle", "leased", pool=pool, made_of="0" * 16)
    return {
        "agent": agent,
        "apikey": key,
        "artifact": Artifact.objects.create(
            team=team,
            sandbox=sandbox,
            execution=execution,
            name="a.csv",
            mime="text/csv",
            size_bytes=1,
            sha256="",
            expires_at=timezone.now(),
        ),
        "attempt": Attempt.objects.create(execution=execution, number=1, backend="scripted", sandbox=sandbox),
        "attestation": Attestation.objects.create(
            backend="scripted",
            blocked=1,
            walls={"seccomp": True, "cgroups": "Not <here>."},
            cases=[
                {
                    "group": "files",
                    "case": "<b>",
                    "wall": "seccomp",
                    "verdict": "blocked",
                    "seen": "<i>EPERM",
                    "seconds": 0.1,
                }
            ],
        ),
        "auditevent": audit.record("sign_in", caller=Caller(team, None, key, person), subject=name),
        "audithead": AuditHead.objects.get(),
        "backendstate": BackendState.objects.update_or_create(
            alias=f"{name}-backend", state="open", opened_at=timezone.now(), reason="<b>503"
        )[0],
        "costtotal": CostTotal.objects.create(
            grain="day",
            by="user",
            label=name,
            day=timezone.now().date(),
            start_at=timezone.now(),
            team=team,
            agent=agent,
            backend="scripted",
            kind="run",
            language="python",
            cpu_count=1,
            memory_mib=512,
            is_priced=False,
            stretches=1,
            duration_us=1,
            cost_nano_usd=1,
        ),
        "claim": Claim.objects.create(sandbox=warm, pool=pool, took_us=2000, reserved_nano_usd=5),
        "delivery": Delivery.objects.create(
            webhook=webhook, execution=execution, transition=step, state="dead", error="<i>Answered 500"
        ),
        "egress": Egress.objects.create(
            sandbox=sandbox,
            execution=execution,
            number=1,
            host="<b>.example",
            port=443,
            verdict="denied",
            reason="<i>no",
        ),
        "event": Event.objects.create(execution=execution, seq=1, kind="stdout", data={"text": "said"}),
        "execution": execution,
        "idempotencyrecord": IdempotencyRecord.objects.create(
            agent=agent, token=name, fingerprint="", execution=execution
        ),
        "answerrecord": AnswerRecord.objects.create(key=key, token=name, fingerprint="", status=201, body="{}"),
        "metrictotal": MetricTotal.objects.create(name="sandgate_refusals_total", labels=f'["{name}"]', value=1),
        "ledgerentry": LedgerEntry.objects.create(
            team=team, quota=quota, sandbox=sandbox, execution=execution, kind="spend", amount_nano_usd=5
        ),
        "membership": Membership.objects.create(team=team, user=person),
        "package": Package.objects.create(**who, sandbox=sandbox, name="emoji", version="2", verdict="allowed"),
        "packagelock": PackageLock.objects.create(agent=agent, digest=name, python="3.11", asked=["emoji"], pins=[PIN]),
        "packagepolicy": PackagePolicy.objects.create(team=team, deny=["left-pad"]),
        "approval": Approval.objects.create(
            **who, sandbox=sandbox, execution=execution, asked=["emoji"], pins=[PIN], why="asked", roll=name
        ),
        "advisory": Advisory.objects.create(
            identifier=name, package="emoji", modified_at=timezone.now(), told_at=timezone.now()
        ),
        "providercharge": ProviderCharge.objects.create(
            backend="e2b", day=timezone.now().date(), sandbox=name, nano_usd=5, source="bill.csv"
        ),
        "pool": pool,
        "quota": quota,
        "rate": Rate.objects.create(backend="scripted", meter=Rate.VCPU, nano_usd=14_000),
        "refusal": Refusal.objects.create(**who, code="quota_exceeded", detail="No.", roll=name),
        "sandbox": sandbox,
        "signinlink": SignInLink.objects.create(digest=name, user=person, expires_at=timezone.now()),
        "team": team,
        "template": Template.objects.create(name=name),
        "transition": Transition.objects.filter(execution=execution).first(),
        "usage": a_cost(agent, sandbox, 5, execution=execution),
        "user": person,
        "webhook": webhook,
    }
