"""The output layer, fitted to the training rows before the first step: linear probing, then fine-tuning (arXiv 2202.10054).

    W = argmin  mean_i CE(z_i + W h_i, y_i) + ridge / 2 |W|^2        h_i: what the output layer reads, z_i: scores it has now

The hidden states h_i of one forward pass over the rows are all that is needed: the problem is convex and small, and no
gradient passes through the network. What a linear map can learn has an exact gradient; it need not be left to random
directions, whose noise grows with the dimension of all that is trained.

A classifier's new layer gets W as its weights (z = 0; shrinking then is towards zero). A language model that chooses among
options gets it as a LoRA adapter on its output layer, W being the change of the options' rows: A holds the right singular
vectors of W, B the rest, zero in the rows of all other tokens. Both of its factors are frozen from then on. Where the output
layer shares its weights with the input embedding, such an adapter must not be merged (PEFT warns of it).

Where answers are free text, the options are the tokens about which the model errs most (see `hf_zo.readings`); the row of W of
all others is zero. A prompt's format is learnt so: how an answer begins and where it ends.

The ridge, from which a bias is all but free, is chosen by five-fold cross-validation on the rows; the tokens of an answer are
in the same fold. Where that predicts left-out rows no better than the layer as it
is, as with one that was trained before, the layer stays as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from .anatomy import adapted_lm_head, base_of, factors_of, lm_head_name, new_heads, shifts_labels
from .readings import Logits, common_options, read
from .tasks.scoring import OptionCollator

logger = logging.getLogger(__name__)

RIDGES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Tried in this order, per unit of the hidden states' mean square."""

FOLDS = 5

_BIAS = 10.0
"""Multiplies the bias in place of an input: the ridge on it is a hundred times weaker. Without one, a class of one row would
take it to infinity; with the whole, classes of which one is rare would be predicted worse than by their shares."""


@dataclass
class HeadFit:
    """What came of a fit.

    Attributes:
        facts: ``loss_before`` and ``loss_after`` on left-out rows, the chosen ``ridge``, and ``rows``; of free answers, tokens
            in place of rows.
        left_out: [N, K], scores of the rows by fits that have not seen them; of the layer as it is, if it stays so. fp64, CPU.
        target: [N], the right class or option. CPU.
    """

    facts: dict[str, float]
    left_out: torch.Tensor
    target: torch.Tensor


def fit_head(model: nn.Module, batches: Sequence[Mapping[str, Any]], logits: Logits) -> HeadFit:
    """Fit the output layer of ``model`` in place.

    Args:
        model: a sequence classifier whose output layer is trainable, or a language model with a LoRA adapter on it
            (``target_modules`` contains its name).
        batches: training rows with their ``labels``: classes, `OptionLabels` of options that differ in their last token alone
            and are the same for every row, or token ids, -100 where none is asked for, of a causal language model.
        logits: see `Logits`; called once per batch, without gradients.

    Raises:
        ValueError: if there is no such layer, the labels are of another kind, or all the same, or too few.
    """
    layer = output_layer(model)
    seen = read(model, layer, batches, logits)
    if len(seen.target.unique()) < 2 and not seen.is_free:
        raise ValueError(
            f"zo_head_samples: the {len(seen.target)} training rows are all of one class. Shuffle the data, or set it to 0."
        )
    fresh = seen.tokens is None  # a new layer's scores are noise
    offset = torch.zeros_like(seen.scores) if fresh else seen.scores
    bias = fresh and getattr(layer, "bias", None) is not None
    weights, facts, left_out = fitted(seen.hidden, offset, seen.target, bias, seen.answer)
    facts["loss_before"] = float(nn.functional.cross_entropy(seen.scores.double(), seen.target))
    if not facts["loss_after"] < facts["loss_before"]:
        logger.warning("The output layer stays as it was: fitted to some rows, it predicts the others worse.")
        facts["loss_after"], left_out = facts["loss_before"], seen.scores.double().cpu()
    elif seen.tokens is None:
        _write_classes(layer, weights)
    else:
        _write_options(layer, weights[:-1] - weights[-1] if seen.is_free else weights, seen.tokens)
    return HeadFit(facts, left_out, seen.target.cpu())


