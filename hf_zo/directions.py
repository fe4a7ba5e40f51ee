"""Directions: seeded, regenerable perturbations of the trainable tensors, and the points they lead to.

A `Direction` is never stored: `Direction.sample` draws any tensor of it, in any order, always with the same bits. A `Probe`
is a point ``theta + sum_i a_i * direction_i`` at which a loss is wanted. `displace` walks along directions; runtimes use it
to reach a probe and the optimizer uses it to apply an update, so what is perturbed is what is updated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from . import noise


@dataclass(frozen=True)
class TensorSpec:
    """What a direction has to know of a trainable tensor."""

    shape: tuple[int, ...]
    device: torch.device


Entries = Literal["gaussian", "rademacher", "factorised"]
"""How the direction of a tensor is drawn: independent Gaussian entries, signs, or for matrices ``U V^T / sqrt(r)``."""

Space = Mapping[str, TensorSpec]
"""The trainable tensors by canonical name, in ``named_parameters()`` order (tied tensors appear once)."""


def space_of(params: Mapping[str, torch.Tensor]) -> Space:
    """Describe ``params`` for the directions that will perturb them."""
    return {name: TensorSpec(tuple(p.shape), p.device) for name, p in params.items()}


class Direction(ABC):
    """One perturbation of all trainable tensors, a pure function of its key."""

    @abstractmethod
    def sample(self, name: str) -> torch.Tensor:
        """The direction of tensor ``name``: fp32, of the tensor's shape, on its device."""

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """U (m x r) and V^T (r x n), fp32, if the direction of the m x n tensor ``name`` is their product."""
        return None

    def moves(self, name: str) -> bool:
        """Whether tensor ``name`` is perturbed at all."""
        return True


class ExampleDirections(Direction):
    """A direction for every example of a batch; as a direction, the sum of theirs by ``weights``.

    That of example e in a tensor is piece e of one noise stream, whatever the number of examples is.

    Args:
        space: the trainable tensors.
        seed: run seed.
        step: optimizer step they belong to.
        index: number within the step.
        kind: ``"gaussian"`` or ``"rademacher"``.
        weights: one per example; none while they are used to probe.
    """

    def __init__(
        self, space: Space, seed: int, step: int, index: int, kind: noise.Kind = "gaussian", weights: Sequence[float] = ()
    ) -> None:
        self.space = space
        self.seed = seed
        self.step = step
        self.index = index
        self.kind: noise.Kind = kind
        self.weights = tuple(weights)

    def weighted(self, weights: Sequence[float]) -> ExampleDirections:
        """The same directions with other weights."""
        return ExampleDirections(self.space, self.seed, self.step, self.index, self.kind, weights)

    def each(self, name: str, examples: range) -> torch.Tensor:
        """The directions of tensor ``name`` for some examples, numbered from 0: fp32, [len(examples), *shape]."""
        spec = self.space[name]
        key = noise.stream_key(self.seed, self.step, self.index, "examples", name)
        out = torch.zeros(len(examples), torch.Size(spec.shape).numel(), device=spec.device)
        numbers = torch.arange(examples.start, examples.stop, device=spec.device)
        return noise.displace(out, out, [key], [1.0], kind=self.kind, rows=numbers).view(-1, *spec.shape)

    def sample(self, name: str) -> torch.Tensor:
        """Their weighted sum for tensor ``name``, added up one by one, so that its bits do not depend on the machine."""
        spec = self.space[name]
        total = torch.zeros(spec.shape, dtype=torch.float32, device=spec.device)
        for weight, z in zip(self.weights, self.each(name, range(len(self.weights))), strict=True):
            total += z * weight
        return total


Terms = Sequence[tuple[float, Direction]]
"""A linear combination of directions."""


class DenseDirection(Direction):
    """Independent entries with mean 0 and variance 1, Gaussian or Rademacher.

    Args:
        space: the trainable tensors.
        seed: run seed.
        step: optimizer step the direction belongs to.
        index: number of the direction within the step.
        kind: ``"gaussian"`` or ``"rademacher"``.
    """

    def __init__(self, space: Space, seed: int, step: int, index: int, kind: noise.Kind = "gaussian") -> None:
        self.space = space
        self.seed = seed
        self.step = step
        self.index = index
        self.kind: noise.Kind = kind

    def key(self, name: str) -> int:
        """Stream key of tensor ``name`` (see `noise.stream_key`)."""
        return noise.stream_key(self.seed, self.step, self.index, "direction", name)

    def streams(self, name: str) -> list[tuple[float, int]]:
        """The direction of tensor ``name`` as factors and keys of noise streams; none if the tensor stays where it is."""
        return [(1.0, self.key(name))]

    def sample(self, name: str) -> torch.Tensor:
        """The direction of tensor ``name``."""
        spec = self.space[name]
        return noise.sample(self.key(name), spec.shape, spec.device, self.kind)


