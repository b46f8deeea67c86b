"""Every refusal and failure, with a stable code, one human sentence and a remedy: the same at each door.

SandgateError
├── Refused                     admission said no; nothing ran, nothing is owed
│   ├── Invalid                 400  the request itself
│   │   ├── TooLarge            413
│   │   └── MethodNotAllowed    405
│   ├── Unauthenticated         401
│   ├── BudgetExhausted         402
│   ├── Forbidden               403  scope, policy, floor
│   │   └── PackageDenied       403
│   ├── ApprovalPending         202  a person decides
│   ├── NotFound                404  also another team's
│   ├── Conflict                409
│   │   ├── KeyReused           422
│   │   └── Elsewhere           421  on a machine that this process does not reach
│   ├── SessionGone             410
│   ├── QuotaExceeded           429
│   │   ├── QueueFull           429  nor may one more wait
│   │   └── QueueTimedOut       429  it has waited long enough
│   └── NoBackend               503
│       └── RateUnknown         503  no price, and no ceiling that stands in for it
├── DatabaseAway                503  the records can neither be read nor written
│   └── StorageFull             507  no room for them
└── BackendError                a machine said no, or broke
    ├── BackendUnavailable      nothing has run: another backend may be tried
    │   └── SandboxRefused      for what was asked of it; the backend itself is well
    ├── SandboxLost             the sandbox died; code may have run
    │   └── SandboxOutOfMemory  for the memory that the code had used: theirs
    ├── RunTimedOut             the wall clock; the remote work has been stopped
    ├── CpuExceeded             the CPU time that was asked for as the most; stopped likewise
    ├── ContextRestarted        an interrupt that cost the variables
    ├── ContextUnknown          no such context in this sandbox
    ├── FileRefused             a path or file that cannot be served
    ├── InstallFailed           a package cannot be resolved, fetched or put in place
    └── Unsupported             the backend does not have this capability
"""

from __future__ import annotations

import errno
from typing import Any


class SandgateError(Exception):
    """Something failed."""

    code = "internal"
    status = 500
    remedy = "Try again; if it happens again, tell the operator the request id."
    theirs = False  # True where the caller's code or request is at fault, False where the fault is ours

    def __init__(self, detail: str | None = None, *, remedy: str | None = None, **facts: Any) -> None:
        self.detail = detail or (type(self).__doc__ or "").strip().splitlines()[0]
        if remedy is not None:
            self.remedy = remedy
        self.facts = facts  # what a program may read: field, retry_after, remaining, needed, resets_at …
        self.fields: dict[str, str] = {}  # of the HTTP answer that it becomes
        super().__init__(self.detail)

    def problem(self) -> dict[str, Any]:
        """The body that every door sends: RFC 9457 members plus ours."""
        return {
            "type": f"urn:sandgate:error:{self.code}",
            "title": self.code.replace("_", " ").capitalize(),
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            "remedy": self.remedy,
            **{k: v for k, v in self.facts.items() if v is not None},
        }

    def sentence(self) -> str:
        """One line for a caller that reads text only (MCP, a terminal)."""
        return f"{self.code}: {self.detail} {self.remedy}".strip()


class Refused(SandgateError):
    """The request was refused; nothing has run."""

    code = "refused"
    status = 400
    theirs = True
    caller: Any = None  # who was denied, where that belongs into the audit
    quota_id: int | None = None  # which has said so
    waits_seconds = 0  # how long such a request may wait for room instead
    goes_local = False  # whether it may run on this machine instead


class Invalid(Refused):
    """The request is not valid."""

    code = "invalid"
    remedy = "Correct the field that is named and send the request again."

    def __init__(self, detail: str | None = None, *, field: str | None = None, **facts: Any) -> None:
        super().__init__(detail, field=field, **facts)


class TooLarge(Invalid):
    """The code is larger than 1 MB."""

    code = "too_large"
    status = 413
    remedy = "Put large data into a file (write_file, or PUT /sessions/{id}/files) and read it from the code."


class MethodNotAllowed(Invalid):
    """This address does not have that method."""

    code = "method_not_allowed"
    status = 405
    remedy = "Use a method that the header Allow names; /api/docs lists them all."


class Unauthenticated(Refused):
    """The key is missing, unknown, expired or revoked."""

    code = "unauthenticated"
    status = 401
    remedy = "Send Authorization: Bearer sg_… with a key that is active; keys are made in the console."


