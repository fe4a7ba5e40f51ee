"""No wasted tokens, no logits that nobody reads: another form of a batch with the same loss.

A padded batch of short sequences computes two to three times the tokens it holds, and a language model's head computes a row
of logits for every one of them, though a label stands at few. `Packing` rewrites a batch of a causal language model once per
window, before its probes are measured:

- sequences are put end to end into few rows, with position ids that start again and a mask that keeps them apart. The number
  of rows weighs attention, which grows with the width, against padding;
- options that share a prompt fork from one copy of it: every option sees the prompt and itself;
- the head runs where a label or an option is read: its input is cut down by a hook, so soft caps and scales that a model
  applies to logits stay its own;
- where rows stay rows (encoders, recurrent models, virtual tokens), a batch is computed in groups of rows of nearly one
  length.

Nothing about the model is taken for granted. The first batch is measured in every form: a form is used if its loss is that
of the batch as it came, and if no sequence notices when another one is changed. Otherwise the next plainer form is tried:
``packed``, ``labelled`` (padded as it came, head cut down), ``plain``.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from .anatomy import base_of, lm_head_of, shifts_labels, virtual_tokens
from .tasks.scoring import OptionLabels

logger = logging.getLogger(__name__)

Form = Literal["packed", "labelled", "plain"]
KEPT = "zo_kept_positions"
"""Key under which a rewritten batch carries the flat positions whose logits are wanted."""

EXAMPLES = "zo_examples"
"""Key under which a batch carries the numbers of its examples: by row as it came, by row and column once it is packed, where
padding has -1."""

_KEYS = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "labels", EXAMPLES}  # of a batch to be rewritten
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of a loss, relative; 16-bit arithmetic differs by more
_NARROW_TOLERANCE = 3e-2
_PASS = 48  # tokens that take as long as a forward pass takes whatever its size (MiniLM and SmolLM2, one to two CPU threads)
_MOST_ROWS = 32  # tried for the cheapest layout, beside one row per sequence

Loss = Callable[[dict[str, Any]], torch.Tensor]
PooledLoss = Callable[[list[dict[str, Any]]], torch.Tensor]
Place = tuple[int, int]
"""Row and column of a token in a batch."""


@dataclass
class _Family:
    """A sequence, or a prompt with the branches that continue it: token ids, and the places they came from."""

    trunk: list[int]
    branches: list[list[int]]
    sources: list[list[Place]]  # of every token of trunk, then branches, in order

    def __len__(self) -> int:
        return len(self.sources)


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
        self._grouped = None if enabled and in_rows else False  # by length; None until a batch has been tried
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
        groups = self._by_length(inputs)
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
        """Stretches ``(begin, end, example)`` of the batch that is being read, of whose tokens a layer sees so many, flattened.

        The padding of a packed batch is in none of them.

        Raises:
            ValueError: if the layer does not see the tokens of the batch, or one of every row.
        """
        if tokens in self._runs:
            return self._runs[tokens]
        examples = self.examples
        if examples is None or tokens % len(examples) or (examples.ndim > 1 and tokens != examples.numel()):
            raise ValueError(
                f"zo_per_example=True: a layer sees {tokens} tokens, which cannot be told apart by example; unset it, or leave "
                "that layer without an adapter."
            )
        numbers = examples.flatten() if examples.ndim > 1 else examples.repeat_interleave(tokens // len(examples))
        owned, lengths = torch.unique_consecutive(numbers, return_counts=True)
        ends = lengths.cumsum(0)
        stretches = zip((ends - lengths).tolist(), ends.tolist(), owned.tolist(), strict=True)
        self._runs[tokens] = [(begin, end, example) for begin, end, example in stretches if example >= 0]
        return self._runs[tokens]

    # ---- the choice --------------------------------------------------------------------------------------------------

    def _suits(self, inputs: Mapping[str, Any]) -> bool:
        ids, mask, labels = inputs.get("input_ids"), inputs.get("attention_mask"), inputs.get("labels")
        if set(inputs) - _KEYS or not isinstance(ids, torch.Tensor) or ids.ndim != 2:
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

    # ---- groups by length --------------------------------------------------------------------------------------------------

    def _by_length(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """The batch in groups that share less padding, or alone."""
        examples = self._separable(inputs)
        if len(examples) < 2:
            return [inputs]
        lengths = inputs["attention_mask"].sum(1).tolist()
        groups = _groups([max(lengths[row] for row in rows) for rows in examples], [len(rows) for rows in examples])
        if len(groups) == 1:
            return [inputs]
        return [self._group(inputs, group, [row for i in group for row in examples[i]]) for group in groups]

    def _separable(self, inputs: Mapping[str, Any]) -> list[list[int]]:
        """Rows of every example; nothing where examples cannot be told apart, or where a pass costs more than padding does."""
        ids, mask, labels = inputs.get("input_ids"), inputs.get("attention_mask"), inputs.get("labels")
        if not (isinstance(ids, torch.Tensor) and isinstance(mask, torch.Tensor) and ids.shape == mask.shape):
            return []
        if ids.device.type != "cpu" or set(inputs) - _KEYS:
            return []
        alone = [[row] for row in range(len(ids))]
        if isinstance(labels, OptionLabels):
            examples = _rows_of_examples(labels, alone)
            return examples if len(examples) == len(labels["target"]) else []  # else there are rows of no example
        if not isinstance(labels, torch.Tensor) or labels.shape not in (ids.shape, ids.shape[:1]):
            return []
        read = labels[:, 1:] if labels.ndim > 1 and self._causal else labels.reshape(len(ids), -1)
        return [] if (read == -100).all(1).any() else alone  # a group without a label has no mean loss

    def _group(self, inputs: Mapping[str, Any], group: Sequence[int], rows: list[int]) -> dict[str, Any]:
        """Some examples of a batch, with the columns that they use."""
        width = inputs["input_ids"].shape[1]
        used = inputs["attention_mask"][rows].any(0).nonzero()
        first, end = int(used[0]), int(used[-1]) + 1
        cut: dict[str, Any] = {}
        for key, value in inputs.items():
            if isinstance(value, OptionLabels):
                scored, place = value["scored"][list(group)].clone(), {row: i for i, row in enumerate(rows)}
                real = scored[..., 3] >= 0
                scored[..., 0][real] = torch.tensor([place[row] for row in scored[..., 0][real].tolist()])
                scored[..., 1][real] -= width - end  # positions count from the end
                cut[key] = OptionLabels(target=value["target"][list(group)], scored=scored)
            elif isinstance(value, torch.Tensor):
                cut[key] = value[rows, first:end] if value.ndim > 1 and value.shape[1] == width else value[rows]
            else:
                cut[key] = value
        return cut

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
            families = self._families(inputs, forked)
            if max(map(len, families)) > self._window:  # the mask knows no sliding window
                return dict(inputs)
            if not _counts_from_zero(inputs):  # a collator has put sequences end to end itself
                return dict(inputs)
            batch, places = self._laid_out(families, ids.device, rows, inputs.get(EXAMPLES))
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

    def _families(self, inputs: Mapping[str, Any], forked: bool) -> list[_Family]:
        ids, mask, labels = inputs["input_ids"].tolist(), inputs.get("attention_mask"), inputs["labels"]
        real = (
            [range(len(row)) for row in ids] if mask is None else [[c for c, m in enumerate(row) if m] for row in mask.tolist()]
        )
        sequences = [[ids[row][column] for column in columns] for row, columns in enumerate(real)]
        places = [[(row, column) for column in columns] for row, columns in enumerate(real)]
        groups = [[row] for row in range(len(ids))]
        if forked and isinstance(labels, OptionLabels):
            groups = _rows_of_examples(labels, groups)
        families = []
        for rows in groups:
            shared = _common([sequences[row] for row in rows])
            if len(rows) == 1:
                families.append(_Family(sequences[rows[0]], [], [[place] for place in places[rows[0]]]))
            elif shared == 0:
                families += [_Family(sequences[row], [], [[place] for place in places[row]]) for row in rows]
            else:
                sources = [[places[row][i] for row in rows] for i in range(shared)]
                sources += [[place] for row in rows for place in places[row][shared:]]
                families.append(_Family(sequences[rows[0]][:shared], [sequences[row][shared:] for row in rows], sources))
        return families

    def _laid_out(
        self, families: Sequence[_Family], device: torch.device, rows: int | None, examples: torch.Tensor | None
    ) -> tuple[dict[str, Any], dict[Place, int]]:
        """The rows of a new batch, and the flat position of every token that the old one held."""
        layout = _assigned([len(f) for f in families], rows) if rows else self._cheapest([len(f) for f in families])
        width = max(sum(len(families[i]) for i in row) for row in layout)
        ids, positions, places = [], [], {}
        owners: list[list[int]] = []  # the row of the old batch that every token came from, -1 for padding
        lineage: list[list[tuple[int, int]]] = []  # (family, branch; 0 is the trunk) of every token, padding is alone
        for number, row in enumerate(layout):
            row_ids: list[int] = []
            row_owners: list[int] = []
            row_positions: list[int] = []
            row_lineage: list[tuple[int, int]] = []
            for i in row:
                family = families[i]
                for offset, sources in enumerate(family.sources):
                    for place in sources:
                        places[place] = number * width + len(row_ids) + offset
                row_owners += [family.sources[0][0][0]] * len(family)
                row_ids += family.trunk + [token for branch in family.branches for token in branch]
                row_positions += range(len(family.trunk))
                row_lineage += [(i, 0)] * len(family.trunk)
                for b, branch in enumerate(family.branches):
                    row_positions += range(len(family.trunk), len(family.trunk) + len(branch))
                    row_lineage += [(i, b + 1)] * len(branch)
            surplus = width - len(row_ids)
            ids.append(row_ids + [row_ids[0]] * surplus)
            owners.append(row_owners + [-1] * surplus)
            positions.append(row_positions + [0] * surplus)  # every padding token a sequence of its own
            lineage.append(row_lineage + [(-1 - j, 0) for j in range(surplus)])
        batch: dict[str, Any] = {
            "input_ids": torch.tensor(ids, device=device),
            "position_ids": torch.tensor(positions, device=device),
            "use_cache": False,
        }
        seen = _block_mask(torch.tensor(lineage, device=device))
        if examples is not None:
            owner = torch.tensor(owners, device=device)
            batch[EXAMPLES] = examples[owner.clamp(min=0)].where(owner >= 0, -1)
        batch["attention_mask"] = (~seen * torch.finfo(self._dtype).min).to(self._dtype) if self._additive_mask else seen
        return batch, places

    def _cheapest(self, sizes: Sequence[int]) -> list[list[int]]:
        """Rows whose cost, tokens times what a token costs at that width, is least.

        Attention over a row of width w costs, per token, what the multiplications with the weights cost at about w = 2 h:
        by operations it would be 6 h, but attention runs at a third of their speed (measured, SmolLM2-135M on a CPU in bf16).
        """

        def cost(layout: list[list[int]]) -> float:
            width = max(sum(sizes[i] for i in row) for row in layout)
            return len(layout) * width * (1 + width / (2 * self._hidden_size))

        tried = {*range(1, min(len(sizes), _MOST_ROWS) + 1), len(sizes)}
        return min((_assigned(sizes, rows) for rows in sorted(tried)), key=cost)


def _assigned(sizes: Sequence[int], rows: int) -> list[list[int]]:
    """Sequences dealt out to rows of nearly equal length: the longest first, each to the shortest row."""
    layout: list[list[int]] = [[] for _ in range(rows)]
    filled = [0] * rows
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = filled.index(min(filled))
        layout[row].append(i)
        filled[row] += sizes[i]
    return [sorted(row) for row in layout if row]


def _groups(lengths: Sequence[int], rows: Sequence[int]) -> list[list[int]]:
    """Examples in groups of similar length that cost least: padded tokens, and for every group what a pass costs by itself.

    Args:
        lengths: of the longest row of every example.
        rows: number of rows of every example.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    cheapest, begins = [0], [0]  # of the first n examples in that order, and where their last group begins
    for n in range(1, len(order) + 1):
        wide, high, options = lengths[order[n - 1]], 0, []
        for begin in range(n - 1, -1, -1):
            high += rows[order[begin]]
            options.append((cheapest[begin] + wide * high + _PASS, begin))
        cost, begin = min(options)
        cheapest.append(cost)
        begins.append(begin)
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[begins[end] : end]))
        end = begins[end]
    return groups[::-1]


