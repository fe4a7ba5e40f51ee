"""Run an example script and keep its result: command, metrics, learning curve, versions and hardware in one JSON file.

    python benchmarks/record.py NAME -- examples/run_glue.py --model_name_or_path MODEL --output_dir runs/NAME ...

Writes benchmarks/results/NAME.json. With --only-collect the run is taken from its output folder instead of being started.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from hardware import environment

HERE = Path(__file__).parent
_TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")


def main() -> None:
    """Run, collect, write."""
    if "--" not in sys.argv:
        sys.exit(__doc__)
    split, where = sys.argv.index("--"), environment()
    options, command = sys.argv[1:split], sys.argv[split + 1 :]
    name = options[0]
    output_dir = Path(command[command.index("--output_dir") + 1])
    if "--only-collect" not in options:
        subprocess.run([sys.executable, *command], check=True)
    state = json.loads((output_dir / "trainer_state.json").read_text())
    training = next(entry for entry in reversed(state["log_history"]) if "train_runtime" in entry)
    last = next(entry for entry in reversed(state["log_history"]) if "zo/forward_passes" in entry)
    # Folders of this machine mean nothing elsewhere.
    shown = [re.sub(r"^/.*/", "", word) if word.startswith("/") else word for word in command]
    result = {
        "command": "python " + " ".join(shown),
        "final": json.loads((output_dir / "eval_results.json").read_text()),
        "evaluations": [
            {key: value for key, value in entry.items() if key == "step" or (key.startswith("eval_") and key not in _TIMES)}
            for entry in state["log_history"]
            if "eval_loss" in entry
        ],
        "losses": [[entry["step"], round(entry["loss"], 4)] for entry in state["log_history"] if "loss" in entry],
        "forward_passes": last["zo/forward_passes"],
        "train_seconds": training["train_runtime"],
        "environment": where,
    }
    file = HERE / "results" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(file)


if __name__ == "__main__":
    main()
