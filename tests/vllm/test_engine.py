"""A real engine on tiny random models: its losses, and what it must not change of a run.

Engines start once per shape and dtype: the next model of the same shape takes a running one over.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support import (
    CASES,
    SERVED,
    Recorder,
    Sentences,
    arguments_of,
    assert_same_weights,
    collate,
    digest,
    weights_of,
)
from tasks.tiny import ROWS, make_bpe
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_zo import Trajectory, ZOTrainer, replay
from hf_zo.adapters import basis_of
from hf_zo.anatomy import adapted_layers
from hf_zo.runtimes.torch import evaluation_mode
from hf_zo.runtimes.vllm import Engine, EngineError
from hf_zo.tasks import OptionCollator, encode_rows, get_task, option_loss

# Heads of 32 are the smallest that the engine's attention lists.
_SHAPE = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "use_cache": False}
_LLAMA = {**_SHAPE, "intermediate_size": 96, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0}


def tiny(kind: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(0)
    build, config = {
        "llama": lambda: (LlamaForCausalLM, LlamaConfig(**{**_LLAMA, "tie_word_embeddings": True, **more})),
        "qwen3": lambda: (Qwen3ForCausalLM, Qwen3Config(**{**_LLAMA, "head_dim": 32, **more})),
        "opt": lambda: (
            OPTForCausalLM,
            OPTConfig(**_SHAPE, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64, pad_token_id=1),
        ),
        "gpt2": lambda: (GPT2LMHeadModel, GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=2, n_positions=64)),
    }[kind]()
    return build(config).to(dtype)


def model_of(form: str, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny(dtype=dtype)
    if form == "full":
        return model
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=targets, lora_dropout=0.5, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype)


def trainer_of(output_dir: Path | str, case: str, form: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    hooks = more.pop("trainer_kwargs", {})
    return ZOTrainer(
        model_of(form, dtype),
        arguments_of(output_dir, case, **{"zo_runtime": "vllm", **more}),
        train_dataset=Sentences(),
        data_collator=collate,
        **hooks,
    )


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


# ---- losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=["fp32 to 1e-5", "bf16 to 5e-3"]
)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "opt", "gpt2"])
def test_losses_are_the_models_own(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """On a batch of mixed lengths, padded on the right; also after the weights have changed."""
    model = tiny(kind, dtype).eval()
    engine = Engine(model)
    batch = collate([Sentences()[i] for i in range(8)])
    assert len({int(n) for n in batch["attention_mask"].sum(1)}) > 3
    seen = []
    with torch.no_grad():
        for _ in range(2):
            own = float(model(**batch).loss)
            with engine.serving():
                served = float(model(**batch).loss)
            assert served == pytest.approx(own, rel=tolerance)
            seen.append(own)
            for p in model.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(dtype))
    assert abs(seen[0] - seen[1]) > 10 * tolerance * seen[0]  # weights that the engine kept would not pass


def test_the_engine_holds_no_weights() -> None:
    engine = Engine(tiny())
    inner = engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    heads = {name for name, _ in inner.named_parameters() if "lm_head" in name}
    assert all(p.numel() == 0 for name, p in inner.named_parameters() if name not in heads)
    assert engine.grafted


def test_left_padding() -> None:
    model = tiny().eval()
    engine = Engine(model)
    ids = torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [0] * 1 + [1] * 8])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    labels = ids.masked_fill((mask == 0) | (places == 0), -100)  # nothing precedes the first token
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": places, "labels": labels}
    with torch.no_grad():
        own = float(model(**batch).loss)
        with engine.serving():
            assert float(model(**batch).loss) == pytest.approx(own, rel=1e-5)


def test_two_models_of_one_shape_take_turns() -> None:
    """One running engine, whichever model is asked."""
    first, second = tiny().eval(), tiny().eval()
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(1.5)
    engines = [Engine(first), Engine(second)]
    assert engines[0]._llm is engines[1]._llm
    batch = collate([Sentences()[i] for i in range(4)])
    with torch.no_grad():
        own = [float(model(**batch).loss) for model in (first, second)]
        assert abs(own[0] - own[1]) > 1e-2
        for _ in range(2):
            for model, engine, loss in zip((first, second), engines, own, strict=True):
                with engine.serving():
                    assert float(model(**batch).loss) == pytest.approx(loss, rel=1e-5)


# ---- runs: one per method and form, looked at from several sides -----------------------------------------------------


@dataclasses.dataclass
class Run:
    losses: list[float]
    torch_losses: list[float]
    weights: dict[str, torch.Tensor]
    digests: dict[str, list[str]]
    random_states: list[Any]
    folder: Path
    bases: list[torch.Tensor]


@functools.cache
def run_of(case: str, form: str) -> Run:
    """Four free-running steps in fp32 on both runtimes; cached, because several tests look at each."""
    folder = Path(tempfile.mkdtemp(prefix="hf_zo-test-"))
    plain = trainer_of(folder / "torch", case, form, zo_runtime="torch")
    plain.train()
    trainer = trainer_of(folder / "vllm", case, form)
    digests: dict[str, list[str]] = {"on_step_begin": [], "on_pre_optimizer_step": [], "on_step_end": []}
    seen: list[Any] = []

    def see(hook: str, step: int, kwargs: Any) -> None:
        if hook in digests:
            digests[hook].append(digest(trainer.model))
        if hook in ("on_step_begin", "on_step_end"):
            seen.append(states())

    trainer.add_callback(Recorder(see))
    trainer.train()
    trainer.save_model()
    bases = [basis_of(layer).detach().clone() for _, layer in adapted_layers(trainer.model)] if case == "zo_act" else []
    return Run(losses_of(trainer), losses_of(plain), weights_of(trainer.model), digests, seen, folder / "vllm", bases)


every_combination = pytest.mark.parametrize(("case", "form"), SERVED)


@every_combination
def test_free_running_losses_follow_the_torch_runtime(case: str, form: str) -> None:
    """Over four steps, within 1e-4 relative: rounding of 1e-7 in a loss, over 2 eps = 0.02, is 1e-5 of a response of one."""
    run = run_of(case, form)
    assert len(run.losses) == 4
    assert run.losses == pytest.approx(run.torch_losses, rel=1e-4)


@every_combination
def test_restore_is_bitwise(case: str, form: str) -> None:
    seen = run_of(case, form).digests
    assert len(seen["on_step_begin"]) == 4
    assert seen["on_step_begin"] == seen["on_pre_optimizer_step"]
    assert all(a != b for a, b in zip(seen["on_step_begin"], seen["on_step_end"], strict=True))


@every_combination
def test_random_states_are_isolated(case: str, form: str) -> None:
    seen = run_of(case, form).random_states
    assert len(seen) == 8
    # The loader draws the order of the rows between steps.
    assert all(begin == end for begin, end in zip(seen[::2], seen[1::2], strict=True))


@every_combination
def test_trajectories_replay_without_the_engine(case: str, form: str, tmp_path: Path) -> None:
    """Bitwise, on a plain model: the file does not know which runtime measured its losses."""
    run = run_of(case, form)
    trajectory = Trajectory.read(run.folder)
    theirs = Trajectory.read(run.folder.parent / "torch" / "trajectory.log")
    assert len(trajectory.steps) == 4
    assert {**trajectory.header, "steps": 0, "final_hash": ""} == {**theirs.header, "steps": 0, "final_hash": ""}
    again = trainer_of(tmp_path, case, form, zo_runtime="torch").model
    for (_, layer), basis in zip(adapted_layers(again) if run.bases else [], run.bases, strict=True):
        basis_of(layer).data.copy_(basis)
    replay(again, trajectory)
    assert_same_weights(run.weights, weights_of(again))


@pytest.mark.parametrize(("case", "form"), [("mezo", "full"), ("lozo-momentum", "lora"), ("zo_act", "full")])
def test_resume_is_bitwise(case: str, form: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(tmp_path, case, form, torch.bfloat16, **options)
    whole.train()
    resumed = trainer_of(tmp_path, case, form, torch.bfloat16, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(weights_of(whole.model), weights_of(resumed.model))


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    ends = []
    for size, steps in ((8, 1), (2, 4)):
        trainer = trainer_of(
            tmp_path, "mezo", "lora", per_device_train_batch_size=size, gradient_accumulation_steps=steps, zo_eps=0.5
        )
        trainer.train()
        ends.append(losses_of(trainer))
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


@pytest.mark.parametrize(("dtype", "eps", "warned"), [(torch.bfloat16, 1e-12, True), (torch.float32, 1e-2, False)])
def test_a_radius_below_the_rounding_of_the_loss(
    dtype: torch.dtype, eps: float, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """1e-12 moves no 16-bit weight by a bit, on whatever machine; where it moves some, it is a matter of luck."""
    trainer = trainer_of(tmp_path, "mezo", "full", dtype, zo_eps=eps, max_steps=3)
    trainer.train()
    told = [record.message for record in caplog.records if "is small for this engine" in record.message]
    assert len(told) == warned  # at the first step alone


@pytest.mark.parametrize("form", ["full", "lora"])
def test_evaluation_goes_through_the_engine(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}
    for runtime in ("torch", "vllm"):
        trainer = trainer_of(tmp_path, "mezo", form, zo_runtime=runtime, trainer_kwargs={"eval_dataset": Sentences(10, seed=1)})
        serving = Mock(side_effect=trainer._engine.serving if trainer._engine else None)
        if trainer._engine:
            monkeypatch.setattr(trainer._engine, "serving", serving)
        told[runtime] = trainer.evaluate()["eval_loss"]
        assert serving.called == (runtime == "vllm")
    assert told["vllm"] == pytest.approx(told["torch"], rel=1e-5)


@pytest.mark.parametrize("objective", ["loss", "accuracy"])
@pytest.mark.parametrize("task_name", ["sst2", "copa"])
def test_options_are_scored_alike(task_name: str, objective: str, tmp_path: Path) -> None:
    """sst2: options of one token; copa: whole sentences. The collator pads left for one, right for the other."""
    task, tokenizer = get_task(task_name), make_bpe()
    tokenizer.padding_side = "left" if task_name == "sst2" else "right"
    row = ROWS[task_name][0]
    changed = {"sst2": {"sentence": "the story was terrible ", "label": 0}, "copa": {"premise": "It was dry.", "label": 0}}
    rows = [row, {**row, **changed[task_name]}] * 4
    examples = encode_rows(task, rows, tokenizer, 512).examples
    ends = {}
    for runtime in ("torch", "vllm"):
        model = tiny(vocab_size=len(tokenizer), max_position_embeddings=512)
        arguments = arguments_of(tmp_path, "mezo", zo_runtime=runtime, zo_objective=objective, remove_unused_columns=False)
        collator = OptionCollator(tokenizer, model)
        trainer = ZOTrainer(model, arguments, train_dataset=examples, data_collator=collator, compute_loss_func=option_loss)
        trainer.train()
        ends[runtime] = losses_of(trainer)
    assert ends["vllm"] == pytest.approx(ends["torch"], rel=1e-4)
    assert all(0 < loss < 10 for loss in ends["vllm"]) or objective == "accuracy"


# ---- what cannot work ------------------------------------------------------------------------------------------------


def test_vllm_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("hf_zo.runtimes.vllm._running", {})
    with pytest.raises(EngineError, match=r"zo_runtime='vllm'.*pip install 'hf-zo\[vllm\]'"):
        Engine(tiny())


def test_vllm_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.6.3")
    monkeypatch.setattr("hf_zo.runtimes.vllm._running", {})
    with pytest.raises(EngineError, match=r"vLLM 0\.6\.3 is too old; zo_runtime='vllm' needs 0\.\d+"):
        Engine(tiny())


def test_no_causal_language_model(tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(EngineError, match="T5ForConditionalGeneration is none; use zo_runtime='torch'"):
        ZOTrainer(T5ForConditionalGeneration(config), arguments_of(tmp_path, "mezo", zo_runtime="vllm"))


def test_an_architecture_that_vllm_does_not_serve() -> None:
    class LlamaOfOurOwn(LlamaForCausalLM):
        pass

    model = LlamaOfOurOwn(tiny().config)
    model.__class__.__name__ = "XGLMForCausalLM"  # one of transformers that vLLM has no implementation of
    with pytest.raises(EngineError, match=r"vLLM cannot serve XGLMForCausalLM.*zo_runtime='torch'"):
        Engine(model)


def test_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    with pytest.raises(ValueError, match="zo_runtime='vllm' runs in one process, and 2 were launched"):
        trainer_of(tmp_path, "mezo", "full")


def test_layers_that_cannot_be_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    del model.model.layers[1].mlp.down_proj
    with pytest.raises(EngineError, match=r"model\.layers\.1\.mlp\.down_proj.*zo_runtime='torch'"):
        Engine(model)


def test_a_layer_that_computes_something_else(tmp_path: Path) -> None:
    """The first batch is measured both ways: a model that only looks like a Llama is refused."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)[0] * 5, None

    trainer = trainer_of(tmp_path, "mezo", "full")
    trainer.model.model.layers[0].self_attn = Doubled(trainer.model.model.layers[0].self_attn)
    with pytest.raises(EngineError, match=r"computed differently. Use zo_runtime='torch'"):
        trainer.train()


