"""`noise.displace` and `noise.energy` for contiguous CPU tensors, compiled by numba: one read and one write of the weights.

Blocks of 1,024 elements pass through small buffers that stay in the first-level cache: words of the generator, fp32 values, the
rounded result. Every loop is of a kind that compilers turn into vector instructions. bf16 tensors arrive as uint16 and fp32
tensors as uint32, because numba has no bf16. numba does not contract a product and a sum into a fused multiply-add, which the
agreement with the torch implementation relies on.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, call-arg, call-overload"

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import float32, int32, int64, prange, types, uint32, uint64
from numba.extending import intrinsic

from .noise import _MIX_1, _MIX_2, GOLDEN, QUANTILE

_GOLDEN, _MIXER_1, _MIXER_2 = np.uint64(GOLDEN), np.uint64(_MIX_1), np.uint64(_MIX_2)
_C0, _C1, _C2 = np.array(QUANTILE, dtype=np.float32)
_BLOCK = 1024
_BLOCKS_PER_TASK = 64
_SERIAL_BELOW = 1 << 15  # starting a parallel region costs about as much as this many elements


_HALF = ir.Constant(ir.IntType(32), 16)


@intrinsic
def _float_of(_context, raw):
    """The fp32 number whose bits are ``raw`` (uint32), or whose upper half they are (uint16)."""

    def generate(_context, builder, signature, args):
        bits = args[0]
        if signature.args[0] == types.uint16:
            bits = builder.shl(builder.zext(bits, ir.IntType(32)), _HALF)
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(raw), generate


@intrinsic
def _bits_of(_context, x):
    return types.uint32(types.float32), lambda _c, builder, _s, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _rounded(_context, x, up, like):
    """Bits of the fp32 number ``x`` as a word like ``like``: if that is uint16 the upper half, after adding ``up`` below it."""

    def generate(_context, builder, signature, args):
        bits = builder.bitcast(args[0], ir.IntType(32))
        if signature.args[2] == types.uint16:
            bits = builder.lshr(builder.add(bits, args[1]), _HALF)
            bits = builder.trunc(bits, ir.IntType(16))
        return bits

    return like(types.float32, types.uint32, like), generate


@numba.njit(inline="always")
def _nearest(x, like):
    """To nearest, ties to even."""
    return _rounded(x, uint32(uint32(0x7FFF) + ((_bits_of(x) >> uint32(16)) & uint32(1))), like)


@numba.njit(inline="always")
def _fill_words(words, count, key, first):
    base = uint64(key) + uint64(first) * _GOLDEN
    for j in range(count):
        x = base + uint64(j) * _GOLDEN
        x = (x ^ (x >> uint64(30))) * _MIXER_1
        x = (x ^ (x >> uint64(27))) * _MIXER_2
        words[j] = x ^ (x >> uint64(31))


@numba.njit(inline="always")
def _gaussian(field):
    """What `noise.normal_table` holds for ``field``."""
    s = (float32(field) - float32(32767.5)) * float32(2.0**-15)
    w = float32(int32(int32(0x3F800000) - int32(_bits_of(float32(1.0) - s * s))))
    return s * ((w * _C2 + _C1) * w + _C0)


@numba.njit(inline="always")
def _fill_rademacher(z, words, first, count, key):
    """Noise of ``64 * count`` elements from word ``first``: a one in the word is a minus."""
    _fill_words(words, count, key, first)
    halves = words.view(np.uint32)
    for j in range(2 * count):
        half = halves[j]
        for i in range(32):
            z[32 * j + i] = _float_of(uint32(uint32(0x3F800000) | (((half >> uint32(i)) & uint32(1)) << uint32(31))))


@numba.njit(inline="always")
def _round(target, rounded, value, n, stochastic, rounding_key, there, words):
    """Write ``n`` numbers whose place in the stream of the rounding key begins at ``there``.

    Through a small buffer, because compilers cannot tell that ``target`` shares no memory with the rest.
    """
    if stochastic:
        skip = there % 4
        _fill_words(words, (skip + n + 3) // 4, rounding_key, there // 4)
        up = words.view(np.uint16)[skip : skip + n]
        for i in range(n):
            rounded[i] = _rounded(value[i], uint32(up[i]), rounded[i])
    else:
        for i in range(n):
            rounded[i] = _nearest(value[i], rounded[i])
    for i in range(n):
        target[i] = rounded[i]


@numba.njit(nogil=True, cache=True)
def _run_blocks(out, theta, starts, size, first_block, last_block, keys, factors, gaussian, decay, stochastic, rounding_key):
    words = np.empty(_BLOCK // 4 + 1, np.uint64)
    fields = words.view(np.uint16)
    z, value = np.empty(_BLOCK + 64, np.float32), np.empty(_BLOCK, np.float32)
    rounded = np.empty(_BLOCK, theta.dtype)
    per_row = (size + _BLOCK - 1) // _BLOCK
    for b in range(first_block, last_block):
        row, within = b // per_row, b % per_row * _BLOCK
        here = row * size + within  # in the tensor
        there = starts[row] + within  # in the stream
        n = min(_BLOCK, size - within)
        source, target = theta[here : here + n], out[here : here + n]
        if keys.size == 0:
            for i in range(n):
                value[i] = _float_of(source[i]) * decay
        for k in range(keys.size):
            factor = factors[k]
            if gaussian:
                skip = there % 4
                _fill_words(words, (skip + n + 3) // 4, keys[k], there // 4)
                if k == 0:
                    for i in range(n):
                        value[i] = _float_of(source[i]) * decay + factor * _gaussian(fields[skip + i])
                else:
                    for i in range(n):
                        value[i] = value[i] + factor * _gaussian(fields[skip + i])
            else:
                skip = there % 64
                _fill_rademacher(z, words, there // 64, (skip + n + 63) // 64, keys[k])
                if k == 0:
                    for i in range(n):
                        value[i] = _float_of(source[i]) * decay + factor * z[skip + i]
                else:
                    for i in range(n):
                        value[i] = value[i] + factor * z[skip + i]
        _round(target, rounded, value, n, stochastic, rounding_key, there, words)


@numba.njit(parallel=True, nogil=True, cache=True)
def _run_parallel(out, theta, starts, size, blocks, keys, factors, gaussian, decay, stochastic, rounding_key):
    for t in prange((blocks + _BLOCKS_PER_TASK - 1) // _BLOCKS_PER_TASK):
        first = t * _BLOCKS_PER_TASK
        last = min(blocks, first + _BLOCKS_PER_TASK)
        _run_blocks(out, theta, starts, size, first, last, keys, factors, gaussian, decay, stochastic, rounding_key)


def run(out, theta, starts, keys, factors, gaussian, decay, stochastic, rounding_key, threads):
    """Write the displaced ``theta`` into ``out``; both are flat arrays of raw words (uint16 for bf16, uint32 for fp32).

    ``theta`` consists of ``len(starts)`` rows of equal size, and row ``r`` takes its noise from element ``starts[r]`` on.
    """
    size = theta.size // starts.size
    blocks = starts.size * ((size + _BLOCK - 1) // _BLOCK)
    if theta.size < _SERIAL_BELOW or threads == 1:
        _run_blocks(out, theta, starts, size, 0, blocks, keys, factors, gaussian, decay, stochastic, rounding_key)
    else:
        rest = (keys, factors, gaussian, decay, stochastic, rounding_key)
        _with_threads(threads, _run_parallel, out, theta, starts, size, blocks, *rest)


def _with_threads(threads, function, *arguments):
    """Run in parallel. Numba's OpenMP layer, when it starts, sets its own number of threads for torch too: give it back."""
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    result = function(*arguments)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return result


