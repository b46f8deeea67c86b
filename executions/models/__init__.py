"""The rows. Each says what is true of itself; the database enforces it."""

from executions.models.backends import BackendState
from executions.models.base import HasLifecycle, IllegalTransition, new_id
from executions.models.executions import Artifact, Attempt, Egress, Event, Execution
from executions.models.money import LedgerEntry, Quota, Rate, Usage
from executions.models.packages import Advisory, Approval, PackageLock, PackagePolicy
from executions.models.pools import Claim, Pool
from executions.models.records import (
    AnswerRecord,
    Attestation,
    AuditEvent,
    AuditHead,
    IdempotencyRecord,
    MetricTotal,
    Package,
    Refusal,
    Transition,
)
from executions.models.reports import CostTotal, ProviderCharge
from executions.models.sandboxes import Sandbox, Template
from executions.models.teams import Agent, ApiKey, Membership, SignInLink, Team, User
from executions.models.webhooks import Delivery, Webhook

__all__ = [
    "Advisory",
    "Agent",
    "AnswerRecord",
    "ApiKey",
    "Approval",
    "Artifact",
    "Attempt",
    "Attestation",
    "AuditEvent",
    "AuditHead",
    "BackendState",
    "Claim",
    "CostTotal",
    "Delivery",
    "Egress",
    "Event",
    "Execution",
    "HasLifecycle",
    "IdempotencyRecord",
    "IllegalTransition",
    "LedgerEntry",
    "Membership",
    "MetricTotal",
    "Package",
    "PackageLock",
    "PackagePolicy",
    "Pool",
    "ProviderCharge",
    "Quota",
    "Rate",
    "Refusal",
    "Sandbox",
    "SignInLink",
    "Team",
    "Template",
    "Transition",
    "Usage",
    "User",
    "Webhook",
    "new_id",
]
