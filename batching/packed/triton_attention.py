"""Flash attention of packed sequences over the KV cache, as Triton kernels: one for prefill, one for decode.

Worker thread only, CUDA only (or Triton's interpreter, in tests); `attention.TorchAttention` is their twin in torch.
Softmax is accumulated block by block of keys as in Dao 2023 (FlashAttention-2); with few sequences their keys are split
over many programs, as in Dao et al. 2023 (Flash-Decoding).
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from batching.packed.kv_cache import BLOCK_SIZE
from batching.packed.triton_layer import await_inputs, overlap

QUERY_BLOCK = 64
"""Queries that one program of a prefill has at most."""

KEY_BLOCK = BLOCK_SIZE
"""Keys that it reads at a time: a block of the KV cache."""

PARTIAL_BLOCKS = 8
"""Blocks with fewer queries that have programs of their own: one without work takes as long as reading a few keys."""

DECODES_BESIDE = 32
"""Decoding sequences in a mixed pass that have programs of their own, for the same reason."""

DECODE_KEY_BLOCK = 32
"""Keys that a program of a decode step reads at a time: a part of a block of the KV cache."""

PAGE = tl.constexpr(BLOCK_SIZE)
"""KV slots in a block of the KV cache."""

SEQ_LEN, FIRST, COUNT, SLOT, BLOCK_COLUMNS = (tl.constexpr(column) for column in range(5))
"""Columns of a block of queries: how many keys its last query sees, where in the pass its queries begin, how many there
are, and the row of the block tables that their sequence has."""

LONG_SPLIT = tl.constexpr(128)
"""Fewest keys of a split where there are more than 16: merging them takes its time."""

MAX, SUM, NUM_STATS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Columns of a split's softmax statistics: the largest score, and the sum of weights relative to it."""

LOG2_E = tl.constexpr(1.4426950408889634)

UNSEEN = tl.constexpr(-1e30)
"""The score of a key that a query does not see, where another query of the sequence does."""


@triton.jit
def _online_softmax(scores, values, highest, weight_sum, value_sums):
    # One more block of keys: the highest scores so far, the sums of weights relative to them, and of weighted values.
    higher = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(highest - higher)
    value_sums = tl.dot(weights.to(values.dtype), values, value_sums * fade[:, None], input_precision="ieee")
    return higher, weight_sum * fade + tl.sum(weights, 1), value_sums


