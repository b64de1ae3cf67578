"""`POST /v1/responses`: OpenAI's Responses API over the path of chat completions. Nothing is stored."""

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import count
from typing import Annotated, Any, Literal, Self

import orjson
from anyio import to_thread
from pydantic import BeforeValidator, Discriminator, Field, ValidationError, model_validator
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from batching.errors import BatchingError
from batching.stream import Stream
from batching.types import Finish, Request
from server.body import read_body
from server.caller import Caller
from server.chat import ChatChoice, prepare, reader
from server.disconnect import until_disconnect
from server.errors import ApiError, from_batching
from server.message import MessageReader
from server.respond import RowsResponse, begun, usage
from server.response_events import Json, Output, frame
from server.schema import MAX_MESSAGES, Body, ChatRequest, Content, JsonSchema, Number, ResponseFormat, Tokens, explain, parse
from server.service import Service
from server.tools import MAX_TOOLS, CallId, Flag, Function, Name, NamedChoice, Tool, ToolChoice

STATELESS = "stored state is not kept here; send the whole conversation in the field input"
CHAT_FIELDS = {"messages": "input", "response_format": "text.format"}
"""What the chat request's fields are called here."""
