"""ZOOptimizer: applies a staged estimate, as a real `torch.optim.Optimizer`.

The training step stages an `Estimate`; the loop's own ``optimizer.step()`` applies it with each group's learning rate and
weight decay. Between the two the weights are clean and un-updated, so a checkpoint may be taken there.

With no inner optimizer (``optim="sgd"``) one tensor at a time walks along the estimate's directions, and no gradient is
ever formed. With an inner optimizer (Adam and the like) ``.grad`` is filled first: meant for adapter-sized sets.

Weights in bf16 and fp16 are rounded stochastically, with bits keyed like the noise, because an update of 1e-6 is far below
one ulp of a typical weight: rounding to nearest would keep 3 % of it, stochastic rounding keeps all of it in expectation.
What it adds is variance, |update| * ulp per weight and step. That falls with the learning rate only as fast as the update
itself, so smaller steps do not average it out; averaging several directions into one update does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import noise
from .directions import displace
from .estimators import Estimate, Estimator


class ZOOptimizer(torch.optim.Optimizer):
    """Applies gradient estimates that were made from losses.

    Args:
        groups: parameter groups, each with ``lr`` and ``weight_decay``.
        names: canonical name of every parameter in the groups.
        estimator: the method whose estimates are applied; its state is saved and loaded with the optimizer's.
        inner: an optimizer over the same parameters that turns gradients into updates; None for streamed SGD with
            decoupled weight decay.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        names: Mapping[torch.Tensor, str],
        estimator: Estimator,
        inner: torch.optim.Optimizer | None = None,
    ) -> None:
        if inner is not None:
            groups = [dict(group) for group in inner.param_groups]
        # Some schedulers read the initial rate from the defaults.
        super().__init__(groups, defaults={"lr": groups[0]["lr"], "weight_decay": 0.0})
        self.names = names
        self.estimator = estimator
        self.inner = inner
        self.skipped_steps = 0
        self.forward_passes = 0  # those before the first step are set by who made them
        self.last_was_skipped = False
        self._staged: Estimate | None = None
        self._ready = False
        # An inner optimizer would lose small updates of 16-bit weights, so it works on fp32 shadows of them.
        self._shadows: dict[torch.Tensor, torch.nn.Parameter] = {}
        if inner is not None:
            for group in inner.param_groups:
                group["params"] = [self._shadow(p) for p in group["params"]]

    @property
    def params(self) -> dict[str, torch.Tensor]:
        """The parameters by canonical name."""
        return {name: p for p, name in self.names.items()}

    def _shadow(self, p: torch.Tensor) -> torch.Tensor:
        if p.dtype not in (torch.bfloat16, torch.float16):
            return p
        self._shadows[p] = torch.nn.Parameter(p.detach().float(), requires_grad=False)
        return self._shadows[p]

    def stage(self, estimate: Estimate | None, forward_passes: int = 0) -> None:
        """Hold an estimate for the next `step`; None holds a skipped step."""
        self._staged = estimate
        self._ready = True
        self.forward_passes += forward_passes

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply the staged estimate: weights and method state move together, or neither does."""
        if closure is not None:
            raise ValueError("ZOOptimizer.step takes no closure: losses are measured by the training step.")
        if not self._ready:
            raise RuntimeError("ZOOptimizer.step was called with no staged estimate; ZOTrainer.training_step stages it.")
        estimate, self._staged, self._ready = self._staged, None, False
        self.last_was_skipped = estimate is None
        if estimate is None:
            self.skipped_steps += 1
            return
        if not estimate.terms:
            pass  # nothing was probed: without a direction there is no decay either
        elif self.inner is None:
            self._walk(estimate)
        else:
            self._fill_and_step(estimate, self.inner)
        self.estimator.commit(estimate)

    def _rounding_key(self, estimate: Estimate, name: str) -> int:
        return noise.stream_key(self.estimator.seed, estimate.step, 0, "rounding", name)

    def _walk(self, estimate: Estimate) -> None:
        for group in self.param_groups:
            lr = float(group["lr"])
            decay = 1.0 - lr * group["weight_decay"]
            terms = [(-lr * weight, direction) for weight, direction in estimate.terms]
            for p in group["params"]:
                name = self.names[p]
                displace(p, p, name, terms, decay=decay, rounding_key=self._rounding_key(estimate, name))

    def _fill_and_step(self, estimate: Estimate, inner: torch.optim.Optimizer) -> None:
        for group, inner_group in zip(self.param_groups, inner.param_groups, strict=True):
            inner_group.update({k: v for k, v in group.items() if k != "params"})
            for p, target in zip(group["params"], inner_group["params"], strict=True):
                if target is not p:
                    target.copy_(p)
                target.grad = estimate.gradient(self.names[p], p)
        inner.step()
        inner.zero_grad(set_to_none=True)
        for p, shadow in self._shadows.items():
            noise.round_stochastically(shadow, self._rounding_key(estimate, self.names[p]), p)

    def reset(self) -> None:
        """Forget everything since construction, the inner optimizer's moments included: the run starts again."""
        if self.inner is not None:
            self.inner.state.clear()
        self.estimator.state = {}
        self.skipped_steps = self.forward_passes = 0
        self._staged, self._ready = None, False

    def state_dict(self) -> dict[str, Any]:
        """Groups, method state and counters. A staged estimate is not part of it: resuming estimates that step again."""
        return {
            **super().state_dict(),
            "estimator": self.estimator.state,
            "inner": None if self.inner is None else self.inner.state_dict(),
            "skipped_steps": self.skipped_steps,
            "forward_passes": self.forward_passes,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, and drop anything staged.

        Raises:
            ValueError: if the state was saved by another kind of optimizer or with other parameter groups.
        """
        if "estimator" not in state_dict:
            raise ValueError(
                "This optimizer state was not written by ZOOptimizer; the checkpoint belongs to a first-order run. "
                "Load its weights as the model and start a new run instead of resuming."
            )
        if (state_dict["inner"] is None) != (self.inner is None):
            raise ValueError("The checkpoint was written with a different `optim`; resume with the one it was made with.")
        super().load_state_dict({k: state_dict[k] for k in ("state", "param_groups")})
        if self.inner is not None:
            self.inner.load_state_dict(state_dict["inner"])
        self.estimator.state = dict(state_dict["estimator"])
        self.skipped_steps = int(state_dict["skipped_steps"])
        self.forward_passes = int(state_dict["forward_passes"])
        self._staged, self._ready = None, False


def leave_out_frozen(inner: torch.optim.Optimizer, trained: Sequence[torch.Tensor]) -> None:
    """Take what is not trained out of a given optimizer: it would leave parameters without gradient alone.

    Raises:
        ValueError: if it lacks some of those that are trained.
    """
    known, held = set(trained), 0
    for group in inner.param_groups:
        group["params"] = [p for p in group["params"] if p in known]
        held += len(group["params"])
    if held < len(known):
        raise ValueError(
            f"The optimizer in `optimizers` holds {held} of the {len(known)} tensors that are trained: a method that brings an "
            "adapter makes new ones. Set `optim`, or pass optimizer_cls_and_kwargs instead."
        )
