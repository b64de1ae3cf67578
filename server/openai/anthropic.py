"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's Messages API on top of chat completions."""

from collections.abc import Sequence

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from batching.stream import Stream
from server.model.served_model import ServedModel
from server.openai import anthropic_replies as replies
from server.openai.anthropic_output import MessageAnswer
from server.openai.anthropic_request import CountRequest, MessageRequest, as_chat
from server.openai.chat import ChatEndpoint, Conversation, EventReader, prompt_length
from server.openai.endpoint import Answer, Endpoint
from server.openai.requests import ChatRequest


class Messages(ChatEndpoint[MessageRequest]):
    """`POST /v1/messages`."""

    kind = MessageRequest

    async def handle(self, http: HttpRequest) -> Response:
        return named(http, await super().handle(http))

    def as_chat(self, body: MessageRequest) -> ChatRequest:
        return as_chat(body)

    def answer(
        self, model: ServedModel, name: str, body: MessageRequest, encoded: Conversation, streams: Sequence[Stream]
    ) -> Answer:
        [stream] = streams
        return MessageAnswer(name, stream, EventReader(stream, model.text, encoded))


class CountTokens(Endpoint[CountRequest, replies.Counted]):
    """`POST /v1/messages/count_tokens`."""

    kind = CountRequest

    async def handle(self, http: HttpRequest) -> Response:
        return named(http, await super().handle(http))

    def encode(self, model: ServedModel, body: CountRequest) -> replies.Counted:
        return {"input_tokens": prompt_length(model, as_chat(body))}


def named(http: HttpRequest, response: Response) -> Response:
    """The response with the request's id in the header that Anthropic's clients read."""
    response.headers["request-id"] = http.state.caller.request_id
    return response
