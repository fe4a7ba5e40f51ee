"""Rebuild a reference run from its base model and its trajectory, and check the accuracy that its card reports.

    python model_cards/replay.py --model MODEL [--card mezo-full]

The replay itself checks that the weights are the run's, bit for bit. Exits with 1 if the accuracy differs by more than two
sentences, which another processor's order of summation may tip over.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from hf_zo.cli import main as hf_zo

HERE = Path(__file__).parent


def main() -> int:
    """Replay, evaluate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    full = sorted(folder.name for folder in HERE.glob("*-full"))
    parser.add_argument("--card", default="mezo-full", choices=full, help="adapters: hf-zo replay alone")
    arguments = parser.parse_args()
    reported = json.loads((HERE / arguments.card / "run_facts.json").read_text())["results"]["accuracy"]
    with tempfile.TemporaryDirectory() as scratch:
        if code := hf_zo(["replay", arguments.model, str(HERE / arguments.card), "-o", f"{scratch}/model"]):
            return code
        command = [
            *(sys.executable, str(HERE.parent / "examples" / "run_glue.py"), "--model_name_or_path", f"{scratch}/model"),
            *("--task_name", "sst2", "--dataset_dir", str(HERE.parent / "examples" / "demo_data"), "--do_eval"),
            *("--dtype", "float32", "--per_device_eval_batch_size", "32"),
            *("--output_dir", f"{scratch}/out", "--report_to", "none"),
        ]
        subprocess.run(command, check=True)
        evaluated = json.loads(Path(f"{scratch}/out/eval_results.json").read_text())
        found, sentences = evaluated["eval_accuracy"], evaluated["eval_samples"]
    print(f"{arguments.card}: the card says {reported:.4f}, the rebuilt model {found:.4f}")
    return 0 if abs(found - reported) * sentences <= 2.5 else 1


if __name__ == "__main__":
    sys.exit(main())
