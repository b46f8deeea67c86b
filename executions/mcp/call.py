"""One call of a tool: who asks, until when it must have been answered, and whom to tell about progress."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated

from django.conf import settings
from pydantic import Field

from executions.keys import Caller

SessionId = Annotated[str, Field(max_length=40, description="As execute_code returned it.")]
Token = Annotated[
    str | None, Field(max_length=255, description="Sent again with the same arguments, nothing runs twice.")
]
Workflow = Annotated[
    str, Field(max_length=100, description="A label that ties runs together: one timeline, cost and budget.")
]
Step = Annotated[str, Field(max_length=100, description="Which step of the workflow it is.")]
Parent = Annotated[str | None, Field(max_length=40, description="The execution_id that this run follows from.")]


@dataclass
class Call:
    """`left` and `next_look` are in seconds."""

    caller: Caller
    report: Callable[[float, str], Awaitable[None]] | None = None  # None: nobody asked for progress
    cancels: bool = False  # whether the run is to end when the call is cancelled (stdio)
    began: float = field(default_factory=time.monotonic)

    def left(self, most: float | None = None) -> float:
        """Seconds until the call has to be answered."""
        allowed = settings.MCP_ANSWER_SECONDS if most is None else min(most, settings.MCP_ANSWER_SECONDS)
        return max(0.0, self.began + allowed - time.monotonic())

    def next_look(self, most: float | None = None) -> float:
        """Seconds to wait before there is something to report, or to answer."""
        return min(self.left(most), settings.MCP_PROGRESS_SECONDS) if self.report else self.left(most)
