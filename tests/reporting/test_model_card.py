"""The card beside a student's weights: what the hub reads, what people read, and what stays private."""

import json
import re
import shlex

import pytest
import yaml
from huggingface_hub import ModelCard
from trl.chat_template_utils import qwen3_chat_template

from distillkit.config import UserError
from distillkit.reporting import write_cards, write_model_card, write_report, write_run_report
from distillkit.reporting.model_card import OURS
from tests.reporting.examples import (
    HYBRID,
    evaluation,
    metrics,
    results,
    run_config,
    write_evaluation,
    write_phases,
    write_run,
)
from tests.training.tiny import save_llama, tokenizer

CONFIG = {
    "model_type": "kda_hybrid",
    "layer_types": HYBRID,
    "use_rope": False,
    "kv_heads": "expand",
    "conv_size": 4,
    "auto_map": {"AutoModelForCausalLM": "modeling.KDAHybridForCausalLM"},
}


def finished(folder, **changes):
    """The folder of a finished run with a student in it."""
    write_run(folder, results(**changes), metrics())
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def card_of(folder):
    path = write_model_card(folder)
    assert path == folder / "README.md"
    return path.read_text()


def front_matter(card):
    return yaml.safe_load(re.match("---\n(.*?)\n---\n", card, re.DOTALL)[1])


