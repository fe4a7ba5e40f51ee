"""Activation bases, and the PEFT LoRA adapter that carries them: the parameterisation of ZO-Act (arXiv 2607.01125).

    W = W0 + B V^T        V (d_in x r): top right singular vectors of the layer's inputs X, orthonormal, computed once
                          B (d_out x r): trainable, zero at first

The gradient of W0 is D^T X, so its rows lie in the row space of X: projecting it on V keeps the energy that V captures of X,
while a random basis keeps about r / d_in. As an adapter this is LoRA with ``lora_A = V^T`` frozen, ``lora_B = B`` and
``lora_alpha = r``, so it is saved, loaded, merged and served like any other, and W0 may be quantised: it is only read.

V comes from a randomised range finder: two power iterations on X^T X, each of them one pass over the calibration sequences;
d_in x (r + 8) numbers per layer, never a d_in x d_in matrix. Layers that read the same tensor (q, k, v; gate, up) share it.
Not centred, unlike PEFT's EVA, which also redistributes ranks: the mean input is part of the gradient's row space.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, initialize_kv_prefix_from_past_key_values
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import noise
from .anatomy import (
    adapted_layers,
    adapted_lm_head,
    base_of,
    blocks_of,
    factors_of,
    lm_head_name,
    lm_head_of,
    new_heads,
    virtual_tokens,
)
from .runtimes.torch import evaluation_mode

logger = logging.getLogger(__name__)

SUPPORTED = "torch.nn.Linear (also bitsandbytes 4-bit and 8-bit, torchao) and transformers' Conv1D"
_OVERSAMPLING = 8
_SWEEPS = 3  # the sketch and two power iterations
_HEAD_RANK = 8  # tells nine options apart


def activation_adapter(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    rank: int = 8,
    targets: str | list[str] = "all-linear",
    seed: int = 0,
    exclude_first_token: bool = False,
) -> PeftModel:
    """Attach a ZO-Act adapter to ``model`` and calibrate it.

    Args:
        model: the base model; it is frozen and may be quantised.
        batches: keyword arguments of forwards, 32 to 128 training sequences in all, on the model's device.
        rank: r; the paper's is not published, 8 is a choice of this package.
        targets: ``"all-linear"``; ``"one-block"``: what one block at two thirds of the depth adds to the residual stream, by
            its last linear layer; or names of modules as in `peft.LoraConfig.target_modules`.
        seed: key of the random sketch.
        exclude_first_token: leave out the first token of every sequence, on which many models park attention.

    Raises:
        ValueError: if there is no supported linear layer, or no token to calibrate on.
    """
    adapted = attach(model, rank, targets)
    with evaluation_mode(adapted):
        calibrate(adapted, batches, lambda batch: adapted(**batch), seed=seed, exclude_first_token=exclude_first_token)
    return adapted


def attach(model: nn.Module, rank: int = 8, targets: str | Sequence[str] = "all-linear", with_head: bool = False) -> PeftModel:
    """The model with a LoRA adapter of rank ``rank`` whose A is frozen and whose B is zero; not calibrated yet.

    A layer that is narrower than ``rank`` gets the rank it can have, with a warning. With ``with_head`` a language model's
    output layer gets an adapter too, of rank 8 at least, both factors frozen, for `hf_zo.head`. A classifier's new head is
    trained as a whole.

    Raises:
        ValueError: if ``rank`` is below 1, or ``targets`` contains nothing that is supported, or something that is not.
    """
    if rank < 1:
        raise ValueError(f"zo_act_rank must be at least 1, got {rank}.")
    chosen = _targets(model, targets)
    narrow = {name: width for name, module in chosen.items() if (width := min(_shape(module))) < rank}
    for name, width in narrow.items():
        logger.warning("zo_act_rank=%d exceeds a dimension of %s and is %d there.", rank, name, width)
    head = lm_head_name(model) if with_head else None
    ranks = dict(narrow) if head is None else {**narrow, head: max(rank, _HEAD_RANK)}
    task_type = _task_type(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[*chosen, *([] if head is None else [head])],
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in chosen.values()),
        modules_to_save=list(new_heads(model)) or None,
        task_type=task_type,
    )
    adapted = get_peft_model(model, config)
    freeze_basis(adapted)
    return adapted


def _targets(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    head, heads = lm_head_of(model), tuple(new_heads(model))
    found: dict[str, nn.Module] = {}
    foreign: set[str] = set()
    if targets == "one-block":
        targets = [_written_by_block(model)]
    elif targets != "all-linear":
        targets = [t.strip() for t in _as_list(targets)]
        names = [name for name, _ in model.named_modules()]
        if missing := [t for t in targets if not any(_is_called(name, t) for name in names)]:
            raise ValueError(f"zo_act_targets names {', '.join(missing)}, which this model does not have.")
    for name, module in model.named_modules():
        wanted = targets == "all-linear" or any(_is_called(name, t) for t in targets)
        # PEFT trains a new head as a whole, and what else has a name that ends like it.
        if not wanted or module is head or name.endswith(heads) or name.split(".")[0] in heads:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            found[name] = module
        elif targets != "all-linear" or (next(module.parameters(recurse=False), None) is not None):
            foreign.add(type(module).__name__)
    if targets != "all-linear" and foreign:
        raise ValueError(f"zo_act_targets={targets!r} names {', '.join(sorted(foreign))}; supported are {SUPPORTED}.")
    if not found:
        raise ValueError(
            f"zo_act_targets={targets!r} matches no linear layer. Supported are {SUPPORTED}; layers with parameters in this "
            f"model: {', '.join(sorted(foreign)) or 'none'}."
        )
    return found


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _written_by_block(model: nn.Module) -> str:
    """Name of the last linear layer in the block at two thirds of a model's depth.

    Raises:
        ValueError: if the model has no list of blocks, or these have no linear layer.
    """
    blocks = list(blocks_of(model).items())
    name, block = blocks[2 * len(blocks) // 3] if blocks else ("", nn.Module())
    layers = [n for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    if not layers:
        raise ValueError("zo_act_targets='one-block' wants a model of blocks with linear layers; set 'all-linear' or names.")
    return f"{name}.{layers[-1]}"


def _as_list(targets: str | Sequence[str]) -> Sequence[str]:
    return [targets] if isinstance(targets, str) else targets


def _shape(module: nn.Module) -> tuple[int, int]:
    """``(d_in, d_out)``, from attributes: packed 4-bit weights do not show it."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def _task_type(model: nn.Module) -> str | None:
    """What PEFT wants to know of the model, from its class name."""
    names = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForSequenceClassification": "SEQ_CLS"}
    found = [task for ending, task in names.items() if type(model).__name__.endswith(ending)]
    return found[0] if found else None


