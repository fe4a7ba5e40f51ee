"""The output layer's fit: the minimum of a convex problem, written where models read it, once, and frozen."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import VOCABULARY, Sentences, assert_same_weights, collate, tiny_llama, trained_of, weights_of
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_zo import Trajectory, TrajectoryError, ZOTrainer, ZOTrainingArguments, cli, replay
from hf_zo.adapters import attach
from hf_zo.anatomy import factors_of
from hf_zo.depth import DepthError
from hf_zo.head import RIDGES, fit_head, fittable, fitted, output_layer, read
from hf_zo.hub.model_card import facts_of
from hf_zo.tasks import OptionCollator, OptionLabels, option_loss
from hf_zo.tasks.scoring import option_scores

TOKENS = [7, 11, 23]  # of the options
ROWS = 60


class Prompts(Dataset):
    """Token sequences whose last token tells which of three options is right."""

    def __init__(self, rows: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = [torch.randint(1, VOCABULARY, (3 + i % 5,), generator=generator) for i in range(rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.rows[i]


def options(rows: list[torch.Tensor], tokens: list[int] = TOKENS, two: bool = False) -> dict[str, Any]:
    """A batch, padded right; the options come in an order of their own. With ``two``, a row's last token begins all of them."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    scored = torch.zeros(len(rows), len(tokens), 4, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        scored[i] = torch.tensor([[i, width - len(row) + 1, tokens[k], k] for k in (2, 0, 1)[: len(tokens)]])
    target = torch.tensor([int(row[-1]) % 3 for row in rows])
    if two:
        first = scored.clone()
        first[..., 1] += 1
        first[..., 2] = torch.tensor([int(row[-1]) for row in rows])[:, None]
        scored = torch.cat([scored, first], 1)
    return {"labels": OptionLabels(target=target, scored=scored), "input_ids": ids, "attention_mask": (ids > 0).long()}


def batches(size: int = 12, two: bool = False) -> list[dict[str, Any]]:
    data = Prompts()
    return [options([data[i] for i in range(start, start + size)], two=two) for start in range(0, ROWS, size)]