def _rows_of_examples(labels: OptionLabels, groups: list[list[int]]) -> list[list[int]]:
    """Rows of a batch by the example they belong to; rows that nothing is read from stay alone."""
    grouped = [sorted({row for row, _, _, option in record if option >= 0}) for record in labels["scored"].tolist()]
    told = {row for rows in grouped for row in rows}
    return [rows for rows in grouped if rows] + [group for group in groups if group[0] not in told]


def _counts_from_zero(inputs: Mapping[str, Any]) -> bool:
    """Whether the position ids of every row, if there are any, say that it is one sequence."""
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is None:
        return True
    real = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    return bool(((positions == real.cumsum(-1) - 1) | (real == 0)).all())


def numbered(inputs: dict[str, Any], first: int) -> dict[str, Any]:
    """A batch with numbers for its examples, from ``first`` on.

    Raises:
        ValueError: if the batch has no ``input_ids``.
    """
    if "input_ids" not in inputs:
        raise ValueError(
            f"zo_per_example=True numbers the rows of input_ids, which are not in the batch ({', '.join(inputs)}); unset it."
        )
    ids, labels = inputs["input_ids"], inputs.get("labels")
    numbers = torch.arange(first, first + len(ids), device=ids.device)
    if isinstance(labels, OptionLabels):
        records = labels["scored"]
        example = torch.arange(len(records), device=ids.device)[:, None].expand(records.shape[:2])
        real = records[..., 3] >= 0
        numbers[records[..., 0][real]] = first + example[real]
    return {**inputs, EXAMPLES: numbers}


