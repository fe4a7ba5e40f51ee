"""What a probe measures: the loss of an accumulation window, pooled over micro-batches and processes.

The runtime displaces the weights and asks for one number: the loss that the Trainer's own step would report for the window at
these weights, whatever the window is cut into. Micro-batches and ranks are weighted by what their losses are means of, or added
up where the Trainer divides by the items of the whole window. With ``zo_per_example``, it asks for one number for each example.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed
from torch import nn
from transformers import Trainer

from .anatomy import shifts_labels
from .directions import Probe
from .objectives import OBJECTIVES, contributions, example_count, label_count, logits_of
from .packing import Packing, example_of_items, numbered
from .precision import LossesSeen, fp32_losses
from .preparation import Preparation
from .runtimes import TorchRuntime
from .tasks.scoring import OptionLabels
from .trajectory import content_hash

AGREEMENT_EVERY = 100
"""Steps between comparisons of the ranks' weights; they cost 8 bytes and one small tensor on the host."""


class Measurement(Preparation):
    """What `ZOTrainerMixin` measures in a step."""

    _runtime: TorchRuntime | None = None
    _losses_seen: LossesSeen
    _divides_by_items: bool | None = None
    _examples_checked = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; the head of the model runs where a rewritten batch wants it."""
        serving = nullcontext() if self._engine is None else self._engine.serving()
        with self._packing.reading(inputs) as taken, serving:
            return super().compute_loss(model, taken, *args, **kwargs)

    def _packing_of(self, model: nn.Module) -> Packing:
        # A subclass with a compute_loss of its own reads the outputs in ways that nobody can foresee.
        # A compiled model calls no hooks, and every new shape would have to be compiled.
        own = type(self).compute_loss is Measurement.compute_loss
        enabled = self.args.zo_packing and own and not self.args.torch_compile
        return Packing(model, enabled, in_rows=self._engine is None)

    def _measure(
        self, model: nn.Module, probes: Sequence[Probe], window: list[dict[str, Any]], num_items: torch.Tensor | int | None
    ) -> list[float]:
        """Losses of the pooled window at ``probes``: over micro-batches, then over processes. fp64; the same on all ranks."""
        assert self._runtime is not None
        num_items = self._items_if_read(model, window, num_items)
        scaled = self._loss_is_scaled(num_items)

        def weights_of(window: Sequence[dict[str, Any]]) -> list[float]:
            if scaled:  # each loss is a sum over its items, divided by the items of the window
                return [1.0] * len(window)
            return [float(label_count(self.model, x) if self._measures_labels else example_count(x)) for x in window]

        def pooled(window: Sequence[dict[str, Any]], weights: Sequence[float]) -> torch.Tensor:
            total = sum(w * self._probe_loss(model, dict(x), num_items).double() for w, x in _counted(weights, window))
            return total if scaled else total / max(sum(weights), 1.0)  # type: ignore[return-value]

        def loss_of(batch: dict[str, Any]) -> torch.Tensor:
            return self._model_loss(model, batch, num_items)

        if self.args.zo_per_example:
            window, examples = self._numbered(window)
        if self._engine is not None and not self._engine.checked:
            inputs = window[0]
            self._engine.check(
                float(loss_of(dict(inputs))),
                float(super().compute_loss(model, dict(inputs), num_items_in_batch=num_items)),  # type: ignore[arg-type]
            )
        rewritten = self._reads_labels_only(window)
        if rewritten:
            parts = (self._packing.parts(x, loss_of, lambda batches: pooled(batches, weights_of(batches))) for x in window)
            window = [part for several in parts for part in several]
        weights = weights_of(window)
        if rewritten:
            window = [self._packing(inputs, loss_of) for inputs in window]
        measure = functools.partial(pooled, window, weights)
        if self.args.zo_per_example:
            measure = functools.partial(self._by_example, model, window, weights, num_items, scaled, examples)
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        if ranks == 1:
            return self._runtime.losses(probes, measure)
        if self.args.zo_parallel == "directions":
            # Every rank measures equally many, the last one again where they do not come out even: the training loss may
            # itself communicate.
            share = [probes[min(i, len(probes) - 1)] for i in range(rank, -(-len(probes) // ranks) * ranks, ranks)]
            mine = self._runtime.losses(share, measure)
            measured = torch.tensor(mine, dtype=torch.float64).view(len(share), -1)
            gathered = torch.zeros(len(probes), measured.shape[1], dtype=torch.float64)
            for i, losses in zip(range(rank, len(probes), ranks), measured, strict=False):
                gathered[i] = losses
            return self._sum_over_ranks(gathered.flatten())
        # With average_tokens_across_devices every rank's loss is already divided by the items of all ranks and multiplied
        # by their number; otherwise ranks count by their items.
        weight = sum(weights)
        if scaled and num_items is not None:
            weight = 1.0 if self.args.average_tokens_across_devices else float(num_items)
        mine = self._runtime.losses(probes, measure)
        mine = [weight * x if weight else 0.0 for x in mine]  # without labels, a loss is NaN
        *sums, total_weight = self._sum_over_ranks(torch.tensor([*mine, weight], dtype=torch.float64))
        return [x / total_weight for x in sums]

    def _numbered(self, window: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
        """The window with its examples numbered, and how many there are; over all ranks, if these read different data."""
        counts = [example_count(inputs) for inputs in window]
        ranks, rank, total, first = self.accelerator.num_processes, self.accelerator.process_index, sum(counts), 0
        if ranks > 1 and self.args.zo_parallel == "data":
            mine = torch.zeros(ranks, dtype=torch.float64)
            mine[rank] = total
            of_ranks = [int(n) for n in self._sum_over_ranks(mine)]
            total, first = sum(of_ranks), sum(of_ranks[:rank])
        begins = itertools.accumulate(counts, initial=first)
        return [numbered(inputs, begin) for inputs, begin in zip(window, begins, strict=False)], total

    def _by_example(
        self,
        model: nn.Module,
        window: list[dict[str, Any]],
        weights: list[float],
        num_items: torch.Tensor | int | None,
        scaled: bool,
        examples: int,
    ) -> torch.Tensor:
        """What every example adds to the pooled loss of the window, fp64.

        Raises:
            ValueError: on the first batch, if the loss is not the mean cross-entropy of labels or options.
        """
        total, causal = torch.zeros(examples, dtype=torch.float64, device=self.args.device), shifts_labels(self.model)
        for w, inputs in _counted(weights, window):
            with self.compute_loss_context_manager(), fp32_losses(self.model, self._losses_seen):
                loss, outputs = self.compute_loss(model, dict(inputs), return_outputs=True, num_items_in_batch=num_items)
            items = contributions(self.model, logits_of(outputs), inputs, num_items if scaled else None, self.args.zo_objective)
            if scaled and self.args.average_tokens_across_devices:
                items = items * self.accelerator.num_processes  # as the Trainer does with its loss
            if not self._examples_checked and self.args.zo_objective == "loss":
                added, whole = float(items.sum()), float(loss)
                if abs(added - whole) > 1e-3 * max(1.0, abs(whole)):
                    raise ValueError(
                        f"zo_per_example=True takes the loss for a mean cross-entropy: {added:.5g} on the first batch, whose "
                        f"loss is {whole:.5g}. Unset zo_per_example, or the loss function of your own."
                    )
                self._examples_checked = True
            total.index_add_(0, example_of_items(inputs, causal), items.double() * w)
        return total if scaled else total / max(sum(weights), 1.0)

    def _probe_loss(self, model: nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | int | None) -> torch.Tensor:
        """The objective on one micro-batch under the weights as they stand, fp32."""
        score = OBJECTIVES[self.args.zo_objective]
        if self._objective_fn is None and score is None:
            return self._model_loss(model, inputs, num_items)
        with self.compute_loss_context_manager(), fp32_losses(self.model, self._losses_seen):
            value: Any = self._objective_fn(model, inputs) if self._objective_fn else score(self, model, inputs)  # type: ignore[misc]
        if not isinstance(value, torch.Tensor | float | int) or (isinstance(value, torch.Tensor) and value.numel() != 1):
            raise TypeError(f"objective_fn must return one number, the mean over the batch, and returned {value!r:.100}.")
        return torch.as_tensor(value, dtype=torch.float32, device=self.args.device).view(())

    def _model_loss(self, model: nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | int | None) -> torch.Tensor:
        with self.compute_loss_context_manager(), fp32_losses(self.model, self._losses_seen):
            return self.compute_loss(model, inputs, num_items_in_batch=num_items).float()

    @property
    def _measures_labels(self) -> bool:
        """Whether a probe measures the loss or accuracy of labels; other scores and functions are means over examples."""
        return self._objective_fn is None and self.args.zo_objective in ("loss", "accuracy")

    def _reads_labels_only(self, window: Sequence[Mapping[str, Any]]) -> bool:
        """Whether nothing but the loss looks at the outputs, so that a batch may be rewritten (`Packing`)."""
        if not self._measures_labels:
            return False
        if all(isinstance(inputs.get("labels"), OptionLabels) for inputs in window):
            return True
        untouched = self.compute_loss_func is None and self.label_smoother is None
        return self._loss_is_the_trainers() and untouched and self.args.zo_objective == "loss"

    def _loss_is_the_trainers(self) -> bool:
        mine = type(self).compute_loss is Measurement.compute_loss
        return mine and super().compute_loss.__func__ is Trainer.compute_loss  # type: ignore[attr-defined]

    def _items_if_read(
        self, model: nn.Module, window: Sequence[dict[str, Any]], num_items: torch.Tensor | int | None
    ) -> torch.Tensor | int | None:
        """``num_items`` if the loss divides by it, else None, so that micro-batches are averaged and not added up.

        A model may take the argument and ignore it, as BERT's classifier does in transformers 5. The first batch tells.
        """
        if num_items is None or not self._loss_is_scaled(num_items) or getattr(self, "loss_is_scaled_for_ga", None):
            return num_items
        if self._divides_by_items is None:
            inputs = next((x for x in window if label_count(self.model, x)), window[0])
            once, half = (float(self._model_loss(model, dict(inputs), n)) for n in (num_items, 2 * num_items))
            if once == 0 or not math.isfinite(once):
                return num_items  # tells nothing
            self._divides_by_items = abs(half - once) > abs(once) / 4
        return num_items if self._divides_by_items else None

    def _loss_is_scaled(self, num_items: torch.Tensor | int | None) -> bool:
        """Whether micro-batch losses add up to the window's, as the Trainer's own step decides it."""
        if self._objective_fn is not None or self.args.zo_objective != "loss":
            return False
        told = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return bool(told)
        return (self.model_accepts_loss_kwargs or self.compute_loss_func is not None) and num_items is not None

    def _check_agreement(self, params: Mapping[str, torch.Tensor]) -> None:
        """Compare a tensor of all ranks, the smallest one: equal losses move all of them alike, on equal devices.

        Raises:
            RuntimeError: on every rank whose tensor is not that of the others.
        """
        name = min(params, key=lambda name: params[name].numel())
        mine = float(int(content_hash({name: params[name]}), 16) % 2**40)  # sums of so many bits are exact
        (total,) = self._sum_over_ranks(torch.tensor([mine], dtype=torch.float64))
        if total != mine * self.accelerator.num_processes:
            raise RuntimeError(
                f"The processes' weights differ ({name}, step {self.state.global_step}), so that they train different models. "
                "Resume from a checkpoint with the same libraries and the same kind of device on all of them."
            )

    def _sum_over_ranks(self, values: torch.Tensor) -> list[float]:
        values = values.to(self.args.device)
        torch.distributed.all_reduce(values)
        return [float(x) for x in values.tolist()]


def _counted(weights: Sequence[float], window: Sequence[dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
    """Micro-batches with their weights, without those that nothing is measured on: the loss of no label is NaN."""
    pairs = list(zip(weights, window, strict=True))
    return [(w, x) for w, x in pairs if w] or pairs
