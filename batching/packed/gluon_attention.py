"""Prefill attention for Hopper GPUs: what `triton_attention.PrefillAttention` computes, by warps that each do a part.

Worker thread only, CUDA only. A program fills a multiprocessor and computes one tile after the other, whichever is next
of all: a block's queries of two heads that share a KV head. One warp loads, and four attend for each head, so that keys
and values are read once for both, and the softmax of one runs beside the products of the other (Shah et al. 2024,
FlashAttention-3). What is loaded goes round rings of buffers in shared memory. Each buffer has two barriers: `full` is
completed by the copy into it, `empty` by both heads once they have read it.
"""

from dataclasses import dataclass

import torch
import triton
from packaging.version import Version
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from batching.packed.kv_cache import BLOCK_SIZE
from batching.packed.triton_attention import (
    BLOCK_COLUMNS,
    COUNT,
    FIRST,
    LOG2_E,
    SEQ_LEN,
    SLOT,
    PrefillAttention,
)

VERSIONS = (3, 6), (3, 9)
"""Versions of Triton that this compiles with, the first and the last: Gluon is experimental and changes with them."""

QUERIES = gl.constexpr(64)
"""Of each head in a tile: as many as the matrix units of a multiprocessor take at once."""

KEYS = gl.constexpr(BLOCK_SIZE)
"""In a block of the KV cache. Two blocks are attended to in a turn, so that its other work is done once for both."""

STAGES = gl.constexpr(3)
"""Turns whose keys and values shared memory has room for. With two, loads are waited for."""

REGISTERS = 168
"""Of a thread when a program starts: a multiprocessor's, shared by three groups of 128. The two that attend then take
some of those of the one that loads."""

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_SIZE, 16]))
"""How the scores of a block of keys lie in the registers of four warps."""

QUERY_LAYOUT = gl.constexpr(gl.DotOperandLayout(0, SCORES.value, 2))
"""How queries do, as the left side of a product."""

copy_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # its former name


def suits(kv_cache: Tensor, heads: int) -> bool:
    """Whether `HopperPrefillAttention` can be called on a Hopper GPU, with a layer of this KV cache [layers, 2,
    KV heads, KV slots, head size] and queries like it of `heads` heads."""
    _, _, kv_heads, _, size = kv_cache.shape
    first, last = VERSIONS
    return (
        kv_cache.dtype in (torch.bfloat16, torch.float16)
        and size in (64, 128)
        and heads // kv_heads % 2 == 0
        and first <= Version(triton.__version__).release[:2] <= last
    )


@dataclass(frozen=True, slots=True)
class HopperPrefillAttention(PrefillAttention):
    """The same where `suits` says so, of contiguous queries. `next_tile` [1, int32] is zero, and left as found."""

    next_tile: Tensor

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        tokens, heads, size = q.shape
        out = torch.empty_like(q) if out is None else out
        dtype = getattr(gl, str(q.dtype).removeprefix("torch."))
        layout = gl.NVMMASharedLayout.get_default_for([BLOCK_SIZE, size], dtype)
        # Queries of one head, or a block of the KV cache: each as many rows as the other.
        flat = q.view(tokens, heads * size), k_cache.flatten(0, 1), v_cache.flatten(0, 1)
        rows = [TensorDescriptor.from_tensor(each, [BLOCK_SIZE, size], layout) for each in flat]
        programs = torch.cuda.get_device_properties(q.device).multi_processor_count
        _hopper_prefill_kernel[(programs,)](
            *rows, out, self.num_blocks, self.blocks, self.block_tables, self.next_tile, self.block_tables.shape[1],
            k_cache.shape[1] // BLOCK_SIZE, scale,
            PAIRS=heads // 2, GROUP=heads // k_cache.shape[0], SIZE=size, num_warps=4, maxnreg=REGISTERS,
        )  # fmt: skip
        return out


