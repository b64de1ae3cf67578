"""What is served: everything that is known once a model is loaded, in one object that never changes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from batching.types import ModelInfo
from server.grammar.compiler import Grammars
from server.http.errors import ApiError, bad_request, thousands
from server.model.defaults import Defaults
from server.model.text import Text
from server.replies import Model
from server.settings import WHOLE_ANSWER, Settings

RAGFLOW_GUIDE = 1543
"""Tokens of instructions that RAGFlow adds to a prompt after it has trimmed it."""


@dataclass(frozen=True)
class ServedModel:
    """A model ready to be asked.

    `text` is its tokenizer and chat template, `info` what its engine says of it, `defaults` the sampling that it
    recommends, and `settings` the operator's limits.
    """

    settings: Settings
    info: ModelInfo
    text: Text
    grammars: Grammars
    defaults: Defaults
    stop_token_ids: frozenset[int] = field(init=False)
    """Those that the tokenizer or the engine names."""
    names: tuple[str, ...] = field(init=False)
    """What clients may call it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", self.settings.served_names)
        object.__setattr__(self, "stop_token_ids", self.text.stop_token_ids | self.info.stop_token_ids)

    @property
    def advertised_window(self) -> int:
        """The prompt length that clients should trim to, below the true window by all they do not count.

        Clients count with a tokenizer of their own (a tenth is left for that), RAGFlow adds a guide, and the answer
        needs its place. Never less than half of the true window.
        """
        window = self.info.context_window
        answer = min(self.settings.default_max_tokens or WHOLE_ANSWER, self.settings.max_output_tokens)
        return max(window // 2, int(0.9 * (window - RAGFLOW_GUIDE - answer)))

    def room(self, prompt_tokens: int, param: str, *, least: int = 1) -> int:
        """How many tokens can follow the prompt, which came in the field `param`.

        Raises `ApiError` 400 if not even `least`.
        """
        room = self.info.context_window - prompt_tokens
        if room < least:
            raise bad_request(
                f"The prompt has {thousands(prompt_tokens)} tokens, but with its answer it must fit in a context "
                f"window of {thousands(self.info.context_window)}; shorten it.",
                param,
                "context_length_exceeded",
            )
        return room


def served_name(names: Sequence[str], asked: str | None) -> str:
    """The name an answer carries. RAGFlow may append `___` and a provider to it. Raises `ApiError` 404."""
    if asked is None:
        return names[0]
    for name in (asked, asked.split("___")[0]):
        if name in names:
            return name
    raise ApiError(404, f"There is no model of that name here, only {', '.join(names)}.", code="model_not_found")


def card(name: str, created: int, model: ServedModel | None) -> Model:
    """What `/v1/models` says of a name, while the model loads without its windows.

    vLLM's clients read `max_model_len`. RAGFlow, which fills what it finds, reads `context_length` first.
    """
    shown: Model = {"id": name, "object": "model", "created": created, "owned_by": "microbatch"}
    if model is not None:
        shown["max_model_len"] = model.info.context_window
        shown["context_length"] = model.advertised_window
    return shown
