"""The fit in middle blocks: the direction that scores respond to, the classes' means, and the convex problem of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same_weights, tiny_llama, trained_of, weights_of
from test_head import assert_replay_equals_run, assert_resumed_equals_whole, automatic, options, trainer
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

from hf_zo import ZOTrainingArguments, depth, head, preparation
from hf_zo.adapters import attach, check_basis
from hf_zo.anatomy import adapted_layers, factors_of
from hf_zo.depth import attention_outputs, fit_depth
from hf_zo.head import HeadFit

WIDTH, ROWS, BATCH = 12, 320, 16


class Reader(nn.Module):
    """A layer named like attention's last, and scores that read one direction of what its rows' tokens add up to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.Linear(WIDTH, 8)
        self.readout = nn.Parameter(torch.randn(3, 1) @ torch.randn(1, 8), requires_grad=False)
        self.unread = nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.unread(x)
        return torch.tanh((self.attn(x) * mask[..., None]).sum(1) @ self.readout.T / 8)


def problem(
    chance: bool = False, left: bool = False, targets: Sequence[str] = ("attn",), size: int = BATCH
) -> tuple[Any, list[dict[str, torch.Tensor]], torch.Tensor, Any, Any]:
    """Model, batches, targets, scores and rows. One input direction of every token tells the class."""
    g = torch.Generator().manual_seed(1)
    target = torch.randint(3, (ROWS,), generator=g)
    x = torch.randn(ROWS, 5, WIDTH, generator=g)
    x[:, :, 0] += (target[:, None] - 1) * 1.0
    mask = torch.ones(ROWS, 5)
    mask[::2, 3:] = 0
    x[mask == 0] = 1e3  # padding that is read shows
    if left:
        x, mask = x.flip(1), mask.flip(1)
    if chance:
        target = torch.randint(3, (ROWS,), generator=g)
    model = attach(Reader(), 4, list(targets))
    batches = [{"x": x[i : i + size], "mask": mask[i : i + size]} for i in range(0, ROWS, size)]
    current: dict[str, torch.Tensor] = {}

    def scores(batch: Mapping[str, Any]) -> torch.Tensor:
        current.update(batch)
        return model(**batch)

    def rows(tokens: int) -> torch.Tensor:
        row = torch.arange(tokens) // 5
        return row.where(current["mask"].flatten() > 0, -1)

    return model, batches, target, scores, rows


def fit(made: Any, blind: bool = False, **more: Any) -> dict[str, float]:
    model, batches, target, scores, rows = made
    with torch.no_grad():
        offset = torch.cat([scores(batch) for batch in batches]).double()
    offset = torch.zeros_like(offset) if blind else offset
    return fit_depth(dict(adapted_layers(model)), batches, HeadFit({}, offset, target), scores, rows, **more)


def loss_of(made: Any) -> float:
    _, batches, target, scores, _ = made
    with torch.no_grad():
        said = torch.cat([scores(batch) for batch in batches])
    return float(cross_entropy(said, target))


# ---- what is found -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
def test_the_layer_is_moved_along_what_the_scores_read_by_what_tells_the_classes(left: bool) -> None:
    made = problem(left=left)
    before = loss_of(made)
    facts = fit(made)
    (_, layer), *_ = adapted_layers(made[0])
    basis, b = factors_of(layer)
    u = made[0].base_model.model.readout[0]
    # One batch says enough of u: 16 rows in 8 dimensions, so about sqrt(16 / 24) = 0.82; chance is 0.35.
    assert float(torch.cosine_similarity(b[:, -1], u, dim=0).abs()) > 0.6
    assert float(basis[-1, 0].abs()) > 0.8  # in 12 dimensions
    assert not b[:, :-1].any()
    assert facts["coefficients"] == 2  # contrasts of three classes
    assert facts["loss_after"] < facts["loss_before"] - 0.1
    # Left-out rows with the scores as affine functions say what the rows' own scores, as they are, come to.
    assert loss_of(made) == pytest.approx(facts["loss_after"], abs=0.05)
    assert facts["loss_before"] == pytest.approx(before, abs=1e-6)


