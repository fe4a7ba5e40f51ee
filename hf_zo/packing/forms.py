"""`Packing`: the form in which a model's batches are computed, chosen on the first one, and the rewriting itself."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from ..anatomy import base_of, lm_head_of, shifts_labels, virtual_tokens
from ..tasks.scoring import OptionLabels
from .batch import EXAMPLES, KEPT, REWRITABLE, runs_of_examples, twice
from .lengths import by_length
from .rows import Place, cheapest_layout, counts_from_zero, dealt_out, families_of, laid_out

logger = logging.getLogger(__name__)

Form = Literal["packed", "labelled", "plain"]
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of a loss, relative; 16-bit arithmetic differs by more
_NARROW_TOLERANCE = 3e-2

Loss = Callable[[dict[str, Any]], torch.Tensor]
PooledLoss = Callable[[list[dict[str, Any]]], torch.Tensor]


class Packing:
    """Rewrites the batches of one model, in the best form that the first batch allows.

    Args:
        model: the model that is called, with or without PEFT.
        enabled: False keeps every batch as it came.
        in_rows: False leaves sequences in rows of their own, as for a runtime that wastes nothing on padding.

    Attributes:
        model: the model.
        form: the form in use; None before the first batch.
        real: tokens that the rewritten batches held, a shared prompt once for every option.
        computed: tokens that were computed for them, padding included.
        examples: of the batch that is being read, if it carries them.
    """

    def __init__(self, model: nn.Module, enabled: bool = True, in_rows: bool = True) -> None:
        self.model = model
        base = base_of(model)
        self._head = lm_head_of(model)
        config: Any = getattr(base, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        virtual = virtual_tokens(model) > 0
        self._additive_mask = getattr(config, "_attn_implementation", None) == "eager"
        self._dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self._causal = shifts_labels(model)
        self._labels_in_model = self._causal and not virtual
        self._may_pack = (
            in_rows
            and self._labels_in_model
            and "position_ids" in inspect.signature(base.forward).parameters
            and getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
        )
        self._hidden_size = getattr(config, "hidden_size", None) or 1024
        self._window = getattr(config, "sliding_window", None) or float("inf")
        self.form: Form | None = None if enabled and self._head is not None else "plain"
        two_texts = getattr(config, "is_encoder_decoder", False)  # labels are another text than the one that is padded
        # By length; None until a batch has been tried.
        self._grouped = None if enabled and in_rows and not two_texts else False
        self.real = self.computed = 0
        self.examples: torch.Tensor | None = None
        self._runs: dict[int, list[tuple[int, int, int]]] = {}  # of the batch that is being read, by number of tokens

    def __call__(self, inputs: dict[str, Any], loss: Loss) -> dict[str, Any]:
        """The batch in its new form, or as it came.

        Args:
            inputs: a batch on the model's device. Labels may be token ids or `OptionLabels`.
            loss: the loss of a batch, in evaluation mode; asked for the first batch only, to choose the form.
        """
        if self.form == "plain" or not self._suits(inputs):
            return inputs
        if self.form is None:
            self.form = self._chosen(inputs, loss)
        rewritten = self._rewritten(inputs, self.form)
        if KEPT not in rewritten:
            return inputs
        mask = inputs.get("attention_mask")
        self.real += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        self.computed += rewritten["input_ids"].numel()
        return rewritten

    def parts(self, inputs: dict[str, Any], loss: Loss, pooled: PooledLoss) -> list[dict[str, Any]]:
        """A batch that keeps its rows in groups of nearly one length, so that less padding is computed; else the batch alone.

        Args:
            inputs: as for a call.
            loss: as for a call.
            pooled: the loss of several batches as one; asked once, to see that groups have the loss of the whole.
        """
        if self.form is None and self._suits(inputs):
            self.form = self._chosen(inputs, loss)
        if self.form == "packed" or self._grouped is False:
            return [inputs]
        groups = by_length(inputs, self._causal)
        if len(groups) > 1 and self._grouped is None:
            whole = float(pooled([dict(inputs)]))
            difference = abs(float(pooled([dict(group) for group in groups])) - whole)
            self._grouped = difference <= self._allowed(whole)
            logger.info(
                "Batches are%s grouped by length: the loss differs by %.1e.", "" if self._grouped else " not", difference
            )
        if not self._grouped:
            return [inputs]
        if self.form == "plain":
            self.real += int(inputs["attention_mask"].sum())
            self.computed += sum(group["input_ids"].numel() for group in groups)
        return groups

    @property
    def choice(self) -> dict[str, Any]:
        """What the first batch has decided, in JSON's types: a resumed run computes its batches in the same form."""
        return {"form": self.form, "grouped": self._grouped}

    @choice.setter
    def choice(self, made: Mapping[str, Any]) -> None:
        if self.form is None:
            self.form = made["form"]
        if self._grouped is None:
            self._grouped = made["grouped"]

    @contextmanager
    def reading(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Give out a batch as the model takes it; meanwhile the head runs at the wanted positions only."""
        inputs = dict(inputs)
        self.examples, self._runs = inputs.pop(EXAMPLES, None), {}
        if KEPT not in inputs:
            yield inputs
            return
        kept, width = inputs.pop(KEPT), inputs["input_ids"].shape[1]

        def cut(head: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden = args[0]
            row, column = kept // width, kept % width
            column = column + (hidden.shape[1] - width)  # virtual tokens of an adapter come first
            return (hidden[row, column][None], *args[1:])

        assert self._head is not None
        handle = self._head.register_forward_pre_hook(cut)
        try:
            yield inputs
        finally:
            handle.remove()

    def runs(self, tokens: int) -> list[tuple[int, int, int]]:
        """`runs_of_examples` of the batch that is being read, of whose tokens a layer sees so many."""
        if tokens not in self._runs:
            self._runs[tokens] = runs_of_examples(self.examples, tokens)
        return self._runs[tokens]

    # ---- the choice --------------------------------------------------------------------------------------------------

    def _suits(self, inputs: Mapping[str, Any]) -> bool:
        ids, mask, labels = inputs.get("input_ids"), inputs.get("attention_mask"), inputs.get("labels")
        if set(inputs) - REWRITABLE or not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            return False
        if mask is not None and mask.shape != ids.shape:
            return False
        if isinstance(labels, OptionLabels):
            return True
        return self._labels_in_model and isinstance(labels, torch.Tensor) and labels.shape == ids.shape

    def _chosen(self, inputs: dict[str, Any], loss: Loss) -> Form:
        plain = float(loss(dict(inputs)))
        allowed = self._allowed(plain)
        forms: tuple[Form, ...] = ("packed", "labelled") if self._may_pack else ("labelled",)
        for form in forms:
            try:
                rewritten = self._rewritten(inputs, form)
                if KEPT not in rewritten:
                    continue
                difference = abs(float(loss(rewritten)) - plain)
                apart = form != "packed" or self._keeps_apart(inputs, loss)
            except (TypeError, ValueError, RuntimeError, IndexError) as error:  # whatever a model makes of an unusual batch
                if should_reduce_batch_size(error):
                    raise  # out of memory: for the Trainer to handle
                logger.info("Batches are not %s: %s: %s", form, type(error).__name__, error)
                continue
            if difference <= allowed and apart:
                logger.info("Batches are %s: the first one's loss differs by %.1e.", form, difference)
                return form
            logger.info("Batches are not %s: the first one's loss differs by %.1e; apart: %s.", form, difference, apart)
        return "plain"

    def _allowed(self, loss: float) -> float:
        return _TOLERANCE.get(self._dtype, _NARROW_TOLERANCE) * max(1.0, abs(loss))

    def _keeps_apart(self, inputs: dict[str, Any], loss: Loss) -> bool:
        """Whether the other sequences' logits stay, to the bit, when the first sequence's tokens change.

        All sequences are put into one row for this, so that they are neighbours. A mixture of experts groups the tokens of all
        sequences, which may change the last bits: it then keeps its rows.
        """
        if len(inputs["input_ids"]) == 1:
            inputs = twice(inputs)  # a neighbour for it
        changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
        changed["input_ids"][0] = torch.where(changed["input_ids"][0] > 0, changed["input_ids"][0] - 1, 1)
        seen: list[torch.Tensor] = []
        assert self._head is not None
        handle = self._head.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
        try:
            for batch in (inputs, changed):
                loss(self._rewritten(batch, "packed", rows=1, forked=False))
        finally:
            handle.remove()
        own = sum(row == 0 for row, _ in self._wanted(inputs))
        return torch.equal(seen[0][:, own:], seen[1][:, own:])

    # ---- the forms ---------------------------------------------------------------------------------------------------

    def _wanted(self, inputs: Mapping[str, Any]) -> list[Place]:
        """Places whose logits are read, in order."""
        labels, width = inputs["labels"], inputs["input_ids"].shape[1]
        if isinstance(labels, OptionLabels):
            records = labels["scored"].flatten(0, 1)
            records = records[records[:, 3] >= 0].tolist()
            return sorted({(row, width - from_end) for row, from_end, _, _ in records})
        return [(row, column) for row, column in (labels[:, 1:] != -100).nonzero().tolist()]

    def _rewritten(self, inputs: Mapping[str, Any], form: Form, rows: int | None = None, forked: bool = True) -> dict[str, Any]:
        """The batch in ``form``; as it came if a wanted logit belongs to no real token or nothing is wanted."""
        ids, wanted = inputs["input_ids"], self._wanted(inputs)
        if not wanted:
            return dict(inputs)
        if form == "labelled":
            kept, batch = [row * ids.shape[1] + column for row, column in wanted], dict(inputs)
        else:
            families = families_of(inputs, forked)
            if max(map(len, families)) > self._window:  # the mask knows no sliding window
                return dict(inputs)
            if not counts_from_zero(inputs):  # a collator has put sequences end to end itself
                return dict(inputs)
            sizes = [len(family) for family in families]
            layout = dealt_out(sizes, rows) if rows else cheapest_layout(sizes, self._hidden_size)
            batch, places = laid_out(families, layout, ids.device, inputs.get(EXAMPLES))
            if self._additive_mask:
                batch["attention_mask"] = (~batch["attention_mask"] * torch.finfo(self._dtype).min).to(self._dtype)
            if any(place not in places for place in wanted):
                return dict(inputs)
            kept = [places[place] for place in wanted]
        order = sorted(set(kept))
        return {**batch, **self._labels(inputs, wanted, kept, order), KEPT: torch.tensor(order, device=ids.device)}

    def _labels(
        self, inputs: Mapping[str, Any], wanted: Sequence[Place], kept: Sequence[int], order: Sequence[int]
    ) -> dict[str, Any]:
        """Labels that speak of the logits at the kept positions, in that order, as of one row."""
        labels, width, device = inputs["labels"], inputs["input_ids"].shape[1], inputs["input_ids"].device
        rank = {position: i for i, position in enumerate(order)}
        where = {place: rank[position] for place, position in zip(wanted, kept, strict=True)}
        if isinstance(labels, OptionLabels):
            scored = [
                [
                    [0, len(order) - where[r, width - end], token, option] if option >= 0 else [-100] * 4
                    for r, end, token, option in record
                ]
                for record in labels["scored"].tolist()
            ]
            return {"labels": OptionLabels(target=labels["target"], scored=torch.tensor(scored, device=device))}
        told, targets = labels.tolist(), [-100] * len(order)
        for (row, column), i in where.items():
            targets[i] = told[row][column + 1]
        shifted = torch.tensor([targets], device=device)
        return {"labels": shifted, "shift_labels": shifted}  # the model shifts no labels that come shifted