@triton.jit
def _prefill_kernel(
    q, k_blocks, v_blocks, out, num_blocks, blocks, block_tables, max_blocks, kv_blocks, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    # One program: a block's queries of one head, and of more blocks where there are few programs.
    head = tl.program_id(0)
    for block in range(tl.program_id(1), tl.load(num_blocks).to(tl.int32), tl.num_programs(1)):
        mine = blocks + block * BLOCK_COLUMNS
        table = block_tables + tl.load(mine + SLOT).to(tl.int64) * max_blocks
        _attend_block(
            q, k_blocks, v_blocks, out, tl.load(mine + FIRST), tl.load(mine + COUNT), tl.load(mine + SEQ_LEN), table,
            (head // GROUP) * kv_blocks, head, scale * LOG2_E, HEADS, SIZE, BLOCK, QUERY_BLOCK, KEY_BLOCK,
        )  # fmt: skip


@triton.jit
def _attend_block(
    q, k_blocks, v_blocks, out, first, count, total, table, own_blocks, head, factor,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    # The attention of `count` queries of one head, of which the last sees `total` keys. Keys and values come by a block
    # of the KV cache, of which each head has its own; where the next one is, is asked for a turn ahead.
    before = total - count
    query = tl.arange(0, QUERY_BLOCK)
    at = tl.arange(0, BLOCK)
    key = tl.arange(0, KEY_BLOCK)
    mine = ((first + query).to(tl.int64) * HEADS + head)[:, None] * SIZE + at[None, :]
    real = (query < count)[:, None] & (at < SIZE)[None, :]
    queries = tl.load(q + mine, mask=real, other=0.0)
    highest = tl.full([QUERY_BLOCK], -float("inf"), tl.float32)
    weight_sum = tl.zeros([QUERY_BLOCK], tl.float32)
    value_sums = tl.zeros([QUERY_BLOCK, BLOCK], tl.float32)
    seen_by_all = (before + 1) // KEY_BLOCK * KEY_BLOCK
    ahead = tl.load(table)
    for begin in range(0, seen_by_all, KEY_BLOCK):
        row = ((own_blocks + ahead) * KEY_BLOCK).to(tl.int32)
        ahead = tl.load(table + begin // KEY_BLOCK + 1)
        scores = tl.dot(queries, tl.trans(k_blocks.load([row, 0])), input_precision="ieee") * factor
        values = v_blocks.load([row, 0])
        highest, weight_sum, value_sums = _online_softmax(scores, values, highest, weight_sum, value_sums)
    for begin in range(seen_by_all, total, KEY_BLOCK):
        row = ((own_blocks + tl.load(table + begin // KEY_BLOCK)) * KEY_BLOCK).to(tl.int32)
        scores = tl.dot(queries, tl.trans(k_blocks.load([row, 0])), input_precision="ieee") * factor
        scores = tl.where((begin + key)[None, :] <= (before + query)[:, None], scores, -float("inf"))
        # What a block holds beyond the row's end is of nobody or of a row whose model went wrong: 0 x NaN is NaN.
        values = tl.where((begin + key < total)[:, None], v_blocks.load([row, 0]), 0.0)
        highest, weight_sum, value_sums = _online_softmax(scores, values, highest, weight_sum, value_sums)
    tl.store(out + mine, (value_sums / weight_sum[:, None]).to(out.dtype.element_ty), mask=real)


@dataclass(frozen=True, slots=True)
class PrefillAttention:
    """`Attend` for prefill chunks, cut into blocks of at most `QUERY_BLOCK` queries, all in one call.

    `num_blocks` [1] and `blocks` [most, BLOCK_COLUMNS], int32 on the device, are read at each call: how many blocks
    there are, and each one's columns. They are computed in this order, so those with the most keys should come first:
    a long one that begins last keeps the device waiting. `block_tables` is [slots, blocks of the KV cache, int64].
    """

    num_blocks: Tensor
    blocks: Tensor
    block_tables: Tensor

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        """Written to `out` if that is given."""
        _, heads, size = q.shape
        out = torch.empty_like(q) if out is None else out
        block = max(16, triton.next_power_of_2(size))
        # On Hopper these are copied by the tensor memory accelerator, elsewhere by ordinary loads.
        k_blocks, v_blocks = (
            TensorDescriptor.from_tensor(cache.flatten(0, 1), [KEY_BLOCK, block]) for cache in (k_cache, v_cache)
        )
        _prefill_kernel[(heads, min(len(self.blocks), len(q) // QUERY_BLOCK + PARTIAL_BLOCKS))](
            q, k_blocks, v_blocks, out, self.num_blocks, self.blocks, self.block_tables, self.block_tables.shape[1],
            k_cache.shape[1] // KEY_BLOCK, scale,
            HEADS=heads, GROUP=heads // k_cache.shape[0], SIZE=size, BLOCK=block,
            QUERY_BLOCK=QUERY_BLOCK, KEY_BLOCK=KEY_BLOCK, num_warps=4, num_stages=_stages(q),
        )  # fmt: skip
        return out


def _stages(q: Tensor) -> int:
    """Blocks of keys and values loaded ahead: as many as let a multiprocessor hold two programs."""
    if not q.is_cuda:
        return 1
    shared: int = torch.cuda.get_device_properties(q.device).shared_memory_per_multiprocessor
    block: int = 2 * KEY_BLOCK * triton.next_power_of_2(q.shape[-1]) * q.element_size()
    return max(1, min(3, shared // 2 // block))


@triton.jit
def _merged_splits(
    partial, stats, pair, num_splits, at, row,
    SPLITS: tl.constexpr, ROW_BLOCK: tl.constexpr, BLOCK: tl.constexpr, MERGE_BLOCK: tl.constexpr,
):  # fmt: skip
    # The splits of one sequence and KV head merged, in their order whichever program does it: [ROW_BLOCK, BLOCK].
    top = tl.full([ROW_BLOCK], -float("inf"), tl.float32)
    whole = tl.zeros([ROW_BLOCK], tl.float32)
    result = tl.zeros([ROW_BLOCK, BLOCK], tl.float32)
    for begin in range(0, num_splits, MERGE_BLOCK):
        other = begin + tl.arange(0, MERGE_BLOCK)
        theirs = (pair * SPLITS + other[:, None]) * ROW_BLOCK + row[None, :]
        known = (other < num_splits)[:, None]
        tops = tl.load(stats + theirs * NUM_STATS + MAX, mask=known, other=-float("inf"), cache_modifier=".cg")
        wholes = tl.load(stats + theirs * NUM_STATS + SUM, mask=known, other=0.0, cache_modifier=".cg")
        place = theirs[:, :, None] * BLOCK + at[None, None, :]
        parts = tl.load(partial + place, mask=known[:, :, None], other=0.0, cache_modifier=".cg")
        above = tl.maximum(top, tl.max(tops, 0))
        shares = tl.exp2(tops - above[None, :])
        fades = tl.exp2(top - above)
        whole = whole * fades + tl.sum(wholes * shares, 0)
        result = result * fades[:, None] + tl.sum(parts * shares[:, :, None], 0)
        top = above
    return result / whole[:, None]


@triton.jit
def _places(row, sequence, kv_head, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    # Which of all heads of all queries a row is: rows are queries of the sequence by heads of the KV head.
    return ((sequence * WIDTH + row // GROUP) * KV_HEADS + kv_head) * GROUP + row % GROUP


@triton.jit
def _decode_kernel(
    q, k_cache, v_cache, out, partial, stats, arrived, num_sequences, slots, seq_lens, num_drafted, block_tables,
    max_blocks, head_stride, scale, min_split,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, DOT_ROWS: tl.constexpr,
    ROW_BLOCK: tl.constexpr, BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    MERGE_BLOCK: tl.constexpr, AHEAD: tl.constexpr, STEP: tl.constexpr, COUNTED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    # One program: one sequence, the query heads of one KV head, one split of the keys. COUNTED: `num_sequences` says
    # how many sequences there are, and programs may have to take more than one. Not else: a loop, even of one turn,
    # costs a step of a single sequence a tenth of its attention.
    await_inputs(OVERLAP)
    if COUNTED:
        for sequence in range(tl.program_id(0), tl.load(num_sequences).to(tl.int32), tl.num_programs(0)):
            _attend_split(
                q, k_cache, v_cache, out, partial, stats, arrived, sequence, slots, seq_lens, num_drafted, block_tables,
                max_blocks, head_stride, scale, min_split, KV_HEADS, GROUP, WIDTH, SIZE, DOT_ROWS, ROW_BLOCK, BLOCK,
                KEY_BLOCK, SPLITS, MERGE_BLOCK, AHEAD, STEP,
            )  # fmt: skip
    else:
        _attend_split(
            q, k_cache, v_cache, out, partial, stats, arrived, tl.program_id(0), slots, seq_lens, num_drafted,
            block_tables, max_blocks, head_stride, scale, min_split, KV_HEADS, GROUP, WIDTH, SIZE, DOT_ROWS, ROW_BLOCK,
            BLOCK, KEY_BLOCK, SPLITS, MERGE_BLOCK, AHEAD, STEP,
        )  # fmt: skip


@triton.jit
def _attend_split(
    q, k_cache, v_cache, out, partial, stats, arrived, sequence, slots, seq_lens, num_drafted, block_tables,
    max_blocks, head_stride, scale, min_split,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, DOT_ROWS: tl.constexpr,
    ROW_BLOCK: tl.constexpr, BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    MERGE_BLOCK: tl.constexpr, AHEAD: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # There are at most SPLITS splits, of `min_split` keys or more; and WIDTH queries of GROUP heads each, these rows
    # padded to ROW_BLOCK, though a product needs DOT_ROWS. Those after the first are of the sequence's draft, and each
    # sees a key more than the one before; the rest have a result without meaning. Without keys there is no result.
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(seq_lens + sequence)
    most = tl.minimum(tl.maximum(length // LONG_SPLIT, 16), SPLITS)
    splits = tl.maximum(tl.minimum(tl.cdiv(length, min_split), most), 1)
    share = tl.cdiv(tl.cdiv(length, splits), PAGE) * PAGE
    first = split * share
    if first < length:
        row = tl.arange(0, DOT_ROWS)
        at = tl.arange(0, BLOCK)
        real = (row < GROUP * WIDTH)[:, None] & (at < SIZE)[None, :]
        pair = sequence * KV_HEADS + kv_head
        mine = _places(row, sequence, kv_head, KV_HEADS, GROUP, WIDTH)[:, None] * SIZE + at[None, :]
        drafted = tl.load(num_drafted + sequence) if WIDTH > 1 else 0
        seen = length - drafted + tl.minimum(row // GROUP, drafted)
        queries = tl.load(q + mine, mask=real, other=0.0)
        base = kv_head.to(tl.int64) * head_stride
        table = block_tables + tl.load(slots + sequence).to(tl.int64) * max_blocks
        last = tl.minimum(first + share, length)
        highest, weight_sum, value_sums = _read_split(
            queries, k_cache, v_cache, base, table, first, last, seen, scale * LOG2_E, at,
            WIDTH, SIZE, DOT_ROWS, BLOCK, KEY_BLOCK, AHEAD, STEP,
        )  # fmt: skip
        num_splits = tl.cdiv(length, share)
        if num_splits == 1:
            tl.store(out + mine, (value_sums / weight_sum[:, None]).to(out.dtype.element_ty), mask=real)
        else:
            kept = (pair * SPLITS + split) * ROW_BLOCK + row
            tl.store(partial + kept[:, None] * BLOCK + at[None, :], value_sums, mask=(row < ROW_BLOCK)[:, None])
            tl.store(stats + kept * NUM_STATS + MAX, highest, mask=row < ROW_BLOCK)
            tl.store(stats + kept * NUM_STATS + SUM, weight_sum, mask=row < ROW_BLOCK)
            tl.debug_barrier()
            # The program that arrives last merges all splits.
            if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == num_splits - 1:
                tl.debug_barrier()
                index = tl.arange(0, ROW_BLOCK)
                result = _merged_splits(
                    partial, stats, pair, num_splits, at, index, SPLITS, ROW_BLOCK, BLOCK, MERGE_BLOCK
                ).to(out.dtype.element_ty)
                target = _places(index, sequence, kv_head, KV_HEADS, GROUP, WIDTH)[:, None] * SIZE + at[None, :]
                tl.store(out + target, result, mask=(index < GROUP * WIDTH)[:, None] & (at < SIZE)[None, :])
                tl.store(arrived + pair, 0)


@triton.jit
def _read_split(
    queries, k_cache, v_cache, base, table, first, last, seen, factor, at,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, DOT_ROWS: tl.constexpr, BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    AHEAD: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # The softmax over keys `first` to `last`, STEP a turn, which divide a block of the KV cache. AHEAD: where the next
    # block is, is asked for a turn ahead. That spares few programs a wait, and takes registers from many.
    key = tl.arange(0, KEY_BLOCK)
    highest = tl.full([DOT_ROWS], -float("inf"), tl.float32)
    weight_sum = tl.zeros([DOT_ROWS], tl.float32)
    value_sums = tl.zeros([DOT_ROWS, BLOCK], tl.float32)
    ahead = tl.load(table + first // PAGE)
    for turn in range(first, last, STEP):
        page = turn // PAGE
        if AHEAD:
            block = ahead
            ahead = tl.load(table + (turn + STEP) // PAGE)
        else:
            block = tl.load(table + page)
        for part in tl.static_range(STEP // KEY_BLOCK):
            begin = turn + part * KEY_BLOCK
            there = begin + key < last
            place = base + ((block - page) * PAGE + begin + key)[:, None] * SIZE + at[None, :]
            wanted = there[:, None] & (at < SIZE)[None, :]
            keys = tl.load(k_cache + place, mask=wanted, other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * factor
            if WIDTH == 1:
                scores = tl.where(there[None, :], scores, -float("inf"))
            else:  # a number, because a query may see no key of a split
                scores = tl.where((begin + key)[None, :] < tl.minimum(seen, last)[:, None], scores, UNSEEN)
            values = tl.load(v_cache + place, mask=wanted, other=0.0)
            highest, weight_sum, value_sums = _online_softmax(scores, values, highest, weight_sum, value_sums)
    return highest, weight_sum, value_sums


@dataclass(frozen=True, slots=True)
class DecodeAttention:
    """`Attend` for a decode step: `width` queries a sequence. Made once for a number of sequences.

    `slots`, `seq_lens` and `num_drafted` [sequences, int32] are read at each call: the row of `block_tables` [slots,
    blocks of the KV cache, int64] that each sequence has, how many keys, and how many of its queries come after the
    first, each of which sees a key more; without keys its part of the result is not written. So is `num_sequences` [1],
    how many there are (None: all). `arrived` is zero, and left as found.
    """

    slots: Tensor
    seq_lens: Tensor
    num_drafted: Tensor
    block_tables: Tensor
    arrived: Tensor
    splits: int
    min_split: int
    width: int
    num_sequences: Tensor | None = None

    @classmethod
    def of(
        cls,
        slots: Tensor,
        block_tables: Tensor,
        kv_heads: int,
        min_split: int | None = None,
        width: int = 1,
    ) -> "DecodeAttention":
        """With `seq_lens` and `num_drafted` to be written. `min_split`: fewest keys of a split; None: by the number of
        sequences, so that few of them keep a GPU busy and a long one does not hold up many short ones."""
        sequences, device = len(slots), slots.device
        min_split = min_split or min(1024, max(64, 4 * sequences * kv_heads))
        splits = 32 if sequences == 1 else 16 if sequences <= 16 else 8
        return cls(
            slots,
            torch.zeros(sequences, device=device, dtype=torch.int32),
            torch.zeros(sequences, device=device, dtype=torch.int32),
            block_tables,
            torch.zeros(sequences * kv_heads, device=device, dtype=torch.int32),
            splits,
            min_split,
            width,
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a call reads or writes beside its arguments."""
        return self.slots, self.seq_lens, self.num_drafted, self.arrived

    def of_first(self, sequences: int, num_sequences: Tensor) -> "DecodeAttention":
        """The same for at most `sequences` of them, and at each call for the first `num_sequences` [1]."""
        first = slice(sequences)
        return replace(
            self,
            slots=self.slots[first],
            seq_lens=self.seq_lens[first],
            num_drafted=self.num_drafted[first],
            num_sequences=num_sequences,
        )

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        """Written to `out` if that is given."""
        (_, heads, size), sequences, kv_heads = q.shape, len(self.slots), k_cache.shape[0]
        group = heads // kv_heads
        row_block, block = triton.next_power_of_2(group * self.width), triton.next_power_of_2(size)
        # What splits leave to be merged. Not kept: captured graphs share the memory, because only one runs at a time.
        parts = sequences * kv_heads * self.splits, row_block
        partial, stats = (q.new_empty(*parts, each, dtype=torch.float32) for each in (block, NUM_STATS.value))
        few = sequences <= 8
        merge_block = max(1, 8192 // (row_block * block))  # sums of splits that fit into a program's registers
        out = torch.empty_like(q) if out is None else out
        counted = self.num_sequences is not None
        programs = min(sequences, DECODES_BESIDE) if counted else sequences
        _decode_kernel[(programs, kv_heads, self.splits)](
            q, k_cache, v_cache, out, partial, stats, self.arrived, self.num_sequences, self.slots,
            self.seq_lens, self.num_drafted, self.block_tables, self.block_tables.shape[1], k_cache.stride(0), scale,
            self.min_split, KV_HEADS=kv_heads, GROUP=group, WIDTH=self.width, SIZE=size,
            DOT_ROWS=max(16, row_block), ROW_BLOCK=row_block, BLOCK=block, KEY_BLOCK=DECODE_KEY_BLOCK,
            SPLITS=self.splits, MERGE_BLOCK=min(self.splits, merge_block), AHEAD=few,
            STEP=DECODE_KEY_BLOCK if few else BLOCK_SIZE, COUNTED=counted, num_warps=2, num_stages=_stages(q),
            **({"OVERLAP": False} if counted else overlap(q.device)),  # counted, it is the first on its stream
        )  # fmt: skip
        return out


@dataclass(frozen=True, slots=True)
class MixedAttention:
    """`Attend` for a pass in which sequences decode, whose tokens come first, and prompts are computed, side by side:
    `decodes` on the stream `beside`."""

    prefills: PrefillAttention
    decodes: DecodeAttention
    beside: torch.cuda.Stream

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> Tensor:
        out = torch.empty_like(q)
        here = torch.cuda.current_stream()
        self.beside.wait_stream(here)
        with torch.cuda.stream(self.beside):
            self.decodes(q, k_cache, v_cache, scale, out)
        self.prefills(q, k_cache, v_cache, scale, out)
        here.wait_stream(self.beside)
        return out
