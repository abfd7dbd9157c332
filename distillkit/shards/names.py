"""Names of the files in a captured dataset's folder, for all code that writes or reads them."""

MANIFEST = "manifest.json"
"""Written last: a folder that has it holds a complete dataset."""
PLAN = "plan.json"
"""Which rows go into which shard; written before the first one."""
BACKGROUND = "background.safetensors"
TOKENIZER = "tokenizer"
"""Folder of the teacher's tokenizer."""
CARD = "README.md"
SHARD = "shard-"
"""Beginning of the names of shards and their records."""


def shard_name(index: int) -> str:
    """`shard-00007`, to which .parquet and .json are added."""
    return f"{SHARD}{index:05d}"
