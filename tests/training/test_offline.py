"""A run that learns from a captured dataset learns what it would from the live teacher, and only from a sound one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from distillkit.capture.packing import pack
from distillkit.config import DatasetSource, RunConfig, UserError
from distillkit.data import build_dataset
from distillkit.evaluation import measure_divergence
from distillkit.evaluation.held_out import held_out_batches
from distillkit.models.loading import load_model
from distillkit.runs.writing import sha256
from distillkit.shards import read_manifest, verify, write_manifest
from distillkit.teacher.live import LiveTeacher
from tests.training.captures import COMPRESSED, KL, captured, configuration, first_step, run
from tests.training.test_trainer import assert_same
from tests.training.tiny import BYTES, llama, save_llama, save_text, tokenizer

EVERY_LOSS = [
    {"function": "cross_entropy", "weight": 0.1},
    {"function": "kl", "weight": 0.2, "temperature": 2.0, "missing_probability_handling": "zero"},
    {"function": "reverse_kl", "weight": 0.2, "missing_probability_handling": "symmetric_uniform"},
    {"function": "jsd", "weight": 0.2, "missing_probability_handling": "zero"},
    {"function": "tvd", "weight": 0.2, "missing_probability_handling": "symmetric_uniform"},
    {"function": "hinge", "weight": 0.1, "top_k": 6, "margin": 0.2},
    {"function": "logistic_ranking", "weight": 0.1, "top_k": 6},
]
BACKGROUND = [{"function": "kl", "weight": 1.0, "missing_probability_handling": "background"}]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    teacher, text = save_llama(folder / "teacher", 0), save_text(folder / "train.jsonl")
    return {
        "teacher": teacher,
        "student": save_llama(folder / "student", 1),
        "text": text,
        "whole": captured(teacher, text, folder / "whole"),
        "documents": captured(teacher, text, folder / "documents", packing=False),
        "top5": captured(teacher, text, folder / "top5", {"plain": {"k": 5, "vocab_size": BYTES}}),
        "compressed": captured(teacher, text, folder / "compressed", COMPRESSED),
    }


def copy(inputs, name, folder):
    return str(shutil.copytree(inputs[name], folder))


def assert_same_step(offline, online):
    assert offline[0] == pytest.approx(online[0], rel=1e-4)
    assert_same(offline[1], online[1], 1e-4)


@pytest.mark.parametrize("dataset", ["whole", "documents"])
def test_with_every_token_stored_the_first_step_is_that_of_the_live_teacher(inputs, tmp_path, dataset):
    given = {"train_dataset": {"disk_path": inputs[dataset]}, "prepacked": dataset == "whole"}
    common = {"loss_functions": EVERY_LOSS, "dataset": given}
    live = {"kind": "hf", "path": inputs["teacher"]}
    steps = [
        first_step(configuration(inputs["student"], "", tmp_path / name, teacher=teacher, **common))
        for name, teacher in (("offline", None), ("online", live))
    ]
    assert_same_step(*steps)


@pytest.mark.parametrize("losses", [KL, BACKGROUND], ids=["rest", "background"])
def test_with_few_tokens_stored_the_first_step_is_that_of_the_live_teacher_cut_to_them(inputs, tmp_path, losses):
    live = {"kind": "hf", "path": inputs["teacher"], "top_k": 5, "background": inputs["top5"]}
    steps = [
        first_step(
            configuration(inputs["student"], inputs["top5"], tmp_path / name, teacher=teacher, loss_functions=losses)
        )
        for name, teacher in (("offline", None), ("online", live))
    ]
    assert_same_step(*steps)


def test_micro_batches_of_a_captured_dataset_add_up(inputs, tmp_path):
    common = {"loss_functions": EVERY_LOSS}
    cut = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8}
    steps = [
        first_step(configuration(inputs["student"], inputs["top5"], tmp_path / name, training=training, **common))
        for name, training in (("cut", cut), ("whole", None))
    ]
    assert_same_step(*steps)


def test_a_dataset_without_a_manifest_is_read_as_the_configuration_says(inputs, tmp_path):
    expected = {}
    for name in ("compressed", "top5"):
        expected[name] = first_step(configuration(inputs["student"], inputs[name], tmp_path / name))
        published = tmp_path / f"{name}_published"
        published.mkdir()
        for shard in Path(inputs[name]).glob("*.parquet"):
            shutil.copy(shard, published)
    teachers = {
        "compressed": {"kind": "dataset", **COMPRESSED},
        "top5": {"kind": "dataset", "vocab_size": BYTES},  # plain columns
    }
    for name, teacher in teachers.items():
        data = str(tmp_path / f"{name}_published")
        config = configuration(inputs["student"], data, tmp_path / f"{name}_again", teacher=teacher)
        assert_same_step(first_step(config), expected[name])
    for losses, teacher, line in [
        (KL, {"kind": "dataset"}, r"^teacher\.logprob_compressor: is missing: dataset\.train_dataset has no manifest"),
        (BACKGROUND, teachers["compressed"], r"^loss_functions\[0\]\.missing_probability_handling: background needs"),
    ]:
        data = str(tmp_path / "compressed_published")
        config = configuration(inputs["student"], data, tmp_path / "no", teacher=teacher, loss_functions=losses)
        with pytest.raises(UserError, match=line):
            run(config)


@pytest.mark.parametrize(
    ("teacher", "line"),
    [
        (
            {"logprob_compressor": {**COMPRESSED["logprob_compressor"], "exact_k": 16}},
            r"^teacher\.logprob_compressor\.exact_k: is 16, but dataset\.train_dataset was captured with 8, according "
            r"to its manifest; remove",
        ),
        (
            {"legacy_logit_compression": {"vocab_size": BYTES, "k": 32, "exact_k": 8, "polynomial_degree": 2}},
            r"^teacher\.legacy_logit_compression: dataset\.train_dataset was captured with logprob_compressor, "
            r"according to its manifest; remove",
        ),
        ({"vocab_size": 300}, r"^teacher\.vocab_size: is 300, but the outputs of dataset\.train_dataset are over 259"),
    ],
)
def test_a_configuration_that_contradicts_the_manifest_is_refused(inputs, tmp_path, teacher, line):
    config = configuration(
        inputs["student"], inputs["compressed"], tmp_path / "run", teacher={"kind": "dataset", **teacher}
    )
    with pytest.raises(UserError, match=line):
        run(config)


def test_one_that_repeats_the_manifest_is_not(inputs, tmp_path):
    teacher = {"kind": "dataset", **COMPRESSED, "vocab_size": BYTES}
    run(configuration(inputs["student"], inputs["compressed"], tmp_path / "run", teacher=teacher))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "missing"])
def test_a_damaged_shard_is_named_before_the_first_step(inputs, tmp_path, damage):
    data = copy(inputs, "top5", tmp_path / "data")
    shard = Path(data) / "shard-00001.parquet"
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "truncated":
        shard.write_bytes(content[:-10])
    elif damage == "missing":
        shard.unlink()
    else:
        shutil.copy(Path(inputs["whole"]) / shard.name, Path(data) / "shard-00099.parquet")
    name = "shard-00099.parquet" if damage == "foreign" else shard.name
    with pytest.raises(UserError, match=rf"^dataset\.train_dataset\.disk_path: {name}: ") as caught:
        run(configuration(inputs["student"], data, tmp_path / "run"))
    assert str(caught.value).endswith(
        "; delete these files and run the same distillkit capture again, which makes them anew"
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_a_damaged_packed_dataset_is_told_to_do_mends_it(inputs, tmp_path):
    source, data = DatasetSource(disk_path=inputs["documents"]), tmp_path / "packed"
    pack(source, data, 64, Console(quiet=True))
    (data / "shard-00000.parquet").unlink()
    line = "delete these files and run the same distillkit pack again, which makes them anew"
    with pytest.raises(UserError, match=line):
        run(configuration(inputs["student"], str(data), tmp_path / "run"))
    pack(source, data, 64, Console(quiet=True))
    run(configuration(inputs["student"], str(data), tmp_path / "run"))


def test_a_resumed_run_reads_again_only_a_dataset_that_has_changed(inputs, tmp_path, monkeypatch):
    data = copy(inputs, "top5", tmp_path / "data")
    read = sorted(Path(data).glob("*.parquet"))
    all_read = sorted([Path(data) / "background.safetensors", *read, *(Path(data) / "tokenizer").iterdir()])
    hashed = []
    monkeypatch.setattr(verify, "sha256", lambda path: hashed.append(path) or sha256(path))
    training = {"save_steps": 1, "max_steps": 2}
    run(configuration(inputs["student"], data, tmp_path / "run", training=training))
    assert sorted(hashed) == all_read

    def resume():
        (tmp_path / "run/results.json").unlink(missing_ok=True)
        run(configuration(inputs["student"], data, tmp_path / "run", training=training, resume=True))

    resume()
    assert sorted(hashed) == all_read
    content = bytearray(read[1].read_bytes())
    content[len(content) // 2] ^= 1
    read[1].write_bytes(content)
    with pytest.raises(
        UserError, match=r"dataset\.train_dataset: is not what it was when the run .*shard-00001\.parquet"
    ):
        resume()


def test_a_capture_that_is_not_finished_is_refused(inputs, tmp_path):
    data = copy(inputs, "top5", tmp_path / "data")
    (Path(data) / "manifest.json").unlink()
    config = configuration(inputs["student"], data, tmp_path / "run")
    with pytest.raises(UserError, match=r"^dataset\.train_dataset\.disk_path: .* its capture is not finished"):
        run(config)


def test_another_format_or_other_columns_are_told_from_the_first_row(inputs, tmp_path):
    data = copy(inputs, "compressed", tmp_path / "data")
    (Path(data) / "manifest.json").unlink()
    for other in Path(data).glob("*.json"):
        other.unlink()
    shutil.rmtree(Path(data) / "tokenizer")
    wrong = {**COMPRESSED["logprob_compressor"], "exact_k": 7}
    teacher = {"kind": "dataset", "logprob_compressor": wrong}
    with pytest.raises(
        UserError, match=r"^dataset\.train_dataset: the rows of column 'compressed_logprobs' hold 48 numb"
    ):
        run(configuration(inputs["student"], data, tmp_path / "run", teacher=teacher))
    legacy = {"vocab_size": BYTES, "k": 32, "exact_k": 8, "polynomial_degree": 2}
    teacher = {"kind": "dataset", "legacy_logit_compression": legacy}
    with pytest.raises(
        UserError, match=r"^dataset\.train_dataset: has no column packed_indices or exact_values or coe"
    ):
        run(configuration(inputs["student"], data, tmp_path / "run", teacher=teacher))


def test_a_student_with_another_tokenizer_is_refused(inputs, tmp_path):
    student = shutil.copytree(inputs["student"], tmp_path / "student")
    file = student / "tokenizer.json"
    file.write_text(file.read_text().replace('"z":', '"zz":').replace('"y":', '"z":').replace('"zz":', '"y":'))
    with pytest.raises(UserError, match=r"its tokenizer is not the student's: '[yz]' is"):
        run(configuration(str(student), inputs["top5"], tmp_path / "run"))
    data = copy(inputs, "top5", tmp_path / "data")
    shutil.rmtree(Path(data) / "tokenizer")
    with pytest.raises(
        UserError, match=r"^model: its tokenizer is not the one that dataset\.train_dataset was captured"
    ):
        run(configuration(str(student), data, tmp_path / "run"))


def with_one_more_token(folder):
    """A student whose tokenizer has a token that the teacher's has not."""
    llama(1, vocab=BYTES + 1).save_pretrained(folder)
    more = tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<think>"]})
    more.save_pretrained(folder)
    return str(folder)


