"""What is relied on of torch's flash attention: an operator and a function whose arguments change between versions."""

import inspect

import torch
from torch.nn.attention.varlen import varlen_attn

from batching import flash


def test_the_operator_takes_what_it_is_given() -> None:
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    positional = ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    assert names[:10] == [*positional, "return_debug_mask"]
    assert {"scale", "seqused_k"} <= set(names)
    assert schema.returns[0].name == "output"


def test_the_public_function_is_used_where_it_can_do_it() -> None:
    parameters = inspect.signature(varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    able = {"seqused_k", "window_size", "enable_gqa", "scale"} <= set(parameters)
    assert able == flash.PUBLIC
    if able:
        assert parameters["window_size"].default == (-1, -1)
