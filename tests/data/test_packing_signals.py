"""A captured teacher's distribution stays with its token, through everything that is done to rows."""

import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from distillkit.config.data import DatasetSource
from distillkit.config.errors import UserError
from distillkit.data import build_dataset, collate
from distillkit.data.packing import keep_rows, pack_documents, split_documents
from distillkit.data.signals import TensorRows, aligned_rows
from distillkit.shards import signal_array

COLUMNS = ("first", "second")


def word(token):
    """What the teacher of these tests says at a token: two columns of other widths and types."""
    return [token % 251, token // 251, 7], [token * 0.5]


def documents(lengths, **further):
    """Documents whose tokens encode where they come from, each with the teacher's distribution."""
    bounds = np.cumsum([0, *lengths])
    ids = [list(range(start, stop)) for start, stop in zip(bounds, bounds[1:], strict=False)]
    tokens = torch.arange(bounds[-1])
    first = torch.stack([tokens % 251, tokens // 251, torch.full_like(tokens, 7)], dim=-1).to(torch.uint8)
    table = {"input_ids": ids, "labels": ids, **further}
    table["first"] = signal_array(first, lengths)
    table["second"] = signal_array(0.5 * tokens[:, None].float(), lengths)
    return Dataset(pa.table(table))


def assert_each_token_has_its_word(rows):
    for row in rows:
        for token, first, second in zip(row["input_ids"], row["first"], row["second"], strict=True):
            assert (first, second) == word(token)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 16), st.booleans())
def test_tokens_keep_their_word_when_packed_or_split(lengths, sequence_length, packing):
    rows = (pack_documents if packing else split_documents)(documents(lengths), sequence_length)
    assert sorted(token for row in rows["input_ids"] for token in row) == list(range(sum(lengths)))
    assert_each_token_has_its_word(rows)
    assert_each_token_has_its_word(rows.shuffle(seed=0))


def test_rows_packed_elsewhere_keep_their_word():
    rows = keep_rows(documents([4, 3]), Dataset.from_dict({"seq_lengths": [[2, 2], [1, 2]]}), 4, "dataset")
    assert rows["seq_lengths"][:] == [[2, 2], [1, 2]]
    assert_each_token_has_its_word(rows)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_padding_goes_and_what_the_last_token_lacks_is_filled(data):
    lengths = [2, *data.draw(st.lists(st.integers(1, 9), max_size=40))]
    whole = documents(lengths)
    mask = [data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))) for ids in whole["input_ids"]]
    short = [data.draw(st.booleans()) for _ in lengths]
    first = [row[:-1] if cut else row for row, cut in zip(whole["first"], short, strict=True)]
    given_rows = Dataset(
        whole.data.table.set_column(2, "first", pa.array(first, whole.data.table["first"].type)).append_column(
            "attention_mask", pa.array([[int(seen) for seen in row] for row in mask])
        )
    )
    rows = list(aligned_rows(given_rows, COLUMNS, "dataset"))
    expected = []
    for ids, seen, cut in zip(whole["input_ids"], mask, short, strict=True):
        words = [word(token) for token in ids]
        words[-1] = ([0, 0, 0], words[-1][1]) if cut else words[-1]
        kept = [(token, *said) for token, said, shown in zip(ids, words, seen, strict=True) if shown]
        expected += [kept] if kept else []
    assert [list(zip(row["input_ids"], row["first"], row["second"], strict=True)) for row in rows] == expected


def test_whole_rows_are_not_copied():
    rows = documents([3, 2])
    given, kept = (each.data.table["first"].chunks[0] for each in (rows, aligned_rows(rows, COLUMNS, "dataset")))
    assert given.buffers()[-1].address == kept.buffers()[-1].address


