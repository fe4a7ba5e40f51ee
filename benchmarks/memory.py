"""Peak memory of full-parameter training against inference on the same batch, each in a fresh process.

    python benchmarks/memory.py --model MODEL --output benchmarks/results/memory.json

Both processes load the model in bf16 and see the same random batch of 16 sequences of 64 tokens; one runs `model.eval()`
forwards, the other trains with MeZO through ZOTrainer. The peak is the kernel's own high-water mark of resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from hardware import environment


def _batch(rows: int, tokens: int, vocabulary: int) -> list[dict[str, object]]:
    import torch

    ids = torch.randint(10, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def _measure(role: str, model_dir: str, steps: int, scratch: str) -> float:
    import torch
    from transformers import AutoModelForCausalLM, default_data_collator

    # Imported in both roles, so that code counts the same.
    from hf_zo import ZOTrainer, ZOTrainingArguments

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    model.config.use_cache = False
    rows = _batch(16, 64, model.config.vocab_size)
    if role == "inference":
        batch = default_data_collator(rows)
        with torch.no_grad():
            for _ in range(2 * steps):
                model(**batch)
    else:
        arguments = ZOTrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=1e-7,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        ZOTrainer(model, arguments, train_dataset=rows, data_collator=default_data_collator).train()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure both roles three times in turn and write medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/memory.json"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", default="runs/memory")
    parser.add_argument("--role", choices=("inference", "training"), help=argparse.SUPPRESS)
    arguments, where = parser.parse_args(), environment()
    if arguments.role:
        print(json.dumps({"peak": _measure(arguments.role, arguments.model, arguments.steps, arguments.scratch)}))
        return
    peaks: dict[str, list[float]] = {"inference": [], "training": []}
    for _ in range(arguments.repeats):
        for role, measured in peaks.items():
            command = [sys.executable, __file__, "--model", arguments.model, "--steps", str(arguments.steps)]
            done = subprocess.run(
                [*command, "--scratch", arguments.scratch, "--role", role], capture_output=True, text=True, check=True
            )
            measured.append(json.loads(done.stdout.strip().splitlines()[-1])["peak"])
    median = {role: sorted(values)[len(values) // 2] for role, values in peaks.items()}
    result = {
        "command": "python benchmarks/memory.py --model MODEL",
        "model": "SmolLM2-135M-Instruct, 4-bit-rounded weights in bf16 (hf-zo demo-model)",
        "batch": "16 x 64 tokens",
        "peak_megabytes": peaks,
        "median_megabytes": median,
        "ratio": median["training"] / median["inference"],
        "environment": where,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
