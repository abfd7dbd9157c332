"""A mistake in the settings of a synthetic text is one line that names the key, and torch is not imported to say so."""

import subprocess
import sys

import pytest

NEEDED = "tokenizer.path=someone/model dataset.repo_id=someone/text output_path=out"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("synthesize", "error: Missing argument '[CONFIG.yaml] [KEY=VALUE]'."),
        ("synthesize missing.yaml", "error: missing.yaml: no such file"),
        ("synthesize seed=1", "error: tokenizer: is missing: the teacher's tokenizer: path"),
        (
            f"synthesize {NEEDED} repeated_passages.entries=true",
            "error: repeated_passages.share: is missing: share of the documents that are rewritten so",
        ),
        (f"synthesize {NEEDED} repeated_passages.share=2", "error: repeated_passages.share: must be <= 1, got 2"),
        (
            f"synthesize {NEEDED} questions_about_facts.share=0",
            "error: questions_about_facts.share: must be > 0, got 0",
        ),
        (
            f"synthesize {NEEDED} repeated_passages.share=0.75 questions_about_facts.share=0.5",
            "error: questions_about_facts.share: with repeated_passages.share it takes 1.25 of the documents; the two "
            "may take 1 together",
        ),
        (
            f"synthesize {NEEDED} repeated_passages.share=0.5 document_length=0",
            "error: document_length: must be > 0, got 0",
        ),
        (
            f"synthesize {NEEDED} document_length=2048",
            "error: document_length: has an effect on rewritten documents only; give repeated_passages or "
            "questions_about_facts, or remove it",
        ),
        (f"synthesize {NEEDED} repeated_passage.share=1", "error: repeated_passage: unknown key; did you mean 'rep"),
        (f"synthesize {NEEDED} tokenizer.path=./none", "error: tokenizer.path: no such file or folder: './none'"),
        (
            f"synthesize {NEEDED} dataset.repo_id=null dataset.disk_path=none.txt",
            "error: dataset.disk_path: no such file or folder: 'none.txt'",
        ),
        (f"synthesize {NEEDED} output_path=.", "error: output_path: '.' exists; remove it or name a new folder"),
    ],
)
def test_a_mistake_is_one_line(words, line, capsys):
    from distillkit.cli import main

    assert main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(line) and printed.err.count("\n") == 1 and printed.out == ""


def test_torch_is_not_imported_to_refuse_a_configuration():
    driver = (
        "import sys; sys.argv[0] = 'distillkit'; from distillkit.cli import main; code = main()\n"
        "sys.exit(99 if {'torch', 'transformers'} & set(sys.modules) else code)"
    )
    words = f"synthesize {NEEDED} repeated_passages.share=2".split()
    done = subprocess.run([sys.executable, "-c", driver, *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: repeated_passages.share: must be <= 1")
