"""A model that knows answers but has lost their format is distinguished from one that does not know them."""

import json
import random
from string import ascii_uppercase

import pytest
import torch
from datasets import Dataset

from distillkit.config.errors import UserError
from distillkit.config.evaluate import GenerationSuiteConfig
from distillkit.evaluation import evaluate
from distillkit.evaluation.choices import Question, measure_choices, parse_letter, read_questions
from distillkit.models.special_tokens import encode_texts

from ..training.tiny import BYTES, llama
from ..training.tiny import tokenizer as byte_tokenizer

WRONG = ("no", "pi", "ox")
"""Options; right is always `yes`, wherever it stands."""


def options(rng):
    mixed = ["yes", *WRONG]
    rng.shuffle(mixed)
    return mixed


def prose(rng):
    return " ".join(rng.choice(["one", "two", "six", "ten"]) for _ in range(12)) + "."


@pytest.fixture(scope="module")
def teacher():
    """A Llama that has learnt in seconds to answer in both forms, and some text."""
    model, rng = (
        llama(0, vocab=BYTES, hidden_size=64, tied=False, max_position_embeddings=1024).train(),
        random.Random(0),
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08, generator=torch.Generator().manual_seed(parameter.numel()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(120):
        texts = [prose(rng), prose(rng), Question("q", options(rng), 0).without_options() + " yes\n\n"]
        for _ in range(12):
            question = Question("q", mixed := options(rng), mixed.index("yes"))
            texts.append(f"{question.with_letters()} {ascii_uppercase[question.answer]}\n\n")
        rows = [torch.tensor(ids) for ids in encode_texts(byte_tokenizer(), texts)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def broken(teacher, how):
    """The teacher with other rows for the letters in its head."""
    model = llama(0, vocab=BYTES, hidden_size=64, tied=False, max_position_embeddings=1024)
    model.load_state_dict(teacher.state_dict())
    letters = byte_tokenizer().convert_tokens_to_ids(["A", "B", "C", "D"])
    weight = model.lm_head.weight.data
    weight[letters] = weight[letters].roll(1, 0) if how == "exchanged" else -weight[letters]
    return model


def save_questions(path, count=20):
    rng = random.Random(1)
    rows = [{"question": "q", "choices": (mixed := options(rng)), "answer": mixed.index("yes")} for _ in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return {"disk_path": str(path)}


def test_a_lost_format_is_exposed_though_the_divergence_is_small(teacher, tmp_path):
    rng = random.Random(2)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": prose(rng)}) for _ in range(40)))
    models = {"teacher": teacher, **{how: broken(teacher, how) for how in ("exchanged", "unlikely")}}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    text = {"disk_path": str(tmp_path / "text.jsonl")}
    results = evaluate(
        {
            "output_path": str(tmp_path / "out"),
            "teacher": {"path": str(tmp_path / "teacher")},
            "students": {name: {"path": str(tmp_path / name)} for name in models if name != "teacher"},
            "divergence": {"dataset": text, "num_tokens": 1000, "sequence_length": 64},
            "generation": {
                "dataset": text,
                "prompt_tokens": 8,
                "new_tokens": 16,
                "samples": 8,
                "questions": save_questions(tmp_path / "questions.jsonl"),
                "num_fewshot": 0,
            },
        }
    )
    assert results["failures"] == []
    found = {name: each["choices"] for name, each in results["generation"].items()}
    assert found["teacher"]["questions"] == 20 and found["teacher"]["chance"] == 0.25
    names = ("letter_accuracy", "generated_accuracy", "cloze_accuracy", "same_answer", "unparsed")
    assert [found["teacher"][name] for name in names] == [1, 1, 1, 1, 0]
    assert [found["exchanged"][name] for name in names] == [0, 0, 1, 1, 0]
    assert found["unlikely"]["letter_accuracy"] == 0 and found["unlikely"]["unparsed"] == 1
    assert found["unlikely"]["cloze_accuracy"] == 1
    for name in ("exchanged", "unlikely"):
        assert results["divergence"][name]["kl"] < 0.02
        assert results["generation"][name]["continuations"]["agreement"] == 1


def test_one_who_guesses_changes_answers_with_their_order(tmp_path):
    """Always the same letter: never the same answer."""
    model = llama(0, vocab=BYTES, max_position_embeddings=1024)
    model.get_input_embeddings().weight.data[byte_tokenizer().convert_tokens_to_ids("B")] *= 0
    model.config.tie_word_embeddings = False
    model.lm_head = torch.nn.Linear(32, BYTES)
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.zeros_(model.lm_head.bias)
    model.lm_head.bias.data[byte_tokenizer().convert_tokens_to_ids("B")] = 5
    found = measure_choices(model, byte_tokenizer(), settings(tmp_path))
    assert found["same_answer"] == 0 and found["unparsed"] == 1  # it writes BBBBBBBB
    assert found["letter_accuracy"] < 0.5


def settings(tmp_path, **changes):
    questions = save_questions(tmp_path / "q.jsonl", 10)
    keys = {"dataset": {"disk_path": "x"}, "questions": questions, "num_fewshot": 2}
    return GenerationSuiteConfig.parse({**keys, **changes})


@torch.no_grad()
def test_answers_are_those_of_plain_forwards(tmp_path):
    """One question at a time; batches of any size give the same."""
    model, tokenizer = llama(3, vocab=BYTES, max_position_embeddings=1024).double(), byte_tokenizer()
    asked = settings(tmp_path)
    questions = read_questions(asked)
    rng = random.Random(asked.seed)
    rng.shuffle(questions)
    places = [rng.randrange(1, 4) for _ in questions[2:]]
    letters = cloze = ""
    for index, example in enumerate(questions[:2]):
        wrong = [each for each in example.options if each != "yes"]
        shown = example.rotated(index - example.answer)
        assert shown.options[index] == "yes" and set(shown.options) == {"yes", *wrong}
        letters += f"{shown.with_letters()} {'AB'[index]}\n\n"
        cloze += "Question: q\nAnswer: yes\n\n"

    def total(before, after):
        ids = encode_texts(tokenizer, [before + after])
        logits = model(torch.tensor(ids)).logits[0].log_softmax(-1)
        return sum(logits[i - 1, ids[0][i]].item() for i in range(len(ids[0]) - len(after), len(ids[0])))

    right, right_cloze, same = [], [], []
    for question, place in zip(questions[2:], places, strict=True):
        turned = [question.options[(index - place) % 4] for index in range(4)]
        answers = []
        for each in (question.options, turned):
            lines = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", each, strict=True))
            prompt = f"{letters}Question: q\n{lines}Answer:"
            answers.append(each[max(range(4), key=lambda index: total(prompt, " " + "ABCD"[index]))])
        right += [answer == "yes" for answer in answers]
        same.append(answers[0] == answers[1])
        prompt = f"{cloze}Question: q\nAnswer:"
        best = max(question.options, key=lambda option: total(prompt, " " + option) / len(option))
        right_cloze.append(best == "yes")
    expected = [sum(each) / len(each) for each in (right, right_cloze, same)]
    for size in (1, 5):
        found = measure_choices(model, tokenizer, asked.model_copy(update={"batch_size": size}))
        names = ("letter_accuracy", "cloze_accuracy", "same_answer")
        assert [found[name] for name in names] == pytest.approx(expected)
    assert measure_choices(model, tokenizer, asked, limit=4)["questions"] == 4


@pytest.mark.parametrize(
    ("text", "index"),
    [
        *[("B", 1), (" (B) because", 1), ("**C**", 2), (" A\n\nQuestion", 0), ("B. Iron", 1), ("D, of course", 3)],
        *[("", None), ("Iron", None), (" A planet", None), ("F", None), ("b", None), ("The answer is B", None)],
    ],
)
def test_what_is_a_letter(text, index):
    assert parse_letter(text, "ABCD") == index


def test_rotation_gives_every_option_another_letter():
    question = Question("q", ["a", "b", "c"], 2)
    assert question.rotated(1) == Question("q", ["c", "a", "b"], 0)
    assert question.rotated(3) == question.rotated(-3) == question


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "choices": ["a", "b", "c"], "answer": 1},
        {"question": "q", "choices": ["a", "b", "c"], "answer": "B"},
        {"question": "q", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": "B"},
        {"question": "q", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"},
    ],
)
def test_forms_of_questions(row, tmp_path):
    Dataset.from_list([row] * 2).to_json(tmp_path / "rows.jsonl")
    asked = settings(tmp_path, questions={"disk_path": str(tmp_path / "rows.jsonl")}, num_fewshot=0)
    assert read_questions(asked) == [Question("q", ["a", "b", "c"], 1)] * 2


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"question": "q", "options": ["a", "b"], "answer": 1}, "generation.questions: has no column choices; needed"),
        ({"question": "q", "choices": ["a", "b"]}, "generation.questions: has no column answer; needed"),
        (
            {"question": "q", "choices": ["a"], "answer": 0},
            "generation.questions: row 0 has no list of 2 to 26 choices",
        ),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "generation.questions: the answer of row 0 is none of"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "generation.questions: the answer of row 0 is none"),
        ({"question": "q", "choices": ["a", "b"], "answer": 0}, "generation.num_fewshot: must be less than the number"),
    ],
)
def test_rows_that_are_no_questions(row, line, tmp_path):
    Dataset.from_list([row]).to_json(tmp_path / "rows.jsonl")
    with pytest.raises(UserError) as caught:
        read_questions(settings(tmp_path, questions={"disk_path": str(tmp_path / "rows.jsonl")}, num_fewshot=1))
    assert str(caught.value).startswith(line)
