"""Every metric by name: its type, its labels, what it says. docs/metrics.md is held to this table."""

from __future__ import annotations

from dataclasses import dataclass

from executions import errors
from executions.states import NamedLimit

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600)
SUM = "sum"

# What a label `reason`, `code` or `outcome` may be: the errors' own codes, the limits' names, and what has no class.
REASONS = frozenset(
    {"", "cancelled", "runner_lost"}
    | set(NamedLimit.values)
    | {e.code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.SandgateError)}
)


@dataclass(frozen=True, slots=True)
class Family:
    type: str  # counter, gauge or histogram
    labels: tuple[str, ...]
    meaning: str


FAMILIES = {
    # counted
    "sandgate_executions_total": Family(
        "counter", ("backend", "state", "reason"), "Executions that ended, by terminal state and error code."
    ),
    "sandgate_backend_failures_total": Family(
        "counter", ("backend", "reason"), "Attempts at which a backend had no sandbox, or lost it."
    ),
    "sandgate_refusals_total": Family("counter", ("code",), "Admissions that were refused."),
    "sandgate_sandbox_creates_total": Family(
        "counter", ("backend", "outcome"), "Sandboxes asked for: ok, an error code, or interrupted by a cancel."
    ),
    "sandgate_sandbox_kills_total": Family(
        "counter", ("backend", "outcome"), "Kills asked for: ok, or the error code of one that was not confirmed."
    ),
    "sandgate_pool_claims_total": Family(
        "counter", ("backend", "outcome"), "Admissions that wanted a warm sandbox: hit or miss."
    ),
    "sandgate_cost_nano_usd_total": Family("counter", ("backend",), "What executions cost, in nano-dollars."),
    "sandgate_unpriced_charged_nano_usd_total": Family(
        "counter", ("backend",), "What executions without a known rate were charged at the ceiling, in nano-dollars."
    ),
    "sandgate_orphans_killed_total": Family(
        "counter", ("backend",), "Sandboxes that a backend still had although their row had ended."
    ),
    "sandgate_webhook_deliveries_total": Family(
        "counter", ("outcome",), "Tries of webhooks' messages: delivered, failed (tried again later), or dead."
    ),
    "sandgate_execution_queue_seconds": Family("histogram", ("backend",), "From admission to a runner."),
    "sandgate_execution_start_seconds": Family("histogram", ("backend",), "From the runner to the first line of code."),
    "sandgate_execution_run_seconds": Family("histogram", ("backend",), "While the code ran."),
    "sandgate_execution_total_seconds": Family("histogram", ("backend",), "From admission to the end."),
    "sandgate_sandbox_create_seconds": Family("histogram", ("backend",), "Until a backend had made a sandbox."),
    "sandgate_sandbox_kill_seconds": Family("histogram", ("backend",), "Until a backend confirmed a kill."),
    "sandgate_pool_claim_seconds": Family("histogram", ("backend",), "Until an admission had its warm sandbox."),
    "sandgate_event_loop_lag_seconds": Family(
        "histogram", (), "How late a serving process wakes from a short sleep, four times a second."
    ),
    # noted by whichever process knows
    "sandgate_sandboxes_leaked": Family(
        "gauge", ("backend",), "Found at the last look without an open row, and not confirmed as ended."
    ),
    "sandgate_background_last_success_timestamp_seconds": Family(
        "gauge", ("loop",), "When a round of the background work last ended well, in any process."
    ),
    "sandgate_verified_timestamp_seconds": Family("gauge", (), "When `manage.py verify` last looked at everything."),
    "sandgate_verify_failed_checks": Family("gauge", (), "How many of its checks found a wrong row then."),
    # read from the rows
    "sandgate_database_up": Family("gauge", (), "1 when the database answered; with 0 nothing else is told."),
    "sandgate_executions_in_flight": Family("gauge", ("backend", "state"), "Executions that have not ended."),
    "sandgate_queue_length": Family("gauge", (), "Executions that wait for a runner or a sandbox."),
    "sandgate_queue_oldest_seconds": Family("gauge", (), "How long the first of them has waited."),
    "sandgate_sandboxes_open": Family("gauge", ("backend", "state"), "Sandboxes that have not ended."),
    "sandgate_sandboxes_stuck": Family(
        "gauge", ("backend",), "Sandboxes whose kill has not been confirmed for more than a minute."
    ),
    "sandgate_pool_sandboxes": Family(
        "gauge", ("backend", "template", "state"), "Sandboxes of pools that nobody has had yet: idle or booting."
    ),
    "sandgate_breaker_state": Family(
        "gauge", ("backend", "state"), "1 at the state that the backend's circuit breaker is in, 0 at the others."
    ),
    "sandgate_webhook_backlog": Family(
        "gauge", (), "Messages that webhooks which are on have not taken yet, and which are not dead."
    ),
    "sandgate_webhook_oldest_seconds": Family("gauge", (), "How long the first of them has waited."),
    "sandgate_reserved_nano_usd": Family(
        "gauge", ("backend",), "Set aside for what open sandboxes may still cost, in nano-dollars."
    ),
}
