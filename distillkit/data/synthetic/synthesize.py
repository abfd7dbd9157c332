"""`distillkit synthesize`: a text is tokenised, some of its documents are rewritten, and all go into a folder."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from rich.console import Console

from distillkit.config.synthetic import SyntheticTextConfig
from distillkit.console import print_line
from distillkit.data.synthetic.facts import QuestionsAboutFacts
from distillkit.data.synthetic.files import count_tokens, tokenize_documents, write_parts
from distillkit.data.synthetic.passages import RepeatedPassages, numbered_entries
from distillkit.data.synthetic.rewriting import Rewriter, rewrite_documents
from distillkit.models.loading import load_tokenizer, where
from distillkit.runs.provenance import versions
from distillkit.runs.secrets import without_secrets

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
    print_line(console, f"{count_tokens(documents):,} tokens in {len(documents):,} documents")
    folder = Path(config.output_path)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for path in write_parts(documents, unfinished, int(config.max_file_mib * MIB)):
        tokens = count_tokens(pq.read_table(path))
        print_line(console, f"{path.name}: {tokens:,} tokens, {path.stat().st_size / MIB:,.2f} MiB")
    settings = yaml.safe_dump(without_secrets(config.model_dump(mode="json", exclude_none=True)), sort_keys=False)
    made_with = ", ".join(f"{name} {version}" for name, version in versions("pyarrow", "numpy").items())
    (unfinished / "synthesis.yaml").write_text(f"# made with {made_with}\n{settings}", encoding="utf-8")
    unfinished.rename(folder)
    print_line(console, f"{folder} is complete")
    return sorted(folder.glob("*.parquet"))
