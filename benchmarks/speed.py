"""How long a step takes against the forward passes it contains, and against the classic loop.

    python benchmarks/speed.py --model MODEL [--dataset_dir SST2] [--only table sst2 noise …]

Three things are timed in turn, over and over in one process, so that a slow moment of the machine meets all of them:

- ``step``: one step of ZOTrainer, from the batch to the updated weights;
- ``bare``: as many forward passes as the step makes, under weights at rest, in the form that the step gives the batch;
- ``classic``: a plain two-sided step, written for this comparison: noise by ``torch.normal`` from one global seed, four sweeps
  (+, -2, +, update) over the weights in place, the batch as it comes, logits at every position.

Reported are medians, and the median over the repeats of the ratio of neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from hardware import environment
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_zo import ZOTrainer, ZOTrainingArguments, noise
from hf_zo.runtimes.torch import evaluation_mode
from hf_zo.tasks import OptionCollator, encode_rows, get_task, load_rows, option_loss

mpl.use("Agg")
from matplotlib import pyplot as plt

DTYPE = "bfloat16" if environment()["avx512_bf16"] else "float32"  # what the processor multiplies
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
# Case: form, settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mezo full": ("full", {}),
    "mezo full rademacher": ("full", {"zo_direction": "rademacher"}),
    "mezo lora": ("lora", {}),
    "zo_act": ("base", {"zo_method": "zo_act", "zo_act_rank": 8}),
    "kerzoo full": ("full", {"zo_method": "kerzoo", "zo_num_directions": 3}),
    "bszo full": ("full", {"zo_method": "bszo"}),
    "curvzo full": ("full", {"zo_method": "curvzo"}),
    "lozo full": ("full", {"zo_method": "lozo"}),
}


class Ours:
    """A trainer whose steps are taken one at a time."""

    def __init__(self, model: torch.nn.Module, settings: dict[str, Any], rows: list[Any], collate: Any, **hooks: Any) -> None:
        arguments = ZOTrainingArguments(
            output_dir="runs/speed",
            max_steps=10**6,
            learning_rate=1e-9,
            per_device_train_batch_size=len(rows),
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            **settings,
        )
        self.trainer = ZOTrainer(model, arguments, train_dataset=rows, data_collator=collate, **hooks)
        self.trainer.create_optimizer()
        self.batch = collate(rows)
        self.forwards = self.trainer._zo_optimizer.estimator.forwards

    def step(self) -> None:
        """Measure, restore, update."""
        trainer = self.trainer
        trainer.training_step(trainer.model, dict(self.batch))
        trainer._zo_optimizer.step()
        trainer.state.global_step += 1

    def bare(self) -> None:
        """The forward passes of a step alone."""
        trainer = self.trainer
        with torch.no_grad(), evaluation_mode(trainer.model):
            batch = trainer._packing(dict(self.batch), lambda batch: trainer._model_loss(trainer.model, batch, None))
            for _ in range(self.forwards):
                float(trainer._model_loss(trainer.model, dict(batch), None))


class Classic:
    """The classic loop over the trainable parameters of a model."""

    def __init__(self, model: torch.nn.Module, loss: Callable[[], torch.Tensor], eps: float = 1e-3, lr: float = 1e-9) -> None:
        self.model, self.loss, self.eps, self.lr = model, loss, eps, lr
        self.seed = 0

    def _sweep(self, factor: float) -> None:
        torch.manual_seed(self.seed)
        for p in self.model.parameters():
            if p.requires_grad:
                z = torch.normal(mean=0, std=1, size=p.shape, dtype=p.dtype)
                p.data = p.data + factor * z

    @torch.no_grad()
    def step(self) -> None:
        """Two forward passes between four sweeps."""
        self.seed += 1
        self._sweep(self.eps)
        plus = float(self.loss())
        self._sweep(-2 * self.eps)
        minus = float(self.loss())
        self._sweep(self.eps)
        self._sweep(-self.lr * (plus - minus) / (2 * self.eps))


def in_turn(timed: dict[str, Callable[[], None]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every function, called in turn ``repeats`` times."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(-warm_up, repeats):
        for name, function in timed.items():
            begin = time.perf_counter()
            function()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(above: Iterable[float], below: Iterable[float]) -> float:
    """Median ratio of neighbours in time."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and the two ratios."""
    told: dict[str, Any] = {f"{name}_seconds": round(statistics.median(values), 4) for name, values in seconds.items()}
    told["step_over_bare"] = ratio(seconds["step"], seconds["bare"])
    if "classic" in seconds:
        told["classic_over_step"] = ratio(seconds["classic"], seconds["step"])
    return told


