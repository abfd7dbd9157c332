"""A real run, small as it is, ends with its report and its card; an evaluation of it joins them."""

import json
import shutil

import pytest
import yaml
from rich.console import Console

from distillkit.cli import main
from distillkit.config import RunConfig
from distillkit.reporting import write_run_report
from distillkit.training import distill
from tests.training.tiny import save_llama, save_text


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run with phases, from conversion to card, and its output."""
    folder = tmp_path_factory.mktemp("run")
    config = {
        "project_name": "tiny",
        "student": {"layout": "hybrid"},
        "teacher": {"kind": "hf", "path": save_llama(folder / "teacher", 0, layers=4)},
        "output_path": str(folder / "student"),
        "sequence_length": 64,
        "dataset": {
            "train_dataset": {"disk_path": save_text(folder / "train.jsonl")},
            "eval_dataset": {"disk_path": save_text(folder / "valid.jsonl", documents=20)},
        },
        "loss_functions": [{"function": "kl", "weight": 1.0}],
        "evaluation": {"num_tokens": 200, "prompts": ["12 24"], "max_new_tokens": 4},
        "training_args": {"learning_rate": 1e-3, "logging_steps": 1, "use_cpu": True},
        "phases": [
            {
                "name": "alignment",
                "training_args": {"max_steps": 3},
                "loss_functions": [{"function": "attn_mse", "weight": 1.0}],
            },
            {"name": "distillation", "training_args": {"max_steps": 4}},
        ],
    }
    console = Console(record=True, width=200)
    distill(RunConfig.parse(config), console)
    return folder, console.export_text()


def test_a_finished_run_has_its_report_and_card_and_prints_their_paths(finished):
    folder, printed = finished
    student = folder / "student"
    results = json.loads((student / "results.json").read_text())
    assert f"report: {student / 'report.html'} and report.md; model card: {student / 'README.md'}" in printed
    markdown, card = (student / "report.md").read_text(), (student / "README.md").read_text()
    kl = {when: results["divergence"][when]["kl"] for when in ("before", "after")}
    line = f"| KL(teacher‖student), nats per token | {kl['before']:.4f} | {kl['after']:.4f} |"
    assert line in markdown
    assert line in card
    assert f"| alignment | {results['phases'][0]['tokens']:,} | 3 |" in markdown
    assert "1 attn\\_mse" in card
    assert "full attention in layers 3, without positions (NoPE)" in card
    assert str(folder) not in card
    assert yaml.safe_load(card.split("---\n")[1])["tags"][2:] == ["kimi-delta-attention", "linear-attention"]
    named = {path.name for path in (student / "pictures").iterdir()}
    assert {"curve-loss.svg", "curve-kl.svg", "curve-attn-mse.svg"} <= named


def test_the_report_is_written_last_for_a_resumed_run_looks_for_it(finished, tmp_path, monkeypatch):
    copy = shutil.copytree(finished[0] / "student", tmp_path / "copy")
    for name in ("README.md", "report.html"):
        (copy / name).unlink()

    def killed(report):
        raise KeyboardInterrupt

    monkeypatch.setattr("distillkit.reporting.report.html", killed)
    with pytest.raises(KeyboardInterrupt):
        write_run_report(copy)
    assert (copy / "README.md").exists() and not (copy / "report.html").exists()


def test_an_evaluation_joins_report_and_card(finished, capsys):
    folder, _ = finished
    evaluation = {
        "output_path": str(folder / "evaluation"),
        "teacher": {"path": str(folder / "teacher")},
        "students": {"tiny": {"path": str(folder / "student")}},
        "divergence": {"dataset": {"disk_path": str(folder / "valid.jsonl")}, "num_tokens": 200, "sequence_length": 64},
        "speed": {"contexts": [16, 32], "decode_tokens": 2, "repeats": 1},
    }
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(evaluation))
    assert main(["evaluate", str(folder / "evaluation.yaml")]) == 0
    assert main(["report", str(folder / "evaluation"), str(folder / "student"), "--out", str(folder / "report")]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        str(folder / "report/report.html"),
        str(folder / "student/README.md"),
    ]
    results = json.loads((folder / "evaluation/results.json").read_text())
    measured = results["divergence"]["tiny"]
    line = f"| KL(teacher‖student), nats per token | 0.0000 | {measured['kl']:.4f}"
    assert line in (folder / "report/report.md").read_text()
    assert line in (folder / "student/README.md").read_text()
    markdown = (folder / "report/report.md").read_text()
    for title in ("Teacher and students", "Divergence", "Speed and memory", "Training"):
        assert f"## {title}\n" in markdown
    assert f"distillkit evaluate {folder / 'evaluation'}" in markdown


def test_report_of_nothing_is_a_line(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err == f"error: RESULTS: no such file or folder: {str(tmp_path / 'nothing')!r}\n"
