"""Layers below everything that moves are computed once per step, not once per probe.

With LoRA on the upper layers, or with blocks that CurvZO does not select, all probes of a step meet the same lower layers
with the same inputs. `SharedPrefix` learns from one forward in which order a model's blocks and the owners of its trainable
tensors run; at every later step the first probe keeps the output of the last block before anything that moves, and the other
probes get it instead of computing it. The same operations on the same numbers give the same bits; the first step for which
anything is shared compares the losses nevertheless, and gives sharing up where they differ.

A model takes part if its blocks are a `torch.nn.ModuleList` that runs from front to back, without a key-value cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..anatomy import blocks_of

logger = logging.getLogger(__name__)


class SharedPrefix:
    """Shares the lower blocks of one model among the probes of a step.

    Args:
        model: the model that measures.
        params: its trainable tensors by canonical name.
    """

    def __init__(self, model: nn.Module, params: Mapping[str, torch.Tensor]) -> None:
        names = {id(p): name for name, p in params.items()}
        self._owners = [
            (module, [names[id(p)] for p in module._parameters.values() if id(p) in names]) for module in model.modules()
        ]
        self._blocks = list(blocks_of(model).values())
        self._before: dict[str, int] | None = None  # by tensor: how many blocks have finished when it is first read
        self._checked = False

    def depth(self, moved: Iterable[str]) -> int:
        """How many blocks run before any of the ``moved`` tensors is read; 0 until that is known."""
        if self._before is None:
            return 0
        return min((self._before.get(name, 0) for name in moved), default=0)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Watch one measurement."""
        if self._before is not None:
            yield
            return
        finished: list[int] = []
        before: dict[str, int] = {}

        def entered(names: list[str]) -> Callable[..., None]:
            def note(*_: Any) -> None:
                for name in names:
                    before.setdefault(name, len(finished))

            return note

        with ExitStack() as stack:
            for module, names in self._owners:
                if names:
                    stack.callback(module.register_forward_pre_hook(entered(names)).remove)
            for i, block in enumerate(self._blocks):
                stack.callback(block.register_forward_hook(lambda *_, i=i: finished.append(i)).remove)
            yield
        n = len(self._blocks)
        in_order = n > 1 and len(finished) % n == 0 and finished == list(range(n)) * (len(finished) // n)
        self._before = before if in_order else {}

    @contextmanager
    def keeping(self, depth: int) -> Iterator[Callable[[Callable[[], torch.Tensor]], torch.Tensor]]:
        """Give out a function that measures, the first time in full and then from block ``depth`` on."""
        kept: list[Any] = []
        cached = False

        def keep(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal cached
            cached = cached or any(kwargs.get(key) is not None for key in ("past_key_values", "cache_params"))
            kept.append(output)

        def shared(measure: Callable[[], torch.Tensor]) -> torch.Tensor:
            if not kept:
                handle = self._blocks[depth - 1].register_forward_hook(keep, with_kwargs=True)
                try:
                    return measure()
                finally:
                    handle.remove()
                    if cached:  # a cache has to be filled by every layer
                        self._before = {}
            if not self._before:
                return measure()
            with self._skipping(depth, kept):
                loss = measure()
            if not self._checked:
                self._checked = True
                if not torch.equal(loss, full := measure()):
                    logger.info("Lower layers are not shared among probes: the loss would change.")
                    self._before = {}
                    return full
            return loss

        yield shared

    @contextmanager
    def _skipping(self, depth: int, kept: list[Any]) -> Iterator[None]:
        """The lower blocks return what the last of them returned at the first probe, forward by forward."""
        calls = [0] * depth

        def stand_in(i: int) -> Callable[..., Any]:
            def forward(*_: Any, **__: Any) -> Any:
                calls[i] += 1
                return kept[calls[i] - 1]

            return forward

        lower = self._blocks[:depth]
        own = [block.__dict__.get("forward") for block in lower]  # as other libraries put one there
        try:
            for i, block in enumerate(lower):
                block.forward = stand_in(i)
            yield
        finally:
            for block, forward in zip(lower, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward
