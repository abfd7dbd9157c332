"""A teacher with another tokenizer: with an equal one it is the ordinary teacher; with another one a student learns."""

import json
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit.config import UserError
from distillkit.models.labels import IGNORED_LABEL
from distillkit.planning import plan_run
from distillkit.teacher import SignalRequest
from distillkit.teacher.aligned import AlignedTeacher
from distillkit.teacher.live import LiveTeacher
from tests.models.test_token_alignment import trained
from tests.training.test_distill import configuration, run
from tests.training.tiny import BYTES, batch, llama, row, save_text, tokenizer

LENGTHS = [[9, 1, 14], [24]]


def made_batch():
    return batch(*(row(lengths, seed) for seed, lengths in enumerate(LENGTHS)), sequence_length=26)


def test_with_an_equal_tokenizer_it_is_the_ordinary_teacher():
    model, own = llama(0, vocab=BYTES), tokenizer()
    teacher, ordinary = AlignedTeacher(model, own, own, top_k=7), LiveTeacher(model)
    whole = made_batch()
    given = teacher.prepare(whole)
    special = torch.isin(whole["targets"], torch.tensor([own.pad_token_id, own.bos_token_id, own.eos_token_id]))
    assert torch.equal(given["targets"] != IGNORED_LABEL, (whole["targets"] != IGNORED_LABEL))
    assert not special.any()
    request = SignalRequest(hidden_states=(0, 1, 2), top_k=7, vocabulary_size=BYTES)
    found, expected = teacher.signal(given, request), ordinary.signal(whole, request)
    rows = (given["targets"].flatten() != IGNORED_LABEL).nonzero().squeeze(-1)
    ours, theirs = (each.distribution(rows)(slice(0, len(rows))) for each in (found, expected))
    assert torch.equal(ours.ids, theirs.ids)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs)
    for index in (0, 1, 2):
        states = (each.hidden_states[index].flatten(0, 1)[rows] for each in (found, expected))
        torch.testing.assert_close(*states)


def test_a_token_without_an_embedding_is_refused():
    """As one that was added to the teacher's tokenizer alone."""
    teacher = AlignedTeacher(llama(0, vocab=20), tokenizer(), tokenizer(), top_k=7)
    with pytest.raises(UserError, match=r"^teacher\.tokenizer: reads token \d+, and the teacher has .* first 20;"):
        teacher.prepare(made_batch())


