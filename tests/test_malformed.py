"""Some 400 malformed files and command lines: each is answered in one line, with exit code 2, before torch is imported.

They are made from files that are right but for a model that does not exist. What the JSON schema refuses is refused
with the name of the key.
"""

import copy
import json
import random
import subprocess
import sys

import jsonschema
import pytest
import yaml

from distillkit.config.schema import json_schema

NONE = "/no/such/model"
TEXT = {"disk_path": "/no/such/text.jsonl", "split": "train"}
FILES = {
    "run": {
        "teacher": {"kind": "hf", "path": NONE, "kwargs": {"dtype": "bfloat16"}, "top_k": 8},
        "project_name": "a",
        "student": {"layout": "hybrid", "kv_heads": "expand", "seed": 0, "initialization": {"memory": "spread"}},
        "output_path": "out",
        "sequence_length": 64,
        "frozen_res": ["norm"],
        "loss_functions": [{"function": "kl", "weight": 0.5, "temperature": 2.0}, {"function": "hs_mse", "weight": 1}],
        "layer_mapping": [[0, 0], [1, 2]],
        "tokens": "1k",
        "training_args": {"learning_rate": 1e-3, "bf16": True, "save_steps": 5, "optim": "adamw_torch", "seed": 1},
        "evaluation": {"num_tokens": 64, "prompts": ["a"], "temperature": 0.5, "top_p": 0.9},
        "phases": [{"name": "a", "tokens": 10, "training_args": {"warmup_steps": 1}}, {"name": "b"}],
        "dataset": {"train_dataset": TEXT, "eval_dataset": TEXT, "seed": 1, "packing": True, "num_samples": 4},
    },
    "capture": {
        "teacher": {"path": NONE},
        "engine": "transformers",
        "sequence_length": 64,
        "compression": {
            "logprob_compressor": {
                "d": 99,
                "k": 8,
                "exact_k": 4,
                "polynomial_terms": [0, "sqrt"],
                "residual_bins": [{"scale_dtype": "float16", "element_bits": 4, "num_elements": 2}],
            }
        },
        "output_path": "out",
        "rows_per_shard": 4,
        "dataset": {"train_dataset": TEXT, "eos_label_token_ids": [1]},
    },
    "evaluate": {
        "teacher": {"path": NONE, "kwargs": {"revision": "a"}, "trained_length": 8},
        "output_path": "out",
        "limit": 2,
        "divergence": {"dataset": TEXT, "num_tokens": 8, "position_buckets": [0, 8], "layers": True},
        "benchmarks": {"tasks": ["arc"], "include_path": ["a"], "num_fewshot": 1, "batch_size": 2},
        "needles": {"tasks": ["niah_single_1"], "lengths": [64, 128], "haystack": TEXT, "seed": 1},
        "long_context": {"dataset": {**TEXT}, "length": 64, "position_buckets": [0, 8], "distances": [0]},
        "speed": {"contexts": [8, 16], "repeats": 1},
        "students": {"a": {"path": NONE}, "b": {"path": NONE}},
    },
    "synthesize": {
        "tokenizer": {"path": NONE, "revision": "a"},
        "output_path": "out",
        "num_proc": 1,
        "repeated_passages": {"share": 0.5, "entries": True},
        "questions_about_facts": {"share": 0.25},
        "document_length": 64,
        "max_file_mib": 1.5,
        "dataset": TEXT,
    },
}
COMMANDS = {"run": ["distill", "plan"], "capture": ["capture", "plan"], "evaluate": ["evaluate"]}
WRONG = [
    -1,
    0,
    1.5,
    -1e400,
    1e400,
    "",
    "x",
    "\N{SNOWMAN}" * 99,
    True,
    [],
    [[]],
    {},
    {"a": 1},
    [None],
    [{"a": []}],
    "1e9",
]
LINES = [
    "convert",
    "convert /no/such/model",
    "convert /no/such/model out",
    "convert /no/such/model out more",
    "convert ./none out --layout all",
    "convert ./none out --layout kda_only --full-attention-layers 1",
    "convert ./none out --full-attention-layers 1,1",
    "convert ./none out --full-attention-layers 1.5",
    "convert ./none out --full-attention-layers=",
    "convert ./none out --full-attention-layers=99999999999999999999,-1",
    "convert ./none out --seed -1",
    "convert ./none out --seed 1e3",
    "convert ./none out --kv-heads none",
    "convert ./none.gguf out",
    "convert ./none out --gguf-file",
    "convert ./none out --keep-rope=1",
    "convert '' out",
    "pack",
    "pack /no/such/data out",
    "pack /no/such/data out --sequence-length 8",
    "pack /no/such/data out --sequence-length 0",
    "pack /no/such/data out --sequence-length x",
    "pack /no/such/data out --sequence-length 8 --split train[",
    "pack ./none out --sequence-length 8 --split ''",
    "inspect",
    "inspect none",
    "inspect null.json",
    "inspect . --tokens -1",
    "inspect . --tokens x",
    "inspect . --teacher ./none",
    "inspect . --teacher /no/such/model --verify",
    "inspect . --unknown",
    "report",
    "report none",
    "report .",
    "report null.json",
    "report list.json",
    "report cut.json",
    "report binary.json",
    "report empty.json",
    "report other.json",
    "report format.json",
    "report models.json",
    "report --out",
    "schema all",
    "schema run capture",
    "evaluate",
    "evaluate none.yaml",
    "evaluate --student s",
    "evaluate --student = --out out --suite speed",
    "evaluate --student ./none --suite speed --out out",
    "evaluate --student a=./none --student a=./other --suite speed --out out",
    "evaluate --student teacher=./none --suite speed --out out",
    "evaluate --student ./none --suite all --out out",
    "evaluate --student ./none --suite speed --out out --limit -1",
    "evaluate --student ./none --suite speed --out null.json",
    "evaluate --student ./none --suite speed --data text --out out",
    "evaluate --student ./none --suite needles --out out",
    "evaluate --student ./none --suite divergence --data text --out out",
    "evaluate --teacher ./none --student ./none --suite divergence --out out",
    "evaluate --teacher ./none --gguf-file x --suite speed --out out speed.contexts=[2,1]",
    "evaluate --student ./none --suite speed --out out speed=1 speed.contexts=1",
    "synthesize",
    "synthesize none.yaml",
    "synthesize a",
    "synthesize tokenizer=x",
    "synthesize tokenizer.path=./none dataset.disk_path=./none",
    "synthesize tokenizer.path=./none dataset.disk_path=./none output_path=.",
    "capture",
    "capture none.yaml",
    "capture null.json",
    "capture .",
    "distill",
    "distill .",
    "none.yaml",
    "binary.yaml",
    "empty.yaml",
    "list.yaml",
    "run.yaml --resume=1",
    "run.yaml --resume --dry-ru",
    "run.yaml capture.yaml",
    "run.yaml =",
    "run.yaml a",
    "run.yaml a=",
    "run.yaml .a=1",
    "run.yaml loss_functions.2.weight=1",
    "run.yaml loss_functions.\N{SUPERSCRIPT TWO}.weight=1",
    "run.yaml loss_functions.kl.weight=1",
    "run.yaml loss_functions=[ sequence_length=1",
    "run.yaml sequence_length.a=1",
    "run.yaml phases.c.tokens=1",
    "run.yaml tokens=1 training_args.max_steps=0.5",
    "capture.yaml",
    "evaluate run.yaml",
    "evaluate capture.yaml",
    "capture run.yaml",
    "capture evaluate.yaml",
    "synthesize run.yaml",
    "plan evaluate.yaml",
    "plan synthesize.yaml",
    "plan run.yaml --gpus 0",
    "plan run.yaml --gpus x",
    "plan run.yaml sequence_length=0 --json",
    "plan none.yaml",
    "plan",
    "nothing",
    "--nothing",
    "run.yaml --version=1",
]
DRIVER = """
import contextlib, io, json, sys
from distillkit.cli import main
answers = []
for words in json.load(open("lines.json")):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    answers.append([code, out.getvalue(), err.getvalue(), "torch" in sys.modules])
    sys.modules.pop("torch", None)
json.dump(answers, open("answers.json", "w"))
"""


