"""Activation bases: accuracy against an exact SVD, what counts as input, and an adapter that PEFT takes for its own."""

from __future__ import annotations

import copy
import logging
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from support import VOCABULARY, Sentences, collate, digest, model_of, tiny_llama, trained_of, trainer_of
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
)

from hf_zo import ZOTrainer
from hf_zo.adapters import activation_adapter, attach, basis_of, calibrate, start_prefix
from hf_zo.anatomy import adapted_layers, new_heads


def batches(rows: int = 24, size: int = 6) -> list[dict[str, torch.Tensor]]:
    data = Sentences(rows)
    made = [collate([data[i] for i in range(start, start + size)]) for start in range(0, rows, size)]
    return [{k: v for k, v in batch.items() if k != "labels"} for batch in made]


def inputs_of(model: nn.Module, data: list[dict[str, torch.Tensor]], skip: int = 0) -> dict[str, torch.Tensor]:
    """All rows that reach each adapted layer, padding left out, and ``skip`` tokens at the begin of each sequence."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    keep = torch.empty(0)

    def hook(name: str) -> Any:
        return lambda module, args: seen.setdefault(name, []).append((args[0][keep] if args[0].dim() == 3 else args[0]).float())

    for name, layer in adapted_layers(model):
        handles.append(layer.register_forward_pre_hook(hook(name)))
    with torch.no_grad():
        for batch in data:
            mask = batch["attention_mask"]
            keep = mask.bool() & (mask.cumsum(1) > skip)
            model.eval()(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}  # the pooler of BERT sees one token of each sequence


@pytest.mark.parametrize("skip", [0, 1])
def test_the_basis_is_the_leading_right_singular_space_of_the_inputs(skip: int) -> None:
    data = batches()
    adapted = activation_adapter(tiny_llama(), data, rank=4, exclude_first_token=bool(skip))
    inputs = inputs_of(adapted, data, skip)
    assert len(inputs) == 14  # seven linear layers in each of two blocks
    for name, layer in adapted_layers(adapted):
        v = basis_of(layer).T
        assert v.shape == (inputs[name].shape[1], 4)
        assert (v.T @ v - torch.eye(4)).abs().max() < 1e-5
        exact = torch.linalg.svd(inputs[name], full_matrices=False)
        best = exact.S[:4].pow(2).sum()
        assert (inputs[name] @ v).pow(2).sum() > 0.999 * best, name
        assert (v.gather(0, v.abs().argmax(0, keepdim=True)) > 0).all()  # canonical signs


def test_captured_energy_grows_with_rank_and_beats_a_random_basis() -> None:
    data, shares = batches(), []
    for rank in (1, 2, 4, 8):
        adapted = attach(tiny_llama().eval(), rank).eval()
        captured = calibrate(adapted, data, lambda batch, m=adapted: m(**batch))
        inputs = inputs_of(adapted, data)
        for name, layer in adapted_layers(adapted):
            x = inputs[name]
            share = float((x @ basis_of(layer).T).pow(2).sum() / x.pow(2).sum())
            assert captured[name] == pytest.approx(share, abs=0.01)
            random = torch.linalg.qr(torch.randn(x.shape[1], rank, generator=torch.Generator().manual_seed(0))).Q
            assert share > float((x @ random).pow(2).sum() / x.pow(2).sum())
        shares.append(captured)
    for small, large in pairwise(shares):
        assert all(small[name] < large[name] for name in small)


def test_how_far_the_first_direction_stands_out_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 30
    exact = torch.linalg.svdvals(x)
    adapted = attach(nn.Sequential(nn.Linear(6, 5)), 2)
    with caplog.at_level(logging.INFO, "hf_zo.adapters"):
        calibrate(adapted, [{"x": x}], lambda batch: adapted.base_model.model(batch["x"]))
    assert f"has {float(exact[0] / exact[1]):.3g} times the second's singular value" in caplog.text


def test_layers_with_the_same_input_share_a_basis() -> None:
    adapted = activation_adapter(tiny_llama(), batches(), rank=4)
    bases = {name.split("base_model.model.model.")[1]: basis_of(layer) for name, layer in adapted_layers(adapted)}
    for block in ("layers.0", "layers.1"):
        q, k, v = (bases[f"{block}.self_attn.{p}_proj"] for p in "qkv")
        gate, up = (bases[f"{block}.mlp.{p}_proj"] for p in ("gate", "up"))
        assert torch.equal(q, k)
        assert torch.equal(q, v)
        assert torch.equal(gate, up)
        assert not torch.equal(q, gate)
    assert not torch.equal(bases["layers.0.self_attn.q_proj"], bases["layers.1.self_attn.q_proj"])


def test_padding_does_not_count() -> None:
    """Right-padded, left-padded and longer batches give the same basis; so do packed ones without the first tokens."""
    data = Sentences(6)
    rows = [data[i]["input_ids"] for i in range(6)]

    def padded(width: int, left: bool) -> dict[str, torch.Tensor]:
        ids, mask = torch.zeros(6, width, dtype=torch.long), torch.zeros(6, width, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, place], mask[i, place] = row, 1
        return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    packed = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }
    for exclude in (False, True):
        reference = bases_of(activation_adapter(tiny_llama(), [padded(12, False)], rank=3, exclude_first_token=exclude))
        for batch in (padded(17, False), padded(14, True), packed):
            other = bases_of(activation_adapter(tiny_llama(), [batch], rank=3, exclude_first_token=exclude))
            for name, basis in reference.items():
                torch.testing.assert_close(other[name], basis, rtol=0, atol=2e-3)


def bases_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: basis_of(layer).detach() for name, layer in adapted_layers(model)}


def test_an_untrained_adapter_changes_nothing_and_trains_b_alone() -> None:
    batch = batches()[0]
    model = tiny_llama().eval()
    with torch.no_grad():
        before = model(**batch).logits
        adapted = activation_adapter(model, batches(), rank=4).eval()
        assert torch.equal(adapted(**batch).logits, before)
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trainable) == 14
    assert all("lora_B" in name for name in trainable)


def test_the_gradient_of_b_is_the_gradient_of_w_projected_on_the_basis() -> None:
    """dL/dB = (dL/dW) V, by autograd."""
    adapted = activation_adapter(tiny_llama(), batches(), rank=4).eval()
    for p in adapted.parameters():
        p.requires_grad_(True)
    row = Sentences()[0]
    adapted(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
    for name, layer in adapted_layers(adapted):
        b = layer.lora_B["default"].weight
        torch.testing.assert_close(b.grad, layer.weight.grad @ basis_of(layer).T, rtol=1e-4, atol=1e-6, msg=name)


def test_rows_without_rank_are_exact() -> None:
    """Inputs of rank 3: a basis of rank 3 keeps all of them, and the gradient of W with them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 10, bias=False), nn.Tanh(), nn.Linear(10, 4))
    x = torch.randn(50, 3) @ torch.randn(3, 20)
    adapted = attach(model, 3, ["0"])
    captured = calibrate(adapted, [{"x": x}], lambda batch: adapted.base_model.model(batch["x"]))
    assert captured["base_model.model.0"] == pytest.approx(1.0, abs=1e-4)
    (layer,) = [layer for _, layer in adapted_layers(adapted)]
    layer.weight.requires_grad_(True)
    adapted.base_model.model(x).pow(2).sum().backward()
    g, v = layer.weight.grad, basis_of(layer).T
    assert (g - g @ v @ v.T).norm() < 1e-4 * g.norm()


