"""ZOTrainer: the transformers Trainer, with a step that runs forward only.

The Trainer's loop is untouched. `training_step` collects the micro-batches of an accumulation window; with the last one it
lets the estimator measure its probes over the whole window, restores the weights, and stages the estimate. The loop's own
``optimizer.step()`` then applies it (`ZOOptimizer`). So schedules, callbacks, logging, saving and resuming are the Trainer's:

    estimator --probes--> runtime --losses--> estimator --estimate--> optimizer --> weights

Read in this order: this file, ``estimators/mezo.py``, ``measurement.py``, ``runtimes/torch.py``, ``optimizer.py``. What comes
before the first step is in ``preparation.py``, what comes with a save in ``checkpoints.py``.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from . import measurement
from .anatomy import virtual_tokens
from .directions import Probe, space_of
from .estimators import METHODS, Estimator
from .hub.callbacks import ZOTrainerCallback, card_of
from .measurement import Measurement
from .objectives import OBJECTIVES
from .optimizer import ZOOptimizer, leave_out_frozen
from .precision import LossesSeen, warn_of_slow_products
from .runtimes import TorchRuntime
from .runtimes.remote import Server
from .runtimes.torch import Randomness, evaluation_mode
from .tasks.scoring import option_predictions
from .training_args import Trained, ZOTrainingArguments, default_optim, recommended

logger = logging.getLogger(__name__)

LEVEL_STEPS = 10
"""Steps from the start whose probes all had one loss, after which a warning says that nothing is learnt."""


class NonFiniteLossError(FloatingPointError):
    """A probe gave NaN or infinity. The weights are restored and nothing was applied."""


class ZOTrainerMixin(Measurement):
    """Turns a Trainer subclass into a forward-only one: ``class MyTrainer(ZOTrainerMixin, Seq2SeqTrainer)``.

    The training arguments must derive from `ZOTrainingArguments`; for a trainer with arguments of its own, combine them:
    ``@dataclass class MyConfig(ZOTrainingArguments, SFTConfig): pass``.

    Args:
        objective_fn: ``(model, inputs) -> value`` to minimise, the mean over the batch; replaces ``zo_objective``.
        *args, **kwargs: the trainer's own.

    Raises:
        TypeError: if the arguments are not `ZOTrainingArguments`, or the model is a name.
        ValueError: if nothing is trainable, or something trainable is quantised.
    """

    args: ZOTrainingArguments
    model: Any
    optimizer: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *rest: Any,
        objective_fn: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor | float] | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = ZOTrainingArguments(output_dir="trainer_output")
        if not isinstance(args, ZOTrainingArguments):
            raise TypeError(
                f"args is a {type(args).__name__}; {type(self).__name__} needs ZOTrainingArguments or a dataclass that "
                "derives from it, such as `class MyConfig(ZOTrainingArguments, SFTConfig)`, by name where args is not the "
                "trainer's second argument."
            )
        args = copy.copy(args)  # what is left unset is set below, for this model
        if args.zo_auto:
            args.zo_method = "zo_act"
        if objective_fn is not None and args.zo_objective != "loss":
            raise ValueError(f"objective_fn and zo_objective={args.zo_objective!r} exclude each other; give one of them.")
        if objective_fn is not None and args.zo_per_example:
            raise ValueError(
                "objective_fn scores whole batches, and zo_per_example=True needs every example's loss; unset one."
            )
        if args.zo_objective not in OBJECTIVES:
            raise ValueError(f"zo_objective={args.zo_objective!r} does not exist; choose one of {', '.join(OBJECTIVES)}.")
        self._objective_fn = objective_fn
        self._window: list[dict[str, Any]] = []
        self._last_loss = math.nan
        self._level: float = 0  # steps so far whose probes all had one loss; negative once they differed
        self._metrics_of_step: dict[str, float] = {}
        self._given = (
            kwargs.get("data_collator", rest[0] if rest else None),
            kwargs.get("train_dataset", rest[1] if len(rest) > 1 else None),
        )
        if isinstance(model, str):
            raise TypeError(
                f"model is the name {model!r}; load it first, as with AutoModelForCausalLM.from_pretrained({model!r}): methods "
                "look at a model before the Trainer has it."
            )
        if args.zo_method == "zo_act" and model is not None:
            model = self._with_basis_adapter(model, args)
        if rest:
            super().__init__(model, args, *rest, **kwargs)
        else:  # by name: in TRL's DPOTrainer the second place is another's
            super().__init__(model=model, args=args, **kwargs)
        if args.zo_head_samples:
            self._check_head(self.model)
        self._check_model(self.model)
        warn_of_slow_products(self.model)
        self._engine = self._engine_of(self.model)
        if args.zo_server is not None:
            self._check_served()
            self._server = Server(args.zo_server, self.model)
        self._packing, self._losses_seen = self._packing_of(self.model), LossesSeen()
        self._operations_per_token: int | None = None
        self._dtypes = {name: p.dtype for name, p in self.model.named_parameters()}
        self._resolve_defaults()

    # ---- construction ----------------------------------------------------------------------------------------------

    def _check_model(self, model: nn.Module) -> None:
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError(
                "The model has no trainable parameter (requires_grad is False everywhere); unfreeze some, or add an adapter "
                "with peft.get_peft_model."
            )
        for name, p in trainable.items():
            if not p.dtype.is_floating_point or type(p).__name__ in ("Params4bit", "Int8Params"):
                raise ValueError(
                    f"{name} is quantised ({type(p).__name__}, {p.dtype}) and cannot be trained; freeze it and train a PEFT "
                    "adapter on top."
                )
        if self.args.zo_per_example and not self._loss_is_cross_entropy:
            raise ValueError(
                "zo_per_example=True takes the loss for a mean cross-entropy, and label_smoothing_factor or compute_loss_func "
                "makes it another one. Unset one of them."
            )

    def _resolve_defaults(self) -> None:
        lr, eps = recommended(self.args.zo_method, trained_kind(self.model), bool(self.args.zo_head_samples))
        if self.args.learning_rate is None:
            self.args.learning_rate = lr
            self._warn_of_default_rate(lr)
        if self.args.zo_eps is None:
            self.args.zo_eps = eps
        logger.info(
            "%s with learning_rate=%g, zo_eps=%g, seed of directions %s",
            self.args.zo_method,
            self.args.learning_rate,
            self.args.zo_eps,
            self.args.direction_seed,
        )

    def _warn_of_default_rate(self, rate: float) -> None:
        """Say so where the default rate is not meant for use as it is."""
        usual = default_optim(self.args.zo_method)
        if self.args.optim != usual:
            logger.warning(
                "learning_rate is %g by default, which is for optim=%r, and optim is %r: set it.", rate, usual, self.args.optim
            )
        elif self.args.zo_method != "zo_act":
            logger.warning(
                "learning_rate is %g by default, the published one for models of billions of parameters. Small models want "
                "10 to 30 times as much (README, Which rate?).",
                rate,
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Prepare models as for evaluation: no DistributedDataParallel, whose gradient buckets would double the memory."""
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # asked for by the launcher's configuration
            name = "deepspeed" if self.is_deepspeed_enabled else "fsdp"
            raise ValueError(
                f"{name} is enabled by the launcher, but cannot work without a backward pass; use plain processes."
            )
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's; with ``zo_parallel="directions"`` every process reads all of it."""
        if self.args.zo_parallel == "data" or self.accelerator.num_processes == 1:
            return super().get_train_dataloader()
        sharding = self.accelerator.prepare_data_loader
        self.accelerator.prepare_data_loader = self._prepare_whole_data
        try:
            return super().get_train_dataloader()
        finally:
            self.accelerator.prepare_data_loader = sharding

    def _prepare_whole_data(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> DataLoader:
        """What accelerate prepares for a single process: every batch, on the device."""
        return prepare_data_loader(
            dataloader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            use_seedable_sampler=True,
            data_seed=self.args.data_seed,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build estimator, runtime and `ZOOptimizer` over the trainable parameters, in the Trainer's decay groups."""
        if isinstance(getattr(self.optimizer, "optimizer", self.optimizer), ZOOptimizer):
            return self.optimizer  # train() again, or a retry with a smaller batch
        model = self.model if model is None else model
        if self._packing.model is not model:
            self._engine = self._engine_of(model)
            self._packing = self._packing_of(model)
        self._prepared = self._prepare_start(model)
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # Resuming has loaded the weights by now, and PEFT loads a 16-bit adapter as fp32: the values are the same, but the
        # run would go on with other roundings.
        for name, p in params.items():
            p.data = p.data.to(self._dtypes.get(name, p.dtype))
        inner = self.optimizer
        if inner is not None:
            leave_out_frozen(inner, list(params.values()))
        elif self.args.optim != "sgd" or self.optimizer_cls_and_kwargs is not None:
            inner = super().create_optimizer()
        decayed = set(self.get_decay_parameter_names(model))
        groups = [
            {"params": chosen, "lr": self.args.learning_rate, "weight_decay": decay}
            for decay, chosen in (
                (self.args.weight_decay, [p for name, p in params.items() if name in decayed]),
                (0.0, [p for name, p in params.items() if name not in decayed]),
            )
            if chosen
        ]
        estimator: Estimator = METHODS[self.args.zo_method](space_of(params), **self.args.estimator_kwargs())
        # A compiled model calls no hooks: without the model, the runtime mutates weights in place and restores them.
        runs = self._packing.runs if self.args.zo_per_example else None
        owner = None if self.args.torch_compile else model
        self._runtime = TorchRuntime(params, self.args.zo_restore, owner, runs, sharing=self._measures_labels)
        self.optimizer = ZOOptimizer(groups, {p: name for name, p in params.items()}, estimator, inner)
        self.optimizer.forward_passes = self._prepared
        self._agree_on_weights(model)
        if self.args.zo_trajectory:
            self._zo_optimizer.register_step_post_hook(self._record)
            self._open_log()
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; callbacks that look at the trainer get to know it first."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ZOTrainerCallback):
                callback.trainer = self
        self._losses_seen, self._operations_per_token = LossesSeen(), None  # the model may be another one, or cast
        self._level = 0
        return super().train(*args, **kwargs)

    # ---- the step --------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; a new window begins, also after a retry that gave up the last one.

        A run that resumes from its last checkpoint has no step left, which the Trainer looks at after the next one.
        """
        self._window = []
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Collect a micro-batch; with the last one of the window, estimate and stage. Weights end as they began.

        Returns the loss of the whole window with its last micro-batch and zero before: the Trainer adds them up.
        """
        model.train()  # as in the Trainer's step: others tell by it whether a loss is one of training; probes turn dropout off
        self._window.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        window, self._window = self._window, []
        if self._log is not None and len(self._log.trajectory.steps) != self.state.global_step:
            self._open_log()  # the loop began anew: train() again, or a retry with smaller batches
        if self._server is not None and (self._log is None or self._served is not self._log):
            self._start_server()
        optimizer = self._zo_optimizer
        frozen = next((name for name, p in optimizer.params.items() if not p.requires_grad), None)
        if frozen is not None:
            raise ValueError(
                f"{frozen} was frozen after training began, and would go on being trained; freeze it before train()."
            )
        if self.accelerator.num_processes > 1 and (self.state.global_step + 1) % measurement.AGREEMENT_EVERY == 0:
            self._check_agreement(optimizer.params)
        losses_of_step: list[float] = []
        self._losses = losses_of_step
        step, server = self.state.global_step, self._server
        served = iter(server.losses(step, window, num_items_in_batch) if server is not None else ())

        def oracle(probes: Sequence[Probe]) -> list[float]:
            if server is not None:
                losses = list(itertools.islice(served, len(probes)))
            else:
                losses = self._measure(model, probes, window, num_items_in_batch)
            losses_of_step.extend(losses)
            return self._finite(losses)

        try:
            # Probes rewind what they draw; so must what is tried on the first batch.
            with torch.no_grad(), evaluation_mode(self.model), Randomness(optimizer.params.values()):
                estimate = optimizer.estimator.estimate(self.state.global_step, oracle)
        except NonFiniteLossError as error:
            if self.args.zo_nonfinite == "raise":
                raise
            logger.warning("Step %d is skipped: %s", self.state.global_step, error)
            optimizer.stage(None, optimizer.estimator.measured(len(self._losses)))
        else:
            optimizer.stage(estimate, optimizer.estimator.measured(len(self._losses)))
            self._last_loss = estimate.loss
            self._metrics_of_step = {
                "zo/projected_gradient": estimate.projected_gradients[-1],
                "zo/scale": estimate.scale,
                # E s^2 is the squared gradient norm for directions of unit variance
                "grad_norm": math.sqrt(sum(s * s for s in estimate.projected_gradients) / len(estimate.projected_gradients)),
            }
            self._warn_of_level_losses(losses_of_step)
            if self._engine is not None and self.state.global_step == 0:
                self._warn_of_rounding(self._engine.rounding, 2 * optimizer.estimator.eps * self._metrics_of_step["grad_norm"])
        empty_cache_steps = self.args.torch_empty_cache_steps
        if empty_cache_steps is not None and self.state.global_step % empty_cache_steps == 0:
            clear_device_cache()
        # A skipped step reports the loss of the step before it; zo/skipped_steps tells them apart. The very first has only its
        # own finite losses, and without any 0: the Trainer adds losses up, and NaN would stay in the sum for good.
        if math.isnan(self._last_loss):
            finite = [loss for loss in losses_of_step if math.isfinite(loss)]
            return torch.tensor(sum(finite) / max(len(finite), 1), device=self.args.device)
        return torch.tensor(self._last_loss, device=self.args.device)

    def _warn_of_level_losses(self, losses: Sequence[float]) -> None:
        """Say once that probes do not differ, if they have not done so since the start."""
        self._level = self._level + 1 if min(losses) == max(losses) else -math.inf
        if self._level == LEVEL_STEPS:
            logger.warning(
                "In the first %d steps the loss was the same at every probe, so that nothing is learnt: zo_eps=%g is too small "
                "for these weights or for an objective of steps, or the loss does not depend on the weights, as one that "
                "detaches them (policy gradients do).",
                LEVEL_STEPS,
                self._zo_optimizer.estimator.eps,
            )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The Trainer's; where an evaluation asks for the chosen options alone, also the form in which nothing is wasted."""
        inputs = super()._prepare_inputs(inputs)
        chosen = self.preprocess_logits_for_metrics is option_predictions and "inputs" not in self.args.include_for_metrics
        return self._packed(inputs) if chosen and not self.model.training else inputs

    def _finite(self, losses: list[float]) -> list[float]:
        """Pass finite losses on. All ranks see the same numbers here, so they decide alike."""
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise NonFiniteLossError(
                    f"The loss at probe {i + 1} of {len(losses)} is {loss} (step {self.state.global_step}, "
                    f"learning_rate={self.args.learning_rate}, zo_eps={self.args.zo_eps}). The weights are restored. Lower the "
                    "learning rate or set zo_clip if the loss was growing; look at the batch if it came suddenly (one "
                    "without any label has no loss); or set zo_nonfinite='skip'."
                )
        return losses

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A card that tells of this run (`hf_zo.hub`), instead of the Trainer's, which would name a first-order optimizer.

        Args:
            *args: the Trainer's, without effect.
            **kwargs: the Trainer's; ``license``, ``language``, ``tags``, ``model_name``, ``tasks``, ``dataset_tags`` (the data
                set's id on the Hub) and ``dataset`` (its name) are used, of lists of the last three the first.
        """
        if self.is_world_process_zero() and isinstance(getattr(self.optimizer, "optimizer", self.optimizer), ZOOptimizer):
            told = {key: kwargs.get(key) for key in ("license", "language", "tags", "model_name")}
            for key, name in (("task_type", "tasks"), ("dataset", "dataset_tags"), ("dataset_name", "dataset")):
                value = kwargs.get(name)
                told[key] = next(iter(value), None) if isinstance(value, list) else value
            card_of(self).write(str(self.args.output_dir), **{key: value for key, value in told.items() if value is not None})

    # ---- reports ---------------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        """The root mean square projected gradient: there is no gradient whose norm the Trainer could take."""
        return self._metrics_of_step.get("grad_norm")

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Two operations per token, parameter and forward pass; the Trainer counts six for forward and backward.

        It also counts the parameters anew at every step, which takes as long as the rest of its loop.
        """
        tokens = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if tokens is None:
            return 0  # as the Trainer does
        if self._operations_per_token is None:
            self._operations_per_token = super().floating_point_ops(inputs) // max(tokens.numel(), 1)
        return self._operations_per_token * tokens.numel() * self._zo_optimizer.estimator.forwards // 3

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the step's own numbers to the training logs, and what was spent to the summary."""
        optimizer = self._zo_optimizer if "loss" in logs or "train_runtime" in logs else None
        if optimizer is not None:
            logs["zo/forward_passes"], logs["zo/skipped_steps"] = optimizer.forward_passes, optimizer.skipped_steps
        if optimizer is not None and "loss" in logs:
            if not self._metrics_of_step:  # all steps so far were skipped: the sum of their losses tells nothing
                logs["loss"] = math.nan
            else:
                scale = self._metrics_of_step["zo/scale"]
                logs.setdefault("grad_norm", self._metrics_of_step["grad_norm"])  # not every version asks `_get_grad_norm`
                logs["zo/projected_gradient"] = self._metrics_of_step["zo/projected_gradient"]
                logs["zo/effective_learning_rate"] = logs.get("learning_rate", optimizer.param_groups[0]["lr"]) * scale
            if self._packing.real:
                logs["zo/computed_per_real_token"] = self._packing.computed / self._packing.real
        super().log(logs, *args, **kwargs)


class ZOTrainer(ZOTrainerMixin, Trainer):
    """Drop-in for `transformers.Trainer` that fine-tunes with forward passes only.

    Takes what `Trainer` takes, with `ZOTrainingArguments`, and ``objective_fn`` (see `ZOTrainerMixin`). ``optimizers`` may
    hold any torch optimizer over the model's parameters; it is fed the estimate as ``.grad``.
    """


def trained_kind(model: nn.Module) -> Trained:
    """What a model's trainable parameters are, as the recommended settings distinguish it."""
    if virtual_tokens(model):
        return "prefix"
    return "lora" if getattr(model, "peft_config", None) else "full"
