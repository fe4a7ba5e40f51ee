"""What a step would take on an H100 at the least, on paper: bytes and operations over the data sheet's rates. Not measured.

    python benchmarks/roofline.py        prints the table of docs/vllm.md

For P parameters in bf16 and T = batch x 64 tokens, two forward passes a step:

- operations of a forward: 2 per token and parameter of the layers, and 4 d S/2 per token and layer for causal attention over
  sequences of S; the head only at one position per sequence;
- bytes of a forward: 2P of weights, and 24 d numbers per token and layer that pass between kernels;
- ``lora``: two forwards; the adapter's own bytes are left out;
- ``full``: per probe, weights are read and scratch weights written (4P bytes) before the forward reads these; one update
  reads and writes (4P). Noise is made in registers;
- ``classic``: four sweeps, each of which writes noise, reads it with the weights and writes them (8P).

A phase takes the longer of its operations at 989 TFLOP/s and its bytes at 3.35 TB/s (H100 SXM, dense bf16).
"""

from __future__ import annotations

OPERATIONS, BYTES = 989e12, 3.35e12  # a second
LENGTH, VOCABULARY = 64, 50272
# OPT: layers, width; the feed-forward part is four times as wide.
MODELS = {"1.3B": (24, 2048), "2.7B": (32, 2560), "6.7B": (32, 4096), "13B": (40, 5120)}


def row(name: str, batch: int) -> str:
    """One line of the table."""
    layers, width = MODELS[name]
    body = 12 * layers * width**2
    parameters = body + VOCABULARY * width
    tokens = batch * LENGTH
    operations = tokens * (2 * body + 2 * layers * width * LENGTH) + batch * 2 * VOCABULARY * width
    traffic = 2 * parameters + 2 * 24 * width * layers * tokens
    forward = max(operations / OPERATIONS, traffic / BYTES)
    sweeps = {"lora": 0, "full": 2 * 4 * parameters + 4 * parameters, "classic": 4 * 8 * parameters}
    times = {kind: 2 * forward + extra / BYTES for kind, extra in sweeps.items()}
    bound = "operations" if operations / OPERATIONS > traffic / BYTES else "bytes"
    numbers = [f"{2 * operations / 1e12:.1f}", f"{2 * traffic / 1e9:.1f}", bound]
    numbers += [f"{sweeps['full'] / 1e9:.0f}", *(f"{1000 * times[kind]:.1f}" for kind in ("lora", "full", "classic"))]
    return f"| {name} | {batch} | " + " | ".join(numbers) + " |"


if __name__ == "__main__":
    columns = ["OPT", "batch", "TFLOP of forwards", "GB of forwards", "bound by", "GB of noise and update"]
    columns += ["lora, ms", "full, ms", "classic, ms"]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for model in MODELS:
        for size in (16, 32, 64, 128):
            print(row(model, size))