def places(value, path=()):
    """The path of every value in a file."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


def changed(data, path, change):
    """A copy in which `change` has been done to the section that holds the last key of the path."""
    data = copy.deepcopy(data)
    section = data
    for key in path[:-1]:
        section = section[key]
    change(section, path[-1])
    return data


def mutations(data, choice):
    """One change of the content at each of its places, and as many of the text."""
    for path in places(data):
        value = choice.choice(WRONG)
        yield changed(data, path, lambda section, key, value=value: section.__setitem__(key, value)), path
    for path in choice.sample(list(places(data)), 8):
        yield changed(data, path, lambda section, key: section.__delitem__(key)), None
    for path in [path for path in places(data) if isinstance(path[-1], str)][::3]:
        yield changed(data, path, lambda section, key: section.update({key + "s": section.pop(key)})), None
    text = yaml.safe_dump(data, sort_keys=False)
    for _ in range(10):
        at = choice.randrange(len(text))
        yield text[:at], None
        yield text[:at] + choice.choice("[]{}:,&*!|>'\"%@`\t-?#\0\x1b") + text[at:], None


def cases(folder):
    """Command lines, each with the key that its answer must name, or None."""
    choice = random.Random(17)
    for kind, data in FILES.items():
        validator = jsonschema.Draft202012Validator(json_schema(kind))
        for number, (content, path) in enumerate(mutations(data, choice)):
            refused = not isinstance(content, str) and not validator.is_valid(json.loads(json.dumps(content)))
            command = choice.choice(COMMANDS.get(kind, [kind])) if refused else COMMANDS.get(kind, [kind])[0]
            name = f"{kind}-{number}.yaml"
            text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
            (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
            key = next((str(part) for part in path or () if isinstance(part, str)), None)
            yield [command, name], key if refused else None
    for line in LINES:
        yield [word.strip("'") for word in line.split(" ")], None


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed")
    for kind, data in FILES.items():
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    for name, content in {
        "null.json": b"null",
        "list.json": b"[1]",
        "cut.json": b'{"kind": "distillkit-eva',
        "binary.json": b"\xff\xfe\0",
        "empty.json": b"",
        "other.json": b'{"a": 1}',
        "format.json": b'{"kind": "distillkit-evaluation", "format": 99}',
        "models.json": b'{"kind": "distillkit-evaluation", "format": 1, "models": [1]}',
        "binary.yaml": b"\xff\xfe\0",
        "empty.yaml": b"",
        "list.yaml": b"- 1",
    }.items():
        (folder / name).write_bytes(content)
    given = list(cases(folder))
    (folder / "lines.json").write_text(json.dumps([words for words, _ in given]))
    subprocess.run([sys.executable, "-c", DRIVER], cwd=folder, check=True, timeout=300)
    answered = json.loads((folder / "answers.json").read_text())
    assert not (folder / "out").exists()
    return [(words, key, *answer) for (words, key), answer in zip(given, answered, strict=True)]


def test_there_are_many(answers):
    assert len(answers) > 300
    assert sum(key is not None for _, key, *_ in answers) > 100


def test_each_is_answered_in_one_line(answers):
    wrong = [
        (" ".join(words), code, err[-300:])
        for words, _, code, _, err, _ in answers
        if code != 2 or not err.startswith("error: ") or err.count("\n") != 1 or not err[:-1].isprintable()
    ]
    assert wrong == []


def test_nothing_else_is_printed_and_torch_is_not_imported(answers):
    assert [" ".join(words) for words, _, _, out, _, torch in answers if out or torch] == []


def test_what_the_schema_refuses_is_named(answers):
    assert [(words, key, err) for words, key, _, _, err, _ in answers if key is not None and key not in err] == []
