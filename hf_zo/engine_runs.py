"""Runs whose forward passes an engine computes: in this process, or on a server that follows the run by its trajectory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import nn

from .checkpoints import TrajectoryCheckpoints
from .runtimes.remote import SERVED_ARGUMENTS
from .runtimes.vllm import Engine, EngineError
from .tasks.scoring import option_loss
from .trajectory import content_hash

logger = logging.getLogger(__name__)


class EngineRuns(TrajectoryCheckpoints):
    """What `ZOTrainerMixin` adds for ``zo_runtime="vllm"`` and ``zo_server``."""

    _engine: Engine | None = None
    _objective_fn: Callable[..., Any] | None = None

    def _loss_is_the_trainers(self) -> bool:
        """Whether the loss is computed by `Trainer.compute_loss`, and not by a subclass of the user's."""
        raise NotImplementedError

    @property
    def _loss_is_cross_entropy(self) -> bool:
        """Whether no argument makes another loss of the Trainer's: neither smoothed labels nor a function of one's own."""
        return self.label_smoother is None and self.compute_loss_func in (None, option_loss)

    def _engine_of(self, model: nn.Module) -> Engine | None:
        """The engine that computes forward passes of ``model`` in this process, if the arguments want one."""
        if self.args.zo_runtime != "vllm" or self.args.zo_server is not None:
            return None
        if self.accelerator.num_processes > 1:
            raise ValueError(
                f"zo_runtime='vllm' runs in one process, and {self.accelerator.num_processes} were launched; launch one, or "
                "use zo_runtime='torch'."
            )
        return Engine(model)

    def _check_served(self) -> None:
        """Refuse what a server cannot compute, because it is code of this process."""
        for wrong, what in (
            (self.accelerator.num_processes > 1, f"{self.accelerator.num_processes} processes"),
            (self._objective_fn is not None, "objective_fn"),
            (self.args.zo_objective not in ("loss", "accuracy"), f"zo_objective={self.args.zo_objective!r}"),
            (self.compute_loss_func not in (None, option_loss), "compute_loss_func (other than hf_zo.tasks.option_loss)"),
            (self.label_smoother is not None, "label_smoothing_factor"),
            (not self._loss_is_the_trainers(), f"{type(self).__name__}.compute_loss"),
        ):
            if wrong:
                raise ValueError(
                    f"zo_server={self.args.zo_server!r} does not work with {what}: the server measures the loss or the "
                    "accuracy of a single process, with the loss of the model or of hf_zo.tasks. Unset zo_server."
                )

    def _start_server(self) -> None:
        """Bring the server to where this run is: by its trajectory, which may be empty."""
        assert self._server is not None
        if self._log is None:
            raise EngineError(
                f"zo_server={self.args.zo_server!r} follows a run by its trajectory, and this one writes none, because it "
                "goes on from a state that no trajectory leads to. Start a new run."
            )
        trajectory, params = self._log.trajectory, self._zo_optimizer.params
        tensors = {f"initial/{name}": t for name, t in trajectory.initial.items()}
        prefix = getattr(getattr(self.model, "base_model", None), "prefix", None)
        if isinstance(self.model, PeftModel) and prefix is not None:  # what the base does not determine, such as ZO-Act's basis
            frozen = {name: p for name, p in self.model.named_parameters() if prefix in name and name not in params}
            tensors.update({f"frozen/{name}": p for name, p in frozen.items()})
        told = {
            "header": trajectory.header,
            "steps": [[step.losses, step.learning_rates, step.skipped] for step in trajectory.steps],
            "hash": content_hash(params),
            "options": self.compute_loss_func is option_loss,
            "arguments": {name: getattr(self.args, name) for name in SERVED_ARGUMENTS},
        }
        self._server.start(told, tensors)
        self._served = self._log

    def _warn_of_rounding(self, rounding: float, moved: float) -> None:
        """Probes have to move the loss, by more than two ways of computing it differ (in one batch: a rough estimate)."""
        if self.args.zo_objective == "loss" and rounding >= moved / 2:
            logger.warning(
                "zo_eps=%g is small for this engine: the probes of the first step move the loss by %.1e, and its rounding is "
                "about %.1e (vLLM's loss of the first batch against the model's own). Use a larger zo_eps, or float32.",
                self.args.zo_eps,
                moved,
                rounding,
            )
