"""`POST /tokenize` and `POST /detokenize`: text to token ids as the model sees them, and back."""

from typing import Annotated, Self

import orjson
from pydantic import Field, model_validator

from server import replies
from server.fields import MAX_ITEMS, Flag, RequestBody, TokenId
from server.http.errors import bad_request, thousands
from server.model.served_model import ServedModel
from server.openai.endpoint import Endpoint
from server.openai.messages import Dialogue, Messages, names_in, render
from server.openai.prefill import prefill_of
from server.openai.requests import UNSUPPORTED

MAX_STRINGS = 2**17
"""Limit on token strings in one answer: a few megabytes of JSON."""


class TokenizeRequest(RequestBody, Dialogue):
    """`POST /tokenize`: a text, or a conversation as the model sees it."""

    unsupported = UNSUPPORTED

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: Flag | None = None
    """Add the tokenizer's special tokens, such as a beginning-of-sequence token. By default true for a prompt and
    false for messages, whose chat template adds them."""
    return_token_strs: Flag | None = None
    """Also return each token as the vocabulary spells it."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("one of the fields prompt and messages must be given")
        return self


class DetokenizeRequest(RequestBody):
    """`POST /detokenize`."""

    tokens: Annotated[list[TokenId], Field(max_length=MAX_ITEMS, fail_fast=True)]


class Tokenize(Endpoint[TokenizeRequest, orjson.Fragment]):
    kind = TokenizeRequest

    def encode(self, model: ServedModel, body: TokenizeRequest) -> orjson.Fragment:
        return orjson.Fragment(orjson.dumps(tokenized(model, body)))  # encoded here, because it can be large


class Detokenize(Endpoint[DetokenizeRequest, replies.Detokenized]):
    kind = DetokenizeRequest

    def encode(self, model: ServedModel, body: DetokenizeRequest) -> replies.Detokenized:
        if any(token >= model.info.vocab_size for token in body.tokens):
            raise bad_request("A token id is beyond the model's vocabulary.", "tokens")
        return {"prompt": model.text.decode(body.tokens)}


def tokenized(model: ServedModel, body: TokenizeRequest) -> replies.Tokenized:
    ids = token_ids(model, body)
    result: replies.Tokenized = {
        "tokens": list(ids),
        "count": len(ids),
        "max_model_len": model.info.context_window,
    }
    if body.return_token_strs:
        result["token_strs"] = strings(model, ids)
    return result


def token_ids(model: ServedModel, body: TokenizeRequest) -> tuple[int, ...]:
    """Raises `ApiError` 400."""
    if body.messages is None:
        return model.text.encode(body.prompt or "", special=body.add_special_tokens is not False)
    names = names_in(body.messages, body.offered)
    continued = prefill_of(body.messages).field if body.continue_final_message else None
    rendered = render(model.text, body.messages, body, names, model.settings.thinking, continued)
    return model.text.encode(rendered, special=bool(body.add_special_tokens))


def strings(model: ServedModel, ids: tuple[int, ...]) -> list[str]:
    """Each token as the vocabulary spells it. Raises `ApiError` 400."""
    if len(ids) > MAX_STRINGS:
        raise bad_request(
            f"The text has {thousands(len(ids))} tokens, but strings can be returned for at most "
            f"{thousands(MAX_STRINGS)}; shorten it.",
            "return_token_strs",
        )
    return [model.text.vocabulary.spelling(token) for token in ids]
