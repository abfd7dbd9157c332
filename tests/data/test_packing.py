from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from distillkit.config.errors import UserError
from distillkit.data.packing import count_tokens, keep_rows, pack_documents, split_documents
from distillkit.data.rows import DOCUMENT_FEATURES


def documents(lengths: list[int]) -> Dataset:
    """Documents whose tokens tell where they come from; the label of every seventh token does not count."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    input_ids = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    labels = [[-100 if token % 7 == 6 else token for token in tokens] for tokens in input_ids]
    return Dataset.from_dict({"input_ids": input_ids, "labels": labels}, features=DOCUMENT_FEATURES)


def pieces(rows: Dataset) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each document of each row."""
    found = []
    for row in rows:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"])
        start = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    return found


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 16), st.booleans())
def test_nothing_is_lost_and_boundaries_are_right(lengths, sequence_length, packing):
    rows = (pack_documents if packing else split_documents)(documents(lengths), sequence_length)
    assert max(len(row) for row in rows["input_ids"]) <= sequence_length
    tokens = Counter(token for row in rows["input_ids"] for token in row)
    assert tokens == Counter(range(sum(lengths)))

    expected = []  # what each document is cut into
    for document in documents(lengths)["input_ids"]:
        expected += [document[start : start + sequence_length] for start in range(0, len(document), sequence_length)]
    assert sorted(tokens for tokens, _ in pieces(rows)) == expected
    for tokens, labels in pieces(rows):
        assert labels == [-100] + [-100 if token % 7 == 6 else token for token in tokens[1:]]


def test_labels_count_the_predicted_tokens():
    rows = pack_documents(Dataset.from_dict({"input_ids": [[1] * 10, [2] * 3], "labels": [[1] * 10, [2] * 3]}), 4)
    counted = sum(label != -100 for labels in rows["labels"] for label in labels)
    assert counted == (3 + 3 + 1) + 2  # the pieces of 4, 4 and 2, and the document of 3


def test_rows_are_well_filled():
    lengths = [(index * 7919) % 97 + 3 for index in range(2000)]
    rows = pack_documents(documents(lengths), 128)
    assert count_tokens(rows) == sum(lengths)
    assert count_tokens(rows) / (128 * len(rows)) > 0.98


def test_short_documents_fill_long_rows():
    rows = pack_documents(documents([5] * 3000), 8192)  # the 1,000 documents of a usual batch would fill 61 % of a row
    assert len(rows) == 2


def test_without_packing_rows_hold_one_document():
    rows = split_documents(documents([3, 9, 4]), 4)
    assert rows["seq_lengths"][:] == [[3], [4], [4], [1], [4]]


def test_rows_packed_elsewhere_are_kept():
    boundaries = Dataset.from_dict({"seq_lengths": [[2, 2], [1, 2]]})
    rows = keep_rows(documents([4, 3]), boundaries, 4, "dataset")
    assert rows["input_ids"][:] == [[0, 1, 2, 3], [4, 5, 6]]
    assert rows["labels"][:] == [[-100, 1, -100, 3], [-100, -100, -100]]
    assert keep_rows(documents([4, 3]), None, 4, "dataset")["seq_lengths"][:] == [[4], [3]]


def test_rows_packed_elsewhere_that_do_not_fit():
    with pytest.raises(UserError, match=r"dataset: row 1 has 5 tokens, more than sequence_length \(4\)"):
        keep_rows(documents([4, 5]), None, 4, "dataset")
    with pytest.raises(UserError, match="dataset: row 0 has 4 tokens, but its seq_lengths add up to 3"):
        keep_rows(documents([4]), Dataset.from_dict({"seq_lengths": [[2, 1]]}), 4, "dataset")
    boundaries = Dataset.from_dict({"seq_lengths": [[1, 1]] * 1501 + [[1, 1, 1]] + [[]] * 98})
    with pytest.raises(UserError, match="dataset: row 1501 has 2 tokens, but its seq_lengths add up to 3"):
        keep_rows(documents([2] * 1600), boundaries, 4, "dataset")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=12), st.data())
def test_rows_packed_elsewhere_are_read_as_row_by_row(seq_lengths, data):
    lengths = [sum(parts) + data.draw(st.sampled_from([0, 0, 0, 0, 1])) for parts in seq_lengths]
    packed = documents(lengths)
    wrong = [index for index, length in enumerate(lengths) if length > 20 or length != sum(seq_lengths[index])]
    if wrong:
        reason = "more than" if lengths[wrong[0]] > 20 else "but its seq_lengths add up to"
        with pytest.raises(UserError, match=f"^dataset: row {wrong[0]} has {lengths[wrong[0]]} tokens, {reason}"):
            keep_rows(packed, Dataset.from_dict({"seq_lengths": seq_lengths}), 20, "dataset")
        return
    rows = keep_rows(packed, Dataset.from_dict({"seq_lengths": seq_lengths}), 20, "dataset")
    assert rows["seq_lengths"][:] == seq_lengths
    assert rows["input_ids"][:] == packed["input_ids"][:]
    for labels, given_labels, parts in zip(rows["labels"], packed["labels"], seq_lengths, strict=True):
        firsts = {sum(parts[:index]) for index in range(len(parts))}
        assert labels == [-100 if index in firsts else label for index, label in enumerate(given_labels)]
