import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distillkit.data import collate

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "seq_lengths": [3, 2]},
    {"input_ids": [4, 3], "labels": [-100, -100], "seq_lengths": [1, 1]},
]


def test_positions_restart_at_each_document_and_at_the_padding():
    batch = collate(ROWS, pad_token_id=1, sequence_length=7)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 1], [4, 3, 1, 1, 1, 1, 1]]
    assert batch["targets"].tolist() == [[6, 7, -100, 9, -100, -100, -100], [-100] * 7]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 4]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_batch_is_as_long_as_its_longest_row_by_default():
    assert collate(ROWS, pad_token_id=1)["input_ids"].shape == (2, 5)


def test_a_transformer_sees_each_document_alone():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    batch = collate(ROWS, pad_token_id=1, sequence_length=8)
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        first = model(input_ids=torch.tensor([[5, 6, 7]])).logits
        second = model(input_ids=torch.tensor([[8, 9]])).logits
    torch.testing.assert_close(packed[0, :3], first[0])
    torch.testing.assert_close(packed[0, 3:5], second[0])
