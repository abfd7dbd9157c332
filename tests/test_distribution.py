"""Dense and sparse words of a teacher."""

import torch

from distillkit.distribution import DenseDistribution, SparseDistribution


def logits(tokens=3, vocab=10):
    return torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_top_k_are_the_likeliest_tokens_with_their_share_of_the_whole_vocabulary():
    dense = DenseDistribution(logits())
    sparse = dense.top_k(4)
    expected = dense.logits.log_softmax(-1)
    torch.testing.assert_close(sparse.logprobs, expected.gather(-1, sparse.ids))
    assert torch.equal(sparse.ids, expected.topk(4).indices)
    assert torch.equal(sparse.top_k(2).ids, dense.top_k(2).ids)
    assert dense.top_k(50).ids.shape == (3, 10)


def test_first_columns_of_sparse_and_dense_agree():
    dense = DenseDistribution(logits())
    sparse = SparseDistribution(*vars(dense.top_k(10)).values()).first_columns(7)
    expected = dense.first_columns(7).logits.log_softmax(-1)
    for row in range(3):
        assert sorted(sparse.ids[row][sparse.present[row]].tolist()) == list(range(7))
        torch.testing.assert_close(
            sparse.logprobs[row][sparse.present[row]], expected[row][sparse.ids[row][sparse.present[row]]]
        )


def test_a_row_whose_every_token_lies_outside_says_nothing():
    sparse = SparseDistribution(torch.tensor([[8, 9]]), torch.tensor([[-0.1, -3.0]])).first_columns(5)
    assert not sparse.present.any() and torch.all(sparse.ids < 5)


def test_first_columns_of_a_row_that_a_codec_gave_more_than_all_mass():
    rows = SparseDistribution(
        torch.tensor([[7, 0, 1], [7, 8, 9]]), torch.tensor([[1.1, 0.3, 0.1], [0.9, 0.3, 0.1]]).log()
    )
    first = rows.first_columns(5)
    torch.testing.assert_close(first.logprobs[0].exp(), torch.tensor([0, 0.75, 0.25]))
    assert not first.present[1].any()