def freeze_basis(model: nn.Module) -> None:
    """Train B alone, and nothing on the output layer; loading an adapter as trainable unfreezes A."""
    for _, layer in adapted_layers(model):
        layer.lora_A.requires_grad_(False)
    freeze_output_layer(model)


def freeze_output_layer(model: nn.Module) -> None:
    """Freeze the adapter on a language model's output layer, if there is one: `hf_zo.head` has fitted it."""
    head = adapted_lm_head(model)
    if head is not None:
        cast(nn.Module, head).requires_grad_(False)


def basis_of(layer: LoraLayer) -> torch.Tensor:
    """``V^T`` of a layer, r x d_in."""
    return factors_of(layer)[0]


def check_basis(model: nn.Module) -> None:
    """Make sure that an adapter which is already there is one of ours.

    Raises:
        ValueError: if some A is not orthonormal: an ordinary LoRA adapter.
    """
    layers = adapted_layers(model)
    for name, layer in layers:
        a = basis_of(layer).float()
        tolerance = 1e-3 if basis_of(layer).dtype == torch.float32 else 0.1
        error = (a @ a.T - torch.eye(len(a), device=a.device)).abs().max()
        if layer.scaling[layer.active_adapters[0]] != 1 or error > tolerance:
            raise ValueError(
                f"zo_method='zo_act' or 'auto': the adapter on {name} has no activation basis (an orthonormal A and "
                "lora_alpha = r). Pass the base model, which gets its adapter at the start of training, or the adapter of an "
                "earlier such run; an adapter of your own is trained by zo_method='mezo'."
            )
    if not layers:
        raise ValueError("zo_method='zo_act' trains a LoRA adapter, and this PEFT model has none; pass the base model.")


@torch.no_grad()
def draw_adapter(model: nn.Module, seed: int) -> nn.Module:
    """Draw the A factors of a LoRA adapter anew, with PEFT's distribution, from keyed noise; returns ``model``.

    A run that starts from them needs to store their key only, not their values (`hf_zo.trajectory`).
    """
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.copy_(adapter_values(adapter_key(seed, name), p))
    return model