def logits_of(model: nn.Module) -> Any:
    def logits(batch: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits

    return logits


def losses(model: nn.Module) -> float:
    logits = logits_of(model)
    return sum(float(option_loss({"logits": logits(batch)}, batch["labels"])) for batch in batches()) / len(batches())


def trainer(folder: Path, model: nn.Module | None = None, **more: Any) -> ZOTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "zo_method": "zo_act",
        "zo_head_samples": 48,
        "zo_act_samples": 8,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    return ZOTrainer(
        tiny_llama() if model is None else model,
        ZOTrainingArguments(**{**settings, **more}),
        train_dataset=Prompts(),
        data_collator=options,
        compute_loss_func=option_loss,
    )


# ---- the problem -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_the_weights_are_the_minimum_of_the_penalised_loss(bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(200, 6, generator=g, dtype=torch.float64) + 1
    offset = torch.randn(200, 4, generator=g, dtype=torch.float64)
    target = (offset + hidden @ torch.randn(6, 4, generator=g, dtype=torch.float64)).argmax(1)
    weights, facts, _ = fitted(hidden, offset, target, bias)
    assert weights.shape == (4, 6 + bias)
    scale = hidden.pow(2).mean().sqrt()
    w = torch.cat([weights[:, :6] * scale, weights[:, 6:]], 1).requires_grad_()
    x = torch.cat([hidden / scale, torch.ones(200, int(bias), dtype=torch.float64)], 1)
    penalty = w[:, :6].pow(2).sum() + w[:, 6:].pow(2).sum() / 100
    loss = cross_entropy(offset + x @ w.T, target) + facts["ridge"] / 2 * penalty
    (gradient,) = torch.autograd.grad(loss, w)
    assert gradient.abs().max() < 1e-5
    assert facts["ridge"] == min(RIDGES)  # the labels are a linear map's: nothing speaks for shrinking
    assert facts["loss_after"] < 0.5 * facts["loss_before"]


def test_left_out_rows_have_the_scores_of_the_ridge_that_was_chosen() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(100, 6, generator=g)
    target = (hidden[:, 0] > 0).long()
    _, facts, left_out = fitted(hidden, torch.zeros(100, 2), target)
    assert facts["ridge"] < max(RIDGES)
    assert float(cross_entropy(left_out, target)) == pytest.approx(facts["loss_after"])


def test_labels_of_chance_are_answered_by_the_strongest_ridge() -> None:
    g = torch.Generator().manual_seed(0)
    _, facts, _ = fitted(torch.randn(100, 30, generator=g), torch.zeros(100, 2), torch.randint(2, (100,), generator=g))
    assert facts["ridge"] == max(RIDGES)


def test_a_rare_class_is_predicted_by_its_share() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, target = torch.randn(1000, 8, generator=g), (torch.arange(1000) % 33 == 0).long()
    weights, facts, _ = fitted(hidden, torch.zeros(1000, 2), target, bias=True)
    share = float(target.double().mean())
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert facts["loss_after"] < entropy + 0.005
    assert float(weights[1, 8] - weights[0, 8]) == pytest.approx(math.log(share / (1 - share)), abs=0.2)


def test_rows_of_a_group_are_left_out_together() -> None:
    """Tokens of an answer are told by its hidden states: left out one by one, the others of it give them away."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, 64, generator=g).repeat_interleave(10, 0) + 0.01 * torch.randn(600, 64, generator=g)
    target = torch.randint(0, 4, (60,), generator=g).repeat_interleave(10)
    one_by_one, together = (
        fitted(hidden, torch.zeros(600, 4), target, group=group)[1]["loss_after"]
        for group in (None, torch.arange(60).repeat_interleave(10))
    )
    assert one_by_one < 0.5
    assert together > 1.2  # chance is ln 4


def test_states_of_nothing_but_zeros_leave_the_weights_finite() -> None:
    weights, facts, _ = fitted(torch.zeros(20, 3), torch.zeros(20, 2), torch.arange(20) % 2)
    assert weights.isfinite().all()
    assert facts["loss_after"] == pytest.approx(math.log(2))


def test_hidden_states_that_are_not_finite_are_named() -> None:
    with pytest.raises(ValueError, match="not finite"):
        fitted(torch.full((10, 2), torch.nan), torch.zeros(10, 2), torch.zeros(10, dtype=torch.long))


def test_too_few_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"zo_head_samples=4.*at least 5"):
        fitted(torch.ones(4, 2), torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))


# ---- where it is written -----------------------------------------------------------------------------------------------


def test_the_adapter_adds_the_fit_to_the_options_and_nothing_to_other_tokens() -> None:
    model = attach(tiny_llama(), 4, with_head=True)
    logits, data = logits_of(model), batches()
    before = [logits(batch) for batch in data]
    facts = fit_head(model, data, logits).facts
    assert facts["rows"] == ROWS
    assert facts["loss_after"] < facts["loss_before"]
    others = [t for t in range(VOCABULARY) if t not in TOKENS]
    hidden, offset, target, wrote = [], [], [], []
    for batch, old in zip(data, before, strict=True):
        new = logits(batch)
        assert torch.equal(new[..., others], old[..., others])
        last = batch["attention_mask"].sum(1) - 1
        place = torch.arange(len(last)), last
        with torch.no_grad():
            states = model.get_base_model().model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        hidden.append(states[place])
        offset.append(old[place][:, TOKENS])
        wrote.append((new - old)[place][:, TOKENS])
        target.append(batch["labels"]["target"])
    weights, _, _ = fitted(torch.cat(hidden), torch.cat(offset), torch.cat(target))
    torch.testing.assert_close(torch.cat(wrote), torch.cat(hidden) @ weights.T.float(), atol=1e-5, rtol=1e-4)
    a = factors_of(output_layer(model))[0]
    torch.testing.assert_close(a @ a.T, torch.eye(len(a)), atol=1e-5, rtol=0)  # as ZO-Act wants its bases


@pytest.mark.parametrize("alpha", [8, 16])
def test_a_lora_adapter_adds_the_fit_whatever_it_is_scaled_by(alpha: int) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, lora_alpha=alpha, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    logits, data = logits_of(model), batches()
    before = torch.cat([option_scores(logits(batch), batch["labels"]) for batch in data])
    seen = read(model, output_layer(model), data, logits)
    weights, _, _ = fitted(seen.hidden, seen.scores, seen.target)
    fit_head(model, data, logits)
    after = torch.cat([option_scores(logits(batch), batch["labels"]) for batch in data])
    change, expected = after - before, seen.hidden @ weights.T.float()
    # Log-probabilities of whole vocabularies differ from scores by a number for every row.
    torch.testing.assert_close(change - change[:, :1], expected - expected[:, :1], atol=1e-4, rtol=1e-3)


def test_options_of_two_tokens_get_the_fit_that_their_mean_log_probability_needs() -> None:
    model = attach(tiny_llama(), 4, with_head=True)
    data, logits = batches(two=True), logits_of(model)
    with torch.no_grad():
        states = [model.get_base_model().model(x["input_ids"], x["attention_mask"]).last_hidden_state for x in data]
    last = [s[torch.arange(len(s)), x["attention_mask"].sum(1) - 1] for s, x in zip(states, data, strict=True)]
    scale = float(torch.cat(last).square().mean().sqrt()) / 2

    def penalised(ridge: float) -> float:
        a, b = factors_of(layer)
        size = float((scale * layer.scaling["default"] * b @ a).square().sum())
        loss = sum(float(option_loss({"logits": logits(x)}, x["labels"])) * len(x["labels"]["target"]) for x in data) / ROWS
        return loss + ridge / 2 * size

    facts = fit_head(model, data, logits).facts
    assert facts["loss_after"] < facts["loss_before"]
    layer: Any = output_layer(model)
    b, least = factors_of(layer)[1], penalised(facts["ridge"])
    for factor in (0.5, 0.9, 1.1, 2.0):
        with torch.no_grad():
            b.mul_(factor)
            assert penalised(facts["ridge"]) > least
            b.div_(factor)


def classifier(family: str) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, **sizes}
    if family == "bert":
        return BertForSequenceClassification(BertConfig(**common)).eval()
    return LlamaForSequenceClassification(LlamaConfig(**common)).eval()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifier_gets_the_fit_as_its_weights(family: str) -> None:
    model = classifier(family)
    data = [{**batch, "labels": batch["labels"]["target"]} for batch in batches()]
    kept: list[torch.Tensor] = []
    layer = output_layer(model)
    handle = layer.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    facts = fit_head(model, data, logits_of(model)).facts
    handle.remove()
    hidden = torch.cat(
        [
            states if states.ndim == 2 else states[torch.arange(len(states)), batch["attention_mask"].sum(1) - 1]
            for states, batch in zip(kept, data, strict=True)
        ]
    )
    target = torch.cat([batch["labels"] for batch in data])
    weights, again, _ = fitted(hidden, torch.zeros(ROWS, 3), target, bias=family == "bert")
    assert {**facts, "loss_before": again["loss_before"]} == again
    assert facts["loss_before"] == pytest.approx(again["loss_before"], abs=0.1)  # a new layer says little; `again` takes none
    torch.testing.assert_close(layer.weight, nn.Parameter(weights[:, :16].float()))
    if family == "bert":
        torch.testing.assert_close(layer.bias, nn.Parameter(weights[:, 16].float()))


def test_a_layer_whose_scores_the_model_divides_gets_the_fit_of_what_comes_out() -> None:
    """As Granite and Cohere do: changes of the layer's weights arrive smaller."""
    for data, tells in ((batches(), 3), (answered_batches(), 9)):
        model = attach(tiny_llama(), 4, with_head=True)
        logits = logits_of(model)

        def divided(batch: Any, logits: Any = logits) -> torch.Tensor:
            return logits(batch) / 8

        plain, seen = (read(model, output_layer(model), data, said) for said in (logits, divided))
        torch.testing.assert_close(seen.hidden, plain.hidden / 8)
        assert seen.scores.shape[1] == tells
        weights, _, _ = fitted(seen.hidden, seen.scores, seen.target, group=seen.answer)
        expected = cross_entropy(seen.scores + seen.hidden @ weights.T.float(), seen.target)
        fit_head(model, data, divided)
        if tells == 3:
            after = torch.cat([option_scores(divided(batch), batch["labels"])[:, :3] for batch in data])
            torch.testing.assert_close(cross_entropy(after, seen.target), expected)
        else:
            factors = factors_of(output_layer(model))  # type: ignore[arg-type]
            torch.testing.assert_close((factors[1] @ factors[0])[seen.tokens], (weights[:-1] - weights[-1]).float())


@pytest.mark.parametrize("free", [False, True], ids=["options", "free"])
def test_scores_with_a_bound_are_named(free: bool) -> None:
    model = attach(tiny_llama(), 4, with_head=True)
    logits = logits_of(model)
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        fit_head(model, answered_batches() if free else batches(), lambda batch: torch.tanh(logits(batch) * 9))


def test_labels_that_are_no_classes_are_named() -> None:
    data = [{**batch, "labels": batch["labels"]["target"] - 100} for batch in batches()]
    model = classifier("bert")
    with pytest.raises(ValueError, match="a label below 0, which is no class"):
        fit_head(model, data, logits_of(model))


def test_a_layer_of_zeros_at_every_position_is_named() -> None:
    data = [{**batch, "labels": batch["labels"]["target"]} for batch in batches()]
    model = classifier("llama")
    nn.init.zeros_(output_layer(model).weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not tell which position the model reads"):
        fit_head(model, data, logits_of(model))


def test_a_layer_with_one_score_is_none_of_a_classifier() -> None:
    sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 64}
    stars = DistilBertForSequenceClassification(
        DistilBertConfig(**sizes, num_labels=1)
    )  # a linear layer stands before the last
    assert fittable(stars, None, [{"label": i % 5} for i in range(20)]) is None
    with pytest.raises(ValueError, match="for two classes at least"):
        output_layer(stars)


def test_a_language_model_that_generalises_worse_stays_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model = attach(tiny_llama(), 4, with_head=True)
    data = batches()
    logits = logits_of(model)
    for batch in data:  # the model is right already
        batch["labels"]["target"] = option_scores(1000 * logits(batch), batch["labels"]).argmax(1)

    def certain(batch: Any) -> torch.Tensor:
        return 1000 * logits(batch)

    before = weights_of(model)
    facts = fit_head(model, data, certain).facts
    assert facts["loss_after"] == facts["loss_before"]
    assert_same_weights(before, weights_of(model))
    assert "stays as it was" in caplog.text


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifier_that_is_trained_already_stays_as_it_was(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = classifier(family)
    with torch.no_grad():
        output_layer(model).weight.mul_(1000)
    logits = logits_of(model)
    data = [{**batch, "labels": logits(batch).argmax(1)} for batch in batches()]
    before = weights_of(model)
    found = fit_head(model, data, logits)
    assert found.facts["loss_after"] == found.facts["loss_before"]
    torch.testing.assert_close(found.left_out, torch.cat([logits(batch) for batch in data]).double())
    assert_same_weights(before, weights_of(model))
    assert "stays as it was" in caplog.text


# ---- free answers ------------------------------------------------------------------------------------------------------


class Answered(Dataset):
    """Prompts and answers of two tokens: 30 or 31, as the prompt's last token tells, or any other; then always 50."""

    def __init__(self, rows: int = 80) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rows = []
        for i in range(rows):
            prompt = torch.randint(1, VOCABULARY, (3 + i % 4,), generator=generator)
            first = 30 + int(prompt[-1]) % 2 if i % 3 else int(torch.randint(1, VOCABULARY, (), generator=generator))
            ids = torch.cat([prompt, torch.tensor([first, 50])])
            self.rows.append({"input_ids": ids, "labels": torch.cat([torch.full((len(prompt),), -100), ids[-2:]])})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]


def answered_batches() -> list[dict[str, Any]]:
    data = Answered()
    return [collate([data[i] for i in range(start, start + 8)]) for start in range(0, len(data), 8)]


def answer_loss(model: nn.Module) -> float:
    """Over the tokens of all answers."""
    logits, data = logits_of(model), answered_batches()
    scores = torch.cat([logits(batch)[:, :-1].flatten(0, 1) for batch in data])
    return float(cross_entropy(scores, torch.cat([batch["labels"][:, 1:].flatten() for batch in data])))


def test_free_answers_move_the_tokens_that_are_wrong_most_often_and_no_others() -> None:
    model = attach(tiny_llama(), 4, with_head=True)  # the output layer's adapter has rank 8
    logits, data = logits_of(model), answered_batches()
    before, start = [logits(batch) for batch in data], answer_loss(model)
    facts = fit_head(model, data, logits).facts
    assert facts["rows"] == 2 * len(Answered())
    assert answer_loss(model) < start - 0.5
    errors: Counter[int] = Counter()
    for batch, old in zip(data, before, strict=True):
        right, chosen = batch["labels"][:, 1:], old[:, :-1].argmax(-1)
        for tokens in (right, chosen):
            errors.update(tokens[(right >= 0) & (right != chosen)].tolist())
    moved = {t for batch, old in zip(data, before, strict=True) for t in (logits(batch) != old).nonzero()[:, 2].tolist()}
    assert len(moved) == 8
    assert {30, 31, 50} < moved
    assert min(errors[t] for t in moved) >= max(n for t, n in errors.items() if t not in moved)


def test_free_answers_get_the_minimum_of_their_penalised_loss() -> None:
    """Of which all other tokens are one class."""
    model = attach(tiny_llama(), 4, with_head=True)
    data, logits = answered_batches(), logits_of(model)
    seen = read(model, output_layer(model), data, logits)
    assert seen.is_free
    others = [t for t in range(VOCABULARY) if t not in seen.tokens.tolist()]
    states, scores, target = [], [], []
    with torch.no_grad():
        for batch in data:
            row, column = (batch["labels"][:, 1:] >= 0).nonzero(as_tuple=True)
            hidden = model.get_base_model().model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
            states.append(hidden[row, column])
            at = logits(batch)[row, column]
            scores.append(torch.cat([at[:, seen.tokens], at[:, others].logsumexp(1, keepdim=True)], 1))
            target += [(seen.tokens == t).nonzero() for t in batch["labels"][row, column + 1]]
    numbers = torch.tensor([int(t) if len(t) else len(seen.tokens) for t in target])
    order = [seen.hidden.sub(h).abs().sum(1).argmin() for h in torch.cat(states)]  # tokens of a batch are drawn
    torch.testing.assert_close(seen.scores[order], torch.cat(scores))
    assert torch.equal(seen.target[order], numbers)
    weights, _, _ = fitted(seen.hidden, seen.scores, seen.target, group=seen.answer)
    fit_head(model, data, logits)
    layer: Any = output_layer(model)
    a, b = factors_of(layer)
    torch.testing.assert_close((b @ a)[seen.tokens], (weights[:-1] - weights[-1]).float(), atol=1e-5, rtol=1e-4)


def test_tokens_of_an_answer_are_left_out_together(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[Any] = []

    def watched(*args: Any) -> Any:
        groups.append(args[4])
        return fitted(*args)

    monkeypatch.setattr("hf_zo.head.fitted", watched)
    model = attach(tiny_llama(), 4, with_head=True)
    fit_head(model, answered_batches(), logits_of(model))
    assert len(groups[0].unique()) == len(Answered())


def test_a_model_that_answers_right_stays_as_it_was() -> None:
    model = attach(tiny_llama(), 4, with_head=True)
    data, logits = answered_batches(), logits_of(model)
    for batch in data:
        asked = batch["labels"][:, 1:] >= 0
        batch["labels"][:, 1:][asked] = logits(batch)[:, :-1].argmax(-1)[asked]
    before = weights_of(model)
    facts = fit_head(model, data, logits).facts
    assert facts["loss_after"] == facts["loss_before"] == 0
    assert_same_weights(before, weights_of(model))


# ---- bad input ---------------------------------------------------------------------------------------------------------


def test_an_output_layer_without_adapter_is_named(tmp_path: Path) -> None:
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="add 'lm_head' to the adapter's target_modules"):
        trainer(tmp_path, lora, zo_method="mezo", zo_act_samples=64)


def test_a_classifier_with_a_frozen_head_is_named() -> None:
    model = BertForSequenceClassification(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="trainable `classifier`"):
        fit_head(model.requires_grad_(False), [], logits_of(model))


# ---- in the trainer ----------------------------------------------------------------------------------------------------


def head_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in weights_of(model).items() if "lm_head" in name and "lora" in name}


