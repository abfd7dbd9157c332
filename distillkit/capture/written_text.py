"""`distillkit write CONFIG.yaml`: a teacher writes text by sampling, so that there is as much of it as training takes.

Documents are divided into files. What a document is follows from the seed and its number, not from the process that
writes it or from the others of its batch, but for rounding. So the work may be killed at any moment, shared among
processes and started again. The folder appears when all its files are complete.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from distillkit.capture.transformers_engine import load_teacher
from distillkit.config.errors import UserError
from distillkit.config.sharing import find_share
from distillkit.config.written import WrittenTextConfig, check_written_ready
from distillkit.config.yaml_files import as_section
from distillkit.console import INTERRUPTED, print_line
from distillkit.data.prompts import read_prompts
from distillkit.data.synthetic.files import settings_text, token_type, write_documents
from distillkit.data.synthetic.rewriting import table_of_documents
from distillkit.evaluation.continuations import continue_prompts, drawn_numbers
from distillkit.evaluation.generation import batches_by_length, decode_as_graphs, end_tokens
from distillkit.models.loading import load_tokenizer, where
from distillkit.runs.writing import full_disk_errors, write_whole

SETTINGS = "written.yaml"

FREE_TO_CHANGE = ("batch_size", "output_path")
"""Keys that another process, or a later one, may have otherwise."""


def write_text(
    config: WrittenTextConfig | Mapping[str, Any] | str | os.PathLike[str],
    shard: str | None = None,
    console: Console | None = None,
) -> Path | None:
    """Write the files that are missing, all of them or one share; the folder, or None while others' are missing.

    config: the path of a YAML file, its content as a mapping, or a configuration.
    shard: `i/n`, the i-th of n processes that share the files; by default torchrun's, or all files.

    Raises:
        UserError: the configuration is wrong, or the disk is full; the line names key and remedy.
        SystemExit: with code 130, after Ctrl-C.
    """
    console = console or Console()
    config = as_section(WrittenTextConfig, config)
    check_written_ready(config)
    share = find_share(shard)
    folder = Path(config.output_path)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    _begin(unfinished / SETTINGS, config)
    files = [
        unfinished / f"part-{part:05}.parquet" for part in range(-(-config.documents // config.documents_per_file))
    ]
    missing = [part for part, path in enumerate(files) if share.has(part) and not path.exists()]
    try:
        with full_disk_errors(lambda: "and the file is not written; free space and start the same command again"):
            writer = _Writer(config) if missing else None
            for part in missing:
                assert writer is not None
                start = time.perf_counter()
                first = part * config.documents_per_file
                numbers = range(first, min(first + config.documents_per_file, config.documents))
                documents = writer.documents(numbers)
                staged = files[part].with_suffix(".staged")
                write_documents(_table(documents, writer.vocabulary_size), staged)
                staged.rename(files[part])
                tokens, seconds = sum(map(len, documents)), time.perf_counter() - start
                rate = f"{tokens:,} tokens with their prompts, {seconds:,.0f} s"
                print_line(console, f"{files[part].name}: {len(documents):,} documents, {rate}")
    except KeyboardInterrupt:
        print_line(console, "interrupted; files so far are kept, and the same command continues")
        raise SystemExit(INTERRUPTED) from None
    if not unfinished.exists():  # another process was the last
        return folder
    if others := [path for path in files if not path.exists()]:
        print_line(console, f"{len(others)} of {len(files)} files are missing: other processes write them")
        return None
    unfinished.rename(folder)
    print_line(console, f"{folder} is complete")
    return folder


class _Writer:
    """The model, its tokenizer and what it continues."""

    def __init__(self, config: WrittenTextConfig) -> None:
        kwargs: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, **config.teacher.kwargs}
        tokenizer = load_tokenizer(
            config.teacher.path, key="teacher.path", trust_remote_code=config.trust_remote_code, **where(kwargs)
        )
        self.config = config
        self.prompts = _prompts(config, tokenizer)
        self.model = load_teacher(config.teacher.path, kwargs).requires_grad_(False).eval()
        decode_as_graphs(self.model)
        self.vocabulary_size = len(tokenizer)
        if (largest := max(max(prompt) for prompt in self.prompts)) >= self.model.config.get_text_config().vocab_size:
            raise UserError("prompts", f"a prompt has token {largest}, which the model does not know")

    def documents(self, numbers: Sequence[int]) -> list[list[int]]:
        """The documents of these numbers: prompts with what follows them."""
        config = self.config
        found: dict[int, list[int]] = {}
        turns = len(config.temperatures)
        for turn, temperature in enumerate(config.temperatures):
            mine = [number for number in numbers if number % turns == turn]
            prompts = [self.prompts[number % len(self.prompts)] for number in mine]
            for batch in batches_by_length(prompts, config.batch_size):
                drawn = torch.stack(
                    [drawn_numbers((config.seed, mine[index]), config.max_new_tokens) for index in batch]
                )
                written = continue_prompts(
                    self.model,
                    [prompts[index] for index in batch],
                    drawn,
                    new_tokens=config.max_new_tokens,
                    temperature=temperature,
                    ends=end_tokens(self.model),
                    columns=self.vocabulary_size,
                )
                found |= {mine[index]: [*prompts[index], *text] for index, text in zip(batch, written, strict=True)}
        return [found[number] for number in numbers]


def _prompts(config: WrittenTextConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if config.prompts is None:
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if begin is None:
            raise UserError("prompts", "is missing: the tokenizer has no token with which a document could begin")
        return [[begin]]
    return read_prompts(
        config.prompts,
        tokenizer,
        None,
        text_field=config.text_field,
        prompt_tokens=config.prompt_tokens,
        seed=config.seed,
        key="prompts",
    )


def _table(documents: list[list[int]], vocabulary_size: int) -> pa.Table:
    lengths = np.array([len(document) for document in documents])
    ids = pa.array([token for document in documents for token in document])
    return table_of_documents(lengths, ids.cast(token_type(vocabulary_size)))


def _begin(path: Path, config: WrittenTextConfig) -> None:
    """Write the settings, or compare them with those of files that are there already. Raises `UserError`."""
    text = settings_text(config, "torch", "transformers")
    if path.exists():
        former, described = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(text)
        for key in dict.fromkeys([*described, *former]):
            if key not in FREE_TO_CHANGE and former.get(key) != described.get(key):
                problem = f"was {former.get(key)!r} when the files in {str(path.parent)!r} were begun"
                raise UserError(key, f"{problem}; set it so again, or delete that folder")
        return
    write_whole(path, text.encode())