def test_the_more_rows_the_closer_is_what_the_scores_read() -> None:
    model, batches, _, scores, rows = problem()
    (name, layer), *_ = adapted_layers(model)
    found = []
    with torch.no_grad():
        plain = [depth._centred(scores(batch)) for batch in batches]
        for n in (1, 20):
            u = depth._sensitive(depth._Changes(layer, batches[:n], plain[:n], scores, rows), 0, name)
            found.append(float(torch.cosine_similarity(u, model.base_model.model.readout[0], dim=0).abs()))
    assert found[1] > 0.95  # 320 rows in 8 dimensions
    assert found[1] > found[0]


def test_half_as_many_rows_as_a_layer_is_wide_tell_what_the_scores_read(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def watched(changes: Any, *more: Any) -> torch.Tensor:
        told.append(sum(map(len, changes.plain)))
        return sensitive(changes, *more)

    sensitive = depth._sensitive
    monkeypatch.setattr(depth, "_sensitive", watched)
    fit(problem(size=2))
    assert told == [4]  # of 8


def test_what_rows_of_even_and_of_odd_batches_tell_is_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(x: torch.Tensor, found: HeadFit, half: torch.Tensor) -> torch.Tensor:
        a = torch.zeros(2, WIDTH)
        a[:, 0], a[:, 1] = 1.0, float(half[-1])  # of the odd ones
        return a

    monkeypatch.setattr(depth, "_discriminants", told)
    made = problem()
    fit(made)
    (_, layer), *_ = adapted_layers(made[0])
    written = factors_of(layer)[0][-1]
    torch.testing.assert_close(written[0], 2 * written[1])


def test_rows_are_moved_from_the_scores_of_fits_that_have_not_seen_them() -> None:
    assert fit(problem(), blind=True)["loss_before"] == pytest.approx(math.log(3))


def test_a_layer_that_the_scores_do_not_read_stays_as_it_was() -> None:
    made = problem(targets=["attn", "unread"])
    start = weights_of(made[0])
    facts = fit(made)
    assert facts["loss_after"] < facts["loss_before"]
    changed = {name for name, p in weights_of(made[0]).items() if not torch.equal(p, start[name])}
    assert {name.split(".")[2] for name in changed} == {"attn"}


def test_the_adapter_stays_one_of_zo_act() -> None:
    made = problem()
    fit(made)
    check_basis(made[0])


def test_the_noise_has_a_key() -> None:
    runs = []
    for seed in (0, 0, 1):
        made = problem()
        fit(made, seed=seed)
        runs.append(weights_of(made[0]))
    assert_same_weights(runs[0], runs[1])
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_labels_of_chance_leave_the_blocks_as_they_were(caplog: pytest.LogCaptureFixture) -> None:
    made = problem(chance=True)
    start = weights_of(made[0])
    facts = fit(made, blind=True)  # what the scores are off by would be worth a change
    assert facts["loss_after"] == facts["loss_before"]
    assert_same_weights(start, weights_of(made[0]))
    assert "stay as they were" in caplog.text


# ---- where -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "chosen"), [(8, (2, 4, 6)), (12, (4, 6, 8))])
def test_every_second_block_of_the_middle_is_chosen(blocks: int, chosen: tuple[int, ...]) -> None:
    model = tiny_llama()
    model.model.layers.extend([tiny_llama().model.layers[0] for _ in range(blocks - 2)])
    names = attention_outputs(attach(model, 2))
    assert [name.split("layers.")[1] for name in names] == [f"{i}.self_attn.o_proj" for i in chosen]


def test_an_encoder_has_them_too() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 64}
    names = attention_outputs(attach(BertForSequenceClassification(BertConfig(**sizes)), 2))
    assert [name.split("layer.")[1] for name in names] == ["1.attention.output.dense"]


# ---- in the trainer ----------------------------------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the output layer could not read the class, which a model without training leaves it to do."""

    def fit_head(*args: Any) -> HeadFit:
        found = head.fit_head(*args)
        return HeadFit(found.facts, torch.zeros_like(found.left_out), found.target)

    monkeypatch.setattr(preparation, "fit_head", fit_head)


def middle_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in weights_of(model).items() if "layers.0.self_attn.o_proj.lora" in name}


