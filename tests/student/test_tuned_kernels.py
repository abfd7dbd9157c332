"""Configurations of fla's kernels that are shipped: fla would take them, and only where they belong."""

import hashlib
import json
import os

import pytest

from distillkit.student.network.tuned_kernels import FOLDER, TUNED_WITH, allow_tuned_kernels, use_tuned_kernels

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def nobody_has_said_anything(monkeypatch):
    """Both are set first, so that whatever a test leaves in them is taken back."""
    for name in ("FLA_CACHE_MODE", "FLA_CONFIG_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def keys_of(path):
    return [entry["autotune_key"] for entry in json.loads(path.read_text())["autotune_entries"].values()]


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.json")), ids=lambda path: path.stem)
def test_fla_finds_each_configuration_by_the_key_of_its_call(path):
    content = json.loads(path.read_text())
    assert content["kernel_name"] == path.stem
    assert content["autotune_entries"]
    for digest, entry in content["autotune_entries"].items():
        key = json.dumps(entry["autotune_key"], separators=(",", ":"), sort_keys=True)
        assert digest == hashlib.md5(key.encode()).hexdigest()  # fla/ops/utils/cache.py, AutotuneKey.key_hash
        assert set(entry["config"]) == {"kwargs", "num_warps", "num_stages", "num_ctas", "maxnreg", "ir_override"}


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize(("heads", "head_dim"), [(9, 64), (20, 128)], ids=["SmolLM2-135M", "AFM-4.5B"])
def test_every_kernel_knows_the_recipes_models(path, heads, head_dim):
    """By heads, by channels (convolutions), or by the size of a head alone (norms)."""
    size = head_dim if path.stem.startswith("l2norm") else heads * head_dim
    assert any(heads in key[:4] or key[0] == size for key in keys_of(path))


@pytest.mark.parametrize("kernel", ["l2norm_fwd_kernel", "l2norm_bwd_kernel"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_norms_are_known_for_the_tokens_of_any_recipe(kernel, head_dim):
    """They are tuned by the number of 65,536 heads of tokens: 9 in a batch of 32 x 2,048 with nine heads."""
    blocks = {key[1] for key in keys_of(FOLDER / "NVIDIA_H100_80GB_HBM3" / f"{kernel}.json") if key[0] == head_dim}
    assert blocks == {*range(1, 17)}


def test_fla_takes_configurations_of_the_very_key_unless_the_user_says_otherwise(monkeypatch):
    allow_tuned_kernels()
    assert os.environ["FLA_CACHE_MODE"] == "strict"
    monkeypatch.setenv("FLA_CACHE_MODE", "disabled")
    allow_tuned_kernels()
    assert os.environ["FLA_CACHE_MODE"] == "disabled"


@pytest.mark.parametrize("gpu", [H100, "NVIDIA H200"])
def test_the_folder_of_the_gpus_chip_is_named(gpu):
    use_tuned_kernels(gpu, TUNED_WITH)
    assert os.environ["FLA_CONFIG_DIR"] == str(FOLDER / "NVIDIA_H100_80GB_HBM3")


@pytest.mark.parametrize(("gpu", "version"), [("NVIDIA A100-SXM4-80GB", TUNED_WITH), (H100, "0.7.0")])
def test_another_gpu_and_another_version_of_fla_are_tuned_as_ever(gpu, version):
    use_tuned_kernels(gpu, version)
    assert "FLA_CONFIG_DIR" not in os.environ


def test_a_folder_of_the_users_stays(monkeypatch):
    monkeypatch.setenv("FLA_CONFIG_DIR", "mine")
    use_tuned_kernels(H100, TUNED_WITH)
    assert os.environ["FLA_CONFIG_DIR"] == "mine"
