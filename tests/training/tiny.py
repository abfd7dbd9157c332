"""Small real models, and batches of packed documents for them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from distillkit.data.collate import collate

VOCAB = 97


def llama(seed: int, layers: int = 2, hidden_size: int = 32, tied: bool = True, dtype=torch.float32, **options):
    """A Llama with weights large enough that its distributions differ from one another."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    model: PreTrainedModel = LlamaForCausalLM(config).to(dtype)
    return model.eval()


def row(lengths, seed=0, ignored=0):
    """A row of documents of the given lengths; `ignored` tokens after each first one do not count either."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (sum(lengths),), generator=generator).tolist()
    labels, start = list(input_ids), 0
    for length in lengths:
        labels[start : start + 1 + ignored] = [-100] * min(length, 1 + ignored)
        start += length
    return {"input_ids": input_ids, "labels": labels, "seq_lengths": list(lengths)}


def batch(*rows, sequence_length=None):
    return collate(rows, pad_token_id=0, sequence_length=sequence_length)
