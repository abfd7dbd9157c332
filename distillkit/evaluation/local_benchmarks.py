"""Public benchmarks as JSON-lines files of a folder, for machines that reach no hub.

A row of a file becomes a document with the columns of the hub's dataset, which lm-eval's own task reads. Where a file
is not what is on the hub, its notes say so.
"""

import gzip
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distillkit.config.errors import UserError, reading, reason

KEY = "benchmarks.data"

Document = dict[str, Any]
Choice = Annotated[int, Field(ge=0, le=3)]
Four = Annotated[list[str], Field(min_length=4, max_length=4)]
Two = Annotated[list[str], Field(min_length=2, max_length=2)]


class Row(BaseModel):
    """A line of a file; other columns than those named are not read."""

    model_config = ConfigDict(strict=True)
    note: ClassVar[str] = ""
    """What makes these documents others than the hub's, whatever the file."""

    def document(self) -> Document:
        """The columns of the hub's dataset."""
        return self.model_dump()


class ReduxRow(Row):
    """Of MMLU-Redux, one file for all subjects."""

    note = "MMLU-Redux, a part of MMLU: with MMLU's own answers, and with questions that Redux found faulty"
    subject: str
    question: str
    choices: Four
    answer: Choice


class ArcChoices(BaseModel):
    text: list[str]
    label: list[str]


class ArcRow(Row):
    question: str
    choices: ArcChoices
    answerKey: str

    @model_validator(mode="after")
    def check_answer(self) -> Self:
        if len(self.choices.text) != len(self.choices.label) or self.answerKey not in self.choices.label:
            raise ValueError("answerKey must be one of choices.label, which has a label for each of choices.text")
        return self


class HellaSwagRow(Row):
    """`ctx` is the whole context, which the hub's dataset also has as its halves `ctx_a` and `ctx_b`."""

    note = "the context is one text, whose second half is not capitalised as lm-eval capitalises the hub's ctx_b"
    activity_label: str
    ctx: str
    endings: Four
    label: Literal["0", "1", "2", "3"]

    def document(self) -> Document:
        return {**self.model_dump(exclude={"ctx"}), "ctx_a": self.ctx, "ctx_b": ""}


class Gsm8kRow(Row):
    question: str
    answer: str


class LambadaRow(Row):
    text: str


class PiqaRow(Row):
    query: Annotated[str, Field(pattern=r"(?s)\AQuestion: .*\n\z")]
    choices: Two
    gold: Annotated[int, Field(ge=0, le=1)]

    def document(self) -> Document:
        goal = self.query.removeprefix("Question: ").removesuffix("\n")
        return {"goal": goal, "sol1": self.choices[0], "sol2": self.choices[1], "label": self.gold}


class WinograndeRow(Row):
    """`context_options`: the text up to and with each of the two options."""

    context_options: Two
    continuation: str
    gold: Annotated[int, Field(ge=0, le=1)]

    def document(self) -> Document:
        first, second = self.context_options
        sentence = f"_ {self.continuation}"  # lm-eval puts an option before the rest of the sentence, as it is here
        return {"sentence": sentence, "option1": first, "option2": second, "answer": str(self.gold + 1)}


class OpenBookRow(Row):
    query: str
    choices: Four
    gold: Choice

    def document(self) -> Document:
        labels = ["A", "B", "C", "D"]
        choices = {"text": self.choices, "label": labels}
        return {"question_stem": self.query, "choices": choices, "answerKey": labels[self.gold]}


@dataclass(frozen=True)
class LocalTask:
    """The files of a task, without `.jsonl` or `.jsonl.gz`, and how many rows the hub's dataset has.

    examples: where examples before a question are taken from; "" where it is the file itself.
    """

    row: type[Row]
    file: str
    hub_rows: int
    examples: str = ""
    hub_examples: int = 0


