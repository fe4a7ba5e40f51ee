"""Weights placed at a probe by writing to them: from a clean copy that is put back, or by walking there and home again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from ..directions import Direction, Probe, displace

Measure = Callable[[], torch.Tensor]
"""The loss of the current window under the weights as they stand, a scalar tensor; or what every example contributes to it."""

Place = Callable[[Probe], None]
"""Decides at which probe the following forward passes run."""


@contextmanager
def by_copy(params: Mapping[str, torch.Tensor], chosen: Iterable[str]) -> Iterator[Place]:
    """Write displaced values over the chosen tensors, from a clean copy that is put back at the end."""
    clean = {name: params[name].clone() for name in chosen}

    def place(probe: Probe) -> None:
        for name, theta in clean.items():
            displace(params[name], theta, name, probe.terms)

    try:
        yield place
    finally:
        for name, theta in clean.items():
            params[name].copy_(theta)


@contextmanager
def in_place(params: Mapping[str, torch.Tensor]) -> Iterator[Place]:
    """Walk the tensors themselves from probe to probe and back home."""
    here = dict.fromkeys(params, Probe())  # by tensor, so that an error halfway still finds home

    def place(probe: Probe) -> None:
        for name, theta in params.items():
            distance: dict[Direction, float] = defaultdict(float)
            for sign, legs in ((-1.0, here[name].terms), (1.0, probe.terms)):
                for a, direction in legs:
                    distance[direction] += sign * a
            displace(theta, theta, name, [(a, direction) for direction, a in distance.items()])
            here[name] = probe

    try:
        yield place
    finally:
        place(Probe())
