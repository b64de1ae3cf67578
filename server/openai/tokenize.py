"""`POST /tokenize` and `POST /detokenize`: text to token ids as the model sees them, and back."""

import orjson

from server import replies
from server.http.errors import bad_request, thousands
from server.model.served_model import ServedModel
from server.openai.chat import names_in, render
from server.openai.endpoint import Endpoint
from server.openai.requests import DetokenizeRequest, TokenizeRequest

MAX_STRINGS = 2**17
"""Limit on token strings in one answer: a few megabytes of JSON."""


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
    names = names_in(model.text, body.messages)
    rendered = render(model.text, body.messages, (), names, model.settings.thinking)
    return model.text.encode(rendered, special=bool(body.add_special_tokens))


def strings(model: ServedModel, ids: tuple[int, ...]) -> list[str]:
    """The text of each token. Raises `ApiError` 400."""
    if len(ids) > MAX_STRINGS:
        raise bad_request(
            f"The text has {thousands(len(ids))} tokens, but strings can be returned for at most "
            f"{thousands(MAX_STRINGS)}; shorten it.",
            "return_token_strs",
        )
    vocabulary = model.text.vocabulary
    return [vocabulary.bytes_of(token).decode(errors="replace") for token in ids]
