"""Counter-based noise: element ``i`` of a stream is a pure function of a 64-bit key and ``i``.

Everything random in this package comes from here. A *stream* is named by ``(seed, step, index, purpose, name)``; the five
are hashed to a 64-bit key, and word ``j`` of the stream is ``mix(key + j * GOLDEN)``, where ``mix`` is the splitmix64
finaliser (Steele, Lea and Flood 2014). A word gives 64 signs, or four 16-bit fields, each of which is turned into a normal
quantile by nine rounded fp32 operations:

    s = (field - 32767.5) / 2^15        w = -log2(1 - s^2), with the logarithm read off the exponent and mantissa bits
    z = s (c0 + c1 w + c2 w^2)

No transcendental function and no table is involved, so the same bits appear on every device, in any chunking and in any
order; nothing is stored and no global generator is touched.

What this means for statistics: over the 65,536 fields z is exactly symmetric and has unit variance to 1e-8; it is within 0.5 %
(root mean square) of the normal quantile and never further than 0.14. The tails end at 4.46 standard deviations, the kurtosis
is 2.999 and the sixth moment 15.05. Fields are independent as far as splitmix64 goes. Zeroth-order estimators need symmetry,
independence and unit variance only. A table of exact quantiles would be slower, because no first-level cache holds it.

`displace` is the one primitive both probes and updates are made of: ``out = round(decay * theta + sum_k a_k * z_k)``,
accumulated in fp32 (fp64 for fp64 tensors) and rounded once. There are three implementations: a numba kernel for contiguous
CPU tensors, a Triton kernel for CUDA, and plain torch for everything else. They agree bit for bit: every product and every
sum is rounded on its own, which forbids fused multiply-adds.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch

Kind = Literal["gaussian", "rademacher"]

GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
# Least squares against the normal quantiles at the midpoints of 65,536 equal parts, scaled to unit variance; w counts 2^-23.
QUANTILE = (float.fromhex("0x1.3975cap+0"), float.fromhex("0x1.03b982p-25"), float.fromhex("-0x1.4a66cap-55"))
_CHUNK = 1 << 22  # elements per pass of the torch implementation: bounds its int64 temporaries to a few tens of MB
_WHOLE = 1 << 30  # numbers whose squares, in units of 2^-32, add up in 64 bits


def stream_key(seed: int, step: int, index: int, purpose: str, name: str) -> int:
    """64-bit key of one noise stream.

    Args:
        seed: run seed (``zo_seed``).
        step: optimizer step, or interval number for noise that is held over several steps.
        index: number of the direction within the step.
        purpose: what the stream is for (``"direction"``, ``"rounding"``, …), so that equal numbers never share noise.
        name: canonical tensor name; equal-shaped tensors therefore get independent noise.
    """
    message = struct.pack("<qqq", seed, step, index) + purpose.encode() + b"\0" + name.encode()
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")


@cache
def normal_table() -> np.ndarray:
    """What each of the 65,536 fields becomes, fp32: the formula above, one rounded operation at a time."""
    c0, c1, c2 = map(np.float32, QUANTILE)
    s = (np.arange(1 << 16).astype(np.float32) - np.float32(32767.5)) * np.float32(2.0**-15)
    w = (np.int32(0x3F800000) - (np.float32(1) - s * s).view(np.int32)).astype(np.float32)
    return s * ((w * c2 + c1) * w + c0)


@cache
def _squares() -> np.ndarray:
    """Squares of the table's values to 16 binary places, in units of 2^-32, int64."""
    return np.rint(normal_table() * np.float32(1 << 16)).astype(np.int64) ** 2


