"""`POST /tokenize` and `POST /detokenize`: what the model would see of a text, and what ids mean."""

from typing import Any

import orjson

from server.chat import names_in, render
from server.endpoint import Endpoint
from server.errors import bad_request, thousands
from server.schema import DetokenizeRequest, TokenizeRequest
from server.served_model import ServedModel

MAX_STRINGS = 2**17
"""Tokens whose strings one answer tells: a few megabytes of JSON."""


class Tokenize(Endpoint[TokenizeRequest, dict[str, Any]]):
    kind = TokenizeRequest

    def encode(self, model: ServedModel, body: TokenizeRequest) -> dict[str, Any]:
        ids = token_ids(model, body)
        shown = {"token_strs": strings(model, ids)} if body.return_token_strs else {}
        tokens = orjson.Fragment(orjson.dumps(ids))
        return {"tokens": tokens, "count": len(ids), "max_model_len": model.info.context_window} | shown


class Detokenize(Endpoint[DetokenizeRequest, dict[str, Any]]):
    kind = DetokenizeRequest

    def encode(self, model: ServedModel, body: DetokenizeRequest) -> dict[str, Any]:
        if any(token >= model.info.vocab_size for token in body.tokens):
            raise bad_request("A token id is beyond the model's vocabulary.", "tokens")
        return {"prompt": model.text.decode(body.tokens)}


def token_ids(model: ServedModel, body: TokenizeRequest) -> tuple[int, ...]:
    """Raises `ApiError` 400."""
    if body.messages is None:
        return model.text.encode(body.prompt or "", special=body.add_special_tokens is not False)
    names = names_in(model.text, body.messages)
    rendered = render(model.text, body.messages, (), names, model.settings.thinking)
    return model.text.encode(rendered, special=bool(body.add_special_tokens))


def strings(model: ServedModel, ids: tuple[int, ...]) -> orjson.Fragment:
    """The text of each token, as JSON. Raises `ApiError` 400."""
    if len(ids) > MAX_STRINGS:
        raise bad_request(
            f"The text has {thousands(len(ids))} tokens, but the strings of {thousands(MAX_STRINGS)} at most can be "
            "told; shorten it.",
            "return_token_strs",
        )
    vocabulary = model.text.vocabulary
    return orjson.Fragment(orjson.dumps([vocabulary.bytes_of(token).decode(errors="replace") for token in ids]))
