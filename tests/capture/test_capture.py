"""A capture stores what the teacher says, in shards that add up to the text, whoever makes them and however often."""

import io
import json
import os
import shutil
import signal
import socket
import threading

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from distillkit.capture import run as capture_module
from distillkit.capture import summary as summary_module
from distillkit.capture import transformers_engine
from distillkit.capture.fidelity import FidelityMeter
from distillkit.capture.run import capture
from distillkit.capture.transformers_engine import TransformersEngine, batches
from distillkit.compression import build_codec
from distillkit.config import UserError
from distillkit.config.sharing import Share, find_share
from distillkit.data import build_dataset
from distillkit.distribution import DenseDistribution, SparseDistribution
from distillkit.losses.divergences import over_vocabulary, reverse_kl
from distillkit.models.loading import load_model
from distillkit.shards import read_background, read_manifest, signal_tensor, verify_shards
from distillkit.teacher.captured_tokenizer import read_tokenizer, write_tokenizer
from tests.capture.captures import PLAIN, VOCABULARY, configuration, files, rows_of, run
from tests.training.tiny import save_llama, save_text, tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("teacher"), 0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def captured(teacher, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("captured") / "dataset"
    printed = run(configuration(teacher, text, folder))
    return folder, printed


def word_by_word(model, input_ids):
    """Log-probabilities of the next token after each token of a document, one forward pass each."""
    words = []
    for end in range(1, len(input_ids) + 1):
        logits = model(torch.tensor([input_ids[:end]])).logits[0, -1]
        words.append(logits.log_softmax(-1))
    return torch.stack(words)


@torch.no_grad()
def test_every_token_has_the_teachers_word_on_the_next_one_in_its_own_document(teacher, captured):
    model = load_model(teacher)
    for row in rows_of(captured[0])[:6]:
        assert len(row["token_ids"]) == len(row["top_values"]) == len(row["input_ids"]) == sum(row["seq_lengths"])
        start = 0
        for length in row["seq_lengths"]:
            document = slice(start, start + length)
            expected, ids = word_by_word(model, row["input_ids"][document]).topk(5)
            assert torch.equal(torch.tensor(row["token_ids"][document]), ids.int())
            torch.testing.assert_close(torch.tensor(row["top_values"][document]), expected, rtol=0, atol=1e-4)
            start += length


def test_the_rows_are_those_of_training_in_their_order(teacher, text, captured):
    config = configuration(teacher, text, captured[0])
    expected = build_dataset(config.dataset.train_dataset, tokenizer(), 24, seed=42)
    assert [(row["input_ids"], row["seq_lengths"]) for row in rows_of(captured[0])] == [
        (row["input_ids"], row["seq_lengths"]) for row in expected
    ]
    assert any(len(row["seq_lengths"]) > 1 for row in expected)
    assert "labels" not in rows_of(captured[0])[0]


def test_the_manifest_says_what_it_is(teacher, captured):
    folder, printed = captured
    manifest = read_manifest(folder)
    assert manifest.codec_kind == "plain" and manifest.codec_config == {**PLAIN["plain"], "dtype": "float32"}
    assert (manifest.vocabulary_size, manifest.packed_to, manifest.teacher["path"]) == (VOCABULARY, 24, teacher)
    assert manifest.rows == len(rows_of(folder)) and len(manifest.shards) > 3
    assert verify_shards(folder, manifest) == []
    assert "output_path" not in manifest.capture
    assert f"{manifest.tokens:,} tokens in {manifest.rows:,} rows and {len(manifest.shards)} shards" in printed
    assert "bytes per token on disk" in printed and "KL(teacher ‖ stored) is 0." in printed


def test_the_tokenizer_is_beside_what_was_said(captured):
    folder, _ = captured
    found = read_tokenizer(folder, read_manifest(folder))
    assert found.get_vocab() == tokenizer().get_vocab()
    assert found("Größe, 12").input_ids == tokenizer()("Größe, 12").input_ids


def test_a_tokenizer_is_saved_alike_whatever_it_was_last_used_for(tmp_path):
    used = tokenizer()
    write_tokenizer(tmp_path / "fresh", used)
    used("some text", truncation=True, max_length=3, padding="max_length")
    write_tokenizer(tmp_path / "used", used)
    assert files(tmp_path / "used") == files(tmp_path / "fresh")


def test_a_saved_tokenizer_that_is_another_or_wants_to_run_code_is_none(captured, tmp_path):
    manifest = read_manifest(captured[0])
    more = tokenizer()
    more.add_tokens(["more"])
    write_tokenizer(tmp_path / "another", more)
    write_tokenizer(tmp_path / "code", tokenizer())
    path = tmp_path / "code" / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({"auto_map": {"AutoTokenizer": [None, "own.Own"]}}))
    (path.parent / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for folder in ("another", "code", "empty"):
        assert read_tokenizer(tmp_path / folder, manifest) is None
    assert not (tmp_path / "ran").exists()


def test_the_background_is_where_the_teachers_other_mass_lies(teacher, captured):
    folder, _ = captured
    model, outside = load_model(teacher), torch.zeros(VOCABULARY, dtype=torch.float64)
    with torch.no_grad():
        for row in pq.read_table(folder / "shard-00000.parquet").to_pylist():
            for document in torch.tensor(row["input_ids"]).split(row["seq_lengths"]):
                probabilities = word_by_word(model, document.tolist()).exp()
                probabilities.scatter_(-1, probabilities.topk(5).indices, 0)
                outside += probabilities.double().sum(0)
    background = read_background(folder, read_manifest(folder))
    torch.testing.assert_close(background, (outside / outside.sum()).log().float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rows_per_shard", [8, 999])
def test_the_background_is_measured_on_rows_that_it_was_not_fitted_on(
    teacher, text, tmp_path, monkeypatch, rows_per_shard
):
    """The summary's figure, again from the rows of the last shard, or of the second half of the only one."""
    monkeypatch.setattr(summary_module, "SAMPLE_TOKENS", 60)
    config = configuration(teacher, text, tmp_path / "dataset", rows_per_shard=rows_per_shard)
    found = capture(config, None, Console(file=io.StringIO())).fidelity
    rows, manifest = rows_of(tmp_path / "dataset"), read_manifest(tmp_path / "dataset")
    first = manifest.shards[-1].rows[0] if len(manifest.shards) > 1 else (len(rows) + 1) // 2
    model, meter = load_model(teacher), FidelityMeter(read_background(tmp_path / "dataset", manifest))
    with torch.no_grad():
        for row in rows[first:]:
            words = [
                word_by_word(model, part.tolist()) for part in torch.tensor(row["input_ids"]).split(row["seq_lengths"])
            ]
            stored = SparseDistribution(torch.tensor(row["token_ids"]).long(), torch.tensor(row["top_values"]))
            meter.add(DenseDistribution(torch.cat(words)), stored)
            if meter.result().tokens >= 60:
                break
    assert found.tokens == meter.result().tokens
    assert found.kl_background == pytest.approx(meter.result().kl_background, rel=1e-3)


def test_a_single_row_is_measured_on_itself_and_it_is_said(teacher, tmp_path):
    (tmp_path / "text.txt").write_text("a few words")
    printed = run(configuration(teacher, tmp_path / "text.txt", tmp_path / "dataset"))
    assert "with the rest like the background, which was fitted on the same rows (" in printed


def test_another_batch_size_and_documents_apart_say_the_same(teacher, text, captured, tmp_path):
    run(configuration(teacher, text, tmp_path / "one", tokens_per_batch=1))
    for ours, theirs in zip(rows_of(tmp_path / "one"), rows_of(captured[0]), strict=True):
        assert ours["token_ids"] == theirs["token_ids"]
        assert torch.allclose(torch.tensor(ours["top_values"]), torch.tensor(theirs["top_values"]), atol=1e-4)
    dataset = {"train_dataset": {"disk_path": text}, "packing": False, "seed": None}
    run(configuration(teacher, text, tmp_path / "apart", dataset=dataset))
    assert all(row["seq_lengths"] == [len(row["input_ids"])] for row in rows_of(tmp_path / "apart"))
    assert read_manifest(tmp_path / "apart").packed_to is None


@pytest.mark.parametrize(
    "compression",
    [
        {"logprob_compressor": {"d": VOCABULARY, "k": 12, "exact_k": 4, "polynomial_terms": [0, 1, "sqrt"]}},
        {"legacy_logit_compression": {"vocab_size": VOCABULARY, "k": 12, "exact_k": 4, "polynomial_degree": 2}},
    ],
)
def test_every_codec_can_be_read_back(teacher, text, tmp_path, compression):
    run(configuration(teacher, text, tmp_path, compression=compression))
    manifest = read_manifest(tmp_path)
    codec = build_codec(manifest.codec_kind, manifest.codec_config)
    table = pq.read_table(tmp_path / manifest.shards[0].file)
    assert set(codec.columns) < set(table.column_names)
    decoded = codec.decode({name: signal_tensor(table[name], name) for name in codec.columns})
    rows = table.select(["input_ids", "seq_lengths"]).to_pylist()
    engine = TransformersEngine(load_model(teacher), 128)
    answers = {answer.rows[place]: part for answer in engine.top_k(rows, 12) for place, part in split(answer, rows)}
    expected = torch.cat([answers[index] for index in range(len(rows))])
    assert (decoded.logprobs[:, :4] - expected[:, :4]).abs().max() < 0.02


def split(answer, rows):
    return enumerate(answer.distribution.logprobs.split([len(rows[index]["input_ids"]) for index in answer.rows]))


@pytest.mark.gpu
def test_a_gpu_says_what_the_cpu_says(teacher, text, tmp_path, monkeypatch):
    compressed = {"logprob_compressor": {"d": VOCABULARY, "k": 12, "exact_k": 4, "polynomial_terms": [0, 1, "sqrt"]}}
    for name, visible in (("cuda", True), ("cpu", False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda visible=visible: visible)
        run(configuration(teacher, text, tmp_path / f"{name}-plain"))
        run(configuration(teacher, text, tmp_path / f"{name}-compressed", compression=compressed))
    for ours, theirs in zip(rows_of(tmp_path / "cuda-plain"), rows_of(tmp_path / "cpu-plain"), strict=True):
        assert torch.allclose(torch.tensor(ours["top_values"]), torch.tensor(theirs["top_values"]), atol=1e-3)
    pairs = zip(rows_of(tmp_path / "cuda-compressed"), rows_of(tmp_path / "cpu-compressed"), strict=True)
    same = [ours["bytepacked_indices"] == theirs["bytepacked_indices"] for ours, theirs in pairs]
    assert sum(same) > 0.8 * len(same)  # near ties may come in another order


def test_labels_are_kept_where_they_say_more_than_tokens(teacher, tmp_path):
    rows = [{"prompt": f"{number} plus {number} is ", "completion": f"{2 * number}."} for number in range(30)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(configuration(teacher, tmp_path / "sums.jsonl", tmp_path / "dataset"))
    for row in rows_of(tmp_path / "dataset"):
        assert len(row["labels"]) == len(row["input_ids"]) and -100 in row["labels"][1:]


def test_batches_hold_rows_of_about_a_length_and_no_more_tokens_than_allowed():
    rows = [{"input_ids": [0] * length} for length in (3, 9, 1, 9, 40, 2)]
    assert list(batches(rows, 18)) == [[4], [1, 3], [0, 5, 2]]


def test_a_capture_that_is_there_is_not_made_again(teacher, text, captured):
    before = files(captured[0])
    printed = run(configuration(teacher, text, captured[0]))
    assert "nothing to make" in printed and "captured" not in printed.replace(str(captured[0]), "")
    assert files(captured[0]) == before


def test_a_mapping_and_a_path_are_configurations_too(teacher, text, captured, tmp_path):
    keys = configuration(teacher, text, captured[0]).model_dump(mode="json", exclude_unset=True)
    path = tmp_path / "capture.yaml"
    path.write_text(json.dumps(keys))  # JSON is YAML
    for form in (keys, path, str(path)):
        assert "nothing to make" in run(form)


@pytest.mark.parametrize(
    "lost",
    [
        "shard-00002.parquet",
        "shard-00001.json",
        "background.safetensors",
        "tokenizer/tokenizer.json",
        "manifest.json",
    ],
)
def test_what_is_lost_is_made_again(teacher, text, captured, tmp_path, lost):
    shutil.copytree(captured[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / lost).unlink()
    here = socket.gethostname().replace(".", "-")
    (tmp_path / f".shard-00002.parquet.{here}.01234567.unfinished").write_bytes(b"half")
    run(configuration(teacher, text, tmp_path))
    assert files(tmp_path) == files(captured[0])


def test_the_background_of_another_capture_is_made_again(teacher, text, captured, tmp_path):
    run(configuration(teacher, text, tmp_path / "other", rows_per_shard=9))
    for name, content in files(captured[0]).items():
        (tmp_path / "dataset" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dataset" / name).write_bytes(content)
    other = tmp_path / "other" / "background.safetensors"
    (tmp_path / "dataset" / "background.safetensors").write_bytes(other.read_bytes())
    run(configuration(teacher, text, tmp_path / "dataset"))
    assert files(tmp_path / "dataset") == files(captured[0])


def test_shares_add_up_to_the_same_dataset(teacher, text, captured, tmp_path):
    for share in ("2/3", "1/3"):
        printed = run(configuration(teacher, text, tmp_path), share)
        assert "shards are complete; the process that makes the last one" in printed
        assert not (tmp_path / "manifest.json").exists()
    run(configuration(teacher, text, tmp_path), "3/3")
    assert files(tmp_path) == files(captured[0])


def test_folders_of_unrelated_machines_are_put_together(teacher, text, captured, tmp_path):
    for share in ("1/2", "2/2"):
        folder = tmp_path / share[0]
        run(configuration(teacher, text, folder), share)
        (tmp_path / "whole").mkdir(exist_ok=True)
        for name, content in files(folder).items():
            (tmp_path / "whole" / name).write_bytes(content)
    printed = run(configuration(teacher, text, tmp_path / "whole"))
    assert "nothing to make" in printed
    assert files(tmp_path / "whole") == files(captured[0])


def test_shares():
    shares = [find_share(f"{index}/3", {}) for index in (1, 2, 3)]
    assert [[share.has(shard) for shard in range(4)] for share in shares] == [
        [True, False, False, True],
        [False, True, False, False],
        [False, False, True, False],
    ]
    assert find_share(None, {"RANK": "1", "WORLD_SIZE": "2"}) == Share(1, 2)
    assert find_share(None, {}) == Share(0, 1)
    for option in ("0/3", "4/3", "1", "a/b", "1/0"):
        with pytest.raises(UserError, match=f"--shard: must be i/n with i from 1 to n, such as 1/4, got '{option}'"):
            find_share(option, {})
    for variables in ({"WORLD_SIZE": "two"}, {"WORLD_SIZE": "0"}, {"RANK": "-1"}, {"RANK": "2", "WORLD_SIZE": "2"}):
        with pytest.raises(UserError, match=r"RANK|WORLD_SIZE"):
            find_share(None, variables)
    with pytest.raises(UserError, match="--shard: torchrun's processes share the shards already"):
        find_share("1/2", {"RANK": "1", "WORLD_SIZE": "2"})


def test_text_is_read_once_until_the_dataset_is_there(teacher, captured, tmp_path):
    text, prepared = save_text(tmp_path / "text.jsonl"), tmp_path / "dataset.prepared"
    run(configuration(teacher, text, tmp_path / "dataset"), "1/2")
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*.arrow")}
    assert before
    kept = rows_of(tmp_path / "dataset")
    run(configuration(teacher, text, tmp_path / "dataset"), "1/2")
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*.arrow")} == before
    assert rows_of(tmp_path / "dataset") == kept
    run(configuration(teacher, text, tmp_path / "dataset"), "2/2")
    assert not prepared.exists()
    assert rows_of(tmp_path / "dataset") == rows_of(captured[0])


def test_processes_of_torchrun_share_and_one_of_them_speaks(teacher, text, captured, tmp_path, monkeypatch):
    config = configuration(teacher, text, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(config) == ""
    monkeypatch.setenv("RANK", "0")
    assert "this is share 1 of 2" in run(config)
    assert files(tmp_path) == files(captured[0])


@pytest.fixture
def ctrl_c():
    """Ctrl-C as at a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_says_how_to_go_on(teacher, text, captured, tmp_path, monkeypatch, capsys):
    def interrupted_at_the_third(*arguments, **options):
        made.append(shard_table(*arguments, **options))
        if len(made) == 3:
            threading.Timer(0, os.kill, (os.getpid(), signal.SIGINT)).start()
            threading.Event().wait(10)
        return made[-1]

    shard_table, made = capture_module.shard_table, []
    monkeypatch.setattr(capture_module, "shard_table", interrupted_at_the_third)
    with pytest.raises(SystemExit) as ended:
        capture(configuration(teacher, text, tmp_path))
    assert ended.value.code == 130
    shards = len(read_manifest(captured[0]).shards)
    assert (
        f"interrupted: 2 of {shards} shards are complete; the same command makes the others" in capsys.readouterr().out
    )
    monkeypatch.undo()
    run(configuration(teacher, text, tmp_path))
    assert files(tmp_path) == files(captured[0])


def test_the_teacher_reads_on_while_a_shard_is_written(teacher, text, captured, tmp_path, monkeypatch):
    """The write of a shard may wait until the next one is begun."""

    def read(*arguments, **options):
        next(counter).set()
        return shard_table(*arguments, **options)

    def write(folder, index, *rest):
        assert index == shards - 1 or begun[index + 1].wait(20)
        return write_shard(folder, index, *rest)

    shards, begun = len(read_manifest(captured[0]).shards), [threading.Event() for _ in range(99)]
    counter = iter(begun)
    shard_table, write_shard = capture_module.shard_table, capture_module.write_shard
    monkeypatch.setattr(capture_module, "shard_table", read)
    monkeypatch.setattr(capture_module, "write_shard", write)
    run(configuration(teacher, text, tmp_path))
    assert files(tmp_path) == files(captured[0])


def test_too_little_memory_for_a_batch_is_told(teacher, text, tmp_path, monkeypatch):
    def whole(engine, rows):
        if sum(len(row["input_ids"]) for row in rows) > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return at_once(engine, rows)

    at_once = TransformersEngine.whole
    monkeypatch.setattr(TransformersEngine, "whole", whole)
    with pytest.raises(UserError, match=r"^tokens_per_batch: the device has no memory for the teacher and 128 tokens"):
        run(configuration(teacher, text, tmp_path))
    run(configuration(teacher, text, tmp_path, tokens_per_batch=64))
    assert verify_shards(tmp_path, read_manifest(tmp_path)) == []


def test_logits_exist_for_a_chunk_of_tokens_alone(teacher, monkeypatch):
    engine = TransformersEngine(load_model(teacher), 4096)
    rows = [{"input_ids": list(range(60)), "seq_lengths": [60]}, {"input_ids": [7, 8, 9], "seq_lengths": [3]}]
    (expected,) = engine.top_k(rows, 5)
    monkeypatch.setitem(transformers_engine.CHUNK_BYTES, "cpu", 4 * VOCABULARY * 7)
    assert [len(dense.logits) for dense in engine.whole(rows)] == [7] * 9
    (answer,) = engine.top_k(rows, 5)
    assert answer.rows == expected.rows == [0, 1]
    assert torch.equal(answer.distribution.ids, expected.distribution.ids)
    torch.testing.assert_close(answer.distribution.logprobs, expected.distribution.logprobs)


def test_fidelity_against_sums_by_hand():
    torch.manual_seed(0)
    teacher = torch.randn(6, 10).log_softmax(-1)
    values, ids = teacher.topk(3)
    background = torch.randn(10).log_softmax(-1)
    meter = FidelityMeter(background)
    meter.add(DenseDistribution(teacher[:4] + 3), SparseDistribution(ids[:4], values[:4]))
    meter.add(DenseDistribution(teacher[4:]), SparseDistribution(ids[4:], values[4:]))
    found = meter.result()
    expected = {"uniform": 0.0, "background": 0.0}
    for row in range(6):
        listed = set(ids[row].tolist())
        rest = 1 - sum(teacher[row, token].exp() for token in listed)
        others = {token: background[token].exp() for token in range(10) if token not in listed}
        for token, share in others.items():
            p = teacher[row, token].exp()
            expected["uniform"] += float(p * (p / (rest / 7)).log()) / 6
            expected["background"] += float(p * (p / (rest * share / sum(others.values()))).log()) / 6
    assert found.tokens == 6
    assert found.top_k_mass == pytest.approx(float(values.exp().sum(-1).mean()), rel=1e-5)
    assert found.kl_uniform == pytest.approx(expected["uniform"], rel=1e-4)
    assert found.kl_background == pytest.approx(expected["background"], rel=1e-4)


def test_stored_words_that_leave_nothing_or_name_no_one():
    ids = torch.tensor([[0, 1], [1, 0]])
    logprobs = torch.tensor([[0.01, -9.0], [-0.5, -torch.inf]])
    whole = over_vocabulary(SparseDistribution(ids, logprobs, torch.zeros(4))).log_softmax(-1)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(2))
    assert (whole > -torch.inf).all()
    torch.testing.assert_close(whole[1, 1], torch.tensor(-0.5))
    full = torch.randn(2, 4).log_softmax(-1)
    everything = SparseDistribution(torch.arange(4).expand(2, 4), full, torch.zeros(4))
    torch.testing.assert_close(over_vocabulary(everything), full)


def test_the_reported_divergence_is_the_losss():
    """With the stored word as teacher and the teacher as student, the other way round: reverse_kl's formula."""
    torch.manual_seed(0)
    teacher, background = torch.randn(6, 10).log_softmax(-1), torch.randn(10).log_softmax(-1)
    values, ids = teacher.topk(3)
    values = values + torch.linspace(-0.1, 0.4, 6)[:, None]  # rounded, in the end to more than 1
    meter = FidelityMeter(background)
    meter.add(DenseDistribution(teacher), SparseDistribution(ids, values))
    stored = SparseDistribution(ids, values, background)
    sums, _ = reverse_kl(teacher, stored, ids[:, 0], missing_probability_handling="background")
    assert values.exp().sum(-1).max() > 1
    assert meter.result().kl_background == pytest.approx(float(sums.mean()), rel=1e-5)
