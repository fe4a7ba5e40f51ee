"""Callbacks that write the card of a run, and push it to the Hub at the Trainer's moments."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers import TrainerCallback

from ..runtimes.torch import Randomness, evaluation_mode
from ..trajectory import LOG_NAME
from .model_card import FACTS_NAME, facts_of, write_card

if TYPE_CHECKING:
    from ..trainer import ZOTrainerMixin

logger = logging.getLogger(__name__)

_STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
# The state of a run is of no use to those who load the model; the sealed trajectory says more in less.
_RUN_STATE = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state*.pth",
    "start_*.json",
    "trainer_state.json",
    "training_args.bin",
    LOG_NAME,
    "*.part",
)


class PushError(RuntimeError):
    """An upload that did not succeed. Everything is still in the output folder; the message says how to push it later."""


class ZOTrainerCallback(TrainerCallback):
    """A callback that is told which trainer it serves; `ZOTrainer` sets ``trainer`` before training."""

    trainer: ZOTrainerMixin | None = None

    def _trainer(self) -> ZOTrainerMixin:
        if self.trainer is None:
            raise TypeError(f"{type(self).__name__} serves a ZOTrainer, or a trainer with ZOTrainerMixin.")
        return self.trainer


class ModelCardCallback(ZOTrainerCallback):
    """Measures what a card has to say, and writes the card with every save and at the end.

    The peak memory of a step is compared with that of one plain forward pass on training rows, which costs one forward pass at
    the start. On CUDA the allocator is asked; on Linux the kernel's high-water mark of resident memory; elsewhere the card
    says nothing of memory.

    Args:
        **about: what the trainer cannot know: ``model_name``, ``dataset`` (id on the Hub), ``dataset_name``, ``task_type``
            (a pipeline tag, default: that of the model's class), ``license`` (default: the base model's), ``language`` and
            ``tags``, a string or a list of them.

    Raises:
        TypeError: for any other keyword.
    """

    def __init__(self, **about: str | list[str]) -> None:
        known = ("model_name", "dataset", "dataset_name", "task_type", "license", "language", "tags")
        unknown = about.keys() - set(known)
        if unknown:
            raise TypeError(f"ModelCardCallback does not take {', '.join(sorted(unknown))}, but {', '.join(known)}.")
        self.about: dict[str, Any] = dict(about)
        self._peak: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure one plain forward pass."""
        trainer = self._trainer()
        self._peak = None
        if trainer.train_dataset is None or not _restart_peak(args.device):
            return
        with torch.no_grad(), evaluation_mode(trainer.model), Randomness(trainer.model.parameters()):
            trainer.plain_forward(trainer.training_batches(args.per_device_train_batch_size)[0])
        self.about["inference_memory"] = _peak(args.device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure steps alone, without evaluations and saves between them."""
        _restart_peak(args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the highest peak."""
        now = _peak(args.device)
        if now is not None:
            self._peak = max(now, self._peak or 0.0)

    def facts(self) -> dict[str, Any]:
        """What is known so far."""
        return facts_of(self._trainer(), {**self.about, "peak_memory": self._peak})

    def write(self, folder: str | Path, **told: str | list[str]) -> None:
        """Write the card as of now, with what is ``told`` besides."""
        write_card({**self.facts(), **told}, folder)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the card into the checkpoint."""
        if args.should_save:
            self.write(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the card into the output folder."""
        if args.should_save:
            self.write(args.output_dir)


def card_of(trainer: ZOTrainerMixin) -> ModelCardCallback:
    """The trainer's own `ModelCardCallback`, or one that has measured no memory."""
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, ModelCardCallback)]
    card = found[0] if found else ModelCardCallback()
    card.trainer = trainer
    return card


