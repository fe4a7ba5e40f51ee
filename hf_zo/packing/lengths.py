"""A batch whose rows stay rows, computed in groups of nearly one length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..tasks.scoring import OptionLabels
from .batch import REWRITABLE, rows_of_examples

_PASS = 48  # tokens that take as long as a forward pass takes whatever its size (MiniLM and SmolLM2, one to two CPU threads)


def by_length(inputs: dict[str, Any], causal: bool) -> list[dict[str, Any]]:
    """The batch in groups of examples that share less padding, or alone.

    Args:
        inputs: a batch. Labels may be token ids, classes, or `OptionLabels`.
        causal: whether position i of the logits predicts label i + 1.
    """
    examples = _separable(inputs, causal)
    if len(examples) < 2:
        return [inputs]
    lengths = inputs["attention_mask"].sum(1).tolist()
    groups = cheapest_groups([max(lengths[row] for row in rows) for rows in examples], [len(rows) for rows in examples])
    if len(groups) == 1:
        return [inputs]
    return [_group(inputs, group, [row for i in group for row in examples[i]]) for group in groups]


def _separable(inputs: Mapping[str, Any], causal: bool) -> list[list[int]]:
    """Rows of every example; nothing where examples cannot be told apart, or where a pass costs more than padding does."""
    ids, mask, labels = inputs.get("input_ids"), inputs.get("attention_mask"), inputs.get("labels")
    if not (isinstance(ids, torch.Tensor) and isinstance(mask, torch.Tensor) and ids.shape == mask.shape):
        return []
    if ids.device.type != "cpu" or set(inputs) - REWRITABLE:
        return []
    alone = [[row] for row in range(len(ids))]
    if isinstance(labels, OptionLabels):
        examples = rows_of_examples(labels, alone)
        return examples if len(examples) == len(labels["target"]) else []  # else there are rows of no example
    if not isinstance(labels, torch.Tensor) or labels.shape not in (ids.shape, ids.shape[:1]):
        return []
    if labels.ndim > 1 and labels.dtype.is_floating_point:  # several labels of an example, by chance as many as tokens
        return []
    read = labels[:, 1:] if labels.ndim > 1 and causal else labels.reshape(len(ids), -1)
    return [] if (read == -100).all(1).any() else alone  # a group without a label has no mean loss


def _group(inputs: Mapping[str, Any], group: Sequence[int], rows: list[int]) -> dict[str, Any]:
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


def cheapest_groups(lengths: Sequence[int], rows: Sequence[int]) -> list[list[int]]:
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
