"""Small benchmarks in both shapes: the JSON-lines files that `benchmarks.data` reads, and the hub's datasets."""

import gzip
import json
import random
from typing import Any

from datasets import Dataset, DatasetDict

Rows = list[dict[str, Any]]

ITEMS, EXAMPLES = 4, 5
WORDS = ["a", "stone", "river", "light", "under", "seven", "doors", "Paris", "walks", "green", "maybe", "iron"]


def write_files(folder, subjects):
    """All tasks' files; returns the same as the hub's datasets, by their path and configuration."""
    draw = random.Random(0)

    def words(count):
        return " ".join(draw.choices(WORDS, k=count))

    def options(count=4):
        return [f"{words(2)} {index}" for index in range(count)]

    def write(name, rows):
        opened = gzip.open if name.startswith("hellaswag") else open
        with opened(folder / f"{name}.jsonl{'.gz' if opened is gzip.open else ''}", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    hub: dict[tuple[str, str | None], DatasetDict] = {}

    def both(path, configuration, splits, make):
        """splits: the hub's, by the name of a file."""
        made = {
            file: [make() for _ in range(EXAMPLES if split == "train" else ITEMS)] for file, split in splits.items()
        }
        for file, pairs in made.items():
            write(file, [ours for ours, _ in pairs])
        hub[path, configuration] = DatasetDict(
            {split: Dataset.from_list([theirs for _, theirs in made[file]]) for file, split in splits.items()}
        )

    def question(subject):
        row = {"question": words(5) + " ?", "choices": options(), "answer": draw.randrange(4), "subject": subject}
        return {**row, "error_type": "ok"}

    tests = {subject: [question(subject)] for subject in subjects}
    shown = {subject: [question(subject) for _ in range(2)] for subject in subjects}
    write("mmlu_redux_test", [row for rows in tests.values() for row in rows])
    write("mmlu_dev", [row for rows in shown.values() for row in rows])
    for subject in subjects:
        splits = {"test": Dataset.from_list(tests[subject]), "dev": Dataset.from_list(shown[subject])}
        hub["cais/mmlu", subject] = DatasetDict(splits)

    def arc():
        choices = {"text": options(), "label": ["A", "B", "C", "D"]}
        row = {"question": words(5), "choices": choices, "answerKey": draw.choice("ABCD")}
        return row, row

    def hellaswag():
        context, row = words(6), {"activity_label": words(2), "endings": options(), "label": draw.choice("0123")}
        return {**row, "ctx": f"{context}. Then"}, {**row, "ctx_a": f"{context}.", "ctx_b": "then"}

    def gsm8k():
        row = {"question": words(5), "answer": f"{words(4)}\n#### {draw.randrange(99)}"}
        return row, row

    def lambada():
        row = {"text": words(8)}
        return row, row

    def piqa():
        goal, choices, gold = words(4), options(2), draw.randrange(2)
        theirs = {"goal": goal, "sol1": choices[0], "sol2": choices[1], "label": gold}
        return {"query": f"Question: {goal}\n", "choices": choices, "gold": gold}, theirs

    def winogrande():
        before, after, choices, gold = words(4), words(3), options(2), draw.randrange(2)
        theirs = {"sentence": f"{before} _ {after}", "option1": choices[0], "option2": choices[1]}
        ours = {"context_options": [f"{before} {choice}" for choice in choices], "continuation": after, "gold": gold}
        return ours, {**theirs, "answer": str(gold + 1)}

    def openbookqa():
        query, choices, gold = words(5), options(), draw.randrange(4)
        theirs = {"question_stem": query, "choices": {"text": choices, "label": ["A", "B", "C", "D"]}}
        return {"query": query, "choices": choices, "gold": gold}, {**theirs, "answerKey": "ABCD"[gold]}

    challenge = {"arc_challenge_test": "test", "arc_challenge_train": "train"}
    both("allenai/ai2_arc", "ARC-Challenge", challenge, arc)
    both("allenai/ai2_arc", "ARC-Easy", {"arc_easy_test": "test", "arc_easy_train": "train"}, arc)
    splits = {"hellaswag_validation": "validation", "hellaswag_train": "train"}
    both("Rowan/hellaswag", None, splits, hellaswag)
    both("openai/gsm8k", "main", {"gsm8k_test": "test", "gsm8k_train": "train"}, gsm8k)
    both("EleutherAI/lambada_openai", "default", {"lambada_openai_test": "test"}, lambada)
    both("baber/piqa", None, {"piqa": "validation", "piqa_train": "train"}, piqa)
    both("allenai/winogrande", "winogrande_xl", {"winogrande": "validation", "winogrande_train": "train"}, winogrande)
    both("allenai/openbookqa", "main", {"openbook_qa": "test", "openbook_qa_train": "train"}, openbookqa)
    return hub