def test_distributions_are_of_the_same_text_over_the_tokens_of_both():
    """Against a teacher that reads each prefix by itself."""
    student, own = trained(900, every=2), trained(500, first=1, every=2)
    model = llama(0, vocab=len(own))
    teacher = AlignedTeacher(model, student, own, top_k=5)
    texts = ["The teacher of a run is the section", "12 of the tokens, 34"]
    read = [student(text).input_ids for text in texts]
    given = teacher.prepare(batch(*({"input_ids": ids, "labels": ids, "seq_lengths": [len(ids)]} for ids in read)))
    counted = (given["targets"] != IGNORED_LABEL).nonzero().tolist()
    assert 8 < len(counted) < sum(map(len, read)) - 2
    signal = teacher.signal(given)
    width = given["targets"].shape[1]
    for place, position in counted:
        found = signal.distribution(torch.tensor([place * width + position]))(slice(0, 1))
        so_far = own(student.decode(read[place][: position + 1])).input_ids
        with torch.no_grad():
            logprobs = model(torch.tensor([so_far])).logits[0, -1].log_softmax(-1)
        both = student.get_vocab().keys() & own.get_vocab().keys()
        best = sorted(both, key=lambda name: -float(logprobs[own.get_vocab()[name]]))[:5]
        assert student.convert_ids_to_tokens(found.ids[0].tolist()) == best
        wanted = logprobs[[own.get_vocab()[name] for name in best]]
        torch.testing.assert_close(found.logprobs[0], wanted, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A teacher of other tokens that has learnt the text, and a student that has not."""
    folder = tmp_path_factory.mktemp("inputs")
    text, own = save_text(folder / "train.jsonl", documents=60), trained(500, first=1, every=2)
    teacher = llama(0, vocab=len(own), hidden_size=64)
    documents = [own(json.loads(line)["text"]).input_ids for line in Path(text).read_text().splitlines()]
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for _ in range(8):
        for start in range(0, len(documents), 10):
            ids = torch.tensor([[*chain(*documents[start : start + 10])]])
            optimizer.zero_grad()
            teacher(ids, labels=ids).loss.backward()
            optimizer.step()
    teacher.save_pretrained(folder / "teacher")
    own.save_pretrained(folder / "teacher")
    theirs = trained(900, every=2)
    llama(1, vocab=len(theirs)).save_pretrained(folder / "student")
    theirs.save_pretrained(folder / "student")
    return {
        "teacher": str(folder / "teacher"),
        "student": str(folder / "student"),
        "text": text,
        "held_out": save_text(folder / "valid.jsonl", documents=25),
    }


def described(inputs, folder, losses, **changes):
    teacher = {"kind": "hf", "path": inputs["teacher"], "tokenizer": "own", "top_k": 20}
    options = {"teacher": teacher, "layer_mapping": None, "frozen_res": [], "loss_functions": losses, **changes}
    return configuration(inputs, folder, {"max_steps": 15, "optim": "adamw_torch", "learning_rate": 3e-3}, **options)


def held_out_loss(folder, inputs):
    student, read = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    documents = [read(json.loads(line)["text"]).input_ids for line in Path(inputs["held_out"]).read_text().splitlines()]
    with torch.no_grad():
        losses = [float(student(torch.tensor([ids]), labels=torch.tensor([ids])).loss) for ids in documents]
    return sum(losses) / len(losses)


def test_a_student_learns_more_than_from_the_text_alone(inputs, tmp_path, caplog):
    text = {"function": "cross_entropy", "weight": 0.5}
    teacher = {"function": "kl", "weight": 0.5, "missing_probability_handling": "symmetric_uniform"}
    run(described(inputs, tmp_path / "text", [text]))
    run(described(inputs, tmp_path / "distilled", [text, teacher]))
    assert any("of the tokens that count are one token for both models" in line for line in caplog.messages)
    results = json.loads((tmp_path / "distilled/results.json").read_text())
    assert results["divergence"]["after"]["kl"] < 0.9 * results["divergence"]["before"]["kl"]
    folders = (inputs["student"], tmp_path / "text", tmp_path / "distilled")
    before, alone, distilled = (held_out_loss(folder, inputs) for folder in folders)
    assert distilled < alone - 0.03 < before - 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": None, "student": {"layout": "hybrid"}}, r"student: is not for a teacher with another tokenizer"),
        ({"parallel": {"context": 2}}, r"parallel\.context: is not for a teacher with another tokenizer"),
        ({"loss_functions": [{"function": "attn_mse", "weight": 1}]}, r"loss_functions\[0\]: .* no attention outputs"),
    ],
)
def test_what_needs_the_same_tokens_is_refused(inputs, tmp_path, changes, problem):
    with pytest.raises(UserError, match=f"^{problem}"):
        described(inputs, tmp_path, [{"function": "kl", "weight": 1.0}], **changes)


def test_without_it_another_tokenizer_is_refused_with_the_line_to_write(inputs, tmp_path):
    teacher, losses = {"kind": "hf", "path": inputs["teacher"]}, [{"function": "kl", "weight": 1.0}]
    with pytest.raises(UserError, match=r"^teacher: its tokenizer is not the student's: .* teacher\.tokenizer: own$"):
        run(described(inputs, tmp_path / "run", losses, teacher=teacher))
    planned = plan_run(described(inputs, tmp_path, losses), gpu="cpu")
    assert not planned.errors and not any("tokenizers are the same" in line for line in planned.warnings)
    with pytest.raises(UserError, match=r"^teacher\.top_k: is missing"):
        described(inputs, tmp_path, losses, teacher={**teacher, "tokenizer": "own"})
