"""The schemas for editors: valid themselves, at one with what the checks take and refuse, and described throughout."""

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from distillkit.config import RunConfig, UserError, resolve
from distillkit.config.capture import CaptureConfig
from distillkit.config.evaluate import EvaluateConfig
from distillkit.config.phases import PhaseConfig
from distillkit.config.schema import json_schema
from distillkit.config.yaml_files import apply_override, read_mapping

SEED = Path(__file__).with_name("seed.yaml")
RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


@functools.cache
def validator(kind: Any) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json_schema(kind))


def problems(kind: str, data: Any) -> list[str]:
    """What the schema says against a YAML file, as it is written."""
    return [f"{error.json_path}: {error.message}" for error in validator(kind).iter_errors(data)]


def kind_of(path: Path) -> str:
    """By the keys of the file and of those it extends."""
    data = read_mapping(path)
    if "extends" in data:
        return kind_of(path.parent / data["extends"])
    return "capture" if "compression" in data else "evaluate" if "students" in data else "run"


@pytest.mark.parametrize("kind", ["run", "capture", "evaluate"])
def test_a_schema_is_one(kind: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema(kind))
    json.dumps(json_schema(kind))


@pytest.mark.parametrize("path", [*RECIPES, SEED], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_fits_its_schema(path: Path) -> None:
    assert problems(kind_of(path), read_mapping(path)) == []


def test_what_is_written_down_of_a_run_fits() -> None:
    assert problems("run", RunConfig.parse(read_mapping(SEED)).model_dump(mode="json")) == []


ACCEPTED = [
    "tokens=300M",
    "tokens=3e8",
    "tokens=null",
    "training_args.warmup_ratio=0.1",
    "training_args.warmup_steps=0.1",
    "training_args.evaluation_strategy=no",
    "training_args.save_strategy=no",
    "training_args.output_dir=null",
    "training_args.fp16=false",
    "training_args.packing=false",
    "training_args.save_safetensors=true",
    "training_args.report_to=[wandb, tensorboard]",
    "training_args.report_to=none",
    "training_args.optim=adamw_torch_8bit",
    "training_args.gradient_checkpointing_kwargs={use_reentrant: false}",
    "training_args=",
    "frozen_res=",
    "teacher={path: x}",
    "project_name=null",
    "dataset.packing=null",
    "teacher.kwargs.gguf_file=null",
    "training_args.learning_rate=null",
    "layer_mapping=[[0, 0], [6, 12]]",
    "model_kwargs=",
    "teacher.kwargs.anything={a: [1]}",
    "loss_functions.2.function=hs_mse",
    "phases=",
    "phases=[{name: a, tokens: 1.5B, frozen_res: [], dataset: {train_dataset: {split: train}}}]",
    "phases=[{name: a, training_args: {learning_rate: 1e-3, packing: true}, evaluation: null}]",
    "phases=[{name: a, teacher: {kind: hf, path: x}, layer_mapping: all, training_args: null}]",
]


@pytest.mark.parametrize("override", ACCEPTED)
def test_what_the_checks_take_the_schema_takes(override: str) -> None:
    data = read_mapping(SEED)
    data["training_args"] = {}
    apply_override(data, override)
    RunConfig.parse(data)
    assert problems("run", data) == []


REFUSED = [
    ("sequence_lenght=1", "$"),
    ("sequence_length=0", "$.sequence_length"),
    ("sequence_length=2k", "$.sequence_length"),
    ("tokens=lots", "$.tokens"),
    ("tokens=1.5", "$.tokens"),
    ("trust_remote_code=2", "$.trust_remote_code"),
    ("teacher.pth=x", "$.teacher"),
    ("teacher={top_k: 4}", "$.teacher"),
    ("teacher.kind=hg", "$.teacher"),
    ("student.layout=hibrid", "$.student"),
    ("dataset.train=x", "$.dataset"),
    ("dataset={seed: 1}", "$.dataset"),
    ("loss_functions=[]", "$.loss_functions"),
    ("loss_functions.1.function=lk", "$.loss_functions[1].function"),
    ("loss_functions.1.temperature=-2", "$.loss_functions[1].temperature"),
    ("layer_mapping=every", "$.layer_mapping"),
    ("layer_mapping=[[1, 2, 3]]", "$.layer_mapping"),
    ("training_args.lerning_rate=1", "$.training_args"),
    ("training_args.learning_rate=fast", "$.training_args"),
    ("training_args.learning_rate=-1", "$.training_args"),
    ("training_args.bf16=1", "$.training_args"),
    ("training_args.optim=adamwtorch", "$.training_args"),
    ("training_args.output_dir=x", "$.training_args"),
    ("training_args.fp16=true", "$.training_args"),
    ("training_args.warmup_ratio=2", "$.training_args"),
    ("phases=[{tokens: 1}]", "$.phases[0]"),
    ("phases=[{name: a, output_path: x}]", "$.phases[0]"),
    ("phases=[{name: a, sequence_length: -1}]", "$.phases[0].sequence_length"),
    ("phases=[{name: a, training_args: {lr: 1}}]", "$.phases[0].training_args"),
    ("phases=[{name: a, dataset: {train: 1}}]", "$.phases[0].dataset"),
    ("phases=[{name: A B}]", "$.phases[0].name"),
]


@pytest.mark.parametrize(("override", "where"), REFUSED)
def test_what_the_schema_refuses_the_checks_refuse(override: str, where: str) -> None:
    data = read_mapping(SEED)
    data["training_args"] = {}
    apply_override(data, override)
    found = problems("run", data)
    assert len(found) == 1 and found[0].startswith(f"{where}: ")
    with pytest.raises(UserError):
        resolve(RunConfig.parse(data))


def test_a_file_that_extends_another_need_not_be_whole() -> None:
    partial = {"dataset": {"seed": 1}, "teacher": {"kwargs": {"dtype": "bfloat16"}}, "training_args": {"max_steps": 3}}
    assert problems("run", {"extends": "base.yaml", **partial}) == []
    assert problems("run", partial) != []
    assert problems("run", {"extends": "base.yaml", "loss_functions": [{"function": "kl"}]}) != []  # lists are replaced
    assert problems("run", {"extends": "base.yaml", "dataset": {"sed": 1}}) != []
    assert problems("run", {"extends": 3}) != []
    assert problems("capture", {"extends": "base.yaml", "compression": {"logprob_compressor": {"k": 3}}}) == []


EVALUATION: dict[str, Any] = {
    "output_path": "out",
    "teacher": {"path": "org/teacher", "kwargs": {"dtype": "bfloat16"}},
    "students": {"hybrid": {"path": "runs/hybrid"}},
    "divergence": {"dataset": {"disk_path": "valid.parquet"}},
    "needles": {"tasks": ["niah_single_1"], "lengths": [1024, 2048]},
}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({}, None),
        ({"speed": {}}, None),
        ({"students": {"hybrid": {"pth": "x"}}}, "$.students.hybrid"),
        ({"divergence": {"num_tokens": 9}}, "$.divergence"),
        ({"needles": {"tasks": ["niah"], "lengths": [1024]}}, "$.needles"),
        ({"outptu_path": "x"}, "$"),
    ],
)
def test_evaluations_are_held_to_theirs(changes: dict[str, Any], where: str | None) -> None:
    found = [problem.partition(": ")[0] for problem in problems("evaluate", EVALUATION | changes)]
    if where is None:
        EvaluateConfig.parse(EVALUATION | changes)
        assert found == []
    else:
        with pytest.raises(UserError):
            EvaluateConfig.parse(EVALUATION | changes)
        assert found and all(each.startswith(where) for each in found)


def definitions(kind: Any) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{name}.{key}", property)
        for name, definition in json_schema(kind)["$defs"].items()
        for key, property in definition["properties"].items()
    ]


@pytest.mark.parametrize("kind", ["run", "capture", "evaluate"])
def test_every_key_is_described(kind: Any) -> None:
    undescribed = {path for path, property in definitions(kind) if not property.get("description")}
    of_transformers = {path for path in undescribed if path.startswith("TrainingArguments.")}
    assert undescribed == of_transformers
    assert len(of_transformers) < 5


def test_editors_know_all_keys_that_there_are() -> None:
    described = json_schema("run")["$defs"]
    assert set(described["RunConfig"]["properties"]) == {"extends", *RunConfig.model_fields}
    assert set(described["PhaseConfig"]["properties"]) == set(PhaseConfig.model_fields)
    assert set(json_schema("capture")["$defs"]["CaptureConfig"]["properties"]) == {
        "extends",
        *CaptureConfig.model_fields,
    }
    assert "cosine" in described["TrainingArguments"]["properties"]["lr_scheduler_type"]["enum"]
    assert "learning rate" in described["TrainingArguments"]["properties"]["learning_rate"]["description"]
