"""Compiles grammars that constrain answers (JSON, a JSON Schema, a pattern, or tool calls) for the served tokenizer.

A client's schema or pattern is first tried in another process, which can be killed. Once it is known to be cheap, it is
compiled here, anew for each request. Clients take turns at both, and results of trials are cached within bounds.
`Grammars` runs on the event loop; a compiled grammar may be used on any thread.

Objects have their properties in the schema's order, and the only white space is one optional space after a comma or
colon, so that a weak model cannot generate endless white space.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from llguidance import LLTokenizer
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace

from server.grammar.json_schema import Schema, SchemaError, bound
from server.grammar.pattern import Pattern, check
from server.grammar.process import STACK
from server.grammar.sandbox import Sandbox, Unavailable, Written
from server.grammar.source import START, Part, PartError, Plan, assembled, matcher_of
from server.http.errors import ApiError, bad_request
from server.output.prefix_tree import any_of
from server.output.reasoning import THINK, ThinkTags, ThoughtState
from server.output.tool_calls import ToolFormat
from server.threads import FairSlots, Full

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast


logger = logging.getLogger(__name__)

MAX_CALLS = 16  # in one answer
SLOTS = 2  # grammars tried at once, and compiled at once, each for a different client
MAX_TRIALS = 64  # waiting trials per client; each takes 20 ms, at most a second
MAX_WAITING = 1024  # known grammars per client waiting to be compiled; each takes a millisecond or two
HELD_BYTES = 2**30  # memory of the grammars of waiting and running requests
SHARE = 0.5  # the part of it that one client may use

NO_ARGUMENTS: Schema = {"type": "object", "properties": {}}
HARMLESS: tuple[Schema, ...] = ({"type": "object"}, NO_ARGUMENTS)
"""Schemas that need no trial."""


class Grammars:
    """Compiles for one tokenizer. Construction takes seconds of CPU for a large vocabulary, once at startup."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        thinking: ThinkTags | None = THINK,
        *,
        time_limit: float = 10.0,
        known_bytes: int = 2**24,
        held_bytes: int = HELD_BYTES,
    ) -> None:
        """`thinking`: the model's thinking tags. `time_limit`: seconds that a request waits for its client's turn."""
        # Like llguidance.hf, but without its copy of the tokenizer, which takes a third of the time and only serves to
        # switch off what `Text` has already switched off.
        source = _readable(tokenizer.backend_tokenizer)
        self._tokens = LLTokenizer(source, eos_token=tokenizer.eos_token_id)
        self._added = tokenizer.get_added_vocab()
        self._marks = re.compile(f"({any_of(self._added)})" if self._added else r"(?!)")
        special = ",".join(str(token) for token in self._added.values() if self._tokens.is_special_token(token))
        # Tokens, because a thought that is ended at its budget may be cut within a character, which no text can be.
        self._any_text = f"<[^{special}]>*"
        self._thinking = thinking
        self._time_limit = time_limit
        self._sandbox = Sandbox(source, tokenizer.eos_token_id)
        self._trials = FairSlots(SLOTS, MAX_TRIALS)
        self._compilers = FairSlots(SLOTS, MAX_WAITING)
        self._trying: dict[tuple[str, str], Trial] = {}
        self._known = Known(known_bytes)
        self._held_bytes = held_bytes
        self._held: WeakKeyDictionary[TokenGrammar, tuple[str, int]] = WeakKeyDictionary()

    def warm(self) -> None:
        """Start the trial process, so that the first schema need not wait for it. Returns at once; any thread."""
        threading.Thread(target=self._sandbox.start, name="grammar-sandbox", daemon=True).start()

    async def of(
        self, part: Part | Pattern, *, thought: ThoughtState = ThoughtState.UNKNOWN, client: str = ""
    ) -> TokenGrammar:
        """A grammar of what matches a pattern, or of a schema's values, for drafts up to 2020-12.

        Raises `ApiError` 400 for one that fails.

        A strict schema may only use what can be enforced. Otherwise unenforceable keywords and formats are left to
        the model, and `oneOf` is read as `anyOf`. `thought`: whether the answer starts with a thought, which is
        unconstrained. `client`: whose turn the compilation takes.
        """
        return await self.compile(Plan((*self._start(thought), "answer: a0"), (part,)), client)

    async def tool_calls(
        self,
        tools: Sequence[tuple[str, Schema | None]],
        written: ToolFormat,
        *,
        parallel: bool = True,
        otherwise: Part | Pattern | None = None,
        thought: ThoughtState = ThoughtState.UNKNOWN,
        client: str = "",
        param: str = "tools",
    ) -> TokenGrammar:
        """A grammar of calls of `tools` (name, schema of an object), `written` in the model's format; of a single call
        if not `parallel`.

        With `otherwise`: calls or what that allows. A tool without parameters takes an empty object. Schemas are read
        as not strict; they came in the field `param`. Raises `ApiError` 400.
        """
        separator = self._literal(written.separator)
        more = f" ({separator} call){{0,{MAX_CALLS - 1}}}" if parallel else ""
        value = f" | a{len(tools)}" if otherwise else ""
        rules = [*self._start(thought), f"answer: call{more}{value}"]
        rules.append("call: " + " | ".join(f"f{n}" for n in range(len(tools))))
        for n, (name, _) in enumerate(tools):
            before, after = map(self._literal, written.around(name))
            rules.append(f"f{n}: {before} a{n} {after}")
        schemas = [NO_ARGUMENTS if schema is None else {"type": "object"} | schema for _, schema in tools]
        parts = [Part(schema, strict=False, param=param) for schema in schemas]
        return await self.compile(Plan(tuple(rules), (*parts, *([otherwise] if otherwise else []))), client)

    def _literal(self, text: str) -> str:
        """Text as part of a grammar; added tokens in it are matched as tokens."""
        pieces = filter(None, self._marks.split(text))
        return " ".join(f"<[{self._added[p]}]>" if p in self._added else json.dumps(p) for p in pieces)

    def _start(self, state: ThoughtState) -> tuple[str, ...]:
        """Rules for what precedes the answer: the rest of a thought, or an optional thought."""
        if self._thinking is None or not state.to_come:
            return (START,)
        opening, closing = map(self._literal, self._thinking)
        marked = set(self._thinking) <= self._added.keys()
        rest = (f"{self._any_text} {closing}" if marked else "spelled") + r' "\n\n"'
        thought = rest if state is ThoughtState.OPENED else f"({opening} {rest})?"
        # For a model whose closing tag is not a single token.
        spelled = re.escape(self._thinking.close).replace("/", r"\/")
        return f"start: {thought} answer", rf"spelled[lazy]: /(.|\n)*{spelled}/"

    # From a plan to a compiled grammar

    async def compile(self, plan: Plan, client: str = "") -> TokenGrammar:
        """The plan's grammar.

        Raises `ApiError`: 400 if it cannot be compiled within the limits or at all, 503 if it cannot be tried now.
        """
        key = await asyncio.to_thread(_checked, plan)
        written = self._known.get(key) or await self._tried(plan, key, client)
        async with self._turn(self._compilers, client):
            self._check_room(client, written.memory)
            grammar = await on_a_thread(partial(TokenGrammar, written.source, self._tokens))
            self._held[grammar] = client, written.memory
        return grammar

    async def _tried(self, plan: Plan, key: str, client: str) -> Written:
        """The result of trying the plan, which is done once however many of the client's requests wait for it, and no
        longer than one does."""
        place = client, key
        trial = self._trying.get(place)
        if trial is None:
            # A task of its own, because the first request may be cancelled.
            trial = self._trying[place] = Trial(asyncio.create_task(self._try(plan, key, client)))
            trial.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # marks it as retrieved
        trial.waiting += 1
        try:
            return await asyncio.shield(trial.task)
        finally:
            trial.waiting -= 1
            if not trial.waiting:
                del self._trying[place]  # at once: who comes now must not wait for what has been cancelled
                trial.task.cancel()

    async def _try(self, plan: Plan, key: str, client: str) -> Written:
        schemas = [part.schema for part in plan.parts if isinstance(part, Part) and part.schema in HARMLESS]
        if len(schemas) == len(plan.parts):
            written = Written(assembled(plan, schemas), memory=0)
        else:
            async with self._turn(self._trials, client):
                try:
                    # Another client's request may have tried it meanwhile.
                    written = self._known.get(key) or await self._sandbox.write(plan)
                except PartError as error:
                    raise _refused(str(error), error.param) from None
                except Unavailable:
                    logger.exception("cannot try grammars")
                    raise _busy() from None
        self._known.add(key, written)
        return written

    @asynccontextmanager
    async def _turn(self, slots: FairSlots, client: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._time_limit) as waiting, slots.of(client):
                waiting.reschedule(None)
                yield
        except (TimeoutError, Full):
            raise _busy() from None

    def _check_room(self, client: str, memory: int) -> None:
        """Refuses to compile large grammars for more requests than memory allows. Raises `ApiError` 503."""
        held = list(self._held.values())
        mine = sum(size for name, size in held if name == client)
        everyones = sum(size for _, size in held)
        if memory and (mine + memory > SHARE * self._held_bytes or everyones + memory > self._held_bytes):
            raise _busy()


