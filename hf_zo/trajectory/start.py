"""Where a run starts, and by which rule: what its header says, and how a model is brought there and compared.

Trainable tensors that the base model does not determine are noted as zeros, as the noise they were drawn from
(`hf_zo.adapters.draw_adapter`), or stored; so is an output layer that was fitted before the first step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..adapters import adapter_key, adapter_values
from ..anatomy import active_adapter, adapted_lm_head, base_of, factors_of, label_number, new_heads
from ..estimators import hyperparameters
from ..optimizer import ZOOptimizer
from .file import FORMAT, Trajectory, TrajectoryError


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
    active = active_adapter(model)
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
        "adapter": None if active is None or adapted is None else _plain(adapted[active].to_dict()),
        "adapter_name": active,
        "initial_hash": content_hash(params),
        "frozen_hash": content_hash(_frozen(model, params)),
    }
    return header, stored


def _fitted(model: nn.Module, trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The factors of an output layer's adapter that is not trained: `hf_zo.head` has fitted it."""
    head = adapted_lm_head(model)
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

    Without what PEFT keeps of a head that it trains a copy of, too, and of adapters that are not active: no pass reads them,
    and a head is drawn anew at every load.
    """
    idle = {"original_module", *getattr(model, "peft_config", {})} - {active_adapter(model)}
    left_out = set(trained)
    return {
        name: p
        for name, p in model.named_parameters()
        if name not in left_out and p.is_floating_point() and type(p.data) is torch.Tensor and not idle & set(name.split("."))
    }


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


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _plain(value: Any) -> Any:
    """JSON's types, for an adapter's configuration."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple | set | frozenset):
        return sorted(map(str, value)) if isinstance(value, set | frozenset) else [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool) else str(getattr(value, "value", value))
