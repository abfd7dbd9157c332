"""Embeddings grow by rows that no loss sees and that are never written, whatever the hidden state."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from distillkit.losses import Objective
from distillkit.models.decoder import head
from distillkit.models.loading import load_model
from distillkit.teacher import SignalRequest
from distillkit.teacher.live import LiveTeacher
from distillkit.training.distiller import Distiller
from distillkit.training.embeddings import grow_embeddings
from tests.student.students import VOCABULARY, student, tokens
from tests.training.test_distill import configuration, run
from tests.training.test_trainer import ALL_KINDS
from tests.training.tiny import BYTES, batch, llama, row, save_llama, save_text, tokenizer


def with_biased_head():
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    model = PhiForCausalLM(config).eval()
    torch.nn.init.uniform_(model.lm_head.bias, -9, -3)  # a logit of 0 would win
    return model


MODELS = {
    "tied": lambda: llama(1),
    "untied": lambda: llama(1, tied=False),
    "with a bias": with_biased_head,
    "KDA, tied": lambda: student(config_changes={"tie_word_embeddings": True, "initializer_range": 0.2}),
    "KDA, untied": lambda: student(config_changes={"initializer_range": 0.2}),
}


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_grown_model_says_what_it_said_and_the_new_rows_never_win(kind, tmp_path):
    model, ids = MODELS[kind](), tokens(2, 20).clamp(max=96)
    before = model(ids, use_cache=False).logits
    tied = head(model)[0] is model.get_input_embeddings().weight
    state = torch.get_rng_state()
    old = before.shape[-1]
    assert grow_embeddings(model, 50) == (old, 100 if old == 97 else 150)
    assert torch.equal(torch.get_rng_state(), state)
    assert (head(model)[0] is model.get_input_embeddings().weight) == tied
    after = model(ids, use_cache=False).logits
    torch.testing.assert_close(after[..., :old], before)
    assert (after[..., old:] < before.max(-1, keepdim=True).values).all()
    probabilities = after.softmax(-1)
    assert (probabilities[..., old:] <= 1 / old).all()

    assert grow_embeddings(model, 50)[0] == after.shape[-1]
    assert torch.equal(model(ids, use_cache=False).logits, after)
    again = MODELS[kind]()
    grow_embeddings(again, 50)
    assert torch.equal(head(again)[0], head(model)[0])

    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config.vocab_size == head(loaded)[0].shape[0] == after.shape[-1]
    torch.testing.assert_close(loaded(ids, use_cache=False).logits, after)


@torch.no_grad()
def test_a_grown_student_writes_the_same_words():
    model = student(config_changes={"initializer_range": 0.2})
    ids = tokens(1, 5)
    before = model.generate(ids, max_new_tokens=30, do_sample=False)
    grow_embeddings(model, 1000)
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False), before)
    assert before.max() < VOCABULARY


def test_no_loss_sees_the_new_rows():
    objective = Objective([loss for loss in ALL_KINDS if loss.function != "hs_cosine"], vocabulary_size=97)
    inputs = batch(row([7, 5], seed=1))
    asked = {name: inputs[name] for name in ("input_ids", "position_ids")}
    results = {}
    for multiple in (1, 64):
        model = llama(1, tied=False)
        grow_embeddings(model, multiple)
        signal = LiveTeacher(llama(0)).signal(asked, SignalRequest(vocabulary_size=97))
        pairs = objective.preference_pairs(inputs["targets"], signal.distribution)
        output = Distiller(model, objective)(
            **inputs, normalizer=torch.tensor(10.0), preference_pairs=pairs, signal=signal
        )
        output["loss"].backward()
        results[multiple] = output["loss"], model.lm_head.weight.grad, model.model.embed_tokens.weight.grad
    torch.testing.assert_close(results[64][0], results[1][0])
    for ours, theirs in zip(results[64][1:], results[1][1:], strict=True):
        torch.testing.assert_close(ours[:97], theirs)
        assert not ours[97:].any()


def back_to_step_2(folder):
    """As if the run had been killed before its end."""
    for entry in ("model.safetensors", "results.json", "config.json"):
        (folder / entry).unlink()
    shutil.rmtree(folder / "checkpoint-4")


def test_a_run_trains_saves_and_resumes_a_grown_student(tmp_path):
    inputs = {
        "teacher": save_llama(tmp_path / "teacher", 0, tied=False),
        "student": save_llama(tmp_path / "student", 1, tied=False),
        "text": save_text(tmp_path / "train.jsonl"),
        "held_out": save_text(tmp_path / "valid.jsonl", documents=10),
    }
    training = {"max_steps": 4, "save_steps": 2, "weight_decay": 0.1, "logging_steps": 1}
    changes = {"resize_embeddings_to_multiple_of": 64, "frozen_res": ["embed_tokens"]}
    folder = tmp_path / "run"
    assert "embeddings: 259 rows grow to 320" in run(configuration(inputs, folder, training, **changes))
    finished = AutoModelForCausalLM.from_pretrained(folder)
    weight = finished.lm_head.weight
    assert weight.shape[0] == finished.config.vocab_size == 320
    torch.testing.assert_close(weight[BYTES:], weight[:BYTES].mean(0).expand(61, -1))
    before = load_model(inputs["student"]).lm_head.weight
    assert not torch.allclose(weight[:BYTES].mean(0), before.mean(0))

    lines = (folder / "metrics.jsonl").read_text()
    back_to_step_2(folder)
    said = run(configuration(inputs, folder, training, **changes, resume=True))
    assert "resuming after step 2" in said
    assert "rows grow" not in said
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).lm_head.weight, weight)
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize("multiple", [1, 64])
def test_rows_of_tokens_that_the_student_alone_has_are_left_as_they_are(tmp_path, multiple):
    """Whether anything grows or not, and in a run that goes on from a checkpoint, which is grown already."""
    inputs = {
        "teacher": save_llama(tmp_path / "teacher", 0),
        "student": str(tmp_path / "student"),
        "text": save_text(tmp_path / "train.jsonl"),
        "held_out": save_text(tmp_path / "valid.jsonl", documents=10),
    }
    own = llama(1, tied=False, vocab=BYTES + 2)
    own.save_pretrained(inputs["student"])
    more = tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    more.save_pretrained(inputs["student"])
    training = {"max_steps": 4, "save_steps": 2, "weight_decay": 0.0}
    changes = {"resize_embeddings_to_multiple_of": multiple, "frozen_res": ["layers"], "evaluation": None}
    folder = tmp_path / "run"
    for resume in (False, True):
        if resume:
            back_to_step_2(folder)
        run(configuration(inputs, folder, training, **changes, resume=resume))
        finished = load_model(folder)
        for trained, before in ((finished.lm_head, own.lm_head), (finished.model.embed_tokens, own.model.embed_tokens)):
            assert not torch.equal(trained.weight[:BYTES], before.weight[:BYTES])
            assert torch.equal(trained.weight[BYTES : BYTES + 2], before.weight[BYTES:])
            padding = trained.weight[BYTES + 2 :]
            assert len(padding) == (59 if multiple == 64 else 0)
            torch.testing.assert_close(padding, trained.weight[: BYTES + 2].mean(0).expand_as(padding))
