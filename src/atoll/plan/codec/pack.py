"""Bit packing: small integers in few bits each, and increasing indices in fewer.

Codes of b bits are cut into planes of 1, 2, 4 or 8 bits, lowest bits first: 13 = 1 + 4 + 8. In a plane of width w one
byte contains 8/w codes. Byte j contains the codes j, W + j, 2W + j, …, from its lowest bits up, where W is the number
of bytes. So whole runs of codes are shifted and joined by one operation. Codes with three values are packed five per
byte, in base 3, also in runs. Unused places in the last bytes are 0.

k increasing indices below d are packed by the code of Elias and Fano. The lowest l = ⌊log₂(d/k)⌋ bits of each index are
packed as codes. The higher bits become a row of bits whose i-th 1 is at position (indexᵢ ≫ l) + i. This needs at most
l + 2 bits per index, within .6 bits of the entropy, and the length is known in advance.

Tests: tests/identities/test_codecs.py, tests/golden/test_codec_bytes.py
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

TERNARY = 0  # the value of `bits` that stands for codes with three values


def planes(bits: int) -> list[tuple[int, int]]:
    """The lowest bit and the width of each plane.

    Example:
        >>> planes(5), planes(16)
        ([(0, 1), (1, 4)], [(0, 8), (8, 8)])
    """
    out, low = [], 0
    for width in [w for w in (1, 2, 4) if bits & w] + [8] * (bits // 8):
        out.append((low, width))
        low += width
    return out


def packed_length(n: int, bits: int) -> int:
    """The number of bytes of n packed codes."""
    if bits == TERNARY:
        return -(-n // 5)
    return sum(-(-n * width // 8) for _, width in planes(bits))


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into few bits each.

    Args:
        codes: the codes, int32 `[..., n]`, in [0, 2^bits), or in [0, 3) for `TERNARY`.
        bits: the number of bits of each code, 1 to 31, or `TERNARY`.
    Returns:
        uint8 `[..., packed_length(n, bits)]`.
    Example:
        >>> pack_bits(torch.tensor([1, 2, 3, 0, 1], dtype=torch.int32), 2).tolist()
        [29, 2]
    """
    if bits == TERNARY:
        runs = _runs(codes, 5)
        byte = runs[..., 4, :]
        for i in (3, 2, 1, 0):
            byte = byte * 3 + runs[..., i, :]
        packed: Tensor = byte.to(torch.uint8)
        return packed
    out = []
    for low, width in planes(bits):
        plane = codes if bits == width else (codes >> low).bitwise_and_((1 << width) - 1)
        if width < 8:  # no two runs share a bit, so their sum equals their bitwise or
            plane = (_runs(plane, 8 // width) << _shifts(width, codes.device)).sum(-2, dtype=torch.int32)
        out.append(plane.to(torch.uint8))
    return out[0] if len(out) == 1 else torch.cat(out, -1)


def unpack_bits(packed: Tensor, n: int, bits: int) -> Tensor:
    """The n codes in packed bytes, int32 `[..., n]`: the inverse of `pack_bits`."""
    if bits == TERNARY:
        byte = packed.to(torch.int32).flatten()
        runs = byte.new_empty(*packed.shape[:-1], 5, packed.shape[-1])
        for i, digit in enumerate(_trits(packed.device)):
            runs[..., i, :] = digit.index_select(0, byte).view(packed.shape)
        return runs.flatten(-2)[..., :n]
    codes, start = None, 0
    for low, width in planes(bits):
        size = -(-n * width // 8)
        runs = packed[..., None, start : start + size]
        start += size
        if width < 8:
            runs = (runs >> _shifts(width, packed.device)).bitwise_and_((1 << width) - 1)
        plane = runs.flatten(-2)[..., :n].to(torch.int32)
        codes = plane if codes is None else codes.bitwise_or_(plane << low)
    return packed.new_zeros((*packed.shape[:-1], n), dtype=torch.int32) if codes is None else codes


@lru_cache(maxsize=4)
def _trits(device: torch.device) -> tuple[Tensor, ...]:
    """The digits of every byte in base 3, from the lowest up, int32 `[256]` each."""
    byte = torch.arange(256, dtype=torch.int32, device=device)
    return tuple(torch.div(byte, 3**i, rounding_mode="floor") % 3 for i in range(5))


@lru_cache(maxsize=16)
def _shifts(width: int, device: torch.device) -> Tensor:
    """The shift of each run of a plane, uint8 `[8/width, 1]`."""
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)[:, None]


def _runs(codes: Tensor, count: int) -> Tensor:
    """Codes `[..., n]` as runs `[..., count, ⌈n/count⌉]`, padded with zeros."""
    lack = -codes.shape[-1] % count
    runs: Tensor = (pad(codes, (0, lack)) if lack else codes).unflatten(-1, (count, -1))
    return runs


def _split(k: int, d: int) -> tuple[int, int]:
    """(l, the number of bits in the row of higher bits) for k indices below d."""
    low = (d // k).bit_length() - 1
    return low, k + ((d - 1) >> low)


def index_length(k: int, d: int) -> int:
    """The number of bytes of k packed indices below d."""
    low, row = _split(k, d)
    return (packed_length(k, low) if low else 0) + packed_length(row, 1)


def pack_index(index: Tensor, d: int) -> Tensor:
    """Pack increasing indices into few bits each.

    Args:
        index: the indices in [0, d), int64 `[K, k]`, ascending in each row.
        d: the length of the vector they point into.
    Returns:
        uint8 `[K, index_length(k, d)]`.
    Example:
        >>> packed = pack_index(torch.tensor([[3, 500, 998]]), 1000)
        >>> packed.shape[-1], unpack_index(packed, 3, 1000).tolist()
        (4, [[3, 500, 998]])

    Reference: Elias, Efficient Storage and Retrieval by Content and Address of Static Files, 1974.
    """
    k = index.shape[-1]
    low, length = _split(k, d)
    row = index.new_zeros((len(index), length), dtype=torch.int32)
    row.scatter_(1, (index >> low) + torch.arange(k, device=index.device), 1)
    high = pack_bits(row, 1)
    return torch.cat((pack_bits((index & ((1 << low) - 1)).to(torch.int32), low), high), -1) if low else high


def unpack_index(packed: Tensor, k: int, d: int) -> Tensor:
    """The indices in packed bytes, int64 `[K, k]`: the inverse of `pack_index`."""
    low, length = _split(k, d)
    size = packed_length(k, low) if low else 0
    row = unpack_bits(packed[..., size:], length, 1)
    place = torch.nonzero_static(row, size=len(packed) * k)[:, 1].view(-1, k)
    high = place - torch.arange(k, device=packed.device)
    return (high << low) | unpack_bits(packed[..., :size], k, low).long() if low else high


def index_flaws(packed: Tensor, k: int, d: int) -> Tensor:
    """Whether each row is not a packing of k increasing indices below d, bool `[K]`."""
    low, length = _split(k, d)
    size = packed_length(k, low) if low else 0
    bad = unpack_bits(packed[..., size:], length, 1).sum(-1) != k
    first = torch.arange(k, device=packed.device)[None]
    index = unpack_index(torch.where(bad[:, None], pack_index(first, d), packed), k, d)
    bad |= (index.diff(dim=-1) <= 0).any(-1) | (index >= d).any(-1)
    repacked = pack_index(torch.where(bad[:, None], first, index), d)
    return bad | (repacked != packed).any(-1)