def test_round_trip_through_peft_and_merging(tmp_path: Path) -> None:
    """A trained adapter is saved by the Trainer, loaded by PEFT, merged by PEFT; the base is bitwise what it was."""
    trainer = trainer_of(tmp_path, "zo_act", learning_rate=1e-2)
    base = digest(tiny_llama())
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    assert digest(trainer.model.get_base_model()) != base  # names differ, so compare what it unloads to
    batch = batches()[0]
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
        assert torch.equal(loaded(**batch).logits, expected)
        assert not torch.equal(expected, tiny_llama().eval()(**batch).logits)
        torch.testing.assert_close(loaded.merge_and_unload()(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert digest(trainer.model.unload()) == base


def test_an_earlier_adapter_is_trained_on_with_its_basis(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "zo_act")
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    before = bases_of(trainer.model)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", is_trainable=True)
    again = ZOTrainer(loaded, trainer.args, train_dataset=Sentences(), data_collator=collate)
    again.train()
    assert all("lora_B" in name for name, p in loaded.named_parameters() if p.requires_grad)
    for name, basis in bases_of(loaded).items():
        assert torch.equal(basis, before[name])


def test_another_rank_than_that_of_the_adapter_is_refused(tmp_path: Path) -> None:
    model, args = activation_adapter(tiny_llama(), batches(), rank=4), trainer_of(tmp_path, "zo_act", zo_act_rank=16).args
    with pytest.raises(ValueError, match=r"^zo_act_rank=16.*has rank 4"):
        ZOTrainer(model, args, train_dataset=Sentences(), data_collator=collate)


def test_an_ordinary_lora_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no activation basis.*Pass the base model"):
        ZOTrainer(model_of("lora"), trainer_of(tmp_path, "zo_act").args, train_dataset=Sentences(), data_collator=collate)


def test_calibration_leaves_random_states_alone_and_sees_no_dropout(tmp_path: Path) -> None:
    """The base has dropout 0.5: two calibrations agree only in eval mode."""
    bases = []
    for _ in range(2):
        torch.manual_seed(len(bases))
        trainer = trainer_of(tmp_path, "zo_act")
        state = torch.get_rng_state()
        trainer._calibrate()
        assert torch.equal(torch.get_rng_state(), state)
        assert trainer.model.training
        bases.append(bases_of(trainer.model))
    for name, basis in bases[0].items():
        assert torch.equal(basis, bases[1][name])


def test_a_run_may_leave_first_tokens_out_of_its_basis(tmp_path: Path) -> None:
    bases = []
    for exclude in (False, True):
        trainer = trainer_of(tmp_path, "zo_act", zo_act_exclude_first_token=exclude)
        trainer._calibrate()
        bases.append(bases_of(trainer.model))
    assert not any(torch.equal(basis, bases[1][name]) for name, basis in bases[0].items())


def test_a_random_basis_is_orthonormal_keyed_and_looks_at_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bases_after(seed: int) -> dict[str, torch.Tensor]:
        trainer = trainer_of(tmp_path, "zo_act", zo_act_basis="random", zo_act_samples=64, zo_seed=seed)
        before = trained_of(trainer.model)
        trainer.train()
        assert any(not torch.equal(p, before[name]) for name, p in trained_of(trainer.model).items())
        return bases_of(trainer.model)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a random basis needs no calibration")

    monkeypatch.setattr("hf_zo.preparation.calibrate", refuse)
    first, again, other = bases_after(1), bases_after(1), bases_after(2)
    assert len({tuple(basis.flatten().tolist()) for basis in first.values()}) == len(first) == 14
    for name, basis in first.items():
        assert (basis @ basis.T - torch.eye(len(basis))).abs().max() < 1e-5
        assert torch.equal(basis, again[name])
        assert not torch.equal(basis, other[name])


def test_model_init(tmp_path: Path) -> None:
    args = trainer_of(tmp_path, "zo_act").args
    trainer = ZOTrainer(args=args, model_init=partial(model_of, "full"), train_dataset=Sentences(), data_collator=collate)
    trainer.train()
    assert all("lora_B" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("make", ["gpt2", "bert"])
def test_other_architectures(make: str, caplog: pytest.LogCaptureFixture) -> None:
    """GPT-2 has Conv1D layers; a classifier keeps its head trainable, as PEFT does it."""
    torch.manual_seed(0)
    if make == "gpt2":
        model: nn.Module = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    else:
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        model = BertForSequenceClassification(config)
    data = batches()
    adapted = activation_adapter(model.eval(), data, rank=4)
    inputs = inputs_of(adapted, data)
    for name, layer in adapted_layers(adapted):
        exact = torch.linalg.svd(inputs[name], full_matrices=False)
        kept = (inputs[name] @ basis_of(layer).T).pow(2).sum()
        assert kept > 0.995 * exact.S[:4].pow(2).sum(), name


def test_a_rank_above_a_dimension_is_clipped_and_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_zo.adapters"):
        adapted = activation_adapter(tiny_llama(), batches(), rank=12)
    assert "zo_act_rank=12 exceeds a dimension of model.layers.0.self_attn.k_proj and is 8 there" in caplog.text
    ranks = {name.rsplit(".", 1)[1]: len(basis_of(layer)) for name, layer in adapted_layers(adapted)}
    assert ranks["k_proj"] == 8
    assert ranks["gate_proj"] == 12
    assert all(layer.scaling["default"] == 1 for _, layer in adapted_layers(adapted))


def test_a_layer_without_tokens_gets_a_random_basis_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    class WithIdle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    adapted = attach(WithIdle(), 3)
    with caplog.at_level(logging.WARNING, "hf_zo.adapters"):
        calibrate(adapted, [{"x": torch.randn(8, 6)}], lambda batch: adapted.base_model.model(batch["x"]))
    assert "No calibration token reached base_model.model.idle; its basis is random" in caplog.text
    v = dict(bases_of(adapted))["base_model.model.idle"]
    assert (v @ v.T - torch.eye(3)).abs().max() < 1e-5


def test_a_calibration_set_without_a_token() -> None:
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match="no usable token"):
        activation_adapter(tiny_llama(), [batch], rank=2)
    with pytest.raises(ValueError, match="no usable token"):
        activation_adapter(tiny_llama(), [], rank=2)


def test_targets_that_are_not_supported() -> None:
    convolution = nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"matches no linear layer. Supported are .*BatchNorm1d, Conv1d"):
        attach(convolution)
    with pytest.raises(ValueError, match=r"names Embedding; supported are torch.nn.Linear"):
        attach(tiny_llama(), 4, ["embed_tokens"])
    with pytest.raises(ValueError, match="names nothing, which this model does not have"):
        attach(tiny_llama(), 4, ["nothing"])
    with pytest.raises(ValueError, match="zo_act_rank"):
        attach(tiny_llama(), 0)


def test_chosen_targets() -> None:
    adapted = attach(tiny_llama(), 4, ["q_proj", "down_proj"])
    assert {name.rsplit(".", 1)[1] for name, _ in adapted_layers(adapted)} == {"q_proj", "down_proj"}
    assert len(list(adapted_layers(adapted))) == 4
    ((name, _),) = adapted_layers(attach(tiny_llama(), 1, "one-block"))
    assert name.endswith("layers.1.mlp.down_proj")  # of two blocks
    with pytest.raises(ValueError, match="zo_act_targets='one-block' wants a model of blocks"):
        attach(nn.Sequential(nn.Linear(4, 4)), 1, "one-block")


def test_no_training_data(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "zo_act")
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="needs a train_dataset"):
        trainer._calibrate()