def fittable(model: nn.Module, collator: Any, rows: Iterable[Any]) -> int | None:
    """Among how many classes or options `fit_head` can be expected to tell, judged by what is there before the Trainer is.

    None if it has nothing to fit; 0 for free answers, whose tokens only the fit finds.

    Args:
        model: of a language model, the base model or one with an adapter on its output layer.
        collator: of the training; prompts with options are known by `OptionCollator`.
        rows: training rows, as the collator takes them; none is read where the model has no place for a fit.
    """
    is_language_model = lm_head_name(model) is not None
    if is_language_model and isinstance(model, PeftModel) and adapted_lm_head(model) is None:
        return None
    if is_language_model and isinstance(collator, OptionCollator):
        prompts = list(rows)
        if len(prompts) < FOLDS:
            return None
        labels = collator(prompts)["labels"]
        common = common_options(labels)
        return None if common is None or len(labels["target"].unique()) < 2 else len(common.tokens)
    if is_language_model:
        answered = [_is_answered(row) for row in rows] if shifts_labels(model) else []
        return 0 if sum(answered) >= FOLDS else None
    trained = _trained_head(base_of(model))
    classes = [_class_of(row) for row in rows] if trained is not None else []
    suffice = len(classes) >= FOLDS and None not in classes and len(set(classes)) > 1
    return trained.out_features if trained is not None and suffice else None


def _class_of(row: Any) -> int | None:
    """The label of a training row, None if it is no class."""
    label = row.get("labels", row.get("label")) if isinstance(row, Mapping) else None
    if isinstance(label, torch.Tensor):
        label = label.item() if label.dtype == torch.long and not label.ndim else None
    return int(label) if isinstance(label, Integral) and label >= 0 else None


def _is_answered(row: Any) -> bool:
    """Whether a training row brings labels that are token ids."""
    labels = row.get("labels") if isinstance(row, Mapping) else None
    ids = labels.tolist() if isinstance(labels, torch.Tensor | np.ndarray) else labels
    return isinstance(ids, list | tuple) and all(isinstance(i, int) for i in ids) and any(i >= 0 for i in ids)


def output_layer(model: nn.Module) -> nn.Module:
    """The linear layer that `fit_head` changes.

    Raises:
        ValueError: if there is none, with what to do.
    """
    layer = adapted_lm_head(model)
    if layer is not None:
        return cast(nn.Module, layer)
    base = base_of(model)
    name = lm_head_name(base)
    if name is not None:
        raise ValueError(f"zo_head_samples fits an adapter on the output layer; add {name!r} to the adapter's target_modules.")
    trained = _trained_head(base)
    if trained is None:
        raise ValueError(
            "zo_head_samples fits the output layer of a language model with an adapter on it, or the trainable `classifier` or "
            f"`score` of a classifier, for two classes at least; {type(base).__name__} has neither. Set it to 0."
        )
    return trained


def _trained_head(base: nn.Module) -> nn.Linear | None:
    """The last linear layer of a classifier's head, if it is trainable and tells classes apart."""
    heads = [head for head in new_heads(base).values() if not isinstance(head, LoraLayer)]
    modules = [m for head in heads for m in head.modules()]
    last = next((m for m in reversed(modules) if isinstance(m, nn.Linear) and m.weight.requires_grad), None)
    return last if last is not None and last.out_features > 1 else None


def fitted(
    hidden: torch.Tensor, offset: torch.Tensor, target: torch.Tensor, bias: bool = False, group: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, float], torch.Tensor]:
    """Multinomial logistic regression with an offset, its ridge chosen by cross-validation; fp64 on the CPU.

    Args:
        hidden: [N, D].
        offset: [N, K].
        target: [N].
        bias: whether the last column of the result multiplies 1 in place of an input.
        group: see `cross_validated`.

    Returns:
        Weights [K, D] (+ 1 with bias), and ``facts`` and ``left_out`` of `HeadFit`.

    Raises:
        ValueError: if a hidden state is not finite, or there are fewer rows than folds.
    """
    x, z, y = hidden.double().cpu(), offset.double().cpu(), target.cpu()
    if not (x.isfinite().all() and z.isfinite().all()):
        raise ValueError(
            "zo_head_samples: what the output layer reads or says is not finite on some training row. Load the model in a "
            "wider dtype, or set it to 0."
        )
    if len(x) < FOLDS:
        raise ValueError(f"zo_head_samples={len(x)}: at least {FOLDS} rows are needed.")
    scale = x.pow(2).mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    x = x / scale
    if bias:
        x = torch.cat([x, torch.full_like(x[:, :1], _BIAS)], 1)
    start = torch.zeros(z.shape[1], x.shape[1], dtype=torch.float64)
    w, facts, left_out = cross_validated(lambda some, w: z[some] + x[some] @ w.T, y, start, group)
    w[:, : hidden.shape[1]] /= scale
    w[:, hidden.shape[1] :] *= _BIAS
    return w, facts, left_out


