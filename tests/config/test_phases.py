"""Phases: each is the top level with what it changes, starts where the one before ended, and is checked whole."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillkit.config import Phase, Run, RunConfig, UserError, check_ready, load_run, resolve

TOP: dict[str, Any] = {
    "project_name": "kda",
    "output_path": "runs/kda",
    "teacher": {"kind": "hf", "path": "org/teacher", "kwargs": {"dtype": "bfloat16"}},
    "student": {"layout": "hybrid"},
    "model_kwargs": {"gguf_file": "t.gguf", "revision": "v1", "attn_implementation": "sdpa"},
    "frozen_res": ["mlp"],
    "sequence_length": 2048,
    "tokens": "1B",
    "dataset": {
        "train_dataset": {"repo_id": "org/text", "split": "train", "revision": "v2"},
        "eval_dataset": {"repo_id": "org/text", "split": "test"},
    },
    "training_args": {"learning_rate": 1e-3, "warmup_ratio": 0.1, "gradient_checkpointing": False},
    "evaluation": {"num_tokens": 4096, "prompts": ["Once"]},
}


def config_of(*phases: dict[str, Any], **top: Any) -> RunConfig:
    return RunConfig.parse({**copy.deepcopy(TOP), **top, "phases": list(phases)})


def run_of(*phases: dict[str, Any], **top: Any) -> Run:
    return resolve(config_of(*phases, **top))


def phase_of(changes: dict[str, Any], **top: Any) -> RunConfig:
    """The run that a second phase is."""
    return run_of({"name": "first"}, {"name": "second", **changes}, **top).phases[1].config


def test_a_run_without_phases_is_one_phase() -> None:
    run = run_of()
    [phase] = run.phases
    assert phase.config == run.config and phase.folder == run.folder
    assert phase.is_last and str(phase) == "training"
    assert not run.has_phase_folders
    assert run_of(phases=None) == run


def test_a_phase_knows_its_place() -> None:
    first, second = run_of({"name": "a"}, {"name": "b", "sequence_length": 9}).phases
    assert (str(first), str(second)) == ("phase 1 of 2: a", "phase 2 of 2: b")
    assert not first.is_last and second.is_last
    assert (first.key("sequence_length"), second.key("sequence_length")) == (
        "sequence_length",
        "phases[1].sequence_length",
    )


def test_a_phase_that_changes_nothing_is_the_top_level() -> None:
    run = config_of({"name": "only"})
    [phase] = resolve(run).phases
    same = {"phases": [], "output_path": run.output_path, "training_args": run.training_args}
    assert phase.config.model_copy(update=same) == run.model_copy(update={"phases": []})


def test_the_first_converts_and_each_later_one_starts_where_the_one_before_ended() -> None:
    first, second, third = (phase.config for phase in run_of(*({"name": name} for name in "abc")).phases)
    assert [each.output_path for each in (first, second, third)] == [
        "runs/kda/phases/1-a",
        "runs/kda/phases/2-b",
        "runs/kda/phases/3-c",
    ]
    assert first.student is not None and first.model is None
    assert (second.model, third.model) == (first.output_path, second.output_path)
    assert second.student is None and third.student is None
    assert first.model_kwargs == TOP["model_kwargs"]
    assert second.model_kwargs == {"attn_implementation": "sdpa"}  # the original's file and revision are not there


def test_the_first_loads_the_model_of_the_top_level() -> None:
    first, second = (
        phase.config.model for phase in run_of({"name": "a"}, {"name": "b"}, model="m", student=None).phases
    )
    assert (first, second) == ("m", "runs/kda/phases/1-a")


def test_sections_are_changed_key_by_key_and_all_else_is_replaced() -> None:
    changed = phase_of(
        {
            "sequence_length": 32768,
            "frozen_res": [],
            "training_args": {"learning_rate": 1e-5, "gradient_checkpointing": True},
            "dataset": {"num_samples": 9, "eval_dataset": {"split": "test[:10]"}},
            "evaluation": {"num_tokens": 9},
            "teacher": {"kind": "hf", "path": "org/other"},
            "loss_functions": [{"function": "kl", "weight": 1}],
        }
    )
    assert (changed.sequence_length, changed.frozen_res) == (32768, [])
    assert changed.training_args == {
        "learning_rate": 1e-5,
        "warmup_steps": 0.1,
        "gradient_checkpointing": True,
        "run_name": "kda-second",
    }
    assert changed.dataset.num_samples == 9
    assert changed.dataset.train_dataset.revision == "v2"
    assert changed.dataset.eval_dataset is not None
    assert (changed.dataset.eval_dataset.repo_id, changed.dataset.eval_dataset.split) == ("org/text", "test[:10]")
    assert changed.evaluation is not None
    assert (changed.evaluation.num_tokens, changed.evaluation.prompts) == (9, ["Once"])
    assert changed.teacher.kind == "hf" and changed.teacher.kwargs == {}
    assert [loss.function for loss in changed.loss_functions] == ["kl"]


def test_other_text_has_nothing_of_the_former() -> None:
    source = phase_of({"dataset": {"train_dataset": {"disk_path": "long"}}}).dataset.train_dataset
    assert (source.disk_path, source.repo_id, source.split, source.revision) == ("long", None, None, None)


def test_nothing_is_measured_where_evaluation_is_null() -> None:
    assert phase_of({"evaluation": None}).evaluation is None


@pytest.mark.parametrize(
    ("changes", "tokens", "arguments"),
    [
        ({}, 10**9, {}),
        ({"tokens": "20k"}, 20_000, {}),
        ({"training_args": {"max_steps": 7}}, None, {"max_steps": 7}),
        ({"training_args": {"num_train_epochs": 2}}, None, {"num_train_epochs": 2}),
    ],
)
def test_the_budget_of_a_phase_takes_the_place_of_the_top_levels(
    changes: dict[str, Any], tokens: int | None, arguments: dict[str, Any]
) -> None:
    config = phase_of(changes)
    budget = {key: each for key, each in config.training_args.items() if key in ("max_steps", "num_train_epochs")}
    assert (config.tokens, budget) == (tokens, arguments)


@pytest.mark.parametrize("inherited", ["max_steps", "num_train_epochs"])
def test_tokens_take_the_place_of_inherited_steps_and_epochs(inherited: str) -> None:
    config = phase_of({"tokens": 5}, tokens=None, training_args={inherited: 3})
    assert config.tokens == 5
    assert inherited not in config.training_args


def test_older_names_of_training_arguments_change_the_newer_ones() -> None:
    changes = {"training_args": {"warmup_ratio": 0.5, "packing": False, "save_safetensors": True}}
    config = phase_of(changes, training_args={"warmup_steps": 9, "packing": True})
    assert config.training_args == {"warmup_steps": 0.5, "run_name": "kda-second"}
    assert not config.dataset.packing


def test_rows_come_in_another_order_in_each_phase() -> None:
    phases = [{"name": "a"}, {"name": "b"}, {"name": "c", "dataset": {"seed": 5}}]
    assert [phase.config.dataset.seed for phase in run_of(*phases).phases] == [42, 43, 5]
    assert phase_of({}, dataset={**TOP["dataset"], "seed": None}).dataset.seed is None


def test_prepared_rows_of_one_phase_do_not_overwrite_those_of_another() -> None:
    run = run_of({"name": "a"}, {"name": "b"}, dataset={**TOP["dataset"], "prepared_dataset_path": "prepared"})
    assert [phase.config.dataset.prepared_dataset_path for phase in run.phases] == ["prepared-a", "prepared-b"]


def test_trackers_tell_phases_apart_and_the_hub_gets_the_whole() -> None:
    hub = {"push_to_hub": True, "hub_model_id": "org/s", "hub_private_repo": True}
    assert phase_of({}, training_args=hub).training_args == {"run_name": "kda-second"}
    with pytest.raises(UserError, match=r"^phases\[0\]\.training_args\.hub_model_id: the whole run is uploaded, once"):
        run_of({"name": "a", "training_args": {"hub_model_id": "org/s"}})
    assert phase_of({}, training_args={"run_name": "try"}).training_args == {"run_name": "try-second"}
    assert phase_of({"training_args": {"run_name": "mine"}}, training_args={"run_name": "try"}).training_args == {
        "run_name": "mine"
    }


def test_a_phase_asks_for_flash_attention_where_the_run_does() -> None:
    """A setting that was given and has no effect is refused; a default is not."""
    assert "use_flash_attention" not in phase_of({}).model_fields_set
    assert "use_flash_attention" in phase_of({}, use_flash_attention=True).model_fields_set
    assert not phase_of({}, use_flash_attention=False).use_flash_attention


def test_phases_resume_as_the_run_does() -> None:
    assert phase_of({}, resume=True).resume
    assert not phase_of({}).resume


def test_what_is_written_down_of_a_run_with_phases_is_the_run() -> None:
    run = config_of(
        {"name": "a", "layer_mapping": [[1, 2]], "loss_functions": [{"function": "hs_mse", "weight": 1}]},
        {"name": "b", "tokens": "1.5M", "dataset": {"train_dataset": {"split": "train[:9]"}}, "evaluation": None},
    )
    written = run.model_dump(mode="json")
    assert RunConfig.parse(written) == run
    assert RunConfig.parse(written).model_dump(mode="json") == written
    assert resolve(RunConfig.parse(written)).phases == resolve(run).phases
    assert written["phases"][1]["evaluation"] is None and "loss_functions" not in written["phases"][1]


def test_an_error_that_names_its_phase_is_not_located_again() -> None:
    """A later phase's error, found while an earlier one trains, is not that one's."""
    first, second = resolve(config_of({"name": "a", "frozen_res": ["x"]}, {"name": "b"})).phases
    later = second.located(UserError("frozen_res", "'y' matches no parameter"))
    assert str(first.located(later)) == "frozen_res: 'y' matches no parameter (in phase 'b')"
    assert str(first.located(UserError("frozen_res", "is wrong"))) == "phases[0].frozen_res: is wrong"


HS = [{"function": "hs_cosine", "weight": 1}]
INHERITED = "(in phase 'second')"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sequence_lenght": 1}, "phases[1].sequence_lenght: unknown key; did you mean 'sequence_length'?"),
        (
            {"output_path": "x"},
            "phases[1].output_path: unknown key; known keys: name, tokens, teacher, frozen_modules, frozen_res,",
        ),
        ({"phases": []}, "phases[1].phases: unknown key; "),
        ({"name": "Long Context"}, "phases[1].name: names a folder: letters a-z, digits, _ and - only, got 'Long Cont"),
        ({"name": 2}, "phases[1].name: must be text, got 2 (put it in quotes)"),
        ({"name": "first"}, "phases[1].name: 'first' is phases[0] already; name each once"),
        ({"tokens": "lots"}, "phases[1].tokens: must be a whole number of tokens, such as 300000000, 300M, 1.5B or"),
        (
            {"tokens": 9, "training_args": {"max_steps": 9}},
            "phases[1].tokens: training_args.max_steps is given too; keep one of the two",
        ),
        ({"sequence_length": 0}, "phases[1].sequence_length: must be > 0, got 0"),
        ({"training_args": {"lr": 1}}, "phases[1].training_args.lr: unknown key; did you mean 'learning_rate'?"),
        ({"training_args": {"warmup_ratio": 2}}, "phases[1].training_args.warmup_ratio: must be a share of the steps"),
        ({"training_args": {"packing": 3}}, "phases[1].dataset.packing: must be true or false, got 3"),
        ({"training_args": 3}, "phases[1].training_args: must be a mapping of keys to values, got 3"),
        ({"dataset": None}, "phases[1].dataset: is missing: the training text"),
        ({"dataset": 3}, "phases[1].dataset: must be a mapping of keys to values, got 3"),
        ({"dataset": {"train": 3}}, "phases[1].dataset.train: unknown key; did you mean 'train_dataset'?"),
        ({"dataset": {"eval_dataset": {"split": "a["}}}, "phases[1].dataset.eval_dataset.split: must be a split such"),
        ({"evaluation": {"tokens": 3}}, "phases[1].evaluation.tokens: unknown key; "),
        (
            {"loss_functions": [{"function": "kl", "weight": 1, "temperature": 0}]},
            "phases[1].loss_functions[0].temperature: must be > 0, got 0",
        ),
        (
            {"loss_functions": [{"function": "kl", "weight": -1}], "sequence_length": -1},
            "phases[1].sequence_length: must be > 0, got -1 (and 1 more)",
        ),
        ({"teacher": {"kind": "hf"}}, "phases[1].teacher.path: is missing: the teacher: a folder, a hub id or a .gguf"),
        ({"frozen_res": ["("]}, "phases[1].frozen_res[0]: '(' is not a regular expression: "),
        # what the phase has from the top level does not go together with what it names
        (
            {"loss_functions": HS},
            f"layer_mapping: is missing: loss_functions[0] (hs_cosine) needs all, or pairs {INHERITED}",
        ),
        (
            {"trained_weights": "bfloat16", "training_args": {"bf16": True, "optim": "sgd"}},
            "phases[1].training_args.optim: sgd would lose small updates of trained_weights: bfloat16; use",
        ),
    ],
)
def test_a_mistake_in_a_phase_is_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        run_of({"name": "first"}, {"name": "second", **changes})
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_what_a_phase_inherits_and_cannot_use_is_said_to_be_inherited() -> None:
    with pytest.raises(UserError) as caught:
        run_of(
            {"name": "captured", "teacher": {"kind": "dataset"}},
            model="m",
            student=None,
            loss_functions=HS,
            layer_mapping="all",
        )
    assert str(caught.value) == (
        "loss_functions[0].function: hs_cosine needs a teacher of kind: hf; dataset has no hidden states "
        "(in phase 'captured')"
    )


@pytest.mark.parametrize(
    ("phases", "line"),
    [
        ({"name": "a"}, "phases: must be a list, got a mapping"),
        (["a"], "phases[0]: must be a mapping of keys to values, got 'a'"),
        ([{"tokens": 1}], "phases[0].name: is missing: name of the phase, unique: letters a-z, digits, _ and -"),
    ],
)
def test_phases_are_a_list_of_named_mappings(phases: Any, line: str) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig.parse({**TOP, "phases": phases})
    assert str(caught.value) == line


def test_a_mistake_at_the_top_is_told_of_the_top() -> None:
    with pytest.raises(UserError, match=r"^sequence_length: must be > 0, got 0$"):
        run_of({"name": "a"}, {"name": "b"}, sequence_length=0)


def write(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


def phases_with(tmp_path: Path, *overrides: str) -> list[Phase]:
    path = write(tmp_path / "run.yaml", {**TOP, "phases": [{"name": "alignment", "tokens": "1M"}, {"name": "long"}]})
    return list(load_run(path, overrides).phases)


def test_overrides_reach_a_phase_by_number_and_by_name(tmp_path: Path) -> None:
    alignment, long = phases_with(
        tmp_path, "phases.0.tokens=2M", "phases.long.training_args.learning_rate=1e-5", "phases.long.sequence_length=64"
    )
    assert alignment.config.tokens == 2_000_000
    assert (long.config.training_args["learning_rate"], long.config.sequence_length) == (1e-5, 64)


def test_a_budget_of_the_command_line_takes_the_place_of_the_files(tmp_path: Path) -> None:
    alignment, long = phases_with(tmp_path, "phases.alignment.training_args.max_steps=3", "training_args.max_steps=5")
    assert (alignment.config.tokens, alignment.config.training_args["max_steps"]) == (None, 3)
    assert (long.config.tokens, long.config.training_args["max_steps"]) == (None, 5)
    alignment, long = phases_with(tmp_path, "training_args.max_steps=5", "tokens=20k")
    assert (alignment.config.tokens, long.config.tokens) == (1_000_000, 20_000)
    assert "max_steps" not in long.config.training_args


def test_an_override_of_a_phase_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        phases_with(tmp_path, "phases.alignmnt.tokens=1")
    assert str(caught.value) == (
        "override 'phases.alignmnt.tokens=1': 'alignmnt' must be an index from 0 to 1 of a list, or one of alignment, "
        "long; did you mean 'alignment'?"
    )


def test_files_of_every_phase_must_be_there(tmp_path: Path) -> None:
    here = {"disk_path": str(write(tmp_path / "text.jsonl", {}))}
    top = {
        "dataset": {"train_dataset": here},
        "evaluation": None,
        "output_path": str(tmp_path / "run"),
        "training_args": {},
    }
    check_ready(run_of({"name": "a"}, {"name": "b"}, **top))  # the student of the second is yet to be made

    def refused(changes: dict[str, Any], **other: Any) -> str:
        with pytest.raises(UserError) as caught:
            check_ready(run_of({"name": "a"}, {"name": "b", **changes}, **{**top, **other}))
        return str(caught.value)

    missing = {"train_dataset": {"disk_path": "none"}}
    assert refused({"dataset": missing}) == (
        "phases[1].dataset.train_dataset.disk_path: no such file or folder: 'none'"
    )
    assert refused({"teacher": {"kind": "hf", "path": "./none"}}).startswith("phases[1].teacher.path: no such file")
    assert refused({}, dataset=missing).startswith("dataset.train_dataset.disk_path: no such file")
    assert refused({}, model="./none", student=None).startswith("model: no such file")


def loaded(path: Path, phases: list[dict[str, Any]], *overrides: str) -> RunConfig:
    path.write_text(yaml.safe_dump({**TOP, "phases": phases}))
    return load_run(path, overrides).config


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training_args.max_steps=77", {"tokens": 5}),
        ("tokens=77", {"training_args": {"num_train_epochs": 2}}),
        ("frozen_res=[norm]", {"frozen_res": []}),
        ("loss_functions=[{function: kl, weight: 1}]", {"loss_functions": [{"function": "kl", "weight": 2}]}),
        ("evaluation.num_tokens=9", {"evaluation": None}),
    ],
)
def test_an_override_that_phases_replace_is_refused_or_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, override: str, named: dict[str, Any]
) -> None:
    key = override.partition("=")[0]
    with pytest.raises(UserError) as told:
        loaded(tmp_path / "a.yaml", [{"name": "a", **named}, {"name": "b", **named}], override)
    assert str(told.value) == f"{key}: every phase has its own; use phases.a.{key}"
    loaded(tmp_path / "a.yaml", [{"name": "a", **named}, {"name": "b"}], override)
    assert [record.getMessage() for record in caplog.records] == [
        f"{key}: has no effect on phase a, which has its own; use phases.a.{key}"
    ]


def test_an_override_of_a_section_that_phases_change_in_part_is_taken(tmp_path: Path) -> None:
    phases = [{"name": "a", "dataset": {"eval_dataset": {"split": "test[:9]"}}, "training_args": {"max_steps": 3}}]
    config = loaded(tmp_path / "a.yaml", phases, "dataset.eval_dataset={disk_path: t}", "training_args.weight_decay=0")
    assert config.training_args["weight_decay"] == 0
