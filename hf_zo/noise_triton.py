"""`noise.displace` for CUDA tensors, in Triton: one read and one write of the weights, no temporaries, no host synchronisation.

The same order of rounded products and sums as in the other implementations: fusing multiply and add is switched off at the
launch. Every element finds its own word of the stream; that costs some thirty operations, which a GPU hides behind the two
memory accesses. Tested on CPU in Triton's interpreter, bit for bit against torch.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-not-found, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .noise import _MIX_1, _MIX_2, GOLDEN, QUANTILE

_BLOCK = 1024
_C0, _C1, _C2 = (tl.constexpr(c) for c in QUANTILE)
_GOLDEN, _MIXER_1, _MIXER_2 = tl.constexpr(GOLDEN), tl.constexpr(_MIX_1), tl.constexpr(_MIX_2)


@triton.jit
def _word(key, counter):
    x = key + counter.to(tl.uint64) * _GOLDEN
    x = (x ^ (x >> 30)) * _MIXER_1
    x = (x ^ (x >> 27)) * _MIXER_2
    return x ^ (x >> 31)


@triton.jit
def _field(key, where):
    """16 bits for every element."""
    return (_word(key, where // 4) >> ((where % 4) * 16).to(tl.uint64)) & 0xFFFF


@triton.jit
def _gaussian(field):
    """What `noise.normal_table` holds for ``field``."""
    s = (field.to(tl.int32).to(tl.float32) - 32767.5) * 0.000030517578125
    w = (0x3F800000 - (1.0 - s * s).to(tl.int32, bitcast=True)).to(tl.float32)
    return s * ((w * _C2 + _C1) * w + _C0)


@triton.jit
def _displace(
    out, theta, keys, factors, rows, n, size, decay,
    TERMS: tl.constexpr, GAUSSIAN: tl.constexpr, BF16: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = here < n
    where = tl.load(rows + here // size, mask=inside, other=0) * size + here % size
    if BF16:  # as raw words
        raw = tl.load(theta + here, mask=inside, other=0).to(tl.uint16, bitcast=True)
        value = (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(theta + here, mask=inside, other=0.0).to(tl.float32)
    value = value * decay
    for k in tl.static_range(TERMS):
        key = tl.load(keys + k).to(tl.uint64, bitcast=True)
        if GAUSSIAN:
            z = _gaussian(_field(key, where))
        else:
            bit = (_word(key, where // 64) >> (where % 64).to(tl.uint64)) & 1
            z = 1.0 - 2.0 * bit.to(tl.float32)
        value = value + z * tl.load(factors + k)
    if BF16:
        bits = value.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            rounding_key = tl.load(keys + TERMS).to(tl.uint64, bitcast=True)
            bits = bits + _field(rounding_key, where).to(tl.uint32)
        else:  # to nearest, ties to even
            bits = bits + 0x7FFF + ((bits >> 16) & 1)
        tl.store(out + here, (bits >> 16).to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
    else:
        tl.store(out + here, value.to(out.dtype.element_ty), mask=inside)


def usable(out: torch.Tensor, theta: torch.Tensor, stochastic: bool) -> bool:
    """Whether the kernel covers these tensors; fp64, and stochastic rounding to fp16, are left to torch."""
    covered = theta.dtype in (torch.float32, torch.bfloat16) or (theta.dtype == torch.float16 and not stochastic)
    return covered and theta.is_contiguous() and out.is_contiguous() and theta.numel() > 0


def run(
    out: torch.Tensor,
    theta: torch.Tensor,
    rows: torch.Tensor | None,
    keys: list[int],
    factors: list[float],
    gaussian: bool,
    decay: float,
    rounding_key: int | None,
) -> None:
    """Write the displaced ``theta`` into ``out``; ``keys`` are signed."""
    device, bf16 = theta.device, theta.dtype == torch.bfloat16
    stochastic = rounding_key is not None and bf16
    n = theta.numel()
    if rows is None:
        rows, size = torch.zeros(1, dtype=torch.int64, device=device), n
    else:
        size = theta[0].numel()
    told = [*keys, rounding_key if stochastic and rounding_key is not None else 0]
    interpreted = isinstance(_displace, triton.runtime.interpreter.InterpretedFunction)
    _displace[(triton.cdiv(n, _BLOCK),)](
        out.view(-1).view(torch.int16) if bf16 else out.view(-1),
        theta.view(-1).view(torch.int16) if bf16 else theta.view(-1),
        torch.tensor(told, dtype=torch.int64).to(device, non_blocking=True),
        torch.tensor(factors or [0.0], dtype=torch.float32).to(device, non_blocking=True),
        rows,
        n,
        size,
        decay,
        TERMS=len(keys),
        GAUSSIAN=gaussian,
        BF16=bf16,
        STOCHASTIC=stochastic,
        BLOCK=_BLOCK,
        **({} if interpreted else {"enable_fp_fusion": False}),
    )
