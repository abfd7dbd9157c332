"""Small models and runs of them to plan for."""

import json
from pathlib import Path

from transformers import ArceeConfig, LlamaConfig

from distillkit.config import RunConfig

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}
FAMILIES = {"llama": LlamaConfig, "arcee": ArceeConfig}
DISTRIBUTION = [{"function": "cross_entropy", "weight": 0.5}, {"function": "kl", "weight": 0.5}]
HIDDEN = [*DISTRIBUTION, {"function": "hs_cosine", "weight": 1.0}]
ATTENTION = [{"function": "attn_mse", "weight": 1.0}]
FROZEN = ["embed_tokens", "lm_head", r"norm\.weight", r"\.mlp\."]


def teacher_config(family="llama", **changes):
    return FAMILIES[family](**{**SHAPE, **changes})


def teacher_folder(folder, family="llama", **changes):
    """A folder with a config.json and nothing else."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    config = teacher_config(family, **changes)
    config.architectures = [f"{family.title()}ForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    return str(folder)


def text_file(folder, characters=40_000):
    path = Path(folder) / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": "x" * 88}) for _ in range(characters // 100)))
    return str(path)


def run(teacher="a/teacher", text="text.jsonl", losses=DISTRIBUTION, arguments=None, **keys):
    """A run of the student that the teacher becomes."""
    data = {
        "output_path": "runs/never",
        "teacher": {"kind": "hf", "path": teacher, "kwargs": {"dtype": "bfloat16"}},
        "student": {"full_attention_layers": [1]},
        "sequence_length": 256,
        "dataset": {"train_dataset": {"disk_path": text}, "eval_dataset": {"disk_path": f"{text}.held-out"}},
        "loss_functions": losses,
        "layer_mapping": "all",
        "evaluation": {"num_tokens": 512},
        "training_args": {"per_device_train_batch_size": 2, "max_steps": 10, "bf16": True, **(arguments or {})},
    }
    return RunConfig.parse({**data, **keys})
