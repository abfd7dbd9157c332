"""A run on conversations learns from exactly what it was told to, and trains exactly what it was told to."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.test_distill import configuration, run
from tests.training.tiny import save_llama, save_text

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TALKS = [
    [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3 4!"}],
    [
        {"role": "user", "content": "7"},
        {"role": "assistant", "content": "!8"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "9 10 11"},
    ],
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    made = {"held_out": save_text(folder / "valid.jsonl", documents=10)}
    for seed, name in enumerate(("teacher", "student")):
        made[name] = save_llama(folder / name, seed)
        tokenizer = AutoTokenizer.from_pretrained(made[name])
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(made[name])
    made["text"] = str(folder / "talks.jsonl")
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS))
    return made


@torch.no_grad()
def expected_cross_entropy(inputs, eos_labels):
    """Of the student on what the assistant says and on the end of its turns, told by hand."""
    model, tokenizer = (kind.from_pretrained(inputs["student"]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    losses = []
    for talk in TALKS:
        ids, counted = [], []
        for turn in talk:
            pieces = [
                (f"{turn['role'][0]}:", False),
                (f"{turn['content']}</s>", turn["role"] == "assistant"),
                ("\n", False),
            ]
            for text, counts in pieces:
                tokens = tokenizer(text, add_special_tokens=False).input_ids
                ids, counted = ids + tokens, counted + [counts] * len(tokens)
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        labels = [tokenizer.eos_token_id if token in eos_labels else token for token in ids]
        losses += [-float(logprobs[t - 1, labels[t]]) for t in range(1, len(ids)) if counted[t]]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("ends", ["", "!"])
def test_what_the_assistant_says_is_learnt_and_a_frozen_module_is_not_trained(inputs, tmp_path, ends):
    eos_labels = AutoTokenizer.from_pretrained(inputs["student"]).convert_tokens_to_ids(list(ends))
    dataset = {"train_dataset": {"disk_path": inputs["text"]}, "eval_dataset": {"disk_path": inputs["held_out"]}}
    changes = {
        "dataset": {**dataset, "assistant_only_loss": True, "eos_label_token_ids": eos_labels},
        "loss_functions": [{"function": "cross_entropy", "weight": 1.0}],
        "frozen_modules": ["model.layers.0.mlp", "model.layers.1"],
        "frozen_res": [],
        "sequence_length": 128,
    }
    training = {"max_steps": 2, "gradient_accumulation_steps": 1, "logging_steps": 1, "save_strategy": "no"}
    run(configuration(inputs, tmp_path / "run", training, **changes))
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["cross_entropy"] == pytest.approx(expected_cross_entropy(inputs, eos_labels), rel=1e-4)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (inputs["student"], tmp_path / "run"))
    for name, parameter in after.named_parameters():
        frozen = ".layers.1." in name or ".layers.0.mlp." in name
        assert torch.equal(parameter, before.get_parameter(name)) == frozen, name
