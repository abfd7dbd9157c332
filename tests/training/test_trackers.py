"""What trackers and `metrics.jsonl` hold of a run: a run of its own for each phase."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.test_phases import configuration, inputs, run  # noqa: F401


def test_tensorboard_holds_losses_and_tokens_of_each_phase(inputs, tmp_path):  # noqa: F811
    phases = [{"name": "one"}, {"name": "two", "training_args": {"max_steps": 2}}]
    run(configuration(inputs, tmp_path / "run", {"report_to": "tensorboard"}, phases=phases, evaluation=None))
    for name, steps in (("1-one", 4), ("2-two", 2)):
        folder = tmp_path / "run" / "phases" / name
        (events,) = folder.rglob("events.out.tfevents.*")
        told = EventAccumulator(str(events))
        told.Reload()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        for tag in ("loss", "kl", "tokens"):
            values = {event.step: event.value for event in told.Scalars(f"train/{tag}")}
            assert values.keys() == {line["step"] for line in lines}
            assert all(abs(values[line["step"]] - line[tag]) <= 1e-5 * abs(line[tag]) for line in lines)
        arguments = json.loads(told.Tensors("args/text_summary")[0].tensor_proto.string_val[0])
        assert arguments["run_name"] == f"tiny-{name[2:]}"
