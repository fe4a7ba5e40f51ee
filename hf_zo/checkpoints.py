"""Checkpoints and trajectories on the Trainer's hooks: a run is logged, sealed with every save, and can be walked to again.

A checkpoint is the Trainer's own, with the trajectory beside it. Without weights (``zo_save_weights=False``) it holds the
trajectory and the schedule alone; resuming, and loading the best model, then restore the start of the run and walk along the
logged losses (`hf_zo.trajectory`), no forward pass needed.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from .adapters import packed_weights_kept
from .hub.model_card import FACTS_NAME, write_card
from .optimizer import ZOOptimizer
from .packing import Packing
from .runtimes.remote import Server
from .training_args import ZOTrainingArguments
from .trajectory import (
    LOG_NAME,
    SEALED_NAME,
    Step,
    Trajectory,
    TrajectoryError,
    TrajectoryLog,
    changed_since,
    content_hash,
    header_of,
    narrowed,
    restore_start,
    rule_of,
    verify_start,
    walk,
)

logger = logging.getLogger(__name__)

# The mixins go in front of any Trainer subclass; type checkers may take them for a Trainer itself.
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

_START_NAME = "_trajectory.start.safetensors"  # no upload takes what begins so


class TrajectoryCheckpoints(_Base):
    """What `ZOTrainerMixin` adds to saving and resuming."""

    args: ZOTrainingArguments
    model: Any
    optimizer: Any
    _resume_from: str | None = None
    _log: TrajectoryLog | None = None
    _dtypes: dict[str, torch.dtype]
    _packing: Packing
    _fits: dict[str, str] | None = None  # what came of the fits, for the card
    _decides_depth = False  # zo_method="auto" does, where zo_fit_depth is left open
    _began: str | None = None  # hash of the weights before the first step of all
    _kept: int | None = None  # the step whose weights, the best, were loaded at the end of training
    _losses: list[float]
    _prepared = 0  # forward passes before the first step
    _server: Server | None = None
    _served: TrajectoryLog | None = None  # the log of the run that the server follows

    @property
    def _zo_optimizer(self) -> ZOOptimizer:
        # accelerate wraps the optimizer during training
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(optimizer, ZOOptimizer)
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; ``resume_from_checkpoint=True`` takes the last *complete* checkpoint.

        A process that is killed while it saves leaves a folder without the state that is written last.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint=True, but {self.args.output_dir} has no complete checkpoint.")
        self._resume_from, self._kept = resume_from_checkpoint or None, None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._resume_from = None
            (Path(str(self.args.output_dir)) / _START_NAME).unlink(missing_ok=True)

    def _open_log(self) -> None:
        """Open the log of this run: anew, or with the steps of the checkpoint that is resumed."""
        if self._log is not None:
            self._log.close()
        self._log = None
        if not self.args.zo_save_weights and self.args.load_best_model_at_end:
            self._check_start()
        start = self._start() if self.args.should_save else None
        folder = Path(str(self.args.output_dir))
        if start is not None:
            self._began = self._began or start.header["initial_hash"]
            self._log = TrajectoryLog(folder / LOG_NAME, start)
        elif self.args.should_save:
            (folder / LOG_NAME).unlink(missing_ok=True)  # of an attempt that was given up, or another run
        if self._log is not None and not self.args.zo_save_weights and self.args.load_best_model_at_end:
            # The best checkpoint is walked to from the start, which by then has been trained over.
            save_file({name: p.detach().clone() for name, p in self._zo_optimizer.params.items()}, folder / _START_NAME)

    def _check_start(self) -> None:
        """On every process.

        Raises:
            ValueError: if the run is resumed from weights that are not those it began with, and needs these.
        """
        folder = Path(self._resume_from or "")
        if self._resume_from is None or is_weightless(folder) or not (folder / SEALED_NAME).is_file():
            return
        if any(where == "base" for *_, where in Trajectory.read(folder).header["tensors"]):
            raise ValueError(
                "zo_save_weights=False with load_best_model_at_end=True walks to the best weights from those that the run "
                f"began with, and {folder} brings later ones. Resume with zo_save_weights=True."
            )

    def _start(self) -> Trajectory | None:
        """What the log of this run begins with; None, with a warning, where its steps would not lead to its weights."""
        optimizer, settings = self._zo_optimizer, self.args.estimator_kwargs()
        if self._resume_from is not None:
            if not (Path(self._resume_from) / SEALED_NAME).is_file():
                logger.warning("%s has no trajectory, so this run writes none: it would begin midway.", self._resume_from)
                return None
            if not is_weightless(self._resume_from) and not (Path(self._resume_from) / OPTIMIZER_NAME).is_file():
                logger.warning("%s has no state of the method, so this run writes no trajectory.", self._resume_from)
                return None
            start = Trajectory.read(self._resume_from)
            changed = changed_since(start.header, rule_of(optimizer, settings))
            if changed:
                logger.warning("This run goes on by another rule (%s), so it writes no trajectory.", "; ".join(changed))
            return None if changed else start
        if optimizer.estimator.state or (optimizer.inner is not None and optimizer.inner.state):
            logger.warning("This run goes on with the state of the one before, so it writes no trajectory.")
            return None
        schedule = str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type))
        header, stored = header_of(self.model, optimizer, settings, schedule)
        of_base = any(where == "base" for *_, where in header["tensors"])
        if of_base and self._began not in (None, header["initial_hash"]):
            logger.warning("This run starts from weights that were trained before it, so it writes no trajectory.")
            return None
        return Trajectory(header, [], stored)

    def _record(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Log the step that was just applied."""
        if self._log is not None:
            rates = narrowed([float(group["lr"]) for group in optimizer.param_groups])
            self._log.append(Step(tuple(self._losses), rates, optimizer.last_was_skipped))
            if self._server is not None:
                self._server.apply(len(self._log.trajectory.steps) - 1, rates, optimizer.last_was_skipped)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's, with the trajectory; a checkpoint without weights if ``zo_save_weights`` is False.

        A quantised base stays what it is.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        if _internal_call and folder.name.startswith(PREFIX_CHECKPOINT_DIR) and self._leaves_out_weights:
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                for old in [*_weights_in(folder), folder / OPTIMIZER_NAME]:
                    old.unlink(missing_ok=True)  # another run's, which was saved here before
                self.model.config.save_pretrained(folder)
                torch.save(self.args, folder / TRAINING_ARGS_NAME)
        else:
            with packed_weights_kept(self.model):
                super().save_model(output_dir, _internal_call)
        if self._log is not None:
            folder.mkdir(parents=True, exist_ok=True)
            found = content_hash(self._zo_optimizer.params)
            self._log.seal(folder / SEALED_NAME, found, self._kept)
            if self._server is not None and self._served is self._log and self._kept is None:
                self._server.verify(found)
        elif self.args.should_save:
            (folder / SEALED_NAME).unlink(missing_ok=True)  # of an attempt that was given up, or another run
        if self.args.should_save and (folder / FACTS_NAME).is_file():  # PEFT has just written a card of its own over ours
            write_card(json.loads((folder / FACTS_NAME).read_text()), folder)

    @property
    def _leaves_out_weights(self) -> bool:
        """Whether checkpoints do: those of a run that writes no trajectory cannot."""
        return not self.args.zo_save_weights and (self._log is not None or not self.args.should_save)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The Trainer's, with the trajectory and the card as of now."""
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            folder = Path(str(self.args.output_dir))
            if self._log is not None:
                self._log.seal(folder / SEALED_NAME, content_hash(self._zo_optimizer.params))
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The Trainer's, without the weights that an adapter on the output layer stands on: PEFT would add the base's."""
        if state_dict is None and self.args.zo_head_samples:
            state_dict = {key: value for key, value in self.model.state_dict().items() if ".base_layer." not in key}
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The Trainer's; beside a trajectory that replaces weights the schedule alone."""
        if not self._leaves_out_weights:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        """The Trainer's, with what a start has decided: the form of a process's batches, and what the fits came to."""
        super()._save_rng_state(output_dir)
        told = {"packing": self._packing.choice, "fits": self._fits}
        self._start_file(output_dir).write_text(json.dumps(told))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The Trainer's, with what a start has decided."""
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self._start_file(checkpoint).is_file():
            told = json.loads(self._start_file(checkpoint).read_text())
            self._packing.choice, self._fits = told["packing"], told["fits"]
            if self._fits and self._decides_depth:
                self.args.zo_fit_depth = "middle blocks" in self._fits

    def _start_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"start_{self.args.process_index}.json"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The Trainer's; a checkpoint without weights is replayed once the optimizer exists."""
        if not is_weightless(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer's; a checkpoint without weights is walked to from the base model."""
        if checkpoint is None or not is_weightless(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                self._verify_loaded(Path(checkpoint))
            return
        self._walk_from_start(Trajectory.read(checkpoint), verified=True)
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        for group, lr in zip(self._zo_optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = lr

    def _verify_loaded(self, checkpoint: Path) -> None:
        """Compare what was loaded with what was saved.

        Raises:
            TrajectoryError: if they differ: transformers names keys that it does not find, and goes on.
        """
        if not (checkpoint / SEALED_NAME).is_file():
            return
        header, params = Trajectory.read(checkpoint).header, self._zo_optimizer.params
        if {name for name, *_ in header["tensors"]} == params.keys() and content_hash(params) != header["final_hash"]:
            raise TrajectoryError(
                f"The weights that were loaded from {checkpoint} are not those of the run (content hash): transformers warns "
                "of missing keys where it cannot load what it saved, as with mixtures of experts. Rebuild them with `hf-zo "
                "replay` from its trajectory; with zo_save_weights=False a run resumes that way by itself."
            )

    def _walk_from_start(self, trajectory: Trajectory, verified: bool) -> None:
        optimizer = self._zo_optimizer
        params = optimizer.params
        changed = changed_since(trajectory.header, rule_of(optimizer, self.args.estimator_kwargs()))
        if changed:
            raise TrajectoryError(
                f"The checkpoint holds no weights, and its trajectory leads to them by another rule: {'; '.join(changed)}. Set "
                "back what was changed, or rebuild its weights with `hf-zo replay` and start a new run from them."
            )
        restore_start(params, trajectory)
        if verified:
            verify_start(self.model, params, trajectory)
        optimizer.reset()  # of what the same trainer has trained before
        optimizer.forward_passes = self._prepared
        log = self._log
        self._log = None  # these steps are in it
        walk(optimizer, trajectory)
        self._log = log
        if content_hash(params) != trajectory.header["final_hash"]:
            raise TrajectoryError("Replaying the checkpoint's trajectory did not end at its weights (content hash).")

    def _load_best_model(self) -> None:
        """The Trainer's; the best checkpoint without weights is walked to from the start of the run."""
        self._kept = self.state.best_global_step
        best = self.state.best_model_checkpoint
        if best is None or not is_weightless(best):
            super()._load_best_model()
            for name, p in self._zo_optimizer.params.items():  # PEFT loads a 16-bit adapter as fp32, into new parameters
                module, _, leaf = name.rpartition(".")
                p.data = self.model.get_parameter(name).detach().to(self._dtypes[name])
                setattr(self.model.get_submodule(module), leaf, p)
            if best is not None:
                self._verify_loaded(Path(best))
            return
        logger.info("Replaying the best checkpoint, %s.", best)
        optimizer = self._zo_optimizer
        start = load_file(Path(str(self.args.output_dir)) / _START_NAME)
        with torch.no_grad():
            for name, p in optimizer.params.items():
                p.copy_(start[name])
        spent = optimizer.forward_passes, optimizer.skipped_steps
        self._walk_from_start(Trajectory.read(best), verified=False)
        optimizer.forward_passes, optimizer.skipped_steps = spent
        self.accelerator.wait_for_everyone()  # before the start is deleted


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The checkpoint with the highest step whose ``trainer_state.json``, written last, can be read."""
    steps = [f.name.removeprefix("checkpoint-") for f in Path(output_dir).glob("checkpoint-*")]
    for step in sorted((int(step) for step in steps if step.isdecimal()), reverse=True):
        folder = Path(output_dir) / f"checkpoint-{step}"
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            logger.warning("%s is incomplete and left out.", folder)
        else:
            return str(folder)
    return None


def is_weightless(checkpoint: str | Path) -> bool:
    """Whether a checkpoint holds a trajectory and no weights."""
    folder = Path(checkpoint)
    return (folder / SEALED_NAME).is_file() and not _weights_in(folder)


def _weights_in(folder: Path) -> list[Path]:
    patterns = ("*model*.safetensors", "*model*.bin", "*model*.json")
    return [file for pattern in patterns for file in folder.glob(pattern)]
