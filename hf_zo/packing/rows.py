"""Sequences put end to end into few rows, where options that share a prompt fork from one copy of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..tasks.scoring import OptionLabels
from .batch import EXAMPLES, rows_of_examples

_MOST_ROWS = 32  # tried for the cheapest layout, beside one row per sequence

Place = tuple[int, int]
"""Row and column of a token in a batch."""


@dataclass
class Family:
    """A sequence, or a prompt with the branches that continue it: token ids, and the places they came from."""

    trunk: list[int]
    branches: list[list[int]]
    sources: list[list[Place]]  # of every token of trunk, then branches, in order

    def __len__(self) -> int:
        return len(self.sources)


def counts_from_zero(inputs: Mapping[str, Any]) -> bool:
    """Whether the position ids of every row, if there are any, say that it is one sequence."""
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is None:
        return True
    real = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    return bool(((positions == real.cumsum(-1) - 1) | (real == 0)).all())


def families_of(inputs: Mapping[str, Any], forked: bool) -> list[Family]:
    """The sequences of a batch without their padding; if ``forked``, an example's options as branches of one family."""
    ids, mask, labels = inputs["input_ids"].tolist(), inputs.get("attention_mask"), inputs["labels"]
    real = [range(len(row)) for row in ids] if mask is None else [[c for c, m in enumerate(row) if m] for row in mask.tolist()]
    sequences = [[ids[row][column] for column in columns] for row, columns in enumerate(real)]
    places = [[(row, column) for column in columns] for row, columns in enumerate(real)]
    groups = [[row] for row in range(len(ids))]
    if forked and isinstance(labels, OptionLabels):
        groups = rows_of_examples(labels, groups)
    families = []
    for rows in groups:
        shared = _shared_beginning([sequences[row] for row in rows])
        if len(rows) == 1:
            families.append(Family(sequences[rows[0]], [], [[place] for place in places[rows[0]]]))
        elif shared == 0:
            families += [Family(sequences[row], [], [[place] for place in places[row]]) for row in rows]
        else:
            sources = [[places[row][i] for row in rows] for i in range(shared)]
            sources += [[place] for row in rows for place in places[row][shared:]]
            families.append(Family(sequences[rows[0]][:shared], [sequences[row][shared:] for row in rows], sources))
    return families


def laid_out(
    families: Sequence[Family], layout: Sequence[Sequence[int]], device: torch.device, examples: torch.Tensor | None = None
) -> tuple[dict[str, Any], dict[Place, int]]:
    """The rows of a new batch, and the flat position of every token that the old one held.

    Args:
        families: what the rows hold.
        layout: the numbers of the families in every row, see `dealt_out`.
        device: where the new batch is made.
        examples: the numbers of the old rows' examples, if the batch carries them.
    """
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
        "attention_mask": _block_mask(torch.tensor(lineage, device=device)),
        "use_cache": False,
    }
    if examples is not None:
        owner = torch.tensor(owners, device=device)
        batch[EXAMPLES] = examples[owner.clamp(min=0)].where(owner >= 0, -1)
    return batch, places


def cheapest_layout(sizes: Sequence[int], hidden_size: int) -> list[list[int]]:
    """Rows whose cost, tokens times what a token costs at that width, is least.

    Attention over a row of width w costs, per token, what the multiplications with the weights cost at about w = 2 h:
    by operations it would be 6 h, but attention runs at a third of their speed (measured, SmolLM2-135M on a CPU in bf16).
    """

    def cost(layout: list[list[int]]) -> float:
        width = max(sum(sizes[i] for i in row) for row in layout)
        return len(layout) * width * (1 + width / (2 * hidden_size))

    tried = {*range(1, min(len(sizes), _MOST_ROWS) + 1), len(sizes)}
    return min((dealt_out(sizes, rows) for rows in sorted(tried)), key=cost)


def dealt_out(sizes: Sequence[int], rows: int) -> list[list[int]]:
    """Sequences dealt out to rows of nearly equal length: the longest first, each to the shortest row."""
    layout: list[list[int]] = [[] for _ in range(rows)]
    filled = [0] * rows
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = filled.index(min(filled))
        layout[row].append(i)
        filled[row] += sizes[i]
    return [sorted(row) for row in layout if row]


def _shared_beginning(sequences: Sequence[Sequence[int]]) -> int:
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