def load(arguments: argparse.Namespace, form: str) -> torch.nn.Module:
    """The model, ready for a form."""
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    model.config.use_cache = False
    return get_peft_model(model, LoraConfig(**LORA)) if form == "lora" else model


def fixed(rows: int, tokens: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Random sequences of one length; the last token is the label, as in classification by a verbalizer."""
    ids = torch.randint(10, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    ones = torch.ones(tokens, dtype=torch.long)
    return [{"input_ids": i, "attention_mask": ones, "labels": label} for i, label in zip(ids, labels, strict=True)]


def cell(
    model: torch.nn.Module, settings: dict[str, Any], rows: list[Any], repeats: int, classic: bool = True
) -> dict[str, Any]:
    """One case on batches of one length."""
    ours = Ours(model, settings, rows, default_data_collator)
    timed = {"step": ours.step, "bare": ours.bare}
    if classic and ours.forwards == 2:
        timed["classic"] = Classic(ours.trainer.model, lambda: ours.trainer.model(**ours.batch).loss).step
    return {"forwards": ours.forwards, **summary(in_turn(timed, repeats))}


def table(arguments: argparse.Namespace) -> dict[str, Any]:
    """16 sequences of 64 tokens, every case."""
    told = {}
    for name, (form, settings) in CASES.items():
        model = load(arguments, form)
        told[name] = cell(model, settings, fixed(16, 64, 49152), arguments.repeats, classic=name in ("mezo full", "mezo lora"))
        print(name, told[name], flush=True)
    return told


def sst2(arguments: argparse.Namespace) -> dict[str, Any]:
    """Batches of 16 real examples with two options; the classic loop pads left, one sequence per option."""
    task, told = get_task("sst2"), {}
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.padding_side = "left"
    rows = load_rows(task, "train", arguments.dataset_dir, 16 * 4, 0)
    encoded = encode_rows(task, rows, tokenizer, 512).examples
    for form in ("full", "lora"):
        parts: dict[str, list[float]] = {"step": [], "bare": [], "classic": []}
        model = load(arguments, form)
        for i in range(0, len(encoded), 16):
            rows_of_batch = encoded[i : i + 16]
            collate = OptionCollator(tokenizer, model)
            ours = Ours(model, {}, rows_of_batch, collate, compute_loss_func=option_loss)
            separate = collate([_per_option(example) for example in rows_of_batch])
            labels = separate.pop("labels")
            classic = Classic(model, partial(_option_loss, model, separate, labels))
            timed = {"step": ours.step, "bare": ours.bare, "classic": classic.step}
            for name, values in in_turn(timed, max(1, arguments.repeats // 2)).items():
                parts[name] += values
        told[f"mezo {form}"] = summary(parts)
        print("sst2", form, told[f"mezo {form}"], flush=True)
    return told


def _option_loss(model: torch.nn.Module, inputs: dict[str, Any], labels: Any) -> torch.Tensor:
    return option_loss(model(**inputs), labels)


def _per_option(example: dict[str, Any]) -> dict[str, Any]:
    """An example whose options share a row, with a row for each."""
    prompt = example["rows"][0]
    scored = [(option, position, token, option) for _, position, token, option in example["scored"]]
    return {**example, "rows": [[*prompt, token] for _, _, token, _ in scored], "scored": scored}


def draws(arguments: argparse.Namespace) -> dict[str, Any]:
    """Numbers per second of ``theta + a z`` on tensors of 576 x 1536, as a probe (into scratch) and as an update (in place)."""
    told: dict[str, Any] = {}
    size, tensors = 576 * 1536, 60
    for dtype in (torch.bfloat16, torch.float32):
        thetas = [(torch.randn(size) * 0.05).to(dtype) for _ in range(tensors)]
        scratch = torch.empty_like(thetas[0])

        def probe(kind: noise.Kind, thetas: list[torch.Tensor] = thetas, scratch: torch.Tensor = scratch) -> None:
            for i, theta in enumerate(thetas):
                noise.displace(scratch, theta, [i], [1e-3], kind=kind)

        def update(kind: noise.Kind, thetas: list[torch.Tensor] = thetas) -> None:
            for i, theta in enumerate(thetas):
                noise.displace(theta, theta, [i], [1e-6], kind=kind, rounding_key=7)

        def library(thetas: list[torch.Tensor] = thetas) -> None:
            for theta in thetas:
                theta + 1e-3 * torch.randn(theta.shape, dtype=theta.dtype)

        timed: dict[str, Callable[[], None]] = {"torch.randn": library}
        for kind in ("gaussian", "rademacher"):
            timed[f"{kind} probe"] = lambda kind=kind: probe(kind)
            timed[f"{kind} update"] = lambda kind=kind: update(kind)
        seconds = in_turn(timed, arguments.repeats)
        told[str(dtype).removeprefix("torch.")] = {
            name: {
                "median": round(size * tensors / statistics.median(values) / 1e9, 2),
                "best": round(size * tensors / min(values) / 1e9, 2),
            }
            for name, values in seconds.items()
        }
    print("10^9 numbers a second:", told, flush=True)
    return told


def sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    """All weights of models of 135M and 1.3B parameters, the latter of OPT's shape with random weights."""
    told = {"135M": cell(load(arguments, "full"), {}, fixed(16, 64, 49152), arguments.repeats)}
    config = OPTConfig(hidden_size=2048, num_hidden_layers=24, ffn_dim=8192, num_attention_heads=32, word_embed_proj_dim=2048)
    config.use_cache = False
    with torch.device("meta"):
        big = OPTForCausalLM(config)
    big = big.to(getattr(torch, arguments.dtype)).to_empty(device="cpu").eval()
    big.tie_weights()
    with torch.no_grad():
        for i, p in enumerate(big.parameters()):
            noise.displace(p, p.zero_(), [i], [0.02])
    told["1.3B"] = cell(big, {}, fixed(16, 64, 50272), 2)
    print("sizes", told, flush=True)
    return told


def sweep(arguments: argparse.Namespace) -> dict[str, Any]:
    """Full-parameter MeZO over batch sizes and lengths: where the forward passes grow, the rest does not."""
    model, told = load(arguments, "full"), {}
    for rows, tokens in ((4, 64), (16, 32), (16, 64), (16, 128), (64, 64)):
        told[f"{rows} x {tokens}"] = cell(model, {}, fixed(rows, tokens, 49152), max(2, arguments.repeats // 2))
        print(rows, tokens, told[f"{rows} x {tokens}"], flush=True)
    return told


def batched(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two forward passes against one over both batches: what putting the probes of an adapter into one forward could save."""
    model, told = load(arguments, "full"), {}

    def forward(rows: int, tokens: int) -> Callable[[], None]:
        ids = torch.randint(10, 49152, (rows, tokens), generator=torch.Generator().manual_seed(0))

        @torch.no_grad()
        def run() -> None:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

        return run

    for rows, tokens in ((4, 25), (8, 25), (8, 50), (16, 64)):
        one = forward(rows, tokens)
        timed = {"two_forwards": lambda one=one: (one(), one())[0], "one_of_both": forward(2 * rows, tokens)}
        seconds = in_turn(timed, arguments.repeats)
        told[f"{rows * tokens} tokens"] = {
            **{f"{name}_seconds": round(statistics.median(values), 4) for name, values in seconds.items()},
            "two_over_one": ratio(seconds["two_forwards"], seconds["one_of_both"]),
        }
    print("batched", told, flush=True)
    return told


class _Clock(TrainerCallback):
    """When steps begin, and how much time had been spent inside of steps by then."""

    def __init__(self, inside: list[float]) -> None:
        self.begins: list[tuple[float, float]] = []
        self.inside = inside

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begins.append((time.perf_counter(), self.inside[0]))

    def milliseconds_outside(self) -> float:
        """Median over steps, without the first ten."""
        outside = [(b[0] - a[0]) - (b[1] - a[1]) for a, b in pairwise(self.begins[10:])]
        return round(1000 * statistics.median(outside), 2)


class _Idle(Trainer):
    """The transformers Trainer's loop around nothing."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(())


def overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the Trainer's loop adds to a step, LoRA: time less that of steps and updates; and the same loop around nothing."""
    rows = fixed(4, 32, 49152)
    ours = Ours(load(arguments, "lora"), {}, rows, default_data_collator)
    trainer, clock, idle_clock = ours.trainer, _Clock([0.0]), _Clock([0.0])
    trainer.args.max_steps, trainer.args.logging_steps = 60, 10
    trainer.train_dataset = rows * 60  # one epoch: what begins with an epoch is not a step's

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                clock.inside[0] += time.perf_counter() - begin

        return call

    trainer.training_step = timed(trainer.training_step)  # type: ignore[method-assign]
    trainer._zo_optimizer.step = timed(trainer._zo_optimizer.step)  # type: ignore[method-assign]
    trainer.add_callback(clock)
    trainer.train()
    settings = {"max_steps": 60, "logging_steps": 10, "per_device_train_batch_size": 4, "max_grad_norm": 0.0, "optim": "sgd"}
    unchanged = {name: getattr(trainer.args, name) for name in ("output_dir", "save_strategy", "report_to", "use_cpu")}
    plain = TrainingArguments(**settings, **unchanged, disable_tqdm=True)
    _Idle(
        load(arguments, "lora"), plain, train_dataset=rows * 60, data_collator=default_data_collator, callbacks=[idle_clock]
    ).train()
    told = {
        "milliseconds_outside_the_step": clock.milliseconds_outside(),
        "milliseconds_of_the_plain_loop_around_nothing": idle_clock.milliseconds_outside(),
        "steps": 49,
    }
    print("overhead", told, flush=True)
    return told


def ranks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two processes of one thread each on halves of a batch against one process of two threads on all of it."""
    seconds: dict[str, list[float]] = {"one": [], "two": []}
    for _ in range(max(2, arguments.repeats // 2)):
        for name, processes in (("one", 1), ("two", 2)):
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", __file__]
            environ = {**os.environ, "OMP_NUM_THREADS": str(2 // processes)}
            done = subprocess.run(
                [*command, "--model", arguments.model, "--dtype", arguments.dtype, "--rank"],
                capture_output=True,
                text=True,
                env=environ,
                check=True,
            )
            seconds[name].append(float(done.stdout.strip().splitlines()[-1]))
    told = {f"{name}_seconds": round(statistics.median(values), 4) for name, values in seconds.items()}
    told["two_over_one"] = ratio(seconds["two"], seconds["one"])
    print("ranks", told, flush=True)
    return told


def _rank(arguments: argparse.Namespace) -> None:
    """One of the processes of `ranks`; the first prints the median time of a step."""
    processes = int(os.environ["WORLD_SIZE"])
    model, rows = load(arguments, "full"), fixed(16, 64, 49152)
    settings = ZOTrainingArguments(
        output_dir="runs/speed",
        max_steps=12,
        learning_rate=1e-9,
        per_device_train_batch_size=len(rows) // processes,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    begins: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            begins.append(time.perf_counter())

    ZOTrainer(model, settings, train_dataset=rows, data_collator=default_data_collator, callbacks=[Clock()]).train()
    if os.environ["RANK"] == "0":
        print(statistics.median(b - a for a, b in pairwise(begins[2:])))


PARTS = {
    "table": table,
    "sst2": sst2,
    "noise": draws,
    "sizes": sizes,
    "sweep": sweep,
    "batched": batched,
    "overhead": overhead,
    "ranks": ranks,
}


def figure(told: dict[str, Any], output: Path) -> None:
    """Bars: the forward passes of a step, what is on top of them, and the classic loop where it was timed."""
    panels = [(part, title) for part, title in (("table", "16 x 64 tokens"), ("sst2", "SST-2, 16 examples")) if part in told]
    if not panels:
        return
    _, axes = plt.subplots(1, len(panels), figsize=(4 + 3 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, (part, title) in zip(axes[0], panels, strict=True):
        cases = told[part]["cases"]
        for place, values in enumerate(cases.values()):
            bare, step = values["bare_seconds"], values["step_seconds"]
            axis.bar(place, bare, 0.5, color="tab:blue", label="its forward passes" if place == 0 else None)
            axis.bar(place, max(0.0, step - bare), 0.5, bare, color="tab:orange", label="the rest" if place == 0 else None)
            if "classic_seconds" in values:
                label = "classic loop" if place == 0 else None
                axis.plot([place - 0.35, place + 0.35], [values["classic_seconds"]] * 2, color="black", label=label)
        axis.set(title=title, ylabel="seconds a step")
        axis.set_xticks(range(len(cases)), list(cases), rotation=40, ha="right")
        axis.legend(fontsize="small")
    plt.savefig(output, dpi=150)


def main() -> None:
    """Time what is asked for and add it to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset_dir")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default=DTYPE, help="of the model's weights; default %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speed.json"))
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        _rank(arguments)
        return
    torch.manual_seed(0)
    told = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    for name in arguments.only:
        command = f"python benchmarks/speed.py --model smollm2 --dataset_dir sst2 --only {name} --repeats {arguments.repeats}"
        command += f" --dtype {arguments.dtype}"
        told[name] = {"command": command, **environment(), "threads": torch.get_num_threads(), "cases": PARTS[name](arguments)}
        arguments.output.write_text(json.dumps(told, indent=1) + "\n")
    figure(told, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