@cache
def _table_on(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(normal_table()).to(device)


def sample(key: int, shape: Sequence[int], device: torch.device | str = "cpu", kind: Kind = "gaussian") -> torch.Tensor:
    """The first ``prod(shape)`` numbers of a stream, fp32, in C order."""
    out = torch.zeros(tuple(shape), dtype=torch.float32, device=device)
    return displace(out, out, [key], [1.0], kind=kind)


def uniform(key: int, n: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """``n`` numbers of a stream, uniform on [0, 1), fp64 with 53 random bits; one word each."""
    return _shift_right(_torch_words(key, 0, n, torch.device(device)), 11).double() * 2.0**-53


def energy(key: int, n: int, device: torch.device | str = "cpu", kind: Kind = "gaussian") -> torch.Tensor:
    """Squared norm of the first ``n`` numbers of a stream: a scalar fp64 tensor on ``device``, a multiple of 2^-32.

    The numbers are rounded to 16 binary places and their squares added up as integers, so that the result does not depend on
    the number of threads.
    """
    device = torch.device(device)
    if kind == "rademacher":
        return torch.tensor(float(n), dtype=torch.float64, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, n, _WHOLE):
        total += _energy(key, start, min(n, start + _WHOLE), device).double() * 2.0**-32
    return total


def _energy(key: int, start: int, end: int, device: torch.device) -> torch.Tensor:
    """Of some numbers of a Gaussian stream, in units of 2^-32: int64."""
    if device.type == "cpu" and (kernel := _kernel()) is not None:
        return torch.tensor(kernel.energy(np.uint64(key), start, end, torch.get_num_threads()))
    squares = torch.from_numpy(_squares()).to(device)
    total = torch.zeros((), dtype=torch.int64, device=device)
    for at in range(start, end, _CHUNK):
        total += squares[_torch_fields(key, range(at, min(end, at + _CHUNK)), 16, device)].sum()
    return total


def displace(
    out: torch.Tensor,
    theta: torch.Tensor,
    keys: Sequence[int],
    coefficients: Sequence[float],
    *,
    kind: Kind = "gaussian",
    decay: float = 1.0,
    rounding_key: int | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write ``decay * theta + sum_k coefficients[k] * z(keys[k])`` into ``out`` and return it.

    Args:
        out: destination, same shape, dtype and device as ``theta``; may be ``theta`` itself.
        theta: fp32, fp64, bf16 or fp16.
        keys: stream keys of the noise terms, added in this order.
        coefficients: one factor per key.
        kind: distribution of the noise.
        decay: factor on ``theta`` (decoupled weight decay).
        rounding_key: round 16-bit results stochastically with the bits of this stream instead of to nearest, so that
            displacements far below one ulp survive in expectation. Ignored for fp32 and fp64.
        rows: ``theta`` holds only these rows (int64, shape ``(len(theta),)``) of a matrix whose noise is meant.
    """
    if _numba_usable(out, theta):
        apply = _displace_numba
    elif _triton_usable(out, theta, rounding_key):
        apply = _displace_triton
    else:
        apply = _displace_torch
    apply(out, theta, keys, coefficients, kind, decay, rounding_key, rows)
    return out


def product(left: torch.Tensor, right_t: torch.Tensor) -> torch.Tensor:
    """``left @ right_t`` in fp32, summed in the order of the rank, every product and sum rounded: the same on every device."""
    if not left.shape[1]:  # of an empty matrix
        return left @ right_t
    total = left[:, :1] * right_t[:1]
    for k in range(1, left.shape[1]):
        total = total + left[:, k : k + 1] * right_t[k : k + 1]
    return total


def displace_low_rank(
    out: torch.Tensor,
    theta: torch.Tensor,
    terms: Sequence[tuple[float, torch.Tensor, torch.Tensor]],
    *,
    decay: float = 1.0,
    rounding_key: int | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write ``decay * theta + sum_k a_k * U_k V_k^T`` into ``out`` and return it.

    Args:
        out, theta, decay, rounding_key, rows: as for `displace`; ``theta`` is taken as m x n, m its first dimension.
        terms: factors ``a_k``, ``U_k`` (m x r, fp32) and ``V_k^T`` (r x n, fp32). With ``rows`` U still has all rows.
    """
    if rows is not None:
        rows = rows.to(theta.device)
        terms = [(a, left[rows], right_t) for a, left, right_t in terms]
    if not theta.numel():
        return out
    m = len(theta)
    size = theta.numel() // m
    if _numba_usable(out, theta):
        kernel = _kernel()
        assert kernel is not None
        kernel.run_low_rank(
            _raw(out),
            _raw(theta),
            np.arange(m) if rows is None else rows.numpy(),
            [(np.float32(a), left.contiguous().numpy(), right_t.contiguous().numpy()) for a, left, right_t in terms],
            np.float32(decay),
            rounding_key is not None and theta.dtype == torch.bfloat16,
            np.uint64(rounding_key or 0),
            torch.get_num_threads(),
        )
        return out
    step = max(1, _CHUNK // size)
    accumulator = torch.float64 if theta.dtype == torch.float64 else torch.float32
    for first in range(0, m, step):
        piece = slice(first, min(first + step, m))
        value = theta[piece].reshape(-1, size).to(accumulator)
        if decay != 1.0:
            value = value * decay
        for a, left, right_t in terms:
            value = value + product(left[piece], right_t).to(accumulator) * a
        if rounding_key is not None and theta.dtype in (torch.bfloat16, torch.float16):
            here = torch.arange(piece.start, piece.stop, device=theta.device) if rows is None else rows[piece]
            value = _stochastic(value.view(-1), rounding_key, _positions(here, size), theta.dtype)
        out[piece] = value.view(theta[piece].shape).to(theta.dtype)
    return out


def round_stochastically(values: torch.Tensor, key: int, out: torch.Tensor) -> torch.Tensor:
    """Round fp32 ``values`` into the 16-bit tensor ``out``; each element goes up with probability equal to the remainder."""
    flat, target = values.reshape(-1), out if out.is_contiguous() else torch.empty_like(out).contiguous()
    destination = target.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK]
        destination[start : start + _CHUNK] = _stochastic(piece, key, range(start, start + len(piece)), out.dtype)
    if target is not out:
        out.copy_(target)
    return out


# ---- torch ---------------------------------------------------------------------------------------------------------


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts int64 arithmetically


def _torch_words(key: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    return _mixed(key, torch.arange(first, first + count, dtype=torch.int64, device=device))


def _mixed(key: int, counters: torch.Tensor) -> torch.Tensor:
    x = counters * _signed(GOLDEN) + _signed(key)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


Where = range | torch.Tensor
"""Elements of a stream: a range, or their numbers (int64)."""


def _positions(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Numbers of the elements of chosen rows of ``size`` elements each."""
    return (rows[:, None] * size + torch.arange(size, device=rows.device)).view(-1)


def _torch_fields(key: int, where: Where, width: int, device: torch.device) -> torch.Tensor:
    """The fields of ``width`` bits each that belong to the elements, int64; field 0 is the lowest of its word."""
    per_word, mask = 64 // width, (1 << width) - 1
    if isinstance(where, torch.Tensor):
        return _mixed(key, where // per_word) >> (where % per_word * width) & mask
    first, last = where.start // per_word, (where.stop + per_word - 1) // per_word
    words = _torch_words(key, first, last - first, device)
    shifts = torch.arange(0, 64, width, dtype=torch.int64, device=device)
    offset = where.start - first * per_word
    return (words[:, None] >> shifts & mask).reshape(-1)[offset : offset + len(where)]


def _torch_noise(key: int, where: Where, kind: Kind, device: torch.device) -> torch.Tensor:
    if kind == "gaussian":
        return _table_on(device)[_torch_fields(key, where, 16, device)]
    return (1 - 2 * _torch_fields(key, where, 1, device)).float()


def _stochastic(values: torch.Tensor, key: int, where: Where, dtype: torch.dtype) -> torch.Tensor:
    bits = _torch_fields(key, where, 16, values.device).to(torch.int32)
    raw = values.float().contiguous().view(torch.int32)
    if dtype == torch.bfloat16:  # the upper half of the fp32 word: add 16 random bits below it and cut
        return ((raw + bits) >> 16).to(torch.int16).view(torch.bfloat16)
    if dtype != torch.float16:
        raise TypeError(f"stochastic rounding is defined for bfloat16 and float16 tensors, not for {dtype}")
    normal = ((raw + (bits >> 3)) & ~0x1FFF).view(torch.float32)  # fp16 keeps 10 of 23 mantissa bits
    # Below 2^-14 the fp16 grid is uniform with spacing 2^-24. fp64, because in fp32 the sum itself would round up.
    subnormal = torch.floor(values.double() * 2.0**24 + bits * 2.0**-16).copysign(values) * 2.0**-24
    return torch.where(values.abs() < 2.0**-14, subnormal, normal).to(torch.float16)


def _displace_torch(
    out: torch.Tensor,
    theta: torch.Tensor,
    keys: Sequence[int],
    coefficients: Sequence[float],
    kind: Kind,
    decay: float,
    rounding_key: int | None,
    rows: torch.Tensor | None = None,
) -> None:
    accumulator = torch.float64 if theta.dtype == torch.float64 else torch.float32
    source = theta.reshape(-1)
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    destination = target.view(-1)
    positions = None
    if rows is not None:
        positions = _positions(rows.to(theta.device), theta[0].numel())
    for start in range(0, source.numel(), _CHUNK):
        value = source[start : start + _CHUNK].to(accumulator)
        where: Where = range(start, start + value.numel()) if positions is None else positions[start : start + _CHUNK]
        if decay != 1.0:
            value = value * decay
        for key, coefficient in zip(keys, coefficients, strict=True):
            z = _torch_noise(key, where, kind, theta.device).to(accumulator)
            value = value + z * coefficient  # two operations on purpose: `alpha=` may fuse them
        if rounding_key is not None and theta.dtype in (torch.bfloat16, torch.float16):
            value = _stochastic(value, rounding_key, where, theta.dtype)
        destination[start : start + _CHUNK] = value.to(theta.dtype)
    if target is not out:
        out.copy_(target)


# ---- numpy and numba -------------------------------------------------------------------------------------------------


@cache
def _kernel() -> Any | None:
    """`noise_numba`, or None where numba is not installed (the torch implementation gives the same bits)."""
    try:
        from . import noise_numba
    except ImportError:
        return None
    return noise_numba


def _numba_usable(out: torch.Tensor, theta: torch.Tensor) -> bool:
    return (
        theta.device.type == "cpu"
        and theta.dtype in (torch.float32, torch.bfloat16)
        and theta.is_contiguous()
        and out.is_contiguous()
        and theta.numel() > 0
        and _kernel() is not None
    )


def _raw(x: torch.Tensor) -> np.ndarray:
    """A contiguous tensor as a flat array of raw words: uint16 for bf16, uint32 for fp32."""
    integer, unsigned = (torch.int16, np.uint16) if x.dtype == torch.bfloat16 else (torch.int32, np.uint32)
    return x.detach().view(-1).view(integer).numpy().view(unsigned)


def _displace_numba(
    out: torch.Tensor,
    theta: torch.Tensor,
    keys: Sequence[int],
    coefficients: Sequence[float],
    kind: Kind,
    decay: float,
    rounding_key: int | None,
    rows: torch.Tensor | None = None,
) -> None:
    kernel = _kernel()
    assert kernel is not None
    starts = np.zeros(1, dtype=np.int64) if rows is None else rows.numpy() * theta[0].numel()
    kernel.run(
        _raw(out),
        _raw(theta),
        starts,
        np.array(keys, dtype=np.uint64),
        np.array(coefficients, dtype=np.float32),
        kind == "gaussian",
        np.float32(decay),
        rounding_key is not None and theta.dtype == torch.bfloat16,
        np.uint64(rounding_key or 0),
        torch.get_num_threads(),
    )


# ---- triton ----------------------------------------------------------------------------------------------------------


@cache
def _triton() -> Any | None:
    """`noise_triton`, or None where Triton is not installed (the torch implementation gives the same bits)."""
    try:
        from . import noise_triton
    except ImportError:
        return None
    return noise_triton


def _triton_usable(out: torch.Tensor, theta: torch.Tensor, rounding_key: int | None) -> bool:
    if theta.device.type != "cuda" or (kernel := _triton()) is None:
        return False
    return bool(kernel.usable(out, theta, rounding_key is not None))


def _displace_triton(
    out: torch.Tensor,
    theta: torch.Tensor,
    keys: Sequence[int],
    coefficients: Sequence[float],
    kind: Kind,
    decay: float,
    rounding_key: int | None,
    rows: torch.Tensor | None = None,
) -> None:
    kernel = _triton()
    assert kernel is not None
    kernel.run(
        out.detach(),
        theta.detach(),
        None if rows is None else rows.to(theta.device),
        [_signed(key) for key in keys],
        list(coefficients),
        kind == "gaussian",
        decay,
        None if rounding_key is None else _signed(rounding_key),
    )
