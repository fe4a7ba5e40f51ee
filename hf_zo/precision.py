"""Losses in fp32 even where a 16-bit model would take them from 16-bit logits.

Near 0.69 one bf16 ulp is 4e-3: a two-sided difference at radius 1e-3 would be quantised in steps of 2. Causal language
models of transformers upcast by themselves; sequence classifiers and custom models often do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_LOSSES: set[Callable[..., Any]] = {
    nn.functional.cross_entropy,
    nn.functional.nll_loss,
    nn.functional.log_softmax,
    nn.functional.mse_loss,
    nn.functional.binary_cross_entropy_with_logits,
    torch.log_softmax,
    torch.Tensor.log_softmax,
}


class _Fp32Losses(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOSSES:
            args, kwargs = tree_map(_widened, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


@contextmanager
def fp32_losses(model: nn.Module) -> Iterator[None]:
    """Take losses and log-softmaxes in fp32 while a model with any 16-bit weights runs."""
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        with _Fp32Losses():
            yield
    else:
        yield