class PushToHubCallback(ZOTrainerCallback):
    """Pushes adapter or weights, trajectory and card.

    Uploads come after the Trainer has saved, between steps, so the weights are never perturbed ones. A failed upload in the
    middle of a run is logged and tried again with the next save; at the end it raises, after everything is on disk.

    Args:
        repo_id: ``user/name`` on the Hub; created if it does not exist.
        strategy: ``"end"``, ``"every_save"``, ``"checkpoint"`` (also the last checkpoint with its optimizer, under
            ``last-checkpoint``) or ``"all_checkpoints"``, as the Trainer's ``hub_strategy``; default: that of the arguments.
        private: of a repository that is created.
        token: default: the one that is logged in.
        revision: branch to push to.
        retries: further attempts after a connection error or a server error, each after twice the wait.
        wait: seconds before the first further attempt.

    Raises:
        ValueError: for an unknown strategy.
        PushError: at the begin of training if the repository cannot be reached or written.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        strategy: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        retries: int = 3,
        wait: float = 2.0,
    ) -> None:
        if strategy is not None and strategy not in _STRATEGIES:
            raise ValueError(f"strategy={strategy!r} does not exist; choose one of {', '.join(_STRATEGIES)}.")
        self.repo_id = repo_id
        self.strategy = strategy
        self.private = private
        self.revision = revision
        self.retries = retries
        self.wait = wait
        self.api = HfApi(token=token)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Create the repository now: a wrong token must not show after hours of training."""
        self._trainer()
        self.strategy = self.strategy or str(getattr(args.hub_strategy, "value", args.hub_strategy))
        if state.is_world_process_zero:
            self._attempt(lambda: self.api.create_repo(self.repo_id, private=self.private, exist_ok=True), args.output_dir)
            if self.revision is not None:
                self._attempt(
                    lambda: self.api.create_branch(self.repo_id, branch=str(self.revision), exist_ok=True), args.output_dir
                )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Push the checkpoint that was just saved."""
        if self.strategy == "end" or not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not (checkpoint / FACTS_NAME).is_file():  # unless a ModelCardCallback came first
            card_of(self._trainer()).write(checkpoint)
        try:
            self._upload(checkpoint, f"Step {state.global_step}", args.output_dir)
            if self.strategy in ("checkpoint", "all_checkpoints"):
                inside = "last-checkpoint" if self.strategy == "checkpoint" else checkpoint.name
                self._attempt(
                    lambda: self.api.upload_folder(
                        repo_id=self.repo_id,
                        folder_path=checkpoint,
                        path_in_repo=inside,
                        commit_message=f"Step {state.global_step}, to resume from",
                        revision=self.revision,
                    ),
                    args.output_dir,
                )
        except PushError as error:
            logger.error("%s Training goes on; the next save tries again.", error)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save model and trajectory to the output folder and push them."""
        trainer = self._trainer()
        trainer.save_model(str(args.output_dir))
        if state.is_world_process_zero:
            card_of(trainer).write(args.output_dir)
            self._upload(Path(args.output_dir), "End of training", args.output_dir)

    def _upload(self, folder: Path, message: str, output_dir: str) -> None:
        self._attempt(lambda: push_folder(self.api, folder, self.repo_id, message, self.revision), output_dir)

    def _attempt(self, do: Any, output_dir: str) -> Any:
        wait = self.wait
        for left in range(self.retries, -1, -1):
            try:
                return do()
            except (HfHubHTTPError, HTTPError, OSError) as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                later = f"What has been run is in {output_dir}; push it later with `hf-zo push {output_dir} {self.repo_id}`."
                if status in (401, 403):
                    raise PushError(
                        f"Pushing to {self.repo_id} is not allowed (HTTP {status}): log in with `hf auth login`, or give a "
                        f"token that may write. {later}"
                    ) from error
                if status is not None and status < 500 and status != 429:
                    raise PushError(f"Pushing to {self.repo_id} failed: {error} {later}") from error
                if not left:
                    raise PushError(
                        f"Pushing to {self.repo_id} failed {self.retries + 1} times, the last time with: {error}. Is this "
                        f"machine offline? {later}"
                    ) from error
                time.sleep(wait)
                wait *= 2
        return None


def push_folder(api: HfApi, folder: Path, repo_id: str, message: str, revision: str | None = None) -> None:
    """Upload what others need of a run's folder: weights or adapter, card, figure, trajectory, tokenizer."""
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=message,
        revision=revision,
        ignore_patterns=[*_RUN_STATE, "checkpoint-*", "runs/*", "_*"],
    )


def _restart_peak(device: torch.device) -> bool:
    """Begin a new measurement; False where there is none."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): reset the high-water mark
    except OSError:
        return False
    return True


def _peak(device: torch.device) -> float | None:
    """Highest memory since the measurement began, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)
