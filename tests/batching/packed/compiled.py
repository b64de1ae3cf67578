"""`python -m tests.batching.packed.compiled CAPABILITY`: compile every Triton kernel for a GPU that need not be there.

Prints a line of JSON: bytes of shared memory by kernel. The interpreter that other tests run kernels in accepts more
than the compiler does.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from triton import compile as compiled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gluon
from triton.experimental.gluon._runtime import GluonASTSource

from batching.packed import gluon_attention, triton_attention, triton_fp8, triton_layer, triton_sampling
from batching.packed.kv_cache import BLOCK_SIZE

HALF, SINGLE, WHOLE, LONG = "*bf16", "*fp32", "*i32", "*i64"
EVEN = [["tt.divisibility", 16]]


@dataclass
class Case:
    """A kernel with its arguments' types, those of its numbers in `even` divisible by 16, and its constants."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    even: tuple[str, ...] = ()
    options: dict[str, int] = field(default_factory=dict)

    def shared(self, capability: int) -> int:
        """Compile it: bytes of shared memory that a program takes."""
        names = self.kernel.arg_names
        constants = self.constants | ({"OVERLAP": capability >= triton_layer.HOPPER * 10} if "OVERLAP" in names else {})
        signature = {name: self.types.get(name, "constexpr") for name in names}
        aligned = {name for name, kind in self.types.items() if kind.startswith("*")} | set(self.even)
        attributes = {(names.index(name),): EVEN for name in aligned}
        written_in = GluonASTSource if self.kernel.is_gluon() else ASTSource
        source = written_in(self.kernel, signature, constants, attributes)
        done = compiled(source, target=GPUTarget("cuda", capability, 32), options=self.options)
        return int(done.metadata.shared)


def attention(stages: int, size: int = 128) -> Iterator[Case]:
    """With heads of this size, which is padded to 128."""
    places = {"q": HALF, "out": HALF, "block_tables": LONG, "max_blocks": "i32", "scale": "fp32"}
    decode = places | {"k_cache": HALF, "v_cache": HALF, "head_stride": "i32", "min_split": "i32"}
    decode |= dict.fromkeys(("slots", "seq_lens", "num_drafted", "arrived"), WHOLE)
    decode |= {"partial": SINGLE, "stats": SINGLE}
    block = 128
    shape = {
        "HEADS": 32,
        "GROUP": 4,
        "SIZE": size,
        "BLOCK": block,
        "QUERY_BLOCK": triton_attention.QUERY_BLOCK,
        "KEY_BLOCK": triton_attention.KEY_BLOCK,
    }
    options = {"num_warps": 4, "num_stages": stages}
    blocks = dict.fromkeys(("k_blocks", "v_blocks"), f"tensordesc<bf16[{triton_attention.KEY_BLOCK},{block}]>")
    prefill = places | blocks | {"num_blocks": WHOLE, "blocks": WHOLE, "kv_blocks": "i32"}
    yield Case(triton_attention._prefill_kernel, prefill, shape, (), options)
    heads = {"KV_HEADS": 8, "GROUP": 4, "SIZE": size, "DOT_ROWS": 16, "BLOCK": block}
    splits = {"KEY_BLOCK": triton_attention.DECODE_KEY_BLOCK, "SPLITS": 16, "MERGE_BLOCK": 16}
    options = {"num_warps": 2, "num_stages": stages}
    for ahead, width, counted in ((False, 4, False), (True, 1, False), (False, 1, True)):  # each branch once
        step = triton_attention.DECODE_KEY_BLOCK if ahead else triton_attention.KEY_BLOCK
        shape = heads | splits | {"AHEAD": ahead, "STEP": step, "WIDTH": width, "ROW_BLOCK": 4 * width}
        number = {"num_sequences": LONG} if counted else {}
        constants = shape | {"COUNTED": counted} | ({} if counted else {"num_sequences": None})
        yield Case(triton_attention._decode_kernel, decode | number, constants, ("head_stride",), options)


def attention_on_hopper() -> Iterator[Case]:
    numbers = {"out": HALF, "num_blocks": WHOLE, "blocks": WHOLE, "block_tables": LONG, "next_tile": WHOLE}
    numbers |= {"max_blocks": "i32", "kv_blocks": "i32", "scale": "fp32"}
    layout = gluon.NVMMASharedLayout.get_default_for([BLOCK_SIZE, 128], gluon.bfloat16)
    types = dict.fromkeys(("q", "k_blocks", "v_blocks"), f"tensordesc<bf16[{BLOCK_SIZE}, 128],{layout!r}>") | numbers
    options = {"num_warps": 4, "maxnreg": gluon_attention.REGISTERS}
    yield Case(gluon_attention._hopper_prefill_kernel, types, {"PAIRS": 16, "GROUP": 4, "SIZE": 128}, (), options)


def layer() -> Iterator[Case]:
    plain = {"x": HALF, "weight": HALF, "out": HALF, "size": "i32"}
    yield Case(triton_layer._norm_kernel, plain | {"eps": "fp32"}, {"BLOCK": 4096}, ("size",), {"num_warps": 4})
    yield Case(triton_layer._silu_kernel, {"pair": HALF, "out": HALF, "size": "i32"}, {"BLOCK": 1024}, ("size",))
    turned = dict.fromkeys(("qkv", "cos", "sin", "q_weight", "k_weight", "q", "k_cache", "v_cache"), HALF)
    numbers = {"kv_slots": LONG, "head_stride": "i32", "eps": "fp32"}
    shape = {"KV_HEADS": 8, "Q_GROUPS": 4, "SIZE": 128, "HEADS": 8, "BLOCK": 128}
    for norm in (True, False):
        yield Case(triton_layer._rotate_kernel, turned | numbers, shape | {"NORM": norm}, ("head_stride",))
    row = plain | {"bias": HALF, "width": "i32"}
    for gated, add, bias, even in ((True, False, True, True), (False, True, True, False), (False, False, False, True)):
        asked = {"GATED": gated, "ADD": add, "BIAS": bias, "EVEN": even}
        block = {"OUTPUTS": triton_layer.OUTPUTS, "BLOCK": triton_layer.WIDTH}
        yield Case(triton_layer._row_kernel, row, asked | block, ("size", "width") if even else (), {"num_warps": 2})