def test_a_student_with_one_more_token_learns_where_the_teacher_is_gone(inputs, tmp_path):
    student, data = with_one_more_token(tmp_path / "student"), copy(inputs, "top5", tmp_path / "data")
    manifest = read_manifest(Path(data))
    write_manifest(Path(data), replace(manifest, teacher={**manifest.teacher, "path": str(tmp_path / "gone")}))
    _, gradients = first_step(configuration(student, data, tmp_path / "run"))
    assert gradients["model.embed_tokens.weight"][:BYTES].any()
    assert not gradients["model.embed_tokens.weight"][BYTES:].any()


def test_what_decides_no_id_may_differ(inputs, tmp_path):
    student = shutil.copytree(inputs["student"], tmp_path / "student")
    other = tokenizer()
    other.chat_template = "{{ messages }}"
    other.save_pretrained(student)
    run(configuration(str(student), inputs["top5"], tmp_path / "run"))


def test_a_student_with_a_wider_head_learns_what_both_know(inputs, tmp_path):
    student = save_llama(tmp_path / "wide", 1)
    model = load_model(student)
    model.resize_token_embeddings(BYTES + 61, mean_resizing=False)
    model.save_pretrained(student)
    losses, gradients = first_step(
        configuration(student, inputs["whole"], tmp_path / "run", loss_functions=[*KL, EVERY_LOSS[0]])
    )
    expected, _ = first_step(
        configuration(inputs["student"], inputs["whole"], tmp_path / "narrow", loss_functions=[*KL, EVERY_LOSS[0]])
    )
    assert losses == pytest.approx(expected, rel=1e-4)
    assert not gradients["model.embed_tokens.weight"][BYTES:].any()


