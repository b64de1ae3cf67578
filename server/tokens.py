"""`POST /tokenize` and `POST /detokenize`: what the model would see of a text, and what ids mean."""

from functools import partial
from typing import Any

from anyio import to_thread
from starlette.requests import Request as HttpRequest

from server.chat import render
from server.errors import bad_request
from server.request import read
from server.schema import DetokenizeRequest, TokenizeRequest
from server.service import Service


async def tokenize(http: HttpRequest) -> dict[str, Any]:
    service: Service = http.app.state.service
    asked = await read(http, TokenizeRequest)
    service.served_name(asked.model)
    ids = await to_thread.run_sync(partial(encode, service, asked), limiter=service.encoders)
    shown = {"token_strs": [service.text.decode([token]) for token in ids]} if asked.return_token_strs else {}
    return {"tokens": list(ids), "count": len(ids), "max_model_len": service.info.context_window} | shown


def encode(service: Service, asked: TokenizeRequest) -> tuple[int, ...]:
    """The ids. Blocks for milliseconds: not on the event loop. Raises `ApiError` 400."""
    if asked.messages is None:
        return service.text.encode(asked.prompt or "", special=asked.add_special_tokens is not False)
    rendered = render(service.text, asked.messages, (), service.settings.thinking)
    return service.text.encode(rendered, special=bool(asked.add_special_tokens))


async def detokenize(http: HttpRequest) -> dict[str, Any]:
    service: Service = http.app.state.service
    asked = await read(http, DetokenizeRequest)
    service.served_name(asked.model)
    if any(token >= service.info.vocab_size for token in asked.tokens):
        raise bad_request("A token id is beyond the model's vocabulary.", "tokens")
    return {"prompt": service.text.decode(asked.tokens)}
