"""The arguments in the data file are those of the installed transformers; others are looked up there."""

import json
from importlib.metadata import version

import pytest
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from distillkit.config import transformers_arguments
from distillkit.config.errors import KeyProblem
from distillkit.config.training_args import RENAMED, SET_BY_THE_RUN, check_training_args
from distillkit.config.transformers_arguments import Argument, installed_arguments, known_arguments

of_another_version = json.loads(transformers_arguments.FILE.read_text())["transformers"] != version("transformers")
of_the_installed = pytest.mark.skipif(of_another_version, reason="the file is that of another transformers")


@of_the_installed
def test_the_file_is_that_of_the_installed_transformers():
    assert known_arguments() == installed_arguments(), "run scripts/update_training_args.py"


@of_the_installed
def test_names_are_those_of_transformers():
    assert set(known_arguments()) == {
        field.name for field in TrainingArguments.__dataclass_fields__.values() if field.init
    }
    assert set(RENAMED.values()) <= set(known_arguments())
    assert set(SET_BY_THE_RUN) - set(known_arguments()) == {"max_length", "max_seq_length"}


def test_choices_are_those_of_transformers():
    assert known_arguments()["optim"].choices == tuple(each.value for each in OptimizerNames)
    assert known_arguments()["lr_scheduler_type"].choices == tuple(each.value for each in SchedulerType)


def test_an_argument_of_another_version_is_looked_up_in_it(monkeypatch: pytest.MonkeyPatch):
    content = json.loads(transformers_arguments.FILE.read_text()) | {"transformers": version("transformers")}
    monkeypatch.setattr(transformers_arguments, "_content", lambda: content)
    newer = {**installed_arguments(), "learning_rates": Argument(("list",))}
    monkeypatch.setattr(transformers_arguments, "installed_arguments", lambda: newer)
    with pytest.raises(KeyProblem, match="unknown key; did you mean 'learning_rate'"):
        check_training_args({"learning_rates": [1]})

    monkeypatch.setattr(transformers_arguments, "_content", lambda: content | {"transformers": "5.0"})
    assert check_training_args({"learning_rates": [1]}) == {"learning_rates": [1]}
    with pytest.raises(KeyProblem, match="must be a list, got 1"):
        check_training_args({"learning_rates": 1})
    with pytest.raises(KeyProblem, match="unknown key; did you mean 'learning_rate'"):
        check_training_args({"lerning_rate": 1})


def test_a_run_of_no_steps_is_refused():
    with pytest.raises(KeyProblem, match="max_steps: must be > 0, or -1 to train for num_train_epochs"):
        check_training_args({"max_steps": 0})
    assert check_training_args({"max_steps": -1}) == {"max_steps": -1}
