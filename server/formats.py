"""Which families' tool calls this service can read."""

from server.qwen import QwenFormat
from server.tool_format import ToolFormat

FORMATS: tuple[ToolFormat, ...] = (QwenFormat(),)


def find_format(template: str) -> ToolFormat | None:
    """How the model of this chat template writes calls, or None if it is not known to write any."""
    return next((known for known in FORMATS if known.fits(template)), None)
