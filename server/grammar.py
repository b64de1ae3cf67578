"""What a request's answer must look like, compiled for the served tokenizer: JSON, a JSON Schema, or tool calls.

Compiling is done by llguidance on a helper thread, at most two at a time, within limits that are checked before and a
time limit; compiled grammars are kept in a bounded cache. `Grammars` belongs to the event loop, and a compiled grammar
to any thread.

Objects have their properties in the schema's order, and the only white space is one optional blank after a comma and
after a colon, so that a weak model cannot go on with white space for ever.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from server.errors import ApiError, bad_request
from server.grammar_source import Part, PartError, Plan, matcher_of, write
from server.schema_check import SchemaError, bound
from server.schema_walk import Schema

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast


MAX_CALLS = 16  # in one answer

THREADS = 2
STACK = 128 * 2**20
"""Bytes of stack for a compiling thread, which take memory only where used. A chain of references recurses in native
code: 2,000 of them overflow the usual 8 MiB, which would end the process."""


class TokenMatcher:
    """`batching.types.Matcher` over llguidance."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._words = -(-vocab_size // 32)
        self._eos = eos

    def fill(self, allowed: NDArray[np.int32]) -> bool:
        """See `Matcher`. Tokens that only the tokenizer or only the model has are never allowed."""
        fits = len(allowed) >= self._words
        mask = allowed[: self._words] if fits else np.zeros(self._words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise ValueError(_first_line(self._matcher.get_error()))
        for token in self._eos:  # the library's way to say that the text may end; the caller has its own
            mask[token >> 5] &= ~np.left_shift(np.int32(1), np.int32(token & 31))
        if not fits:
            allowed[:] = mask[: len(allowed)]
        return self._matcher.is_accepting()

    def advance(self, token: int) -> None:
        """See `Matcher`."""
        if token >= self._vocab_size or not self._matcher.consume_token(token):
            raise ValueError(f"token {token} may not come here")


class TokenGrammar:
    """`batching.types.Grammar` over llguidance. The matcher it holds stays at its beginning."""

    def __init__(self, matcher: LLMatcher, tokens: LLTokenizer) -> None:
        self._matcher = matcher
        self._tokens = tokens

    def matcher(self) -> TokenMatcher:
        return TokenMatcher(self._matcher.deep_copy(), self._tokens.vocab_size, self._tokens.eos_tokens)


class Grammars:
    """Compiles for one tokenizer. Its construction takes seconds of CPU for a large vocabulary: once, at the start."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        time_limit: float = 5.0,
        cached: int = 128,
        cached_bytes: int = 2**21,
    ) -> None:
        # As llguidance.hf does, which copies the tokenizer first: a third of the time, and only to switch off what
        # `Text` has switched off.
        self._tokens = LLTokenizer(tokenizer.backend_tokenizer.to_str(), eos_token=tokenizer.eos_token_id)
        self._added = tokenizer.get_added_vocab()
        self._time_limit = time_limit
        self._slots = asyncio.Semaphore(THREADS)
        self._cache: OrderedDict[str, TokenGrammar] = OrderedDict()
        self._cached = cached
        self._cached_bytes = cached_bytes
        self._bytes = 0

    def __len__(self) -> int:
        """How many compiled grammars are kept."""
        return len(self._cache)

    async def json(self, form: Part, *, thinking: bool = False) -> TokenGrammar:
        """The values of a schema, of drafts up to 2020-12. Raises `ApiError` 400 that names what is wrong with it.

        A strict schema may only use what can be enforced. In another one, keywords and formats that cannot are left
        to the model, and `oneOf` is read as `anyOf`. `thinking`: the answer starts with the model's thoughts, which
        are free.
        """
        return await self.compile(Plan((f"start: {self._thoughts(thinking)} a0",), (form,)))

    async def tool_calls(
        self,
        tools: Sequence[tuple[str, Schema | None]],
        around: Callable[[str], tuple[str, str]],
        *,
        named: str | None = None,
        parallel: bool = True,
        otherwise: Part | None = None,
        thinking: bool = False,
        param: str = "tools",
    ) -> TokenGrammar:
        """One or more calls of `tools` (name, schema of the parameters), line by line; one if not `parallel`.

        With `named`, exactly one call, of that function. With `otherwise`, calls or a value of that schema. A tool
        without parameters takes an empty object. Schemas are read as ones that are not strict. `around` tells what the
        model writes before and after a function's arguments (`ToolFormat.around`). Raises `ApiError` 400.
        """
        offered = [(name, schema) for name, schema in tools if named in (None, name)]
        if not offered:
            raise bad_request("There is no function of the name that tool_choice asks for.", "tool_choice")
        more = f' ("\\n" call){{0,{MAX_CALLS - 1}}}' if parallel and named is None else ""
        form = f" | a{len(offered)}" if otherwise else ""
        rules = [f"start: {self._thoughts(thinking)} (call{more}{form})"]
        rules.append("call: " + " | ".join(f"f{n}" for n in range(len(offered))))
        for n, (name, _) in enumerate(offered):
            before, after = map(self._literal, around(name))
            rules.append(f"f{n}: {before} a{n} {after}")
        parts = [Part(_parameters(schema, param), strict=False, param=param) for _, schema in offered]
        return await self.compile(Plan(tuple(rules), (*parts, *([otherwise] if otherwise else []))))

    def _literal(self, text: str) -> str:
        """Text as a part of a grammar, with the tokenizer's own tokens where it holds one."""
        marks = sorted((mark for mark in self._added if mark in text), key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, marks))})", text) if marks else [text]
        return " ".join(f"<[{self._added[p]}]>" if p in self._added else json.dumps(p) for p in pieces if p)

    def _thoughts(self, thinking: bool) -> str:
        """What comes before the answer: thoughts, where the model marks them with tokens of its own."""
        if not thinking or not {"<think>", "</think>"} <= self._added.keys():
            return ""
        return f"{self._literal('<think>')} /(.|\\n)*/ {self._literal('</think>')} {self._literal(chr(10) * 2)}"

    # The cache and the threads

    async def compile(self, plan: Plan) -> TokenGrammar:
        """The plan's grammar, from the cache if it is there.

        Raises `ApiError`: 400 for what cannot be compiled in the time limit or at all, 503 if the threads are taken.
        """
        _check_size(plan)
        key = plan.key
        if (grammar := self._known(key)) is not None:
            return grammar
        try:
            async with asyncio.timeout(self._time_limit):
                await self._slots.acquire()
        except TimeoutError:
            raise _busy() from None
        if (grammar := self._known(key)) is not None:  # another request asked for the same
            self._slots.release()
            return grammar
        return await self._wait_for(self._start(plan, key), plan)

    def _known(self, key: str) -> TokenGrammar | None:
        grammar = self._cache.get(key)
        if grammar is not None:
            self._cache.move_to_end(key)
        return grammar

    def _start(self, plan: Plan, key: str) -> asyncio.Future[TokenGrammar]:
        """A new thread's answer. Its slot is free again when it ends, whether anybody still waits or not."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[TokenGrammar] = loop.create_future()

        def work() -> None:
            try:
                grammar = build(plan, self._tokens)
            except BaseException as error:
                done = partial(self._fail, error, answer)
            else:
                done = partial(self._keep, key, grammar, answer)
            with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                loop.call_soon_threadsafe(done)

        usual = threading.stack_size(STACK)
        try:
            # A daemon, so that a compilation in hand cannot keep the process from ending.
            threading.Thread(target=work, name="grammar-compiler", daemon=True).start()
        except BaseException:
            self._slots.release()
            raise
        finally:
            threading.stack_size(usual)
        return answer

    def _keep(self, key: str, grammar: TokenGrammar, answer: asyncio.Future[TokenGrammar]) -> None:
        self._slots.release()
        if key not in self._cache:
            self._bytes += len(key)
        self._cache[key] = grammar
        while len(self._cache) > self._cached or (self._bytes > self._cached_bytes and len(self._cache) > 1):
            source, _ = self._cache.popitem(last=False)
            self._bytes -= len(source)
        if not answer.done():
            answer.set_result(grammar)

    def _fail(self, error: BaseException, answer: asyncio.Future[TokenGrammar]) -> None:
        self._slots.release()
        if not answer.done():
            answer.set_exception(error)

    async def _wait_for(self, answer: asyncio.Future[TokenGrammar], plan: Plan) -> TokenGrammar:
        try:
            async with asyncio.timeout(self._time_limit):
                return await answer
        except TimeoutError:
            raise _refused("The schema takes too long to compile; make it simpler.", plan.parts[0].param) from None


def build(plan: Plan, tokens: LLTokenizer) -> TokenGrammar:
    """Check and compile, on a helper thread. Raises `ApiError` 400."""
    try:
        return TokenGrammar(matcher_of(write(plan, tokens), tokens), tokens)
    except PartError as error:
        raise _refused(str(error), error.param) from None


def _parameters(schema: Schema | None, param: str) -> Schema:
    """The schema of a tool's arguments, which are an object whatever it says."""
    if schema is None:
        return {"type": "object", "properties": {}}
    if schema.get("type", "object") != "object":
        raise _refused("The parameters of a function must be of type object.", param)
    return {"type": "object"} | schema


def _check_size(plan: Plan) -> None:
    try:
        bound(*(part.schema for part in plan.parts))
    except SchemaError as error:
        raise _refused(str(error), plan.parts[-1].param) from None


# Errors. None repeats what was sent but for names of keywords and formats.


def _refused(sentence: str, param: str) -> ApiError:
    return bad_request(sentence, param, "unsupported_schema")


def _busy() -> ApiError:
    message = "Other schemas are being compiled; try again in a few seconds."
    return ApiError(503, message, "server_error", "compiler_busy", headers={"retry-after": "5"})


def _first_line(error: str) -> str:
    return (error.splitlines() or ["unknown"])[0][:200]
