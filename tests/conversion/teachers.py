"""Small teachers of several families, with random weights."""

import torch
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

FAMILIES = {
    "llama": LlamaConfig,
    "arcee": ArceeConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 3,
    "max_position_embeddings": 512,  # a conversion looks at attention over as many tokens, which takes seconds at 2,048
}


def teacher_of(family: str, **changes) -> PreTrainedModel:
    """A teacher whose biases and norms are not the trivial ones of a new model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**{**SHAPE, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def token_ids(batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(300, (batch, length), generator=torch.Generator().manual_seed(1))
