"""Packing: another form of a batch with the same loss, chosen by looking, and given up where it cannot be."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from support import CASES, COMBINATIONS, arguments_of, trainer_of
from tasks.tiny import ROWS, make_bpe, make_wordpiece, tiny
from torch import nn

from hf_zo import ZOTrainer
from hf_zo import packing as packing_module
from hf_zo.packing import KEPT, Packing, _assigned, _groups
from hf_zo.tasks import TASKS, OptionCollator, encode_rows, option_loss, option_predictions
from hf_zo.tasks.scoring import option_scores

SHAPE = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
ROTARY = dict(**SHAPE, num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3)
CAUSAL = {
    "llama": lambda: transformers.LlamaConfig(**ROTARY),
    "tied": lambda: transformers.LlamaConfig(**ROTARY, tie_word_embeddings=True),
    "capped": lambda: transformers.Gemma2Config(**ROTARY, final_logit_softcapping=3.0, sliding_window=4096),
    "sliding": lambda: transformers.Gemma3TextConfig(**ROTARY, sliding_window=16),
    "scaled": lambda: transformers.GraniteConfig(**ROTARY, logits_scaling=5.0),
    "multiplied": lambda: transformers.CohereConfig(**ROTARY, logit_scale=0.3),
    "experts": lambda: transformers.Qwen3MoeConfig(
        **ROTARY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    ),
    "absolute": lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
    "learned": lambda: transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=32,
        init_std=0.3,
    ),
    "recurrent": lambda: transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
}


def causal(name: str, **more) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CAUSAL[name](), **more).eval()


def token_batch(lengths=(3, 11, 6, 2, 9), left=False, seed=0) -> dict[str, torch.Tensor]:
    """Padded rows of which the first tokens, and some others, carry no label."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, n in enumerate(lengths):
        where = slice(width - n, width) if left else slice(0, n)
        ids[i, where] = torch.randint(3, 64, (n,), generator=generator)
        mask[i, where] = 1
        labels[i, where] = torch.where(torch.rand(n, generator=generator) < 0.7, ids[i, where], -100)
        labels[i, where.start] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_by(model: nn.Module, packing: Packing, **extra):
    def loss(batch):
        with torch.no_grad(), packing.reading(batch) as inputs:
            return model(**inputs, **extra).loss

    return loss


# ---- labels that are tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "recurrent"])
def test_a_packed_batch_has_the_same_loss(name, attention):
    if (name, attention) == ("capped", "sdpa"):
        return  # Gemma 2 has no such attention
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


def test_attention_across_sequences_is_noticed_even_where_the_loss_hides_it(monkeypatch):
    """In 16 bits the tolerance of the loss is wide; that no sequence sees another is checked to the bit."""

    class Leaking(transformers.LlamaForCausalLM):
        def forward(self, position_ids=None, attention_mask=None, **kwargs):
            packed = attention_mask.ndim == 4
            return super().forward(position_ids=position_ids, attention_mask=None if packed else attention_mask, **kwargs)

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**ROTARY, "initializer_range": 0.02})
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda *args, **kwargs: None)
    model = Leaking(config).eval().bfloat16()
    packing = Packing(model)
    packing._causal = packing._labels_in_model = packing._may_pack = True  # whatever the class is called
    loss = loss_by(model, packing)
    inputs = token_batch()
    packed = packing._rewritten(inputs, "packed")
    assert abs(float(loss(packed)) - float(loss(inputs))) < 3e-2
    packing(inputs, loss)
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
    layout = _assigned(sizes, rows)
    assert sorted(i for row in layout for i in row) == list(range(len(sizes)))
    filled = [sum(sizes[i] for i in row) for row in layout]
    assert max(filled) - min(filled) <= max(sizes) or len(layout) < rows


def test_long_sequences_get_rows_of_their_own_and_short_ones_share():
    packing = Packing(causal("llama"))  # attention costs what the weights do at a width of 64
    assert len(packing._cheapest([10] * 12)) == 12  # equally long: nothing to gain
    assert len(packing._cheapest([3, 30, 8, 2])) < 4
    assert len(packing._cheapest([400] * 4)) == 4
    sizes = [60, 50, 70, 65, 40, 80, 90, 30, 20, 45, 55, 35, 75, 85, 25, 95]
    layout = packing._cheapest(sizes)
    width = max(sum(sizes[i] for i in row) for row in layout)
    assert 1 < len(layout) < len(sizes)
    assert len(layout) * width <= 1.05 * sum(sizes)


# ---- labels that are options -----------------------------------------------------------------------------------------


def option_batch(name: str, tokenizer, model) -> dict:
    task, row = TASKS[name], dict(ROWS[name][0])
    longer = {**row, task.context: str(row[task.context]) + " It was very long and it rained for days."}
    if name == "record":
        longer["entities"] = [*row["entities"], "Eve"]
    form = "mask" if tokenizer.mask_token_id is not None else "options"
    return OptionCollator(tokenizer, model)(encode_rows(task, [row, longer, row], tokenizer, 256, form).examples)


def option_losses(model, packing, scores=None):
    def loss(batch):
        with torch.no_grad(), packing.reading(dict(batch)) as inputs:
            labels = inputs["labels"]
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        if scores is not None:
            scores.append((option_scores(outputs.logits, labels), option_predictions(outputs.logits, labels), outputs.logits))
        return option_loss(outputs, labels)

    return loss


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


# ---- groups by length ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 80), st.integers(1, 3)), min_size=1, max_size=40))
def test_groups_take_every_example_once_and_never_cost_more(examples):
    lengths, rows = [n for n, _ in examples], [r for _, r in examples]
    groups = _groups(lengths, rows)
    assert sorted(i for group in groups for i in group) == list(range(len(examples)))

    def cost(groups):
        return sum(max(lengths[i] for i in g) * sum(rows[i] for i in g) + packing_module._PASS for g in groups)

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
        {"labels": torch.zeros(5, 40)},
        {"labels": torch.zeros(5, 3)},
        {"attention_mask": None},
        {"bbox": torch.zeros(5, 40)},
    ],
)
def test_a_batch_that_cannot_be_grouped_stays_whole(change):
    packing, inputs = Packing(classifier()), {**class_batch(), **change}
    if change.get("labels") is not None and change["labels"].shape == (5, 40):
        inputs["labels"][:] = -100  # as if no token had a label
    asked = lambda batch: pytest.fail("asked for a loss")  # noqa: E731
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