def test_virtual_tokens() -> None:
    prompted = get_peft_model(tiny(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(EngineError, match=r"virtual tokens.*use LoRA"):
        Engine(prompted)


def test_a_sequence_beyond_the_context() -> None:
    model = tiny().eval()
    ids = torch.ones(1, 65, dtype=torch.long)
    with Engine(model).serving(), torch.no_grad(), pytest.raises(EngineError, match=r"65 tokens exceeds the 64.*max_length"):
        model(input_ids=ids)


def test_a_base_of_several_dtypes() -> None:
    model = tiny(dtype=torch.bfloat16)
    model.model.layers[0].input_layernorm.float()
    with pytest.raises(EngineError, match=r"layers\.0\.input_layernorm is torch\.float32.*one dtype"):
        Engine(model)


def test_an_adapter_in_fp32_on_a_bf16_base(tmp_path: Path) -> None:
    """PEFT's default: it converts on the way in and out, so this is no base of several dtypes."""
    model = get_peft_model(tiny(dtype=torch.bfloat16), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    trainer = ZOTrainer(
        model, arguments_of(tmp_path, "mezo", zo_runtime="vllm"), train_dataset=Sentences(), data_collator=collate
    )
    trainer.train()
    batch = collate([Sentences()[i] for i in range(4)])
    with torch.no_grad(), evaluation_mode(model):
        own = float(model(**batch).loss)
        with trainer._engine.serving():
            assert float(model(**batch).loss) == pytest.approx(own, rel=1e-2)


@pytest.mark.parametrize(("setting", "named"), [({"bf16": True}, "bf16=True"), ({"torch_compile": True}, "torch_compile")])
def test_settings_that_the_engine_does_not_follow(setting: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{named}.*zo_runtime"):
        trainer_of(tmp_path, "mezo", "full", **setting)


def test_every_case_is_served() -> None:
    assert {case for case, _ in SERVED} == set(CASES) - {"mezo-per-example", "zo_act-per-example"}
