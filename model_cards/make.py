"""The reference runs: every method, with LoRA (ZO-Act: its own adapter) and on all weights, each with its card and trajectory.

    python model_cards/make.py --model MODEL [--only NAME ...]

Runs that are finished are left out, so the command can be repeated after an interruption. MODEL is what
`hf-zo demo-model smollm2` writes; the data are the 640 sentences of `examples/demo_data`. A run keeps its card, curve, facts
and trajectory here; weights and adapters stay in ``runs/``, since base model and trajectory rebuild them (not ZO-Act's,
whose adapter holds the basis and is too large to be kept here). All runs are in fp32 and short, so that anybody's processor can
repeat them.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
DATA = HERE.parent / "examples" / "demo_data"
KEPT = ("README.md", "run_facts.json", "training_curve.png", "trajectory.safetensors")
FORWARDS = 240  # the same for every run

# Method, form, forward passes per step, and what differs from the defaults. Rates are MeZO's over the method's scale, some
# three times those that suit a thousand steps.
RUNS: dict[str, tuple[int, list[str]]] = {
    "mezo-lora": (2, ["--peft", "lora", "--learning_rate", "3e-3", "--zo_clip", "2"]),
    "lozo-lora": (2, ["--zo_method", "lozo", "--peft", "lora", "--learning_rate", "3e-3", "--zo_clip", "2"]),
    "kerzoo-lora": (6, ["--zo_method", "kerzoo", "--peft", "lora", "--learning_rate", "3e-4", "--zo_clip", "20"]),
    "curvzo-lora": (2, ["--zo_method", "curvzo", "--peft", "lora", "--learning_rate", "3e-3", "--zo_clip", "2"]),
    "bszo-lora": (3, ["--zo_method", "bszo", "--peft", "lora", "--learning_rate", "1.5e-3"]),
    "zo-act": (2, ["--zo_method", "zo_act", "--learning_rate", "2e-3"]),
    "mezo-full": (2, ["--learning_rate", "1.5e-5", "--zo_clip", "15"]),
    "lozo-full": (2, ["--zo_method", "lozo", "--learning_rate", "1.5e-5", "--zo_clip", "15"]),
    "kerzoo-full": (6, ["--zo_method", "kerzoo", "--learning_rate", "1.5e-6", "--zo_clip", "150"]),
    "curvzo-full": (2, ["--zo_method", "curvzo", "--learning_rate", "1.5e-5", "--zo_clip", "15"]),
    "bszo-full": (3, ["--zo_method", "bszo", "--learning_rate", "7.5e-6"]),
}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--only", nargs="*", choices=sorted(RUNS), default=list(RUNS))
    arguments = parser.parse_args()
    for name in arguments.only:
        forwards, flags = RUNS[name]
        if (HERE / name / "trajectory.safetensors").is_file():
            continue
        output = HERE.parent / "runs" / name
        command = [
            *(sys.executable, str(HERE.parent / "examples" / "run_glue.py"), "--model_name_or_path", arguments.model),
            *("--task_name", "sst2", "--dataset_dir", str(DATA), "--do_train", "--do_eval", "--dtype", "float32"),
            *("--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "32", "--logging_steps", "20"),
            *("--save_strategy", "no", "--report_to", "none", "--max_steps", str(FORWARDS // forwards)),
            *("--output_dir", str(output), *flags),
        ]
        subprocess.run(command, check=True)
        (HERE / name).mkdir(exist_ok=True)
        for file in KEPT:
            shutil.copy(output / file, HERE / name / file)


if __name__ == "__main__":
    main()