class BudgetExhausted(Refused):
    """The budget does not cover the worst case of this request."""

    code = "budget_exhausted"
    status = 402
    remedy = "Ask for less time, wait for the reset, or have an operator raise the budget. Do not retry unchanged."


class Forbidden(Refused):
    """This key may not do that."""

    code = "forbidden"
    status = 403
    remedy = "Use a key with the scope that is named, or ask an operator for it."


class PackageDenied(Forbidden):
    """The agent's policy does not allow this package."""

    code = "package_denied"
    remedy = "Do without it, or ask an operator to add it to the agent's packages."


class ApprovalPending(Refused):
    """A person has to approve these packages first; nothing has been installed."""

    code = "approval_pending"
    status = 202
    remedy = "Go on without them. Ask for the same packages again later: once a person has approved them, they are installed."


class NotFound(Refused):
    """There is no such object."""

    code = "not_found"
    status = 404
    remedy = "Check the id; objects of another team are not visible."


class Conflict(Refused):
    """The object is not in a state that allows this, or is busy."""

    code = "conflict"
    status = 409
    remedy = "Read the object's state and try again when it has changed."


class KeyReused(Conflict):
    """This Idempotency-Key was used with another request."""

    code = "idempotency_key_reused"
    status = 422
    remedy = "Use a new Idempotency-Key for a new request; repeat the old one only with the same body."


class Elsewhere(Conflict):
    """The session lives on another machine."""

    code = "session_elsewhere"
    status = 421
    remedy = "Code runs in it from anywhere. Send what else you want of it to the server on that machine."


class SessionGone(Refused):
    """The session has ended."""

    code = "session_gone"
    status = 410
    remedy = "Variables are lost. Start a new session, and send what it needs as files."


class QuotaExceeded(Refused):
    """A quota is used up."""

    code = "quota_exceeded"
    status = 429
    remedy = "Wait for retry_after seconds, or end what is running."


class QueueFull(QuotaExceeded):
    """There is no room now, and as many requests wait already as may."""

    code = "queue_full"
    remedy = "Nothing has run. Try again after retry_after seconds, and send less at once."


class QueueTimedOut(QuotaExceeded):
    """It has waited for room as long as it may, and was not started."""

    code = "queue_timed_out"
    remedy = "Nothing has run. End what is running, send less at once, or allow a longer max_wait_seconds."


class NoBackend(Refused):
    """No backend of the route can take this request."""

    code = "no_backend"
    status = 503
    theirs = False
    remedy = "Nothing has run: try again in a minute, name another route, or ask the operator to look at GET /api/v1/backends."


class RateUnknown(NoBackend):
    """No rate is known for this backend, and no ceiling is set."""

    code = "rate_unknown"
    remedy = (
        "Name another route, or have the operator enter the backend's rates (admin, Money → Rates) or set a ceiling."
    )


class DatabaseAway(SandgateError):
    """The database does not answer."""

    code = "database_away"
    status = 503
    remedy = "Try again after retry_after seconds, with the same Idempotency-Key where there is one: it runs once then."
    retry_after = 5

    def __init__(self, detail: str | None = None, **facts: Any) -> None:
        super().__init__(detail, **{"retry_after": self.retry_after, **facts})


class StorageFull(DatabaseAway):
    """There is no room left where Sandgate keeps its records and files."""

    code = "storage_full"
    status = 507
    remedy = "The operator has to make room (manage.py doctor says where). Then send the same again."
    retry_after = 60


class BackendError(SandgateError):
    """A backend failed."""

    code = "backend_error"


class BackendUnavailable(BackendError):  # nothing has run: another backend may be tried
    """No sandbox could be provided."""

    code = "backend_unavailable"
    status = 503


class SandboxRefused(BackendUnavailable):
    """The backend makes no such sandbox: it does not have the template, or cannot keep what was asked for."""

    code = "sandbox_refused"
    status = 404
    theirs = True
    remedy = "Name a template that GET /api/v1/templates lists, or another route."


class SandboxLost(BackendError):
    """The sandbox died before the code had ended; the code may have run in part."""

    code = "sandbox_lost"
    status = 502
    remedy = "Nothing is run twice without being asked to: run it again if that is safe."


