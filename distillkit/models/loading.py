"""Loading of models, tokenizers and configurations: transformers', with what a user of this package may rely on.

Weights come from safetensors or GGUF, never from pickles, which can run anything when they are read. Code that comes
with a model is run only when asked for. A GGUF file becomes an ordinary model that can be trained and saved. Errors
of transformers become one line.
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

from distillkit.config.errors import UserError

logger = logging.getLogger(__name__)

# Where a hub id has no safetensors, transformers would ask a service for a conversion and load what it answers.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

WHERE = ("gguf_file", "revision", "subfolder")
"""Keyword arguments of from_pretrained that locate a model; they locate its configuration and tokenizer, too."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def load_model(
    path: str | os.PathLike[str],
    *,
    key: str = "model",
    auto_class: str = "AutoModelForCausalLM",
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """A model in evaluation mode from a folder, a hub id, a `.gguf` file, or a folder or hub id and `gguf_file`.

    key: the key of the YAML that named the model, for error messages.
    auto_class: the class of transformers that chooses the model class.
    kwargs: those of `from_pretrained`. `dtype` (or `torch_dtype`) may be the name of a torch dtype, or "auto", the
        default: that of the checkpoint, float32 for quantised GGUF. `attn_implementation` "flash_attention_2" falls
        back to "sdpa", with one warning per process, where flash-attention cannot run.

    Raises `UserError` for what does not exist, is not in one of the two formats, or wants remote code unasked.
    """
    if kwargs.pop("use_safetensors", None) is False:
        raise UserError(key, "use_safetensors cannot be false: weights are read from safetensors or GGUF only")
    location, gguf_file = _locate(path, kwargs, key)
    loader = getattr(transformers, auto_class, None)
    if not auto_class.startswith("AutoModel") or loader is None:
        raise UserError(key, f"{auto_class!r} is no auto class of transformers; AutoModelForCausalLM is one")
    kwargs |= _dtype(kwargs, key)
    if kwargs.get("attn_implementation") == "flash_attention_2" and not is_flash_attn_2_available():
        _warn_without_flash_attention()
        kwargs["attn_implementation"] = "sdpa"
    if gguf_file is None:
        _require_safetensors(location, key)
        kwargs["use_safetensors"] = True
    else:
        kwargs |= {"gguf_file": gguf_file, "quantization_config": transformers.GgufConfig(dequantize=True)}
    with _as_user_error(location, key), _gguf_parsed_once():
        return loader.from_pretrained(location, trust_remote_code=trust_remote_code, **kwargs)


