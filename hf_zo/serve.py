"""``hf-zo vllm-serve``: a process that measures losses for a trainer, on a model that follows the trainer's run.

The protocol is that of `hf_zo.runtimes.remote`. A run is followed as a replay follows it: the same estimator over the same
losses makes the same updates. What differs is that the losses are measured here, by the same code as in a trainer's process.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import tempfile
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel, get_peft_config, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from ._version import __version__
from .directions import Probe
from .estimators import Estimate
from .runtimes import TorchRuntime
from .runtimes.remote import PROTOCOL, SERVED_ARGUMENTS, description, packed, unpacked, window_of
from .runtimes.torch import evaluation_mode
from .runtimes.vllm import Engine, EngineError
from .tasks.scoring import option_loss
from .trainer import NonFiniteLossError, ZOTrainer
from .training_args import ZOTrainingArguments
from .trajectory import (
    Step,
    Trajectory,
    TrajectoryError,
    apply_estimate,
    content_hash,
    matching,
    optimizer_of,
    restore_start,
    verify_start,
    walk,
)

logger = logging.getLogger(__name__)


class Serving:
    """A model and the run that it follows.

    Args:
        model: folder or Hub id of the base model.
        adapter: folder of a PEFT adapter to train on; default: the adapter that the trainer describes, if it has one.
        dtype: name of a torch dtype, or ``"auto"``, the checkpoint's own.
        runtime: ``"vllm"`` or ``"torch"``.

    Raises:
        EngineError: if vLLM cannot serve the model.
        OSError, ValueError: if the model cannot be loaded.
    """

    def __init__(self, model: str, adapter: str | None = None, dtype: str = "auto", runtime: str = "vllm") -> None:
        self.name, self.adapter, self.dtype, self.runtime = model, adapter, dtype, runtime
        self.session, self.step = "", 0
        self._fresh: nn.Module | None = self._load()
        self.description = description(self._fresh)
        if runtime == "vllm":
            Engine(self._fresh)  # which every run takes over; started now, so that what cannot work is told now
        self._trainer: Any = None
        self._optimizer: Any = None
        self._estimate: Estimate | None = None
        self._losses: list[float] = []

    def _load(self) -> nn.Module:
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(self.name, dtype=dtype)
        model.config.use_cache = False
        return PeftModel.from_pretrained(model, self.adapter, is_trainable=True) if self.adapter is not None else model

    def health(self) -> dict[str, Any]:
        """What is served, and how far it has come."""
        told = {"protocol": PROTOCOL, "hf_zo": __version__, "model": self.name, "runtime": self.runtime, "step": self.step}
        return {**told, **self.description}

    def answer(self, what: str, told: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Do what a message asks for.

        Raises:
            EngineError: if it belongs to another run, or to another step of this one.
            TrajectoryError: if the run cannot be followed.
        """
        if what == "start":
            return self._start(told, tensors)
        if not self.session or told["session"] != self.session:
            raise EngineError("another run has been started on this server; train again from the last checkpoint.")
        if what == "hash":
            return {"hash": content_hash(self._optimizer.params)}
        if told["step"] != self.step:
            raise EngineError(f"the server is at step {self.step}, the run at {told['step']}; resume from the last checkpoint.")
        return self._measure(told, dict(tensors)) if what == "losses" else self._apply(told)

    def _start(self, told: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        self.session, header = "", told["header"]
        self._trainer = self._optimizer = self._estimate = None  # the run before, with its copy of the weights
        steps = [Step(tuple(losses), tuple(rates), skipped) for losses, rates, skipped in told["steps"]]
        initial = {name.removeprefix("initial/"): t for name, t in tensors.items() if name.startswith("initial/")}
        trajectory = Trajectory(header, steps, initial)
        arguments = ZOTrainingArguments(
            output_dir=tempfile.gettempdir(),  # nothing is written there
            zo_runtime=self.runtime,
            save_strategy="no",
            report_to="none",
            use_cpu=header["device"] == "cpu",
            **{name: told["arguments"][name] for name in SERVED_ARGUMENTS},
        )
        model, self._fresh = self._fresh if self._fresh is not None else self._load(), None
        if header["adapter"] is not None and not isinstance(model, PeftModel):
            model = get_peft_model(model, get_peft_config(header["adapter"]), header.get("adapter_name") or "default")
        model.to(arguments.device)
        dtypes = {name: getattr(torch, dtype) for name, _, dtype, _ in header["tensors"]}
        for name, p in model.named_parameters():
            p.requires_grad_(name in dtypes)
            p.data = p.data.to(dtypes.get(name, p.dtype))
            if f"frozen/{name}" in tensors:
                p.data.copy_(tensors[f"frozen/{name}"])
        params = matching(model, header, approximate=False)
        restore_start(params, trajectory)
        verify_start(model, params, trajectory)
        self._optimizer = optimizer_of(header, params)
        walk(self._optimizer, trajectory)
        if content_hash(params) != told["hash"]:
            raise TrajectoryError(f"the trajectory's {len(steps)} steps lead to other weights here (content hash).")
        self._trainer = ZOTrainer(model, arguments, compute_loss_func=option_loss if told["options"] else None)
        self._trainer._runtime = TorchRuntime(params, arguments.zo_restore, model)
        self.step, self.session = len(steps), secrets.token_hex(8)
        logger.info("Follows a run of %s from step %d.", header["method"], self.step)
        return {"session": self.session}

    def _measure(self, told: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        trainer, self._losses = self._trainer, []
        num_items = tensors.pop("num_items", told["num_items"])
        window = window_of(tensors, trainer.args.device)

        def oracle(probes: Sequence[Probe]) -> list[float]:
            losses: list[float] = trainer._measure(trainer.model, probes, window, num_items)
            self._losses.extend(losses)
            if not all(map(math.isfinite, losses)):
                raise NonFiniteLossError  # the trainer will find it among the losses and decide
            return losses

        self._estimate = None
        try:
            with torch.no_grad(), evaluation_mode(trainer.model):
                self._estimate = self._optimizer.estimator.estimate(self.step, oracle)
        except NonFiniteLossError:
            pass
        return {"losses": self._losses}

    def _apply(self, told: Mapping[str, Any]) -> dict[str, Any]:
        if self._estimate is None and not told["skipped"]:
            raise EngineError(f"no finite losses were measured for step {self.step}.")
        step = Step(tuple(self._losses), tuple(told["learning_rates"]), told["skipped"])
        apply_estimate(self._optimizer, None if told["skipped"] else self._estimate, step)
        self._estimate, self.step = None, self.step + 1
        return {}


class _Handler(BaseHTTPRequestHandler):
    """Hands messages to the `Serving` of its server, one at a time."""

    server: Listener

    def do_GET(self) -> None:
        """Tell what is served, also while a step is measured."""
        if self.path != "/health":
            self.send_error(404)
            return
        told = self.server.serving.health()
        # Readable for people, a message for trainers.
        wants_json = "json" in self.headers.get("Accept", "")
        self._send(200, json.dumps(told).encode() if wants_json else packed(told))

    def do_POST(self) -> None:
        """Answer a message."""
        what = self.path.removeprefix("/")
        if what not in ("start", "losses", "apply", "hash"):
            self.send_error(404)
            return
        message = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            with self.server.lock:
                answer = self.server.serving.answer(what, *unpacked(message))
        except (EngineError, TrajectoryError) as error:
            self._send(409, str(error).encode())
        except Exception as error:  # whatever a model makes of a batch: the trainer has to hear of it
            logger.exception("%s failed.", what)
            self._send(500, f"{type(error).__name__}: {error}".encode())
        else:
            self._send(200, packed(answer))

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Every step would be a line."""
        logger.debug(format, *args)


class Listener(ThreadingHTTPServer):
    """Listens for a trainer. The address is taken at once, so that a port in use is told before a model is loaded.

    Args:
        host: address to bind; other than 127.0.0.1 everybody who can reach it may use the model.
        port: port to bind, 0 for any.

    Raises:
        OSError: if the address cannot be bound.
    """

    daemon_threads = True
    serving: Serving

    def __init__(self, host: str, port: int) -> None:
        super().__init__((host, port), _Handler)
        self.lock = threading.Lock()  # one model, one step at a time
