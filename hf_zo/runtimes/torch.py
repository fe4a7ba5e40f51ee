"""TorchRuntime: measures probes in this process, and leaves no trace of having done so.

Three ways to put ``theta + a z`` where the forward pass reads it, and to be back at ``theta`` afterwards:

- ``copy`` keeps a clean copy of the trainables while the probes of a step are measured. Exact; for adapter-sized sets.
- ``transient`` never writes to the weights. Forward hooks give each module that owns trainables a displaced scratch tensor
  for the length of its own forward (`hf_zo.runtimes.transient`). Exact; the extra memory is the largest module.
- ``in_place`` adds and subtracts in the weights, as MeZO's code does. It drifts by rounding (1e-9 per cycle and weight in
  fp32, 8e-5 in bf16), so it is only used when asked for by name.

``auto`` takes ``copy`` when the trainables are at most a twentieth of the model, else ``transient``.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from ..directions import Probe
from .examples import ExampleProbes
from .placement import Measure, by_copy, in_place
from .prefix import SharedPrefix
from .transient import TransientWeights

logger = logging.getLogger(__name__)

Restore = Literal["auto", "copy", "transient", "in_place"]
COPY_UP_TO = 0.05  # share of the model's bytes up to which `auto` keeps a clean copy


class TorchRuntime:
    """Measures the loss at probes by running a model or any other function of ``params``.

    Args:
        params: trainable tensors by canonical name.
        restore: see the module's description.
        model: the module that owns ``params``; needed for ``transient``. Without it ``auto`` means ``copy``.
        runs: for probes along `ExampleDirections`, see `ExampleProbes`; ``restore`` has then nothing to act on.
        sharing: layers below all that moves are computed once for all probes (`SharedPrefix`). False where probes may feed
            the model different inputs, as an objective that generates does.

    Raises:
        ValueError: if ``restore`` is unknown, or ``transient`` without a model; with ``runs``, see `ExampleProbes`.
    """

    def __init__(
        self,
        params: Mapping[str, torch.Tensor],
        restore: Restore = "auto",
        model: nn.Module | None = None,
        runs: Callable[[int], list[tuple[int, int, int]]] | None = None,
        sharing: bool = True,
    ) -> None:
        if restore not in get_args(Restore):
            raise ValueError(f"zo_restore={restore!r} does not exist; choose one of {', '.join(get_args(Restore))}.")
        if restore == "transient" and model is None:
            raise ValueError("zo_restore='transient' works through a module's forward; use 'copy' for a plain function.")
        self.params = dict(params)
        self.model = model
        self.restore: Restore = self._choose() if restore == "auto" else restore
        if self.restore == "in_place" and any(p.dtype in (torch.bfloat16, torch.float16) for p in params.values()):
            logger.warning(
                "zo_restore='in_place' on 16-bit weights drifts: adding and subtracting the same noise changes nearly half "
                "of the weights in every step. 'transient' and 'copy' are exact."
            )
        self._prefix = SharedPrefix(model, params) if model is not None and sharing else None
        self._examples = ExampleProbes(model, params, runs) if model is not None and runs is not None else None
        self._transient = TransientWeights(model, params) if model is not None and self.restore == "transient" else None

    def _choose(self) -> Restore:
        if self.model is None:
            return "copy"
        trainable = sum(p.nbytes for p in self.params.values())
        total = sum(p.nbytes for p in self.model.parameters())
        return "copy" if trainable <= COPY_UP_TO * total else "transient"

    @torch.no_grad()
    def losses(self, probes: Sequence[Probe], measure: Measure) -> list[float]:
        """Loss at each probe, in fp64; as many numbers per probe as ``measure`` returns.

        Weights and all random states are afterwards what they were, also after an error.

        Every probe sees the same random numbers, in case the model draws any.
        """
        measured: list[torch.Tensor] = []
        with Randomness(self.params.values()) as randomness, ExitStack() as stack:

            def rewound() -> torch.Tensor:
                randomness.rewind()
                return measure()

            if self._examples is not None:
                place = stack.enter_context(self._examples.measuring())
            elif self._transient is not None:
                place = stack.enter_context(self._transient.measuring(probes, rewound))
            elif self.restore == "copy":
                place = stack.enter_context(by_copy(self.params, self.params))
            else:
                place = stack.enter_context(in_place(self.params))
            shared = stack.enter_context(self._sharing(probes))
            for probe in probes:
                place(probe)
                measured.append(shared(rewound).detach())
        # One transfer for all probes: the only point at which the host waits for the device.
        return [float(x) for x in torch.cat([m.reshape(-1) for m in measured]).double().tolist()]

    @contextmanager
    def _sharing(self, probes: Sequence[Probe]) -> Iterator[Callable[[Measure], torch.Tensor]]:
        """Give out a function that measures without computing anew what no probe changes."""
        if self._prefix is None:
            yield lambda measure: measure()
            return
        directions = {direction for probe in probes for _, direction in probe.terms}
        depth = self._prefix.depth(name for name in self.params if any(d.moves(name) for d in directions))
        if depth and len(probes) > 1:
            with self._prefix.keeping(depth) as shared:
                yield shared
        else:
            with self._prefix.learning():
                yield lambda measure: measure()


class Randomness:
    """The python, numpy and torch random states, rewound before every probe and put back at the end."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.cuda = sorted({t.device.index for t in tensors if t.device.type == "cuda"})

    def __enter__(self) -> Randomness:
        self.python, self.numpy, self.torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.on_cuda = [torch.cuda.get_rng_state(i) for i in self.cuda]
        return self

    def rewind(self) -> None:
        """Go back to the states on entry."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        for i, state in zip(self.cuda, self.on_cuda, strict=True):
            torch.cuda.set_rng_state(state, i)

    def __exit__(self, *exc_info: object) -> None:
        self.rewind()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run forwards in eval mode while code around them still sees ``model.training`` as True.

    Both probes of a pair must meet the same network, so dropout is off in every module. The root's own flag is only down
    during its forward: trainers such as TRL's file metrics by ``model.training``, and a probe is training.
    """
    training = [module for module in model.modules() if module.training]

    def down(module: nn.Module, args: Any) -> None:
        module.training = False

    def up(module: nn.Module, args: Any, output: Any) -> None:
        module.training = True

    handles = [model.register_forward_pre_hook(down), model.register_forward_hook(up, always_call=True)]
    try:
        for module in training:
            module.training = False
        model.training = True
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.training = False
        for module in training:
            module.training = True
