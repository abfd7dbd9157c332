"""`tokenizer/` in the folder of a captured dataset: the teacher's, for where the teacher itself is not at hand.

Without it nobody could tell the tokens of the dataset from those of a student that has one more.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distillkit.config.errors import UserError
from distillkit.data import tokenizer_hash
from distillkit.models.loading import load_tokenizer
from distillkit.runs.writing import remove_leftovers, write_whole
from distillkit.shards import Manifest

TOKENIZER = "tokenizer"


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save a tokenizer, each file whole or not at all. The same tokenizer gives the same bytes."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        tokenizer.backend_tokenizer.no_truncation()  # what its last call left would be saved too
        tokenizer.backend_tokenizer.no_padding()
    with TemporaryDirectory() as staged:
        tokenizer.save_pretrained(staged)
        _copy(Path(staged), folder / TOKENIZER)


def copy_tokenizer(captured: Path, folder: Path) -> None:
    """Take the tokenizer of a captured dataset along, where it has one."""
    _copy(captured / TOKENIZER, folder / TOKENIZER)


def read_tokenizer(captured: Path, manifest: Manifest) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a captured dataset; None where it has none that can be read, or another than it was made with.

    One that needs code of its own cannot be read: whoever names a dataset has not named code to be run.
    """
    if not (captured / TOKENIZER).is_dir():
        return None
    try:
        found = load_tokenizer(captured / TOKENIZER, key=TOKENIZER, trust_remote_code=False)
    except UserError:
        return None
    return found if manifest.tokenizer_sha256 in (None, tokenizer_hash(found)) else None


def _copy(source: Path, target: Path) -> None:
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(copied.parent)
        write_whole(copied, path.read_bytes())