@dataclass
class Trial:
    """A trial and the number of requests that wait for it."""

    task: asyncio.Task[Written]
    waiting: int = 0


class Known:
    """An LRU cache of tried grammars by their plans' keys, bounded in bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = 0
        self._kept: OrderedDict[str, Written] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Written | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def add(self, key: str, written: Written) -> None:
        if key not in self._kept:
            self._kept[key] = written
            self._bytes += len(key) + len(written.source)
        while self._bytes > self._most:
            key, written = self._kept.popitem(last=False)
            self._bytes -= len(key) + len(written.source)


async def on_a_thread(work: Callable[[], TokenGrammar]) -> TokenGrammar:
    """The result of `work` on a daemon thread with a deep stack, which cannot keep the process alive."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[TokenGrammar] = loop.create_future()

    def settle(set_it: Callable[[], None]) -> None:
        if not answer.done():
            set_it()

    def run() -> None:
        if sys.platform == "linux":  # where a single thread's priority can be lowered
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
        try:
            done = partial(answer.set_result, work())
        except BaseException as error:
            done = partial(answer.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed, so nothing waits for the result
            loop.call_soon_threadsafe(settle, done)

    usual = threading.stack_size(STACK)
    try:
        threading.Thread(target=run, name="grammar-compiler", daemon=True).start()
    finally:
        threading.stack_size(usual)
    return await answer


def _checked(plan: Plan) -> str:
    """The plan's key, after checking its size. Takes up to 15 ms. Raises `ApiError` 400."""
    try:
        bound(*(part.schema for part in plan.parts if isinstance(part, Part)))
        for part in plan.parts:
            if isinstance(part, Pattern):
                check(part)
    except SchemaError as error:
        raise _refused(str(error), plan.parts[-1].param) from None
    return plan.key


# Errors. None repeats client input except names of keywords and formats.


def _refused(sentence: str, param: str) -> ApiError:
    return bad_request(sentence, param, "unsupported_schema")


def _busy() -> ApiError:
    message = "Other schemas and grammars are being compiled; try again in a few seconds."
    return ApiError(503, message, "server_error", "compiler_busy", headers={"retry-after": "5"})


class TokenGrammar:
    """`batching.types.Grammar` over llguidance, for the rows of one request.

    All copies of a matcher share a lexer and its resource limit. Once that is exhausted, all their masks are silently
    wrong, so no two requests may share a grammar.
    """

    def __init__(self, source: str, tokens: LLTokenizer) -> None:
        """Compiles the source, which takes milliseconds. Raises ValueError if it does not compile."""
        self._matcher = matcher_of(source, tokens)  # stays in its initial state
        self._tokens = tokens
        if self._matcher.is_error():
            raise ValueError(_first_line(self._matcher.get_error()))

    def matcher(self) -> TokenMatcher:
        return TokenMatcher(self._matcher.deep_copy(), self._tokens)


class TokenMatcher:
    """`batching.types.Matcher` over llguidance."""

    def __init__(self, matcher: LLMatcher, tokens: LLTokenizer) -> None:
        self._matcher = matcher
        self._vocab_size = tokens.vocab_size
        self._words = -(-tokens.vocab_size // 32)
        # The library's signals that the text may end, for which the caller has its own.
        self._ends = [(token >> 5, ~np.left_shift(np.int32(1), np.int32(token & 31))) for token in tokens.eos_tokens]

    def fill(self, allowed: NDArray[np.int32]) -> bool:
        """Never allows tokens that only the tokenizer or only the model has."""
        fits = len(allowed) >= self._words
        mask = allowed[: self._words] if fits else np.zeros(self._words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise ValueError(_first_line(self._matcher.get_error()))
        for word, others in self._ends:
            mask[word] &= others
        if not fits:
            allowed[:] = mask[: len(allowed)]
        return self._matcher.is_accepting()

    def advance(self, token: int) -> None:
        if token >= self._vocab_size or not self._matcher.consume_token(token):
            raise ValueError(f"token {token} is not allowed here")


def _readable(tokenizer: Tokenizer) -> str:
    """Its JSON, with SentencePiece's decoder, which llguidance does not know by its name, written out in steps."""
    source = tokenizer.to_str()
    if not isinstance(tokenizer.decoder, Metaspace):
        return source
    space = {"type": "Replace", "pattern": {"String": tokenizer.decoder.replacement}, "content": " "}
    steps = [space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return json.dumps(json.loads(source) | {"decoder": {"type": "Sequence", "decoders": steps}})


def _first_line(error: str) -> str:
    return (error.splitlines() or ["unknown"])[0][:200]
