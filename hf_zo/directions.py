"""Directions: seeded, regenerable perturbations of the trainable tensors, and the points they lead to.

A `Direction` is never stored: `Direction.sample` draws any tensor of it, in any order, always with the same bits. A `Probe`
is a point ``theta + sum_i a_i * direction_i`` at which a loss is wanted. `displace` walks along directions; runtimes use it
to reach a probe and the optimizer uses it to apply an update, so what is perturbed is what is updated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from . import noise


@dataclass(frozen=True)
class TensorSpec:
    """What a direction has to know of a trainable tensor."""

    shape: tuple[int, ...]
    device: torch.device


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
