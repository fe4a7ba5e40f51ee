"""The file of a run: a header, and for every step the losses it saw and its learning rate.

Two forms of one content:

- ``trajectory.log`` grows by one checksummed record per step while the run goes on; a kill tears at most the last record.
- ``trajectory.safetensors`` is the sealed form, written whenever the Trainer saves and at the end: ordinary safetensors with
  the header as metadata, and the hash of the weights that it leads to.

A record holds the learning rate and the losses in fp64: 8 + 8 (1 + losses) bytes, 32 for MeZO and 64 for KerZOO.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file

from .._version import __version__

FORMAT = 1
LOG_NAME = "trajectory.log"
SEALED_NAME = "trajectory.safetensors"
MOST_LOSSES, MOST_RATES = 2**15 - 1, 2**8 - 1  # of a step
_MAGIC = b"hf_zo\0tr"
_PREAMBLE = struct.Struct("<8sQI")  # magic, bytes of the header block, its checksum
_RECORD = struct.Struct("<IHBB")  # checksum of the rest, losses, learning rates, skipped


class TrajectoryError(ValueError):
    """A trajectory that cannot be read, or does not fit the model. Says what is wrong and what would be right."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step was made from: the losses in the order the oracle gave them, and the learning rate.

    ``learning_rates`` has one entry, or one per parameter group where groups differ.
    """

    losses: tuple[float, ...]
    learning_rates: tuple[float, ...]
    skipped: bool = False


@dataclass
class Trajectory:
    """A run: where it started, and its steps.

    Attributes:
        header: what `header_of` wrote, and ``steps`` and ``final_hash`` once sealed.
        steps: one entry per optimizer step, from step 0.
        initial: trainable tensors that are stored rather than described.
    """

    header: dict[str, Any]
    steps: list[Step]
    initial: dict[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def read(path: str | Path, *, cut_torn_end: bool = False) -> Trajectory:
        """Read a log or a sealed file.

        Args:
            path: the file, or a folder that holds one (the sealed form first).
            cut_torn_end: take a log up to its last complete step instead of raising.

        Raises:
            TrajectoryError: if the file is foreign, of a newer format, or torn; then with the last good step.
            FileNotFoundError: if there is none.
        """
        path = Path(path)
        if path.is_dir():
            path = next((path / name for name in (SEALED_NAME, LOG_NAME) if (path / name).is_file()), path / SEALED_NAME)
        with path.open("rb") as file:
            found = file.read(len(_MAGIC))
        return _read_log(path, cut_torn_end) if found == _MAGIC else _read_sealed(path)

    def write(self, path: str | Path) -> None:
        """Write the sealed form, in one move: readers see the old file or the new one."""
        path = Path(path)
        groups = max((len(step.learning_rates) for step in self.steps), default=1)
        tensors = {
            "losses": torch.tensor([x for step in self.steps for x in step.losses], dtype=torch.float64),
            "counts": torch.tensor([len(step.losses) for step in self.steps], dtype=torch.int16),
            "learning_rates": torch.tensor([widened(step.learning_rates, groups) for step in self.steps], dtype=torch.float64),
            "skipped": torch.tensor([step.skipped for step in self.steps], dtype=torch.uint8),
            **{f"initial/{name}": tensor.contiguous() for name, tensor in self.initial.items()},
        }
        header = {**self.header, "steps": len(self.steps)}
        temporary = path.with_name(path.name + ".part")
        save_file(tensors, temporary, metadata={"format": "pt", "hf_zo": json.dumps(header, separators=(",", ":"))})
        temporary.replace(path)


def narrowed(rates: Sequence[float]) -> tuple[float, ...]:
    """One number for learning rates of parameter groups that are all equal."""
    return tuple(rates[:1]) if len(set(rates)) == 1 else tuple(rates)


def widened(rates: tuple[float, ...], groups: int) -> tuple[float, ...]:
    """One learning rate per parameter group, of those that `narrowed` left."""
    return rates * groups if len(rates) == 1 else rates


def _header_in(text: str, path: Path) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(text)
    if header.get("format", 0) > FORMAT:
        raise TrajectoryError(
            f"{path} has format {header['format']}, written by hf_zo {header.get('hf_zo')}; this is hf_zo {__version__} and "
            f"reads up to format {FORMAT}. Update hf_zo."
        )
    return header


def _read_sealed(path: Path) -> Trajectory:
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("hf_zo")
            if text is None:
                raise TrajectoryError(f"{path} is a safetensors file, but no trajectory of hf_zo.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise TrajectoryError(
            f"{path} is no trajectory: neither a log of hf_zo nor a complete safetensors file ({error}). A truncated download "
            "has to be fetched again; a run that still has its trajectory.log can be read from that."
        ) from error
    header = _header_in(text, path)
    counts, rates = tensors["counts"].tolist(), tensors["learning_rates"].tolist()
    losses, skipped = iter(tensors["losses"].tolist()), tensors["skipped"].tolist()
    steps = [
        Step(tuple(next(losses) for _ in range(n)), narrowed(lr), bool(skip))
        for n, lr, skip in zip(counts, rates, skipped, strict=True)
    ]
    initial = {name.removeprefix("initial/"): t for name, t in tensors.items() if name.startswith("initial/")}
    return Trajectory(header, steps, initial)


def _read_log(path: Path, cut_torn_end: bool) -> Trajectory:
    data = path.read_bytes()
    _, size, checksum = _PREAMBLE.unpack_from(data.ljust(_PREAMBLE.size, b"\0"))
    block = data[_PREAMBLE.size : _PREAMBLE.size + size]
    if len(block) < size or zlib.crc32(block) != checksum:
        raise TrajectoryError(f"{path} is torn within its header; no step of it can be read.")
    steps: list[Step] = []
    initial = load(block)
    header = _header_in(bytes(initial.pop("header").tolist()).decode(), path)
    at = _PREAMBLE.size + size
    while at < len(data):
        step, end = _record_at(data, at)
        if step is None:
            if not cut_torn_end:
                raise TrajectoryError(
                    f"{path} is torn: it has {len(steps)} good steps, and the next record is incomplete or damaged. Read it up "
                    f"to there with --until {len(steps)}, or resume the run, which repeats the step."
                )
            break
        steps.append(step)
        at = end
    return Trajectory(header, steps, initial)


def _record_at(data: bytes, at: int) -> tuple[Step | None, int]:
    if len(data) < at + _RECORD.size:
        return None, at
    checksum, losses, rates, skipped = _RECORD.unpack_from(data, at)
    end = at + _RECORD.size + 8 * (losses + rates)
    if len(data) < end or zlib.crc32(data[at + 4 : end]) != checksum:
        return None, at
    numbers = struct.unpack_from(f"<{losses + rates}d", data, at + _RECORD.size)
    return Step(numbers[rates:], numbers[:rates], bool(skipped)), end


class TrajectoryLog:
    """The growing form. Every record is handed to the operating system at once, so that killing the process loses none.

    Args:
        path: file to write; what was there is replaced by ``start``.
        start: a trajectory to go on from, with no steps or with those before the resumed one.
    """

    def __init__(self, path: str | Path, start: Trajectory) -> None:
        path = Path(path)
        self.trajectory = start
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(start.header, separators=(",", ":")).encode()
        block = save({"header": torch.frombuffer(bytearray(text), dtype=torch.uint8), **start.initial})
        temporary = path.with_name(path.name + ".part")
        with temporary.open("wb") as file:
            file.write(_PREAMBLE.pack(_MAGIC, len(block), zlib.crc32(block)) + block)
            for step in start.steps:
                file.write(_packed(step))
        temporary.replace(path)
        self._file: BinaryIO = path.open("ab", buffering=0)

    def append(self, step: Step) -> None:
        """Add a step.

        Raises:
            TrajectoryError: if it has more losses or learning rates than a record takes.
        """
        record = _packed(step)
        self.trajectory.steps.append(step)
        self._file.write(record)

    def seal(self, path: str | Path, final_hash: str, until: int | None = None) -> None:
        """Write the sealed form of what there is so far, or of the steps up to the one that led to the hashed weights."""
        header, steps = {**self.trajectory.header, "final_hash": final_hash}, self.trajectory.steps[:until]
        Trajectory(header, steps, self.trajectory.initial).write(path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _packed(step: Step) -> bytes:
    rates, losses = step.learning_rates, step.losses
    if len(losses) > MOST_LOSSES or len(rates) > MOST_RATES:
        raise TrajectoryError(
            f"A step of {len(losses)} losses at {len(rates)} learning rates does not fit into a trajectory, which takes "
            f"{MOST_LOSSES} and {MOST_RATES}; set zo_trajectory=False."
        )
    body = struct.pack(f"<HBB{len(rates) + len(losses)}d", len(losses), len(rates), step.skipped, *rates, *losses)
    return struct.pack("<I", zlib.crc32(body)) + body