def test_losses_that_need_what_is_not_stored_are_refused():
    described = {**configuration("org/student", "data", "run").model_dump(mode="json"), "layer_mapping": "all"}
    hidden = {**described, "loss_functions": [{"function": "hs_mse", "weight": 1.0}]}
    with pytest.raises(UserError, match=r"^loss_functions\[0\]\.function: hs_mse needs a teacher of kind: hf; dataset"):
        RunConfig.parse(hidden)
    with pytest.raises(
        UserError, match=r"^student: converts the teacher, .* convert it first .* name the result in model"
    ):
        RunConfig.parse({**described, "model": None, "student": {"layout": "hybrid"}})


@pytest.mark.parametrize(
    ("teacher", "line"),
    [
        ({}, "background needs teacher.top_k: of a whole distribution nothing is missing"),
        ({"top_k": 5}, "background needs teacher.background: a captured dataset that has one"),
    ],
)
def test_a_live_teacher_with_a_background_needs_one_and_a_top_k(teacher, line):
    live = {"kind": "hf", "path": "org/teacher", **teacher}
    with pytest.raises(UserError) as caught:
        configuration("org/student", "data", "run", teacher=live, loss_functions=BACKGROUND)
    assert str(caught.value) == f"loss_functions[0].missing_probability_handling: {line}"


