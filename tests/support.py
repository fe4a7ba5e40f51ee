"""Tiny models, data and trainers that the tests share; also imported by the worker processes of the matrix."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_zo import ZOTrainer, ZOTrainingArguments

VOCABULARY = 64

_ZO_ACT: dict[str, Any] = {"learning_rate": 1e-3, "zo_act_samples": 8, "zo_act_rank": 4}

# One row per registered method: the settings it runs the matrix with. test_promises asserts that none is missing.
CASES: dict[str, dict[str, Any]] = {
    "mezo": {},
    "mezo-n3-rademacher": {"zo_method": "mezo", "zo_num_directions": 3, "zo_direction": "rademacher"},
    "mezo-factorised": {"zo_method": "mezo", "zo_num_directions": 2, "zo_direction": "factorised", "zo_direction_rank": 3},
    "mezo-per-example": {"zo_method": "mezo", "zo_num_directions": 2, "zo_per_example": True},
    "mezo-adamw": {"zo_method": "mezo", "optim": "adamw_torch", "learning_rate": 1e-3},
    "lozo": {"lozo_interval": 3},
    "lozo-momentum": {"zo_method": "lozo", "lozo_momentum": 0.7, "lozo_interval": 2},
    "kerzoo": {"learning_rate": 2.5e-3},
    "curvzo": {"curvzo_ema": 0.5},
    "curvzo-coordinate": {
        "zo_method": "curvzo",
        "curvzo_granularity": "coordinate",
        "curvzo_budget": 2000,
        "curvzo_reweight": "none",
        "curvzo_debias": True,
        "curvzo_ema": 0.5,
    },
    "bszo": {"bszo_prior": 1.0},
    "bszo-remeasured": {
        "zo_method": "bszo",
        "bszo_two_sided": True,
        "bszo_cache": False,
        "bszo_prior": 1.0,
    },
    "zo_act": _ZO_ACT,
    # Not by Adam: its first step is a sign, and a sum over examples has entries so near zero that rounding turns them.
    "zo_act-per-example": {**_ZO_ACT, "zo_method": "zo_act", "zo_per_example": True, "optim": "sgd", "learning_rate": 1e-2},
    "kerzoo-richardson": {"zo_method": "kerzoo", "kerzoo_order": "richardson", "zo_num_directions": 1},
}
# Methods that average over steps: their update lies in the span of all probes so far, as long as the subspace is held.
AVERAGING: dict[str, dict[str, Any]] = {"lozo-momentum": {"lozo_interval": 50}}
# How much more of a loss's rounding error reaches the estimate than with MeZO: square roots of the loss-noise factors 18.75
# (kernel K3) and 7.22 (Richardson).
LOSS_NOISE: dict[str, float] = {"kerzoo": 4.33, "kerzoo-richardson": 2.69}
FORMS = ("full", "lora")
# ZO-Act brings an adapter of its own: it is given the base model and trains the adapter. Examples are displaced singly by the
# factors of adapters alone.
_ONE_FORM = {"zo_act": "full", "zo_act-per-example": "full", "mezo-per-example": "lora"}
COMBINATIONS = [(case, form) for case in CASES for form in FORMS if _ONE_FORM.get(case, form) == form]
# What a vLLM engine, or a server, can measure: it does not know which token belongs to which example.
SERVED = [(case, form) for case, form in COMBINATIONS if "per-example" not in case]


def settings_of(case: str) -> dict[str, Any]:
    return {"zo_method": case, "learning_rate": 1e-2, **CASES[case]}


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attention_dropout=0.5,  # probes run in eval mode, so this must not show
        use_cache=False,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype)


def load_base(run: Path, **kwargs: Any) -> LlamaForCausalLM:
    """The base model of a run that the fixture ``run`` has made."""
    return LlamaForCausalLM.from_pretrained(run / "base", **kwargs)


def model_of(form: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_llama(dtype)
    if form == "full":
        return model
    torch.manual_seed(1)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj"],
            lora_dropout=0.5,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
        autocast_adapter_dtype=False,
    )
    return adapted.to(dtype)


class Sentences(Dataset):
    """Token sequences of different lengths, of which a different number of tokens is labelled."""

    def __init__(self, rows: int = 24, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for _ in range(rows):
            length = int(torch.randint(5, 13, (), generator=generator))
            prompt = int(torch.randint(1, 4, (), generator=generator))
            ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
            self.rows.append({"input_ids": ids, "labels": torch.cat([torch.full((prompt,), -100), ids[prompt:]])})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.rows[i]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    # A fixed width, so that a sequence meets the same kernels in batches of different sizes.
    width = 12
    batch = {"input_ids": torch.zeros(len(rows), width, dtype=torch.long)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        batch["input_ids"][i, :n] = row["input_ids"]
        batch["attention_mask"][i, :n] = 1
        batch["labels"][i, :n] = row["labels"]
    return batch


def arguments_of(output_dir: Path | str, case: str, **more: Any) -> ZOTrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "zo_eps": 1e-2,
        "weight_decay": 0.1,
    }
    return ZOTrainingArguments(**{**defaults, **settings_of(case), **more})


def trainer_of(
    output_dir: Path | str,
    case: str = "mezo",
    form: str = "full",
    dtype: torch.dtype = torch.float32,
    *,
    trainer_class: type = ZOTrainer,
    trainer_kwargs: dict[str, Any] | None = None,
    **more: Any,
) -> Any:
    return trainer_class(
        model_of(form, dtype),
        arguments_of(output_dir, case, **more),
        train_dataset=Sentences(),
        data_collator=collate,
        **(trainer_kwargs or {}),
    )


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def digest(model: nn.Module) -> str:
    """Hash of every bit of every parameter, frozen ones included."""
    sha = hashlib.sha256()
    for name, p in model.named_parameters():
        sha.update(name.encode())
        sha.update(p.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"differ: {different[:5]}"


def relative_distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """Distance of two end points, relative to how far the first moved."""

    def norm(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
        return float(sum(((x.double() - y.double()) ** 2).sum() for x, y in pairs)) ** 0.5

    return norm((a[n], b[n]) for n in a) / norm((a[n], start[n]) for n in a)


class Recorder(TrainerCallback):
    """Calls a function at every hook of the loop, with the hook's name and the step."""

    def __init__(self, see: Any) -> None:
        for hook in (
            "on_step_begin",
            "on_substep_end",
            "on_pre_optimizer_step",
            "on_optimizer_step",
            "on_step_end",
            "on_log",
            "on_save",
            "on_evaluate",
        ):
            setattr(self, hook, self._hook(hook, see))

    @staticmethod
    def _hook(name: str, see: Any) -> Any:
        def call(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            see(name, state.global_step, kwargs)

        return call


class ServerProcess:
    """``hf-zo vllm-serve``, started and ready."""

    def __init__(self, model: Path, port: int = 0, *options: str) -> None:
        command = [sys.executable, "-m", "hf_zo.cli", "vllm-serve", str(model), "--port", str(port), *options]
        # As many threads as the tests: sums in another order would be other bits.
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
        assert self.process.stdout is not None
        told = next((line for line in self.process.stdout if line.startswith("http")), None)
        assert told is not None, "the server ended before it served"
        self.url = told.split()[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
