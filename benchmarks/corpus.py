"""A text as tokens: documents of token ids, small enough to be sent to a machine, and ready where minutes cost.

    python benchmarks/corpus.py --teacher FOLDER [--gguf-file NAME] --data train.parquet --output tokens/train
    python benchmarks/corpus.py --teacher … --data valid.parquet --output tokens/valid --most-mib 1

writes tokens/train-00.parquet, tokens/train-01.parquet …, none above `--most-mib`. Documents stay whole and in their
order; a text ends with the tokenizer's EOS token, as a run would end it. `tokens/train-*.parquet` is then a `disk_path`
of a run: what has a column `input_ids` is not tokenised again.

`--returning 0.25` lets passages of a quarter of the documents return (benchmarks/returning.py); `--entries` puts
numbered entries among these. `--asked 0.25` tells facts in another quarter and asks for them (benchmarks/questions.py).
Such documents come after the others, so let one file hold all (`--most-mib`). They are first joined to `--together`
tokens, without their EOS, if that is given.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measuring import MIB
from questions import facts_asked_for
from returning import entries_of, passages_that_return
from rewriting import documents_of, rewritten
from transformers import PreTrainedTokenizerBase

from distillkit.config import DatasetSource
from distillkit.config.resolve import load_run, resolve
from distillkit.data import build_datasets
from distillkit.data.rows import RowFormat, list_entries, tokenize_rows
from distillkit.data.sources import load_source
from distillkit.models.loading import load_tokenizer, where


def tokenised(path: str, tokenizer: PreTrainedTokenizerBase, processes: int | None = None) -> pa.Table:
    """The documents behind a `disk_path` in one column `input_ids`, in two bytes per token where ids fit into them."""
    rows = load_source(DatasetSource(disk_path=path))
    documents = tokenize_rows(rows, tokenizer, RowFormat(), num_proc=processes, key="--data")
    lengths, ids = list_entries(documents.with_format("arrow")[:]["input_ids"])
    width = pa.uint16() if len(tokenizer) <= 2**16 else pa.int32()
    return documents_of(lengths, ids.cast(width))


def write(documents: pa.Table, path: Path, level: int = 3) -> int:
    """One file; its size in bytes. Pages are as large as they may be, so that the compression sees far back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    at_once = {"row_group_size": max(len(documents), 1), "data_page_size": 2**30}
    pq.write_table(
        documents,
        path,
        compression="zstd",
        compression_level=level,
        use_dictionary=False,
        write_statistics=False,
        **at_once,
    )
    return path.stat().st_size


def count(documents: pa.Table) -> int:
    return int(list_entries(documents["input_ids"])[0].sum())


def write_parts(documents: pa.Table, output: Path, most_bytes: int, level: int) -> list[Path]:
    """As few files as hold all documents with none above `most_bytes`, if documents allow, about alike in tokens."""
    ends = np.cumsum(list_entries(documents["input_ids"])[0])
    parts = 1
    while True:
        paths, sizes, start = [], [], 0
        for part in range(parts):
            end = int(np.searchsorted(ends, ends[-1] * (part + 1) / parts)) + 1
            paths.append(output.with_name(f"{output.name}-{part:02}.parquet"))
            sizes.append(write(documents.slice(start, end - start), paths[-1], level))
            start = end
        if max(sizes) <= most_bytes or parts >= len(documents):  # a document is not cut
            return paths
        parts = max(parts + 1, math.ceil(sum(sizes) / most_bytes))
        for path in paths:
            path.unlink()


def prepare_rows(files: list[str]) -> None:
    """The rows of all phases of some runs, each kind once, in the folders where the runs will look for them."""
    phases = [phase.config for file in files for phase in resolve(load_run(Path(file)).config).phases]
    for config in {phase.dataset.prepared_dataset_path: phase for phase in phases}.values():
        start = time.perf_counter()
        assert config.teacher.kind == "hf"
        tokenizer = load_tokenizer(config.teacher.path, **where(config.teacher.kwargs))
        build_datasets(config.dataset, tokenizer, config.sequence_length)
        print(f"{config.dataset.prepared_dataset_path}: {time.perf_counter() - start:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="whose tokenizer it is: a folder, a hub id or a .gguf file")
    parser.add_argument("--gguf-file", help="name of the GGUF file in the teacher's folder")
    parser.add_argument("--data", required=True, help="the text: a .parquet, .jsonl or .txt file, a folder or pattern")
    parser.add_argument("--output", type=Path, required=True, help="beginning of the files' names")
    parser.add_argument("--most-mib", type=float, default=55, help="size of a file, at most")
    parser.add_argument("--level", type=int, default=19, help="of zstd")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--returning", type=float, default=0.0, metavar="SHARE", help="of documents, as told above")
    parser.add_argument("--entries", action="store_true", help="with a number each, among what returns")
    parser.add_argument("--asked", type=float, default=0.0, metavar="SHARE", help="of documents, as told above")
    parser.add_argument("--together", type=int, help="tokens of such documents: short ones are joined, long ones cut")
    parser.add_argument("--seed", type=int, default=0, help="of what is written anew")
    args = parser.parse_args()
    if args.entries and not args.returning:
        parser.error("--entries are for documents in which passages return: give --returning")
    if args.together is not None and args.together < 1:
        parser.error("--together is a number of tokens: at least 1")
    if args.together and not (args.returning or args.asked):
        parser.error("--together is for documents that are written anew: give --returning or --asked")
    if min(args.returning, args.asked) < 0 or args.returning + args.asked > 1:
        parser.error("--returning and --asked are shares of the documents: from 0 to 1, and together at most 1")
    gguf = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    start = time.perf_counter()
    tokenizer = load_tokenizer(args.teacher, **gguf)
    documents = tokenised(args.data, tokenizer, args.processes)
    writers = []
    if args.returning:
        writers.append((args.returning, passages_that_return(entries_of(tokenizer) if args.entries else None)))
    if args.asked:
        writers.append((args.asked, facts_asked_for(tokenizer)))
    if writers:
        documents = rewritten(documents, writers, args.seed, args.together)
    seconds = time.perf_counter() - start
    tokens = count(documents)
    print(f"{tokens:,} tokens in {len(documents):,} documents, tokenised in {seconds:.1f} s", flush=True)
    for path in write_parts(documents, args.output, int(args.most_mib * MIB), args.level):
        held = count(pq.read_table(path))
        row = {"file": path.name, "tokens": held, "mib": round(path.stat().st_size / MIB, 2)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
