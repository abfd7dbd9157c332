import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillkit.compression.bits import pack_bytes, pack_words, packed_bytes, packed_words, unpack_bytes, unpack_words
from tests.compression import reference


@st.composite
def numbers(draw, most_bits):
    bits = draw(st.integers(1, most_bits))
    count = draw(st.integers(1, 40))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)
    return bits, draw(st.lists(row, min_size=1, max_size=3))


def as_int64(rows):
    return torch.tensor([[each - 2**64 if each >= 2**63 else each for each in row] for row in rows])


@given(numbers(64))
@settings(deadline=None, max_examples=200)
def test_bytes_are_those_of_the_bits_written_out_and_come_back(case):
    bits, rows = case
    values = as_int64(rows)
    packed = pack_bytes(values, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (len(rows), packed_bytes(len(rows[0]), bits))
    assert packed.tolist() == [reference.pack_bytes(row, bits) for row in rows]
    assert torch.equal(unpack_bytes(packed, bits, len(rows[0])), values)


@given(numbers(63))
@settings(deadline=None, max_examples=100)
def test_words_hold_whole_numbers_and_come_back(case):
    bits, rows = case
    values = torch.tensor(rows)
    packed = pack_words(values, bits)
    assert packed.shape == (len(rows), packed_words(len(rows[0]), bits))
    assert packed.tolist() == [reference.pack_words(row, bits) for row in rows]
    assert torch.equal(unpack_words(packed, bits, len(rows[0])), values)


@pytest.mark.parametrize("bits", [1, 3, 8, 18, 31, 32, 33, 57, 63, 64])
def test_every_width_in_one_row_of_all_ones(bits):
    values = torch.full((2, 11), -1)
    assert pack_bytes(values, bits)[:, : 11 * bits // 8].eq(255).all()
    unpacked = unpack_bytes(pack_bytes(values, bits), bits, 11)
    assert unpacked.eq(-1 if bits == 64 else 2**bits - 1).all()


def test_bits_above_those_asked_for_are_cut_off():
    assert pack_bytes(torch.tensor([[0b11_0101, 0b1_0001]]), 4).tolist() == [[0b0101_0001]]


def test_no_rows_and_a_slice_of_wider_bytes():
    assert unpack_bytes(torch.zeros(0, 9, dtype=torch.uint8), 18, 4).shape == (0, 4)
    values = torch.tensor([[70000, 1, 2], [3, 262143, 5]])
    packed = torch.cat([torch.full((2, 3), 9, dtype=torch.uint8), pack_bytes(values, 18)], dim=1)
    assert torch.equal(unpack_bytes(packed[:, 3:], 18, 3), values)


@pytest.mark.parametrize("bits", [0, 65])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 64 bits"):
        pack_bytes(torch.zeros(1, 1, dtype=torch.int64), bits)
