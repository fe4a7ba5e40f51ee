"""Sequences end to end in rows: no lengths, no number of rows and no fork change the loss."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing.batches import causal, loss_by, option_batch, option_losses, token_batch
from tasks.tiny import make_bpe, tiny

from hf_zo.packing import Packing
from hf_zo.packing.rows import cheapest_layout, dealt_out


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12), seed=st.integers(0, 99), rows=st.integers(1, 12))
def test_any_lengths_in_any_number_of_rows(lengths, seed, rows):
    model = causal("llama")
    packing = Packing(model)
    packing.form = "packed"
    inputs = token_batch(tuple(lengths), seed=seed)
    loss = loss_by(model, packing)
    expected = float(loss(inputs))
    batch = packing._rewritten(inputs, "packed", rows=min(rows, len(lengths)))
    if not math.isnan(expected):  # as where no token has a label
        assert float(loss(batch)) == pytest.approx(expected, abs=1e-4)


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=40), rows=st.integers(1, 40))
def test_rows_take_every_sequence_once_and_are_even(sizes, rows):
    layout = dealt_out(sizes, rows)
    assert sorted(i for row in layout for i in row) == list(range(len(sizes)))
    filled = [sum(sizes[i] for i in row) for row in layout]
    assert max(filled) - min(filled) <= max(sizes) or len(layout) < rows


def test_long_sequences_get_rows_of_their_own_and_short_ones_share():
    hidden_size = 32  # attention costs what the weights do at a width of 64
    assert len(cheapest_layout([10] * 12, hidden_size)) == 12  # equally long: nothing to gain
    assert len(cheapest_layout([3, 30, 8, 2], hidden_size)) < 4
    assert len(cheapest_layout([400] * 4, hidden_size)) == 4
    sizes = [60, 50, 70, 65, 40, 80, 90, 30, 20, 45, 55, 35, 75, 85, 25, 95]
    layout = cheapest_layout(sizes, hidden_size)
    width = max(sum(sizes[i] for i in row) for row in layout)
    assert 1 < len(layout) < len(sizes)
    assert len(layout) * width <= 1.05 * sum(sizes)


def test_options_fork_from_one_copy_of_their_prompt():
    bpe = make_bpe()
    model = tiny("llama", bpe)
    packing = Packing(model)
    inputs = option_batch("copa", bpe, model)
    batch = packing(inputs, option_losses(model, packing))
    held = int(inputs["attention_mask"].sum())
    shared = sum(
        next(i for i, (a, b) in enumerate(zip(*inputs["input_ids"][[r, r + 1]].tolist(), strict=True)) if a != b)
        for r in (0, 2, 4)
    )
    assert held - shared <= batch["input_ids"].numel() < 0.7 * held
    assert packing.computed / packing.real < 0.75
