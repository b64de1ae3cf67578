"""`Runner` on a CUDA device: passes that were captured, tokens chosen on the device.

Worker thread only. Nothing here waits for the device but `read`.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, cycle

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from batching.engine import NO_LOGPROBS
from batching.grammar import Watched
from batching.packed.attention import Piece
from batching.packed.cuda_graphs import Capture, Captured, Outputs, PromptInputs, smallest
from batching.packed.runner import Seat
from batching.packed.sampling_state import Slots
from batching.packed.triton_attention import QUERIES
from batching.types import TokenLogprob

IN_FLIGHT = 8
"""Choices that can be unread at a time: at most two a round, and two rounds."""


class Landing:
    """Host memory for the tokens of one choice, and the moment when they are there."""

    def __init__(self, lanes: int) -> None:
        self._tokens = torch.empty(lanes, dtype=torch.int64, pin_memory=True)
        self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def take(self, tokens: Tensor) -> None:
        """Begin to copy."""
        self._tokens[: len(tokens)].copy_(tokens, non_blocking=True)

    def mark(self) -> None:
        """All copies of this choice have been ordered."""
        self._there.record()

    def wait(self, count: int) -> list[int]:
        self._there.synchronize()
        found: list[int] = self._tokens[:count].tolist()
        return found


class Pending:
    """`Choice` that the device is making."""

    def __init__(self, seats: Sequence[Seat], landing: Landing, noted: "Noted | None") -> None:
        self.seats = seats
        self._landing = landing
        self._noted = noted

    def read(self) -> tuple[list[int], Mapping[int, TokenLogprob]]:
        """See `Choice`."""
        tokens = self._landing.wait(len(self.seats))
        return tokens, self._noted.read(tokens) if self._noted else NO_LOGPROBS


class Noted:
    """Log probabilities of one choice, on their way to the host; of the model's own logits, as `logprobs.Logprobs`."""

    def __init__(self, places: list[int], wanted: list[int], at: Tensor, logits: Tensor, tokens: Tensor) -> None:
        self._places = places
        self._wanted = wanted
        every = logits[at].float().log_softmax(-1)
        own = every.gather(-1, tokens[at][:, None])[:, 0]
        values, ids = every.topk(max(wanted))
        self._copies = [found.to("cpu", non_blocking=True) for found in (own, values, ids)]

    def read(self, tokens: Sequence[int]) -> dict[int, TokenLogprob]:
        """By place, once the choice's tokens are there."""
        own, values, ids = (copy.tolist() for copy in self._copies)
        return {
            place: TokenLogprob(tokens[place], own[at], tuple(zip(ids[at][:top], values[at][:top], strict=True)))
            for at, (place, top) in enumerate(zip(self._places, self._wanted, strict=True))
        }


