"""Shared lower layers: computed once per step, the same losses to the bit, and no trace left."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support import Sentences, arguments_of, collate, tiny_llama, trainer_of
from torch import nn

from hf_zo import ZOTrainer
from hf_zo.directions import DenseDirection, Probe, space_of
from hf_zo.estimators.curvzo import BlockDirection
from hf_zo.runtimes import TorchRuntime

LAYERS = 4
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=24
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=LAYERS, n_head=2),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16
    ),
    "bert": lambda: transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=24
    ),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    auto = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    model = auto.from_config(CONFIGS[name]()).eval().requires_grad_(False)
    model.config.use_cache = False
    return model


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


def counted(model: nn.Module) -> list[int]:
    """How often each block really computes: its first child runs."""
    counts = [0] * LAYERS
    for i, block in enumerate(blocks_of(model)):
        first = next(m for m in block.modules() if isinstance(m, (nn.Linear, transformers.pytorch_utils.Conv1D)))
        first.register_forward_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    return counts


def loss_of(model: nn.Module, windows: int = 1):
    ids = torch.randint(0, 40, (windows, 3, 7), generator=torch.Generator().manual_seed(1))

    def measure() -> torch.Tensor:
        with torch.no_grad():
            return sum(model(input_ids=batch, labels=batch).loss for batch in ids)

    return measure


def probes_of(params, step: int = 0) -> list[Probe]:
    direction = DenseDirection(space_of(params), 5, step, 0)
    return [Probe(((a, direction),)) for a in (0.1, -0.1)] + [Probe()]


@pytest.mark.parametrize("restore", ["copy", "transient"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("windows", [1, 2])
def test_upper_layers_alone(name, restore, windows, monkeypatch):
    model = build(name)
    blocks_of(model)[2].requires_grad_(True)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    counts, measure = counted(model), loss_of(model, windows)
    runtime = TorchRuntime(params, restore, model)
    expected = [runtime.losses(probes_of(params, 0), measure), None, None]
    assert counts[0] == counts[3]  # the order of the blocks is learnt meanwhile
    with monkeypatch.context() as patch:
        patch.setattr(runtime._prefix, "depth", lambda moved: 0)
        expected[1:] = [runtime.losses(probes_of(params, step), measure) for step in (1, 2)]
    assert runtime.losses(probes_of(params, 1), measure) == expected[1]
    counts[:] = [0] * LAYERS
    assert runtime.losses(probes_of(params, 2), measure) == expected[2]
    assert counts == [windows, windows, 3 * windows, 3 * windows]
    assert expected[1][0] != expected[1][1]


def test_an_adapter_on_the_upper_layers():
    model = build("llama")
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[3], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).eval()
    params = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    counts, measure = counted(model), loss_of(adapted)
    runtime = TorchRuntime(params, "auto", adapted)
    for step in range(3):
        counts[:] = [0] * LAYERS
        runtime.losses(probes_of(params, step), measure)
    assert counts == [1, 1, 1, 3]


def test_blocks_that_are_not_selected_this_time():
    model = build("llama").requires_grad_(True)
    params = dict(model.named_parameters())
    counts, measure = counted(model), loss_of(model)
    runtime = TorchRuntime(params, "transient", model)
    dense = DenseDirection(space_of(params), 5, 0, 0)

    def above(lowest: int) -> list[Probe]:
        weights = {
            n: float(not n.startswith("model.embed") and not any(f"layers.{i}." in n for i in range(lowest))) for n in params
        }
        return [Probe(((a, BlockDirection(dense, weights)),)) for a in (0.1, -0.1)]

    runtime.losses(above(0), measure)
    runtime.losses(above(3), measure)  # checks
    for lowest in (3, 0, 1):
        counts[:] = [0] * LAYERS
        shared = runtime.losses(above(lowest), measure)
        assert counts == [1] * lowest + [2] * (LAYERS - lowest)
        assert shared == TorchRuntime(params, "copy", model).losses(above(lowest), measure)
    counts[:] = [0] * LAYERS
    runtime.losses(probes_of(params), measure)
    assert counts == [3] * LAYERS


def test_forwards_are_put_back_after_an_error_and_those_of_others_stay():
    model = build("llama")
    blocks = blocks_of(model)
    blocks[3].requires_grad_(True)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    blocks[1].forward = others = functools.partial(blocks[1].forward)
    plain, calls = loss_of(model), []

    def failing() -> torch.Tensor:
        loss = plain()
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("in the middle")
        return loss

    runtime = TorchRuntime(params, "copy", model)
    runtime.losses(probes_of(params), failing)
    with pytest.raises(RuntimeError, match="in the middle"):
        runtime.losses(probes_of(params), failing)
    assert [name for name, block in enumerate(blocks) if "forward" in block.__dict__] == [1]
    assert blocks[1].forward is others
    assert not any(block._forward_hooks for block in blocks)


def test_a_loss_that_would_change_is_noticed(caplog):
    """A model that adds up what its layers leave behind, beside their outputs."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

        def forward(self):
            x = total = torch.ones(3)
            for layer in self.layers:
                x = layer(x)
                total = total + x
            return total.sum()

    torch.manual_seed(0)
    model = Sum().requires_grad_(False)
    model.layers[2].requires_grad_(True)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    runtime = TorchRuntime(params, "copy", model)
    with torch.no_grad(), caplog.at_level("INFO", "hf_zo.runtimes.prefix"):
        for step in range(3):
            losses = runtime.losses(probes_of(params, step), model)
            alone = TorchRuntime(params, "copy", model).losses(probes_of(params, step), model)
            assert losses == alone
    assert "not shared" in caplog.text


def test_a_cache_is_filled_by_every_layer():
    model = build("llama")
    blocks_of(model)[3].requires_grad_(True)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ids = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(1))

    def measure() -> torch.Tensor:
        out = model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=True, pad_token_id=0)
        return out.float().mean()

    runtime = TorchRuntime(params, "copy", model)
    for step in range(3):
        losses = runtime.losses(probes_of(params, step), measure)
        assert losses == TorchRuntime(params, "copy", model).losses(probes_of(params, step), measure)


def greedy(model, inputs):
    """Every answer is decoded anew from what the weights at the probe have said so far."""
    ids = inputs["input_ids"][:, :4]
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids.float().mean()


@pytest.mark.parametrize(
    ("settings", "shares"),
    [({}, True), ({"zo_objective": "f1"}, False), ({"trainer_kwargs": {"objective_fn": greedy}}, False)],
)
def test_only_probes_that_measure_labels_share(settings, shares, tmp_path):
    trainer = trainer_of(tmp_path, **settings)
    trainer.create_optimizer()
    assert (trainer._runtime._prefix is not None) is shares


def test_answers_that_differ_late_are_measured(tmp_path, monkeypatch):
    """At the step at which sharing would be checked, all probes say the same; at later ones they do not."""

    def losses() -> list[float]:
        torch.manual_seed(1)
        config = LoraConfig(
            r=4, target_modules=["v_proj", "down_proj"], layers_to_transform=[1], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        arguments = arguments_of(tmp_path, "mezo", max_steps=6, learning_rate=0.0, seed=1)
        data = {"train_dataset": Sentences(), "data_collator": collate}
        trainer = ZOTrainer(get_peft_model(tiny_llama(), config), arguments, objective_fn=greedy, **data)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    found = losses()
    monkeypatch.setattr("hf_zo.runtimes.torch.SharedPrefix", lambda *_: None)
    assert found == losses()
