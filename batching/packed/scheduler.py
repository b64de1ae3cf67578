"""The packed engine's scheduler: decides which rows are computed, join, are preempted and leave. Worker thread only.

An iteration is one forward pass, in which every running sequence gets its next token and waiting prompts are computed
with what room is left, and the delivery of sampled tokens. Of a device that works beside the host, those are of the
iteration before: its next work is queued before it finishes the last. A row that turns out to have finished has then
sampled one extra token, which is dropped.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import count

from batching.engine import Steps
from batching.packed.attention import Chunk
from batching.packed.gap_limit import GapLimit
from batching.packed.kv_cache import BlockPool, blocks_for
from batching.packed.runner import Runner, RunningSequence, SamplerOutput
from batching.scoring import PIECE, prompt_logprobs
from batching.stream import Row
from batching.types import TokenLogprob

PASS_TOKENS = 256
"""What another forward pass costs besides its tokens, as a number of tokens: on an H100 about 3 ms."""

ROWS_PER_SPARE_BLOCK = 2
"""A row starts only if it leaves one block for this many running sequences to grow into, so that few are preempted."""


class Scheduler:
    """One batch, from its first rows to the end of the last one that joined.

    The number of tokens in a forward pass, including those of decoding sequences, bounds how long these are delayed:
    `prefill_chunk` while one prompt is computed with them, twice as many with more prompts. While rows that wait for
    prefill are more than half as many as those that decode, larger passes serve many sooner and delay few, so each
    takes an eighth of what waits; and a lone prompt has passes of up to `max_prefill_tokens`. A `gap_limit` decides
    instead while rows decode. A pass uses all that it is padded to; if its prompts end before that, the last of them
    waits for a pass of its own where both are less work. With `one_prompt_a_pass` no prompt shares a pass with another
    sequence, so that what is computed for it does not depend on other rows; and nobody is preempted, because a prefill
    of output tokens may round otherwise than decode steps.

    A row starts with the blocks that its tokens need and gets more as it grows. When none are left, the youngest is
    preempted: its tokens are kept, and recomputed once there is room. Its next token is the same, because sampling
    noise depends only on seed, position and token. The oldest is never preempted, so every row finishes.
    """

    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        steps: Steps,
        *,
        prefill_chunk: int,
        max_prefill_tokens: int,
        gap_limit: GapLimit | None = None,
        one_prompt_a_pass: bool = False,
    ) -> None:
        self._runner = runner
        self._pool = pool
        self._steps = steps
        self._prefill_chunk = prefill_chunk
        self._max_prefill_tokens = max_prefill_tokens
        self._gap_limit = gap_limit
        self._one_prompt_a_pass = one_prompt_a_pass
        self._free_slots = list(range(runner.num_slots))
        self._arrivals = count()
        self._waiting: deque[RunningSequence] = deque()
        self._prefilling: list[RunningSequence] = []  # their prompts are incomplete, in order of arrival
        self._decoding: list[RunningSequence] = []
        self._in_flight: deque[SamplerOutput] = deque()
        self._is_full = False  # whether the first waiting sequence found no room last time

    def run(self, rows: Sequence[Row]) -> None:
        """Blocks until every row has finished, including those that join meanwhile."""
        self._wait(rows)
        if self._gap_limit:
            self._gap_limit.begin()
        try:
            while self._waiting or self._prefilling or self._decoding or self._in_flight:
                self._iterate()
                self._wait(self._steps.admit())
        finally:
            for sequence in [*self._waiting, *self._prefilling, *self._decoding]:  # empty unless it failed
                self._runner.remove_sequence(sequence)

    def _wait(self, rows: Iterable[Row]) -> None:
        """Clients take turns: one's prompts do not all come before a prompt of another that joins later."""
        for row in rows:
            sequence = RunningSequence(row, next(self._arrivals))
            turns = [other.turn for other in self._waiting if other.row.request.client == row.request.client]
            sequence.turn = turns[-1] + 1 if turns else self._waiting[0].turn if self._waiting else 0
            later = (place for place, other in enumerate(self._waiting) if other.turn > sequence.turn)
            self._waiting.insert(next(later, len(self._waiting)), sequence)
            self._pool.touch(row.request.salt, row.request.prompt)

    def _iterate(self) -> None:
        self._score()
        decoding = self._next_to_decode()
        if self._one_prompt_a_pass:
            launched = self._pass([], self._next_chunks(self._prefill_chunk)) + self._pass(decoding, [])
        else:
            chunks = self._chunks_beside(len(decoding))
            launched = self._pass(decoding, chunks, 0 if chunks else self._num_draft_tokens(decoding))
        # A device that works beside the host is busy with the newest ones.
        self._deliver(len(self._in_flight) - (launched if self._runner.works_beside_host else 0))

    def _chunks_beside(self, num_decoding: int) -> list[tuple[RunningSequence, Chunk]]:
        """Those of the next forward pass; fewer than there is room for where that saves more padding than it costs."""
        chunks = self._next_chunks(self._room_beside(num_decoding))
        tokens = num_decoding + sum(chunk.num_tokens for _, chunk in chunks)
        smaller = max((size for size in self._runner.mixed_sizes if size < tokens), default=0)
        rest = num_decoding + tokens - smaller  # of the pass after it
        if num_decoding < smaller and smaller + self._padded(rest) + PASS_TOKENS <= self._padded(tokens):
            return self._next_chunks(smaller - num_decoding)
        return chunks

    def _padded(self, num_tokens: int) -> int:
        return next((size for size in self._runner.mixed_sizes if size >= num_tokens), num_tokens)

    def _room_beside(self, num_decoding: int) -> int:
        """Maximum number of prompt tokens in a forward pass with this many decoding sequences."""
        prompts = [*self._prefilling, *(() if self._is_full else self._waiting)]
        if not num_decoding and len(prompts) == 1:
            return self._max_prefill_tokens
        if num_decoding and self._gap_limit:
            return self._gap_limit.room(self._max_prefill_tokens - num_decoding, self._prefill_chunk // 8)
        tokens = self._prefill_chunk * (2 if len(prompts) > 1 else 1)
        if len(prompts) * 2 > num_decoding:
            tokens = max(tokens, sum(sequence.remaining_prefill for sequence in prompts) // 8)
        tokens = min(self._padded(tokens), self._max_prefill_tokens)
        return max(tokens - num_decoding, tokens // 4)

    def _num_draft_tokens(self, decoding: Sequence[RunningSequence]) -> int:
        """How many tokens to draft for each: none if that would not pay, or the KV cache has no room for them."""
        wanted = self._runner.num_draft_tokens(decoding)
        return wanted if wanted and all(self._grow(sequence, wanted) for sequence in decoding) else 0

    def _pass(
        self,
        decoding: Sequence[RunningSequence],
        chunks: Sequence[tuple[RunningSequence, Chunk]],
        num_draft_tokens: int = 0,
    ) -> int:
        """Launch a forward pass and sampling for its sequences. Returns the number of sampler outputs this gives.

        A pass in which no prompt is completed has one, too: it is waited for as others are, so that a prompt of many
        passes is not launched as a whole, for whose end everybody else would have to wait.
        """
        if not decoding and not chunks:
            return 0
        self._runner.forward(decoding, chunks, num_draft_tokens)
        for sequence, chunk in chunks:
            sequence.num_computed_tokens += chunk.num_tokens
            self._keep_prefix(sequence)
        complete = [sequence for sequence, _ in chunks if not sequence.remaining_prefill]
        self._prefilling = [sequence for sequence in self._prefilling if sequence.remaining_prefill]
        self._decoding += complete
        self._sample([*decoding, *complete])
        if self._gap_limit:
            self._gap_limit.launched(sum(chunk.num_tokens for _, chunk in chunks))
        return 1

    def _sample(self, sequences: Sequence[RunningSequence]) -> None:
        if self._runner.needs_host_sync(sequences):
            self._deliver(len(self._in_flight))
        output = self._runner.sample(sequences)
        self._in_flight.append(output)
        for sequence in sequences:
            sequence.launched(output.max_tokens)

    # Choosing what to compute

    def _next_to_decode(self) -> list[RunningSequence]:
        """The decoding sequences, each with room in the KV cache for its newest token."""
        for sequence in self._decoding:
            if sequence.row.cancelled and sequence.is_read:  # no output in flight will report its end
                sequence.row.over = True
                self._release(sequence, sequence.tokens[:-1])
        self._decoding = [sequence for sequence in self._decoding if sequence.table]
        for sequence in list(self._decoding):
            while sequence.table and sequence.wants_decode:
                if self._grow(sequence):
                    break
                self._make_room()
        return [sequence for sequence in self._decoding if sequence.wants_decode]

    def _grow(self, sequence: RunningSequence, num_draft_tokens: int = 0) -> bool:
        """Make room in the KV cache for all tokens that a sequence can have and those of a draft; False if there is
        none."""
        most = min(sequence.max_tokens + num_draft_tokens, sequence.row.request.total_tokens)
        return sequence.table is not None and self._pool.grow(sequence.table, most)

    def _next_chunks(self, max_tokens: int) -> list[tuple[RunningSequence, Chunk]]:
        self._drop_cancelled()
        chunks = list[tuple[RunningSequence, Chunk]]()
        prefilling = iter(self._prefilling)
        while max_tokens > 0:
            sequence = next(prefilling, None) or self._start_next()
            if sequence is None:
                break
            if sequence.row.wants_prompt_logprobs:  # computed by `_score`
                continue
            chunks.append((sequence, sequence.prefill_chunk(max_tokens)))
            max_tokens = 0 if self._one_prompt_a_pass else max_tokens - chunks[-1][1].num_tokens
        return chunks

    def _drop_cancelled(self) -> None:
        for sequence in list(self._prefilling):
            if sequence.row.cancelled:
                sequence.row.over = True
                self._leave(sequence)

    def _leave(self, sequence: RunningSequence) -> None:
        """The row finished before its prompt was complete."""
        self._prefilling.remove(sequence)
        self._release(sequence, sequence.tokens[: sequence.num_computed_tokens])

    def _score(self) -> None:
        """Compute a chunk of the first prompt whose log probabilities are wanted, in a pass of its own."""
        sequence = next((sequence for sequence in self._prefilling if sequence.row.wants_prompt_logprobs), None)
        if sequence is not None and score(self._runner, sequence, self._steps, self._prefill_chunk):
            self._leave(sequence)

    # Slots and blocks

    def _start_next(self) -> RunningSequence | None:
        """Start the first waiting sequence if there is room."""
        while self._waiting and self._waiting[0].row.cancelled:
            sequence = self._waiting.popleft()
            sequence.row.over = True
            self._runner.remove_sequence(sequence)
        if not self._waiting:
            return None
        sequence = self._waiting[0]
        spare = self._spare_blocks(sequence)
        started = None
        if self._free_slots:
            sharing = not sequence.row.wants_prompt_logprobs  # the cache has no logits to reuse
            started = self._pool.start(sequence.row.request.salt, sequence.tokens, spare, sharing=sharing)
        self._is_full = started is None
        if started is None:
            return None
        self._waiting.popleft()
        sequence.start(self._free_slots.pop(), started.table, started.num_cached_tokens)
        if not sequence.row.num_preemptions:  # afterwards the cache has what it computed itself
            sequence.row.num_cached_tokens = started.num_cached_tokens
            sequence.row.num_shared_tokens = started.num_shared_tokens
        self._prefilling.append(sequence)
        self._runner.add_sequence(sequence)
        return sequence

    def _spare_blocks(self, starting: RunningSequence) -> int:
        """How many blocks must be left once this sequence has those for its tokens."""
        running = [*self._prefilling, *self._decoding]
        if not self._one_prompt_a_pass:
            return len(running) // ROWS_PER_SPARE_BLOCK
        held = blocks_for(len(starting.tokens)) + sum(len(sequence.blocks) for sequence in running)
        return sum(blocks_for(sequence.row.request.total_tokens) for sequence in [starting, *running]) - held

    def _make_room(self) -> None:
        """Preempt the youngest sequence, unless rows that have finished meanwhile leave room."""
        self._deliver(len(self._in_flight))  # a row's tokens must be known before it is preempted
        if self._pool.num_free:
            return
        youngest = max(self._prefilling + self._decoding, key=lambda sequence: sequence.order)
        for running in (self._prefilling, self._decoding):
            if youngest in running:
                running.remove(youngest)
        youngest.row.num_preemptions += 1
        computed = youngest.num_computed_tokens if youngest.remaining_prefill else len(youngest.tokens) - 1
        self._free(youngest, youngest.tokens[:computed])
        self._runner.preempt_sequence(youngest)
        if self._waiting:
            youngest.turn = self._waiting[0].turn
        self._waiting.appendleft(youngest)

    def _keep_prefix(self, sequence: RunningSequence) -> None:
        if sequence.table:
            self._pool.insert(sequence.table, sequence.tokens[: sequence.num_computed_tokens])

    def _release(self, sequence: RunningSequence, tokens: Sequence[int]) -> None:
        self._free(sequence, tokens)
        self._runner.remove_sequence(sequence)

    def _free(self, sequence: RunningSequence, tokens: Sequence[int]) -> None:
        """Give up its slot and blocks, in which `tokens` were computed."""
        if sequence.table:
            self._pool.release(sequence.table, tokens)
            self._free_slots.append(sequence.slot)
            sequence.table = None

    # Sampled tokens

    def _deliver(self, outputs: int) -> None:
        """Read the oldest sampler outputs, report their tokens at once, and release finished rows."""
        sequences: list[RunningSequence] = []
        tokens: list[int] = []
        logprobs: dict[int, TokenLogprob] = {}
        for _ in range(outputs):
            output = self._in_flight.popleft()
            sampled = output.read()
            if self._gap_limit:
                self._gap_limit.read()
            for sequence in output.sequences:
                sequence.read(output.max_tokens)
            logprobs |= shift_indices(sampled.logprobs, len(sequences))
            sequences += sampled.sequences
            tokens += sampled.tokens
        if not sequences:
            return
        over = self._steps.emit([sequence.row for sequence in sequences], tokens, logprobs)
        for sequence, token, is_over in zip(sequences, tokens, over, strict=True):
            if not is_over:
                sequence.tokens.append(token)
            elif sequence.table:
                self._release(sequence, sequence.tokens)
        self._runner.accept_tokens(sequences, tokens)
        self._decoding = [sequence for sequence in self._decoding if sequence.table]


def shift_indices(logprobs: Mapping[int, TokenLogprob], by: int) -> dict[int, TokenLogprob]:
    """The same entries with their indices increased by `by`."""
    return {index + by: logprob for index, logprob in logprobs.items()}


def score(runner: Runner, sequence: RunningSequence, steps: Steps, max_tokens: int) -> bool:
    """Compute the next chunk of a prompt, at most `max_tokens`, and hand over the log probabilities of what follows.

    The prompt's last token is left to a prefill, which samples the next one. Returns whether the row has finished.
    """
    row, start = sequence.row, sequence.num_computed_tokens
    if start == 0 and steps.emit_prompt(row, 0, [None]):
        return True
    chunk = sequence.prefill_chunk(min(max_tokens, PIECE, sequence.remaining_prefill - 1))
    if chunk.num_tokens == 0:
        return False
    logits = runner.prompt_logits(sequence, chunk)
    sequence.num_computed_tokens += chunk.num_tokens
    tokens = row.request.prompt[start + 1 : chunk.seq_len + 1]
    return steps.emit_prompt(row, start + 1, prompt_logprobs(logits, tokens, row.request.sampling.prompt_logprobs or 0))