def test_what_does_not_fit_is_named_by_row_and_column():
    rows = documents([3, 4])
    with pytest.raises(UserError, match=r"^dataset: has no column coeffs, .* its columns are input_ids, labels, first"):
        aligned_rows(rows, ["first", "coeffs"], "dataset")
    table = rows.data.table
    shorter = table.set_column(2, "first", pa.array([table["first"][0].as_py(), table["first"][1].as_py()[:2]]))
    with pytest.raises(
        UserError, match=r"^dataset: row 1 has 4 input_ids and 2 entries in first; both must have the same number"
    ):
        aligned_rows(Dataset(shorter), COLUMNS, "dataset")


def test_rows_of_several_documents_are_not_taken_for_one(tmp_path, tiny_tokenizer):
    documents([4, 3], seq_lengths=[[4], [1, 2]]).save_to_disk(tmp_path / "rows")
    source = DatasetSource(disk_path=str(tmp_path / "rows"))
    with pytest.raises(UserError, match=r"row 1 holds several documents; set dataset\.prepacked: true"):
        build_dataset(source, tiny_tokenizer, 8, signal_columns=COLUMNS)
    rows = build_dataset(source, tiny_tokenizer, 8, prepacked=True, signal_columns=COLUMNS)
    assert rows["seq_lengths"][:] == [[4], [1, 2]]
    assert_each_token_has_its_word(rows)


@pytest.mark.parametrize("prepacked", [False, True])
def test_samples_are_taken_and_shuffled_with_their_word(tmp_path, tiny_tokenizer, prepacked):
    documents([3 + index % 5 for index in range(40)]).save_to_disk(tmp_path / "rows")
    source = DatasetSource(disk_path=str(tmp_path / "rows"))
    options = {"seed": 3, "num_samples": 10, "signal_columns": COLUMNS, "prepacked": prepacked}
    rows = build_dataset(source, tiny_tokenizer, 16, prepared_path=tmp_path / "prepared", **options)
    documents_taken = [length for lengths in rows["seq_lengths"] for length in lengths]
    assert len(documents_taken) == 10
    assert_each_token_has_its_word(rows)
    again = build_dataset(source, tiny_tokenizer, 16, prepared_path=tmp_path / "prepared", **options)
    assert again["first"][:] == rows["first"][:]


def test_batches_hold_the_word_beside_each_token_and_zeros_in_the_padding():
    rows = TensorRows(pack_documents(documents([5, 3, 2]), 6), COLUMNS)
    batch = collate([rows[0], rows[1]], pad_token_id=0, sequence_length=7, signal_columns=COLUMNS)
    assert batch["first"].dtype == torch.uint8
    assert batch["second"].dtype == torch.float32
    for ids, first, second, length in zip(
        batch["input_ids"].tolist(), batch["first"].tolist(), batch["second"].tolist(), (5, 5), strict=True
    ):
        assert list(zip(first[:length], second[:length], strict=True)) == [word(token) for token in ids[:length]]
        assert not any(map(any, first[length:]))
    from_lists = collate(list(rows.rows.with_format(None)), pad_token_id=0, sequence_length=7, signal_columns=COLUMNS)
    assert all(torch.equal(batch[name], from_lists[name]) for name in ("input_ids", "targets", "position_ids", "first"))


def test_a_batch_of_16_rows_of_2048_tokens_is_read_in_a_fifth_of_a_second():
    tokens, rows, width = 2048, 16, 312
    signal = torch.randint(0, 256, (tokens * rows, width), dtype=torch.uint8)
    ids = signal_array(torch.arange(tokens * rows, dtype=torch.int32)[:, None], [tokens] * rows)
    flat = pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * tokens, ids.values.values)
    lengths = pa.array([[tokens]] * rows, pa.list_(pa.int32()))
    table = {"input_ids": flat, "labels": flat, "seq_lengths": lengths, "signal": signal_array(signal, [tokens] * rows)}
    read = TensorRows(Dataset(pa.table(table)).shuffle(seed=0), ["signal"])
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        batch = collate(read.__getitems__(list(range(rows))), pad_token_id=0, signal_columns=["signal"])
        seconds.append(time.perf_counter() - start)
    assert batch["signal"].shape == (rows, tokens, width)
    assert min(seconds) < 0.2, seconds
