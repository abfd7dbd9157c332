"""Small real models with a tokenizer of bytes, and batches of packed documents for them."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl.chat_template_utils import qwen3_chat_template

from distillkit.data.collate import collate
from distillkit.teacher.live import LiveTeacher
from distillkit.teacher.teacher import DISTRIBUTION, Teacher
from distillkit.training.wiring import signal_request

VOCAB = 97
BYTES = 259


def llama(
    seed: int, layers: int = 2, hidden_size: int = 32, tied: bool = True, dtype=torch.float32, vocab=VOCAB, **options
):
    """A Llama with weights large enough that its distributions differ from one another.

    Of few positions: a conversion looks at attention over as many tokens, which at 2,048 takes seconds.
    """
    torch.manual_seed(seed)
    options.setdefault("max_position_embeddings", 512)
    config = LlamaConfig(
        vocab_size=vocab,
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


def tokenizer():
    """One token per byte."""
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def save_llama(folder, seed, **options):
    """A model folder as a user has it."""
    llama(seed, vocab=BYTES, **options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def save_chat_model(folder, seed, **options):
    """A model folder with the chat template of Qwen3."""
    save_llama(folder, seed, **options)
    own = tokenizer()
    own.chat_template = qwen3_chat_template
    own.save_pretrained(folder)
    return str(folder)


def save_chats(path, conversations=20):
    """Conversations of two questions and answers, in a .jsonl file."""
    turns = [("user", "What is {0} and {0}?"), ("assistant", "It is {1}."), ("user", "And one?"), ("assistant", "{2}.")]
    rows = [
        {"messages": [{"role": role, "content": text.format(n, 2 * n, 2 * n + 1)} for role, text in turns]}
        for n in range(conversations)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def save_text(path, documents=40, words=30):
    """Documents of unequal length, in a .jsonl file."""
    lines = [
        json.dumps({"text": " ".join(f"{(7 * document * word) % 101}" for word in range(3 + document % words))})
        for document in range(documents)
    ]
    path.write_text("\n".join(lines))
    return str(path)


def save_inputs(folder):
    """A teacher, text and held-out text."""
    return {
        "teacher": save_llama(folder / "teacher", 0),
        "text": save_text(folder / "train.jsonl"),
        "held_out": save_text(folder / "valid.jsonl", documents=10),
    }


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


def documents(packed):
    """Batches of one document each, with the labels that the packed row has."""
    start = 0
    for length in packed["seq_lengths"]:
        part = {name: packed[name][start : start + length] for name in ("input_ids", "labels")}
        yield batch({**part, "seq_lengths": [length]})
        start += length


class RequestingTeacher(Teacher):
    """A teacher that gives the same outputs for each batch, without being asked for them."""

    def __init__(self, teacher, request):
        self.teacher, self.request = teacher, request

    @property
    def vocabulary_size(self):
        return self.teacher.vocabulary_size

    def signal(self, batch, request=DISTRIBUTION):
        return self.teacher.signal(batch, self.request)


def teacher_for(objective, model, **options):
    """A live teacher that gives what the objective needs."""
    return RequestingTeacher(LiveTeacher(model), signal_request(objective, **options))
