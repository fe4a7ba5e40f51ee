"""bfloat16 on a processor that is faster in fp32: the same roundings, at the speed of fp32.

A product of bfloat16 matrices multiplies exactly, adds in fp32 and rounds the sum. Products in fp32 of the same numbers,
rounded once, give that up to the order of the additions. Processors without bfloat16 products emulate them, many times slower;
some with them take longer than in fp32.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_PRODUCTS = (nn.functional.linear, nn.functional.scaled_dot_product_attention)


def fp32_is_faster() -> bool:
    """Whether this processor multiplies fp32 matrices faster than bfloat16 ones: measured on a layer of SmolLM2-135M."""
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(5):
        for dtype, taken in seconds.items():
            x, weight = torch.ones(1024, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
            begin = time.perf_counter()
            nn.functional.linear(x, weight)
            taken.append(time.perf_counter() - begin)
    return min(seconds[torch.float32]) < min(seconds[torch.bfloat16])


class ProductsInFp32(TorchFunctionMode):
    """While it is entered, linear layers and attention on bfloat16 tensors multiply in fp32 and round the result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_wide, (args, kwargs or {}))
        return func(*args, **kwargs).to(torch.bfloat16)


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x
