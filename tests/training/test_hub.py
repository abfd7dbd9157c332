"""A finished run goes to the hub once and whole; the hub alone is replaced here."""

import json
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from distillkit.config import UserError
from distillkit.training import hub
from tests.training.test_phases import configuration, run
from tests.training.tiny import save_inputs

HUB = {"push_to_hub": True, "hub_model_id": "org/tiny", "hub_private_repo": True, "hub_strategy": "every_save"}
PHASES = [{"name": "one", "training_args": {"max_steps": 1}}, {"name": "two", "training_args": {"max_steps": 1}}]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def uploads(monkeypatch):
    """What reached the hub: the keywords of each upload, and the files that are asked for."""
    found = []

    class Hub:
        def create_repo(self, name, private=None, exist_ok=False):
            found.append({"repo": name, "private": private})
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, repo_id, folder_path, ignore_patterns, **others):
            from huggingface_hub.utils import filter_repo_objects

            paths = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
            found[-1] |= {"files": set(filter_repo_objects(paths, ignore_patterns=ignore_patterns))}

    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_secret")
    return found


@pytest.mark.parametrize("phases", [PHASES, None])
def test_a_finished_run_is_uploaded_once_with_all_that_was_written(inputs, uploads, tmp_path, phases):
    changes = {} if phases else {"phases": []}
    training = {**HUB, "max_steps": 2, "save_steps": 1}
    said = run(configuration_of(inputs, tmp_path / "run", training, phases, changes))
    assert [(each["repo"], each["private"]) for each in uploads] == [("org/tiny", True)]
    files = uploads[0]["files"]
    assert {"model.safetensors", "config.json", "README.md", "report.html", "results.json", "run.json"} <= files
    assert not [name for name in files if name.startswith(("phases", "untrained", "checkpoint", "."))]
    assert said.endswith("the student is on the hub: org/tiny\n")
    run(configuration_of(inputs, tmp_path / "run", training, phases, {**changes, "resume": True}))
    assert len(uploads) == 1


def configuration_of(inputs, folder, training, phases, changes):
    config = configuration(
        inputs, folder, training, phases, **{key: changes[key] for key in changes if key != "phases"}
    )
    return config if phases else type(config).parse({**config.model_dump(), "phases": []})


def test_a_hub_that_fails_is_one_line_and_resume_tries_again(inputs, uploads, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(hub.HfApi, "upload_folder", failing)
        with pytest.raises(UserError, match=r"^training_args\.push_to_hub: OSError: no route; the student is safe in"):
            run(configuration(inputs, folder, HUB, PHASES))
    saved = load_file(folder / "model.safetensors")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert saved and "pushed" not in json.loads((folder / "run.json").read_text())
    assert "step 1/" not in run(configuration(inputs, folder, HUB, PHASES, resume=True))
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert "files" in uploads[-1]


def failing(*given, **named):
    raise OSError("no route")


def test_without_a_token_nothing_is_begun(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"^training_args\.push_to_hub: there is no token of the hub; set HF_TOKEN"):
        run(configuration(inputs, tmp_path / "run", HUB, PHASES))
    assert not (tmp_path / "run").exists()
