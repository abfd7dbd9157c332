"""A teacher on disk is known by what it holds, not by its name."""

import pytest

from distillkit.models.loading import weights_sha256


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "a.safetensors", "b.safetensors", "c.gguf", "README.md"):
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "kwargs", "counts"),
    [
        ("config.json", {}, True),
        ("a.safetensors", {}, True),
        ("b.safetensors", {}, True),
        ("README.md", {}, False),
        ("c.gguf", {}, False),
        ("c.gguf", {"gguf_file": "c.gguf"}, True),
        ("a.safetensors", {"gguf_file": "c.gguf"}, False),
    ],
)
def test_what_counts(folder, changed, kwargs, counts):
    before = weights_sha256(str(folder), kwargs)
    assert before == weights_sha256(str(folder), kwargs)
    (folder / changed).write_text("another")
    assert (weights_sha256(str(folder), kwargs) != before) == counts


def test_a_file_by_itself_and_a_hub_id(folder):
    file = folder / "c.gguf"
    assert weights_sha256(str(file), {}) == weights_sha256(str(folder), {"gguf_file": "c.gguf"})
    assert weights_sha256("someone/a-model", {"revision": "main"}) is None
