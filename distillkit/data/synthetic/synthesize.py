"""`distillkit synthesize`: a text is tokenised, some of its documents are rewritten, and all go into a folder."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from distillkit.config.errors import UserError
from distillkit.config.synthetic import AddedTextConfig, SyntheticTextConfig
from distillkit.console import print_line
from distillkit.data.rows import list_entries
from distillkit.data.synthetic.facts import QuestionsAboutFacts
from distillkit.data.synthetic.files import count_tokens, settings_text, tokenize_documents, write_parts
from distillkit.data.synthetic.passages import RepeatedPassages, numbered_entries
from distillkit.data.synthetic.rewriting import Rewriter, rewrite_documents
from distillkit.models.loading import load_tokenizer, where

MIB = 2**20


def synthesize(config: SyntheticTextConfig, console: Console | None = None) -> list[Path]:
    """Write the text that a configuration describes; returns its parquet files.

    The folder appears when it is complete. Beside the files it holds `synthesis.yaml`: the configuration, from which
    the same text can be made again, and the versions of what made it. Raises `UserError` for bad input.
    """
    console = console or Console()
    tokenizer = load_tokenizer(
        config.tokenizer.path,
        key="tokenizer.path",
        trust_remote_code=config.trust_remote_code,
        **where(config.tokenizer.model_dump()),
    )
    documents = tokenize_documents(config.dataset, tokenizer, config.num_proc)
    rewriters: list[tuple[float, Rewriter]] = []
    if (passages := config.repeated_passages) is not None:
        entry = numbered_entries(tokenizer) if passages.entries else None
        rewriters.append((passages.share, RepeatedPassages(entry)))
    if config.questions_about_facts is not None:
        rewriters.append((config.questions_about_facts.share, QuestionsAboutFacts(tokenizer)))
    if rewriters:
        documents = rewrite_documents(documents, rewriters, config.seed, config.document_length)
    if config.added is not None:
        documents = _with_added(documents, config.added, tokenizer, config.num_proc)
    print_line(console, f"{count_tokens(documents):,} tokens in {len(documents):,} documents")
    folder = Path(config.output_path)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for path in write_parts(documents, unfinished, int(config.max_file_mib * MIB)):
        tokens = count_tokens(pq.read_table(path))
        print_line(console, f"{path.name}: {tokens:,} tokens, {path.stat().st_size / MIB:,.2f} MiB")
    (unfinished / "synthesis.yaml").write_text(settings_text(config, "pyarrow", "numpy"), encoding="utf-8")
    unfinished.rename(folder)
    print_line(console, f"{folder} is complete")
    return sorted(folder.glob("*.parquet"))


def _with_added(
    documents: pa.Table, added: AddedTextConfig, tokenizer: PreTrainedTokenizerBase, num_proc: int | None
) -> pa.Table:
    """The documents, and behind them the first of another text, as many as have its share of all tokens, at least.

    Raises `UserError` where that text has too few.
    """
    others = tokenize_documents(added, tokenizer, num_proc, key="added")
    ends = np.cumsum(list_entries(others["input_ids"])[0])
    own = count_tokens(documents)
    wanted = own * added.share / (1 - added.share)
    if ends[-1] < wanted:
        most = ends[-1] / (own + ends[-1])
        problem = f"takes {round(wanted):,} tokens, and the text has {ends[-1]:,}"
        raise UserError("added.share", f"{problem}; at most {int(most * 1000) / 1000:g} are possible")
    return pa.concat_tables([documents, others.slice(0, int(np.searchsorted(ends, wanted)) + 1)])