@gluon.jit
def _hopper_prefill_kernel(
    q, k_blocks, v_blocks, out, num_blocks, blocks, block_tables, next_tile, max_blocks, kv_blocks, scale,
    PAIRS: gl.constexpr, GROUP: gl.constexpr, SIZE: gl.constexpr,
):  # fmt: skip
    queries = gl.allocate_shared_memory(q.dtype, [2, QUERIES, SIZE], q.layout)
    keys = gl.allocate_shared_memory(q.dtype, [2 * STAGES, KEYS, SIZE], k_blocks.layout)
    values = gl.allocate_shared_memory(q.dtype, [2 * STAGES, KEYS, SIZE], v_blocks.layout)
    tile = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    buffers = (queries, keys, values, tile)
    q_full, q_empty = _barriers(1)
    k_full, k_empty = _barriers(STAGES)
    v_full, v_empty = _barriers(STAGES)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    sources = (q, k_blocks, v_blocks, blocks, block_tables, next_tile, max_blocks, kv_blocks)
    tiles = gl.load(num_blocks).to(gl.int32) * PAIRS
    factor = scale * LOG2_E
    gl.warp_specialize(
        [
            (_attend_first, (buffers, barriers, out, blocks, tiles, factor, PAIRS, SIZE)),
            (_attend_second, (buffers, barriers, out, blocks, tiles, factor, PAIRS, SIZE)),
            (_load, (buffers, barriers, sources, tiles, PAIRS, GROUP, SIZE)),
        ],
        [4, 1],  # warps, and registers of each of their threads, of the latter two; the first has the rest
        [240, 24],
    )


@gluon.jit
def _barriers(BUFFERS: gl.constexpr):
    # Of each buffer in a ring: `full`, which one copy arrives at, and `empty`, which both heads do.
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(BUFFERS):
        mbarrier.init(full.index(buffer), count=1)
        mbarrier.init(empty.index(buffer), count=2)
    return full, empty


@gluon.jit
def _load(buffers, barriers, sources, tiles, PAIRS: gl.constexpr, GROUP: gl.constexpr, SIZE: gl.constexpr):
    # All that the tiles of this program read, in order. Which tile is next, is asked for when this one is loaded: a
    # program whose multiprocessor was busy with something else takes fewer.
    queries, keys, values, tile_of_both = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    q, k_blocks, v_blocks, blocks, block_tables, next_tile, max_blocks, kv_blocks = sources
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    turn = 0
    lap = 0
    tile = gl.atomic_add(next_tile, 1)
    while tile < tiles:
        head = tile % PAIRS * 2
        columns = blocks + tile // PAIRS * BLOCK_COLUMNS
        first = gl.load(columns + FIRST)
        mbarrier.wait(q_empty.index(0), lap & 1 ^ 1)
        tile_of_both.store(gl.full([1], tile, gl.int32, LAYOUT))
        mbarrier.expect(q_full.index(0), 2 * q.block_type.nbytes)
        for which in gl.static_range(2):
            copy_block(q, [first, (head + which) * SIZE], q_full.index(0), queries.index(which))
        table = block_tables + gl.load(columns + SLOT).to(gl.int64) * max_blocks
        last = (gl.load(columns + SEQ_LEN) - 1) // KEYS
        own = head // GROUP * kv_blocks
        one, two = gl.load(table), gl.load(table + gl.minimum(1, last))
        for block in range(0, last + 1, 2):
            rows = ((own + one) * KEYS).to(gl.int32), ((own + two) * KEYS).to(gl.int32)
            # Where the next blocks are, is asked for a turn ahead. Beyond the last that one again: a turn has two.
            one, two = gl.load(table + gl.minimum(block + 2, last)), gl.load(table + gl.minimum(block + 3, last))
            _load_two(k_blocks, keys, k_full, k_empty, rows, turn)
            _load_two(v_blocks, values, v_full, v_empty, rows, turn)
            turn += 1
        lap += 1
        tile = gl.atomic_add(next_tile, 1)
    mbarrier.wait(q_empty.index(0), lap & 1 ^ 1)
    tile_of_both.store(gl.full([1], tile, gl.int32, LAYOUT))
    mbarrier.arrive(q_full.index(0), count=1)
    if tile == tiles + gl.num_programs(0) - 1:  # nobody asks after this one
        gl.store(next_tile, 0)


