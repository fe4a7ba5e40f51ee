"""TorchRuntime: measures probes in this process, and leaves no trace of having done so.

Three ways to put ``theta + a z`` where the forward pass reads it, and to be back at ``theta`` afterwards:

- ``copy`` keeps a clean copy of the trainables while the probes of a step are measured. Exact; for adapter-sized sets.
- ``transient`` never writes to the weights. Forward hooks give each module that owns trainables a displaced scratch tensor
  for the length of its own forward. Exact; the extra memory is the largest module.
- ``in_place`` adds and subtracts in the weights, as MeZO's code does. It drifts by rounding (1e-9 per cycle and weight in
  fp32, 8e-5 in bf16), so it is only used when asked for by name.

``auto`` takes ``copy`` when the trainables are at most a twentieth of the model, else ``transient``.

``transient`` relies on weights being read by the module that owns them. Some models break that rule (a Mamba block reads the
convolution's weight without calling the convolution), so the first step audits it: one forward with watched weights finds
the tensors that are read from outside, which are then displaced for the length of the whole forward, and the loss at the
first probe is compared with the loss after really writing the weights. Tensors that explain a difference fall back to ``copy``.
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import IO, Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..directions import Direction, Probe, Terms, displace
from .examples import ExampleProbes
from .prefix import SharedPrefix

logger = logging.getLogger(__name__)

Restore = Literal["auto", "copy", "transient", "in_place"]
Measure = Callable[[], torch.Tensor]
"""The loss of the current window under the weights as they stand, a scalar tensor; or what every example contributes to it."""

COPY_UP_TO = 0.05  # share of the model's bytes up to which `auto` keeps a clean copy


class TorchRuntime:
    """Measures the loss at probes by running a model or any other function of ``params``.

    Args:
        params: trainable tensors by canonical name.
        restore: see the module's description.
        model: the module that owns ``params``; needed for ``transient``. Without it ``auto`` means ``copy``.
        runs: for probes along `ExampleDirections`, see `ExampleProbes`; ``restore`` has then nothing to act on.

    Raises:
        ValueError: if ``restore`` is unknown, or ``transient`` without a model; with ``runs``, see `ExampleProbes`.
    """

    def __init__(
        self,
        params: Mapping[str, torch.Tensor],
        restore: Restore = "auto",
        model: nn.Module | None = None,
        runs: Callable[[int], list[tuple[int, int, int]]] | None = None,
    ) -> None:
        if restore not in get_args(Restore):
            raise ValueError(f"zo_restore={restore!r} does not exist; choose one of {', '.join(get_args(Restore))}.")
        if restore == "transient" and model is None:
            raise ValueError("zo_restore='transient' works through a module's forward; use 'copy' for a plain function.")
        self.params = dict(params)
        self.model = model
        self.restore: Restore = self._choose() if restore == "auto" else restore
        if self.restore == "in_place" and any(p.dtype in (torch.bfloat16, torch.float16) for p in params.values()):
            logger.warning(
                "zo_restore='in_place' on 16-bit weights drifts: adding and subtracting the same noise changes nearly half "
                "of the weights in every step. 'transient' and 'copy' are exact."
            )
        self._prefix = SharedPrefix(model, params) if model is not None else None
        self._examples = ExampleProbes(model, params, runs) if model is not None and runs is not None else None
        self._transient = _TransientWeights(model, params) if model is not None and self.restore == "transient" else None

    def _choose(self) -> Restore:
        if self.model is None:
            return "copy"
        trainable = sum(p.nbytes for p in self.params.values())
        total = sum(p.nbytes for p in self.model.parameters())
        return "copy" if trainable <= COPY_UP_TO * total else "transient"

    @torch.no_grad()
    def losses(self, probes: Sequence[Probe], measure: Measure) -> list[float]:
        """Loss at each probe, in fp64; as many numbers per probe as ``measure`` returns.

        Weights and all random states are afterwards what they were, also after an error.

        Every probe sees the same random numbers, in case the model draws any.
        """
        measured: list[torch.Tensor] = []
        with Randomness(self.params.values()) as randomness, ExitStack() as stack:

            def rewound() -> torch.Tensor:
                randomness.rewind()
                return measure()

            if self._examples is not None:
                place = stack.enter_context(self._examples.measuring())
            elif self._transient is not None:
                place = stack.enter_context(self._transient.measuring(probes, rewound))
            elif self.restore == "copy":
                place = stack.enter_context(_written(self.params, self.params))
            else:
                place = stack.enter_context(_walked(self.params))
            shared = stack.enter_context(self._sharing(probes))
            for probe in probes:
                place(probe)
                measured.append(shared(rewound).detach())
        # One transfer for all probes: the only point at which the host waits for the device.
        return [float(x) for x in torch.cat([m.reshape(-1) for m in measured]).double().tolist()]

    @contextmanager
    def _sharing(self, probes: Sequence[Probe]) -> Iterator[Callable[[Measure], torch.Tensor]]:
        """Give out a function that measures without computing anew what no probe changes."""
        if self._prefix is None:
            yield lambda measure: measure()
            return
        directions = {direction for probe in probes for _, direction in probe.terms}
        depth = self._prefix.depth(name for name in self.params if any(d.moves(name) for d in directions))
        if depth and len(probes) > 1:
            with self._prefix.keeping(depth) as shared:
                yield shared
        else:
            with self._prefix.learning():
                yield lambda measure: measure()


Place = Callable[[Probe], None]


@contextmanager
def _written(params: Mapping[str, torch.Tensor], chosen: Iterable[str]) -> Iterator[Place]:
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
def _walked(params: Mapping[str, torch.Tensor]) -> Iterator[Place]:
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


class _TransientWeights:
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
        with self._hooked(set(self.params)) as place_hooked, _written(self.params, self.copied) as place_copied:

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


class Randomness:
    """The python, numpy and torch random states, rewound before every probe and put back at the end."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.cuda = sorted({t.device.index for t in tensors if t.device.type == "cuda"})

    def __enter__(self) -> Randomness:
        self.python, self.numpy, self.torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.on_cuda = [torch.cuda.get_rng_state(i) for i in self.cuda]
        return self

    def rewind(self) -> None:
        """Go back to the states on entry."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        for i, state in zip(self.cuda, self.on_cuda, strict=True):
            torch.cuda.set_rng_state(state, i)

    def __exit__(self, *exc_info: object) -> None:
        self.rewind()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run forwards in eval mode while code around them still sees ``model.training`` as True.

    Both probes of a pair must meet the same network, so dropout is off in every module. The root's own flag is only down
    during its forward: trainers such as TRL's file metrics by ``model.training``, and a probe is training.
    """
    training = [module for module in model.modules() if module.training]

    def down(module: nn.Module, args: Any) -> None:
        module.training = False

    def up(module: nn.Module, args: Any, output: Any) -> None:
        module.training = True

    handles = [model.register_forward_pre_hook(down), model.register_forward_hook(up, always_call=True)]
    try:
        for module in training:
            module.training = False
        model.training = True
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.training = False
        for module in training:
            module.training = True
