"""The scheduler of the packed engine: who is computed next, who joins, who leaves. Worker thread only.

An iteration has three parts: prefill chunks of waiting prompts, a decode step of all running sequences, and the
delivery of the tokens sampled in the iteration before. Reading one iteration behind keeps the device busy: its next
work is queued before it finishes the last. A row that turns out to be over has then sampled one token more, which is
dropped.
"""

from collections import deque
from collections.abc import Mapping, Sequence

from batching.engine import Steps
from batching.packed.attention import Chunk
from batching.packed.kv_cache import PrefixCache
from batching.packed.runner import Runner, RunningSequence, SamplerOutput
from batching.packed.scoring import score
from batching.stream import Row
from batching.types import TokenLogprob


class Scheduler:
    """One batch, from its first rows to the end of the last one that joined.

    An iteration computes at most `prefill_chunk` prompt tokens, which bounds how long running sequences are held up
    (and as many at most of one prompt whose log probabilities are asked for);
    but `max_prefill_tokens` while more rows wait for their prompts than decode, for many are served sooner then and few
    are held up longer. With `one_prompt_a_pass` no prompt shares a forward pass with another: what is computed for it
    does not depend on who waits.
    """

    def __init__(
        self,
        runner: Runner,
        cache: PrefixCache,
        steps: Steps,
        *,
        prefill_chunk: int,
        max_prefill_tokens: int,
        one_prompt_a_pass: bool = False,
    ) -> None:
        self._runner = runner
        self._cache = cache
        self._steps = steps
        self._prefill_chunk = prefill_chunk
        self._max_prefill_tokens = max_prefill_tokens
        self._one_prompt_a_pass = one_prompt_a_pass
        self._free_slots = list(range(runner.num_slots))
        self._waiting: deque[Row] = deque()
        self._prefilling: list[RunningSequence] = []  # their prompts are not complete yet, first come first
        self._decoding: list[RunningSequence] = []
        self._in_flight: deque[SamplerOutput] = deque()

    def run(self, rows: Sequence[Row]) -> None:
        """Blocks until every row is over, those that join meanwhile included."""
        self._waiting.extend(rows)
        try:
            while self._waiting or self._prefilling or self._decoding or self._in_flight:
                self._iterate()
                self._waiting.extend(self._steps.admit())
        finally:
            for sequence in self._prefilling + self._decoding:  # none, unless it failed
                self._runner.remove_sequence(sequence)

    def _iterate(self) -> None:
        self._admit_waiting()
        before = len(self._in_flight)
        self._score()
        self._prefill()
        self._decode()
        # All but what this iteration sampled, if anything: the device is busy with that.
        self._deliver(before if len(self._in_flight) > before else len(self._in_flight))

    def _admit_waiting(self) -> None:
        """Give slots and KV cache to waiting rows in their order, until one finds no room."""
        while self._waiting:
            row = self._waiting[0]
            if row.cancelled:
                row.over = True
            elif (sequence := self._admit(row)) is not None:
                self._prefilling.append(sequence)
            else:
                return
            self._waiting.popleft()

    def _admit(self, row: Row) -> RunningSequence | None:
        if not self._free_slots:
            return None
        kv = self._cache.allocate(row.request.total_tokens, row.request.salt)
        if kv is None:
            return None
        sequence = RunningSequence(row, self._free_slots.pop(), kv)
        self._runner.add_sequence(sequence)
        return sequence

    def _score(self) -> None:
        """A chunk of the first prompt whose log probabilities are asked for. The prefix cache has none to reuse."""
        sequence = next((sequence for sequence in self._prefilling if sequence.row.wants_prompt_logprobs), None)
        if sequence is not None and score(self._runner, sequence, self._steps, self._prefill_chunk):
            self._leave(sequence)

    def _prefill(self) -> None:
        held_up = sum(sequence.wants_decode for sequence in self._decoding)
        many_wait = len(self._prefilling) > held_up
        chunks = self._next_chunks(self._max_prefill_tokens if many_wait else self._prefill_chunk)
        if not chunks:
            return
        self._runner.prefill(chunks)
        complete = [sequence for sequence, chunk in chunks if sequence.remaining_prompt == chunk.num_tokens]
        for sequence, chunk in chunks:
            sequence.num_computed_tokens += chunk.num_tokens
        for sequence in complete:
            self._prefilling.remove(sequence)
            self._cache.insert(sequence.kv, sequence.row.request.prompt)
        self._sample(complete)
        self._decoding += complete

    def _next_chunks(self, max_tokens: int) -> list[tuple[RunningSequence, Chunk]]:
        chunks = list[tuple[RunningSequence, Chunk]]()
        for sequence in list(self._prefilling):
            if sequence.row.cancelled:
                sequence.row.over = True
                self._leave(sequence)
            elif max_tokens and not sequence.row.wants_prompt_logprobs:
                if not sequence.num_computed_tokens:
                    self._reuse_prefix(sequence)
                chunks.append((sequence, sequence.prefill_chunk(max_tokens)))
                max_tokens = 0 if self._one_prompt_a_pass else max_tokens - chunks[-1][1].num_tokens
        return chunks

    def _reuse_prefix(self, sequence: RunningSequence) -> None:
        found = self._cache.match_prefix(sequence.row.request.salt, sequence.row.request.prompt)
        if found is not None:
            cached, sequence.num_computed_tokens = found
            self._runner.copy_kv(cached.start, sequence.kv.start, sequence.num_computed_tokens)
            sequence.row.num_cached_tokens = sequence.num_computed_tokens

    def _decode(self) -> None:
        sequences = [sequence for sequence in self._decoding if sequence.wants_decode]
        if sequences:
            self._runner.decode(sequences)
            self._sample(sequences)

    def _sample(self, sequences: Sequence[RunningSequence]) -> None:
        if not sequences:
            return
        if self._runner.needs_host_sync(sequences):
            self._deliver(len(self._in_flight))
        self._in_flight.append(self._runner.sample(sequences))
        for sequence in sequences:
            sequence.num_output_tokens += 1

    def _deliver(self, outputs: int) -> None:
        """Read the oldest sampler outputs, hand their tokens over in one report, and release the rows that are over."""
        sequences: list[RunningSequence] = []
        tokens: list[int] = []
        logprobs: dict[int, TokenLogprob] = {}
        for _ in range(outputs):
            output = self._in_flight.popleft()
            sampled, some_logprobs = output.read()
            logprobs |= shift_indices(some_logprobs, len(sequences))
            sequences += output.sequences
            tokens += sampled
        if not sequences:
            return
        over = self._steps.emit([sequence.row for sequence in sequences], tokens, logprobs)
        finished = set[RunningSequence]()
        for sequence, token, is_over in zip(sequences, tokens, over, strict=True):
            if is_over:
                finished.add(sequence)
            else:
                sequence.tokens.append(token)
                self._runner.accept_token(sequence, token)
        if finished:
            for sequence in finished.intersection(self._decoding):
                self._release(sequence, sequence.tokens)
            self._decoding = [sequence for sequence in self._decoding if sequence not in finished]

    def _leave(self, sequence: RunningSequence) -> None:
        """The row is over before its prompt was complete."""
        self._prefilling.remove(sequence)
        self._release(sequence, sequence.row.request.prompt[: sequence.num_computed_tokens])

    def _release(self, sequence: RunningSequence, tokens: Sequence[int]) -> None:
        self._cache.release(sequence.kv, tokens)
        self._runner.remove_sequence(sequence)
        self._free_slots.append(sequence.slot)


def shift_indices(logprobs: Mapping[int, TokenLogprob], by: int) -> dict[int, TokenLogprob]:
    """The same, each `by` places further on."""
    return {index + by: logprob for index, logprob in logprobs.items()}
