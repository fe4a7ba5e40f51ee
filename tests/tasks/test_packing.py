"""Packed batches: one row without padding, the same scores."""

from __future__ import annotations

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tasks.tiny import tiny

from hf_zo.tasks import OptionCollator, encode_rows, option_loss, option_predictions
from hf_zo.tasks.scoring import option_scores


def _both(model, tokenizer, examples):
    for packed in (False, True):
        batch = OptionCollator(tokenizer, model, packed=packed)(examples)
        labels = batch.pop("labels")
        with torch.no_grad():
            yield batch, labels, model(**batch)


@pytest.mark.parametrize("name", ["sst2", "copa", "mnli", "record"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_scores_equal_padded_scores(name, attention, bpe, task_row):
    """Options of one token and of several, with a different number of options per example."""
    model = tiny("llama", bpe)
    model.set_attn_implementation(attention)
    task, row, _ = task_row(name)
    longer = {**row, task.context: str(row[task.context]) + " It was very long and it rained for days."}
    if name == "record":
        longer["entities"] = [*row["entities"], "Eve"]
    examples = list(encode_rows(task, [row, longer, row], bpe, 256))
    (_, labels, padded), (batch, packed_labels, packed) = _both(model, bpe, examples)
    expected, actual = option_scores(padded.logits, labels), option_scores(packed.logits, packed_labels)
    width = min(expected.shape[1], actual.shape[1])
    torch.testing.assert_close(actual[:, :width], expected[:, :width], rtol=0, atol=1e-5)
    assert float(option_loss(packed, packed_labels)) == pytest.approx(float(option_loss(padded, labels)), abs=1e-5)
    assert torch.equal(option_predictions(packed.logits, packed_labels), option_predictions(padded.logits, labels))
    assert batch["input_ids"].shape == (1, sum(len(r) for example in examples for r in example["rows"]))
    assert packed.logits.shape[1] == len(batch["logits_to_keep"]) < batch["input_ids"].shape[1]


def test_models_that_cannot_be_packed_are_refused(bpe, wordpiece):
    prompted = get_peft_model(tiny("llama", bpe), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for model, tokenizer in ((prompted, bpe), (tiny("mlm", wordpiece), wordpiece), (None, bpe)):
        with pytest.raises(ValueError, match="packed=True"):
            OptionCollator(tokenizer, model, packed=True)
