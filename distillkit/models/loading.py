"""Loading of models, tokenizers and configurations: transformers', with what a user of this package may rely on.

Weights come from safetensors or GGUF, never from pickles, which can run anything when they are read. Code that comes
with a model is run only when asked for. A GGUF file becomes an ordinary model that can be trained and saved. A model
is what its files hold: nothing is filled up with random numbers, nothing is left out. Errors of transformers become
one line.
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
from transformers.utils import cached_file, is_flash_attn_2_available
from transformers.utils.peft_utils import find_adapter_config_file

from distillkit.config.errors import UserError
from distillkit.models.finite import first_names, weights_problem
from distillkit.models.gguf_files import HUB, configuration_changes, gguf_parsed_once, gguf_path, unread_tensors
from distillkit.models.safetensors_files import INDEX, damaged, header, safetensors_files
from distillkit.runs.writing import sha256

logger = logging.getLogger(__name__)

# Where a hub id has no safetensors, transformers would ask a service for a conversion and load what it answers.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

WHERE = ("gguf_file", "revision", "subfolder")
"""Keyword arguments of from_pretrained that locate a model; they locate its configuration and tokenizer, too."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MODEL_JSON = ("config.json", "generation_config.json", INDEX)
_TOKENIZER_JSON = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")


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

    Raises `UserError` for what does not exist, is not in one of the two formats, or wants remote code unasked, and
    where the files are damaged, do not hold the whole model and nothing else, or hold NaN or infinity.
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
    refuse_adapter(location, kwargs, key)
    if gguf_file is None:
        _require_safetensors(location, key)
        _refuse_damaged(location, _MODEL_JSON, key)
        kwargs["use_safetensors"] = True
        for file in safetensors_files(Path(location), key):
            header(file, key)
    with as_user_error(location, key), gguf_parsed_once(), _without_load_report():
        if gguf_file is not None:
            gguf_file = gguf_path(location, gguf_file, kwargs, key)
            kwargs = {**configuration_changes(gguf_file, key), **kwargs}
            kwargs |= {"gguf_file": gguf_file, "quantization_config": transformers.GgufConfig(dequantize=True)}
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are refused here, in one line
        model, report = loader.from_pretrained(location, trust_remote_code=trust_remote_code, **kwargs)
        if gguf_file is not None:
            report["unexpected_keys"].update(unread_tensors(model, gguf_file, key))
    _refuse_differences(report, location, key)
    if (problem := weights_problem(model)) is not None:
        raise UserError(key, f"{location!r}: {problem}")
    follow_untied_head(model, location)
    return model


def check_headers(model: PreTrainedModel, path: str, key: str) -> None:
    """Raises `UserError` where a folder's safetensors, by their headers, are not all and only the tensors of a model.

    A folder without safetensors passes. model: on the meta device, of the folder's configuration.
    """
    folder = Path(path).expanduser()
    refuse_adapter(str(folder), {}, key)
    _refuse_damaged(str(folder), _MODEL_JSON, key)
    headers = {name: tensor for file in safetensors_files(folder, key) for name, tensor in header(file, key).items()}
    if not headers:
        return
    with as_user_error(str(folder), key, "the weights of "), _without_load_report():
        _, report = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=headers,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _refuse_differences(report, str(folder), key)


def refuse_adapter(location: str, kwargs: Mapping[str, Any], key: str) -> None:
    """Raises `UserError` for a model with an adapter (LoRA, for example), which would be left out."""
    if os.path.isfile(location):
        return
    places = {name: kwargs[name] for name in HUB if name in kwargs}
    with as_user_error(location, key):
        if find_adapter_config_file(location, **places) is None:
            return
    raise UserError(
        key,
        f"{location!r} has an adapter (adapter_config.json), which is not applied here; merge it into the weights "
        "(peft: merge_and_unload, then save_pretrained), or remove it",
    )


