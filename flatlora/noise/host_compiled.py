"""Kernels for the CPU, compiled by numba: write rows of z, add c·z to rows of a weight, multiply rows by A.

`philox.py` defines the stream and has a plain NumPy reference; `host.py` calls these kernels.
"""

import numba
import numpy as np

from flatlora.noise.philox import COLUMNS_PER_BLOCK, PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1

_BLOCKS_AT_ONCE = 256  # a segment's scratch buffers fit in the L1 cache
_SEGMENT = _BLOCKS_AT_ONCE * COLUMNS_PER_BLOCK


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _philox_words(words, first_block, count, row, k0, k1, step, stream):
    """words[w, b] = word w of Philox block first_block + b; a loop that LLVM turns into vector code."""
    for b in range(count):
        c0, c1, c2, c3 = np.uint32(first_block + b), row, step, stream
        key0, key1 = k0, k1
        for _ in range(PHILOX_ROUNDS):
            product0 = np.uint64(PHILOX_M0) * np.uint64(c0)
            product1 = np.uint64(PHILOX_M1) * np.uint64(c2)
            c0, c1, c2, c3 = (
                np.uint32(product1 >> np.uint64(32)) ^ c1 ^ key0,
                np.uint32(product1),
                np.uint32(product0 >> np.uint64(32)) ^ c3 ^ key1,
                np.uint32(product0),
            )
            key0, key1 = np.uint32(key0 + np.uint32(PHILOX_W0)), np.uint32(key1 + np.uint32(PHILOX_W1))
        words[0, b], words[1, b], words[2, b], words[3, b] = c0, c1, c2, c3


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _fill_segment(z, words, row, begin, width, first_column, k0, k1, step, stream, radius, cos_sin):
    """z[0:width] = columns first_column + begin … of one row, begin on a block boundary of the whole row."""
    blocks = (width + COLUMNS_PER_BLOCK - 1) // COLUMNS_PER_BLOCK
    _philox_words(words, (first_column + begin) // COLUMNS_PER_BLOCK, blocks, row, k0, k1, step, stream)
    for b in range(blocks):
        for w in range(4):
            word = words[w, b]
            r = radius[word & np.uint32(0xFFFF)]
            direction = word >> np.uint32(16)
            z[8 * b + 2 * w] = r * cos_sin[direction, 0]
            z[8 * b + 2 * w + 1] = r * cos_sin[direction, 1]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def fill_rows(out, k0, k1, step, stream, first_row, first_column, start, stop, radius, cos_sin):
    """out[start:stop] of the slice whose upper left corner is (first_row, first_column)."""
    columns = out.shape[1]
    words = np.empty((4, _BLOCKS_AT_ONCE), np.uint32)
    z = np.empty(_SEGMENT, np.float32)
    for i in range(start, stop):
        row = np.uint32(first_row + np.uint32(i))
        for begin in range(-(first_column % COLUMNS_PER_BLOCK), columns, _SEGMENT):
            width = min(_SEGMENT, columns - begin)
            _fill_segment(z, words, row, begin, width, first_column, k0, k1, step, stream, radius, cos_sin)
            skip = max(0, -begin)  # the slice may start inside a block
            out[i, begin + skip : begin + width] = z[skip:width]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def add_rows_fp32(weight, c, out, k0, k1, step, stream, first_row, first_column, start, stop, radius, cos_sin):
    """out[start:stop] = weight + c z, FP32."""
    columns = out.shape[1]
    words = np.empty((4, _BLOCKS_AT_ONCE), np.uint32)
    z = np.empty(_SEGMENT, np.float32)
    for i in range(start, stop):
        row, scale = np.uint32(first_row + np.uint32(i)), c[i]
        for begin in range(-(first_column % COLUMNS_PER_BLOCK), columns, _SEGMENT):
            width = min(_SEGMENT, columns - begin)
            _fill_segment(z, words, row, begin, width, first_column, k0, k1, step, stream, radius, cos_sin)
            skip = max(0, -begin)
            noise, source, target = (
                z[skip:width],
                weight[i, begin + skip : begin + width],
                out[i, begin + skip : begin + width],
            )
            for j in range(noise.size):
                target[j] = source[j] + scale * noise[j]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def add_rows_rounded(weight, c, out, k0, k1, step, stream, first_row, first_column, start, stop, radius, cos_sin):
    """As `add_rows_fp32`, but rounded to BF16: equals `add_rows_bf16` for BF16 values stored in FP32 tensors."""
    add_rows_fp32(weight, c, out, k0, k1, step, stream, first_row, first_column, start, stop, radius, cos_sin)
    bits = out.view(np.uint32)
    for i in range(start, stop):
        for j in range(bits.shape[1]):
            half = np.uint32(0x7FFF) + ((bits[i, j] >> np.uint32(16)) & np.uint32(1))
            bits[i, j] = (bits[i, j] + half) & np.uint32(0xFFFF0000)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def add_rows_bf16(weight, c, out, k0, k1, step, stream, first_row, first_column, start, stop, radius, cos_sin):
    """out[start:stop] = round(weight + c z), BF16 as 16 bits: the upper half of an FP32, rounded to nearest even."""
    columns = out.shape[1]
    words = np.empty((4, _BLOCKS_AT_ONCE), np.uint32)
    z = np.empty(_SEGMENT, np.float32)
    bits = np.empty(_SEGMENT, np.uint32)
    values = bits.view(np.float32)
    for i in range(start, stop):
        row, scale = np.uint32(first_row + np.uint32(i)), c[i]
        for begin in range(-(first_column % COLUMNS_PER_BLOCK), columns, _SEGMENT):
            width = min(_SEGMENT, columns - begin)
            _fill_segment(z, words, row, begin, width, first_column, k0, k1, step, stream, radius, cos_sin)
            skip = max(0, -begin)
            noise, source, target = (
                z[skip:width],
                weight[i, begin + skip : begin + width],
                out[i, begin + skip : begin + width],
            )
            for j in range(noise.size):
                bits[j] = np.uint32(source[j]) << np.uint32(16)
            for j in range(noise.size):
                values[j] += scale * noise[j]
            for j in range(noise.size):
                half = np.uint32(0x7FFF) + ((bits[j] >> np.uint32(16)) & np.uint32(1))
                target[j] = np.uint16((bits[j] + half) >> np.uint32(16))


# Reordered sums are vector code; each row is summed alone, so the number of threads changes nothing.
@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def project_rows_bf16(weight, A, out, start, stop):
    """out[start:stop] = weight Aᵀ, summed in FP32; weight is BF16 as 16 bits, A is FP32 (r × n)."""
    columns = weight.shape[1]
    bits = np.empty(columns, np.uint32)
    values = bits.view(np.float32)
    for i in range(start, stop):
        row = weight[i]
        for j in range(columns):
            bits[j] = np.uint32(row[j]) << np.uint32(16)
        for k in range(A.shape[0]):
            factor, total = A[k], np.float32(0.0)
            for j in range(columns):
                total += values[j] * factor[j]
            out[i, k] = total
