"""Logging: one line per request when it ends, as text or JSON. Prompts and answers are never logged."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import quote

from batching.events import Event, Outcome, RowEnded, State, StateChanged

logger = logging.getLogger("microbatch")

PATH_CHARACTERS = 200
"""Maximum number of a path's characters in the log."""


class JsonFormatter(logging.Formatter):
    """One JSON object per line; a record's `facts` become fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # Not orjson, which refuses lone surrogates, such as bytes of file names. stderr writes them as JSON's escapes.
        return json.dumps(line, ensure_ascii=False)


def configure(format: Literal["text", "json"], level: str) -> None:
    """Send all log lines to stderr in this format."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    handler.setFormatter(JsonFormatter() if format == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("uvicorn", "httpx", "httpcore", "urllib3", "asyncio", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def log_event(event: Event) -> None:
    """An observer: logs each request that ended and each change of state."""
    match event:
        case RowEnded():
            _log_row(event)
        case StateChanged(state=state) if state is not State.FAILED:  # that is logged with its reason
            logger.info("state %s", state)


def log_refusal(request_id: str, path: str, status: int, code: str | None, key: str = "") -> None:
    """Log a request that was refused before the queue. `key` is the name of its API key, if it has one."""
    # Quoted, because a path can contain line breaks and terminal control characters.
    shown = quote(path if len(path) <= PATH_CHARACTERS else path[:PATH_CHARACTERS] + "…")
    facts: dict[str, object] = {"id": request_id, **_named(key), "path": shown, "status": status, "code": code}
    logger.info("refused  %s", _words(facts), extra={"facts": facts})


def _log_row(event: RowEnded) -> None:
    facts: dict[str, object] = {
        "id": event.id,
        **_named(event.client),
        "outcome": event.outcome,
        "finish": event.finish,
        "prompt_tokens": event.prompt_tokens,
        "output_tokens": event.output_tokens,
        "queue_wait_s": _rounded(event.queue_wait),
        "ttft_s": _rounded(event.ttft),
        "duration_s": _rounded(event.duration),
        "batch_size": event.batch_size,
    }
    level = logging.INFO if event.outcome in (Outcome.ANSWERED, Outcome.CANCELLED) else logging.WARNING
    logger.log(level, "request  %s", _words(facts), extra={"facts": facts})


def _named(key: str) -> dict[str, str]:
    return {"key": key} if key else {}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _words(facts: dict[str, object]) -> str:
    return " ".join(f"{name}={'-' if value is None else value}" for name, value in facts.items())
