"""Separates a model's thinking from its answer in text that arrives in pieces. Runs on the event loop."""

from enum import Enum, auto
from typing import Literal, NamedTuple, TypeAlias


class ThinkTags(NamedTuple):
    """The tags around a thought."""

    open: str
    close: str


THINK = ThinkTags("<think>", "</think>")

Part: TypeAlias = tuple[Literal["reasoning", "content"], str]


class ThoughtState(Enum):
    """The state of the answer's thought at the end of the rendered prompt, whatever the request asked for."""

    UNKNOWN = auto()
    """The model's template has no thinking."""
    OPENED = auto()
    """The answer starts inside a thought."""
    CLOSED = auto()
    """The thought is over: the answer starts with content."""
    FREE = auto()
    """The model may start its answer with a thought."""

    @property
    def to_come(self) -> bool:
        """Whether the answer can start with a thought."""
        return self in (ThoughtState.OPENED, ThoughtState.FREE)


class ReasoningSplitter:
    """Splits `<think>...</think>` at the start of an answer from the content after it, in linear time.

    Newlines next to the tags belong to neither part, as in Qwen's own template. Without the opening tag everything is
    content, unless `started` says that the prompt already had it; the answer may then repeat it. Without the closing
    tag everything is reasoning. A later block is plain content. At most a tag's length of text and a count of newlines
    are held back.
    """

    def __init__(self, open: str = THINK.open, close: str = THINK.close, *, started: bool = False) -> None:
        self._open = open
        self._close = close
        self._started = started
        self._stage: Literal["start", "reasoning", "gap", "content"] = "start"
        self._held = ""
        self._newlines = 0  # trailing newlines so far; dropped if only the closing tag follows
        self.thought = False  # whether there was any reasoning

    @property
    def undecided(self) -> bool:
        """Whether the text so far may still begin a thought or be content."""
        return self._stage == "start"

    @property
    def over(self) -> bool:
        """Whether all further text is content."""
        return self._stage in ("gap", "content")

    @property
    def held(self) -> int:
        """Bytes of text held back for a tag."""
        return len(self._held.encode())

    def push(self, text: str) -> list[Part]:
        """The non-empty parts completed by this piece of text: reasoning, content, or both."""
        text, self._held = self._held + text, ""
        if self._stage == "start":
            if text != self._open and self._open.startswith(text):
                self._held = text
                return []
            self._stage = "reasoning" if self._started or text.startswith(self._open) else "content"
            text = text.removeprefix(self._open)
        parts: list[Part] = []
        if self._stage == "reasoning":
            thought, closed, text = text.partition(self._close)
            if closed:
                self._stage = "gap"
            else:
                keep = overlap(thought, self._close)
                thought, self._held = thought[: len(thought) - keep], thought[len(thought) - keep :]
            parts += self._reasoning(thought)
        if self._stage == "gap" and (text := text.lstrip("\n")):
            self._stage = "content"
        if self._stage == "content" and text:
            parts.append(("content", text))
        return parts

    def flush(self) -> list[Part]:
        """The text held back for a tag that never came."""
        held, self._held = self._held, ""
        if self._stage == "start" and not self._started:
            return [("content", held)] if held else []
        return self._reasoning(held)

    def _reasoning(self, text: str) -> list[Part]:
        if not self.thought:
            text = text.lstrip("\n")
        body = text.rstrip("\n")
        if not body:
            self._newlines += len(text)
            return []
        thought = "\n" * self._newlines + body
        self._newlines, self.thought = len(text) - len(body), True
        return [("reasoning", thought)]


def overlap(text: str, tag: str) -> int:
    """Length of the longest proper prefix of `tag` that `text` ends with."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