def load_tokenizer(
    path: str | os.PathLike[str], *, key: str = "model", trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model named as for `load_model`. Raises `UserError` where there is none."""
    location, gguf_file = _locate(path, kwargs, key)
    if gguf_file is None:
        _refuse_damaged(location, (*_TOKENIZER_JSON, "chat_template.jinja"), key)
    with as_user_error(location, key, "the tokenizer of "), gguf_parsed_once():
        if gguf_file is not None:
            gguf_file = gguf_path(location, gguf_file, kwargs, key)
        return AutoTokenizer.from_pretrained(
            location, gguf_file=gguf_file, trust_remote_code=trust_remote_code, **kwargs
        )


def load_pretrained_config(
    path: str | os.PathLike[str], *, key: str = "model", trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedConfig:
    """The configuration of a model named as for `load_model`, without its weights."""
    location, gguf_file = _locate(path, kwargs, key)
    if gguf_file is None:
        _refuse_damaged(location, ("config.json",), key)
    with as_user_error(location, key, "the configuration of "), gguf_parsed_once():
        if gguf_file is not None:
            gguf_file = gguf_path(location, gguf_file, kwargs, key)
            kwargs = {**configuration_changes(gguf_file, key), "gguf_file": gguf_file, **kwargs}
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
    files = [place] if place.is_file() else [place / "config.json", *sorted(place.glob("*.safetensors"))]
    return files_sha256([file for file in files if file.is_file()])  # what is missing, loading names


def files_sha256(files: Sequence[Path]) -> str:
    """Of names and contents of files, in their order."""
    with ThreadPoolExecutor() as threads:
        named = list(zip((file.name for file in files), threads.map(sha256, files), strict=True))
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


def _refuse_damaged(location: str, names: Sequence[str], key: str) -> None:
    """Raises `UserError` where a file of a folder is there but cannot be read, or is JSON but no object.

    transformers takes some such files as missing, and loads the defaults.
    """
    for file in (Path(location, name) for name in names):
        if not os.path.lexists(file):
            continue
        try:
            content = file.read_text("utf-8")
            if file.suffix == ".json" and not isinstance(json.loads(content), dict):
                raise ValueError("it holds no JSON object")
        except (OSError, ValueError, RecursionError) as error:
            raise damaged(file, error, key) from error


def stored_tensors(path: str | os.PathLike[str], places: Mapping[str, Any], key: str) -> dict[str, Path]:
    """The safetensors file of each tensor of a model that `load_model` has loaded from a folder or a hub id.

    places: of the arguments of `from_pretrained`, those in `HUB`.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        with as_user_error(os.fspath(path), key):
            folder = Path(str(cached_file(os.fspath(path), "config.json", **places))).parent
    return {name: file for file in safetensors_files(folder, key) for name in header(file, key)}


def _refuse_differences(report: Mapping[str, Any], location: str, key: str) -> None:
    """Raises `UserError` where a model and its files differ; a tied head and buffers may be in one of the two only.

    report: of `from_pretrained`, `output_loading_info`.
    """
    missing, unexpected = (sorted(report[name]) for name in ("missing_keys", "unexpected_keys"))
    shapes = [f"{name} {list(found)}, not {list(wanted)}" for name, found, wanted in sorted(report["mismatched_keys"])]
    problems = [
        f"{len(names)} {what} ({first_names(names)})"
        for what, names in (
            ("missing", missing),
            ("that the model does not have", unexpected),
            ("of another shape than its configuration says", shapes),
        )
        if names
    ]
    if problems:
        raise UserError(
            key,
            f"the weights in {location!r} are not those of this model: tensors {'; '.join(problems)}; "
            "download or save it again, with its own config.json",
        )


def follow_untied_head(model: PreTrainedModel, location: str) -> None:
    """Where the configuration ties the head but the files hold another one, it is the files that count.

    transformers leaves such a head untied, but would tie it at the next opportunity: in the student, or once saved.
    """
    if model.get_expanded_tied_weights_keys(all_submodels=True).keys() <= model.all_tied_weights_keys.keys():
        return
    model.config.tie_word_embeddings = False
    logger.warning(
        "%s: its config.json ties the head to the embeddings, but its files hold a head of its own, which is used",
        location,
    )


def _pickled(location: str, key: str, files: str) -> UserError:
    return UserError(
        key,
        f"{location!r} has only pickled weights ({files}), which can run code when read; convert them where you "
        "trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder) writes safetensors",
    )


def _listed(folder: str, suffixes: tuple[str, ...], prefix: str = "") -> str:
    """Names of up to three files of a kind, sorted; empty if there are none."""
    names = sorted(entry.name for entry in Path(folder).iterdir() if entry.suffix in suffixes)
    return prefix + first_names(names) if names else ""


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
def _without_load_report() -> Iterator[None]:
    """Without what transformers logs of differences between a model and its files, of which this module tells."""

    def others(record: logging.LogRecord) -> bool:
        return record.funcName not in ("log_state_dict_report", "tie_weights")

    reports = logging.getLogger("transformers.modeling_utils")
    reports.addFilter(others)
    try:
        yield
    finally:
        reports.removeFilter(others)


@contextmanager
def as_user_error(location: str, key: str, what: str = "") -> Iterator[None]:
    """Turns whatever a library raises while it reads a model's files, or builds what they describe, into a `UserError`.

    That may be anything: a damaged file, a value of another type in a configuration, code of the model's own.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = str(error).strip()
        if "trust_remote_code" in text:
            raise UserError(
                key, f"{location!r} runs code of its own; set trust_remote_code: true if you have read and trust it"
            ) from error
        if "cannot be loaded with `safetensors`" in text:
            raise _pickled(location, key, "no *.safetensors") from error
        if isinstance(error, TypeError) and "unexpected keyword argument" in text:
            raise UserError(key, f"cannot load {location!r}: {text}") from error
        of_hub = "" if os.path.isdir(location) else ", which is no folder here and so taken for a hub id"
        explained = isinstance(error, (OSError, ValueError, ImportError, RuntimeError, SafetensorError)) and text
        line = text.splitlines()[0] if explained else f"{type(error).__name__}: {text}"
        raise UserError(key, f"cannot load {what}{location!r}{of_hub}: {line}") from error
