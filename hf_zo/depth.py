"""The fit of the output layer, continued into the depth of the network: `hf_zo.head` finds what a linear map of the last hidden
states can learn, this finds what can be learnt by changing what attention passes on.

    o_t <- o_t + u (a . x_t)        x_t, o_t: what the last layer of a block's attention reads and writes at token t
    a = sum_k c_k a_k

In the middle of the network the scores respond to almost one direction u of all that a block may write. So, block by block,
with forward passes over the rows:

1. u: every row's writing is nudged by Gaussian noise of its own; the mean of noise times change of the scores. Half as many
   rows as the block is wide will do: what is left of the noise in u does not move the scores.
2. a_k: what logistic regression of the classes on the inputs, averaged over tokens, adds to the scores of the output layer.
   Once for the rows of even batches, once for those of odd ones.
3. How the scores of every row change with c_k, one forward pass each, along the a_k of the rows that it is not one of.

The coefficients c of all blocks are then a convex problem, as the output layer is, with a ridge chosen by cross-validation. Its
offsets are the scores that the output layer gives to rows it was not fitted to: those of its own rows flatter it. What is
written is the mean of both halves' a_k.

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
from .anatomy import adapted_layers, blocks_of, factors_of
from .head import FOLDS, HeadFit, cross_validated, minimum

logger = logging.getLogger(__name__)

_RESPONSE = 0.3
"""By how much a probe changes the scores, root of the mean square: far above rounding, and still nearly linear."""

_RIDGE = 1.0
"""Of the regression on a layer's inputs, per unit of their mean square; their directions matter more than their sizes."""

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


class DepthError(ValueError):
    """A model without layers to fit, or rows that do not suffice, with what to do."""


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
        scores: see `Scores`; called once for every batch, and up to C times for each layer, where C is the number of classes
            or options (and a few times more for one batch, to find how far to go).
        rows: see `Rows`.
        seed: key of the noise.

    Returns:
        ``loss_before`` and ``loss_after`` on left-out rows, the chosen ``ridge`` and the number of ``coefficients``.

    Raises:
        DepthError: if there are no layers, or too few rows, or rows of one class.
    """
    if not layers:
        raise DepthError(
            "zo_fit_depth=True finds no adapter on an attention layer in the middle of the model; set zo_act_targets to "
            "'all-linear', or unset it."
        )
    plain, inputs = _read(layers, batches, scores, rows)
    of_batch = torch.arange(len(batches)).repeat_interleave(torch.tensor([len(x) for x in plain]))
    odd = of_batch % 2 == 1
    if len(of_batch) < FOLDS or min(len(fit.target[half].unique()) for half in (odd, ~odd)) < 2:
        raise DepthError(
            f"zo_fit_depth=True fits to the rows of even and odd batches by turns: the {len(of_batch)} rows in {len(batches)} "
            "batches are too few, or a half of them is of one class. Set zo_head_samples higher, or unset it."
        )
    responses: list[torch.Tensor] = []
    places: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # layer, u, and a for a response of 1
    for name, layer in layers.items():
        width = factors_of(layer)[1].shape[0]
        some = slice(None, None, max(1, len(of_batch) // (width // 2)))
        u = _sensitive(_Changes(layer, batches[some], plain[some], scores, rows), seed, name)
        changes = _Changes(layer, batches, plain, scores, rows)
        of_even, of_odd = (_discriminants(inputs[name], fit, half) for half in (~odd, odd))
        for even_a, odd_a in zip(of_even, of_odd, strict=True):
            # Rows of even batches are moved along what those of odd ones told, and the other way round.
            moved = changes.of(lambda i, x, row, u=u, a=(odd_a, even_a): (x @ a[i % 2])[:, None] * u)  # type: ignore[misc]
            response = torch.cat(moved)
            size = response.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
            responses.append(response / size)
            places.append((name, u, (even_a + odd_a) / 2 / size))
    x, z = torch.stack(responses, -1).double().cpu(), fit.left_out  # [N, K, P], [N, K]
    start = torch.zeros(x.shape[-1], dtype=torch.float64)
    c, facts, _ = cross_validated(lambda some, c: z[some] + x[some] @ c, fit.target, start)
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
    """Centred scores of the batches, and by layer [N, d_in]: the rows' inputs, averaged over tokens."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def watched(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            row = rows(len(x))
            x, row = x[row >= 0], row[row >= 0]
            count = torch.bincount(row)[:, None]
            seen[name].append(x.new_zeros(len(count), x.shape[1]).index_add_(0, row, x) / count)

        return hook

    handles = [cast(nn.Module, layer).register_forward_hook(watched(name)) for name, layer in layers.items()]
    try:
        plain = [_centred(scores(batch)) for batch in batches]
    finally:
        for handle in handles:
            handle.remove()
    if any(len(parts) != len(batches) for parts in seen.values()):
        raise DepthError("zo_fit_depth=True fits layers that are called once in a forward pass, and here blocks share theirs.")
    return plain, {name: torch.cat(parts) for name, parts in seen.items()}


def _discriminants(x: torch.Tensor, fit: HeadFit, half: torch.Tensor) -> torch.Tensor:
    """[C - 1, d_in]: what the inputs x [N, d_in] of some rows tell of their classes that the scores do not."""
    count = fit.left_out.shape[1]
    contrasts = torch.linalg.qr(torch.cat([torch.ones(count, 1), torch.eye(count)[:, 1:]], 1).double()).Q[:, 1:].T
    inputs, z, target = x.double().cpu()[half], fit.left_out[half], fit.target[half]
    inputs = inputs - inputs.mean(0)
    scale = inputs.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    start = torch.zeros(count, x.shape[1], dtype=torch.float64)
    w = minimum(lambda some, w: z[some] + (inputs[some] / scale) @ w.T, target >= 0, target, _RIDGE, start)
    return (contrasts @ w / scale).to(x)


def _write(layer: LoraLayer, u: torch.Tensor, a: torch.Tensor) -> None:
    """Add ``u (a . x)`` to what the layer writes: its adapter's last basis vector gives way to a."""
    basis, b = factors_of(layer)
    size = a.norm()
    if not size:  # the scores do not depend on this layer
        return
    others = torch.linalg.qr(torch.cat([a[None], basis[:-1].to(a)]).T).Q.T[1:]
    basis.copy_(torch.cat([others, a[None] / size]))
    b[:, -1] = (size * u / layer.scaling[layer.active_adapters[0]]).to(b)
