"""Trajectory: a run as a file. The losses that each step saw, from which the run can be walked again without a forward pass.

Directions come from seeds and estimators are deterministic in the losses, so start + losses + learning rates = the run. Two
forms of one content:

- ``trajectory.log`` grows by one checksummed record per step while the run goes on; a kill tears at most the last record.
- ``trajectory.safetensors`` is the sealed form, written whenever the Trainer saves and at the end: ordinary safetensors with
  the header as metadata, and the hash of the weights that it leads to.

A record holds the learning rate and the losses in fp64: 8 + 8 (1 + losses) bytes, 32 for MeZO and 64 for KerZOO. Trainable
tensors that the base model does not determine are noted as zeros, as the noise they were drawn from
(`hf_zo.adapters.draw_adapter`), or stored; so is an output layer that was fitted before the first step.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import nn

from ._version import __version__
from .adapters import adapted_head, adapter_key, adapter_values, base_of, factors_of, label_number, new_heads
from .directions import ExampleDirections, Probe, TensorSpec, space_of
from .estimators import METHODS, Estimate, Estimator, hyperparameters
from .optimizer import ZOOptimizer

logger = logging.getLogger(__name__)

FORMAT = 1
LOG_NAME = "trajectory.log"
SEALED_NAME = "trajectory.safetensors"
_MAGIC = b"hf_zo\0tr"
_PREAMBLE = struct.Struct("<8sQI")  # magic, bytes of the header block, its checksum
_RECORD = struct.Struct("<IHBB")  # checksum of the rest, losses, learning rates, skipped
_REBUILDABLE = ("torch.optim.", "transformers.optimization", "bitsandbytes.optim.")


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
            "learning_rates": torch.tensor([_widened(step.learning_rates, groups) for step in self.steps], dtype=torch.float64),
            "skipped": torch.tensor([step.skipped for step in self.steps], dtype=torch.uint8),
            **{f"initial/{name}": tensor.contiguous() for name, tensor in self.initial.items()},
        }
        header = {**self.header, "steps": len(self.steps)}
        temporary = path.with_name(path.name + ".part")
        save_file(tensors, temporary, metadata={"format": "pt", "hf_zo": json.dumps(header, separators=(",", ":"))})
        temporary.replace(path)


def narrowed(rates: Sequence[float]) -> tuple[float, ...]:
    """One number for learning rates that are equal."""
    return tuple(rates[:1]) if len(set(rates)) == 1 else tuple(rates)


def _widened(rates: tuple[float, ...], groups: int) -> tuple[float, ...]:
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
        """Add a step."""
        self.trajectory.steps.append(step)
        self._file.write(_packed(step))

    def seal(self, path: str | Path, final_hash: str, until: int | None = None) -> None:
        """Write the sealed form of what there is so far, or of the steps up to the one that led to the hashed weights."""
        header, steps = {**self.trajectory.header, "final_hash": final_hash}, self.trajectory.steps[:until]
        Trajectory(header, steps, self.trajectory.initial).write(path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _packed(step: Step) -> bytes:
    rates, losses = step.learning_rates, step.losses
    body = struct.pack(f"<HBB{len(rates) + len(losses)}d", len(losses), len(rates), step.skipped, *rates, *losses)
    return struct.pack("<I", zlib.crc32(body)) + body


# ---- where a run starts --------------------------------------------------------------------------------------------


def content_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of names, dtypes, shapes and every bit, in the order of the names."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        t = tensors[name].detach()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(memoryview(t.cpu().contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def _frozen(model: nn.Module, trained: Iterable[str]) -> dict[str, torch.Tensor]:
    """Parameters that are not trained, without quantised ones, whose layout in memory depends on the machine.

    Without what PEFT keeps of a head that it trains a copy of, too: no pass reads it, and a new one is drawn at every load.
    """
    trained = set(trained)
    return {
        name: p
        for name, p in model.named_parameters()
        if name not in trained and p.is_floating_point() and type(p.data) is torch.Tensor and ".original_module." not in name
    }


def header_of(
    model: nn.Module, optimizer: ZOOptimizer, settings: Mapping[str, Any], schedule: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header of a run that starts now, and the initial tensors that have to be stored.

    Args:
        model: the model, before its first step.
        optimizer: its optimizer, with the method.
        settings: keyword arguments that build its estimator.
        schedule: name of the learning rate schedule, for the reader.
    """
    params = optimizer.params
    base, adapted = base_of(model), getattr(model, "peft_config", None)
    heads = tuple(f"{name}." for name in new_heads(base))  # drawn anew at every load, or fitted
    stored, tensors = {}, []
    for name, p in params.items():
        start: str | int = "stored" if name.startswith(heads) else "base"
        if adapted:
            key = adapter_key(int(settings["seed"]), name)
            drawn = adapter_values(key, p)
            start = "zeros" if not p.detach().any() else key if torch.equal(p.detach(), drawn) else "stored"
        if start == "stored":
            stored[name] = p.detach().cpu().clone()
        tensors.append([name, list(p.shape), str(p.dtype).removeprefix("torch."), start])
    fitted = _fitted(model, params) if optimizer.estimator.name != "zo_act" else {}  # whose own adapter a replay takes
    stored |= {name: p.detach().cpu().clone() for name, p in fitted.items()}
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or ""
    floating = [p.dtype for p in base.parameters() if p.is_floating_point()]
    header = {
        "format": FORMAT,
        "hf_zo": __version__,
        "torch": torch.__version__,
        "base": {
            # A path of this machine means nothing elsewhere: of a folder, its name.
            "name": Path(name).name if name and Path(name).exists() else name,
            "revision": getattr(config, "_commit_hash", None),
            "class": type(base).__name__,
            "dtype": str(floating[0]).removeprefix("torch."),
            "quantized": getattr(config, "quantization_config", None) is not None,
            "num_labels": label_number(base),
        },
        "device": next(iter(params.values())).device.type,
        **rule_of(optimizer, settings),
        "schedule": schedule,
        "tensors": tensors,
        "fitted": list(fitted),
        "adapter": _plain(next(iter(adapted.values())).to_dict()) if adapted else None,
        "initial_hash": content_hash(params),
        "frozen_hash": content_hash(_frozen(model, params)),
    }
    return header, stored