def products_of_few() -> Iterator[Case]:
    numbers = {"bias": HALF, "out": HALF, "partial": SINGLE, "size": "i32"}
    tile, depth = triton_layer.TILE, triton_layer.DEPTH
    for rows, splits in ((16, 1), (64, 3)):
        tiles = {"x": f"tensordesc<bf16[{rows},{depth}]>", "weight": f"tensordesc<bf16[{tile},{depth}]>"}
        flags = {"SPLITS": splits, "ADD": True, "BIAS": True}
        shape = {"ROWS": rows, "TILE": tile, "DEPTH": depth} | flags
        types = tiles | numbers | {"tokens": "i32", "width": "i32"}
        options = {"num_warps": 4, "num_stages": 4}
        yield Case(triton_layer._few_kernel, types, shape, ("size", "width"), options)
    yield Case(triton_layer._sum_kernel, numbers | {"numbers": "i32"}, flags | {"BLOCK": 512}, ("size",))


def products_in_fp8() -> Iterator[Case]:
    eight = "*fp8e4nv"
    numbers = {"stride": "i32", "width": "i32"}
    rounding = {"rounded": eight, "scales": SINGLE} | numbers
    options = {"num_warps": 4}
    yield Case(triton_fp8._round_kernel, {"x": HALF} | rounding, {"BLOCKS": 8}, ("width",), options)
    yield Case(triton_fp8._rounded_silu_kernel, {"pair": HALF} | rounding, {"BLOCKS": 8}, ("width",), options)
    norm = {"x": HALF, "weight": HALF, "eps": "fp32"} | rounding
    yield Case(triton_fp8._rounded_norm_kernel, norm, {"BLOCKS": 32}, ("width",), options)
    product = {"x": eight, "weight": eight, "bias": HALF, "out": HALF, "tokens": "i32", "outputs": "i32"} | numbers
    product |= dict.fromkeys(("x_scales", "scales", "partial"), SINGLE)
    for rows, outputs, splits, stages in ((16, 32, 4, 5), (64, 32, 1, 5), (64, 64, 4, 4), (64, 128, 1, 4)):
        flags = {"SPLITS": splits, "ADD": True, "BIAS": True}
        shape = {"ROWS": rows, "OUTPUTS": outputs} | flags
        options = {"num_warps": 4, "num_stages": stages}
        yield Case(triton_fp8._product_kernel, product, shape, ("outputs", "width"), options)


def sampling(widths: Sequence[int] = (1, 4)) -> Iterator[Case]:
    """Of so many tokens of a sequence: one, or also its draft."""
    state = {
        "slots": WHOLE,
        "int_params": LONG,
        "float_params": SINGLE,
        "counts": "*i16",
        "bias": SINGLE,
        "bitmask": WHOLE,
        "drafts": WHOLE,
        "max_drafts": "i32",
    }
    scan = state | {"logits": HALF, "stats": SINGLE, "candidates": WHOLE, "size": "i32", "bitmask_width": "i32"}
    place = dict.fromkeys(("slots", "seq_lens", "num_drafted", "drafts"), WHOLE)
    place |= dict.fromkeys(("max_blocks", "max_drafts", "spare_kv_slot"), "i32")
    place |= dict.fromkeys(("num_decodes", "int_params", "block_tables", "ids", "positions", "kv_slots"), LONG)
    advance = dict.fromkeys(("slots", "drafts", "history"), WHOLE) | {"counts": "*i16", "float_params": SINGLE}
    advance |= dict.fromkeys(("sampled", "int_params", "out"), LONG)
    advance |= dict.fromkeys(("size", "max_drafts", "max_history", "spare_slot"), "i32")
    for width in widths:
        shape = {"BLOCK": 8192, "WIDTH": width}
        yield Case(triton_sampling._scan_kernel, scan, shape, ("size",), {"num_warps": 8})
        yield Case(
            triton_sampling._sample_kernel, scan | {"out": LONG}, shape | {"BLOCKS": 19, "SPAN": 32}, ("size",),
            {"num_warps": 16},
        )  # fmt: skip
        yield Case(triton_sampling._place_kernel, place, {"WIDTH": width, "SPAN": width}, (), {"num_warps": 1})
        drafting = {"WIDTH": width, "SPAN": 4, "DRAFTS": 3, "BLOCK": 1024}
        yield Case(triton_sampling._advance_kernel, advance, drafting, ("size",), {"num_warps": 4})


def main() -> None:
    capability = int(sys.argv[1])
    match capability:
        case 80:
            cases = [*attention(2, size=96), *layer(), *sampling()]  # the other cards' heads fill the block
        case 89:  # with the least shared memory: what takes much of it
            cases = [*(case for case in attention(2) if case.constants.get("WIDTH") != 1), *products_in_fp8()]
        case _:
            cases = [*attention(3), *attention_on_hopper(), *layer(), *products_of_few(), *sampling((4,))]
            cases += products_in_fp8()
    print(json.dumps([[case.kernel.fn.__name__, case.shared(capability)] for case in cases]))


if __name__ == "__main__":
    main()
