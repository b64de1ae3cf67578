"""`POST /tokenize` and `POST /detokenize`: what the model would see of a text, and what ids mean."""

from functools import partial
from typing import Any

import orjson
from starlette.requests import Request as HttpRequest

from server.chat import names_in, render
from server.errors import bad_request, thousands
from server.request import read
from server.schema import DetokenizeRequest, TokenizeRequest
from server.service import Service

MAX_STRINGS = 2**17
"""Tokens whose strings one answer tells: a few megabytes of JSON."""


async def tokenize(http: HttpRequest) -> dict[str, Any]:
    service: Service = http.app.state.service
    asked = await read(http, TokenizeRequest)
    service.served_name(asked.model)
    return await service.encoders.run(partial(tokenized, service, asked), asked.size, http.state.caller)


def tokenized(service: Service, asked: TokenizeRequest) -> dict[str, Any]:
    """The answer, its long lists as JSON. Blocks for milliseconds: not on the event loop. Raises `ApiError` 400."""
    ids = encode(service, asked)
    shown = {"token_strs": strings(service, ids)} if asked.return_token_strs else {}
    tokens = orjson.Fragment(orjson.dumps(ids))
    return {"tokens": tokens, "count": len(ids), "max_model_len": service.info.context_window} | shown


def strings(service: Service, ids: tuple[int, ...]) -> orjson.Fragment:
    """The text of each token, as JSON. Raises `ApiError` 400."""
    if len(ids) > MAX_STRINGS:
        raise bad_request(
            f"The text has {thousands(len(ids))} tokens, but the strings of {thousands(MAX_STRINGS)} at most can be "
            "told; shorten it.",
            "return_token_strs",
        )
    vocabulary = service.text.vocabulary
    return orjson.Fragment(orjson.dumps([vocabulary.bytes_of(token).decode(errors="replace") for token in ids]))


def encode(service: Service, asked: TokenizeRequest) -> tuple[int, ...]:
    """The ids. Blocks for milliseconds: not on the event loop. Raises `ApiError` 400."""
    if asked.messages is None:
        return service.text.encode(asked.prompt or "", special=asked.add_special_tokens is not False)
    names = names_in(service.text, asked.messages)
    rendered = render(service.text, asked.messages, (), names, service.settings.thinking)
    return service.text.encode(rendered, special=bool(asked.add_special_tokens))


async def detokenize(http: HttpRequest) -> dict[str, Any]:
    service: Service = http.app.state.service
    asked = await read(http, DetokenizeRequest)
    service.served_name(asked.model)
    return {"prompt": await service.encoders.run(partial(decode, service, asked), asked.size, http.state.caller)}


def decode(service: Service, asked: DetokenizeRequest) -> str:
    """The text of the ids. Blocks for milliseconds: not on the event loop. Raises `ApiError` 400."""
    if any(token >= service.info.vocab_size for token in asked.tokens):
        raise bad_request("A token id is beyond the model's vocabulary.", "tokens")
    return service.text.decode(asked.tokens)
