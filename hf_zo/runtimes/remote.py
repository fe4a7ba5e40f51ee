"""The forward passes of a step on a server (``hf-zo vllm-serve``) that follows the run by itself.

The server holds the same model and goes through the same estimator. So neither probes nor weights cross the wire: it is told
the run so far when training starts, then per step the batch and, once it is known, the learning rate; it answers with losses.
Client and server stay equal to the bit, which the hash of the weights tells at the start and with every save.

A message is a safetensors file with one more tensor, ``told``, whose bytes are JSON. Nothing is pickled.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from ..anatomy import base_of
from ..tasks.scoring import OptionLabels
from .vllm import EngineError

PROTOCOL = 1
SERVED_ARGUMENTS = ("zo_objective", "zo_restore", "zo_packing")
"""Training arguments that change how a loss is measured, which the server takes over."""
_TIMEOUT = 3600.0  # seconds that a step may take; a server that is gone is noticed at once


def packed(told: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> bytes:
    """A message: JSON and tensors."""
    text = bytearray(json.dumps(told, separators=(",", ":")).encode())
    contents = {name: t.detach().cpu().contiguous() for name, t in (tensors or {}).items()}
    return save({**contents, "told": torch.frombuffer(text, dtype=torch.uint8)})


def unpacked(message: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """JSON and tensors of a message."""
    tensors = load(message)
    told: dict[str, Any] = json.loads(bytes(tensors.pop("told").tolist()))
    return told, tensors


def window_tensors(window: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Copies of a window's batches, by name; the labels of options as two.

    Copies, as safetensors refuses two names for one memory, and labels often are the input ids.

    Raises:
        EngineError: if a batch holds anything else.
    """
    found: dict[str, torch.Tensor] = {}
    for i, inputs in enumerate(window):
        for key, value in inputs.items():
            if isinstance(value, OptionLabels):
                found.update({f"{i}/{key}/{part}": t.clone() for part, t in value.items()})
            elif isinstance(value, torch.Tensor):
                found[f"{i}/{key}"] = value.clone()
            else:
                raise EngineError(
                    f"zo_server takes batches of tensors, and {key!r} is a {type(value).__name__}; leave it out in the data "
                    "collator, or unset zo_server."
                )
    return found


def window_of(tensors: Mapping[str, torch.Tensor], device: torch.device) -> list[dict[str, Any]]:
    """The window that `window_tensors` took apart, on ``device``."""
    window: dict[int, dict[str, Any]] = {}
    for name, t in tensors.items():
        number, key, *part = name.split("/")
        inputs = window.setdefault(int(number), {})
        if part:
            inputs.setdefault(key, OptionLabels()).update({part[0]: t.to(device)})
        else:
            inputs[key] = t.to(device)
    return [window[i] for i in sorted(window)]


class Server:
    """A server as the trainer sees it.

    Args:
        url: where it listens, such as ``http://127.0.0.1:8123``.
        model: the model that is trained here, to be compared with the server's.

    Raises:
        EngineError: if nothing answers there, or a server of another version or with another model.
    """

    def __init__(self, url: str, model: nn.Module) -> None:
        self.url = url
        self._session = ""
        told = self._get()
        if told.get("protocol") != PROTOCOL:
            raise EngineError(
                f"zo_server={url!r} speaks protocol {told.get('protocol')}, this is {PROTOCOL}: use one version of hf_zo."
            )
        for what, mine in description(model).items():
            if told[what] != mine:
                raise EngineError(
                    f"zo_server={url!r} holds another model: its {what} is {told[what]}, here it is {mine}. Start it with the "
                    "model that is trained here, in the same dtype (hf-zo vllm-serve MODEL --dtype …)."
                )

    def start(self, told: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Bring the server to the state that the run has here.

        Raises:
            EngineError: if the server cannot follow the run, or arrives elsewhere; names the difference.
        """
        answer = self._post("start", told, tensors)
        self._session = answer["session"]

    def losses(self, step: int, window: Sequence[Mapping[str, Any]], num_items: torch.Tensor | int | None) -> list[float]:
        """All losses that the method asks for in a step, fp64; up to the first round that is not finite."""
        tensors = window_tensors(window)
        if isinstance(num_items, torch.Tensor):
            tensors["num_items"], num_items = num_items, None
        return self._post("losses", {"step": step, "num_items": num_items}, tensors)["losses"]

    def apply(self, step: int, learning_rates: Sequence[float], skipped: bool) -> None:
        """Let the server make the update that was made here."""
        self._post("apply", {"step": step, "learning_rates": list(learning_rates), "skipped": skipped})

    def verify(self, weights_hash: str) -> None:
        """Compare weights.

        Raises:
            EngineError: if the server's are others.
        """
        theirs = self._post("hash", {})["hash"]
        if theirs != weights_hash:
            raise EngineError(
                f"The weights at zo_server={self.url!r} are no longer those of this run (content hash): server and trainer "
                "must run the same versions of hf_zo and torch on the same kind of device."
            )

    def _get(self) -> dict[str, Any]:
        answer = self._exchange("GET", "health", None)
        try:
            return unpacked(answer)[0]
        except (SafetensorError, KeyError, ValueError) as error:
            raise EngineError(
                f"zo_server={self.url!r} is no `hf-zo vllm-serve`: its answer cannot be read ({error})."
            ) from error

    def _post(self, what: str, told: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
        return unpacked(self._exchange("POST", what, packed({**told, "session": self._session}, tensors)))[0]

    def _exchange(self, verb: str, what: str, message: bytes | None) -> bytes:
        place = urlsplit(self.url)
        if place.scheme != "http" or place.hostname is None or _port(place) is None:
            raise EngineError(f"zo_server={self.url!r} is no address of a server; it looks like http://127.0.0.1:8123.")
        connection = http.client.HTTPConnection(place.hostname, _port(place), timeout=_TIMEOUT)
        try:
            connection.request(verb, f"/{what}", message)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(
                f"zo_server={self.url!r} does not answer ({type(error).__name__}: {error}). Start it (again) with `hf-zo "
                "vllm-serve MODEL`, and go on with trainer.train(resume_from_checkpoint=True): the trajectory of the last "
                "checkpoint brings the server to its step."
            ) from error
        finally:
            connection.close()
        if answer.status != http.client.OK:
            raise EngineError(f"zo_server={self.url!r}: {body.decode(errors='replace')}")
        return body


def _port(place: SplitResult) -> int | None:
    """None where it is no number of a port."""
    try:
        return place.port or 80
    except ValueError:
        return None


def description(model: nn.Module) -> dict[str, Any]:
    """What two copies of a base model have to share before their bits are worth comparing: class, dtype, sizes."""
    base = base_of(model)
    config = base.config.to_dict()
    sizes = {key: config[key] for key in sorted(config) if type(config[key]) is int and ("_size" in key or "num_" in key)}
    return {
        "class": type(base).__name__,
        "dtype": str(next(p.dtype for p in base.parameters() if p.is_floating_point())).removeprefix("torch."),
        "sizes": sizes,
    }
