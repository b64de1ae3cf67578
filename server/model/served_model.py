"""The served model: everything known about it once it is loaded, in one immutable object."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from batching.types import ModelInfo
from server.grammar.compiler import Grammars
from server.model.defaults import Defaults
from server.model.text import Text
from server.replies import Model
from server.settings import WHOLE_ANSWER, Settings
from server.version import VERSION

RAGFLOW_GUIDE = 1543
"""Tokens of instructions that RAGFlow adds to a prompt after trimming it."""


@dataclass(frozen=True)
class ServedModel:
    """A model that is ready to serve.

    `text` is its tokenizer and chat template, `info` the engine's description of it, `defaults` its recommended
    sampling, and `settings` the operator's limits.
    """

    settings: Settings
    info: ModelInfo
    text: Text
    grammars: Grammars
    defaults: Defaults

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        """The union of the tokenizer's and the engine's."""
        return self.text.stop_token_ids | self.info.stop_token_ids

    @cached_property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: the same as long as answers with a seed are."""
        return fingerprint(self.settings, self.info)

    @property
    def advertised_window(self) -> int:
        """The prompt length that clients should trim to: the true window less everything they do not count.

        Clients count with their own tokenizer (a tenth is reserved for that), RAGFlow adds instructions, and the answer
        needs room. Never less than half of the true window.
        """
        window = self.info.context_window
        answer = min(self.settings.default_max_tokens or WHOLE_ANSWER, self.settings.max_output_tokens)
        return max(window // 2, int(0.9 * (window - RAGFLOW_GUIDE - answer)))


def fingerprint(settings: Settings, info: ModelInfo) -> str:
    """A digest of what answers with a seed depend on, as far as the process can tell."""
    facts = (VERSION, settings.model, info.device, info.dtype, info.parameters, info.joins, settings.batch_invariant)
    return f"fp_{sha256(repr(facts).encode()).hexdigest()[:12]}"


def card(name: str, created: int, model: ServedModel | None) -> Model:
    """The entry for a name in `/v1/models`; without context lengths while the model loads.

    vLLM's clients read `max_model_len`. RAGFlow, which fills the window it finds, reads `context_length` first.
    """
    shown: Model = {"id": name, "object": "model", "created": created, "owned_by": "microbatch"}
    if model is not None:
        shown["max_model_len"] = model.info.context_window
        shown["context_length"] = model.advertised_window
    return shown
