"""Small students of every teacher family, with random weights."""

import torch
from transformers import ArceeConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from distillkit.student.network import KDAHybridConfig, KDAHybridForCausalLM, KimiDeltaAttention

FAMILIES = {
    "llama": LlamaConfig,
    "arcee": ArceeConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
KDA, FULL = "linear_attention", "full_attention"
LAYOUTS = {
    "hybrid": [KDA, KDA, KDA, FULL],
    "front_loaded": [FULL, KDA, KDA, KDA],
    "kda_only": [KDA, KDA, KDA, KDA],
}
VOCABULARY = 128


def base_config(family="llama", **changes):
    shape = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return FAMILIES[family](**{**shape, **changes})


def student(family="llama", layout="hybrid", seed=0, config_changes=None, **options):
    """A student in evaluation mode whose gates differ from token to token; `layout` is a name, or a list of layers."""
    torch.manual_seed(seed)
    layers = LAYOUTS[layout] if isinstance(layout, str) else layout
    base = base_config(family, **{"num_hidden_layers": len(layers), **(config_changes or {})})
    config = KDAHybridConfig(base, layers, **options)
    model = KDAHybridForCausalLM(config).eval()
    for module in model.modules():
        if isinstance(module, KimiDeltaAttention):
            for parameter in (module.dt_bias, module.A_log, module.f_proj[1].weight, module.b_proj.weight):
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def tokens(batch, length, seed=0):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
