"""`noise.displace` and `noise.energy` for contiguous CPU tensors, compiled by numba: one read and one write of the weights.

Blocks of 4,096 elements pass through small buffers that stay in the first-level cache: the words of a block, then the
fp32 values, then the rounded result. bf16 tensors arrive as uint16 and fp32 tensors as uint32, because numba has no bf16.
numba does not contract a product and a sum into a fused multiply-add, which the agreement with the torch implementation
relies on.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"

import numba
import numpy as np
from numba import prange, uint32, uint64

from .noise import _MIX_1, _MIX_2, GOLDEN

_GOLDEN, _MIXER_1, _MIXER_2 = np.uint64(GOLDEN), np.uint64(_MIX_1), np.uint64(_MIX_2)
_BLOCK = 4096
_BLOCKS_PER_TASK = 16
_SERIAL_BELOW = 1 << 15  # starting a parallel region costs about as much as this many elements


@numba.njit(inline="always")
def _fill_words(words, count, key, first):
    base = uint64(key) + uint64(first) * _GOLDEN
    for j in range(count):
        x = base + uint64(j) * _GOLDEN
        x = (x ^ (x >> uint64(30))) * _MIXER_1
        x = (x ^ (x >> uint64(27))) * _MIXER_2
        words[j] = x ^ (x >> uint64(31))


@numba.njit(nogil=True, cache=True)
def _run_blocks(out, theta, narrow, first_block, last_block, keys, factors, table, gaussian, decay, stochastic, rounding_key):
    n = theta.size
    words = np.empty(_BLOCK // 4, np.uint64)
    fields = words.view(np.uint16)
    value = np.empty(_BLOCK, np.float32)
    raw = value.view(np.uint32)
    for b in range(first_block, last_block):
        start = b * _BLOCK
        size = min(_BLOCK, n - start)
        source, target = theta[start : start + size], out[start : start + size]
        if narrow:
            for i in range(size):
                raw[i] = uint32(source[i]) << uint32(16)
        else:
            for i in range(size):
                raw[i] = source[i]
        if decay != np.float32(1.0):
            for i in range(size):
                value[i] = value[i] * decay
        for k in range(keys.size):
            factor = factors[k]
            if gaussian:
                _fill_words(words, (size + 3) // 4, keys[k], start // 4)
                for i in range(size):
                    value[i] = value[i] + factor * table[fields[i]]
            else:
                _fill_words(words, (size + 63) // 64, keys[k], start // 64)
                for j in range((size + 63) // 64):
                    word = words[j]
                    for i in range(j * 64, min(size, j * 64 + 64)):
                        negative = (word >> uint64(i - j * 64)) & uint64(1)
                        value[i] = value[i] + (-factor if negative else factor)
        if not narrow:
            for i in range(size):
                target[i] = raw[i]
        elif stochastic:
            _fill_words(words, (size + 3) // 4, rounding_key, start // 4)
            for i in range(size):
                target[i] = (raw[i] + uint32(fields[i])) >> uint32(16)
        else:  # to nearest, ties to even
            for i in range(size):
                target[i] = (raw[i] + uint32(0x7FFF) + ((raw[i] >> uint32(16)) & uint32(1))) >> uint32(16)


@numba.njit(parallel=True, nogil=True, cache=True)
def _run_parallel(out, theta, narrow, keys, factors, table, gaussian, decay, stochastic, rounding_key):
    blocks = (theta.size + _BLOCK - 1) // _BLOCK
    for t in prange((blocks + _BLOCKS_PER_TASK - 1) // _BLOCKS_PER_TASK):
        first = t * _BLOCKS_PER_TASK
        last = min(blocks, first + _BLOCKS_PER_TASK)
        _run_blocks(out, theta, narrow, first, last, keys, factors, table, gaussian, decay, stochastic, rounding_key)


def run(out, theta, narrow, keys, factors, table, gaussian, decay, stochastic, rounding_key, threads):
    """Write the displaced ``theta`` into ``out``; both are flat arrays of raw words (uint16 for bf16, uint32 for fp32)."""
    if theta.size < _SERIAL_BELOW or threads == 1:
        last = (theta.size + _BLOCK - 1) // _BLOCK
        _run_blocks(out, theta, narrow, 0, last, keys, factors, table, gaussian, decay, stochastic, rounding_key)
    else:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        _run_parallel(out, theta, narrow, keys, factors, table, gaussian, decay, stochastic, rounding_key)


@numba.njit(nogil=True, cache=True)
def _sum_blocks(n, first_block, last_block, key, squares):
    words = np.empty(_BLOCK // 4, np.uint64)
    fields = words.view(np.uint16)
    total = 0
    for b in range(first_block, last_block):
        start = b * _BLOCK
        size = min(_BLOCK, n - start)
        _fill_words(words, (size + 3) // 4, key, start // 4)
        for i in range(size):
            total += squares[fields[i]]
    return total


@numba.njit(parallel=True, nogil=True, cache=True)
def _sum_parallel(n, key, squares):
    blocks = (n + _BLOCK - 1) // _BLOCK
    total = 0
    for t in prange((blocks + _BLOCKS_PER_TASK - 1) // _BLOCKS_PER_TASK):
        first = t * _BLOCKS_PER_TASK
        total += _sum_blocks(n, first, min(blocks, first + _BLOCKS_PER_TASK), key, squares)
    return total


def energy(key, n, squares, threads):
    """Sum of ``squares`` (int64, by table index) over the first ``n`` numbers of a Gaussian stream."""
    if n < _SERIAL_BELOW or threads == 1:
        return _sum_blocks(n, 0, (n + _BLOCK - 1) // _BLOCK, key, squares)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    return _sum_parallel(n, key, squares)