def adapter_key(seed: int, name: str) -> int:
    """Noise key of an adapter's tensor."""
    return noise.stream_key(seed, 0, 0, "adapter", name)


def adapter_values(key: int, like: torch.Tensor) -> torch.Tensor:
    """Uniform on +-1 / sqrt(d_in), of the shape, dtype and device of ``like``."""
    u = noise.uniform(key, like.numel(), like.device).view(like.shape)
    return ((2 * u - 1) / like.shape[-1] ** 0.5).to(like.dtype)


@torch.no_grad()
def start_prefix(model: PeftModel, seed: int) -> PeftModel:
    """Start a prefix (`PrefixTuningConfig`) at the keys and values of random tokens, drawn by ``seed``; returns ``model``.

    As in MeZO's published runs (arXiv 2305.17333, prefix tuning): PEFT's own start, unit noise, is nothing that the model's
    attention has ever read.
    """
    drawn = noise.uniform(adapter_key(seed, "prefix"), virtual_tokens(model), model.device)
    ids = (model.get_input_embeddings().num_embeddings * drawn).long()[None]
    base = base_of(model)
    with evaluation_mode(base):
        read = getattr(base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True), "past_key_values", None)
    if read is None:
        raise ValueError(
            f"peft='prefix': {type(base).__name__} keeps no keys and values that a prefix could start from; use lora."
        )
    initialize_kv_prefix_from_past_key_values(model, past_key_values=read)
    return model


