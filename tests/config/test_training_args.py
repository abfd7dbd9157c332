"""The names read from transformers' source are those that transformers has."""

import dataclasses

from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from distillkit.config.training_args import RENAMED, SET_BY_THE_RUN, trainer_choices, trainer_fields


def test_names_are_those_of_transformers() -> None:
    assert set(trainer_fields()) == {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert set(RENAMED.values()) <= set(trainer_fields())
    assert set(SET_BY_THE_RUN) - set(trainer_fields()) == {"max_length", "max_seq_length"}


def test_choices_are_those_of_transformers() -> None:
    assert trainer_choices()["OptimizerNames"] == tuple(each.value for each in OptimizerNames)
    assert trainer_choices()["SchedulerType"] == tuple(each.value for each in SchedulerType)