def test_a_background_of_another_teacher_is_refused(inputs, tmp_path):
    other = save_llama(tmp_path / "other", 3)
    model = load_model(other)
    model.resize_token_embeddings(BYTES + 5, mean_resizing=False)
    model.save_pretrained(other)
    live = {"kind": "hf", "path": other, "top_k": 5, "background": inputs["top5"]}
    config = configuration(inputs["student"], inputs["text"], tmp_path / "run", teacher=live, loss_functions=BACKGROUND)
    text = {"train_dataset": {"disk_path": inputs["text"]}}
    with pytest.raises(
        UserError, match=r"^teacher\.background: covers 259 tokens, but the teacher's vocabulary has 264"
    ):
        run(RunConfig.parse({**config.model_dump(mode="json"), "dataset": text}))


def divergences(folder):
    return json.loads((folder / "results.json").read_text())["divergence"]


def test_held_out_rows_with_the_teachers_word_are_measured_against_it(inputs, tmp_path):
    data = {"train_dataset": {"disk_path": inputs["top5"]}, "prepacked": True}
    changes = {"dataset": data, "evaluation": {"dataset": {"disk_path": inputs["whole"]}, "num_tokens": 400}}
    training = {"max_steps": 2, "learning_rate": 1e-3, "eval_strategy": "steps", "eval_steps": 1}
    said = run(configuration(inputs["student"], "", tmp_path / "run", training=training, **changes))
    rows = build_dataset(DatasetSource(disk_path=inputs["whole"]), tokenizer(), 64, seed=42, prepacked=True)
    models = load_model(inputs["teacher"]), load_model(inputs["student"])
    live = measure_divergence(LiveTeacher(models[0]), models[1], held_out_batches(rows, 8), num_tokens=400)
    before = divergences(tmp_path / "run")["before"]
    assert before["kl"] == pytest.approx(live.kl, rel=1e-4)
    assert before["agreement"] == pytest.approx(live.agreement)
    assert before["student_perplexity"] == pytest.approx(live.student_perplexity, rel=1e-4)
    assert before["teacher_perplexity"] is None
    assert "eval_kl" in said
    assert "KL over stored tokens (≤ KL(teacher‖student))" in said and "KL(teacher‖student), nats" not in said
    assert any(line.startswith("│ perplexity, teacher") and "-" in line for line in said.splitlines())


