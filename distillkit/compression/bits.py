"""Whole numbers of 1 to 64 bits, packed without gaps, and back.

The published formats have two layouts. One is a stream of bytes in which the numbers follow one another, most
significant bit first. The other is int64 words, each with as many numbers as fit, the first in the lowest bits.

Bits are never expanded. Numbers of `bits` bits meet byte boundaries in the same way again after at most 8 numbers. So a
row is a list of equal groups, and one shift handles the same place of every group of every row at once.
"""

import math
from functools import reduce

import torch
from jaxtyping import Int, Int64, UInt8
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes `count` numbers take."""
    return (count * bits + 7) // 8


def pack_bytes(values: Int[Tensor, "rows count"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """The lowest `bits` bits of each number, most significant first; the last byte is filled up with zeros."""
    rows, count = values.shape
    in_group, group_bytes = _group(bits)
    groups = -(-count // in_group)
    if groups * in_group != count:
        values = torch.nn.functional.pad(values, (0, groups * in_group - count))
    values = values.view(rows, groups, in_group)
    packed = torch.empty(rows, groups, group_bytes, dtype=torch.uint8, device=values.device)
    for place in range(group_bytes):
        # Bits are counted from the group's first; this byte holds those from 8 · place.
        first, last = place * 8 // bits, (place * 8 + 7) // bits
        parts = (
            _byte(values[:, :, number], (number + 1) * bits - (place + 1) * 8, bits)
            for number in range(first, last + 1)
        )
        packed[:, :, place] = reduce(Tensor.bitwise_or_, parts)
    return packed.view(rows, groups * group_bytes)[:, : packed_bytes(count, bits)]


def unpack_bytes(packed: UInt8[Tensor, "rows bytes"], bits: int, count: int) -> Int64[Tensor, "rows count"]:
    """The numbers that `pack_bytes` packed. Those of 64 bits come with the sign that int64 gives their highest bit."""
    in_group, group_bytes = _group(bits)
    groups = -(-count // in_group)
    if packed.shape[1] != groups * group_bytes:
        packed = torch.nn.functional.pad(packed, (0, groups * group_bytes - packed.shape[1]))
    rows = packed.shape[0]
    packed = packed.view(rows, groups, group_bytes)
    values = torch.empty(rows, groups, in_group, dtype=torch.int64, device=packed.device)
    working = torch.int32 if bits < 32 else torch.int64
    for number in range(in_group):
        first, end = number * bits, (number + 1) * bits
        last_place = (end - 1) // 8
        value = packed[:, :, first // 8]
        if first % 8:
            value = value & (0xFF >> first % 8)
        value = value.to(working)
        for place in range(first // 8 + 1, last_place):
            value = torch.add(packed[:, :, place], value, alpha=256)
        unused = (last_place + 1) * 8 - end
        if last_place == first // 8:
            value = value >> unused
        else:
            value = torch.add(packed[:, :, last_place] >> unused, value, alpha=256 >> unused)
        values[:, :, number] = value
    return values.view(rows, groups * in_group)[:, :count]


def packed_words(count: int, bits: int) -> int:
    """How many int64 words `count` numbers take."""
    return -(-count // (64 // bits))


def pack_words(values: Int[Tensor, "rows count"], bits: int) -> Int64[Tensor, "rows words"]:
    """Numbers below 2^bits in int64 words, as many to a word as fit whole; `bits` is at most 63."""
    rows, count = values.shape
    per_word, words = 64 // bits, packed_words(count, bits)
    values = torch.nn.functional.pad(values.long(), (0, words * per_word - count)).view(rows, words, per_word)
    packed = values[:, :, 0].clone()
    for number in range(1, per_word):
        packed.bitwise_or_(values[:, :, number] << bits * number)
    return packed


def unpack_words(packed: Int64[Tensor, "rows words"], bits: int, count: int) -> Int64[Tensor, "rows count"]:
    """The numbers that `pack_words` packed."""
    per_word = 64 // bits
    values = torch.empty(*packed.shape, per_word, dtype=torch.int64, device=packed.device)
    for number in range(per_word):
        torch.bitwise_and(packed >> bits * number, (1 << bits) - 1, out=values[:, :, number])
    return values.view(len(packed), -1)[:, :count]


def _group(bits: int) -> tuple[int, int]:
    """The fewest numbers that fill whole bytes, and how many bytes."""
    if not 1 <= bits <= 64:
        raise ValueError(f"a number has 1 to 64 bits, not {bits}")
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _byte(values: Tensor, shift: int, bits: int) -> UInt8[Tensor, "rows groups"]:
    """The byte that begins `shift` bits above the number's lowest (below it where negative)."""
    if shift < 0:
        return (values << -shift).to(torch.uint8)
    # Bits above the number's own belong to its neighbour and are cut off.
    above = shift + 8 - bits
    shifted = (values >> shift).to(torch.uint8)
    return shifted.bitwise_and_(0xFF >> above) if above > 0 else shifted