@contextmanager
def packed_weights_kept(model: nn.Module) -> Iterator[None]:
    """Leave 4-bit weights as they are while the model's state dict is taken.

    On CPUs with AVX-512 bf16, bitsandbytes packs NF4 weights at the first forward and unpacks them when a state dict is taken,
    without turning their scales back (seen in 0.50): after a checkpoint the frozen base would be another model.
    """
    kept = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        if weight is not None and getattr(state, "packing_format_for_cpu", False):
            kept.append((weight, weight.data, state, dict(vars(state))))
    try:
        yield
    finally:
        for weight, data, state, fields in kept:
            weight.data = data
            vars(state).update(fields)
            weight.quant_state = state  # type: ignore[attr-defined]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    forward: Callable[[Mapping[str, Any]], Any],
    *,
    seed: int = 0,
    exclude_first_token: bool = False,
) -> dict[str, float]:
    """Write the activation basis of every adapted layer into its A, and return the share of energy it captures.

    Args:
        model: what `attach` returned.
        batches: calibration batches; padding is told by ``attention_mask``, packed sequences by ``position_ids``.
        forward: runs the model on a batch; called without gradients, several times per batch.
        seed: key of the random sketch.
        exclude_first_token: see `activation_adapter`.

    Raises:
        ValueError: if no token reaches any of the layers.
    """
    finders: dict[str, _RangeFinder] = {}
    for sweep in range(_SWEEPS):
        with _watching(model, finders, seed) as select:
            for batch in batches:
                select(_tokens(batch, exclude_first_token))
                forward(batch)
        for finder in set(finders.values()):
            finder.turn(last=sweep == _SWEEPS - 1)
    seen = {name: finder for name, finder in finders.items() if finder.tokens}
    if not seen:
        raise ValueError(
            f"The {len(batches)} calibration batches have no usable token: every position is padding, or excluded. Check the "
            "training data and zo_act_samples."
        )
    ratios = sorted(finder.dominance() for finder in set(seen.values()))
    logger.info(
        "The first direction of a layer's inputs has %.3g times the second's singular value (median; most: %.3g). Where it is "
        "that of a token on which attention is parked, zo_act_exclude_first_token leaves it out.",
        ratios[len(ratios) // 2],
        ratios[-1],
    )
    captured = {}
    for name, layer in adapted_layers(model):
        a = basis_of(layer)
        if name in seen:
            basis = seen[name].basis[:, : len(a)]
            captured[name] = seen[name].captured(len(a))
        else:
            logger.warning("No calibration token reached %s; its basis is random.", name)
            basis = _random_basis(name, a, seed)
        a.data.copy_(basis.T)
    return captured


@torch.no_grad()
def draw_basis(model: nn.Module, seed: int = 0) -> None:
    """Write a random orthonormal basis into every adapted layer's A: what the activations are worth is seen against it.

    Args:
        model: what `attach` returned.
        seed: key of the draw; each layer has a basis of its own.
    """
    for name, layer in adapted_layers(model):
        a = basis_of(layer)
        a.data.copy_(_random_basis(name, a, seed).T)


def _random_basis(name: str, a: torch.Tensor, seed: int) -> torch.Tensor:
    key = noise.stream_key(seed, 0, 0, "basis", name)
    return torch.linalg.qr(noise.sample(key, (a.shape[1], len(a)), a.device)).Q


class _RangeFinder:
    """Block power iteration for the leading eigenvectors of X^T X, from rows of X that come in pieces."""

    def __init__(self, key: int, width: int, rank: int, device: torch.device) -> None:
        columns = min(width, rank + _OVERSAMPLING)
        self.basis = torch.linalg.qr(noise.sample(key, (width, columns), device)).Q
        self.product = torch.zeros_like(self.basis)
        self.energy = torch.zeros((), dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, rows: torch.Tensor) -> None:
        """Take in rows of X."""
        rows = rows.float()
        self.product += rows.T @ (rows @ self.basis)
        self.energy += rows.pow(2).sum()
        self.tokens += len(rows)

    def turn(self, last: bool) -> None:
        """End a sweep: the orthonormal range of X^T X times the old basis, in order of energy at the last."""
        if last:
            self.values = torch.linalg.eigvalsh(self.basis.T @ self.product)  # Ritz values of X^T X, ascending
            left = torch.linalg.svd(self.product, full_matrices=False).U
            peak = left.gather(0, left.abs().argmax(0, keepdim=True))
            self.basis = left * peak.sign()  # of two signs, the one that makes the largest entry positive
            return
        self.basis = torch.linalg.qr(self.product).Q
        self.product = torch.zeros_like(self.product)
        self.energy.zero_()
        self.tokens = 0

    def dominance(self) -> float:
        """Ratio of the first two singular values of the rows, from the last sweep; 1 of rows of a single number."""
        first, second = self.values.flip(0)[:2] if len(self.values) > 1 else self.values.repeat(2)
        return float((first / second.clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=0).sqrt())

    def captured(self, rank: int) -> float:
        """Share of the rows' energy that the first ``rank`` columns keep, from the last sweep."""
        return float(self.values.flip(0)[:rank].sum() / self.energy.clamp(min=torch.finfo(torch.float32).tiny))


@contextmanager
def _watching(model: nn.Module, finders: dict[str, _RangeFinder], seed: int) -> Any:
    """Feed the inputs of all adapted layers to their finders. Layers that read the same tensor in a row share one."""
    chosen: torch.Tensor | None = None
    last: tuple[torch.Tensor, str] | None = None
    handles = []
    rank = max((len(basis_of(layer)) for _, layer in adapted_layers(model)), default=0)  # layers that share may want less

    def select(tokens: torch.Tensor | None) -> None:
        nonlocal chosen, last
        chosen, last = tokens, None

    def hook(name: str, layer: LoraLayer) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal last
            x = args[0] if args else next(iter(kwargs.values()))
            if last is not None and last[0] is x:
                leader = last[1]
                if name not in finders:
                    finders[name] = finders[leader]
                if finders[name] is finders[leader]:
                    return
            last = (x, name)
            a = basis_of(layer)
            if name not in finders:
                key = noise.stream_key(seed, 0, 0, "basis", name)
                finders[name] = _RangeFinder(key, a.shape[1], rank, x.device)
            rows = x.reshape(-1, x.shape[-1])
            if chosen is not None and chosen.shape == x.shape[:-1]:
                rows = rows[chosen.reshape(-1).to(x.device)]
            if len(rows):
                finders[name].add(rows)

        return see

    try:
        for name, layer in adapted_layers(model):
            handles.append(cast(nn.Module, layer).register_forward_pre_hook(hook(name, layer), with_kwargs=True))
        yield select
    finally:
        for handle in handles:
            handle.remove()


def _tokens(batch: Mapping[str, Any], exclude_first_token: bool) -> torch.Tensor | None:
    """Which positions of a batch count; None for all."""
    mask, positions, ids = (batch.get(key) for key in ("attention_mask", "position_ids", "input_ids"))
    keep = mask.bool() if mask is not None and mask.dim() == 2 else None
    if not exclude_first_token:
        return keep
    if positions is not None and keep is None:  # packed: every sequence restarts at 0
        return positions > 0
    if keep is None:
        keep = torch.ones_like(ids, dtype=torch.bool) if ids is not None else None
    return keep if keep is None else keep & (keep.long().cumsum(-1) > 1)
