"""The verbs: each tells its story top to bottom and owns its transactions."""

from executions.operations.artifacts import artifacts_of, find_artifact
from executions.operations.artifacts import pieces as artifact_pieces
from executions.operations.attest import attest, last_attestations
from executions.operations.background import background
from executions.operations.cancel import request_cancel
from executions.operations.drill import outage_drill
from executions.operations.environment import backend_states, environment, limits, offer, outages
from executions.operations.install import Installed, install, install_for_agent, lock_of
from executions.operations.pausing import pause, wake
from executions.operations.quote import quote
from executions.operations.reap import reap, retire
from executions.operations.reverts import model_of, revert, why_not
from executions.operations.run import Run, drain, running, start
from executions.operations.sessions import (
    end_session,
    extend_session,
    get_file,
    list_files,
    open_session,
    pause_session,
    put_file,
    remove_file,
    restart_session,
    resume_session,
)
from executions.operations.setup import FirstStart, first_start, seed
from executions.operations.submit import find_session, submit
from executions.operations.templates import mistakes, rebuild, template_states
from executions.operations.verify import verify
from executions.operations.wait import cancel, execute, find_execution, wait
from executions.operations.waiting import position, ring, stop_taking

__all__ = [
    "FirstStart",
    "Installed",
    "Run",
    "artifact_pieces",
    "artifacts_of",
    "attest",
    "backend_states",
    "background",
    "cancel",
    "drain",
    "end_session",
    "environment",
    "execute",
    "extend_session",
    "find_artifact",
    "find_execution",
    "find_session",
    "first_start",
    "get_file",
    "install",
    "install_for_agent",
    "last_attestations",
    "limits",
    "list_files",
    "lock_of",
    "mistakes",
    "model_of",
    "offer",
    "open_session",
    "outage_drill",
    "outages",
    "pause",
    "pause_session",
    "position",
    "put_file",
    "quote",
    "reap",
    "rebuild",
    "remove_file",
    "request_cancel",
    "restart_session",
    "resume_session",
    "retire",
    "revert",
    "ring",
    "running",
    "seed",
    "start",
    "stop_taking",
    "submit",
    "template_states",
    "verify",
    "wait",
    "wake",
    "why_not",
]