def measured_on(inputs, data, folder):
    given = {"train_dataset": {"disk_path": inputs["top5"]}, "eval_dataset": {"disk_path": data}, "prepacked": True}
    return configuration(inputs["student"], "", folder, dataset=given, evaluation={"num_tokens": 300})


def test_held_out_rows_of_another_teacher_are_told(inputs, tmp_path, caplog):
    other = save_llama(tmp_path / "other", 3)
    run(measured_on(inputs, captured(other, inputs["text"], tmp_path / "others"), tmp_path / "run"))
    said = "dataset.eval_dataset: its teacher, which the student is compared with, is not that of dataset.train_data"
    (line,) = [line for line in caplog.messages if line.startswith(said)]
    assert f"path '{other}', not '{inputs['teacher']}'" in line
    caplog.clear()
    run(measured_on(inputs, inputs["whole"], tmp_path / "same"))
    assert not [line for line in caplog.messages if line.startswith(said)]


def test_held_out_rows_of_another_tokenizer_or_vocabulary_are_refused(inputs, tmp_path):
    other = Path(save_llama(tmp_path / "other", 3)) / "tokenizer.json"
    other.write_text(other.read_text().replace('"z":', '"zz":').replace('"y":', '"z":').replace('"zz":', '"y":'))
    data = captured(other.parent, inputs["text"], tmp_path / "others")
    with pytest.raises(UserError, match=r"^dataset\.eval_dataset: its tokenizer is not the student's: '[yz]' is"):
        run(measured_on(inputs, data, tmp_path / "run"))
    shutil.rmtree(Path(data) / "tokenizer")  # as in a dataset of earlier versions, which did not know its files
    write_manifest(Path(data), replace(read_manifest(Path(data)), tokenizer_files=None))
    with pytest.raises(
        UserError, match=r"^model: its tokenizer is not the one that dataset\.eval_dataset was captured"
    ):
        run(measured_on(inputs, data, tmp_path / "run"))
    wide = save_llama(tmp_path / "wide", 3)
    llama(3, vocab=320).save_pretrained(wide)
    data = captured(wide, inputs["text"], tmp_path / "wide_captured", {"plain": {"k": 5, "vocab_size": 320}})
    with pytest.raises(UserError, match=r"^dataset\.eval_dataset: was captured over 320 tokens, but dataset\.train_d"):
        run(measured_on(inputs, data, tmp_path / "run"))


@pytest.mark.parametrize("dataset", ["whole", "documents"])
def test_held_out_text_alone_tells_the_students_perplexity(inputs, tmp_path, dataset):
    given = {"train_dataset": {"disk_path": inputs[dataset]}, "eval_dataset": {"disk_path": inputs["text"]}}
    given["prepacked"] = dataset == "whole"
    said = run(configuration(inputs["student"], "", tmp_path / "run", dataset=given, evaluation={"num_tokens": 300}))
    after = divergences(tmp_path / "run")["after"]
    assert after["kl"] is None and after["agreement"] is None and after["teacher_perplexity"] is None
    assert f"{after['student_perplexity']:.2f}" in said
