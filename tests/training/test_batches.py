"""Every batch of a run has one shape, and a pass reads each row once, however many rows and processes there are."""

import collections
import itertools
import json

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler

from distillkit.data.signals import TensorRows
from distillkit.training.batches import Collator, WholeBatches
from distillkit.training.trainer import DistillationTrainer
from tests.training.test_distill import configuration, inputs, run  # noqa: F401
from tests.training.test_trainer import CE_KL, assert_same, gradients, make_trainer
from tests.training.tiny import row


def loaders(rows, batch_size, processes):
    """Of all processes, as Trainer makes them; and with whole batches."""
    for whole in (False, True):
        made = [
            prepare_data_loader(
                DataLoader(range(rows), batch_size=batch_size, sampler=RandomSampler(range(rows)), collate_fn=list),
                num_processes=processes,
                process_index=process,
                put_on_device=False,
                use_seedable_sampler=True,
                data_seed=1,
            )
            for process in range(processes)
        ]
        for loader in made if whole else ():
            loader.set_sampler(WholeBatches(loader.get_sampler(), loader.total_batch_size))
        yield made


@pytest.mark.parametrize(
    ("rows", "batch_size", "processes"), [(23, 4, 1), (24, 4, 1), (23, 4, 3), (25, 2, 3), (5, 4, 3)]
)
def test_a_pass_reads_each_row_once_in_the_order_that_it_had(rows, batch_size, processes):
    theirs, ours = loaders(rows, batch_size, processes)
    for epoch in range(3):
        for loader in (*theirs, *ours):
            loader.set_epoch(epoch)
        before, after = ([list(loader.batch_sampler) for loader in made] for made in (theirs, ours))
        assert {len(each) for each in after} == {len(before[0])} == {len(ours[0])}
        assert {len(batch) for process in after for batch in process} == {batch_size}
        read = collections.Counter(index for process in after for batch in process for index in batch)
        assert [read[index] for index in range(rows)] == [1] * rows
        assert read.total() - read[rows] == rows  # the others are the empty one
        whole_steps = rows // (batch_size * processes)
        assert [each[:whole_steps] for each in after] == [each[:whole_steps] for each in before]
        resumed = [skip_first_batches(loader, 1) for loader in ours]
        for loader in resumed:
            loader.set_epoch(epoch)
        assert [list(loader.batch_sampler) for loader in resumed] == [process[1:] for process in after]


def test_an_empty_row_has_no_tokens_and_no_signals():
    rows = TensorRows(Dataset.from_list([row([3, 2], seed=1), row([4], seed=2)]))
    batch = Collator(7, sequence_length=6)(rows.__getitems__([1, 2, 2]))
    assert batch["lengths"].tolist() == [4, 0, 0]
    assert batch["input_ids"].shape == (3, 6)
    assert batch["input_ids"][1].tolist() == [7] * 6
    assert batch["targets"][1:].eq(-100).all()
    assert batch["position_ids"][1].tolist() == list(range(6))
    (empty,) = rows.__getitems__([2])
    assert [len(each) for each in empty.values()] == [0] * 3


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length", "batch_rebalance"])
@pytest.mark.parametrize("count", [3, 4])
def test_samplers_that_look_at_the_rows_see_no_empty_one(strategy, count, tmp_path):
    rows = [row([3 + index, 5], seed=index) for index in range(count)]
    trainer = make_trainer(
        tmp_path,
        rows,
        losses=CE_KL,
        sequence_length=12,
        per_device_train_batch_size=2,
        train_sampling_strategy=strategy,
    )
    assert len(list(trainer.train_dataset)) == count
    batches = [batch["lengths"].tolist() for batch in trainer.get_train_dataloader()]
    assert sorted(filter(None, itertools.chain(*batches))) == [8 + index for index in range(count)]
    assert len(batches) == 2 and all(map(any, batches))


def test_empty_rows_change_no_gradient_and_a_micro_batch_of_nothing_else_has_one(tmp_path):
    rows = [row([7, 5], seed=1), row([12], seed=2), row([3, 9], seed=3)]
    shape = {"losses": CE_KL, "sequence_length": 12}
    alone = gradients(make_trainer(tmp_path, rows, per_device_train_batch_size=3, **shape))
    for size, accumulated in ((4, 1), (2, 2), (1, 4)):
        filled = make_trainer(
            tmp_path, rows, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, **shape
        )
        assert_same(gradients(filled), alone, 1e-5)
    nothing = filled.data_collator([{"input_ids": [], "labels": [], "seq_lengths": []}])
    filled.model.zero_grad()
    filled.training_step(filled.model, nothing, torch.tensor(35))
    assert {float(each.grad.abs().max()) for each in filled.model.parameters() if each.requires_grad} == {0.0}


def test_all_batches_of_several_passes_have_one_shape(inputs, tmp_path, monkeypatch):  # noqa: F811
    shapes, lengths, loss_of = [], [], DistillationTrainer.compute_loss

    def noted(self, model, batch, *given, **options):
        shapes.append({name: tuple(batch[name].shape) for name in ("input_ids", "targets", "position_ids")})
        lengths.append(batch["lengths"].tolist())
        return loss_of(self, model, batch, *given, **options)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", noted)
    training = {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 4, "save_steps": 100}
    run(configuration(inputs, tmp_path / "run", training, evaluation=None))
    assert shapes == [dict.fromkeys(shapes[0], (4, 64))] * len(shapes)
    schedule = json.loads((tmp_path / "run/run.json").read_text())["schedule"]
    assert schedule["tokens"] == sum(map(sum, lengths))
    assert schedule["times"] == 3
    of_pass = len(lengths) // 3
    first, second, third = (
        sorted(itertools.chain(*lengths[part * of_pass : (part + 1) * of_pass])) for part in range(3)
    )
    assert first == second == third
    assert first[0] == 0  # there was an empty row