def example_of_items(batch: Mapping[str, Any], causal: bool) -> torch.Tensor:
    """The number of the example that every item of the loss belongs to: by option record, by label, or by row.

    Args:
        batch: a `numbered` one, in whichever form.
        causal: whether position i of the logits predicts label i + 1.
    """
    examples, labels = batch[EXAMPLES], batch["labels"]
    if not isinstance(labels, OptionLabels) and KEPT not in batch and causal:
        labels = labels[:, 1:]
    if KEPT in batch:  # one row of logits
        kept = batch[KEPT]
        of_logits = examples.flatten()[kept] if examples.ndim > 1 else examples[kept // batch["input_ids"].shape[1]]
        if not isinstance(labels, OptionLabels):
            return of_logits
        return of_logits[len(of_logits) - labels["scored"][:, 0, 1]]
    if isinstance(labels, OptionLabels):
        return examples[labels["scored"][:, 0, 0]]
    return examples.view(-1, *[1] * (labels.ndim - 1)).expand_as(labels).flatten()


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning."""
    n = 0
    while all(n < len(s) and s[n] == sequences[0][n] for s in sequences):
        n += 1
    return n


def _block_mask(lineage: torch.Tensor) -> torch.Tensor:
    """Mask [rows, 1, width, width]: a token sees itself and what comes before it in its trunk and its own branch."""
    family, branch = lineage[..., 0], lineage[..., 1]
    width = family.shape[1]
    earlier = torch.ones(width, width, dtype=torch.bool, device=lineage.device).tril()
    same = family[:, :, None] == family[:, None, :]
    visible = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    return (earlier & same & visible)[:, None]
