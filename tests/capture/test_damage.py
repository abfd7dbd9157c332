"""A file of a captured dataset that is damaged is named, or nothing depends on what was damaged."""

import io
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from distillkit.capture.inspection import inspect_dataset, stored_rows
from distillkit.compression import build_codec
from distillkit.config import DatasetSource, UserError
from distillkit.shards import read_background, read_manifest, verify_shards
from distillkit.teacher.captured_tokenizer import read_tokenizer
from distillkit.teacher.opening import manifest_of, refuse_damage
from tests.capture.captures import configuration, files, run
from tests.damage import ALL_KINDS, damage, damages
from tests.training.tiny import save_llama, save_text


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_llama(folder / "teacher", 0), save_text(folder / "text.jsonl", documents=12)


@pytest.fixture(scope="module")
def dataset(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("captured") / "dataset"
    run(configuration(*inputs, folder))
    assert {"background.safetensors", "background.json"} < set(files(folder))
    return folder


@pytest.fixture(scope="module")
def whole(dataset):
    return learnt_from(dataset)


def learnt_from(folder):
    """All that a run reads from a captured dataset, after what it checks. Raises UserError."""
    source = DatasetSource(disk_path=str(folder))
    manifest = manifest_of(source)
    if manifest is None:
        raise UserError("dataset.train_dataset", "is not a captured dataset any more")
    refuse_damage(source, "dataset.train_dataset")
    codec = build_codec(manifest.codec_kind, manifest.codec_config)
    rows = [
        (row.input_ids, row.seq_lengths, row.distribution.ids.tolist(), row.distribution.logprobs.tolist())
        for row in stored_rows(folder, manifest, codec)
    ]
    tokenizer = read_tokenizer(folder, manifest)
    return manifest, rows, read_background(folder, manifest).tolist(), tokenizer.backend_tokenizer.to_str()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.data(), damages(ALL_KINDS))
def test_damage_is_refused_by_name_or_changes_nothing(dataset, whole, tmp_path, data, done):
    name = data.draw(st.sampled_from(sorted(files(dataset))))
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(dataset, folder)
    damage(folder / name, *done)
    try:
        read, refusal = learnt_from(folder), None
    except UserError as error:
        read, refusal = None, str(error)
    assert name == "manifest.json" or name in refusal if refusal else read == whole


@pytest.mark.parametrize(
    "name",
    [
        "background.safetensors",
        "background.json",
        "shard-00000.json",
        "shard-00001.json",
        "manifest.json",
        "tokenizer/tokenizer.json",
    ],
)
@pytest.mark.parametrize("kind", ["one bit", "cut"])
def test_capture_makes_again_what_is_damaged_and_signs_none_of_it(inputs, dataset, tmp_path, name, kind):
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    damage(folder / name, kind, 0.7)
    run(configuration(*inputs, folder))
    assert files(folder) == files(dataset)


def test_capture_leaves_a_damaged_shard_named(inputs, dataset, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    damage(folder / "shard-00001.parquet", "one bit", 0.5)
    run(configuration(*inputs, folder))
    assert verify_shards(folder, read_manifest(folder)) == [
        "shard-00001.parquet: differs from what was captured (SHA-256)"
    ]


def test_a_damaged_plan_is_refused(inputs, dataset, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    plan = folder / "plan.json"
    plan.write_text(plan.read_text().replace('"tokens_per_batch": 128', '"tokens_per_batch": 129'))
    with pytest.raises(
        UserError, match=r"output_path: .*plan\.json is not the plan of a capture \(it was damaged, or "
    ):
        run(configuration(*inputs, folder))


def test_datasets_of_before_are_whole(dataset, whole, tmp_path):
    """Their JSON has no digests, their background no record, and their manifest does not know the tokenizer's files."""
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    (folder / "background.json").unlink()
    for path in folder.glob("*.json"):
        content = {key: value for key, value in json.loads(path.read_text()).items() if key != "digest"}
        content.pop("tokenizer_files", None)
        path.write_text(json.dumps(content))
    assert learnt_from(folder)[1:] == whole[1:]
    assert inspect_dataset(folder, verify=True, console=Console(file=io.StringIO()))
