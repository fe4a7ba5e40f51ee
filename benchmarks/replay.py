"""What a trajectory costs: bytes per step and per checkpoint, and the time of replaying a run against that of training it.

    python benchmarks/replay.py --model MODEL --steps 1000 [--dtype float32] [--output FILE]

Trains all weights of the model with MeZO on random batches of 16 sequences of 64 tokens whose last one is labelled, the
cheapest batches there are, with one checkpoint of each kind at the end, then replays the run into a fresh model, which checks
the hash of the final weights.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
import time
from pathlib import Path

import torch
from hardware import environment
from transformers import AutoModelForCausalLM, default_data_collator

from hf_zo import Trajectory, ZOTrainer, ZOTrainingArguments, replay


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    """Train, replay, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "replay.json")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments, where = parser.parse_args(), environment()

    def model() -> torch.nn.Module:
        loaded = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
        loaded.config.use_cache = False
        return loaded

    ids = torch.randint(10, model().config.vocab_size, (64, 64), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    ones = torch.ones_like(ids[0])
    rows = [{"input_ids": i, "attention_mask": ones, "labels": label} for i, label in zip(ids, labels, strict=True)]
    sizes = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind, weights, steps in (("without_weights", False, arguments.steps), ("with_weights", True, 1)):
            settings = ZOTrainingArguments(
                output_dir=f"{scratch}/{kind}",
                max_steps=steps,
                per_device_train_batch_size=16,
                learning_rate=1e-7,
                save_steps=steps,
                zo_save_weights=weights,
                logging_steps=steps,
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            )
            trainer = ZOTrainer(model(), settings, train_dataset=rows, data_collator=default_data_collator)
            result = trainer.train()
            sizes[kind] = _size(Path(scratch) / kind / f"checkpoint-{steps}")
            if not weights:
                training = result.metrics["train_runtime"]
                sealed = Path(scratch) / kind / f"checkpoint-{steps}" / "trajectory.safetensors"
                raw = sealed.read_bytes()
        trajectory = Trajectory.read(sealed)
        fresh = model()
        begin = time.perf_counter()
        replay(fresh, trajectory)
        replaying = time.perf_counter() - begin
    header = len(json.dumps(trajectory.header, separators=(",", ":")))
    (block,) = struct.unpack("<Q", raw[:8])
    numbers = {
        "command": f"python benchmarks/replay.py --model smollm2 --steps {arguments.steps} --dtype {arguments.dtype}",
        "steps": arguments.steps,
        "training_seconds": training,
        "replay_seconds": replaying,
        "replay_over_training": replaying / training,
        "file_bytes": len(raw),
        "header_bytes": header,
        "bytes_per_step": (len(raw) - 8 - block) / arguments.steps,
        "checkpoint_bytes": sizes,
        "environment": where,
    }
    arguments.output.write_text(json.dumps(numbers, indent=1) + "\n")
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
