"""Groups of nearly one length: the loss of the whole batch at less padding, and whole where that cannot be."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packing.batches import SHAPE, loss_by, option_losses, token_batch
from support import arguments_of
from tasks.tiny import ROWS, make_wordpiece, tiny
from torch import nn

from hf_zo import ZOTrainer
from hf_zo.packing import KEPT, Packing
from hf_zo.packing import lengths as lengths_module
from hf_zo.packing.lengths import cheapest_groups
from hf_zo.tasks import TASKS, OptionCollator, encode_rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 80), st.integers(1, 3)), min_size=1, max_size=40))
def test_groups_take_every_example_once_and_never_cost_more(examples):
    lengths, rows = [n for n, _ in examples], [r for _, r in examples]
    groups = cheapest_groups(lengths, rows)
    assert sorted(i for group in groups for i in group) == list(range(len(examples)))

    def cost(groups):
        return sum(max(lengths[i] for i in g) * sum(rows[i] for i in g) + lengths_module._PASS for g in groups)

    assert cost(groups) <= cost([list(range(len(examples)))])
    halves = sorted(range(len(examples)), key=lambda i: lengths[i])
    middle = len(halves) // 2
    assert middle == 0 or cost(groups) <= cost([halves[:middle], halves[middle:]])


def classifier(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(**SHAPE, num_labels=3, initializer_range=0.3, pad_token_id=0)
    return transformers.BertForSequenceClassification(config).eval()


def class_batch(lengths=(40, 3, 5, 38, 4), left=False) -> dict[str, torch.Tensor]:
    return {**token_batch(lengths, left), "labels": torch.arange(len(lengths)) % 3}


def pooled_by(model: nn.Module, packing: Packing):
    def pooled(batches):
        rows = sum(len(batch["labels"]) for batch in batches)
        return sum(loss_by(model, packing)(batch) * (len(batch["labels"]) / rows) for batch in batches)

    return pooled


def test_an_encoder_computes_groups_of_like_lengths():
    model = classifier()
    packing, inputs = Packing(model), class_batch()
    pooled = pooled_by(model, packing)
    groups = packing.parts(inputs, loss_by(model, packing), pooled)
    assert [tuple(group["input_ids"].shape) for group in groups] == [(3, 5), (2, 40)]
    assert [group["labels"].tolist() for group in groups] == [[1, 2, 1], [0, 0]]
    assert float(pooled(groups)) == pytest.approx(float(pooled([inputs])), abs=1e-6)
    assert (packing.real, packing.computed) == (90, 95)
    alike = class_batch((9, 9, 8, 9))
    assert packing.parts(alike, loss_by(model, packing), pooled)[0]["input_ids"].shape == (4, 9)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": None},
        {"labels": torch.tensor([0, 1, 2, -100, 1])},
        {"labels": torch.full((5, 40), -100)},
        {"labels": torch.zeros(5, 3)},
        {"labels": torch.zeros(5, 40)},  # several labels, by chance as many as tokens
        {"attention_mask": None},
        {"bbox": torch.zeros(5, 40)},
    ],
)
def test_a_batch_that_cannot_be_grouped_stays_whole(change):
    packing, inputs = Packing(classifier()), {**class_batch(), **change}
    asked = lambda batch: pytest.fail("asked for a loss")  # noqa: E731
    assert packing.parts(inputs, asked, asked)[0] is inputs


def test_an_encoder_decoder_stays_whole():
    """Its labels are another text: of one width with the inputs, they would be cut to the length of these."""
    config = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, decoder_start_token_id=0)
    packing = Packing(transformers.T5ForConditionalGeneration(transformers.T5Config(**config)).eval())
    inputs = {**class_batch(), "labels": token_batch((3, 40, 38, 5, 39))["labels"]}
    assert inputs["labels"].shape == inputs["input_ids"].shape
    asked = lambda batch: pytest.fail("asked for a loss")  # noqa: E731
    assert packing._grouped is False
    assert packing.parts(inputs, asked, asked)[0] is inputs


def test_a_loss_that_groups_would_change_is_noticed(caplog):
    """A loss that looks at the padded width: the first batch tells, and no batch is grouped."""
    model = classifier()
    packing, pooled = Packing(model), pooled_by(model, Packing(model))

    def wide(batches):
        return pooled(batches) + 0.01 * max(batch["input_ids"].shape[1] for batch in batches[:1])

    with caplog.at_level(logging.INFO):
        assert len(packing.parts(class_batch(), loss_by(model, packing), wide)) == 1
    assert "not grouped by length" in caplog.text
    assert len(packing.parts(class_batch(), loss_by(model, packing), lambda batches: pytest.fail("asked again"))) == 1


def test_options_are_grouped_with_their_examples():
    """A masked language model: positions are counted anew in the narrower rows."""
    wordpiece = make_wordpiece()
    model = tiny("mlm", wordpiece)
    task = TASKS["sst2"]
    rows = [{**ROWS["sst2"][0], "sentence": text} for text in ("a fine film ", "it was great " * 12, "a film ", "fine " * 40)]
    inputs = OptionCollator(wordpiece, model)(encode_rows(task, rows, wordpiece, 256, "mask").examples)
    packing = Packing(model)
    loss = option_losses(model, packing)

    def pooled(batches):
        return sum(loss(batch) * len(batch["labels"]["target"]) for batch in batches) / 4

    groups = packing.parts(inputs, loss, pooled)
    assert len(groups) > 1
    assert packing.form == "labelled"
    assert float(pooled(groups)) == pytest.approx(float(loss(inputs)), abs=1e-6)
    rewritten = [packing(group, loss) for group in groups]
    assert all(KEPT in group for group in rewritten)
    assert float(pooled(rewritten)) == pytest.approx(float(loss(inputs)), abs=1e-6)
    assert packing.computed < 0.7 * inputs["input_ids"].numel()


def test_an_encoder_trains_the_same_in_groups(tmp_path):
    losses, updates = {}, {}
    batch = class_batch((90, 3, 5, 88, 4, 80, 7, 6))
    rows = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    for packing in (True, False):
        arguments = arguments_of(tmp_path, "mezo", max_steps=3, zo_packing=packing, gradient_accumulation_steps=2)
        trainer = ZOTrainer(classifier(), arguments, train_dataset=rows, data_collator=transformers.default_data_collator)
        trainer.train()
        losses[packing] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        updates[packing] = trainer.model.classifier.weight.detach()
        ratios = [entry.get("zo/computed_per_real_token") for entry in trainer.state.log_history if "loss" in entry]
        assert (ratios[0] is not None and ratios[0] < 1.3) == packing
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)
    torch.testing.assert_close(updates[True], updates[False], rtol=0, atol=1e-3)