def test_the_trainer_fits_once_and_freezes(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    start = losses(run.model)
    run.create_optimizer()
    fit = head_of(run.model)
    assert fit.keys() == {f"base_model.model.lm_head.lora_{x}.default.weight" for x in "AB"}
    assert losses(run.model) < 0.9 * start
    run.train()
    assert_same_weights(fit, head_of(run.model))
    assert not any("lm_head" in name for name in trained_of(run.model))


def test_random_states_are_left_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run.create_optimizer()
    assert torch.equal(torch.rand(2), expected)


def test_a_saved_adapter_holds_no_embedding_and_is_taken_up_without_a_new_fit(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run")
    run.train()
    run.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert all("lora" in name for name in saved)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved", is_trainable=True)
    assert losses(loaded) == pytest.approx(losses(run.model), abs=1e-6)
    again = trainer(tmp_path / "again", loaded, zo_head_samples=16)
    again.create_optimizer()
    assert_same_weights(head_of(run.model), head_of(again.model))
    assert trained_of(again.model).keys() == trained_of(run.model).keys()


def assert_resumed_equals_whole(tmp_path: Path, make: Callable[..., ZOTrainer] = trainer, **more: Any) -> None:
    more = {"save_strategy": "steps", "save_steps": 2, **more}
    whole = make(tmp_path / "a", **more)
    whole.train()
    resumed = make(tmp_path / "b", **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same_weights(weights_of(whole.model), weights_of(resumed.model))
    assert resumed._zo_optimizer.forward_passes == whole._zo_optimizer.forward_passes


@pytest.mark.parametrize("weights", [True, False])
def test_a_resumed_run_equals_the_whole_one(tmp_path: Path, weights: bool) -> None:
    assert_resumed_equals_whole(tmp_path, zo_save_weights=weights)


def assert_replay_equals_run(tmp_path: Path, **more: Any) -> None:
    run = trainer(tmp_path, **more)
    run.train()
    run.save_model(str(tmp_path))
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name and "lm_head" not in name:
                p.zero_()
    rebuilt = replay(model, Trajectory.read(tmp_path))
    assert_same_weights(weights_of(run.model), weights_of(rebuilt))


def test_a_replay_equals_the_run(tmp_path: Path) -> None:
    assert_replay_equals_run(tmp_path)


def test_lora_with_an_adapter_on_the_output_layer_is_fitted_too(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    run = trainer(tmp_path, get_peft_model(tiny_llama(), config), zo_method="mezo", zo_act_samples=64)
    start = losses(run.model)
    run.create_optimizer()
    assert losses(run.model) < 0.9 * start
    assert trained_of(run.model)
    assert not any("lm_head" in name for name in trained_of(run.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fit_under_another_adapter_is_part_of_the_trajectory(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_llama(dtype).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    base = tiny_llama().from_pretrained(tmp_path / "base")
    run = trainer(tmp_path / "run", get_peft_model(base, config), zo_method="mezo", zo_act_samples=64)
    run.train()
    run.save_model()
    run.create_model_card()
    command = ["replay", str(tmp_path / "base"), str(tmp_path / "run"), "-o", str(tmp_path / "rebuilt")]
    assert cli.main(command) == 0
    ours, theirs = (load_file(tmp_path / there / "adapter_model.safetensors") for there in ("run", "rebuilt"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].to(ours[name].dtype)) for name in ours)
    assert any("lm_head" in name and ours[name].any() for name in ours)
    assert cli.main([*command, "--adapter", str(tmp_path / "run")]) == 2
    without = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(TrajectoryError, match=r"lm_head.*is missing in this model"):
        replay(without, Trajectory.read(tmp_path / "run"))


@pytest.mark.parametrize(("wanted", "used"), [(48, 48), (1000, ROWS)])
def test_the_card_tells_of_it(wanted: int, used: int, tmp_path: Path) -> None:
    run = trainer(tmp_path, zo_head_samples=wanted)
    run.train()
    run.create_model_card()
    assert f"fitted to {used} rows first" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "run_facts.json").read_text())["settings"]["output layer"] == f"fitted to {used} rows first"


def test_the_card_tells_of_a_layer_that_stays(tmp_path: Path) -> None:
    def sure() -> nn.Module:
        model = tiny_llama()
        model.get_output_embeddings().weight.data.mul_(1e6)
        return model

    def answered(rows: list[torch.Tensor]) -> dict[str, Any]:
        batch = options(rows)
        batch["labels"]["target"] = option_scores(logits_of(sure())(batch), batch["labels"]).argmax(1)
        return batch

    run = trainer(tmp_path, sure(), max_steps=1)
    run.data_collator = answered
    run.train()
    assert not head_of(run.model)["base_model.model.lm_head.lora_B.default.weight"].any()
    assert facts_of(run)["settings"]["output layer"].startswith("as before")


def test_without_it_nothing_is_on_the_output_layer(tmp_path: Path) -> None:
    run = ZOTrainer(
        tiny_llama(),
        ZOTrainingArguments(str(tmp_path), zo_method="zo_act", zo_act_samples=8, use_cpu=True),
        train_dataset=Sentences(),
        data_collator=collate,
    )
    assert head_of(run.model) == {}


def test_passes_before_the_first_step_are_counted(tmp_path: Path) -> None:
    run = trainer(tmp_path, zo_packing=False)
    run.train()
    basis, fit, steps = 3 * 8 // 4, 48 // 4, 4 * 2
    assert run._zo_optimizer.forward_passes == basis + fit + steps


def answering(folder: Path, **more: Any) -> ZOTrainer:
    settings = {"zo_method": "zo_act", "zo_act_samples": 8, "zo_head_samples": 80, "max_steps": 4}
    arguments = ZOTrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **{**settings, **more})
    return ZOTrainer(tiny_llama(), arguments, train_dataset=Answered(), data_collator=collate)


def test_the_trainer_fits_the_output_layer_of_a_model_that_answers_freely(tmp_path: Path) -> None:
    run = answering(tmp_path)
    start = answer_loss(run.model)
    run.create_optimizer()
    assert answer_loss(run.model) < start - 0.5
    fit = head_of(run.model)
    run.train()
    assert_same_weights(fit, head_of(run.model))


def test_a_resumed_run_with_free_answers_equals_the_whole_one(tmp_path: Path) -> None:
    assert_resumed_equals_whole(tmp_path, answering, zo_save_weights=False)


def test_middle_blocks_do_not_answer_freely(tmp_path: Path) -> None:
    with pytest.raises(DepthError, match=r"answers are free text\. Unset it"):
        answering(tmp_path, zo_fit_depth=True).train()


# ---- zo_method="auto" --------------------------------------------------------------------------------------------------


class Encoded(Dataset):
    """Prompts as `OptionCollator` takes them, two options of one token after each; the last token tells which is right."""

    def __init__(self, second_token: int | None = None) -> None:
        self.prompts, self.second_token = Prompts(), second_token

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = [*self.prompts[i].tolist(), 20 + i % 2]
        tokens = (5, 9 if self.second_token is None or i else self.second_token)
        scored = [(0, len(ids) - 1, token, option) for option, token in enumerate(tokens)]
        return {"rows": [ids], "scored": scored, "target": i % 2}


class Pad:
    padding_side, pad_token_id = "right", 0


def whole_texts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator that makes the labels itself."""
    return collate([{**row, "labels": row["input_ids"]} for row in rows])


def automatic(
    folder: Path, data: Any, collator: Any, model: nn.Module | None = None, kind: type[ZOTrainer] = ZOTrainer, **more: Any
) -> ZOTrainer:
    arguments = ZOTrainingArguments(
        str(folder), zo_method="auto", zo_act_samples=8, use_cpu=True, report_to="none", **{"max_steps": 2, **more}
    )
    loss = {"compute_loss_func": option_loss} if isinstance(collator, OptionCollator) else {}
    return kind(tiny_llama() if model is None else model, arguments, train_dataset=data, data_collator=collator, **loss)


def test_auto_fits_the_output_layer_of_a_model_that_chooses_among_options(tmp_path: Path) -> None:
    run = automatic(tmp_path, Encoded(), OptionCollator(Pad()), remove_unused_columns=False)  # type: ignore[arg-type]
    assert (run.args.zo_method, run.args.zo_head_samples, run.args.optim) == ("zo_act", 1000, "adamw_torch")
    assert run.args.zo_fit_depth
    assert run.args.learning_rate == pytest.approx(3e-4)
    run.train()
    assert run.args.zo_fit_depth
    assert any(p.any() for name, p in head_of(run.model).items() if "lora_B" in name)


def test_auto_fits_the_output_layer_of_a_model_that_answers_freely(tmp_path: Path) -> None:
    run = automatic(tmp_path, Answered(), collate)
    assert (run.args.zo_head_samples, run.args.zo_fit_depth) == (1000, False)
    assert run.args.learning_rate == pytest.approx(3e-4)
    run.train()
    assert answer_loss(run.model) < answer_loss(tiny_llama()) - 0.5


@pytest.mark.parametrize(
    ("data", "collator", "more"),
    [
        ([{"input_ids": row["input_ids"]} for row in Answered()], whole_texts, {}),
        ([*Answered()][:4], collate, {}),
        (Encoded(second_token=7), OptionCollator(Pad()), {"remove_unused_columns": False}),  # type: ignore[arg-type]
        ([*Encoded()][:4], OptionCollator(Pad()), {"remove_unused_columns": False}),  # type: ignore[arg-type]
        ([*Encoded()][::2], OptionCollator(Pad()), {"remove_unused_columns": False}),  # type: ignore[arg-type]
    ],
    ids=["labels of the collator's", "few answers", "options that vary", "few prompts", "one answer to all prompts"],
)
def test_auto_is_zo_act_alone_where_there_is_nothing_to_fit(tmp_path: Path, data: Any, collator: Any, more: Any) -> None:
    run = automatic(tmp_path, data, collator, **more)
    assert (run.args.zo_method, run.args.zo_head_samples, run.args.zo_fit_depth) == ("zo_act", 0, False)
    assert run.args.learning_rate == pytest.approx(1e-3)
    assert head_of(run.model) == {}


def classifying(folder: Path, classes: int, **more: Any) -> ZOTrainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 64}
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=classes))
    rows = [{"input_ids": torch.tensor([1, 2 + i]), "attention_mask": torch.ones(2), "label": i % classes} for i in range(24)]
    return automatic(folder, rows, None, model, **more)


@pytest.mark.parametrize(("classes", "depth"), [(3, True), (6, False)])
def test_auto_fits_a_classifier(classes: int, depth: bool, tmp_path: Path) -> None:
    run = classifying(tmp_path, classes, per_device_train_batch_size=4)
    assert (run.args.zo_head_samples, run.args.zo_fit_depth) == (1000, depth)
    run.train()
    assert run.args.zo_fit_depth == depth


def test_auto_makes_the_model_by_model_init(tmp_path: Path) -> None:
    arguments = ZOTrainingArguments(
        str(tmp_path), zo_method="auto", zo_act_samples=8, max_steps=2, use_cpu=True, remove_unused_columns=False
    )

    def made() -> nn.Module:
        return tiny_llama()

    run = ZOTrainer(
        args=arguments,
        model_init=made,
        train_dataset=Encoded(),
        data_collator=OptionCollator(Pad()),  # type: ignore[arg-type]
        compute_loss_func=option_loss,
    )
    for _ in range(2):  # a model of its own each time
        run.train()
        assert (run.args.zo_head_samples, run.args.zo_fit_depth) == (1000, True)
        assert any(p.any() for name, p in head_of(run.model).items() if "lora_B" in name)


def test_auto_leaves_out_middle_blocks_of_a_model_that_is_made_anew(tmp_path: Path) -> None:
    once = classifying(tmp_path, 3)
    settings = {"zo_method": "auto", "zo_act_samples": 8, "max_steps": 1, "per_device_train_batch_size": 24}
    arguments = ZOTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **settings)
    config = once.model.get_base_model().config
    run = ZOTrainer(args=arguments, model_init=lambda: BertForSequenceClassification(config), train_dataset=once.train_dataset)
    for _ in range(2):
        run.train()
        assert not run.args.zo_fit_depth


class Weighted(ZOTrainer):
    """A loss of one's own, as the documentation of transformers shows it."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        assert set(inputs) == {"input_ids", "attention_mask", "labels"}
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs.logits, labels, torch.tensor([1.0, 2.0, 3.0]))
        return (loss, outputs) if return_outputs else loss


def test_auto_fits_under_a_loss_of_ones_own(tmp_path: Path) -> None:
    run = classifying(tmp_path, 3, per_device_train_batch_size=4, kind=Weighted)
    run.train()
    assert run.args.zo_fit_depth


def test_a_fit_by_another_loss_than_that_of_the_steps_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for more in ({"kind": Weighted}, {"label_smoothing_factor": 0.1}, {}):
        caplog.clear()
        classifying(tmp_path, 3, per_device_train_batch_size=4, **more).create_optimizer()
        assert ("the loss that you have set acts on the steps alone" in caplog.text) == bool(more)


class Own(ZOTrainer):
    """A loss of one's own over options."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        assert set(inputs) <= {"input_ids", "attention_mask", "position_ids", "labels"}
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = option_loss(outputs, labels)
        return (loss, outputs) if return_outputs else loss


def test_auto_leaves_out_middle_blocks_under_a_loss_of_ones_own_over_options(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pad: Any = OptionCollator(Pad())  # type: ignore[arg-type]
    run = automatic(tmp_path, Encoded(), pad, kind=Own, remove_unused_columns=False, per_device_train_batch_size=4)
    run.train()
    assert (run.args.zo_head_samples, run.args.zo_fit_depth) == (1000, False)
    assert "which a compute_loss of your own hides" in caplog.text


@pytest.mark.parametrize(
    ("asked", "made"), [({"zo_fit_depth": False}, (1000, False)), ({"zo_head_samples": 0}, (0, False))], ids=["depth", "head"]
)
def test_auto_leaves_out_what_is_turned_off(asked: dict[str, Any], made: tuple[int, bool], tmp_path: Path) -> None:
    run = classifying(tmp_path, 3, per_device_train_batch_size=4, **asked)
    assert (run.args.zo_head_samples, run.args.zo_fit_depth) == made


def test_a_resumed_run_knows_what_its_fits_came_to(tmp_path: Path) -> None:
    more = {"per_device_train_batch_size": 24, "save_strategy": "steps", "save_steps": 1}
    whole = classifying(tmp_path / "a", 3, **more)
    whole.train()
    resumed = classifying(tmp_path / "b", 3, **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert not whole.args.zo_fit_depth
    assert resumed.args.zo_fit_depth == whole.args.zo_fit_depth
    told, expected = (facts_of(run)["settings"]["output layer"] for run in (resumed, whole))
    assert told == expected


def test_a_row_without_an_answer_does_not_stop_the_fit(tmp_path: Path) -> None:
    rows = [*Answered(), {"input_ids": torch.tensor([3, 4, 5]), "labels": torch.full((3,), -100)}]
    assert automatic(tmp_path, rows, collate).args.zo_head_samples == 1000


def test_auto_names_an_adapter_of_ones_own(tmp_path: Path) -> None:
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="an adapter of your own is trained by zo_method='mezo'"):
        automatic(tmp_path, Answered(), collate, lora)


def test_auto_leaves_out_what_the_rows_do_not_suffice_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = classifying(tmp_path, 3, per_device_train_batch_size=24)
    run.train()
    assert not run.args.zo_fit_depth
    assert "the 24 rows in 1 batches are too few" in caplog.text


def test_auto_does_not_leave_out_what_is_asked_for(tmp_path: Path) -> None:
    run = classifying(tmp_path, 3, per_device_train_batch_size=24, zo_fit_depth=True)
    with pytest.raises(ValueError, match="the 24 rows in 1 batches are too few"):
        run.train()


def test_auto_names_a_fit_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zo_fit_depth=True goes on from a fit of the output layer, which zo_method='auto'"):
        automatic(tmp_path, Answered(), collate, zo_fit_depth=True)


def test_auto_does_not_leave_out_a_fit_that_is_asked_for(tmp_path: Path) -> None:
    pad: Any = OptionCollator(Pad())  # type: ignore[arg-type]
    run = automatic(tmp_path, Encoded(second_token=7), pad, remove_unused_columns=False, zo_head_samples=8)
    assert run.args.zo_head_samples == 8
    with pytest.raises(ValueError, match=r"zo_method='auto' cannot fit the output layer: set zo_method='zo_act'"):
        run.train()


def test_auto_keeps_what_is_asked_for(tmp_path: Path) -> None:
    run = automatic(
        tmp_path,
        Encoded(),
        OptionCollator(Pad()),  # type: ignore[arg-type]
        remove_unused_columns=False,
        zo_head_samples=8,
        learning_rate=2e-4,
    )
    assert (run.args.zo_head_samples, run.args.learning_rate, run.args.zo_fit_depth) == (8, 2e-4, True)


class InTurn(Dataset):
    """Rows of a classifier in which the classes come in turn, told by their second token."""

    def __init__(self, rows: int, classes: int) -> None:
        self.rows, self.classes = rows, classes

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = torch.tensor([1, 2 + i % self.classes, 20 + i % 7])
        return {"input_ids": ids, "attention_mask": torch.ones(3, dtype=torch.long), "labels": i % self.classes}


def of_classes(folder: Path, data: Any, classes: int, **more: Any) -> ZOTrainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=classes, initializer_range=0.3))
    return automatic(folder, data, None, model, per_device_train_batch_size=8, learning_rate=0.0, **more)


def test_rows_of_which_every_second_is_of_one_class_are_fitted_to_both(tmp_path: Path) -> None:
    run = of_classes(tmp_path, InTurn(2000, 2), 2)
    run.train()
    run.eval_dataset = InTurn(40, 2)
    assert run.evaluate()["eval_loss"] < 0.3


def test_every_fold_holds_every_class() -> None:
    target = torch.arange(50) % 5
    hidden = nn.functional.one_hot(target, 5).double() + 0.1 * torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    _, facts, _ = fitted(hidden, torch.zeros(50, 5), target)
    assert facts["loss_after"] < 0.3


def test_rows_of_one_class_are_named(tmp_path: Path) -> None:
    run = of_classes(tmp_path, InTurn(20, 1), 2, zo_head_samples=20)
    with pytest.raises(ValueError, match="the 20 training rows are all of one class"):
        run.train()


@pytest.mark.parametrize(("rows", "classes"), [(4, 2), (20, 1)], ids=["too few", "of one class"])
def test_auto_is_zo_act_alone_on_rows_that_tell_nothing(rows: int, classes: int, tmp_path: Path) -> None:
    run = of_classes(tmp_path, InTurn(rows, classes), 2)
    assert (run.args.zo_head_samples, run.args.zo_fit_depth) == (0, False)
    run.train()


def test_a_stream_that_knows_its_length_gives_its_first_rows(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __len__(self) -> int:
            return 40

        def __iter__(self) -> Any:
            return iter(InTurn(40, 2)[i] for i in range(40))

    run = of_classes(tmp_path, Stream(), 2)
    assert run.args.zo_head_samples == 1000
    run.train()


def test_labels_that_are_no_classes_leave_a_classifier_unfitted() -> None:
    rows = [{"label": i % 3} for i in range(20)]
    assert fittable(classifier("bert"), None, rows) == 3
    assert fittable(classifier("bert"), None, [*rows, {"label": -100}]) is None


def test_an_adapter_that_was_trained_is_not_fitted_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = of_classes(tmp_path, InTurn(40, 2), 2)
    first.args.learning_rate = 1e-3
    first.train()
    before = weights_of(first.model)
    again = automatic(tmp_path, InTurn(40, 2), None, first.model, per_device_train_batch_size=8, learning_rate=0.0)
    caplog.set_level("INFO")
    again.train()
    assert "is trained already" in caplog.text
    assert_same_weights(weights_of(again.model), before)


def choosing(folder: Path) -> ZOTrainer:
    return automatic(folder, Encoded(), OptionCollator(Pad()), remove_unused_columns=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [choosing, lambda folder: classifying(folder, 3, per_device_train_batch_size=4)])
def test_a_fit_that_was_interrupted_is_made_again(
    make: Callable[[Path], ZOTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = make(tmp_path), make(tmp_path)
    whole.train()

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(broken, "_fit_depth", interrupted)
        with pytest.raises(KeyboardInterrupt):
            broken.train()
    broken.train()
    assert_same_weights(weights_of(broken.model), weights_of(whole.model))


def test_an_adapter_of_too_low_a_rank_is_named(caplog: pytest.LogCaptureFixture) -> None:
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        fit_head(model, batches(), lambda batch: model(**{k: v for k, v in batch.items() if k != "labels"}).logits)
    assert "rank 1 and keeps" in caplog.text


def test_the_output_layer_has_a_rank_of_its_own() -> None:
    model = attach(tiny_llama(), rank=1, with_head=True)
    assert len(factors_of(output_layer(model))[0]) == 8  # type: ignore[arg-type]


def test_an_image_classifier_is_fitted_without_the_middle_blocks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3, initializer_range=0.3))
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    rows = [{"pixel_values": pixels[i % 3], "labels": i % 3} for i in range(30)]
    run = automatic(tmp_path, rows, None, model, per_device_train_batch_size=8, learning_rate=0.0)
    run.train()
    assert "moves tokens, and a batch holds pixel_values" in caplog.text
    run.eval_dataset = rows
    assert run.evaluate()["eval_loss"] < 0.2


def test_blocks_that_share_their_layers_stay_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 64}
    model = AlbertForSequenceClassification(AlbertConfig(**sizes, embedding_size=8, num_labels=2))
    automatic(tmp_path, InTurn(40, 2), None, model, per_device_train_batch_size=8).train()
    assert "called once in a forward pass" in caplog.text
