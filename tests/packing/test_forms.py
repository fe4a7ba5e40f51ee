"""Packing: another form of a batch with the same loss, chosen by looking, and given up where it cannot be."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from packing.batches import CAUSAL, ROTARY, causal, loss_by, option_batch, option_losses, token_batch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from support import CASES, COMBINATIONS, trainer_of
from tasks.tiny import ROWS, make_bpe, make_wordpiece, tiny
from torch import nn

from hf_zo import ZOTrainer
from hf_zo.packing import KEPT, Packing
from hf_zo.packing.batch import twice
from hf_zo.tasks import TASKS, OptionCollator, encode_rows

# ---- labels that are tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        (name, attention)
        for name in CAUSAL
        for attention in ("sdpa", "eager")
        if name != "recurrent" and (name, attention) != ("capped", "sdpa")  # Gemma 2 has no such attention
    ],
)
def test_a_packed_batch_has_the_same_loss(name, attention):
    model = causal(name, attn_implementation=attention)
    packing = Packing(model)
    inputs = token_batch()
    for extra in ({}, {"num_items_in_batch": 100}):
        loss = loss_by(model, packing, **extra)
        batch = packing(inputs, loss)
        if name == "experts":  # experts group tokens of all sequences, which may change the last bits
            assert packing.form in ("packed", "labelled")
        else:
            assert packing.form == "packed"
            assert batch["input_ids"].numel() <= 33 < inputs["input_ids"].numel()
        assert float(loss(batch)) == pytest.approx(float(loss(inputs)), abs=2e-5)


def test_sequences_that_a_collator_has_put_end_to_end_stay_as_they_are():
    model = causal("llama")
    packing = Packing(model)
    ids = token_batch()["input_ids"][:1]
    positions = torch.cat([torch.arange(2), torch.arange(ids.shape[1] - 2)])[None]
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions}
    assert KEPT not in packing._rewritten(inputs, "packed")
    one = {**inputs, "position_ids": torch.arange(ids.shape[1])[None]}
    assert KEPT in packing._rewritten(one, "packed")
    rewritten = packing(inputs, loss_by(model, packing))
    assert packing.form == "labelled"
    assert torch.equal(rewritten["position_ids"], positions)


def test_sequences_of_a_model_that_mixes_them_stay_apart(caplog):
    """A recurrent model would carry its state from one sequence into the next: it keeps its rows, and the shorter head."""
    model = causal("recurrent")
    packing = Packing(model)
    inputs = token_batch()
    loss = loss_by(model, packing)
    with caplog.at_level(logging.INFO, "hf_zo.packing"):
        batch = packing(inputs, loss)
    assert packing.form == "labelled"
    assert torch.equal(batch["input_ids"], inputs["input_ids"])
    assert float(loss(batch)) == pytest.approx(float(loss(inputs)), abs=1e-6)


@pytest.mark.parametrize("lengths", [(3, 11, 6, 2, 9), (11,)])
def test_attention_across_sequences_is_noticed_even_where_the_loss_hides_it(lengths, monkeypatch):
    """In 16 bits the tolerance of the loss is wide; that no sequence sees another is checked to the bit.

    A single one, whose loss is the same, is checked beside itself.
    """

    class Leaking(transformers.LlamaForCausalLM):
        def forward(self, position_ids=None, attention_mask=None, **kwargs):
            packed = attention_mask.ndim == 4
            return super().forward(position_ids=position_ids, attention_mask=None if packed else attention_mask, **kwargs)

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**ROTARY, "initializer_range": 0.02})
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda *args, **kwargs: None)
    model = Leaking(config).eval().bfloat16()
    packing = Packing(model)
    loss = loss_by(model, packing)
    inputs = token_batch(lengths)
    packed = packing._rewritten(inputs, "packed")
    assert abs(float(loss(packed)) - float(loss(inputs))) < 3e-2
    packing(inputs, loss)
    assert packing.form == "labelled"


def test_a_single_prompt_is_checked_beside_itself():
    """Where its options are one token each it is one row, and reading it twice keeps the records of both apart."""
    bpe = make_bpe()
    model = tiny("llama", bpe)
    one = encode_rows(TASKS["sst2"], ROWS["sst2"][:1], bpe, 256, "options").examples
    inputs = OptionCollator(bpe, model)(one)
    assert len(inputs["input_ids"]) == 1
    packing = Packing(model)
    seen: list = []
    loss = option_losses(model, packing, seen)
    loss(inputs)
    loss(twice(inputs))
    (alone, *_), (both, *_) = seen
    torch.testing.assert_close(both, torch.cat([alone, alone]))
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: output + output.roll(1, 1))
    packing(inputs, loss)
    handle.remove()
    assert packing.form == "labelled"


def test_a_window_that_is_shorter_than_a_sequence_keeps_the_rows():
    model = causal("sliding")
    packing = Packing(model)
    loss = loss_by(model, packing)
    assert packing(token_batch((3, 16, 6)), loss)["input_ids"].shape[0] < 3
    longer = token_batch((3, 17, 6))
    assert torch.equal(packing(longer, loss)["input_ids"], longer["input_ids"])
    first = Packing(model)
    first(longer, loss_by(model, first))
    assert first.form == "labelled"


@pytest.mark.parametrize("left", [False, True])
def test_padding_on_either_side(left):
    model = causal("llama")
    packing = Packing(model)
    inputs = token_batch(left=left)
    if left:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    loss = loss_by(model, packing)
    batch = packing(inputs, loss)
    assert packing.form == "packed"
    assert float(loss(batch)) == pytest.approx(float(loss(inputs)), abs=2e-5)


def test_a_later_batch_that_cannot_be_rewritten_stays_as_it_came():
    model = causal("llama")
    packing = Packing(model)
    loss = loss_by(model, packing)
    packing(token_batch(), loss)
    assert packing.form == "packed"
    padding_predicts = token_batch(left=True)
    padding_predicts["labels"][0] = padding_predicts["input_ids"][0]  # the token before the first one is padding
    nothing = token_batch()
    nothing["labels"][:] = -100
    stranger = {**token_batch(), "inputs_embeds": None}
    for inputs in (padding_predicts, nothing, stranger):
        assert packing(inputs, loss).keys() == inputs.keys()


# ---- labels that are options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sst2", "copa", "qnli", "record"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_options_have_the_same_scores(name, attention):
    """Options of one token and of several, with a different number of options per example."""
    bpe = make_bpe()
    model = tiny("llama", bpe)
    model.set_attn_implementation(attention)
    packing, seen = Packing(model), []
    inputs = option_batch(name, bpe, model)
    loss = option_losses(model, packing, seen)
    batch = packing(inputs, loss)
    assert packing.form == "packed"
    seen.clear()
    assert float(loss(batch)) == pytest.approx(float(loss(inputs)), abs=1e-5)
    (actual, best, logits), (expected, best_before, _) = seen
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert torch.equal(best, best_before)
    assert logits.shape[:2] == (1, len(batch[KEPT]))
    assert len(batch[KEPT]) < batch["input_ids"].numel() <= 1.05 * int(inputs["attention_mask"].sum())


def test_options_of_a_masked_language_model_keep_their_rows():
    wordpiece = make_wordpiece()
    model = tiny("mlm", wordpiece)
    packing, seen = Packing(model), []
    inputs = option_batch("sst2", wordpiece, model)
    loss = option_losses(model, packing, seen)
    batch = packing(inputs, loss)
    assert packing.form == "labelled"
    seen.clear()
    assert float(loss(batch)) == pytest.approx(float(loss(inputs)), abs=1e-6)
    assert seen[0][2].shape[:2] == (1, 3)


@pytest.mark.parametrize(
    ("config", "form"),
    [
        (LoraConfig(r=2, task_type="CAUSAL_LM"), "packed"),
        (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "labelled"),
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "labelled"),
    ],
)
def test_adapters(config, form):
    bpe = make_bpe()
    model = get_peft_model(tiny("llama", bpe), config).eval()
    packing = Packing(model)
    inputs = option_batch("sst2", bpe, model)
    loss = option_losses(model, packing)
    batch = packing(inputs, loss)
    assert packing.form == form
    assert float(loss(batch)) == pytest.approx(float(loss(inputs)), abs=1e-5)


# ---- in the trainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(CASES))
def test_training_is_the_same_with_and_without(case, tmp_path):
    """Losses and evaluation agree to fp32 rounding, over an accumulation window and a few steps."""
    logs = {}
    form = next(form for name, form in COMBINATIONS if name == case)
    for packing in (True, False):
        trainer = trainer_of(tmp_path, case, form, max_steps=3, zo_packing=packing, gradient_accumulation_steps=2)
        trainer.train()
        assert trainer._packing.form == ("packed" if packing else "plain")
        logs[packing] = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert ("zo/computed_per_real_token" in logs[packing][0]) == packing
    for packed, plain in zip(logs[True], logs[False], strict=True):
        assert packed["loss"] == pytest.approx(plain["loss"], abs=1e-4)
    assert logs[True][0]["loss"] == pytest.approx(logs[False][0]["loss"], abs=1e-5)


def test_a_loss_of_ones_own_sees_the_batch_as_it_came(tmp_path):
    seen = []

    class Own(ZOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(set(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    def own(outputs, labels, num_items_in_batch=None):
        seen.append(outputs.logits.shape[:2] == labels.shape)
        return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())

    trainer_of(tmp_path, trainer_class=Own, max_steps=1).train()
    assert seen
    assert not any(KEPT in keys for keys in seen)
    seen.clear()
    trainer_of(tmp_path, trainer_kwargs={"compute_loss_func": own}, max_steps=1).train()
    assert seen
    assert all(seen)
    smooth = trainer_of(tmp_path, label_smoothing_factor=0.1, max_steps=1)
    smooth.train()
    assert smooth._packing.form is None  # never asked
