"""A model too large for memory: it lies on the meta device, and its tensors, or rows of them, are read from its files.

Streamed, each part is read when it is called: a decoder layer is in memory while it runs, and so is any other module
with weights of its own. The forward pass is that of transformers, so whatever a model computes, it computes here.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distillkit.config.errors import UserError
from distillkit.models.finite import is_finite, not_finite
from distillkit.models.gguf_files import HUB
from distillkit.models.loading import (
    follow_untied_head,
    load_model,
    load_pretrained_config,
    stored_tensors,
)
from distillkit.models.safetensors_files import read_tensor

RENAMED = "its weights are renamed or joined as they are loaded"


class StoredModel:
    """A model on the meta device whose tensors are in safetensors files.

    Args:
        files: where each tensor is, by its name in the model. Tied ones may be there once.
        write: what becomes of a tensor that was changed in memory; by default nothing.
        check: looks at each tensor that is read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        files: Mapping[str, Path],
        write: Callable[[str, Tensor], None] | None = None,
        check: Callable[[str, range | None, Tensor], None] | None = None,
    ) -> None:
        self.model = model
        self._write, self._check = write, check
        self._paths = {each: path for path, each in model.named_modules()}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        main_names = {id(tensor): name for name, tensor in parameters.items() if name in files}
        tied = {name: main_names[id(tensor)] for name, tensor in parameters.items() if id(tensor) in main_names}
        self.names: dict[str, str] = {**{name: name for name in files}, **tied}
        """Of each tensor that can be read: its name in the files, which is another one for a tied head."""
        self._files = files

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """A tensor of the files in the model's dtype, on the CPU; or some of its rows."""
        owner, _, attribute = name.rpartition(".")
        dtype, source = getattr(self.model.get_submodule(owner), attribute).dtype, self.names[name]
        tensor = read_tensor(self._files[source], source, rows).to(dtype)
        if self._check is not None:
            self._check(source, rows, tensor)
        return tensor

    @contextmanager
    def in_memory(self, part: nn.Module) -> Iterator[None]:
        """Within it, the tensors of a part of the model are in memory; afterwards on the meta device again."""
        on_meta = part.state_dict()
        if not any(tensor.is_meta for tensor in on_meta.values()):
            yield
            return
        path = self._paths[part]
        stored = {name: f"{path}.{name}" for name in on_meta if f"{path}.{name}" in self.names}
        part.load_state_dict({name: self.read(of) for name, of in stored.items()}, strict=False, assign=True)
        try:
            yield
            if self._write is not None:
                for name, tensor in part.state_dict().items():
                    self._write(f"{path}.{name}", tensor)
        finally:
            part.load_state_dict(on_meta, assign=True)


def open_stored(
    path: str | os.PathLike[str],
    *,
    key: str,
    trust_remote_code: bool,
    auto_class: str = "AutoModelForCausalLM",
    **kwargs: Any,
) -> StoredModel | str:
    """A model named as for `load_model`, with its checks, that is not in memory, but for buffers that no file holds.

    Or why it has to be loaded whole: GGUF files, quantised weights, weights that transformers renames or joins when it
    loads them (experts), and `kwargs` that say more than where the model is, its dtype and its attention.

    Raises `UserError` as `load_model` does; for NaN and infinity when they are read.
    """
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if "gguf_file" in kwargs or os.fspath(path).endswith(".gguf"):
        return "it is a GGUF file"
    if asked := kwargs.keys() - {"dtype", "torch_dtype", "attn_implementation", *HUB}:
        return f"{', '.join(sorted(asked))} asked for it"
    places = {name: kwargs[name] for name in HUB if name in kwargs}
    config = load_pretrained_config(path, key=key, trust_remote_code=trust_remote_code, **places)
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised"
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "auto_class": auto_class, **kwargs}
    model = load_model(path, key=key, device_map="meta", **options)
    stored = StoredModel(model, stored_tensors(path, places, key), check=_finite(os.fspath(path), key))
    _tie_equal(model, stored, os.fspath(path))
    if any(name not in stored.names for name, _ in model.named_parameters()):
        return RENAMED
    _fill_buffers(model, stored)
    return stored


def open_streamed(
    path: str | os.PathLike[str], *, key: str, trust_remote_code: bool, on_layer: Callable[[], object], **kwargs: Any
) -> StoredModel | str:
    """`open_stored`, of a model that can be run on the CPU: its parts are read when they are called.

    on_layer: is called after each call of a decoder layer.
    """
    stored = open_stored(path, key=key, trust_remote_code=trust_remote_code, **kwargs)
    if isinstance(stored, str):
        return stored
    model = stored.model
    layers, head = getattr(model.get_decoder(), "layers", None), model.get_output_embeddings()
    if not isinstance(layers, nn.ModuleList) or not isinstance(head, nn.Linear):
        return RENAMED
    inside = {module for layer in layers for module in layer.modules()}
    others = [each for each in model.modules() if each not in inside and dict(each.named_parameters(recurse=False))]
    if any(dict(module.named_children()) for module in others):
        return "it has weights outside of its layers, embeddings, norms and head"
    for layer in layers:
        _stream(layer, stored, on_layer)
    for module in others:
        _stream(module, stored)
    return stored


def _tie_equal(model: PreTrainedModel, stored: StoredModel, location: str) -> None:
    """Where the files hold both of two tied tensors, they are one if they are equal; on meta nobody has looked."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if stored.names.get(target) == target and stored.names.get(source) == source:
            if torch.equal(stored.read(target), stored.read(source)):
                model.tie_weights()
            else:
                model.all_tied_weights_keys.pop(target)
    follow_untied_head(model, location)


def _stream(module: nn.Module, stored: StoredModel, then: Callable[[], object] | None = None) -> None:
    """Have a module in memory while it is called."""
    running: list[AbstractContextManager[None]] = []

    def before(*_: Any) -> None:
        within = stored.in_memory(module)
        within.__enter__()
        running.append(within)

    def after(*_: Any) -> None:
        if running:  # it may have failed before
            running.pop().__exit__(None, None, None)
        if then is not None:
            then()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


@torch.no_grad()
def _fill_buffers(model: PreTrainedModel, stored: StoredModel) -> None:
    """Compute what no file holds (rotary frequencies), as `from_pretrained` does."""
    in_files = model.state_dict().keys() & stored.names.keys()
    for prefix, module in model.named_modules():
        computed = {name: each for name, each in module.named_buffers(prefix, recurse=False) if name not in in_files}
        for name, buffer in computed.items():
            setattr(module, name.rpartition(".")[2], torch.empty_like(buffer, device="cpu"))
        if computed:
            model._init_weights(module)


def _finite(location: str, key: str) -> Callable[[str, range | None, Tensor], None]:
    checked: set[tuple[str, range | None]] = set()

    def check(name: str, rows: range | None, tensor: Tensor) -> None:
        if (name, rows) not in checked and not is_finite(tensor):
            raise UserError(key, f"{location!r}: {not_finite([name], tensor.dtype)}")
        checked.add((name, rows))

    return check
