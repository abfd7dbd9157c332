"""Configurations of fla's kernels that are shipped: fla would take them, and only where they belong."""

import hashlib
import json
import os

import pytest

from distillkit.model.tuned_kernels import FOLDER, TUNED_WITH, use_tuned_kernels

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def nobody_has_named_a_folder(monkeypatch):
    monkeypatch.setenv("FLA_CONFIG_DIR", "")
    monkeypatch.delenv("FLA_CONFIG_DIR")


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.json")), ids=lambda path: path.stem)
def test_fla_finds_each_configuration_by_the_key_of_its_call(path):
    content = json.loads(path.read_text())
    assert content["kernel_name"] == path.stem
    assert content["autotune_entries"]
    for digest, entry in content["autotune_entries"].items():
        key = json.dumps(entry["autotune_key"], separators=(",", ":"), sort_keys=True)
        assert digest == hashlib.md5(key.encode()).hexdigest()  # fla/ops/utils/cache.py, AutotuneKey.key_hash
        assert set(entry["config"]) == {"kwargs", "num_warps", "num_stages", "num_ctas", "maxnreg", "ir_override"}


@pytest.mark.parametrize(("heads", "head_dim"), [(9, 64), (20, 128)], ids=["SmolLM2-135M", "AFM-4.5B"])
def test_forward_and_backward_pass_of_the_recipes_models_are_known(heads, head_dim):
    for kernel in ("chunk_kda_fwd_kernel_inter_solve_fused", "chunk_kda_bwd_kernel_dAv"):
        entries = json.loads((FOLDER / "NVIDIA_H100_80GB_HBM3" / f"{kernel}.json").read_text())["autotune_entries"]
        assert any(entry["autotune_key"][:3] == [heads, heads, head_dim] for entry in entries.values())


def test_the_gpus_own_folder_is_named():
    use_tuned_kernels(H100, TUNED_WITH)
    assert os.environ["FLA_CONFIG_DIR"] == str(FOLDER / "NVIDIA_H100_80GB_HBM3")


@pytest.mark.parametrize(("gpu", "version"), [("NVIDIA A100-SXM4-80GB", TUNED_WITH), (H100, "0.7.0")])
def test_another_gpu_and_another_version_of_fla_are_tuned_as_ever(gpu, version):
    use_tuned_kernels(gpu, version)
    assert "FLA_CONFIG_DIR" not in os.environ


def test_a_folder_of_the_users_stays(monkeypatch):
    monkeypatch.setenv("FLA_CONFIG_DIR", "mine")
    use_tuned_kernels(H100, TUNED_WITH)
    assert os.environ["FLA_CONFIG_DIR"] == "mine"
