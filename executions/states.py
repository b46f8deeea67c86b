"""The closed lists: states, the roads between them, reasons, roles. Imports nothing of ours."""

from __future__ import annotations

from django.db.models import TextChoices


class ExecutionState(TextChoices):
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"  # theirs: the code raised
    TIMED_OUT = "timed_out"  # theirs: the wall clock
    CANCELLED = "cancelled"
    ERRORED = "errored"  # ours: only this one wakes an operator


class SandboxState(TextChoices):
    BOOTING = "booting"
    IDLE = "idle"
    LEASED = "leased"
    PAUSED = "paused"
    RETIRING = "retiring"
    GONE = "gone"


E, S = ExecutionState, SandboxState

EXECUTION_NEXT: dict[str, frozenset[str]] = {
    E.QUEUED: frozenset({E.STARTING, E.RUNNING, E.CANCELLED, E.ERRORED}),
    E.STARTING: frozenset({E.RUNNING, E.QUEUED, E.CANCELLED, E.ERRORED}),
    E.RUNNING: frozenset({E.SUCCEEDED, E.FAILED, E.TIMED_OUT, E.CANCELLED, E.ERRORED}),
    E.SUCCEEDED: frozenset(),
    E.FAILED: frozenset(),
    E.TIMED_OUT: frozenset(),
    E.CANCELLED: frozenset(),
    E.ERRORED: frozenset(),
}
EXECUTION_ENDED = frozenset(s for s, after in EXECUTION_NEXT.items() if not after)

SANDBOX_NEXT: dict[str, frozenset[str]] = {
    S.BOOTING: frozenset({S.IDLE, S.LEASED, S.RETIRING, S.GONE}),
    S.IDLE: frozenset({S.LEASED, S.RETIRING, S.GONE}),
    S.LEASED: frozenset({S.PAUSED, S.RETIRING, S.GONE}),
    S.PAUSED: frozenset({S.LEASED, S.RETIRING, S.GONE}),
    S.RETIRING: frozenset({S.GONE}),
    S.GONE: frozenset(),
}
SANDBOX_ENDED = frozenset({S.GONE})


class EndReason(TextChoices):
    """Why a sandbox ended."""

    FINISHED = "finished"
    IDLE = "idle"
    EXPIRED = "expired"
    KILLED = "killed"
    EVICTED = "evicted"
    BUDGET = "budget"
    QUOTA = "quota"
    LOST = "lost"
    OUTAGE = "outage"
    SHUTDOWN = "shutdown"


class AttemptOutcome(TextChoices):
    """What became of one try on one backend."""

    OPEN = "open"
    RAN = "ran"
    SKIPPED = "skipped"
    UNAVAILABLE = "unavailable"
    LOST = "lost"


class SkipCode(TextChoices):
    """Why a backend was left out that could have taken it at another time; a rule or a capability has no code."""

    OUT = "backend_out"
    FULL = "backend_full"


class BreakerState(TextChoices):
    """Whether sandboxes are asked for at a backend."""

    CLOSED = "closed"  # all is well
    OPEN = "open"  # nobody asks until the next try
    HALF_OPEN = "half_open"  # one probe is under way


class PoolTarget(TextChoices):
    """What says how many sandboxes a pool keeps ready."""

    FIXED = "fixed", "a fixed number"
    FORECAST = "forecast", "a forecast from the last minutes"
    HOURS = "hours", "a number for each hour"


class EventKind(TextChoices):
    STDOUT = "stdout"
    STDERR = "stderr"
    RESULT = "result"
    ERROR = "error"
    STATE = "state"
    TRUNCATED = "truncated"


class NamedLimit(TextChoices):
    """The limits of a run that a program is told by name."""

    OUT_OF_MEMORY = "out_of_memory"
    CPU_EXCEEDED = "cpu_exceeded"
    TOO_MANY_PROCESSES = "too_many_processes"
    TOO_MANY_FILES = "too_many_files"
    DISK_FULL = "disk_full"
    TIMED_OUT = "timed_out"
    OUTPUT_TRUNCATED = "output_truncated"
    RESULTS_TRUNCATED = "results_truncated"


class EgressVerdict(TextChoices):
    """What became of a connection that code asked for."""

    ALLOWED = "allowed"
    DENIED = "denied"  # by the rules, or by a limit
    FAILED = "failed"  # allowed, but nobody answered


class DeliveryState(TextChoices):
    """What became of a message to a webhook."""

    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"  # tried often enough; a person or a program may send it again


class Role(TextChoices):
    OWNER = "owner"
    OPERATOR = "operator"
    DEVELOPER = "developer"
    VIEWER = "viewer"
    AUDITOR = "auditor"


class Scope(TextChoices):
    """What a key may do."""

    RUN = "run"
    READ = "read"
    MANAGE = "manage"


class Unit(TextChoices):
    """What a quota counts."""

    EXECUTIONS = "executions"
    CONCURRENT_EXECUTIONS = "concurrent_executions"
    CONCURRENT_SANDBOXES = "concurrent_sandboxes"
    NANO_USD = "nano_usd", "money"
    COMPUTE_US = "compute_us", "compute time"  # microseconds, allocated to sandboxes
    CREATIONS = "creations"  # of sandboxes
    BYTES_STORED = "bytes_stored"  # of artifacts


class WhenExhausted(TextChoices):
    """What becomes of a request that a quota has no room for."""

    REFUSE = "refuse", "refuse it"
    WAIT = "wait", "let it wait its turn"
    LOCAL = "local", "run it on this machine"


class Window(TextChoices):
    SECOND = "second"
    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    TOTAL = "total"


class Verdict(TextChoices):
    ALLOWED = "allowed"
    DENIED = "denied"
    PENDING = "pending"


class Answer(TextChoices):
    """What a rule for packages says when it finds something."""

    ALLOW = "allow"
    ASK = "ask", "ask a person"
    DENY = "deny"


class ApprovalState(TextChoices):
    """What became of packages that waited for a person's word."""

    PENDING = "pending"
    APPROVED = "approved"
    DENIED = "denied"


LANGUAGES = ("python", "bash", "javascript", "typescript", "r", "java")

# How strong the walls are, weakest first. On "simulated" nothing runs at all, which satisfies every floor.
ISOLATION = ("none", "reduced", "namespaces", "microvm", "simulated")
