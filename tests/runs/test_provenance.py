"""The command that result files keep: to be typed again, and without secrets."""

import shlex
import subprocess
import sys
from pathlib import Path

from distillkit.runs.provenance import command, commit


def test_secrets_are_not_kept(monkeypatch):
    words = ["run.yaml", "training_args.hub_token=hf_abc", "teacher={api_key: sk-1, model: m}", "num_tokens=200"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/distillkit", *words])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    kept = ["distillkit", "run.yaml", "training_args.hub_token=***", "teacher={api_key: '***', model: m}", words[-1]]
    assert shlex.split(command()) == kept


def test_torchrun_is_part_of_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/distillkit/__main__.py", "run.yaml"])
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert command() == "torchrun --nproc-per-node=8 -m distillkit run.yaml"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert command() == "torchrun --nnodes=2 --nproc-per-node=4 -m distillkit run.yaml"


def test_the_commit_is_that_of_the_clone():
    root = Path(__file__).parents[2]
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert commit() in ((head, f"{head} with changes") if (root / ".git").exists() and head else (None,))
