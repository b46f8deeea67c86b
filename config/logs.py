"""Log lines: JSON in production, coloured on a terminal; ids in every line, code and secrets in none."""

from __future__ import annotations

import logging
from typing import Any

import structlog

SHARED: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.ExtraAdder(),
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def formatter(style: str) -> logging.Formatter:
    """The formatter of every handler; `style` is "json" or "console"."""
    last = structlog.dev.ConsoleRenderer() if style == "console" else structlog.processors.JSONRenderer()
    ending: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if style != "console":
        ending.append(structlog.processors.format_exc_info)
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=SHARED, processors=[*ending, last])


class Meant(logging.Filter):
    """Drops uvicorn's word about a stream that the gateway broke off on purpose, because its sandbox died."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "without completing response" not in record.getMessage()


structlog.configure(
    processors=[*SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
    logger_factory=structlog.stdlib.LoggerFactory(),
    wrapper_class=structlog.stdlib.BoundLogger,
    cache_logger_on_first_use=True,
)
