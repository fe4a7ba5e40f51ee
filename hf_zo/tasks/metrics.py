"""Metrics as `evaluate` modules that ship with the package, so that computing one needs no network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from .generation import decode_answers
from .templates import Row, Task
from .text import exact_match, token_f1


def _f1(predictions: np.ndarray, references: np.ndarray, positive: int) -> float:
    said, wanted = predictions == positive, references == positive
    both = float((said & wanted).sum())
    return 2 * both / max(float(said.sum() + wanted.sum()), 1.0)


class OptionMetrics(evaluate.Metric):
    """Accuracy, F1 of option 1, macro F1, Matthews correlation and, over groups of rows, exact match."""

    def _info(self) -> evaluate.MetricInfo:
        features = {name: datasets.Value("int64") for name in ("predictions", "references", "groups")}
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(
        self, predictions: Sequence[int], references: Sequence[int], groups: Sequence[int], names: Sequence[str]
    ) -> dict[str, float]:
        said, wanted = np.asarray(predictions), np.asarray(references)
        of_group: dict[int, list[bool]] = defaultdict(list)
        for group, right in zip(groups, said == wanted, strict=True):
            of_group[group].append(bool(right))
        spread = float(np.sqrt(said.var() * wanted.var())) if set(said) | set(wanted) <= {0, 1} else 0.0
        covariance = float((said * wanted).mean() - said.mean() * wanted.mean())
        every = {
            "accuracy": float((said == wanted).mean()),
            "f1": _f1(said, wanted, 1),
            "macro_f1": float(np.mean([_f1(said, wanted, c) for c in sorted({*said.tolist(), *wanted.tolist()})])),
            "matthews_correlation": covariance / spread if spread > 0 else 0.0,
            "exact_match": float(np.mean([all(rights) for rights in of_group.values()])),
        }
        return {name: every[name] for name in names}


class AnswerMetrics(evaluate.Metric):
    """Exact match and token F1 of answers, each against the best of its references."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {
            "exact_match": float(np.mean([max(exact_match(p, r) for r in refs) for p, refs in pairs])),
            "f1": float(np.mean([max(token_f1(p, r) for r in refs) for p, refs in pairs])),
        }


def metrics_for(
    task: Task, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A ``compute_metrics`` for the Trainer.

    Args:
        task: names the metrics.
        rows: the evaluated rows, in order; needed for groups, entities and reference answers.
        tokenizer: decodes generated answers.
    """
    options, answers = OptionMetrics(keep_in_memory=True), AnswerMetrics(keep_in_memory=True)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        said = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        if task.answers is not None:
            assert tokenizer is not None
            texts = decode_answers(said, tokenizer)
            return answers.compute(predictions=texts, references=[task.answers(row) for row in rows[: len(texts)]])
        if task.name == "record":
            texts = [row["entities"][i] for row, i in zip(rows, said, strict=False)]
            return answers.compute(predictions=texts, references=[row["answers"] for row in rows[: len(texts)]])
        labels = prediction.label_ids
        if isinstance(labels, dict):
            labels = labels["target"]
        if said.ndim == 2:  # class logits of a plain head
            said = said.argmax(-1)
        groups = list(range(len(said)))
        if task.group is not None:
            numbers: dict[Hashable, int] = {}
            groups = [numbers.setdefault(task.group(row), len(numbers)) for row in rows[: len(said)]]
        return options.compute(predictions=said, references=labels, groups=groups, names=task.metrics)

    return compute