LOCAL_TASKS = {
    "mmlu": LocalTask(ReduxRow, "mmlu_redux_test", 14042, "mmlu_dev", 285),
    "arc_challenge": LocalTask(ArcRow, "arc_challenge_test", 1172, "arc_challenge_train", 1119),
    "arc_easy": LocalTask(ArcRow, "arc_easy_test", 2376, "arc_easy_train", 2251),
    "hellaswag": LocalTask(HellaSwagRow, "hellaswag_validation", 10042, "hellaswag_train", 39905),
    "gsm8k": LocalTask(Gsm8kRow, "gsm8k_test", 1319, "gsm8k_train", 7473),
    "lambada_openai": LocalTask(LambadaRow, "lambada_openai_test", 5153),
    "piqa": LocalTask(PiqaRow, "piqa", 1838, "piqa_train", 16113),
    "winogrande": LocalTask(WinograndeRow, "winogrande", 1267, "winogrande_train", 40398),
    "openbookqa": LocalTask(OpenBookRow, "openbook_qa", 500, "openbook_qa_train", 4957),
}
"""By lm-eval's name of the task."""


@dataclass(frozen=True)
class Documents:
    """What a task asks, the examples that it may show before, and in which way they are not the hub's."""

    asked: list[Document]
    examples: list[Document] = field(default_factory=list)
    note: str = ""

    def check_subjects(self, subjects: set[str]) -> None:
        """Raises `UserError` where MMLU's questions are not of exactly these subjects."""
        found = {each["subject"] for each in self.asked}
        for subject in sorted(subjects ^ found):
            problem = "no subject of MMLU's" if subject in found else "a subject without a question"
            raise UserError(KEY, f"mmlu: {subject!r} is {problem}")

    def of_subject(self, subject: str) -> "Documents":
        """Those of one subject of MMLU."""
        asked, examples = (
            [each for each in part if each["subject"] == subject] for part in (self.asked, self.examples)
        )
        return Documents(asked, examples, self.note)


def task_files(name: str, folder: str) -> list[Path]:
    """The files of a task that exist; none for a task that is not read from files."""
    task = LOCAL_TASKS.get(name)
    parts = [] if task is None else [task.file, task.examples]
    return [path for part in parts if part and (path := _path(folder, part)) is not None]


def read_documents(name: str, folder: str, shots: int) -> Documents:
    """The documents of a task.

    Args:
        shots: examples before each question.

    Raises:
        UserError: a file is missing, or a row of it is not what it should be.
    """
    task = LOCAL_TASKS[name]
    asked = _rows(name, folder, task.file, "")
    notes = [task.row.note] if task.row.note else []
    if len(asked) != task.hub_rows:
        notes.append(f"{len(asked):,} questions; the hub has {task.hub_rows:,}")
    if task.row is ArcRow:
        twice = sum(len(set(each["choices"]["text"])) < len(each["choices"]["text"]) for each in asked)
        if twice:
            notes.append(f"{twice:,} questions have one choice twice, where the hub's have fewer choices")
    examples = []
    if shots and task.examples:
        examples = _rows(name, folder, task.examples, f"; it holds the examples before a question (here {shots})")
        if len(examples) != task.hub_examples:
            notes.append(f"examples are taken from {len(examples):,} questions; the hub has {task.hub_examples:,}")
    return Documents(asked, examples, "; ".join(notes))


def _rows(name: str, folder: str, file: str, about: str) -> list[Document]:
    path = _path(folder, file)
    if path is None:
        raise UserError(KEY, f"{name} needs the file {file}.jsonl (or .jsonl.gz) in {folder!r}{about}")
    documents = _documents(path, LOCAL_TASKS[name].row)
    if not documents:
        raise UserError(KEY, f"{str(path)!r} has no line")
    return documents


def _documents(path: Path, row: type[Row]) -> list[Document]:
    documents: list[Document] = []

    def where(error: Exception) -> str:
        line = f"{str(path)!r}, line {len(documents) + 1}"
        if not isinstance(error, ValidationError):
            return f"{line}: {reason(error)}"
        first = error.errors()[0]
        column = ".".join(map(str, first["loc"]))
        return f"{line}: {column}: {first['msg']}" if column else f"{line}: {first['msg']}"

    opened = gzip.open if path.suffix == ".gz" else open
    with reading(KEY, describe=where), opened(path, "rt", encoding="utf-8") as lines:
        for text in lines:
            documents.append(row.model_validate_json(text).document())
    return documents


def _path(folder: str, file: str) -> Path | None:
    found = (Path(folder) / f"{file}{ending}" for ending in (".jsonl", ".jsonl.gz"))
    return next((path for path in found if path.is_file()), None)
