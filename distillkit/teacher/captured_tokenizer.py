"""The teacher's tokenizer in the folder of a captured dataset, for when the teacher itself is not available.

It is needed to compare the dataset's tokens with those of a student that has more of them.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distillkit.config.errors import UserError
from distillkit.data import tokenizer_hash
from distillkit.models.loading import load_tokenizer
from distillkit.runs.writing import remove_leftovers, sha256, write_whole
from distillkit.shards import Manifest
from distillkit.shards.names import TOKENIZER, files_of


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Save a tokenizer, each file complete or not at all; returns the SHA-256 of each, by name.

    The same tokenizer gives the same bytes.
    """
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        tokenizer.backend_tokenizer.no_truncation()  # the state of its last call would be saved too
        tokenizer.backend_tokenizer.no_padding()
    with TemporaryDirectory() as staged:
        tokenizer.save_pretrained(staged)
        _copy(Path(staged), folder / TOKENIZER)
        return {name: sha256(path) for name, path in files_of(Path(staged)).items()}


def copy_tokenizer(captured: Path, folder: Path) -> None:
    """Copy the tokenizer of a captured dataset, if it has one."""
    _copy(captured / TOKENIZER, folder / TOKENIZER)


def read_tokenizer(captured: Path, manifest: Manifest) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a captured dataset; None where it has none, or not the one that it was captured with.

    A tokenizer that needs code of its own is not loaded: the user named a dataset, not code to run.
    """
    if not (captured / TOKENIZER).is_dir():
        return None
    try:
        found = load_tokenizer(captured / TOKENIZER, key=TOKENIZER, trust_remote_code=False)
    except UserError:
        return None
    return found if manifest.tokenizer_sha256 in (None, tokenizer_hash(found)) else None


def _copy(source: Path, target: Path) -> None:
    for name, path in files_of(source).items():
        copied = target / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(copied.parent)
        write_whole(copied, path.read_bytes())