class LowRankDirection(Direction):
    """``U V^T / r^power`` for tensors with two or more dimensions, dense noise for the others; Gaussian.

    Args:
        space: the trainable tensors.
        seed: run seed.
        step: optimizer step that U belongs to.
        interval: number of the interval that V belongs to, which steps may share.
        rank: r, clipped to the smaller dimension of a tensor. Those with three or more are taken as first x all others.
        index: number of the direction within the step.
        power: 1/2 gives entries of variance 1, as a dense direction has them.
    """

    def __init__(
        self, space: Space, seed: int, step: int, interval: int, rank: int, *, index: int = 0, power: float = 0.0
    ) -> None:
        self.space = space
        self.seed = seed
        self.step = step
        self.interval = interval
        self.rank = rank
        self.index = index
        self.power = power

    def matrix(self, name: str) -> tuple[int, int, int]:
        """``(m, n, r)`` of a tensor; r is at most the smaller of m and n."""
        shape = self.space[name].shape
        m, n = shape[0], torch.Size(shape[1:]).numel()
        return m, n, min(self.rank, m, n)

    def left(self, name: str) -> torch.Tensor:
        """U of the step, m x r; for tensors with fewer than two dimensions the dense noise itself."""
        spec = self.space[name]
        key = noise.stream_key(self.seed, self.step, self.index, "direction", name)
        shape = spec.shape
        if len(shape) > 1:
            m, _, r = self.matrix(name)
            shape = (m, r)
        return noise.sample(key, shape, spec.device)

    def right(self, name: str) -> torch.Tensor:
        """V of the interval, n x r."""
        _, n, r = self.matrix(name)
        key = noise.stream_key(self.seed, self.interval, self.index, "subspace", name)
        return noise.sample(key, (n, r), self.space[name].device)

    def sample(self, name: str) -> torch.Tensor:
        """The direction of tensor ``name``."""
        return self.expanded(name, self.left(name))

    def expanded(self, name: str, left: torch.Tensor) -> torch.Tensor:
        """``left V^T`` in the tensor's shape; tensors with fewer than two dimensions have no V."""
        shape = self.space[name].shape
        return left if len(shape) < 2 else noise.product(left, self.right_t(name)).view(shape)

    def right_t(self, name: str) -> torch.Tensor:
        """``V^T / r^power``."""
        right = self.right(name)
        return (right / right.shape[1] ** self.power if self.power else right).T.contiguous()

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """U and V^T; None for tensors with fewer than two dimensions."""
        return None if len(self.space[name].shape) < 2 else (self.left(name), self.right_t(name))


@dataclass(frozen=True)
class Probe:
    """A point at which a loss is wanted: the current weights plus ``terms``. No terms: the weights themselves."""

    terms: tuple[tuple[float, Direction], ...] = ()


def displace(
    out: torch.Tensor,
    theta: torch.Tensor,
    name: str,
    terms: Terms,
    *,
    decay: float = 1.0,
    rounding_key: int | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write ``decay * theta + sum_i a_i * direction_i[name]`` into ``out`` and return it.

    Accumulated in fp32 (fp64 for fp64 tensors) in the order of ``terms`` and rounded once to ``theta.dtype``: to nearest, or
    stochastically for 16-bit tensors when a ``rounding_key`` is given. ``out`` may be ``theta``. With ``rows``, ``theta`` and
    ``out`` hold only these rows of the tensor, and are not rounded stochastically unless all directions are dense or low-rank.
    """
    dense = [(a, d) for a, d in terms if isinstance(d, DenseDirection)]
    if len(dense) == len(terms) and len({d.kind for _, d in dense}) <= 1:
        kind = dense[0][1].kind if dense else "gaussian"
        streams = [(a * factor, key) for a, d in dense for factor, key in d.streams(name)]
        factors, keys = [factor for factor, _ in streams], [key for _, key in streams]
        return noise.displace(out, theta, keys, factors, kind=kind, decay=decay, rounding_key=rounding_key, rows=rows)
    pairs = [direction.factors(name) for _, direction in terms]
    if all(pair is not None for pair in pairs):
        products = [(a, *pair) for (a, _), pair in zip(terms, pairs, strict=True) if pair is not None]
        return noise.displace_low_rank(out, theta, products, decay=decay, rounding_key=rounding_key, rows=rows)
    accumulator = torch.promote_types(theta.dtype, torch.float32)
    value = theta.to(accumulator) * decay
    for a, direction in terms:
        z = direction.sample(name)
        value = value + (z if rows is None else z[rows]).to(accumulator) * a
    if rounding_key is not None and theta.dtype in (torch.bfloat16, torch.float16):
        return noise.round_stochastically(value, rounding_key, out)
    return out.copy_(value)