def cross_validated(
    scores: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    target: torch.Tensor,
    start: torch.Tensor,
    group: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float], torch.Tensor]:
    """Parameters of least penalised cross-entropy, their ridge chosen by cross-validation.

    Args:
        scores: of some rows, given as a mask [N], under parameters of the shape of ``start``: affine in these.
        target: [N].
        start: zeros.
        group: [N], rows of one group are left out together; None where every row stands for itself.

    Returns:
        The parameters, and ``facts`` and ``left_out`` of `HeadFit`.
    """
    fold = torch.empty_like(target)
    if group is None:
        fold[target.argsort(stable=True)] = torch.arange(len(target)) % FOLDS  # every class dealt out in turn
    else:
        fold[:] = group.unique(return_inverse=True)[1] % FOLDS
    losses, left_out = torch.zeros(len(RIDGES), dtype=torch.float64), []
    for k in range(FOLDS):
        out, w = fold == k, start
        for i, ridge in enumerate(RIDGES):
            w = minimum(scores, ~out, target, ridge, w)
            left_out.append(scores(out, w))
            losses[i] += nn.functional.cross_entropy(left_out[-1], target[out], reduction="sum") / len(target)
    best, everything = int(losses.argmin()), fold >= 0
    w = minimum(scores, everything, target, RIDGES[best], start)
    before = float(nn.functional.cross_entropy(scores(everything, start), target))
    facts = {"loss_before": before, "loss_after": float(losses[best]), "ridge": RIDGES[best], "rows": len(target)}
    folds = left_out[best :: len(RIDGES)]
    found = torch.zeros(len(target), folds[0].shape[1], dtype=torch.float64)
    for k, part in enumerate(folds):
        found[fold == k] = part
    return w, facts, found


@torch.enable_grad()
def minimum(
    scores: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    target: torch.Tensor,
    ridge: float,
    start: torch.Tensor,
) -> torch.Tensor:
    """Parameters of least penalised loss on some rows."""
    w = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(scores(rows, w), target[rows]) + ridge / 2 * w.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach()


@torch.no_grad()
def _write_classes(layer: nn.Module, weights: torch.Tensor) -> None:
    assert isinstance(layer, nn.Linear)
    layer.weight.copy_(weights[:, : layer.in_features])
    if layer.bias is not None:
        layer.bias.copy_(weights[:, -1])


@torch.no_grad()
def _write_options(layer: nn.Module, weights: torch.Tensor, tokens: torch.Tensor) -> None:
    assert isinstance(layer, LoraLayer)
    a, b = factors_of(layer)
    left, size, right = torch.linalg.svd(weights.to(a.device), full_matrices=False)
    rank = min(len(a), len(tokens))
    if size[rank:].norm() > 1e-6 * size.norm():
        kept = 100 * float(size[:rank].square().sum() / size.square().sum())
        logger.warning("The output layer's adapter has rank %d and keeps %.0f %% of the fit; give it a higher one.", rank, kept)
    # The other rows of A stay orthonormal to these, as ZO-Act wants them, and B does not read them.
    basis = torch.linalg.qr(torch.cat([right[:rank], a.to(right)]).T).Q[:, : len(a)].T
    basis[:rank] = right[:rank]
    a.copy_(basis)
    b.zero_()
    b[tokens.to(b.device), :rank] = ((left * size)[:, :rank] / layer.scaling[layer.active_adapters[0]]).to(b)