def test_front_matter_is_what_the_hub_reads(tmp_path):
    teacher = {"kind": "hf", "path": "HuggingFaceTB/SmolLM2-135M-Instruct", "kwargs": {}}
    data = {"train_dataset": {"repo_id": "someone/text"}}
    card = card_of(finished(tmp_path / "run", config=run_config(teacher=teacher, dataset=data)))
    assert front_matter(card) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "datasets": ["someone/text"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "distillkit", "kimi-delta-attention", "linear-attention"],
    }
    assert ModelCard(card).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_no_path_of_the_machine(tmp_path):
    folder = finished(tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record["command"] = "distillkit /srv/someone/recipes/run.yaml output_path=/srv/someone/runs/one --resume"
    (folder / "run.json").write_text(json.dumps(record))
    card = card_of(folder)
    assert "someone" not in card
    assert str(tmp_path) not in card
    assert "base_model" not in front_matter(card)  # a name of this machine would be another model of the hub
    assert (
        "SmolLM2-135M-Instruct with Kimi Delta Attention in place of softmax attention in 23 of the 30 layers" in card
    )
    assert "distillkit run.yaml output\\_path=one --resume" in card
    assert "Text: train.parquet" in card


def test_no_path_inside_of_a_word_of_the_command(tmp_path):
    folder = finished(tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    words = [
        "distillkit",
        "~/recipes/run.yaml",
        "dataset.train_dataset={disk_path: /srv/alice/private/t.parquet, split: train}",
        'phases=["/srv/alice/a b/one.yaml",~alice/two.yaml]',
        "output_path=/srv/alice/runs/",
        "teacher.endpoint=https://host/v1/models",
        "model=someone/model",
    ]
    record["command"] = shlex.join(words)
    (folder / "run.json").write_text(json.dumps(record))
    command = re.search(r"^\| command \| (.*) \|$", card_of(folder), re.MULTILINE)[1]
    assert shlex.split(re.sub(r"\\(.)", r"\1", command)) == [
        "distillkit",
        "run.yaml",
        "dataset.train_dataset={disk_path: t.parquet, split: train}",
        'phases=["one.yaml",two.yaml]',
        "output_path=runs/",
        "teacher.endpoint=https://host/v1/models",
        "model=someone/model",
    ]


def test_licence_is_that_of_the_teachers_card(tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Teacher\n")
    config = run_config(teacher={"kind": "hf", "path": str(teacher), "kwargs": {}})
    assert front_matter(card_of(finished(tmp_path / "run", config=config)))["license"] == "apache-2.0"


def test_layers_losses_results_and_limits(tmp_path):
    card = card_of(finished(tmp_path / "run"))
    assert (
        "layers 0-2, 4-6, 8-10, 12-14, 16-18, 20-22, 24-26, 28-29: its own keys and values for each query head" in card
    )
    assert "full attention in layers 3, 7, 11, 15, 19, 23, 27, without positions (NoPE)" in card
    assert "| KL(teacher‖student), nats per token | 3.5695 | 0.6336 | −2.9359 |" in card
    assert "| training | 1,966,080 | 60 |" in card
    assert "0.001 | 0.5 kl + 0.5 hs\\_cosine |" in card
    assert "Trained on rows of at most 2,048 tokens" in card
    assert "is another in 38.1% of places (KL 0.6336 nats per token)" in card
    assert "Not measured: tasks (benchmarks) and recall over long texts." in card
    assert "import distillkit" in card


def test_a_student_that_was_not_converted_is_not_about_linear_attention(tmp_path):
    assert "For research on linear attention and distillation." in card_of(finished(tmp_path / "hybrid"))
    folder = finished(tmp_path / "run")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "For research on distillation." in card_of(folder)


def test_a_divergence_over_stored_tokens_has_a_name_of_its_own(tmp_path):
    """A captured teacher's KL is less than that of the whole distributions, and its teacher took no time."""
    captured = run_config(teacher={"kind": "dataset"}, model="student", student=None)
    for config, is_live in ((run_config(), True), (captured, False)):
        folder = finished(tmp_path / str(is_live), config=config)
        card, report = card_of(folder), write_report([folder], folder).with_suffix(".md").read_text()
        for text in (card, report):
            assert ("| KL(teacher‖student), nats per token |" in text) == is_live
            assert ("| KL over stored tokens (≤ KL(teacher‖student)), nats" in text) != is_live
        assert ("(KL 0.6336 nats per token over the teacher's stored tokens)" in card) != is_live
        assert ("0.6336 (stored tokens) |" in card) != is_live
        assert ("to 0.6336 nats per token over the teacher's stored tokens" in report) != is_live
        assert ("tokens/s, teacher included" in report) == is_live


def test_rows_of_several_lengths_are_said(tmp_path):
    folder = write_phases(tmp_path / "run")
    assert "Rows differ in length between phases" in write_report([folder], folder).with_suffix(".md").read_text()


@pytest.mark.parametrize("chat_template", [None, qwen3_chat_template], ids=["text", "chat"])
def test_the_snippet_works_as_pasted(tmp_path, monkeypatch, capsys, chat_template):
    folder = finished(tmp_path / "run")
    save_llama(folder, 0)
    words = tokenizer()
    words.chat_template = chat_template
    words.save_pretrained(folder)
    snippet = re.search("```python\n(.*?)```", card_of(folder), re.DOTALL)[1]
    assert ("apply_chat_template" in snippet) == (chat_template is not None)
    monkeypatch.chdir(folder)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_phases(tmp_path):
    folder = write_phases(tmp_path / "run")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    card = card_of(folder)
    assert "| alignment | 983,040 | 30 |" in card
    assert "| distillation | 1,966,080 | 60 |" in card
    assert "distilled from it on 2,949,120 tokens" in card


def test_a_persons_own_card_is_left_alone(tmp_path):
    folder = finished(tmp_path / "run")
    card = card_of(folder)
    (folder / "README.md").write_text(card.replace(OURS, "My own words."))
    assert write_model_card(folder) is None
    assert "My own words." in (folder / "README.md").read_text()
    assert "README.md was left as it is" in write_run_report(folder)


def test_evaluations_of_the_student_come_into_its_card(tmp_path):
    folder = finished(tmp_path / "run")
    content = evaluation(students=("mine", "other"))
    content["models"]["mine"]["path"] = str(folder)
    assert write_cards([folder, write_evaluation(tmp_path / "evaluation", content)]) == [folder / "README.md"]
    card = (folder / "README.md").read_text()
    assert "|  | SmolLM2-135M (teacher) | mine |" in card
    assert "hellaswag (acc\\_norm) | 40.9% ± 0.5 | 39.1% ± 0.5 (−1.8 worse) |" in card
    assert "Not measured" not in card


def test_a_report_of_the_run_alone_keeps_the_evaluation_in_its_card(tmp_path, monkeypatch):
    folder = finished(tmp_path / "runs/one")
    content = evaluation(students=("mine",))
    content["models"]["mine"]["path"] = "runs/one"  # as it was named above the folder of the results
    evaluated = write_evaluation(tmp_path / "runs/evaluation", content)
    assert write_cards([folder]) == [folder / "README.md"]
    assert write_cards([folder, evaluated]) == [folder / "README.md"]
    card = (folder / "README.md").read_text()
    assert "hellaswag" in card
    other = write_evaluation(tmp_path / "other", evaluation(students=("another",)))
    assert write_cards([folder]) == []
    assert write_cards([folder, other]) == []
    assert (folder / "README.md").read_text() == card


def test_a_folder_of_an_evaluation_gets_no_card(tmp_path):
    with pytest.raises(UserError, match="holds an evaluation, not a run"):
        write_model_card(write_evaluation(tmp_path / "evaluation"))


def test_a_finished_run_is_not_failed_by_its_report(tmp_path):
    folder = finished(tmp_path / "run")
    (folder / "pictures").write_text("a file where the folder should be")
    assert write_run_report(folder).startswith("no report was written: FileExistsError")
    with pytest.raises(UserError):
        write_model_card(tmp_path)
