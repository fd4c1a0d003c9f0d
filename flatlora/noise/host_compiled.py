"""Kernels for the CPU, compiled by numba: write rows of z, add c·z to rows of a weight, compute the norms of W's rows.

`philox.py` defines the stream and has a plain NumPy reference; `host.py` calls these kernels.
"""

import numba
import numpy as np

from flatlora.noise.philox import COLUMNS_PER_BLOCK, PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1

_BLOCKS_AT_ONCE = 256  # a segment's scratch buffers fit in the L1 cache
_SEGMENT = _BLOCKS_AT_ONCE * COLUMNS_PER_BLOCK
FACTORS_AT_ONCE = 4  # rows of A that `merged_row_norms` multiplies at a time


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
def merged_row_norms(weight, shift, A, B, squared, out, start, stop):
    """out[i] = √(squared_i + 2 B_i·(W Aᵀ)_i + B_i (A Aᵀ) B_iᵀ) of rows start … stop, the products W Aᵀ summed in FP32.

    weight holds unsigned integers that are the bits of FP32 values once shifted to the left by `shift`. A, B and out
    are FP32, squared is FP64. A has a multiple of FACTORS_AT_ONCE rows, those after the first r being zero.
    """
    rank, columns = B.shape[1], weight.shape[1]
    gram = np.empty((rank, rank))
    for k in range(rank):
        for other in range(k + 1):
            product = 0.0
            for j in range(columns):
                product += np.float64(A[k, j]) * np.float64(A[other, j])
            gram[k, other] = gram[other, k] = product
    bits = np.zeros((2, columns), np.uint32)
    values = bits.view(np.float32)
    projected = np.empty((2, A.shape[0]), np.float32)
    for first in range(start, stop, 2):
        height = min(2, stop - first)
        for p in range(height):
            for j in range(columns):
                bits[p, j] = np.uint32(weight[first + p, j]) << shift
        upper, lower = values[0], values[1]
        for k in range(0, A.shape[0], FACTORS_AT_ONCE):  # 2 × 4 sums at a time: 6 loads per 8 products
            a0, a1, a2, a3 = A[k], A[k + 1], A[k + 2], A[k + 3]
            u0 = u1 = u2 = u3 = l0 = l1 = l2 = l3 = np.float32(0.0)
            for j in range(columns):
                u, v = upper[j], lower[j]
                u0 += u * a0[j]
                u1 += u * a1[j]
                u2 += u * a2[j]
                u3 += u * a3[j]
                l0 += v * a0[j]
                l1 += v * a1[j]
                l2 += v * a2[j]
                l3 += v * a3[j]
            projected[0, k], projected[0, k + 1], projected[0, k + 2], projected[0, k + 3] = u0, u1, u2, u3
            projected[1, k], projected[1, k + 1], projected[1, k + 2], projected[1, k + 3] = l0, l1, l2, l3
        for p in range(height):
            b, total = B[first + p], squared[first + p]
            for k in range(rank):
                product = 2.0 * np.float64(projected[p, k])
                for other in range(rank):
                    product += gram[k, other] * np.float64(b[other])
                total += np.float64(b[k]) * product
            out[first + p] = np.sqrt(total if not total < 0.0 else 0.0)  # rounding may make it negative; NaN stays
