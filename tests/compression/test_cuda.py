import pytest
import torch

from distillkit.compression import build_codec
from distillkit.distribution import SparseDistribution
from tests.compression import golden


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("name", golden.CONFIGURATIONS)
def test_cuda_reads_and_writes_as_the_cpu_does(name, tf32):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32  # not by monkeypatch: the attribute cannot be deleted
    try:
        compare(name)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def compare(name):
    tensors, columns = golden.load(name)
    codec = build_codec(golden.CONFIGURATIONS[name]["kind"], golden.CONFIGURATIONS[name]["config"])
    decoded = codec.decode({key: each.cuda() for key, each in columns.items()})
    assert torch.equal(decoded.ids.cpu(), tensors["decoded_ids"].long())
    # Sums along delta encoded rows are taken in another order.
    atol = 1e-5 if golden.CONFIGURATIONS[name]["config"].get("delta_encoding") else 0
    torch.testing.assert_close(decoded.logprobs.cpu(), codec.decode(columns).logprobs, atol=atol, rtol=0)

    given_rows = SparseDistribution(tensors["ids"], tensors["logprobs"])
    stored = codec.encode(given_rows)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        on_gpu = codec.encode(SparseDistribution(tensors["ids"].cuda(), tensors["logprobs"].cuda()))
    ids = codec.columns[0]
    assert torch.equal(on_gpu[ids].cpu(), stored[ids])
    # Coefficients may differ in the last place, and then a residual may be rounded the other way.
    there, here = codec.decode(on_gpu).logprobs.cpu(), codec.decode(stored).logprobs
    off = (there - here).abs()
    assert off.gt(1e-3).float().mean() < 1e-3
    assert (
        (there - tensors["logprobs"]).square().mean().sqrt() / (here - tensors["logprobs"]).square().mean().sqrt()
    ) < 1.01
