"""bfloat16 on a processor that does not multiply in it: the same roundings, many times faster than torch's fallback.

A processor with bfloat16 products multiplies bfloat16 numbers exactly, adds in fp32 and rounds the sum. Products in fp32 of the
same numbers, rounded once, give that up to the order of the additions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_PRODUCTS = (nn.functional.linear, nn.functional.scaled_dot_product_attention)


class ProductsInFp32(TorchFunctionMode):
    """While it is entered, linear layers and attention on bfloat16 tensors multiply in fp32 and round the result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_wide, (args, kwargs or {}))
        return func(*args, **kwargs).to(torch.bfloat16)


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x
