"""Two processes take the step that one takes with all their rows, whatever is minimised and however rows fall.

All cases run in the same two processes.
"""

import json
import os
from dataclasses import dataclass, field, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from distillkit.config import LossConfig
from distillkit.losses import ATTENTION_LOSSES, DISTRIBUTION_LOSSES, HIDDEN_STATE_LOSSES
from distillkit.losses.functions import RANKING_LOSSES
from distillkit.teacher import Teacher, TeacherSignal
from tests.forks import environments, exit_codes, started
from tests.shared import made_once
from tests.training.test_trainer import ALL_KINDS, UNEVEN, assert_same, gradients, make_trainer
from tests.training.tiny import VOCAB, row

# The first process gets rows 0 and 2, the second rows 1 and 3, padded to the longest of each micro-batch alone.
NOTHING_COUNTS_FOR_ONE = [row([9, 2], seed=5), row([6], seed=6, ignored=5), row([13], seed=7), row([1, 1, 1], seed=8)]
ROWS = {"uneven": UNEVEN, "nothing counts for one": NOTHING_COUNTS_FOR_ONE}


@dataclass(frozen=True)
class Case:
    losses: list[LossConfig]
    top_k: int | None = None
    teacher_layers: int = 2
    rows: str = "uneven"
    checkpointing: bool = False
    options: dict[str, object] = field(default_factory=dict)


def loss(function, **options):
    return LossConfig(function=function, weight=1.0, **options)


def cases():
    divergences = [function for function in DISTRIBUTION_LOSSES if function not in RANKING_LOSSES]
    tempered = {"missing_probability_handling": "symmetric_uniform", "temperature": 2.0}
    made = {}
    for name, top_k in (("dense", None), ("top 7", 7)):
        made[f"divergences, {name}"] = Case([loss(function) for function in divergences], top_k)
        for function in RANKING_LOSSES:
            made[f"{function}, {name}"] = Case([loss(function)], top_k)
    made["divergences, symmetric_uniform"] = Case(
        [loss(function, **tempered) for function in divergences if function != "cross_entropy"], top_k=7
    )
    made["kl, background"] = Case([loss("kl", missing_probability_handling="background")], top_k=7)
    made["hinge with a margin"] = Case([loss("hinge", margin=0.1)], top_k=7)
    for function in HIDDEN_STATE_LOSSES:
        made[f"{function}, all layers"] = Case([loss(function)], options={"ddp_find_unused_parameters": True})
    for function in ATTENTION_LOSSES:
        made[function] = Case([loss(function)])
        made[f"{function} beside logits"] = Case([loss(function), loss("kl")], rows="nothing counts for one")
    made["attn_mse beside hidden states"] = Case(
        [loss("attn_mse"), loss("hs_cosine")], options={"ddp_find_unused_parameters": True}
    )
    made["hs_mse, projected pairs"] = Case([loss("cross_entropy"), loss("hs_mse")], teacher_layers=4)
    made["all kinds"] = Case(ALL_KINDS)
    made["all kinds, checkpointed"] = Case(ALL_KINDS, checkpointing=True)
    made["all kinds, top 7, projected pairs"] = Case(ALL_KINDS, top_k=7, teacher_layers=4)
    made["all kinds, nothing counts for one"] = Case(
        ALL_KINDS, top_k=7, teacher_layers=4, rows="nothing counts for one"
    )
    return made


class WithBackground(Teacher):
    """A teacher with a word about all other tokens."""

    vocabulary_size = VOCAB

    def __init__(self, teacher):
        self.teacher = teacher
        self.background = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)).log_softmax(-1)

    def signal(self, batch, request):
        signal = self.teacher.signal(batch, request)

        def distribution(rows):
            chunks = signal.distribution(rows)
            return lambda chunk: replace(chunks(chunk), background=self.background)

        return TeacherSignal(distribution, signal.hidden_states)


def step(folder, case, **training):
    """The gradients of one step, at a rate that lifts them above the rounding of the weights, and what is logged."""
    trainer = make_trainer(
        folder,
        rows=ROWS[case.rows],
        losses=case.losses,
        teacher_layers=case.teacher_layers,
        checkpointing=case.checkpointing,
        learning_rate=64.0,
        **case.options,
        **training,
    )
    trainer.request = replace(trainer.request, top_k=case.top_k)
    if any(loss.missing_probability_handling == "background" for loss in case.losses):
        trainer.teacher = WithBackground(trainer.teacher)
    return gradients(trainer), trainer.state.log_history[0]


def steps(environment, folder):
    """Those of all cases, by one of two processes."""
    os.environ |= environment
    for name, case in cases().items():
        found, line = step(folder / name, case, per_device_train_batch_size=1, gradient_accumulation_steps=2)
        if os.environ["RANK"] == "0":
            save_file(found, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(line))


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """The gradients of each case, from two processes."""

    def make(folder):
        assert exit_codes(started(steps, [(each, folder) for each in environments()]), 150) == [0, 0]

    return made_once(tmp_path_factory, "gradients of two", make)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", cases())
def test_two_processes_give_the_gradients_of_one(name, of_two, tmp_path):
    case = cases()[name]
    expected, logged = step(tmp_path, case)
    assert_same(load_file(of_two / f"{name}.safetensors"), expected, 1e-5)
    logged_by_two = json.loads((of_two / f"{name}.json").read_text())
    for key in {"loss", "tokens", *(loss.function for loss in case.losses)}:
        assert logged_by_two[key] == pytest.approx(logged[key], rel=1e-5), key


def test_the_rows_are_uneven():
    for rows in ROWS.values():
        counted = [sum(label != -100 for label in each["labels"]) for each in rows]
        assert counted[0] + counted[2] != counted[1] + counted[3]
        assert len({len(each["input_ids"]) for each in rows}) > 1
    assert counted[1] + counted[3] == 0
