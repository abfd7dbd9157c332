"""Tokens of two tokenizers over one text: which are the same, and that nothing is counted twice."""

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distillkit.config import UserError
from distillkit.models.token_alignment import TokenAlignment
from tests.pages import ROOT, text_of
from tests.training.tiny import tokenizer as tokenizer_of_bytes

SPECIALS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
TEXTS = ["Größe, naïve 🙂 12345", "速い茶色の狐", "def f(x):\n\treturn x[0]  # comment", " spaces  at ", "a\u0301é", ""]


@cache
def trained(vocabulary, bos=False, first=0, every=1, ends=("<s>", "</s>")):
    """Byte-level BPE, as of Llama 3, Qwen and SmolLM2, trained on pages of the documentation. ends: BOS and EOS."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = SPECIALS if set(ends) <= set(SPECIALS) else [*dict.fromkeys(ends)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    pages = sorted((ROOT / "docs").glob("*.md"))[first::every]
    made.train_from_iterator(map(text_of, pages), trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=ends[0], eos_token=ends[1])


def sentencepiece(bytes_too=True, gemma=False):
    """As of Llama 2 and Mistral: spaces in words, unknown characters in bytes. Of Gemma: no space before a text."""
    words = ["▁", "▁▁", "▁a", "▁the", "the", "▁quick", "▁fox", "qu", "ick", *"abcdefghijklmnopqrstuvwxyz,.\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256 * bytes_too)), *words]
    vocabulary, merges = {each: i for i, each in enumerate(tokens)}, [("▁", "▁"), ("▁", "a")] if gemma else []
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=bytes_too, unk_token="<unk>"))
    spaces, strip = normalizers.Replace(" ", "▁"), [] if gemma else [decoders.Strip(" ", 1, 0)]
    made.normalizer = spaces if gemma else normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    if gemma:
        made.add_tokens([AddedToken("▁▁", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "4k": trained(4000),
        "8k": trained(8000, bos=True),
        "bytes": tokenizer_of_bytes(),
        "sentencepiece": sentencepiece(),
    }


@pytest.fixture(scope="module")
def alignments():
    """Those that were made, by the names of their tokenizers."""
    return {}


@pytest.mark.parametrize(
    "names",
    [("4k", "8k"), ("8k", "4k"), ("bytes", "4k"), ("4k", "bytes"), ("sentencepiece", "4k"), ("4k", "sentencepiece")],
)
@given(text=st.sampled_from([*TEXTS, "the quick fox, the"]) | st.text(max_size=30))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pairs_are_the_same_bytes_at_the_same_place(tokenizers, alignments, names, text):
    student, teacher = (tokenizers[name] for name in names)
    if names not in alignments:
        alignments[names] = TokenAlignment(student, teacher)
    alignment = alignments[names]
    ids = student(text, add_special_tokens=False).input_ids
    pairs = alignment.align(ids)
    ours, theirs = alignment._pieces
    special = {index for index, each in teacher.added_tokens_decoder.items() if each.special}
    read = [index for index in pairs.teacher_ids if index not in special]
    used = [place for place in pairs.places if place >= 0]
    assert used == sorted(set(used))
    joined = b"".join(theirs.of(read, first=True))
    if "sentencepiece" not in names:
        assert joined == text.encode()
    for index, place in enumerate(pairs.places):
        if place >= 0 and pairs.teacher_ids[place] not in special:
            before = b"".join(ours.of(ids[: index + 1], first=True))
            so_far = [each for each in pairs.teacher_ids[: place + 1] if each not in special]
            assert before == b"".join(theirs.of(so_far, first=True))
            last = [
                b"".join(each.of(tokens, first=True)) for each, tokens in ((ours, ids[:index]), (theirs, so_far[:-1]))
            ]
            assert last[0] == last[1]


def test_equal_tokenizers_pair_every_token(tokenizers):
    one = tokenizers["4k"]
    ids = one("The quick brown fox. Größe 🙂").input_ids
    pairs = TokenAlignment(one, one).align(ids)
    assert pairs.teacher_ids == ids and pairs.places == list(range(len(ids)))


def test_special_tokens_are_those_of_the_same_name_or_use(tokenizers):
    student, teacher = tokenizers["4k"], tokenizers["8k"]
    text = "<|im_start|>user\nthe teacher<|im_end|>\n"
    ids = [*student(text, add_special_tokens=False).input_ids, student.eos_token_id]
    pairs = TokenAlignment(student, teacher).align(ids)
    assert pairs.teacher_ids == [
        teacher.bos_token_id,
        *teacher(text, add_special_tokens=False).input_ids,
        teacher.eos_token_id,
    ]
    for token in ("<|im_start|>", "<|im_end|>", "</s>"):
        place = pairs.places[ids.index(student.convert_tokens_to_ids(token))]
        assert pairs.teacher_ids[place] == teacher.convert_tokens_to_ids(token)
    own = tokenizers["bytes"]
    pairs = TokenAlignment(student, own).align(ids)  # it has no marks of chats: they are left out
    assert bytes(own.decode(pairs.teacher_ids[:-1]), "utf-8") == b"user\nthe teacher\n"
    assert pairs.teacher_ids[pairs.places[-1]] == own.eos_token_id
    begun = [student.bos_token_id, *ids]
    assert TokenAlignment(student, teacher).align(begun).teacher_ids[:2] == [teacher.bos_token_id, ids[0]]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_of_a_character_that_is_cut_in_two_the_rest_is_compared(tokenizers, cut):
    ids = tokenizers["bytes"]("🙂xa🙂").input_ids[cut:-cut]
    pairs = TokenAlignment(tokenizers["bytes"], tokenizers["4k"]).align(ids)
    rest = [-1] * (4 - cut)
    assert pairs.places == [*rest, 0, 1, *rest]


def test_special_tokens_in_the_text_and_unknown_characters_are_read(tokenizers):
    own, teacher = tokenizers["bytes"], tokenizers["4k"]
    pairs = TokenAlignment(own, teacher).align(own("hi <|im_end|>").input_ids)
    assert pairs.teacher_ids[-1] == teacher.convert_tokens_to_ids("<|im_end|>") and pairs.places[-1] == -1
    few = sentencepiece(bytes_too=False)
    pairs = TokenAlignment(teacher, few).align(teacher("the é").input_ids)
    assert few.unk_token_id in pairs.teacher_ids and set(pairs.places) == {-1}


def test_an_eos_is_no_bos_and_is_counted_once(tokenizers):
    """Where BOS and EOS are one token, as of GPT-2 and SmolLM2."""
    own, one = tokenizers["bytes"], trained(400, ends=("<|end|>", "<|end|>"))
    for alignment in (TokenAlignment(own, one), TokenAlignment(one, own)):
        assert all(len(set(ids.tolist())) == len(ids) for ids in alignment.shared)
    ids = [one.eos_token_id, *one("a b").input_ids, one.eos_token_id]
    pairs = TokenAlignment(one, own).align(ids)
    assert pairs.teacher_ids == [*own("a b", add_special_tokens=False).input_ids, own.eos_token_id]
    assert pairs.places[0] == -1 and pairs.places[-1] == len(pairs.teacher_ids) - 1


@pytest.mark.parametrize("text", [" a b", "a  b", "x\n\n a"])
def test_only_a_space_that_a_tokenizer_puts_is_left_out(tokenizers, text):
    """Gemma puts none; its runs of spaces are added tokens, written as words are."""
    one, other = sentencepiece(gemma=True), tokenizers["4k"]
    for student, teacher in ((one, other), (other, one)):
        pairs = TokenAlignment(student, teacher).align(student(text, add_special_tokens=False).input_ids)
        assert teacher.decode(pairs.teacher_ids, skip_special_tokens=True) == text
        assert pairs.places[0] == 0


def test_no_space_is_read_behind_a_special_token(tokenizers):
    ids = tokenizers["sentencepiece"]("<s>a</s>c", add_special_tokens=False).input_ids
    pairs = TokenAlignment(tokenizers["sentencepiece"], tokenizers["4k"]).align(ids)
    assert tokenizers["4k"].decode(pairs.teacher_ids) == "<s>a</s>c"


def test_shared_tokens_have_the_same_bytes(tokenizers):
    alignment = TokenAlignment(tokenizers["sentencepiece"], tokenizers["4k"])
    ours, theirs = alignment._pieces
    shared = [(int(a), int(b)) for a, b in zip(*alignment.shared, strict=True)]
    assert len({b for _, b in shared}) == len({a for a, _ in shared}) == len(shared) > 256
    names = tokenizers["sentencepiece"].convert_ids_to_tokens([a for a, _ in shared])
    own = {
        *"abcdefghijklmnopqrstuvwxyz,.\n",
        "▁",
    }  # and not the bytes of the same text, which stand for other characters
    assert own <= set(names)
    for a, b in shared:
        assert a in ours.special or ours.of_id[a] == theirs.of_id[b]


def test_a_tokenizer_of_another_kind_is_refused(tokenizers):
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece()
    other = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
    with pytest.raises(UserError, match=r"^teacher\.tokenizer: is neither byte-level BPE nor SentencePiece"):
        TokenAlignment(tokenizers["4k"], other)
