"""Which families' tool calls this service can read, and how other models are told to write theirs."""

from server.qwen import QwenFormat
from server.tool_format import ToolFormat

FORMATS: tuple[ToolFormat, ...] = (QwenFormat(),)
TOLD: ToolFormat = FORMATS[0]
"""What models whose template knows no tools are told in words: see `server/tool_prompt.py`."""


def find_format(template: str) -> ToolFormat | None:
    """How the model of this chat template writes calls, or None if it is not known to write any."""
    return next((known for known in FORMATS if known.fits(template)), None)


def format_of(template: str) -> ToolFormat:
    """How the model of this chat template writes calls, by itself or because it is told to."""
    return find_format(template) or TOLD
