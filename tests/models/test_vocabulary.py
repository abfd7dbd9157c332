"""Models are measured on the tokens that both know, and refused where these are not the same tokens."""

import json
from pydoc_data.topics import topics

import pytest
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer, SentencePieceUnigramTokenizer, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distillkit.config.errors import UserError
from distillkit.models.vocabulary import (
    check_known_tokens,
    check_same_tokenizer,
    common_vocabulary,
    load_students_tokenizer,
)
from tests.smollm2 import needs_smollm2, smollm2_tokenizer
from tests.training.tiny import BYTES, llama, tokenizer

LINES = topics["strings"].splitlines()


def test_equal_heads_share_all_they_have():
    assert common_vocabulary(BYTES, llama(1, vocab=BYTES), tokenizer()) == BYTES


def test_heads_padded_differently_share_the_tokenizers_tokens():
    assert common_vocabulary(320, llama(1, vocab=BYTES + 1), tokenizer()) == BYTES


def test_a_token_that_was_added_to_the_tokenizer_alone_is_not_common():
    """As a <pad> often is: the embeddings have no row for it."""
    more = with_special_tokens("<more>")
    for widths in ((BYTES, BYTES), (BYTES + 1, BYTES), (BYTES, 320)):
        teacher, student = widths[0], llama(1, vocab=widths[1])
        assert common_vocabulary(teacher, student, more) == BYTES
    rows = Dataset.from_dict({"input_ids": [[5, 6], more("a<more>").input_ids]})
    with pytest.raises(UserError, match=rf"^data: holds token {BYTES} \('<more>'\), which the teacher and the student"):
        check_known_tokens(rows, BYTES, more, "data")


def test_padding_that_both_heads_have_is_not_compared_either():
    assert common_vocabulary(320, llama(1, vocab=320), tokenizer()) == BYTES


def with_special_tokens(*names):
    more = tokenizer()
    more.add_special_tokens({"additional_special_tokens": list(names)})
    return more


def test_special_tokens_of_one_side_are_not_compared():
    ours, theirs = with_special_tokens("<think>", "</think>"), tokenizer()
    check_same_tokenizer(theirs, ours)
    check_same_tokenizer(ours, theirs)
    assert common_vocabulary(BYTES, llama(1, vocab=BYTES + 2), ours, theirs) == BYTES
    assert common_vocabulary(320, llama(1, vocab=320), ours, theirs) == BYTES
    rows = Dataset.from_dict({"input_ids": [[5, 6], [7], ours("a<think>b").input_ids]})
    check_known_tokens(rows.select([0, 1]), BYTES, ours, "dataset.train_dataset")
    line = rf"^dataset\.train_dataset: holds token {BYTES} \('<think>'\), which the teacher and the student do not both"
    with pytest.raises(UserError, match=line):
        check_known_tokens(rows, BYTES, ours, "dataset.train_dataset")


def test_a_special_token_may_have_another_name():
    check_same_tokenizer(with_special_tokens("<|reserved_0|>"), with_special_tokens("<|tool|>"))


def changed(base, change):
    """A tokenizer whose description was changed in place."""
    state = json.loads(base.backend_tokenizer.to_str())
    change(state)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def difference(theirs, ours):
    with pytest.raises(UserError) as caught:
        check_same_tokenizer(theirs, ours)
    said = str(caught.value)
    assert said.startswith("teacher: its tokenizer is not the student's: ")
    assert len(said) < 200
    return said.removeprefix("teacher: its tokenizer is not the student's: ")


def test_a_token_with_another_number_is_named():
    def exchange(state):
        vocabulary = state["model"]["vocab"]
        vocabulary["y"], vocabulary["z"] = vocabulary["z"], vocabulary["y"]

    numbers = tokenizer().get_vocab()
    expected = f"'y' is {numbers['z']} for the teacher and {numbers['y']} for the student"
    assert difference(changed(tokenizer(), exchange), tokenizer()) == expected


@pytest.fixture(scope="module")
def words():
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(LINES, 500, 2, False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)


def other_merges(state):
    merges = state["model"]["merges"]
    merges[:20] = merges[:20][::-1]


def one_merge_less(state):
    del state["model"]["merges"][-1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (other_merges, " is cut into"),
        (one_merge_less, " is cut into"),
        (lambda state: state.update(normalizer={"type": "Lowercase"}), " is cut into"),
        (lambda state: state.update(normalizer={"type": "NFC"}), "'e\u0301' is cut into"),
        (lambda state: state["pre_tokenizer"].update(add_prefix_space=True), " is cut into"),
    ],
)
def test_the_same_tokens_for_other_cuts_are_told_and_not_refused(words, change, text, caplog):
    """The student's tokenizer reads the text, and each of its tokens is the teacher's of that number."""
    other = changed(words, change)
    assert other.get_vocab() == words.get_vocab()
    for theirs, ours in ((other, words), (words, other)):
        caplog.clear()
        check_same_tokenizer(theirs, ours)
        (line,) = caplog.messages
        assert line.startswith("teacher: its tokenizer cuts text otherwise than the student's, which reads it: ")
        assert text in line and len(line) < 300


def test_what_describes_a_tokenizer_otherwise_and_cuts_alike_is_the_same(words, caplog):
    check_same_tokenizer(changed(words, lambda state: state.update(decoder=None)), words)
    check_same_tokenizer(changed(words, lambda state: state.update(post_processor=None)), words)
    assert caplog.messages == []


def test_tokenizers_of_other_kinds_differ(words):
    pieces = SentencePieceUnigramTokenizer()
    pieces.train_from_iterator(LINES, vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>")
    fallback = ByteLevelBPETokenizer()
    fallback.train_from_iterator([line[::-1] for line in LINES], 500, 2, False)
    for other in (pieces, fallback):
        assert difference(PreTrainedTokenizerFast(tokenizer_object=other._tokenizer), words)


def test_a_student_without_a_tokenizer_takes_the_teachers(tmp_path):
    llama(1).save_pretrained(tmp_path)
    teachers = tokenizer()
    assert load_students_tokenizer(str(tmp_path), teachers, "model") is teachers


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("tokenizer.json", "{", r"^model: '.*tokenizer\.json' is damaged "),
        (
            "tokenizer_config.json",
            '{"auto_map": {"AutoTokenizer": [null, "own.Own"]}}',
            r"^model: .* runs code of its own",
        ),
    ],
)
def test_a_students_tokenizer_that_cannot_be_read_is_not_replaced(tmp_path, file, content, line):
    llama(1).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=line):
        load_students_tokenizer(str(tmp_path), tokenizer(), "model")


@needs_smollm2
def test_smollm2_is_itself_when_saved_and_is_told_when_it_cuts_digits_singly(tmp_path, caplog):
    """As the tokenizer of its hub repository does, unlike that of its GGUF file."""
    theirs = smollm2_tokenizer()
    theirs.save_pretrained(tmp_path)
    check_same_tokenizer(theirs, AutoTokenizer.from_pretrained(tmp_path))
    assert caplog.messages == []

    def cut_digits(state):
        singly = {"type": "Digits", "individual_digits": True}
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [singly, state["pre_tokenizer"]]}

    check_same_tokenizer(theirs, changed(theirs, cut_digits))
    assert len(caplog.messages) == 1