def load_tokenizer(
    path: str | os.PathLike[str], *, key: str = "model", trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model named as for `load_model`. Raises `UserError` where there is none."""
    location, gguf_file = _locate(path, kwargs, key)
    with _as_user_error(location, key, "the tokenizer of "), _gguf_parsed_once():
        return AutoTokenizer.from_pretrained(
            location, gguf_file=gguf_file, trust_remote_code=trust_remote_code, **kwargs
        )


def load_pretrained_config(
    path: str | os.PathLike[str], *, key: str = "model", trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedConfig:
    """The configuration of a model named as for `load_model`, without its weights."""
    location, gguf_file = _locate(path, kwargs, key)
    if gguf_file is not None:
        kwargs["gguf_file"] = gguf_file
    with _as_user_error(location, key, "the configuration of "), _gguf_parsed_once():
        return AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code, **kwargs)


def where(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments for loading a model, those that load its configuration and tokenizer as well."""
    return {name: kwargs[name] for name in WHERE if kwargs.get(name) is not None}


def weights_sha256(path: str, kwargs: Mapping[str, Any]) -> str | None:
    """Of a local model's weights and configuration, some 1 GB/s per thread; None for a hub id, which has commits."""
    place = Path(path).expanduser()
    if not place.exists():
        return None
    if "gguf_file" in kwargs:
        place /= kwargs["gguf_file"]
    return files_sha256([place] if place.is_file() else [place / "config.json", *sorted(place.glob("*.safetensors"))])


def files_sha256(files: Sequence[Path]) -> str:
    """Of names and contents of files, in their order."""

    def digest(file: Path) -> tuple[str, str]:
        with file.open("rb") as opened:
            return file.name, hashlib.file_digest(opened, "sha256").hexdigest()

    with ThreadPoolExecutor() as threads:
        named = list(threads.map(digest, files))
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _locate(path: str | os.PathLike[str], kwargs: dict[str, Any], key: str) -> tuple[str, str | None]:
    """The folder or hub id, and the name of the GGUF file in it if it is one that is wanted, taken out of kwargs."""
    text = os.path.expanduser(path)
    gguf_file: str | None = kwargs.pop("gguf_file", None)
    if kwargs.get("subfolder") and os.path.exists(text):
        inner = os.path.join(text, kwargs["subfolder"])
        raise UserError(key, f"subfolder is for hub ids; {text!r} is here, so name the folder itself: {inner!r}")
    if text.endswith(".gguf") and gguf_file is None:
        if not os.path.isfile(text):
            raise UserError(key, f"no such GGUF file: {text!r}")
        return os.path.dirname(text) or ".", os.path.basename(text)
    if os.path.isfile(text):
        raise UserError(key, f"{text!r} is a file; name the folder it is in, or a .gguf file")
    if os.path.isdir(text):
        if gguf_file is not None and not os.path.isfile(os.path.join(text, gguf_file)):
            raise UserError(key, f"{text!r} has no file {gguf_file!r}{_listed(text, ('.gguf',), '; it has ')}")
        return text, gguf_file
    if text.startswith(("/", ".")) or text.count("/") > 1:
        raise UserError(key, f"no such folder: {text!r}")
    return text, gguf_file


def _require_safetensors(location: str, key: str) -> None:
    """Raises `UserError` for a folder without safetensors, saying what is there instead."""
    if not os.path.isdir(location) or _listed(location, (".safetensors",)):
        return
    if ggufs := _listed(location, (".gguf",)):
        raise UserError(key, f"{location!r} has no safetensors but GGUF: name the file itself, or gguf_file ({ggufs})")
    if pickles := _listed(location, _PICKLES):
        raise _pickled(location, key, pickles)
    raise UserError(key, f"{location!r} holds no weights (*.safetensors or *.gguf)")


def _pickled(location: str, key: str, files: str) -> UserError:
    return UserError(
        key,
        f"{location!r} has only pickled weights ({files}), which can run code when read; convert them where you "
        "trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder) writes safetensors",
    )


def _listed(folder: str, suffixes: tuple[str, ...], prefix: str = "") -> str:
    """Names of up to three files of a kind, sorted; empty if there are none."""
    names = sorted(entry.name for entry in Path(folder).iterdir() if entry.suffix in suffixes)
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return prefix + shown if names else ""


def _dtype(kwargs: dict[str, Any], key: str) -> dict[str, torch.dtype | str]:
    """Takes `dtype` or its older name out of kwargs; a torch dtype or "auto"."""
    given = {name: kwargs.pop(name) for name in ("torch_dtype", "dtype") if kwargs.get(name) is not None}
    if not given:
        return {}
    name, value = given.popitem()
    if isinstance(value, torch.dtype) or value == "auto":
        return {"dtype": value}
    dtype = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(key, f"{name}: no dtype {value!r}; use bfloat16, float16, float32 or auto")
    return {"dtype": dtype}


@functools.cache
def _warn_without_flash_attention() -> None:
    logger.warning(
        "flash-attention 2 is not installed or there is no CUDA device; PyTorch's own attention runs instead"
    )


@contextmanager
def _as_user_error(location: str, key: str, what: str = "") -> Iterator[None]:
    """Turns what transformers raises about a model into a `UserError`."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        text = str(error).strip() or type(error).__name__
        if "trust_remote_code" in text:
            raise UserError(
                key, f"{location!r} runs code of its own; set trust_remote_code: true if you have read and trust it"
            ) from error
        if "cannot be loaded with `safetensors`" in text:
            raise _pickled(location, key, "no *.safetensors") from error
        if not os.path.isdir(location):
            what = f"{what}{location!r}, which is no folder here and so taken for a hub id"
        else:
            what = f"{what}{location!r}"
        raise UserError(key, f"cannot load {what}: {text.splitlines()[0]}") from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(key, f"cannot load {location!r}: {error}") from error


@contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """Within it, a GGUF file is parsed once, and the table of tensor names is made once.

    transformers 5.23 parses the file for the configuration and again for the weights, and makes the table for each
    module of the model: 16 s for SmolLM2-135M, of which 5 s remain. Both depend on their arguments alone.
    """
    try:
        import gguf
    except ImportError:  # only needed for GGUF files; transformers says so then
        yield
        return
    slow = {"GGUFReader": gguf.GGUFReader, "get_tensor_name_map": gguf.get_tensor_name_map}
    vars(gguf).update({name: functools.cache(function) for name, function in slow.items()})
    try:
        yield
    finally:
        vars(gguf).update(slow)
