"""Killed by SIGKILL and resumed, a run from a captured dataset ends in the weights of the run that was not killed."""

from safetensors.torch import load_file

from tests.training.captures import COMPRESSED, captured, configuration, run
from tests.training.test_resume import killed_when, logged
from tests.training.tiny import save_llama, save_text

TRAINING = {
    "optim": "adamw_torch", "learning_rate": 5e-3, "max_steps": 16, "save_steps": 3, "per_device_train_batch_size": 2,
    "lr_scheduler_type": "cosine",
}  # fmt: skip


def test_a_run_from_a_captured_dataset_resumes(tmp_path):
    teacher, text = save_llama(tmp_path / "teacher", 0), save_text(tmp_path / "train.jsonl")
    student = save_llama(tmp_path / "student", 1, attention_dropout=0.1)
    data = captured(teacher, text, tmp_path / "data", COMPRESSED)

    def described(folder, **changes):
        return configuration(student, data, tmp_path / folder, training=TRAINING, evaluation=None, **changes)

    run(described("undisturbed"))
    killed_when(described("killed"), logged(tmp_path / "killed", 7))
    assert "resuming after step" in run(described("killed", resume=True))
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("killed", "undisturbed"))
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= 1e-6, name