class DeviceRunner:
    """`memory` is the pool, as in `Work`, and has one slot that belongs to no row: its last."""

    def __init__(self, model: PreTrainedModel, memory: Tensor, lanes: int) -> None:
        self.lanes = lanes
        self._model = model
        self._memory = memory
        self._vocab_size = model.config.get_text_config().vocab_size
        self._slots = Slots(lanes, self._vocab_size, memory.shape[3] - 1, memory.device)
        self._steps: list[Captured] = []
        self._prompts: list[Captured] = []
        self._in_step: dict[int, list[int]] = {}  # by a step's size: the lanes that it was last told
        self._entering: list[Seat] = []
        self._early: set[Seat] = set()
        self._asking: set[Seat] = set()
        self._watched: dict[Seat, Watched] = {}
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._landings = cycle([Landing(lanes) for _ in range(IN_FLIGHT)])
        self._pass: Outputs

    def capture(self, prompts: Sequence[int], steps: Sequence[int]) -> Iterator[None]:
        """Capture passes over so many tokens and steps of so many rows, one whenever the next is asked for."""
        capture = Capture(self._model, self._memory, self._slots)
        for tokens in sorted(prompts, reverse=True):
            inputs = PromptInputs(tokens, self.lanes, self._memory.device)
            self._prompts.insert(0, capture.prompts(tokens, inputs))
            yield
        for rows in sorted(steps, reverse=True):
            self._steps.insert(0, capture.step(rows))
            yield

    def rehearse(self, tokens: int) -> None:
        """A pass over so many tokens of prompts, of no row, without capture: to see what memory it takes."""
        inputs = PromptInputs(tokens, self.lanes, self._memory.device)
        inputs.slots.fill_(self._memory.shape[3] - 1)
        Capture(self._model, self._memory, self._slots).prompt_pass(inputs)
        torch.cuda.synchronize(self._memory.device)

    def enter(self, seat: Seat) -> None:
        """See `Runner`."""
        request = seat.row.request
        self._entering.append(seat)
        if Watched.wants(request):
            self._watched[seat] = Watched(request, self._vocab_size, self._helper)
        if request.sampling.min_tokens:
            self._early.add(seat)
        if request.sampling.top_logprobs is not None:
            self._asking.add(seat)

    def leave(self, seat: Seat) -> None:
        """See `Runner`."""
        if seat in self._entering:
            self._entering.remove(seat)
        self._watched.pop(seat, None)
        self._early.discard(seat)
        self._asking.discard(seat)

    def copy(self, source: int, target: int, count: int) -> None:
        """See `Runner`."""
        self._memory[:, :, :, target : target + count] = self._memory[:, :, :, source : source + count]

    def prompts(self, work: Sequence[tuple[Seat, Piece]]) -> None:
        """See `Runner`."""
        if self._entering:
            self._slots.enter(self._entering, [seat in self._watched for seat in self._entering])
            self._entering = []
        prompts = smallest(self._prompts, sum(piece.count for _, piece in work))
        inputs = prompts.held
        assert isinstance(inputs, PromptInputs)
        filled = PromptInputs(prompts.size, self.lanes, "cpu")
        fill(filled, work, spare=self._memory.shape[3] - 1, no_lane=self.lanes)
        inputs.all.copy_(filled.all.pin_memory(), non_blocking=True)
        prompts.forward.replay()
        self._pass = prompts.out

    def steps(self, seats: Sequence[Seat]) -> None:
        """See `Runner`."""
        step = smallest(self._steps, len(seats))
        lanes = [seat.lane for seat in seats] + [self.lanes] * (step.size - len(seats))
        if self._in_step.get(step.size) != lanes:
            step.out.lanes.copy_(torch.tensor(lanes, dtype=torch.int32).pin_memory(), non_blocking=True)
            self._in_step[step.size] = lanes
        step.forward.replay()
        self._pass = step.out

    def waits(self, seats: Sequence[Seat]) -> bool:
        """See `Runner`."""
        return bool(self._watched) and any(seat in self._watched for seat in seats)

    def told(self, seat: Seat, token: int) -> None:
        """See `Runner`."""
        if self._watched and seat in self._watched:
            self._watched[seat].told(token)

    def choose(self, seats: Sequence[Seat]) -> Pending:
        """See `Runner`."""
        out = self._pass
        self._rule_out(seats)
        out.choose.replay()
        tokens = out.tokens[: len(seats)]
        landing = next(self._landings)
        landing.take(tokens)
        noted = self._note(seats, out.logits, tokens) if self._asking else None
        landing.mark()
        return Pending(seats, landing, noted)

    @property
    def logits(self) -> Tensor:
        """Of the last pass, [seats, vocabulary]; valid until the next one."""
        return self._pass.logits

    def _rule_out(self, seats: Sequence[Seat]) -> None:
        """Send what the host alone knows of the next tokens: which a grammar allows, and whether a row may stop."""
        if self._watched:
            held = [seat for seat in seats if seat in self._watched]
            if held:
                words = torch.from_numpy(np.stack([self._watched[seat].allowed() for seat in held]))
                at = self._slots.send(torch.tensor([seat.lane for seat in held]))
                self._slots.allowed.index_copy_(0, at, self._slots.send(words))
        if self._early:
            for seat in self._early.intersection(seats):
                if seat.begun >= seat.row.request.sampling.min_tokens:
                    self._slots.set_bias(seat, early=False)
                    self._early.discard(seat)

    def _note(self, seats: Sequence[Seat], logits: Tensor, tokens: Tensor) -> Noted | None:
        places = [place for place, seat in enumerate(seats) if seat in self._asking]
        wanted = [seats[place].row.request.sampling.top_logprobs or 0 for place in places]
        return Noted(places, wanted, self._slots.send(torch.tensor(places)), logits, tokens) if places else None


def fill(inputs: PromptInputs, work: Sequence[tuple[Seat, Piece]], *, spare: int, no_lane: int) -> None:
    """Write a pass's pieces. What is left over goes to the slot and the lane that belong to no row."""
    end = 0
    for seat, piece in work:
        here = slice(end, end := end + piece.count)
        inputs.ids[here] = torch.tensor(seat.row.request.prompt[piece.done : piece.used])
        torch.arange(piece.done, piece.used, out=inputs.positions[here])
        torch.arange(piece.start + piece.done, piece.start + piece.used, out=inputs.slots[here])
    inputs.slots[end:] = spare
    rows = [row for _, piece in work for row in piece.cut(QUERIES)]
    bounds = list(accumulate((row.count for row in rows), initial=0))
    inputs.bounds[: len(bounds)] = torch.tensor(bounds)
    inputs.bounds[len(bounds) :] = end
    inputs.starts[: len(rows)] = torch.tensor([row.start for row in rows])
    inputs.used[: len(rows)] = torch.tensor([row.used for row in rows])
    ends = accumulate(piece.count for _, piece in work)
    ending = [(end, seat.lane) for end, (seat, piece) in zip(ends, work, strict=True) if seat.left == piece.count]
    inputs.last[: len(ending)] = torch.tensor([end - 1 for end, _ in ending])
    inputs.lanes[: len(ending)] = torch.tensor([lane for _, lane in ending])
    inputs.lanes[len(ending) :] = no_lane
