"""Weights displaced without being written to: each module that owns some gets a scratch tensor for its own forward.

This relies on weights being read by the module that owns them. Some models break that rule (a Mamba block reads the
convolution's weight without calling the convolution), so the first step audits it: one forward with watched weights finds
the tensors that are read from outside, which are then displaced for the length of the whole forward, and the loss at the
first probe is compared with the loss after really writing the weights. Tensors that explain a difference fall back to a copy.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..directions import Probe, Terms, displace
from .placement import Measure, Place, by_copy

logger = logging.getLogger(__name__)


class TransientWeights:
    """Swaps displaced scratch tensors in and out of a model's modules."""

    def __init__(self, model: nn.Module, params: Mapping[str, torch.Tensor]) -> None:
        self.model = model
        self.params = dict(params)
        names = {id(p): name for name, p in params.items()}
        self.owners: dict[nn.Module, list[tuple[str, str]]] = {}
        for module in model.modules():
            owned = [(key, names[id(p)]) for key, p in module._parameters.items() if id(p) in names]
            if owned:
                self.owners[module] = owned
        self.whole: set[str] = set()  # displaced for the length of the whole forward
        self.copied: set[str] = set()  # written and restored
        self.audited = False

    @contextmanager
    def measuring(self, probes: Sequence[Probe], measure: Measure) -> Iterator[Place]:
        """Give out a function that decides at which probe the following forwards run."""
        if not self.audited:
            self._audit(next((p for p in probes if p.terms), Probe()), measure)
            self.audited = True
        with self._hooked(set(self.params)) as place_hooked, by_copy(self.params, self.copied) as place_copied:

            def place(probe: Probe) -> None:
                place_hooked(probe)
                place_copied(probe)

            yield place

    @contextmanager
    def _hooked(self, displaced: set[str]) -> Iterator[Place]:
        displaced = displaced - self.copied
        current = Probe()
        away: list[tuple[nn.Module, str, Any, torch.Tensor]] = []  # module, key, clean parameter, memory; as swapped
        free: list[torch.Tensor] = []  # scratch memory that no module uses now: fresh memory costs page faults
        depths: list[int] = []  # how many were away when each running module was entered
        handles = []

        def swap(module: nn.Module, key: str, name: str) -> None:
            if not any(direction.moves(name) for _, direction in current.terms):
                return
            clean, theta = module._parameters[key], self.params[name]
            memory = _taken(free, theta)
            scratch = memory[: theta.numel()].view(theta.shape)
            if isinstance(module, nn.Embedding):
                scratch = scratch.as_subclass(_DisplacedRows)
                scratch.begin(theta, name, current.terms)
            else:
                displace(scratch, theta, name, current.terms)
            away.append((module, key, clean, memory))
            module._parameters[key] = scratch  # type: ignore[assignment]  # a plain tensor: no autograd, no registration

        def swap_back(to_length: int, output: Any = None) -> None:
            while len(away) > to_length:
                module, key, clean, memory = away.pop()
                module._parameters[key] = clean
                if not _shares_memory(output, memory):
                    free.append(memory)

        def place(probe: Probe) -> None:
            nonlocal current
            current = probe
            depths.clear()
            swap_back(0)
            for module, owned in self.owners.items():
                for key, name in owned:
                    if name in self.whole and name in displaced:
                        swap(module, key, name)

        def enter(module: nn.Module, args: Any) -> None:
            depths.append(len(away))
            for key, name in self.owners[module]:
                if name in displaced and name not in self.whole:
                    swap(module, key, name)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            swap_back(depths.pop(), output)

        try:
            for module in self.owners:
                # First in and last out, so that other hooks of the module see the displaced weights.
                handles.append(module.register_forward_pre_hook(enter, prepend=True))
                handles.append(module.register_forward_hook(leave, always_call=True))
            yield place
        finally:
            for handle in handles:
                handle.remove()
            swap_back(0)  # what is still away after an error that no hook saw

    def _audit(self, probe: Probe, measure: Measure) -> None:
        outside = self._read_from_outside(measure)
        self.whole = outside
        if outside:
            logger.info(
                "zo_restore='transient': %d tensors are read by a module other than their owner and are displaced for the "
                "whole forward: %s",
                len(outside),
                ", ".join(sorted(outside)[:8]),
            )
        # Ten times the radius, so that a tensor that is missed shows.
        far = Probe(tuple((10 * a, d) for a, d in probe.terms))
        names = list(self.params)
        try:
            if not self._differs(names, far, measure):
                return
            self.copied = set(self._bisect(names, far, measure))
        except OSError as error:
            logger.warning("The check of zo_restore='transient' against written weights was left out: %s", error)
            return
        if self.copied:
            logger.warning(
                "zo_restore='transient' does not reach %d tensors of this model; they are written and restored from a copy "
                "instead: %s",
                len(self.copied),
                ", ".join(sorted(self.copied)[:8]),
            )

    def _bisect(self, names: list[str], probe: Probe, measure: Measure) -> list[str]:
        if len(names) == 1:
            return names
        half = len(names) // 2
        parts = [part for part in (names[:half], names[half:]) if self._differs(part, probe, measure)]
        return [name for part in parts for name in self._bisect(part, probe, measure)]

    def _differs(self, names: list[str], probe: Probe, measure: Measure) -> bool:
        """Whether displacing ``names`` by hooks gives another loss than writing them."""
        with self._hooked(set(names)) as place:
            place(probe)
            hooked = float(measure())
        with _spilled({name: self.params[name] for name in names}):
            for name in names:
                displace(self.params[name], self.params[name], name, probe.terms)
            written, again = float(measure()), float(measure())
        if not all(np.isfinite((hooked, written, again))):
            return False  # the run's own guard for non-finite losses speaks up next
        return abs(hooked - written) > 10 * abs(written - again) + 1e-6 * max(1.0, abs(written))

    def _read_from_outside(self, measure: Measure) -> set[str]:
        """Names of the tensors that a forward reads while their owner is not running, or whose owner never runs."""
        reads: set[str] = set()
        ran: set[nn.Module] = set()
        handles = []
        clean = {m: {key: m._parameters[key] for key, _ in owned} for m, owned in self.owners.items()}

        def enter(module: nn.Module, args: Any) -> None:
            ran.add(module)
            module._parameters.update(clean[module])

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            watch(module)

        def watch(module: nn.Module) -> None:
            for key, name in self.owners[module]:
                watched = self.params[name].detach().as_subclass(_Watched)
                watched.report = partial(reads.add, name)
                module._parameters[key] = watched  # type: ignore[assignment]

        try:
            for module in self.owners:
                handles.append(module.register_forward_pre_hook(enter, prepend=True))
                handles.append(module.register_forward_hook(leave, always_call=True))
                watch(module)
            measure()
        finally:
            for handle in handles:
                handle.remove()
            for module, parameters in clean.items():
                module._parameters.update(parameters)
        called = {name for module in ran for _, name in self.owners[module]}
        return reads | (set(self.params) - called)


