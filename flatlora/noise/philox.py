"""Standard-normal noise as a pure function of (seed, step, stream, layer name, element).

    z = normal(seed, step, stream, layer)[row, column]

Counter-based (Philox-4x32-7 of Salmon et al., SC 2011, then Box–Muller), so any element can be drawn again at
any time, in any order, for any slice of a sharded weight, on any device; no global generator is used.

The stream, fixed for every device:

    key     = BLAKE2b-64(seed, layer)                          two 32-bit words, constant over a run
    counter = (column // 8, row, step, stream)                 one Philox block gives eight columns of one row
    word w of the block → columns 2w and 2w + 1:
        radius = √(−2 ln((lo + ½) / 65536)),  angle = 2π (hi + ½) / 65536      lo, hi: the word's 16-bit halves
        z[2w] = radius · cos(angle),  z[2w + 1] = radius · sin(angle)

Sixteen-bit uniforms give two normals per 32-bit word; they bound |z| by 4.86, which does not matter for weight noise.
`normal_reference` is the same function in plain NumPy.
"""

from __future__ import annotations

import hashlib

import numpy as np

PHILOX_ROUNDS = 7
COLUMNS_PER_BLOCK = 8
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
UINT32 = 0xFFFFFFFF
RESERVED_STREAMS = 0xFFFF0000  # first stream for flatness measures, whose noise must differ from that of any training


def layer_key(seed: int, layer: str) -> tuple[int, int]:
    """The two 32-bit Philox key words of one layer: BLAKE2b of the seed's decimal form and the layer's name."""
    digest = hashlib.blake2b(f"{int(seed)}\0{layer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def noise_stream(rank: int, micro_batch: int, world_size: int, *, per_rank: bool, per_micro_batch: bool) -> int:
    """The stream word of the Philox counter; 0 is shared by all ranks and micro-batches of a step.

    Always below `RESERVED_STREAMS`. With both `per_rank` and `per_micro_batch`, the stream is 1 + the index of the
    micro-batch in the global batch, so k ranks with one micro-batch each and one rank with k micro-batches average the
    gradient over the same k draws.
    """
    if per_rank and per_micro_batch:
        return 1 + micro_batch * world_size + rank
    if per_rank:
        return 1 + rank
    return 1 + micro_batch if per_micro_batch else 0


def validate_counter(**words: int) -> None:
    """Raise ValueError for a word of the Philox counter that does not fit in 32 bits."""
    for name, value in words.items():
        if not 0 <= value <= UINT32:
            raise ValueError(f"Invalid {name}={value}: a noise counter has 32 bits; use a value from 0 to {UINT32}.")


def normal_reference(
    seed: int, step: int, stream: int, layer: str, shape: tuple[int, int], *, row: int = 0, column: int = 0
) -> np.ndarray:
    """Slow reference for `host.normal`: the definition at the top of this file in FP64, element by element."""
    key = layer_key(seed, layer)
    z = np.empty(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            block, lane = divmod(column + j, COLUMNS_PER_BLOCK)
            word = philox_reference((block, row + i, step, stream), key)[lane // 2]
            radius = np.sqrt(-2.0 * np.log(((word & 0xFFFF) + 0.5) / 65536))
            angle = 2.0 * np.pi * ((word >> 16) + 0.5) / 65536
            z[i, j] = radius * (np.sin(angle) if lane % 2 else np.cos(angle))
    return z


def philox_reference(
    counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int = PHILOX_ROUNDS
) -> tuple[int, int, int, int]:
    """Philox-4x32 of one counter in plain integers (Salmon et al. 2011, section 3.3)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = PHILOX_M0 * c0, PHILOX_M1 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & UINT32,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & UINT32,
        )
        k0, k1 = (k0 + PHILOX_W0) & UINT32, (k1 + PHILOX_W1) & UINT32
    return c0, c1, c2, c3