@gluon.jit
def _load_two(source, buffer, full, empty, rows, turn):
    stage = turn % STAGES
    mbarrier.wait(empty.index(stage), turn // STAGES & 1 ^ 1)
    mbarrier.expect(full.index(stage), 2 * source.block_type.nbytes)
    for part in gl.static_range(2):
        copy_block(source, [rows[part], 0], full.index(stage), buffer.index(2 * stage + part))


@gluon.jit
def _attend_first(buffers, barriers, out, blocks, tiles, factor, PAIRS: gl.constexpr, SIZE: gl.constexpr):
    _attend(0, buffers, barriers, out, blocks, tiles, factor, PAIRS, SIZE)


@gluon.jit
def _attend_second(buffers, barriers, out, blocks, tiles, factor, PAIRS: gl.constexpr, SIZE: gl.constexpr):
    _attend(1, buffers, barriers, out, blocks, tiles, factor, PAIRS, SIZE)


@gluon.jit
def _attend(
    WHICH: gl.constexpr, buffers, barriers, out, blocks, tiles, factor, PAIRS: gl.constexpr, SIZE: gl.constexpr
):
    # The tiles of this program, for the first or the second head of each.
    q_empty = barriers[1]
    turn = 0
    lap = 0
    tile = _awaited_tile(buffers, barriers, lap)
    while tile < tiles:
        head = tile % PAIRS * 2 + WHICH
        columns = blocks + tile // PAIRS * BLOCK_COLUMNS
        first, count, total = gl.load(columns + FIRST), gl.load(columns + COUNT), gl.load(columns + SEQ_LEN)
        queries = buffers[0].index(WHICH).load(QUERY_LAYOUT)
        fence_async_shared()
        mbarrier.arrive(q_empty.index(0), count=1)
        result, turn = _attend_tile(queries, buffers, barriers, turn, total, total - count, factor, SIZE)
        SUMS: gl.constexpr = result.type.layout
        query, at = gl.arange(0, QUERIES, gl.SliceLayout(1, SUMS)), gl.arange(0, SIZE, gl.SliceLayout(0, SUMS))
        rows = out + ((first + query).to(gl.int64) * (2 * PAIRS) + head) * SIZE
        place = gl.expand_dims(rows, 1) + gl.expand_dims(at, 0)
        gl.store(place, result.to(out.dtype.element_ty), mask=gl.expand_dims(query < count, 1))
        lap += 1
        tile = _awaited_tile(buffers, barriers, lap)


@gluon.jit
def _awaited_tile(buffers, barriers, lap):
    # Of a lap, once its queries have been loaded.
    mbarrier.wait(barriers[0].index(0), lap & 1)
    return gl.sum(buffers[3].load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _attend_tile(queries, buffers, barriers, turn, total, before, factor, SIZE: gl.constexpr):
    # The attention of one head, of whose queries the first sees `before` keys and itself, the last `total`. A turn adds
    # the values of two blocks of keys, and scores the next two.
    _, keys, values, _ = buffers
    _, _, k_full, k_empty, v_full, v_empty = barriers
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    one, two = _scores(queries, keys, k_full, turn)
    one, two = warpgroup_mma_wait(0, deps=(one, two))
    mbarrier.arrive(k_empty.index(turn % STAGES), count=1)
    highest = gl.full([QUERIES], -float("inf"), gl.float32, gl.SliceLayout(1, SCORES))
    one, two, highest, weight_sum, _ = _softmax(
        _seen(one, 0, before), _seen(two, KEYS, before), highest, gl.zeros_like(highest), factor
    )
    one, two = _weights(one, SUMS, keys.dtype), _weights(two, SUMS, keys.dtype)
    sums = gl.zeros([QUERIES, SIZE], gl.float32, SUMS)
    plain = gl.maximum((before + 1) // (2 * KEYS), 1) * (2 * KEYS)
    for begin in range(2 * KEYS, plain, 2 * KEYS):
        one, two, highest, weight_sum, sums = _turn(
            queries, buffers, barriers, turn, begin, before, one, two, highest, weight_sum, sums, factor, False
        )
        turn += 1
    for begin in range(plain, total, 2 * KEYS):
        one, two, highest, weight_sum, sums = _turn(
            queries, buffers, barriers, turn, begin, before, one, two, highest, weight_sum, sums, factor, True
        )
        turn += 1
    stage = turn % STAGES
    mbarrier.wait(v_full.index(stage), turn // STAGES & 1)
    left = (total - 1) % (2 * KEYS) + 1
    _clear_from(values.index(2 * stage), left)
    sums = warpgroup_mma(one, values.index(2 * stage), sums, is_async=True)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    if left > KEYS:
        _clear_from(values.index(2 * stage + 1), left - KEYS)
        sums = warpgroup_mma(two, values.index(2 * stage + 1), sums, is_async=True)
        sums = warpgroup_mma_wait(0, deps=(sums,))
    mbarrier.arrive(v_empty.index((turn + STAGES - 1) % STAGES), count=1, pred=total > 2 * KEYS)
    mbarrier.arrive(v_empty.index(stage), count=1)
    return sums / gl.expand_dims(gl.convert_layout(weight_sum, gl.SliceLayout(1, SUMS)), 1), turn + 1


@gluon.jit
def _turn(
    queries, buffers, barriers, turn, begin, before, one, two, highest, weight_sum, sums, factor, MASKED: gl.constexpr
):  # fmt: skip
    # Weights `one` and `two` are of turn `turn`; the next begins at key `begin`. No product is under way at the end, or
    # else the compiler waits for every single one. Values are given back a turn later, where that takes no wait.
    _, keys, values, _ = buffers
    _, _, k_full, k_empty, v_full, v_empty = barriers
    SUMS: gl.constexpr = sums.type.layout
    stage = turn % STAGES
    next_one, next_two = _scores(queries, keys, k_full, turn + 1)
    mbarrier.wait(v_full.index(stage), turn // STAGES & 1)
    sums = warpgroup_mma(one, values.index(2 * stage), sums, is_async=True)
    sums = warpgroup_mma(two, values.index(2 * stage + 1), sums, is_async=True)
    next_one, next_two = warpgroup_mma_wait(2, deps=(next_one, next_two))
    mbarrier.arrive(k_empty.index((turn + 1) % STAGES), count=1)
    mbarrier.arrive(v_empty.index((turn + STAGES - 1) % STAGES), count=1, pred=begin > 2 * KEYS)
    if MASKED:
        next_one, next_two = _seen(next_one, begin, before), _seen(next_two, begin + KEYS, before)
    one, two, highest, weight_sum, fade = _softmax(next_one, next_two, highest, weight_sum, factor)
    # The registers of the weights are the products' until these are done.
    sums, one, two, fade = warpgroup_mma_wait(0, deps=(sums, one, two, fade))
    sums = sums * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, SUMS)), 1)
    return _weights(one, SUMS, keys.dtype), _weights(two, SUMS, keys.dtype), highest, weight_sum, sums


@gluon.jit
def _scores(queries, keys, k_full, turn):
    # Of two blocks of keys, [QUERIES, KEYS] each, under way.
    stage = turn % STAGES
    mbarrier.wait(k_full.index(stage), turn // STAGES & 1)
    nothing = gl.zeros([QUERIES, KEYS], gl.float32, SCORES)
    one = warpgroup_mma(queries, keys.index(2 * stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    two = warpgroup_mma(queries, keys.index(2 * stage + 1).permute((1, 0)), nothing, use_acc=False, is_async=True)
    return one, two


@gluon.jit
def _seen(scores, begin, before):
    # The scores of keys from `begin` on, of which query i sees those up to `before` + i.
    query, key = gl.arange(0, QUERIES, gl.SliceLayout(1, SCORES)), gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
    return gl.where(gl.expand_dims(begin + key, 0) <= gl.expand_dims(before + query, 1), scores, -float("inf"))


@gluon.jit
def _softmax(one, two, highest, weight_sum, factor):
    # Two more blocks of keys: their weights, the highest score so far, the sum of weights relative to it, and what
    # brings earlier sums to it.
    higher = gl.maximum(highest, gl.max(gl.maximum(one, two), 1))
    scaled = higher * factor
    one = gl.exp2(one * factor - gl.expand_dims(scaled, 1))
    two = gl.exp2(two * factor - gl.expand_dims(scaled, 1))
    fade = gl.exp2(highest * factor - scaled)
    return one, two, higher, weight_sum * fade + gl.sum(one + two, 1), fade


@gluon.jit
def _weights(weights, SUMS: gl.constexpr, DTYPE: gl.constexpr):
    # As the left side of a product with values.
    return gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, SUMS, 2))


@gluon.jit
def _clear_from(values, left):
    # What a block holds beyond the row's end may not be a number, and has the weight 0. Both heads write the same.
    if left < KEYS:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        key = gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))
        values.store(gl.where(gl.expand_dims(key < left, 1), values.load(LAYOUT), 0.0))
        fence_async_shared()
