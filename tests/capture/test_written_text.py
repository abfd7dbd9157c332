"""Text that a teacher writes: what each document is, whoever writes it and after whatever kill."""

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit.capture import written_text
from distillkit.capture.written_text import write_text
from distillkit.config import UserError
from distillkit.config.data import DatasetSource
from distillkit.config.synthetic import SyntheticTextConfig
from distillkit.config.written import WrittenTextConfig, load_written_config
from distillkit.data import build_dataset
from distillkit.data.synthetic import synthesize
from distillkit.evaluation.continuations import draw, drawn_numbers
from tests.training.tiny import save_chat_model, save_chats, save_text

SIZES = {"documents": 10, "documents_per_file": 4, "max_new_tokens": 6, "batch_size": 3}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(save_chat_model(tmp_path_factory.mktemp("models") / "teacher", seed=3))


@pytest.fixture
def given(teacher, tmp_path):
    save_text(tmp_path / "text.jsonl", documents=7)
    prompts = {"prompts": {"disk_path": str(tmp_path / "text.jsonl")}, "prompt_tokens": 5}
    return {"teacher": {"path": teacher}, "output_path": str(tmp_path / "written"), **prompts, **SIZES}


def write(given, shard=None, **changes):
    said = io.StringIO()
    folder = write_text({**given, **changes}, shard, Console(file=said, width=200))
    return folder, said.getvalue()


def documents_of(folder):
    tables = [pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))]
    return [len(table) for table in tables], [row for table in tables for row in table["input_ids"].to_pylist()]


def test_each_document_is_its_prompt_and_what_is_drawn_after_it(given):
    """Token by token, each from a pass over all that stands before it; temperatures take turns."""
    folder, said = write(given, temperatures=[0.5, 1.5])
    sizes, documents = documents_of(folder)
    assert sizes == [4, 4, 2] and "is complete" in said and "part-00002.parquet: 2 documents" in said
    model = AutoModelForCausalLM.from_pretrained(given["teacher"]["path"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(given["teacher"]["path"])
    lines = Path(given["prompts"]["disk_path"]).read_text().splitlines()
    starts = {tuple(tokenizer(json.loads(line)["text"]).input_ids[:5]) for line in lines}
    assert {tuple(document[:5]) for document in documents} == starts  # all seven, three of them twice
    assert [document[:5] for document in documents[7:]] == [document[:5] for document in documents[:3]]
    config, ended = WrittenTextConfig.parse(given), 0
    for number, document in enumerate(documents):
        tokens = document[:5]
        for drawn in drawn_numbers((config.seed, number), config.max_new_tokens):
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0, -1:, : len(tokenizer)]
            tokens = [*tokens, int(draw(logits, drawn.view(1), [0.5, 1.5][number % 2]))]
            if tokens[-1] == model.generation_config.eos_token_id:
                ended += 1
                break
        assert document == tokens
    assert documents[7][5:] != documents[0][5:]  # the same prompt, other numbers


def test_a_kill_other_batches_and_several_processes_change_nothing(given, tmp_path, monkeypatch):
    whole = documents_of(write(given)[0])
    changed = {**given, "output_path": str(tmp_path / "again"), "batch_size": 2}
    staged = tmp_path / ".again.unfinished"
    folder, said = write(changed, "2/2")
    assert folder is None and "2 of 3 files are missing" in said
    assert [path.name for path in sorted(staged.glob("*.parquet"))] == ["part-00001.parquet"]
    original, calls = written_text.write_documents, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(written_text, "write_documents", killed)
        with pytest.raises(SystemExit) as ended:
            write(changed, "1/2")
    assert ended.value.code == 130 and len(list(staged.glob("*.parquet"))) == 2
    kept = (staged / "part-00000.parquet").stat().st_mtime_ns
    folder, _ = write(changed, "1/2")
    assert documents_of(folder) == whole and (folder / "part-00000.parquet").stat().st_mtime_ns == kept
    assert not staged.exists() and "documents: 10" in (folder / "written.yaml").read_text()


def test_what_was_begun_is_not_continued_with_other_settings(given):
    assert write(given, "1/2")[0] is None
    with pytest.raises(
        UserError, match=r"^seed: was 0 when the files in .*unfinished' were begun; set it so again, or"
    ):
        write(given, seed=1)
    with pytest.raises(UserError, match=r"^temperatures: was \[1.0\] when"):
        write(given, temperatures=[0.7])
    assert write(given, batch_size=5)[0] is not None
    with pytest.raises(UserError, match=r"^output_path: .* exists; remove it or name a new folder$"):
        write(given)


def test_documents_may_begin_with_nothing_or_with_a_conversation(given, tmp_path):
    without = {key: value for key, value in given.items() if key not in ("prompts", "prompt_tokens")}
    _, documents = documents_of(write(without)[0])
    assert {document[0] for document in documents} == {1} and len({*map(tuple, documents)}) > 1
    chats = {"disk_path": save_chats(tmp_path / "chats.jsonl", 3)}
    _, documents = documents_of(write(given, prompts=chats, output_path=str(tmp_path / "answers"))[0])
    tokenizer = AutoTokenizer.from_pretrained(given["teacher"]["path"])
    assert all("<|im_start|>assistant" in tokenizer.decode(document) for document in documents)


def test_a_run_reads_it_and_a_text_may_have_a_share_of_it(given, tmp_path):
    folder, _ = write(given)
    _, documents = documents_of(folder)
    tokenizer = AutoTokenizer.from_pretrained(given["teacher"]["path"])
    rows = build_dataset(DatasetSource(disk_path=str(folder)), tokenizer, 64, seed=None)
    assert [token for row in rows for token in row["input_ids"]] == [token for each in documents for token in each]

    def mixed(share, name):
        described = {"tokenizer": {"path": given["teacher"]["path"]}, "output_path": str(tmp_path / name)}
        described |= {"dataset": given["prompts"], "added": {"disk_path": str(folder), "share": share}}
        synthesize(SyntheticTextConfig.parse(described), Console(file=io.StringIO()))
        return pq.read_table(tmp_path / name / "part-00.parquet")["input_ids"].to_pylist()

    text = mixed(0.05, "mixed")
    added, own = text[7:], sum(map(len, text[:7]))
    assert added == documents[: len(added)]
    tokens = [sum(map(len, each)) for each in (added, added[:-1])]
    assert tokens[1] < own * 0.05 / 0.95 <= tokens[0]
    with pytest.raises(
        UserError, match=r"^added\.share: takes [\d,]+ tokens, and the text has \d+; at most 0\.\d+ are"
    ):
        mixed(0.9, "more")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"documents": 0}, r"^documents: "),
        ({"temperatures": [0.0]}, r"^temperatures"),
        ({"prompts": None, "prompt_tokens": 3}, r"^prompt_tokens: has an effect on prompts only"),
        ({"prompts": {"disk_path": "nowhere.jsonl"}}, r"^prompts\.disk_path: "),
        ({"teacher": {"path": "./nowhere"}}, r"^teacher\.path: "),
        ({"prompt_tokens": 500}, r"^prompts: no text has 500 tokens \(prompt_tokens\)$"),
        ({"loss_functions": []}, r"^loss_functions: "),
    ],
)
def test_mistakes_are_one_line(given, changes, problem):
    with pytest.raises(UserError, match=problem):
        write(given, **changes)


def test_every_key_can_be_given_on_the_command_line():
    config = load_written_config(None, ["teacher.path=t", "documents=3", "output_path=o", "temperatures=[0.7, 1]"])
    assert (config.documents, config.temperatures, config.prompts) == (3, [0.7, 1.0], None)