def _fitted(model: nn.Module, trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The factors of an output layer's adapter that is not trained: `hf_zo.head` has fitted it."""
    head = adapted_head(model)
    factors = [] if head is None else [id(p) for p in factors_of(head)]
    return {name: p for name, p in model.named_parameters() if id(p) in factors and name not in trained}


def rule_of(optimizer: ZOOptimizer, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a header that says how losses become updates, in JSON's types."""
    index = {name: i for i, name in enumerate(optimizer.params)}
    rule = {
        "method": optimizer.estimator.name,
        "settings": {**hyperparameters(optimizer.estimator.name), **settings},
        "optimizer": None if optimizer.inner is None else _path_of(type(optimizer.inner)),
        "groups": [
            {
                "tensors": [index[optimizer.names[p]] for p in group["params"]],
                **{k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")},
            }
            for group in optimizer.param_groups
        ],
    }
    return json.loads(json.dumps(rule))


def changed_since(header: Mapping[str, Any], rule: Mapping[str, Any]) -> list[str]:
    """What of a run's rule is another one now, in words; the groups of parameters are not compared."""
    if header["method"] != rule["method"]:  # whose settings are others too
        return [f"method was {header['method']}, is {rule['method']}"]
    before, now = ({"optimizer": of["optimizer"], **of["settings"]} for of in (header, rule))
    return [f"{key} was {before.get(key)}, is {now.get(key)}" for key in before | now if before.get(key) != now.get(key)]


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _plain(value: Any) -> Any:
    """JSON's types, for an adapter's configuration."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple | set | frozenset):
        return sorted(map(str, value)) if isinstance(value, set | frozenset) else [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool) else str(getattr(value, "value", value))


# ---- walking it again ----------------------------------------------------------------------------------------------


def replay(
    model: nn.Module,
    trajectory: Trajectory,
    *,
    until: int | None = None,
    approximate: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> nn.Module:
    """Rebuild the weights of a run in ``model``, in place, from the losses alone.

    Args:
        model: the base model, with its adapter if the run trained one (for ZO-Act with its basis).
        trajectory: the run.
        until: stop before this step; default: all steps.
        approximate: go on where the bits cannot come out the same, with another dtype or kind of device: every step rounds
            differently, so the result is close to the run's weights but not equal to them, and is not verified.
        on_step: called with the number of each step that was walked.

    Returns:
        ``model``.

    Raises:
        TrajectoryError: if the model is not the one that the run started from, or the end differs from the run's.
    """
    header = trajectory.header
    params = matching(model, header, approximate)
    restore_fitted(model, trajectory)
    restore_start(params, trajectory)
    if not approximate:
        verify_start(model, params, trajectory)
    optimizer = optimizer_of(header, params)
    walk(optimizer, trajectory, until, on_step)
    complete = until is None or until >= len(trajectory.steps)
    if complete and not approximate and "final_hash" in header and header["final_hash"] != content_hash(params):
        raise TrajectoryError(
            f"The weights after {len(trajectory.steps)} steps differ from those of the run (content hash). The log is damaged, "
            f"or was written by another version: hf_zo {header['hf_zo']}, torch {header['torch']}; here hf_zo {__version__}, "
            f"torch {torch.__version__}."
        )
    return model


def optimizer_of(header: Mapping[str, Any], params: Mapping[str, torch.Tensor]) -> ZOOptimizer:
    """The optimizer of a run, with its estimator, over ``params``; before the first step."""
    estimator = METHODS[header["method"]](space_of(params), **header["settings"])
    tensors = [params[name] for name, *_ in header["tensors"]]
    groups = [
        {
            **{k: tuple(v) if k == "betas" else v for k, v in group.items() if k != "tensors"},
            "params": [tensors[i] for i in group["tensors"]],
            "lr": 0.0,
        }
        for group in header["groups"]
    ]
    inner = None if header["optimizer"] is None else _optimizer_class(header["optimizer"])(groups)
    return ZOOptimizer(groups, {p: name for name, p in params.items()}, estimator, inner)


def walk(
    optimizer: ZOOptimizer, trajectory: Trajectory, until: int | None = None, on_step: Callable[[int], None] | None = None
) -> None:
    """Run estimator and optimizer over logged losses; the optimizer's state afterwards is the run's.

    Raises:
        TrajectoryError: if a step holds more or fewer losses than its method asks for.
    """
    for number, step in enumerate(trajectory.steps[:until]):
        apply_estimate(optimizer, None if step.skipped else _estimate(optimizer.estimator, number, step), step)
        if on_step is not None:
            on_step(number)


def apply_estimate(optimizer: ZOOptimizer, estimate: Estimate | None, step: Step) -> None:
    """Make the update of a step at its learning rates; none for a step that was skipped."""
    rates = _widened(step.learning_rates, len(optimizer.param_groups))
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    optimizer.stage(estimate, optimizer.estimator.measured(len(step.losses)))
    optimizer.step()


@torch.no_grad()
def _estimate(estimator: Estimator, number: int, step: Step) -> Estimate:
    """What the method made of the losses of a step."""
    left = list(step.losses)

    def oracle(probes: Sequence[Probe]) -> list[float]:
        if any(isinstance(direction, ExampleDirections) for probe in probes for _, direction in probe.terms):
            taken, left[:] = left[:], []
            if not taken or len(taken) % len(probes):
                raise TrajectoryError(
                    f"Step {number} of the trajectory holds {len(taken)} losses, not one an example and probe."
                )
            return taken
        if len(probes) > len(left):
            raise TrajectoryError(f"Step {number} of the trajectory holds too few losses for its method.")
        taken, left[:] = left[: len(probes)], left[len(probes) :]
        return taken

    estimate = estimator.estimate(number, oracle)
    if left:
        raise TrajectoryError(f"Step {number} of the trajectory holds more losses than its method asks for.")
    return estimate


def projected_gradients(trajectory: Trajectory) -> list[tuple[float, ...]]:
    """The finite-difference responses of every step, computed from the losses; an empty tuple where a step was skipped."""
    estimator, found = _estimator_of(trajectory.header), list[tuple[float, ...]]()
    for number, step in enumerate(trajectory.steps):
        if step.skipped:
            found.append(())
            continue
        estimate = _estimate(estimator, number, step)
        estimator.commit(estimate)
        found.append(estimate.projected_gradients)
    return found


def forward_passes(trajectory: Trajectory) -> int:
    """How many passes its steps took, without those before the first one."""
    estimator = _estimator_of(trajectory.header)
    return sum(estimator.measured(len(step.losses)) for step in trajectory.steps)


def _estimator_of(header: Mapping[str, Any]) -> Estimator:
    """The method of a run, without a model."""
    space = {name: TensorSpec(tuple(shape), torch.device("cpu")) for name, shape, *_ in header["tensors"]}
    return METHODS[header["method"]](space, **header["settings"])


def matching(model: nn.Module, header: dict[str, Any], approximate: bool) -> dict[str, torch.Tensor]:
    """The model's tensors that the run trained.

    Raises:
        TrajectoryError: if one is missing, or has another shape, dtype or kind of device.
    """
    here = dict(model.named_parameters())
    params: dict[str, torch.Tensor] = {}
    for name, shape, dtype, _ in header["tensors"]:
        p = here.get(name)
        if p is None or list(p.shape) != shape:
            found = "is missing" if p is None else f"has shape {list(p.shape)}"
            raise TrajectoryError(
                f"{name} {found} in this model; the run trained it with shape {shape}. Give the base model of the run "
                f"({header['base']['name'] or 'unnamed'}), with its adapter if it had one."
            )
        for what, mine, theirs in (
            ("dtype", str(p.dtype).removeprefix("torch."), dtype),
            ("kind of device", p.device.type, header["device"]),
        ):
            if mine != theirs and not approximate:
                raise TrajectoryError(
                    f"{name} has {what} {mine}, the run had {theirs}: the same bits cannot come out. Load the model as "
                    f"{theirs}, or allow a replay that is only close with --approximate (approximate=True)."
                )
        params[name] = p
    return params


@torch.no_grad()
def restore_start(params: Mapping[str, torch.Tensor], trajectory: Trajectory) -> None:
    """Give the trained tensors of an adapter the values that the run started from; tensors of the base are left alone."""
    for name, _, _, start in trajectory.header["tensors"]:
        p = params[name]
        if start == "zeros":
            p.zero_()
        elif start == "stored":
            p.copy_(trajectory.initial[name])
        elif start != "base":
            p.copy_(adapter_values(int(start), p))


def restore_fitted(model: nn.Module, trajectory: Trajectory) -> None:
    """Give an output layer's adapter what it was fitted to before the first step, and its dtype.

    Raises:
        TrajectoryError: if the model has no such adapter.
    """
    here = dict(model.named_parameters())
    for name in trajectory.header.get("fitted", []):
        if name not in here:
            raise TrajectoryError(f"{name} is missing in this model: give it the adapter that the run had on its output layer.")
        here[name].data = trajectory.initial[name].to(here[name].device)


def verify_start(model: nn.Module, params: Mapping[str, torch.Tensor], trajectory: Trajectory) -> None:
    """Compare the start with the header's hashes.

    Raises:
        TrajectoryError: if the model is another one.
    """
    base = trajectory.header["base"]
    wanted = f"{base['name'] or 'an unnamed model'}" + (f" at revision {base['revision']}" if base["revision"] else "")
    if content_hash(_frozen(model, params)) != trajectory.header["frozen_hash"]:
        raise TrajectoryError(
            f"The frozen weights of this model are not those of the run's base model, {wanted} (content hash). For a ZO-Act "
            "run, the adapter with its basis has to be the run's own too: anew it takes the run's rows, batch size and seed."
        )
    if content_hash(params) != trajectory.header["initial_hash"]:
        raise TrajectoryError(f"The weights of this model are not those the run started from, {wanted} (content hash).")


def _optimizer_class(path: str) -> Any:
    """The optimizer of the run, from a module that is known to hold optimizers: a log must not choose what is imported."""
    module, _, name = path.rpartition(".")
    if not path.startswith(_REBUILDABLE):
        raise TrajectoryError(f"The run used the optimizer {path}, which replay does not rebuild; it knows torch.optim's own.")
    return getattr(importlib.import_module(module), name)