class _Watched(torch.Tensor):
    """A weight that reports when its values are read. Reading its shape, dtype or device is no report."""

    report: Callable[[], Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)) or func.__name__ in (
            "data_ptr",
            "item",
            "tolist",
        ):
            for leaf in tree_leaves((args, kwargs or {})):
                if isinstance(leaf, _Watched) and "report" in leaf.__dict__:
                    leaf.report()
        return result


def _taken(free: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Flat memory for a tensor: the smallest free piece that is large enough. Smaller ones are given up for a new one."""
    suits = [x for x in free if x.dtype == like.dtype and x.device == like.device]
    fitting = [x for x in suits if x.numel() >= like.numel()]
    best = min(fitting, key=torch.Tensor.numel, default=None)
    given_up = suits if best is None else [best]
    free[:] = [x for x in free if not any(x is y for y in given_up)]
    if best is not None:
        return best
    with torch.inference_mode(False):  # an engine calls modules in that mode, and a tensor made in it is read-only elsewhere
        return torch.empty(like.numel(), dtype=like.dtype, device=like.device)


def _shares_memory(output: Any, memory: torch.Tensor) -> bool:
    """Whether a module returned its weight, or a part of it."""
    place = memory.untyped_storage().data_ptr()
    with torch._C.DisableTorchFunctionSubclass():
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided]
        return any(leaf.untyped_storage().data_ptr() == place for leaf in leaves)


class _DisplacedRows(torch.Tensor):
    """The displaced weight of an embedding, of which only the rows that are looked up are ever written."""

    theta: torch.Tensor
    tensor_name: str
    terms: Terms
    whole: bool

    def begin(self, theta: torch.Tensor, name: str, terms: Terms) -> None:
        """Take the values from ``theta`` and ``terms`` when they are read."""
        self.theta, self.tensor_name, self.terms, self.whole = theta, name, terms, False

    def fill(self, rows: torch.Tensor | None = None) -> None:
        """Write the values of ``rows``, some of which may be repeated, or all values."""
        if self.whole:
            return
        with torch._C.DisableTorchFunctionSubclass():
            plain = self.as_subclass(torch.Tensor)
            if rows is None or 2 * rows.numel() > len(self.theta):
                displace(plain, self.theta, self.tensor_name, self.terms)
                self.whole = True
            else:
                rows = rows.reshape(-1).long()
                chosen = self.theta[rows]
                plain[rows] = displace(torch.empty_like(chosen), chosen, self.tensor_name, self.terms, rows=rows)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        lookup = func is nn.functional.embedding and len(args) > 1 and type(args[0]) is torch.Tensor
        describing = func.__name__ in ("__get__", "size", "dim", "numel", "stride")  # the shape, or a view
        if not describing:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, _DisplacedRows) and hasattr(leaf, "theta"):
                    leaf.fill(args[0] if lookup and leaf is args[1] else None)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if describing and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, _DisplacedRows) and hasattr(leaf, "theta"):
                    leaf.fill()
        return result


@contextmanager
def _spilled(params: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Keep the clean values in a temporary file meanwhile: the audit must not need the memory that a copy would."""
    with tempfile.TemporaryFile() as file:
        for p in params.values():
            _bytes_of(p.cpu()).tofile(file)
        file.flush()
        try:
            yield
        finally:
            file.seek(0)
            for p in params.values():
                _read_into(p, file)


def _bytes_of(p: torch.Tensor) -> np.ndarray:
    return p.contiguous().view(-1).view(torch.uint8).numpy()


def _read_into(p: torch.Tensor, file: IO[bytes]) -> None:
    raw = torch.from_numpy(np.fromfile(file, dtype=np.uint8, count=p.nbytes))
    p.copy_(raw.view(p.dtype).view(p.shape))
