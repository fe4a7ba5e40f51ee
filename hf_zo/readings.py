"""What an output layer reads, what it says and what it should have said, from one forward pass over training rows.

Three kinds of rows are told apart by their labels: classes; `OptionLabels`, of which only options that differ in their last
token alone and are the same for every row can be read; and token ids, free answers of a causal language model.

Of free answers, the options are those tokens, as many as the adapter's rank, about which the model errs most: they are right
and it would choose another, or the other way round. All other tokens are one class more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from .anatomy import factors_of, shifts_labels
from .tasks.scoring import OptionLabels

_PLACES = 4000  # tokens of free answers that a fit looks at: it takes no more of its time than some options would
_CHUNK = 256

Logits = Callable[[Mapping[str, Any]], torch.Tensor]
"""Runs the model on a batch and returns its logits."""


@dataclass
class Readings:
    """What an output layer read and should have said.

    Attributes:
        hidden: [N, D], its inputs, one row for an example; over the number of tokens of an option, as scores are means of them.
            Of free answers, one row for a token.
        scores: [N, K], what it makes of them for the K classes or options; of free answers [N, K + 1], the last for what is not
            among ``tokens``.
        target: [N], the right one.
        tokens: [K], the options' last tokens, or those of free answers; None for classes.
        answer: [N], of free answers, the one that a token belongs to. CPU.
    """

    hidden: torch.Tensor
    scores: torch.Tensor
    target: torch.Tensor
    tokens: torch.Tensor | None
    answer: torch.Tensor | None = None

    @property
    def is_free(self) -> bool:
        """Whether answers are free text."""
        return self.tokens is not None and len(self.tokens) < self.scores.shape[1]


def read(model: nn.Module, layer: nn.Module, batches: Sequence[Mapping[str, Any]], logits: Logits) -> Readings:
    """One forward pass over the batches.

    Raises:
        ValueError: if their labels are neither classes nor such options, nor the token ids of a causal language model, or if
            the model does more to the layer's scores than to multiply them.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    found: list[Readings] = []
    answers: list[_Answers] = []
    free = isinstance(layer, LoraLayer) and shifts_labels(model)
    try:
        for batch in batches:
            said, labels = logits(batch), batch.get("labels")
            if isinstance(labels, OptionLabels):
                found.append(_of_options(*seen[-1], said, labels))
            elif isinstance(labels, torch.Tensor) and labels.ndim == 1 and not labels.dtype.is_floating_point:
                found.append(_of_classes(*seen[-1], said, labels))
            elif free and isinstance(labels, torch.Tensor) and labels.ndim == 2:
                answers.append(_answers_of(*seen[-1], said, labels, -(-_PLACES // len(batches)), len(answers)))
            else:
                raise ValueError(
                    "zo_head_samples needs labels that are classes, options of a prompt, or token ids of a causal language "
                    "model; set it to 0."
                )
            seen.clear()
    finally:
        handle.remove()
    if answers:
        return _of_answers(layer, answers)
    tokens = [r.tokens for r in found if r.tokens is not None]
    if any(not torch.equal(t, tokens[0]) for t in tokens):
        raise ValueError(_VARYING)
    return Readings(
        torch.cat([r.hidden for r in found]),
        torch.cat([r.scores for r in found]),
        torch.cat([r.target for r in found]),
        tokens[0] if tokens else None,
    )


_VARYING = "zo_head_samples needs options that differ in their last token alone and are the same for every row; set it to 0."


class _Common(NamedTuple):
    """Options that differ in their last token alone and are the same in every example: where that token is predicted."""

    row: torch.Tensor  # [B]
    from_end: torch.Tensor  # [B]
    tokens: torch.Tensor  # [K]
    length: int  # tokens of an option


def common_options(labels: OptionLabels) -> _Common | None:
    """None if they are not of that kind."""
    scored = labels["scored"]
    count = int(scored[0, :, 3].max()) + 1
    if scored.shape[1] % count:
        return None
    key = scored[..., 3] * (scored[..., 1].max() + 1) - scored[..., 1]  # by option, its first token first
    scored = scored.gather(1, key.argsort(1)[..., None].expand_as(scored)).unflatten(1, (count, -1))
    row, from_end, token, option = scored.unbind(-1)  # [B, K, tokens of an option] each
    once = (option == torch.arange(count, device=option.device)[:, None]).all()
    together = (row == row[:, :1, :1]).all() and (from_end == from_end[:, :1]).all()
    same = (token[..., :-1] == token[:, :1, :-1]).all() and (token[..., -1] == token[:1, :, -1]).all()
    if not (once and together and same):
        return None
    return _Common(row[:, 0, 0], from_end[:, 0, -1], token[0, :, -1], token.shape[-1])


def _factor(output: torch.Tensor, logits: torch.Tensor) -> float:
    """What the model multiplies its output layer's scores by, as Granite and Cohere do; 1 for most.

    Raises:
        ValueError: if it does something else to them, as Gemma 2, whose scores have a bound.
    """
    output, logits = output.float(), logits.float()
    if torch.equal(output, logits):
        return 1.0
    factor = (output * logits).sum() / output.square().sum()
    if not (logits - factor * output).abs().max() <= 0.01 * logits.abs().max():
        raise ValueError(
            "zo_head_samples fits an output layer whose scores are the model's logits, or a multiple of them, and here they "
            "are not: a model with final_logit_softcapping, for example. Set it to 0."
        )
    return float(factor)


def _of_options(hidden: torch.Tensor, output: torch.Tensor, logits: torch.Tensor, labels: OptionLabels) -> Readings:
    options = common_options(labels)
    if options is None:
        raise ValueError(_VARYING)
    place = options.row, logits.shape[1] - options.from_end
    inputs, scores = hidden[place].float(), logits[place][:, options.tokens].float()
    inputs *= _factor(output[place][:, options.tokens], scores)
    return Readings(inputs / options.length, scores / options.length, labels["target"], options.tokens)


def _of_classes(hidden: torch.Tensor, output: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> Readings:
    if (labels < 0).any():
        raise ValueError("zo_head_samples: some training rows have a label below 0, which is no class. Leave them out.")
    if output.ndim == 3:  # a score of every position, of which the model picked one
        same = (output == logits[:, None]).all(-1)
        if same.all() or not same.any(-1).all():
            raise ValueError(
                "zo_head_samples: the scores do not tell which position the model reads, as those of a layer of zeros do not. "
                "Draw its weights (torch.nn.init.normal_), or set it to 0."
            )
        hidden = hidden[torch.arange(len(labels), device=labels.device), same.float().argmax(-1)]
        output = logits
    factor = _factor(output, logits)
    return Readings(hidden.to(torch.float32, copy=True) * factor, logits.float(), labels, None)  # no view of all positions


class _Answers(NamedTuple):
    """Tokens of free answers, at the places where they are predicted."""

    hidden: torch.Tensor  # [n, D]
    target: torch.Tensor  # [n]
    chosen: torch.Tensor  # [n], what the model thinks likeliest
    answer: torch.Tensor  # [n], number of the batch and row
    factor: float


def _answers_of(
    hidden: torch.Tensor, output: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, most: int, key: int
) -> _Answers:
    """At most so many tokens of a batch, drawn by its number."""
    width = labels.shape[1]  # there may be virtual tokens before
    place = (labels[:, 1:] >= 0).nonzero(as_tuple=True)
    drawn = torch.from_numpy(np.random.default_rng(key).permutation(len(place[0]))[:most]).to(labels.device)
    row, column = place[0][drawn], place[1][drawn]
    said = logits[:, -width:][row, column]
    factor = _factor(output[:, -width:][row, column], said)
    answer = (key << 32) + row.cpu()
    return _Answers(hidden[:, -width:][row, column], labels[row, column + 1], said.argmax(-1), answer, factor)


@torch.no_grad()
def _of_answers(layer: nn.Module, answers: Sequence[_Answers]) -> Readings:
    assert isinstance(layer, LoraLayer)
    hidden, target, chosen, answer = (torch.cat(parts) for parts in list(zip(*answers, strict=True))[:4])
    factor = next((part.factor for part in answers if len(part.target)), 1.0)  # a batch without an answer tells none
    a, b = factors_of(layer)
    errors = torch.zeros(len(b), device=hidden.device)
    for tokens in (target, chosen):
        errors += torch.bincount(tokens[target != chosen], minlength=len(errors))
    most = errors.argsort(descending=True, stable=True)[: len(a)]
    tokens = most[errors[most] > 0]
    others = torch.ones_like(errors, dtype=torch.bool).index_fill(0, tokens, False)
    scores = []
    for part in hidden.split(_CHUNK):  # all scores of all tokens would be gigabytes
        x = layer(part).float() * factor
        scores.append(torch.cat([x[:, tokens], x[:, others].logsumexp(1, keepdim=True)], 1))
    number = torch.full_like(errors, len(tokens), dtype=torch.long)
    number[tokens] = torch.arange(len(tokens), device=tokens.device)
    return Readings(hidden.float() * factor, torch.cat(scores), number[target], tokens, answer)