@pytest.mark.usefixtures("unread")
def test_nothing_but_the_middle_blocks_changes(tmp_path: Path) -> None:
    alone, deep = trainer(tmp_path), trainer(tmp_path, zo_fit_depth=True)
    for run in (alone, deep):
        run.create_optimizer()
    changed = {name for name, p in weights_of(deep.model).items() if not torch.equal(p, weights_of(alone.model)[name])}
    assert changed == set(middle_of(deep.model))
    assert trained_of(deep.model).keys() == trained_of(alone.model).keys()
    check_basis(deep.model)


@pytest.mark.usefixtures("unread")
def test_batches_without_padding_give_the_same(tmp_path: Path) -> None:
    runs = [trainer(tmp_path, zo_fit_depth=True, zo_packing=packing) for packing in (True, False)]
    for run in runs:
        run.create_optimizer()
    assert runs[0]._packing.form == "packed"
    added = []
    for run in runs:
        basis, b = factors_of(next(iter(attention_outputs(run.model).values())))
        added.append(b @ basis)  # the signs of both factors may turn
    assert added[0].norm() > 0.1
    difference = float((added[0] - added[1]).norm() / added[0].norm())
    assert difference < 1e-3  # rounding of scores, over the radius


@pytest.mark.usefixtures("unread")
def test_padding_of_a_classifier_changes_nothing(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    texts = [torch.tensor([1, 2 + i % 3, *torch.randint(5, 64, (i % 4,), generator=g).tolist()]) for i in range(60)]
    rows = [{"input_ids": ids, "labels": i % 3} for i, ids in enumerate(texts)]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 64}

    def padded(rows: list[dict[str, Any]], width: int) -> dict[str, torch.Tensor]:
        ids = torch.stack([nn.functional.pad(row["input_ids"], (0, width - len(row["input_ids"]))) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([row["labels"] for row in rows])}

    added = []
    for width in (8, 16):
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**sizes, num_labels=3, initializer_range=0.3))
        run = automatic(tmp_path, rows, partial(padded, width=width), model, zo_fit_depth=True, per_device_train_batch_size=4)
        run.create_optimizer()
        basis, b = factors_of(next(iter(attention_outputs(run.model).values())))
        added.append((b @ basis).detach())
    assert added[0].norm() > 0.1
    assert float((added[0] - added[1]).norm() / added[0].norm()) < 1e-3


@pytest.mark.usefixtures("unread")
def test_options_of_several_tokens_are_fitted_too(tmp_path: Path) -> None:
    run = trainer(tmp_path, zo_fit_depth=True)
    run.data_collator = partial(options, two=True)
    run.create_optimizer()
    assert max(p.norm() for name, p in middle_of(run.model).items() if "lora_B" in name) > 0.1


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("weights", [True, False])
def test_a_resumed_run_equals_the_whole_one(tmp_path: Path, weights: bool) -> None:
    assert_resumed_equals_whole(tmp_path, zo_save_weights=weights, zo_fit_depth=True)


@pytest.mark.usefixtures("unread")
def test_a_replay_equals_the_run(tmp_path: Path) -> None:
    assert_replay_equals_run(tmp_path, zo_fit_depth=True)


def test_the_card_tells_of_it(tmp_path: Path) -> None:
    run = trainer(tmp_path, zo_fit_depth=True)
    run.train()
    run.create_model_card()
    assert "a direction each, fitted to the same rows" in (tmp_path / "README.md").read_text()


# ---- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{"zo_method": "mezo", "zo_head_samples": 8}, {"zo_method": "zo_act"}])
def test_what_it_goes_on_from_is_named(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="zo_fit_depth=True goes on from the fit of the output layer"):
        ZOTrainingArguments(str(tmp_path), zo_fit_depth=True, use_cpu=True, **more)


def test_a_model_without_adapted_attention_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path, zo_fit_depth=True, zo_act_targets="down_proj")
    with pytest.raises(ValueError, match="finds no adapter on an attention layer"):
        run.create_optimizer()


def test_a_single_batch_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path, zo_fit_depth=True, zo_head_samples=8, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match="the 8 rows in 1 batches are too few"):
        run.create_optimizer()
