"""The fit of the output layer, continued into the depth of the network: `hf_zo.head` finds what a linear map of the last hidden
states can learn, this finds what can be learnt by changing what attention passes on.

    o_t <- o_t + u (a . x_t)        x_t, o_t: what the last layer of a block's attention reads and writes at token t
    a = sum_k c_k a_k

In the middle of the network the scores respond to almost one direction u of all that a block may write. So, block by block,
with forward passes over the rows:

1. u: every row's writing is nudged by Gaussian noise of its own; the mean of noise times change of the scores.
2. a_k: differences of the classes' mean inputs, of the last tokens and of all tokens, in every second batch. As long as a row's
   error depends on its class, the gradient's row space is spanned by them.
3. How the scores of the other batches' rows change with c_k, one forward pass each.

The coefficients c of all blocks are then a convex problem, as the output layer is, with a ridge chosen by cross-validation. Its
offsets are the scores that the output layer gives to rows it was not fitted to: those of its own rows flatter it.

Written into ZO-Act's adapter: a takes the place of its last basis vector, u that of the column of B.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from . import noise
from .adapters import adapted_layers, factors_of
from .head import FOLDS, HeadFit, cross_validated
from .runtimes.prefix import blocks_of

logger = logging.getLogger(__name__)

_RESPONSE = 0.3
"""By how much a probe changes the scores, root of the mean square: far above rounding, and still nearly linear."""

Scores = Callable[[Mapping[str, Any]], torch.Tensor]
"""Runs the model on a batch and returns [B, K], the scores of the classes or options."""

Rows = Callable[[int], torch.Tensor]
"""The row of every token of the batch that is being read, [tokens]; -1 for padding. Takes the number of tokens."""


def attention_outputs(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by which attention writes, in every second block from a third to three quarters of the depth."""
    blocks = list(blocks_of(model).items())
    chosen = blocks[len(blocks) // 3 : 3 * len(blocks) // 4 + 1 : 2]
    adapted = dict(adapted_layers(model))
    found = {}
    for prefix, block in chosen:
        names = [f"{prefix}.{name}" for name, _ in block.named_modules() if "att" in name.lower()]
        names = [name for name in names if name in adapted]
        if names:
            found[names[-1]] = adapted[names[-1]]
    return found


@torch.no_grad()
def fit_depth(
    layers: Mapping[str, LoraLayer],
    batches: Sequence[Mapping[str, Any]],
    fit: HeadFit,
    scores: Scores,
    rows: Rows,
    seed: int = 0,
) -> dict[str, float]:
    """Fit one direction in every layer, in place.

    Args:
        layers: see `attention_outputs`; they carry ZO-Act's adapter, B zero.
        batches: the rows that the output layer was fitted to.
        fit: what came of that.
        scores: see `Scores`; called once for every batch, and C times for each layer, where C is the number of classes or
            options (and a few times more for one batch, to find how far to go).
        rows: see `Rows`.
        seed: key of the noise.

    Returns:
        ``loss_before`` and ``loss_after`` on left-out rows, the chosen ``ridge`` and the number of ``coefficients``.

    Raises:
        ValueError: if there are too few rows, or they are all of one class.
    """
    plain, inputs = _read(layers, batches, scores, rows)
    of_batch = torch.arange(len(batches)).repeat_interleave(torch.tensor([len(x) for x in plain]))
    fitting = of_batch % 2 == 1  # rows whose labels no mean has seen
    if int(fitting.sum()) < FOLDS or len(fit.target[~fitting].unique()) < 2:
        raise ValueError(
            f"zo_fit_depth=True takes classes' means from every second batch and fits to the others: the {len(of_batch)} rows "
            f"in {len(batches)} batches are too few, or of one class. Set zo_head_samples higher, or unset it."
        )
    means = {name: _class_means(x[:, ~fitting], fit.target[~fitting]) for name, x in inputs.items()}
    responses: list[torch.Tensor] = []
    places: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # layer, u, and a for a response of 1
    for name, layer in layers.items():
        u = _sensitive(_Changes(layer, batches, plain, scores, rows), seed, name)
        changes = _Changes(layer, batches[1::2], plain[1::2], scores, rows)
        for a in _orthonormal(means[name]):
            response = torch.cat(changes.of(lambda i, x, row, a=a, u=u: (x @ a)[:, None] * u))  # type: ignore[misc]
            size = response.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
            responses.append(response / size)
            places.append((name, u, a / size))
    x, z = torch.stack(responses, -1).double().cpu(), fit.left_out[fitting]  # [N', K, P], [N', K]
    start = torch.zeros(x.shape[-1], dtype=torch.float64)
    c, facts, _ = cross_validated(lambda some, c: z[some] + x[some] @ c, fit.target[fitting], start)
    if facts["loss_after"] < facts["loss_before"]:
        for name, layer in layers.items():
            mine = [(u, a * c_k) for (owner, u, a), c_k in zip(places, c.tolist(), strict=True) if owner == name]
            _write(layer, mine[0][0], torch.stack([a for _, a in mine]).sum(0))
    else:
        logger.warning("The blocks stay as they were: fitted to some rows, they predict the others worse.")
        facts["loss_after"] = facts["loss_before"]
    return {**facts, "coefficients": len(c)}


def _centred(scores: torch.Tensor) -> torch.Tensor:
    """Only differences of scores matter to a softmax."""
    scores = scores.float()
    return scores - scores.mean(1, keepdim=True)


class _Changes:
    """How the scores of all rows change when something is added to what a layer writes."""

    def __init__(
        self,
        layer: LoraLayer,
        batches: Sequence[Mapping[str, Any]],
        plain: Sequence[torch.Tensor],
        scores: Scores,
        rows: Rows,
    ) -> None:
        self.layer, self.batches, self.plain = layer, batches, plain
        self._scores, self._rows = scores, rows

    def of(self, added: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """[B, K] for each batch, per unit of what is added.

        Args:
            added: takes the number of the batch, the layer's inputs [tokens, d_in] and their rows [tokens], and returns
                [tokens, d_out].
        """
        radius = 1.0
        for _ in range(6):  # of the first batch
            size = radius * float(self._change(0, added, radius).square().mean().sqrt())
            if _RESPONSE / 3 < size < 3 * _RESPONSE:
                break
            radius *= min(max(_RESPONSE / max(size, 1e-6), 1e-2), 1e2)
        return [self._change(i, added, radius) for i in range(len(self.batches))]

    def _change(self, i: int, added: Callable[..., torch.Tensor], radius: float) -> torch.Tensor:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            more = added(i, x, self._rows(len(x)))
            return output + (radius * more).view(output.shape).to(output.dtype)

        handle = cast(nn.Module, self.layer).register_forward_hook(hook)
        try:
            return (_centred(self._scores(self.batches[i])) - self.plain[i]) / radius
        finally:
            handle.remove()


def _sensitive(changes: _Changes, seed: int, name: str) -> torch.Tensor:
    """[d_out], the unit vector that the scores respond to most when all tokens of a row are moved along it."""
    width = factors_of(changes.layer)[1].shape[0]
    noises = [
        noise.sample(noise.stream_key(seed, 0, i, "depth", name), (len(before), width), before.device)
        for i, before in enumerate(changes.plain)
    ]
    found = changes.of(lambda i, x, row: noises[i][row.clamp(min=0)])
    total = torch.stack([change.T @ z for change, z in zip(found, noises, strict=True)]).sum(0)  # [K, d_out]
    return torch.linalg.svd(total, full_matrices=False).Vh[0]


def _read(
    layers: Mapping[str, LoraLayer], batches: Sequence[Mapping[str, Any]], scores: Scores, rows: Rows
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Centred scores of the batches, and by layer [2, N, d_in]: inputs at rows' last tokens, and their means over tokens."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def watched(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            row = rows(len(x))
            x, row = x[row >= 0], row[row >= 0]
            count = torch.bincount(row)
            place = torch.arange(len(row), device=row.device)
            last = x[torch.zeros_like(count).scatter_reduce_(0, row, place, "amax")]  # rows may come in any order
            seen[name].append(torch.stack([last, torch.zeros_like(last).index_add_(0, row, x) / count[:, None]]))

        return hook

    handles = [cast(nn.Module, layer).register_forward_hook(watched(name)) for name, layer in layers.items()]
    try:
        plain = [_centred(scores(batch)) for batch in batches]
    finally:
        for handle in handles:
            handle.remove()
    return plain, {name: torch.cat(parts, 1) for name, parts in seen.items()}


def _class_means(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[2, C, d_in], the classes' means of [2, N, d_in], less the mean of classes."""
    means = torch.stack([x[:, target == c].mean(1) for c in target.unique().tolist()], 1)
    return means - means.mean(1, keepdim=True)


def _orthonormal(means: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows for [2, C, d_in] that are centred over C, so that C - 1 of each are independent."""
    return torch.linalg.qr(means[:, 1:].flatten(0, 1).T).Q.T


def _write(layer: LoraLayer, u: torch.Tensor, a: torch.Tensor) -> None:
    """Add ``u (a . x)`` to what the layer writes: its adapter's last basis vector gives way to a."""
    basis, b = factors_of(layer)
    size = a.norm()
    others = torch.linalg.qr(torch.cat([a[None], basis[:-1].to(a)]).T).Q.T[1:]
    basis.copy_(torch.cat([others, a[None] / size]))
    b[:, -1] = (size * u / layer.scaling[layer.active_adapters[0]]).to(b)
