"""Every example of a batch displaced along a direction of its own, in one forward pass.

A linear layer with weight W gives example e, for its tokens x, ``(W + a Z_e) x = W x + a Z_e x``; biases likewise. So nothing
is written to W: a hook adds the second term to the layer's output, sequence by sequence. With the factors of an adapter it
costs as much as the factors themselves; with whole weights it would double the forward pass, and hold a direction for each
example in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..directions import ExampleDirections, Probe


def owners_of_linears(model: nn.Module, params: Mapping[str, torch.Tensor]) -> dict[nn.Module, dict[str, str]]:
    """The linear layers that own the trainable tensors, with the names of their ``weight`` and ``bias`` among these.

    Raises:
        ValueError: if a trainable tensor belongs to anything else than a `torch.nn.Linear`.
    """
    names = {id(p): name for name, p in params.items()}
    found: dict[nn.Module, dict[str, str]] = {}
    for module in model.modules():
        owned = {key: names[id(p)] for key, p in module._parameters.items() if id(p) in names}
        if owned and isinstance(module, nn.Linear):
            found[module] = owned
    others = sorted(set(params) - {name for owned in found.values() for name in owned.values()})
    if others:
        raise ValueError(
            f"zo_per_example=True displaces linear layers only, such as those of LoRA and ZO-Act adapters; "
            f"{others[0]} and {len(others) - 1} other trainable tensors are none. Freeze them, or unset zo_per_example."
        )
    return found


class ExampleProbes:
    """Hooks that displace the linear layers of a model example by example.

    Args:
        model: the module that owns ``params``.
        params: trainable tensors by canonical name.
        runs: gives ``(begin, end, example)`` for stretches of the batch's tokens, flattened, that belong to one example;
            the batch is that of the forward pass which asks.

    Raises:
        ValueError: see `owners_of_linears`.
    """

    def __init__(
        self, model: nn.Module, params: Mapping[str, torch.Tensor], runs: Callable[[int], list[tuple[int, int, int]]]
    ) -> None:
        self._layers = owners_of_linears(model, params)
        self._runs = runs

    @contextmanager
    def measuring(self) -> Iterator[Callable[[Probe], None]]:
        """Give out a function that decides at which probe the following forwards run."""
        current = Probe()

        def place(probe: Probe) -> None:
            nonlocal current
            current = probe

        def displaced(layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            owned, x = self._layers[layer], args[0]
            runs = self._runs(x.shape[:-1].numel())
            flat, result = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
            numbers = [example for _, _, example in runs]
            present = range(min(numbers), max(numbers) + 1)
            for radius, family in current.terms:
                assert isinstance(family, ExampleDirections)
                z = {key: family.each(name, present).to(output.dtype) for key, name in owned.items()}
                for begin, end, example in runs:
                    mine = example - present.start
                    if "weight" in z:
                        result[begin:end].addmm_(flat[begin:end].to(result.dtype), z["weight"][mine].t(), alpha=radius)
                    if "bias" in z:
                        result[begin:end].add_(z["bias"][mine], alpha=radius)
            return result.view(output.shape)

        handles = [layer.register_forward_hook(displaced) for layer in self._layers]
        try:
            yield place
        finally:
            for handle in handles:
                handle.remove()
