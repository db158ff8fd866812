"""Structured logs on standard error, our own and those of libraries: readable in a terminal, JSON lines elsewhere.

A line that belongs to a request or a task bears `request_id` and `task_id`, which are context variables: whoever hands work to
another thread hands them on with `contextvars.copy_context().run`.
"""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.stdlib import ProcessorFormatter


class _Lines(logging.Handler):
    """Standard error as it is when a line is written."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def configure(level: int = logging.INFO) -> None:
    """Says how lines look, and from which level on ours are written; those of libraries are from WARNING on."""
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    )
    before: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*before, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
    lines = _Lines()
    named = [structlog.stdlib.add_logger_name, *before]
    lines.setFormatter(
        ProcessorFormatter(foreign_pre_chain=named, processors=[ProcessorFormatter.remove_processors_meta, renderer])
    )
    root, engine = logging.getLogger(), logging.getLogger("dbos")
    root.handlers = [*(handler for handler in root.handlers if not isinstance(handler, _Lines)), lines]
    engine.handlers, engine.propagate = [lines], False  # where it has none, it makes one of its own
