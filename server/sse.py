"""Server-sent events: framing only (WHATWG HTML, section 9.2)."""

DONE = b"data: [DONE]\n\n"
MEDIA_TYPE = "text/event-stream"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""The second keeps nginx from holding events back."""


def event(json: bytes) -> bytes:
    """One event. `json` holds no line break: JSON text escapes them."""
    return b"data: " + json + b"\n\n"
