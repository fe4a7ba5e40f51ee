"""What 16-bit weights need: losses in fp32, and a processor that multiplies in their type.

Near 0.69 one bf16 ulp is 4e-3: a two-sided difference at radius 1e-3 would be quantised in steps of 2. Causal language
models of transformers upcast by themselves; sequence classifiers and custom models often do not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

logger = logging.getLogger(__name__)

_LOSSES: set[Callable[..., Any]] = {
    nn.functional.cross_entropy,
    nn.functional.nll_loss,
    nn.functional.log_softmax,
    nn.functional.mse_loss,
    nn.functional.binary_cross_entropy_with_logits,
    torch.log_softmax,
    torch.Tensor.log_softmax,
}


@dataclass
class LossesSeen:
    """What a model's losses were taken from so far."""

    wide: int = 0
    narrow: int = 0


class _Fp32Losses(TorchFunctionMode):
    def __init__(self, seen: LossesSeen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOSSES:
            if any(map(_is_narrow, tree_leaves((args, kwargs or {})))):
                self.seen.narrow += 1
                args, kwargs = tree_map(lambda x: x.float() if _is_narrow(x) else x, (args, kwargs or {}))
            else:
                self.seen.wide += 1
        return func(*args, **(kwargs or {}))


def cpu_multiplies_16_bit() -> bool:
    """Whether torch multiplies 16-bit numbers on this processor without emulating each product, 7 times slower than fp32."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


def warn_of_slow_products(model: nn.Module) -> None:
    """Tell of 16-bit weights on a processor that does not multiply in 16 bits: transformers loads what a checkpoint holds."""
    narrow = next((p for p in model.parameters() if _is_narrow(p) and p.device.type == "cpu"), None)
    if narrow is not None and not cpu_multiplies_16_bit():
        logger.warning(
            "The model is in %s, in which this processor does not multiply: a forward pass takes several times as long as in "
            "fp32. Load it with dtype=torch.float32 if twice the memory is there.",
            str(narrow.dtype).removeprefix("torch."),
        )


def _is_narrow(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16)


@contextmanager
def fp32_losses(model: nn.Module, seen: LossesSeen | None = None) -> Iterator[None]:
    """Take losses and log-softmaxes in fp32 while a model with any 16-bit weights runs.

    Watching every operation takes a few microseconds each. With ``seen``, what one call sees is remembered, and a model that
    has taken losses from fp32 alone, or has no 16-bit weights, is not watched any more.
    """
    seen = LossesSeen() if seen is None else seen
    if not seen.wide and not any(map(_is_narrow, model.parameters())):
        seen.wide += 1
    if seen.wide and not seen.narrow:
        yield
        return
    with _Fp32Losses(seen):
        yield
