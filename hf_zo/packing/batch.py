"""What a batch carries beside its tensors once it is numbered or rewritten, and which example each of its parts belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..tasks.scoring import OptionLabels

KEPT = "zo_kept_positions"
"""Key under which a rewritten batch carries the flat positions whose logits are wanted."""

EXAMPLES = "zo_examples"
"""Key under which a batch carries the numbers of its examples: by row as it came, by row and column once it is packed, where
padding has -1."""

REWRITABLE = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "labels", EXAMPLES}
"""Keys of a batch that may be rewritten: one with any other is left as it came."""


def rows_of_examples(labels: OptionLabels, groups: list[list[int]]) -> list[list[int]]:
    """Rows of a batch by the example they belong to; rows that nothing is read from stay alone."""
    grouped = [sorted({row for row, _, _, option in record if option >= 0}) for record in labels["scored"].tolist()]
    told = {row for rows in grouped for row in rows}
    return [rows for rows in grouped if rows] + [group for group in groups if group[0] not in told]


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


def twice(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with all its rows once more."""
    doubled = {key: torch.cat([x, x]) if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
    if isinstance(labels := inputs["labels"], OptionLabels):
        again = labels["scored"].clone()
        again[..., 0][again[..., 3] >= 0] += len(inputs["input_ids"])
        target = torch.cat([labels["target"]] * 2)
        doubled["labels"] = OptionLabels(target=target, scored=torch.cat([labels["scored"], again]))
    return doubled


def runs_of_examples(examples: torch.Tensor | None, tokens: int) -> list[tuple[int, int, int]]:
    """Stretches ``(begin, end, example)`` of the flattened tokens that a layer sees; the padding of packed rows is in none.

    Args:
        examples: what the batch carries under `EXAMPLES`.
        tokens: how many the layer sees: all of the batch, or equally many of every row.

    Raises:
        ValueError: if the layer sees any other number.
    """
    if examples is None or tokens % len(examples) or (examples.ndim > 1 and tokens != examples.numel()):
        raise ValueError(
            f"zo_per_example=True: a layer sees {tokens} tokens, which cannot be told apart by example; unset it, or leave "
            "that layer without an adapter."
        )
    numbers = examples.flatten() if examples.ndim > 1 else examples.repeat_interleave(tokens // len(examples))
    owned, lengths = torch.unique_consecutive(numbers, return_counts=True)
    ends = lengths.cumsum(0)
    stretches = zip((ends - lengths).tolist(), ends.tolist(), owned.tolist(), strict=True)
    return [(begin, end, example) for begin, end, example in stretches if example >= 0]
