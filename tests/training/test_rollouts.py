"""Rows that the student writes: what is written, what it is trained on then, and that a resumed run writes the same."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import CompileConfig

from distillkit.config import LossConfig, UserError
from distillkit.config.rollouts import RolloutsConfig
from distillkit.data import prompts
from distillkit.data.collate import collate
from distillkit.data.prompts import read_prompts
from distillkit.evaluation import generation
from distillkit.evaluation.continuations import draw
from distillkit.evaluation.generation import end_tokens
from distillkit.models.special_tokens import encode_texts
from distillkit.training.rollouts import Rollouts
from tests.training.test_alignment import STUDENTS
from tests.training.test_distill import configuration, run
from tests.training.test_trainer import assert_same, gradients, make_trainer
from tests.training.tiny import VOCAB, llama, row, save_chat_model, save_chats, save_inputs

REVERSE = [LossConfig(function="reverse_kl", weight=1.0)]
PROMPTS = [[5, 6, 7], [8, 9], [11, 12, 13, 14, 15], [20], [30, 31, 32]]
ROWS = [row([20], seed=1), row([11, 9], seed=2), row([16], seed=3), row([5], seed=4)]
WIDTH = 20


def settings(**changes):
    given = {"prompts": {"disk_path": "unused"}, "max_new_tokens": 5, "temperature": 0.8, "batch_size": 2}
    return RolloutsConfig.parse({**given, **changes})


def rollouts(prompts=PROMPTS, **changes):
    return Rollouts(settings(**changes), prompts, sequence_length=WIDTH, vocabulary_size=VOCAB)


def trainer_of(folder, writing, student=None, **given):
    options = {"losses": REVERSE, "rows": ROWS, "sequence_length": WIDTH, **given}
    return make_trainer(folder, rollouts=writing, student=student, **options)


def written_slowly(student, prompt, numbers, ends, temperature=0.8):
    """Token by token, each from a pass over all that stands before it."""
    text = []
    for number in numbers:
        logits = student(torch.tensor([[*prompt, *text]])).logits[0, -1:]
        text.append(int(draw(logits, number.view(1), temperature)))
        if text[-1] in ends:
            break
    return text


@pytest.mark.parametrize(("model", "cuts"), [(lambda: llama(1), 1), (STUDENTS["hybrid"], 2)], ids=["llama", "hybrid"])
def test_the_step_is_that_of_a_slow_loop(tmp_path, model, cuts):
    """Two texts share a row; the mean over all written tokens of KL(student ‖ teacher), of student and prompt none."""
    writing = rollouts()
    assert writing.texts_of_row == 2
    student, teacher = model(), llama(0)
    seed = np.random.SeedSequence([42, 0, 0]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(seed) % 2**63)
    drawn = torch.rand(8, 5, generator=generator, dtype=torch.float64)
    total, count = torch.zeros(()), 0
    for text in range(8):
        prompt = PROMPTS[text % len(PROMPTS)]
        with torch.no_grad():
            written = written_slowly(student, prompt, drawn[text], end_tokens(student))
        ids = torch.tensor([[*prompt, *written]])
        ours, theirs = student(ids).logits[0].log_softmax(-1), teacher(ids).logits[0].log_softmax(-1).detach()
        for place in range(len(prompt) - 1, len(prompt) + len(written) - 1):
            total = total + (ours[place].exp() * (ours[place] - theirs[place])).sum()
            count += 1
    (total / count).backward()
    expected = {f"student.{name}": parameter.grad for name, parameter in student.named_parameters()}
    trainer = trainer_of(
        tmp_path, writing, model, per_device_train_batch_size=4 // cuts, gradient_accumulation_steps=cuts, seed=0
    )
    assert_same(gradients(trainer), expected, 1e-5)
    logged = trainer.state.log_history[0]
    assert logged["reverse_kl"] == pytest.approx(float(total.detach() / count), rel=1e-5)
    assert logged["rollout_tokens"] == pytest.approx(count / 8)
    assert 0 < logged["rollout_time"] < 1 and 0 <= logged["rollouts_ended"] <= 1


def test_a_student_that_is_its_teacher_stays(tmp_path):
    trainer = trainer_of(tmp_path, rollouts(), student=lambda: llama(0), max_steps=3)
    changes = gradients(trainer)
    assert max(float(change.abs().max()) for change in changes.values()) < 1e-6
    assert all(abs(line["reverse_kl"]) < 1e-6 for line in trainer.state.log_history if "reverse_kl" in line)


@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 0.5, 1.0])
def test_the_share_holds_over_steps_and_processes(share):
    writers = [
        Rollouts(
            settings(share=share), PROMPTS, sequence_length=WIDTH, vocabulary_size=VOCAB, process=each, processes=2
        )
        for each in (0, 1)
    ]
    written = sum(len(writer.written_rows(step, 4)) for writer in writers for step in range(30))
    assert written == pytest.approx(240 * share, abs=1)


def test_other_rows_stay_as_they_are(tmp_path):
    trainer = trainer_of(tmp_path, None)
    batch = trainer.data_collator(ROWS)
    writing, student = rollouts(share=0.5), llama(1)
    (mixed,), written = writing.write_into([batch], student, step=3)
    assert writing.written_rows(3, 4) == [1, 3] and written.texts == 4
    for place, name in ((place, name) for place in (0, 2) for name in batch):
        assert torch.equal(mixed[name][place], batch[name][place])
    for place in (1, 3):
        length = int(mixed["lengths"][place])
        assert (mixed["targets"][place] >= 0).sum() <= 2 * 5
        assert (mixed["targets"][place, length:] == -100).all()
        assert (mixed["position_ids"][place, :length] == 0).sum() == 2
    again, _ = writing.write_into([batch], student, step=3)
    assert all(torch.equal(again[0][name], mixed[name]) for name in mixed)
    other, _ = writing.write_into([batch], student, step=4)
    assert not torch.equal(other[0]["input_ids"], mixed["input_ids"])
    halves = [{name: tensor[part] for name, tensor in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    cut, _ = writing.write_into(halves, student, step=3)
    assert all(torch.equal(torch.cat([each[name] for each in cut]), mixed[name]) for name in mixed)


def own_divergence(student, teacher):
    """KL(student ‖ teacher) per token, of what the student writes."""
    writing = rollouts(
        seed=7, temperature=1.0, batch_size=32, prompts=[[token] for token in range(3, 35)], max_new_tokens=16
    )
    batch = {name: torch.zeros(32, WIDTH, dtype=torch.long) for name in ("input_ids", "targets", "position_ids")}
    (made,), _ = writing.write_into([{**batch, "lengths": torch.zeros(32, dtype=torch.long)}], student, 0)
    with torch.no_grad():
        ours, theirs = (
            model(made["input_ids"], position_ids=made["position_ids"]).logits for model in (student, teacher)
        )
    each = F.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return float(each[made["targets"] != -100].mean())


def test_what_a_student_writes_itself_teaches_what_other_text_does_not(tmp_path):
    """Exposure bias: the text has half of the tokens, and the student goes on to write all of them."""
    low = [{**each, "input_ids": [3 + token % 40 for token in each["input_ids"]]} for each in ROWS]
    low = [{**each, "labels": each["input_ids"]} for each in low]
    steps = {"max_steps": 30, "optim": "adamw_torch", "learning_rate": 5e-3}
    divergences = {}
    for name, writing in (
        ("text", None),
        ("own", rollouts(prompts=[[token] for token in range(3, 43)], max_new_tokens=16)),
    ):
        trainer = trainer_of(tmp_path / name, writing, rows=low, **steps)
        before = own_divergence(trainer.model.student, trainer.teacher.model)
        trainer.train()
        divergences[name] = own_divergence(trainer.model.student, trainer.teacher.model)
    assert divergences["own"] < 0.75 * divergences["text"] < 0.75 * before


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {**save_inputs(folder), "student": str(folder / "teacher"), "folder": folder}


def described(inputs, folder, training=None, **changes):
    written = {"prompts": {"disk_path": inputs["text"]}, "prompt_tokens": 12, "max_new_tokens": 8, "share": 0.5}
    given = {"loss_functions": [{"function": "jsd", "weight": 1.0}], "layer_mapping": None, "rollouts": written}
    options = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, **(training or {})}
    return configuration(inputs, folder, options, **{**given, **changes})


def test_a_resumed_run_writes_what_it_would_have_written(inputs, tmp_path):
    said = run(described(inputs, tmp_path / "whole"))
    assert "rollout" in said
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for path in [*folder.glob("*.safetensors"), folder / "results.json"]:
        path.unlink()
    shutil.rmtree(folder / "checkpoint-6", ignore_errors=True)
    run(described(inputs, folder, resume=True))
    ours, theirs = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    ours, theirs = (
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        for each in (folder, tmp_path / "whole")
    )
    for name in ("loss", "jsd", "rollout_tokens", "tokens"):
        assert [line[name] for line in ours if name in line] == [line[name] for line in theirs if name in line]


def test_a_budget_counts_what_may_be_written(inputs, tmp_path):
    training = {"max_steps": -1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    written = {"prompts": {"disk_path": inputs["text"]}, "prompt_tokens": 12, "max_new_tokens": 20}
    said = run(described(inputs, tmp_path / "run", training, rollouts=written, tokens=512, evaluation=None))
    # In a row of 64 tokens two texts of at most 32; two rows make a step.
    assert "4 steps, 512 tokens" in said


def prompts_of(settings, tokenizer, longest):
    keys = {name: getattr(settings, name) for name in ("text_field", "prompt_tokens", "seed")}
    return read_prompts(settings.prompts, tokenizer, longest, **keys, key="rollouts.prompts")


def test_prompts_are_read_from_conversations_and_columns(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_chat_model(tmp_path / "model", 0))
    chats = settings(prompts={"disk_path": save_chats(tmp_path / "chats.jsonl", 3)})
    found = sorted(tokenizer.decode(ids) for ids in prompts_of(chats, tokenizer, 1000))
    assert len(found) == 3
    assert all("And one?" in text and text.rstrip().endswith("<|im_start|>assistant") for text in found)
    assert "It is 0." in found[0] and "1." not in found[0].rsplit("And one?", 1)[1]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "12 24"}\n{"prompt": "7"}\n{"prompt": ""}\n')
    asked = settings(prompts={"disk_path": str(tmp_path / "prompts.jsonl")})
    assert sorted(tokenizer.decode(ids) for ids in prompts_of(asked, tokenizer, 1000)) == ["12 24", "7"]
    with pytest.raises(UserError, match=r"^rollouts\.prompts: no prompt has at most 0 tokens"):
        prompts_of(asked, tokenizer, 0)
    (tmp_path / "other.jsonl").write_text('{"story": "12 24"}\n')
    other = settings(prompts={"disk_path": str(tmp_path / "other.jsonl")})
    with pytest.raises(
        UserError, match=r"^rollouts\.prompts: has the columns story; one of these is needed: text, mess"
    ):
        prompts_of(other, tokenizer, 100)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "ab " * 10**6}))
    began = settings(prompts={"disk_path": str(tmp_path / "long.jsonl")}, prompt_tokens=4)
    with monkeypatch.context() as patch:
        given = []
        patch.setattr(prompts, "encode_texts", lambda of, texts: given.append(texts) or encode_texts(of, texts))
        assert prompts_of(began, tokenizer, 100) == [tokenizer("ab ab ab ab").input_ids[:4]]
    assert max(map(len, given[0])) < 100  # a long text is not read to its end
    (tmp_path / "short.jsonl").write_text('{"text": "12 24"}\n')
    short = settings(prompts={"disk_path": str(tmp_path / "short.jsonl")})
    with pytest.raises(UserError, match=r"^rollouts\.prompts: no text has 64 tokens \(rollouts\.prompt_tokens\)"):
        prompts_of(short, tokenizer, 100)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"teacher": {"kind": "dataset"}}, r"rollouts: a captured teacher has no outputs for what the student writes"),
        ({"parallel": {}}, r"rollouts: a student that is divided cannot write"),
        (
            {"loss_functions": [{"function": "kl", "weight": 1}, {"function": "cross_entropy", "weight": 1}]},
            r"loss_functions\[1\]\.function: cross_entropy would take what the student writes for right",
        ),
        ({"sequence_length": 8}, r"rollouts\.max_new_tokens: leaves no room for a prompt in a row of 8 tokens"),
    ],
)
def test_what_cannot_be_written_is_refused(inputs, tmp_path, changes, problem):
    with pytest.raises(UserError, match=f"^{problem}"):
        described(inputs, tmp_path, **changes)


def test_prompts_of_a_later_phase_are_read_before_the_first(inputs, tmp_path):
    phases = [
        {"name": "one"},
        {
            "name": "two",
            "rollouts": {"prompts": {"disk_path": inputs["text"]}, "prompt_tokens": 9000, "max_new_tokens": 4},
        },
    ]
    with pytest.raises(UserError, match=r"^phases\[1\]\.rollouts\.prompts: no text has 9,000 tokens"):
        run(described(inputs, tmp_path / "run", rollouts=None, phases=phases))
    assert not (tmp_path / "run/phases/1-one/checkpoint-3").exists()


def texts_while_weights_change(writing, student, batches):
    """What is written for three steps, after each of which the weights change where they are."""
    rows = []
    for step in range(3):
        made, _ = writing.write_into(batches, student, step)
        rows += [batch["input_ids"].clone() for batch in made]
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(0.9)
    return torch.cat(rows)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_steps_write_with_the_weights_of_now(device, monkeypatch):
    """On CUDA a step of writing is a CUDA graph; here it is compiled as well, and layers of whole rows are not."""
    monkeypatch.setattr(generation, "CAPACITY_STEP", 16)
    batch = collate(ROWS, pad_token_id=0, sequence_length=WIDTH)
    batch["lengths"] = torch.tensor([len(each["input_ids"]) for each in ROWS])
    batches = [{name: value.to(device) for name, value in batch.items()}]
    expected = None
    for graphs in (False, True):
        student = STUDENTS["hybrid"]().to(device)
        if graphs and device == "cpu":
            student.generation_config.cache_implementation = "static"
            student.generation_config.compile_config = CompileConfig(backend="eager", mode=None)
            student.generation_config.compile_config._compile_all_devices = True
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with monkeypatch.context() as patched:
            if not graphs:
                patched.setattr(generation, "decode_as_graphs", lambda model: None)
            written = texts_while_weights_change(rollouts(share=1.0, batch_size=4), student, batches)
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == graphs
        expected = written if expected is None else expected
        assert torch.equal(written, expected)
        assert student.generation_config.cache_implementation == ("static" if graphs and device == "cpu" else None)
