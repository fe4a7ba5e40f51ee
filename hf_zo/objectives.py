"""What a probe measures: the training loss, or a score that has no gradient.

An objective is a function ``(trainer, model, inputs) -> value``, to be minimised: the mean over the examples of the batch.
Scores are therefore turned around (``1 - accuracy``). Both are step functions of the weights: at a small radius most
differences are exactly zero, so use a large ``zo_eps`` and a large batch.

Register your own in `OBJECTIVES`, or pass ``ZOTrainer(objective_fn=...)`` a function ``(model, inputs) -> value``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .anatomy import shifts_labels
from .tasks.generation import greedy_answers, reference_answers
from .tasks.scoring import OptionLabels, option_predictions, option_scores
from .tasks.text import token_f1

Objective = Callable[[Any, nn.Module, Mapping[str, Any]], torch.Tensor]


def label_count(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor | int:
    """How many items the mean loss of a batch is a mean of: label tokens, or examples where a label is per example."""
    labels = inputs.get("labels")
    if isinstance(labels, torch.Tensor) and not labels.dtype.is_floating_point:
        if labels.ndim > 1 and shifts_labels(model):
            labels = labels[..., 1:]
        return labels.ne(-100).sum()
    return example_count(inputs)


def example_count(inputs: Mapping[str, Any]) -> int:
    """Number of examples in a batch: the length of its first tensor, as the Trainer counts them."""
    labels = inputs.get("labels")
    if isinstance(labels, OptionLabels):
        return len(labels["target"])
    return next((len(v) for v in inputs.values() if isinstance(v, torch.Tensor) and v.ndim), 1)


def logits_of(outputs: Any) -> torch.Tensor:
    """The logits among what ``compute_loss`` returns beside the loss.

    Args:
        outputs: of a model, a tuple that begins with the loss, or the logits alone.
    """
    if isinstance(outputs, torch.Tensor):
        return outputs
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[1]


def contributions(
    model: nn.Module, logits: torch.Tensor, inputs: Mapping[str, Any], num_items: torch.Tensor | int | None, score: str
) -> torch.Tensor:
    """What every item of a batch (an example with options, a class, a label token) adds to its loss, fp32, flattened.

    Args:
        model: the model, which tells whether its labels are shifted.
        logits: what it made of the batch.
        inputs: the batch.
        num_items: what the loss divides the sum over its items by; None for the number of items.
        score: ``"loss"``, or ``"accuracy"`` for what every item adds to one minus the accuracy.
    """
    labels = inputs["labels"]
    if isinstance(labels, OptionLabels):
        if score == "accuracy":
            return option_predictions(logits, labels).ne(labels["target"]).float() / len(labels["target"])
        return nn.functional.cross_entropy(option_scores(logits, labels), labels["target"], reduction="none") / len(
            labels["target"]
        )
    if "shift_labels" in inputs:
        labels = inputs["shift_labels"]
    elif labels.ndim > 1 and shifts_labels(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits.flatten(0, -2), labels.flatten()
    if score == "accuracy":
        items = (logits.argmax(-1).ne(labels) & labels.ne(-100)).float()
    else:
        items = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return items / (labels.ne(-100).sum() if num_items is None else num_items)


_NO_CLASSES = "zo_objective='accuracy' needs one class as the label of each example or token; set it to 'loss'."


def accuracy(trainer: Any, model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """One minus the share of right predictions: per example for options and classes, per label token for language models.

    Raises:
        ValueError: if labels are missing, or no classes, such as the numbers of a regression or several labels at once.
    """
    labels = inputs.get("labels")
    if labels is None:
        raise ValueError(_NO_CLASSES)
    _, outputs = trainer.compute_loss(model, dict(inputs), return_outputs=True)
    logits = logits_of(outputs)
    if isinstance(labels, OptionLabels):
        predictions, labels = option_predictions(logits, labels), labels["target"]
    elif shifts_labels(trainer.accelerator.unwrap_model(model)):
        logits = logits[:, -labels.shape[1] :]  # without the virtual tokens of prompt tuning
        predictions, labels = logits[:, :-1].argmax(-1), labels[:, 1:]
    else:
        predictions = logits.argmax(-1)
        if labels.dtype.is_floating_point or labels.shape != predictions.shape or logits.shape[-1] < 2:
            raise ValueError(_NO_CLASSES)
    counted = labels.ne(-100)
    right = predictions.eq(labels) & counted
    return 1.0 - right.sum().float() / counted.sum().clamp(min=1)


def f1(trainer: Any, model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """One minus the mean token F1 of greedy answers to the prompts, against the label tokens."""
    tokenizer = trainer.processing_class
    if tokenizer is None:
        raise ValueError("zo_objective='f1' decodes answers: pass the tokenizer as processing_class to the trainer.")
    answers = greedy_answers(trainer.accelerator.unwrap_model(model), inputs, tokenizer)
    scores = [token_f1(a, r) for a, r in zip(answers, reference_answers(inputs, tokenizer), strict=True)]
    return torch.tensor(1.0 - sum(scores) / max(len(scores), 1))


OBJECTIVES: dict[str, Objective | None] = {"loss": None, "accuracy": accuracy, "f1": f1}