@pytest.mark.parametrize("scheme", ["nf4", "int8", "torchao-int8"])
def test_a_quantised_base_is_read_only(scheme: str, tmp_path: Path) -> None:
    """bitsandbytes NF4 and int8 and torchao int8: train, base bits unchanged, save, load on another quantised base."""

    def quantised() -> nn.Module:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

        if scheme == "torchao-int8":
            from torchao.quantization import Int8WeightOnlyConfig

            config: Any = TorchAoConfig(Int8WeightOnlyConfig())
        elif scheme == "nf4":
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        else:
            config = BitsAndBytesConfig(load_in_8bit=True)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.float32)

    wide_llama().save_pretrained(tmp_path / "base")
    model = quantised()
    kinds = {type(m).__name__ for m in model.modules()} | {type(p.data).__name__ for p in model.parameters()}
    assert any(kind in kinds for kind in ("Linear4bit", "Linear8bitLt", "Int8Tensor", "AffineQuantizedTensor")), kinds
    args = trainer_of(tmp_path, "zo_act", max_steps=3).args
    trainer = ZOTrainer(model, args, train_dataset=Sentences(), data_collator=collate)
    with torch.no_grad():
        trainer.model.eval()(**batches()[0])  # bitsandbytes packs its weights for the processor in the first forward
    frozen = {name: copy.deepcopy(p.data) for name, p in trainer.model.named_parameters() if "lora" not in name}
    trainer.train()
    for name, p in trainer.model.named_parameters():
        if "lora" not in name:
            assert same_data(p.data, frozen[name]), name
    trainer.save_model(tmp_path / "adapter")
    batch = batches()[0]
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        loaded = PeftModel.from_pretrained(quantised(), tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(**batch).logits, expected)


