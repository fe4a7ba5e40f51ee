"""What a run does before its first step: ZO-Act's adapter and its basis, the fit of the output layer and of middle blocks.

Both are made from training rows, the same on every process, and are part of the start of a run: a run that is resumed with its
weights has them, one that is walked to along its trajectory makes them again.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed
from peft import PeftModel
from torch import nn
from torch.utils.data import IterableDataset

from .adapters import attach, basis_of, calibrate, check_basis, draw_basis, freeze_basis, freeze_output_layer
from .anatomy import adapted_layers, adapted_lm_head, factors_of
from .checkpoints import is_weightless
from .depth import DepthError, attention_outputs, fit_depth
from .engine_runs import EngineRuns
from .head import HeadFit, fit_head, fittable, output_layer
from .objectives import example_count, logits_of
from .packing import Packing, numbered
from .runtimes.torch import Randomness, evaluation_mode
from .tasks.scoring import OptionLabels, option_scores
from .training_args import AUTO_DEPTH_OPTIONS, AUTO_HEAD_SAMPLES, ZOTrainingArguments

logger = logging.getLogger(__name__)

_ROWS_KEY = 5029  # of the draw of training rows, the same in every run and on every process


class Preparation(EngineRuns):
    """What `ZOTrainerMixin` does before the first step."""

    _packing: Packing
    _calibrated = False
    _brings_adapter = False  # ZO-Act's was passed
    _brings_fit = False  # an adapter that was passed has been trained already
    _given: tuple[Any, Any] = (None, None)  # data collator and training rows, before the Trainer has them

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The Trainer's, with ZO-Act's adapter where that is the method."""
        model = super().call_model_init(*args, **kwargs)
        if self.args.zo_method == "zo_act":
            model = self._with_basis_adapter(model, self.args)
        self._brings_fit = self._is_trained(model)
        return model

    def _with_basis_adapter(self, model: nn.Module, args: ZOTrainingArguments) -> nn.Module:
        """Before the Trainer sees the model: a quantised one is refused without an adapter."""
        if isinstance(model, PeftModel):
            check_basis(model)
        if args.zo_auto:
            collator, data = self._given
            wanted = AUTO_HEAD_SAMPLES if args.zo_head_samples is None else args.zo_head_samples
            possible = wanted > 0 and args.zo_runtime == "torch" and data is not None
            options = fittable(model, collator, drawn(data, wanted)) if possible else None
            self._decides_depth = self._decides_depth or args.zo_fit_depth is None
            if self._decides_depth:
                args.zo_fit_depth = 0 < (options or 0) <= AUTO_DEPTH_OPTIONS
            if args.zo_fit_depth and not options:
                raise ValueError(
                    "zo_fit_depth=True goes on from a fit of the output layer, which zo_method='auto' cannot make here: that "
                    "takes a classifier, or prompts whose options differ in their last token alone, rows of several of "
                    "them, zo_runtime='torch', and zo_head_samples above 0. Unset it."
                )
            if options is not None or args.zo_head_samples is None:
                args.zo_head_samples = 0 if options is None else wanted
            said = "zo_method='auto': ZO-Act, with zo_head_samples=%d and zo_fit_depth=%s."
            logger.info(said, args.zo_head_samples, args.zo_fit_depth)
        self._calibrated = self._brings_adapter = isinstance(model, PeftModel)
        if isinstance(model, PeftModel):
            freeze_basis(model)
            rank = getattr(model.active_peft_config, "r", None)
            if args.zo_act_rank not in (ZOTrainingArguments.zo_act_rank, rank):
                raise ValueError(
                    f"zo_act_rank={args.zo_act_rank}, but the adapter that was passed has rank {rank}; leave it unset."
                )
            return model
        targets = args.zo_act_targets
        return attach(
            model,
            args.zo_act_rank,
            targets if targets in ("all-linear", "one-block") else targets.split(","),
            with_head=bool(args.zo_head_samples),
        )

    def _check_head(self, model: nn.Module) -> None:
        """Refuse ``zo_head_samples`` where there is no output layer to fit, and leave what is fitted out of the training."""
        output_layer(model)
        freeze_output_layer(model)
        self._brings_fit = self._is_trained(model)

    def _is_trained(self, model: nn.Module) -> bool:
        """Whether what would be fitted has been trained before: the output layer's adapter, or that of ZO-Act."""
        head = adapted_lm_head(model)
        layers = [layer for _, layer in adapted_layers(model)] if self.args.zo_method == "zo_act" else []
        return any(bool(factors_of(layer)[1].any()) for layer in [*layers, *([] if head is None else [head])])

    def _prepare_start(self, model: nn.Module) -> int:
        """Calibrate and fit, unless resuming has loaded the weights; returns the forward passes that took."""
        starts = self._resume_from is None or is_weightless(self._resume_from)
        passes: list[None] = []
        counting = model.register_forward_hook(lambda *_: passes.append(None))
        try:
            if self.args.zo_method == "zo_act":
                freeze_basis(model)  # resuming has loaded the adapter as trainable
                if starts and not self._calibrated:
                    self._calibrate()
            if self.args.zo_head_samples:
                freeze_output_layer(model)
                if starts:
                    self._fit_head()
        finally:
            counting.remove()
        return len(passes)

    def _calibrate(self) -> None:
        """Make ZO-Act's basis from training rows, the same on every process, and leave all random states alone."""
        if self.args.zo_act_basis == "random":
            draw_basis(self.model, self.args.direction_seed)
            self._calibrated = True
            return
        with evaluation_mode(self.model), Randomness(self.model.parameters()):
            batches = self.training_batches(self.args.zo_act_samples)
            captured = calibrate(
                self.model,
                batches,
                self.plain_forward,
                seed=self.args.direction_seed,
                exclude_first_token=self.args.zo_act_exclude_first_token,
            )
        self._calibrated = True
        shares = sorted(captured.values())
        logger.info(
            "ZO-Act: bases of %d layers from %d batches keep %.0f %% of their inputs' energy (median; least %.0f %%).",
            len(shares),
            len(batches),
            100 * shares[len(shares) // 2],
            100 * shares[0],
        )

    def _fit_head(self) -> None:
        """Fit the output layer to training rows, the same on every process, and leave all random states alone."""
        self._fits = {}
        if self._brings_fit:
            self._fits["output layer"] = "of the adapter that was passed, not fitted again"
            logger.info("The adapter that was passed is trained already: the output layer is not fitted again.")
            return
        head = adapted_lm_head(self.model)
        fitted = list(output_layer(self.model).parameters() if head is None else factors_of(head))
        start = [p.detach().clone() for p in fitted]
        with evaluation_mode(self.model), Randomness(self.model.parameters()), torch.no_grad():
            try:
                self._fit()
            except BaseException:  # whoever tries again starts from the same layer
                for p, old in zip(fitted, start, strict=True):
                    p.copy_(old)
                raise

    def _fit(self) -> None:
        assert self.args.zo_head_samples
        if not (self._loss_is_the_trainers() and self._loss_is_cross_entropy):
            logger.warning(
                "The output layer is fitted by plain cross-entropy; the loss that you have set acts on the steps alone."
            )
        batches = self.training_batches(self.args.zo_head_samples)
        # Options are put together anew, and their tokens have to be known by example; a loss of one's own is told no numbers.
        if self.args.zo_fit_depth and self._loss_is_the_trainers():
            batches = [numbered(batch, 0) if isinstance(batch.get("labels"), OptionLabels) else batch for batch in batches]
        batches = [self._packed(batch) for batch in batches]
        try:
            found = fit_head(self.model, batches, self._logits)
        except ValueError as error:
            if not self.args.zo_auto:
                raise
            raise ValueError(f"zo_method='auto' cannot fit the output layer: set zo_method='zo_act'. {error}") from error
        logger.info("The output layer: %s", _told(found.facts))
        self._note_fit("output layer", f"fitted to {sum(map(example_count, batches)):,} rows first", found.facts)
        if self.args.zo_fit_depth:
            try:
                facts = self._fit_depth(batches, found)
                logger.info("The middle blocks: %s", _told(facts))
                self._note_fit("middle blocks", "a direction each, fitted to the same rows", facts)
            except DepthError as error:
                if not self._decides_depth:
                    raise
                self.args.zo_fit_depth = False
                logger.warning("zo_method='auto' leaves the middle blocks as they are. %s", error)

    def _note_fit(self, what: str, fitted: str, facts: Mapping[str, float]) -> None:
        assert self._fits is not None
        better = facts["loss_after"] < facts["loss_before"]
        self._fits[what] = fitted if better else "as before: fitted to some rows, it predicted others worse"

    def _fit_depth(self, batches: list[dict[str, Any]], found: HeadFit) -> dict[str, float]:
        """Continue the fit in the middle blocks.

        Raises:
            DepthError: see `hf_zo.depth.fit_depth`; also for batches of something else than tokens.
        """
        if "input_ids" not in batches[0]:
            raise DepthError(f"zo_fit_depth=True moves tokens, and a batch holds {', '.join(batches[0])}. Unset it.")
        if getattr(batches[0]["labels"], "ndim", 1) > 1:
            raise DepthError("zo_fit_depth=True moves the scores of classes or options, and answers are free text. Unset it.")
        if isinstance(batches[0]["labels"], OptionLabels) and not self._loss_is_the_trainers():
            raise DepthError(
                "zo_fit_depth=True follows the tokens of options, which a compute_loss of your own hides. Unset it."
            )
        last: Mapping[str, Any] = {}
        options = found.left_out.shape[1]

        def scores(batch: Mapping[str, Any]) -> torch.Tensor:
            nonlocal last
            last, labels = batch, batch["labels"]
            logits = self._logits(batch)
            # Of options of several tokens there are columns to spare.
            return option_scores(logits, labels)[:, :options] if isinstance(labels, OptionLabels) else logits

        def rows(tokens: int) -> torch.Tensor:
            mask, labels = last.get("attention_mask"), last["labels"]
            if isinstance(labels, OptionLabels):
                row = torch.full((tokens,), -1, device=self.args.device)
                for begin, end, example in self._packing.runs(tokens):
                    row[begin:end] = example
            elif tokens % len(labels):
                raise DepthError(f"zo_fit_depth=True: a layer sees {tokens} tokens of {len(labels)} examples. Unset it.")
            else:
                row = torch.arange(len(labels), device=self.args.device).repeat_interleave(tokens // len(labels))
            return row if mask is None or mask.numel() != tokens else row.where(mask.flatten().bool(), -1)

        return fit_depth(attention_outputs(self.model), batches, found, scores, rows, seed=self.args.direction_seed)

    def training_batches(self, wanted: int) -> list[dict[str, Any]]:
        """``wanted`` training rows, collated and on the device, in batches of the training's size."""
        rows = self._training_rows(wanted)
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        size = self._train_batch_size
        return [self._prepare_inputs(collate(rows[i : i + size])) for i in range(0, len(rows), size)]

    def _packed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch by options in the form in which nothing is wasted (`Packing`); others as they are."""
        if not isinstance(inputs.get("labels"), OptionLabels):
            return inputs
        with torch.no_grad():
            return self._packing(inputs, lambda batch: self.compute_loss(self.model, batch))  # type: ignore[arg-type, return-value]

    def plain_forward(self, inputs: Mapping[str, Any]) -> None:
        """One forward pass as training makes it, under the weights as they stand and by the model's own layers."""
        with self.compute_loss_context_manager():
            if self._objective_fn is not None:
                self._objective_fn(self.model, inputs)
            elif self._engine is not None:
                super().compute_loss(self.model, dict(inputs))
            else:
                self.compute_loss(self.model, dict(inputs))

    def _logits(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """What the model makes of a prepared batch."""
        with self.compute_loss_context_manager():
            return logits_of(self.compute_loss(self.model, dict(inputs), return_outputs=True)[1])

    def _training_rows(self, wanted: int) -> list[Any]:
        """``wanted`` training rows, see `drawn`."""
        if self.train_dataset is None:
            raise ValueError("The trainer needs a train_dataset: ZO-Act's basis and zo_head_samples start from training rows.")
        return list(drawn(self.train_dataset, wanted))

    def _agree_on_weights(self, model: nn.Module) -> None:
        """Start from rank 0's weights everywhere; from then on equal losses keep the ranks equal."""
        if self.accelerator.num_processes > 1:
            trained = [p for p in model.parameters() if p.requires_grad]
            bases = [basis_of(layer) for _, layer in adapted_layers(model)] if self.args.zo_method == "zo_act" else []
            head = adapted_lm_head(model) if self.args.zo_head_samples else None
            for p in [*trained, *bases, *(() if head is None else factors_of(head))]:
                whole = p.detach().contiguous()
                torch.distributed.broadcast(whole.view(-1).view(torch.uint8), src=0)
                if whole.data_ptr() != p.data_ptr():
                    p.data.copy_(whole)


def _told(facts: Mapping[str, float]) -> str:
    """What a fit has come to, for the log."""
    change = f"{facts['loss_before']:.3f} to {facts['loss_after']:.3f}"
    return f"fitted to {facts['rows']:g} predictions with ridge {facts['ridge']:g}, loss of left-out ones from {change}."


def drawn(data: Any, wanted: int) -> Iterator[Any]:
    """``wanted`` rows of a data set, read as they are asked for: drawn at random, the first ones of a stream.

    Any regular choice would meet data in which classes alternate, and see one of them.
    """
    if isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return itertools.islice(iter(data), wanted)
    order = np.random.default_rng(_ROWS_KEY).permutation(len(data))[:wanted]
    return (data[int(i)] for i in order)