@numba.njit(nogil=True, cache=True)
def _run_rows(out, theta, numbers, first, last, left, right_t, ranks, factors, decay, stochastic, rounding_key):
    size = right_t.shape[1]
    words = np.empty(size // 4 + 2, np.uint64)
    value, z = np.empty(size, np.float32), np.empty(size, np.float32)
    rounded = np.empty(size, theta.dtype)
    for row in range(first, last):
        source, target = theta[row * size : (row + 1) * size], out[row * size : (row + 1) * size]
        for j in range(size):
            value[j] = _float_of(source[j]) * decay
        k = 0
        for term in range(ranks.size):
            factor, rank = factors[term], ranks[term]
            if rank == 1:  # the usual ranks take one pass
                u, v = left[row, k], right_t[k]
                for j in range(size):
                    value[j] = value[j] + factor * (u * v[j])
            elif rank == 2:
                u, v, u2, v2 = left[row, k], right_t[k], left[row, k + 1], right_t[k + 1]
                for j in range(size):
                    value[j] = value[j] + factor * (u * v[j] + u2 * v2[j])
            else:
                u, v = left[row, k], right_t[k]
                for j in range(size):
                    z[j] = u * v[j]
                for r in range(1, rank):
                    u, v = left[row, k + r], right_t[k + r]
                    for j in range(size):
                        z[j] = z[j] + u * v[j]
                for j in range(size):
                    value[j] = value[j] + factor * z[j]
            k += rank
        _round(target, rounded, value, size, stochastic, rounding_key, numbers[row] * size, words)


@numba.njit(parallel=True, nogil=True, cache=True)
def _run_rows_parallel(out, theta, numbers, left, right_t, ranks, factors, decay, stochastic, rounding_key):
    rows = numbers.size
    per_task = max(1, _BLOCK * _BLOCKS_PER_TASK // right_t.shape[1])
    for t in prange((rows + per_task - 1) // per_task):
        first = t * per_task
        last = min(rows, first + per_task)
        _run_rows(out, theta, numbers, first, last, left, right_t, ranks, factors, decay, stochastic, rounding_key)


def run_low_rank(out, theta, numbers, terms, decay, stochastic, rounding_key, threads):
    """As `run`, for a sum of products ``factor * left @ right_t``; row i of ``theta`` is row ``numbers[i]`` of its matrix."""
    left = np.concatenate([term[1] for term in terms], axis=1)
    right_t = np.concatenate([term[2] for term in terms], axis=0)
    ranks = np.array([term[1].shape[1] for term in terms])
    factors = np.array([term[0] for term in terms], dtype=np.float32)
    arguments = (out, theta, np.ascontiguousarray(numbers, dtype=np.int64))
    rest = (left, right_t, ranks, factors, decay, stochastic, rounding_key)
    if theta.size < _SERIAL_BELOW or threads == 1:
        _run_rows(*arguments, 0, len(numbers), *rest)
    else:
        _with_threads(threads, _run_rows_parallel, *arguments, *rest)


@numba.njit(nogil=True, cache=True)
def _sum_blocks(n, first_block, last_block, key):
    words = np.empty(_BLOCK // 4, np.uint64)
    fields = words.view(np.uint16)
    total = 0
    for b in range(first_block, last_block):
        start = b * _BLOCK
        size = min(_BLOCK, n - start)
        _fill_words(words, (size + 3) // 4, key, start // 4)
        for i in range(size):
            q = int64(int32(np.rint(_gaussian(fields[i]) * float32(65536.0))))
            total += q * q
    return total


@numba.njit(parallel=True, nogil=True, cache=True)
def _sum_parallel(n, begin, end, key):
    total = 0
    for t in prange((end - begin + _BLOCKS_PER_TASK - 1) // _BLOCKS_PER_TASK):
        first = begin + t * _BLOCKS_PER_TASK
        total += _sum_blocks(n, first, min(end, first + _BLOCKS_PER_TASK), key)
    return total


def energy(key, start, end, threads):
    """Squares of the numbers ``start``, a multiple of a block, to ``end`` of a Gaussian stream.

    Rounded to 16 binary places and summed in units of 2^-32.
    """
    blocks = start // _BLOCK, (end + _BLOCK - 1) // _BLOCK
    if end - start < _SERIAL_BELOW or threads == 1:
        return _sum_blocks(end, *blocks, key)
    return _with_threads(threads, _sum_parallel, end, *blocks, key)