def wide_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def same_data(a: torch.Tensor, b: torch.Tensor) -> bool:
    if hasattr(a, "qdata"):
        return torch.equal(a.qdata, b.qdata) and torch.equal(a.scale, b.scale)
    return torch.equal(a, b)


def test_targets_that_do_not_exist_are_named() -> None:
    with pytest.raises(ValueError, match="zo_act_targets names nowhere, which this model does not have"):
        attach(tiny_llama(), 4, ["q_proj", "nowhere"])
    assert len(list(adapted_layers(attach(tiny_llama(), 4, ["q_proj", " v_proj"])))) == 4


def test_what_is_called_like_a_new_head_is_trained_as_a_whole() -> None:
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=VOCABULARY, dim=16, hidden_dim=32, n_layers=2, n_heads=2, num_labels=2)
    adapted = attach(DistilBertForSequenceClassification(config))
    names = [name for name, _ in adapted_layers(adapted)]
    assert len(names) == 12  # six linear layers in each of two blocks
    assert not any("classifier" in name for name in names)
    assert any("classifier" in name for name in trained_of(adapted))


@pytest.mark.parametrize(
    ("family", "config", "heads"),
    [
        (DebertaV2ForSequenceClassification, DebertaV2Config, ["pooler", "classifier"]),
        (BertForQuestionAnswering, BertConfig, ["qa_outputs"]),
    ],
)
def test_new_heads_are_saved_with_the_adapter(family: Any, config: Any, heads: list[str], tmp_path: Path) -> None:
    """Loading a body draws them anew: what is not saved is lost."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = family(config(vocab_size=VOCABULARY, **sizes))
    assert list(new_heads(model)) == heads
    model.base_model.save_pretrained(tmp_path / "body")
    adapted = attach(type(model).from_pretrained(tmp_path / "body"))
    assert not any(head in name for head in heads for name, _ in adapted_layers(adapted))
    assert {head for head in heads for name in trained_of(adapted) if f".{head}." in name} == set(heads)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "body"), tmp_path / "adapter")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        wanted, found = (m.eval()(input_ids=ids).to_tuple() for m in (adapted, again))
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_wide_layer_gets_its_rank_after_a_narrow_one_with_the_same_input() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide = nn.Linear(24, 1), nn.Linear(24, 24)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.narrow(input_ids) + self.wide(input_ids)

    adapted = activation_adapter(
        Two(), [{"input_ids": torch.randn(40, 24, generator=torch.Generator().manual_seed(0))}], rank=16
    )
    assert [len(basis_of(layer)) for _, layer in adapted_layers(adapted)] == [1, 16]


def test_an_objective_of_ones_own_calibrates(tmp_path: Path) -> None:
    def objective(model: nn.Module, inputs: Any) -> torch.Tensor:
        return model(input_ids=inputs["input_ids"]).logits.square().mean()

    run = trainer_of(tmp_path, "zo_act", trainer_kwargs={"objective_fn": objective})
    rows = [{"input_ids": row["input_ids"][:5]} for row in (Sentences()[i] for i in range(16)) if len(row["input_ids"]) >= 5]
    run.train_dataset, run.data_collator = rows, lambda batch: {"input_ids": torch.stack([r["input_ids"] for r in batch])}
    run.train()


def test_an_adapter_beside_the_active_one_is_left_alone() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("two")
    assert [name.split(".")[-1] for name, _ in adapted_layers(model)] == ["v_proj", "v_proj"]


def test_calibration_takes_the_batch_size_that_fits(tmp_path: Path) -> None:
    run = trainer_of(tmp_path, "zo_act", auto_find_batch_size=True, per_device_train_batch_size=8)
    sizes: list[int] = []

    def scarce(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 4:
            raise RuntimeError("CUDA out of memory.")

    run.model.register_forward_pre_hook(scarce, with_kwargs=True)
    run.train()
    assert sizes[0] == 8
    assert sizes[-1] <= 4 < run.args.per_device_train_batch_size
    assert run.state.global_step == run.args.max_steps


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_prefix_starts_as_tokens_do(kind: str) -> None:
    """A text after the prefix has the logits that it has after some real tokens; which ones is a matter of the seed."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "initializer_range": 0.5}
    base = tiny_llama() if kind == "llama" else GPT2LMHeadModel(GPT2Config(**sizes))
    base.eval()
    ids = torch.arange(3, 9)[None]
    plain = {token: base(torch.cat([torch.tensor([[token]]), ids], 1)).logits[:, 1:].detach() for token in range(VOCABULARY)}
    started = []
    for seed in (1, 1, 2):
        model = get_peft_model(copy.deepcopy(base), PrefixTuningConfig(num_virtual_tokens=1, task_type="CAUSAL_LM"))
        model.train()
        start_prefix(model, seed)
        assert model.training
        logits = model.eval()(input_ids=ids).logits.detach()
        started.append([token for token, expected in plain.items() if torch.allclose(logits, expected, atol=1e-5)])
    assert all(len(tokens) == 1 for tokens in started)
    assert started[0] == started[1] != started[2]


def test_a_prefix_of_a_classifier_starts_as_tokens_do() -> None:
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(tiny_llama().config).eval()
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        plain = [base(torch.cat([torch.tensor([[token]]), ids], 1)).logits for token in range(VOCABULARY)]
        adapted = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=1, task_type="SEQ_CLS"))
        logits = start_prefix(adapted, 1).eval()(input_ids=ids).logits
    assert sum(torch.allclose(logits, expected, atol=1e-5) for expected in plain) == 1


def test_an_encoder_has_nothing_that_a_prefix_could_start_from() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    model = BertForSequenceClassification(BertConfig(**sizes))
    model = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=1, task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="peft='prefix': BertForSequenceClassification keeps no keys"):
        start_prefix(model, 1)