class SandboxMissing(SandboxLost):  # a sandbox from a pool is replaced by a fresh one
    """The sandbox was gone before the code was handed over; nothing has run."""


class SandboxOutOfMemory(SandboxLost):
    """The sandbox used up its memory, files in /home/user and /tmp included, and was ended."""

    code = "out_of_memory"
    status = 200
    theirs = True
    remedy = "Work on less at once, remove files, or use a template with more memory."


class RunTimedOut(BackendError):
    """The code ran longer than its timeout and was stopped."""

    code = "timed_out"
    status = 200
    theirs = True
    remedy = "Do less in one run, or ask for a longer timeout_seconds."


class CpuExceeded(BackendError):
    """The code used more CPU time than its limit and was stopped."""

    code = "cpu_exceeded"
    status = 200
    theirs = True
    remedy = "Do less in one run, or ask for more limits.cpu_seconds."


class ContextRestarted(BackendError):
    """The code could not be interrupted; its context was ended and the variables are lost."""

    code = "context_restarted"
    status = 200
    theirs = True
    remedy = "Run again what made the variables."


class ContextUnknown(BackendError):
    """There is no such context in this sandbox."""

    code = "context_unknown"
    status = 404
    theirs = True
    remedy = "List the session's contexts, or leave the context out."


class FileRefused(BackendError):
    """The path cannot be read or written."""

    code = "file_refused"
    status = 400
    theirs = True
    remedy = "Use an ordinary path in the sandbox's home or /tmp."

    def __init__(self, detail: str | None = None, *, missing: bool = False, **facts: Any) -> None:
        super().__init__(detail, **facts)
        if missing:
            self.code, self.status = "file_not_found", 404
            self.remedy = "List the folder to see what is there; a path is always one inside the sandbox."


class InstallFailed(BackendError):
    """The package cannot be installed."""

    code = "install_failed"
    status = 422
    theirs = True
    remedy = "Check the name and the version; only wheels for the sandbox's Python are installed."


class Unsupported(BackendError):
    """This backend does not have that capability."""

    code = "unsupported"
    status = 400
    theirs = True
    remedy = "Name a route whose backend has the capability; GET /api/v1/backends lists them."


NO_ROOM = {"SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE", "53100"}  # the last of PostgreSQL


def ours(error: BaseException, otherwise: str = "Something broke on our side.") -> SandgateError:
    """What nobody expected, as one of these: where it is the database or the disk, it says so."""
    from django.db import InterfaceError, OperationalError

    if isinstance(error, SandgateError):
        return error
    codes = {getattr(error.__cause__, name, None) for name in ("sqlite_errorname", "sqlstate")}
    if codes & NO_ROOM or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
        return StorageFull()
    if isinstance(error, OperationalError | InterfaceError):
        return DatabaseAway()
    return SandgateError(otherwise)


# The table of docs/errors.md: `python -m executions.errors` prints it.


def kinds(kind: type[SandgateError] = SandgateError) -> list[type[SandgateError]]:
    """Every class of this module's tree, each behind the one that it stems from."""
    below = [sub for sub in kind.__subclasses__() if sub.__module__ == SandgateError.__module__]
    return [kind, *(found for sub in below for found in kinds(sub))]


def table() -> str:
    """Code, whose fault, HTTP, MCP form, sentence and remedy of every error, as Markdown."""
    rows: dict[str, SandgateError] = {}
    for kind in kinds():
        rows.setdefault(kind.code, kind())
    missing = FileRefused("There is no such file in the sandbox.", missing=True)
    rows[missing.code] = missing
    lines = ["| Code | Fault | HTTP | MCP | Meaning | What to do |", "|---|---|---|---|---|---|"]
    for code, e in rows.items():
        fault = "yours" if e.theirs else "ours"
        lines.append(f"| `{code}` | {fault} | {e.status} | {_over_mcp(e)} | {e.detail} | {e.remedy} |")
    return "\n".join(lines)


def _over_mcp(error: SandgateError) -> str:
    if error.status in (401, 405):
        return f"HTTP {error.status}, before any tool"
    if isinstance(error, SandboxLost | RunTimedOut | CpuExceeded | ContextRestarted):
        return "`isError`; the run with `error_code`"
    return "`isError`; the problem"


if __name__ == "__main__":
    import sys

    sys.stdout.write(table() + "\n")
