"""vLLM's own classes on a CPU: its kernels by Triton's interpreter, one process, softmax attention in plain PyTorch.

Import it before anything else imports triton or vLLM.
"""

import os
import sys

os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_LOGGING_LEVEL": "ERROR"}

import torch
import torch.nn.functional as F
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import KernelInterface
from vllm.config import (
    CacheConfig,
    CompilationConfig,
    DeviceConfig,
    LoadConfig,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fla.ops import chunk_delta_h
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.network_utils import get_open_port
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder

import distillkit.serving.vllm_layer  # noqa: F401  with the kernels that are changed below
from distillkit.serving.vllm_plugin import register

register()
type(current_platform).get_attn_backend_cls = classmethod(
    lambda *args, **kwargs: "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
)
for name, module in [*sys.modules.items()]:
    if name.startswith("vllm.") and hasattr(module, "PIN_MEMORY"):
        module.PIN_MEMORY = False
STATES = 8


def _let_grids_give_tensors():
    """vLLM's convolution hands tensors to its kernel while it says its grid, which Triton's interpreter passes over."""
    init = interpreter.GridExecutor.__init__

    def init_with_grid(self, fn, arg_names, grid, *args):
        def sized(given):
            shape = grid(given) if callable(grid) else grid
            given |= {name: interpreter._implicit_cvt(x) for name, x in given.items() if isinstance(x, torch.Tensor)}
            return shape

        init(self, fn, arg_names, sized, *args)

    interpreter.GridExecutor.__init__ = init_with_grid


_let_grids_give_tensors()


def _let_kernels_be_interpreted():
    """Take the first variant of those that Triton would measure on a GPU; look functions up when they are called."""
    modules = [module for name, module in sys.modules.items() if ".fla.ops" in name]
    for module in modules:
        for function in {"exp", "exp2", "log"} & {*vars(module)}:
            setattr(module, function, lambda x, function=function: getattr(tl, function)(x))
        for kernel in [*vars(module).values()]:
            while isinstance(kernel, KernelInterface) and hasattr(kernel, "fn"):
                if hasattr(kernel, "configs"):
                    kernel.configs = kernel.configs[:1]
                kernel = kernel.fn


_let_kernels_be_interpreted()
chunk_delta_h.range = lambda *bounds: map(interpreter._implicit_cvt, range(*bounds))  # it asks its counter for a dtype


def configuration(folder, **options):
    """vLLM's whole configuration for a student's folder."""
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, **options)
    return VllmConfig(
        model_config=model,
        cache_config=CacheConfig(block_size=16, enable_prefix_caching=False),
        compilation_config=CompilationConfig(custom_ops=["none"]),  # those of vLLM in C++ need a GPU
        device_config=DeviceConfig("cpu"),
        load_config=LoadConfig(device="cpu"),
    )


class Server:
    """A student as vLLM builds it, stepped by hand; a sequence's number is its place in the cache."""

    def __init__(self, folder, weights):
        self.config = configuration(folder)
        with set_current_vllm_config(self.config), set_default_torch_dtype(torch.float32):
            if not torch.distributed.is_initialized():
                init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, backend="gloo")
                initialize_model_parallel(1, 1)
            self.model = initialize_model(self.config)
        loaded = self.model.load_weights(weights.items())
        assert loaded == {name for name, _ in self.model.named_parameters()}
        self.layers = self.config.compilation_config.static_forward_context
        self.seen = [0] * STATES
        self.kda = [name for name in self.layers if not name.endswith(".attn")]
        for name in self.kda:
            shapes = zip(self.layers[name].get_state_shape(), self.layers[name].get_state_dtype(), strict=True)
            # as vLLM's cache is: with what was there before
            self.layers[name].kv_cache = tuple(
                torch.full((STATES, *shape), 7.0, dtype=dtype) for shape, dtype in shapes
            )
        for layer in self.model.teacher.model.layers:
            if hasattr(layer.self_attn, "attn"):
                layer.self_attn.attn = _SoftmaxAttention(layer.self_attn.attn, self)

    @torch.no_grad()
    def step(self, **sequences):
        """Logits of each token; decoding sequences (one token) come first, as vLLM sorts them."""
        self.batch = {int(name[1:]): ids for name, ids in sequences.items()}
        lengths = torch.tensor([len(ids) for ids in self.batch.values()], dtype=torch.int32)
        starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        seen = torch.tensor([self.seen[number] for number in self.batch], dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=seen + lengths,
            num_reqs=len(lengths),
            num_actual_tokens=int(lengths.sum()),
            max_query_len=int(lengths.max()),
            max_seq_len=int((seen + lengths).max()),
            block_table_tensor=torch.tensor([[number] for number in self.batch], dtype=torch.int32),
            slot_mapping=torch.zeros(int(lengths.sum()), dtype=torch.int64),
        )
        metadata = {}
        if self.kda:
            with set_current_vllm_config(self.config):
                spec = self.layers[self.kda[0]].get_kv_cache_spec(self.config)
                builder = GDNAttentionMetadataBuilder(spec, self.kda, self.config, torch.device("cpu"))
                metadata = dict.fromkeys(self.kda, builder.build(0, common))
        ids = torch.cat(list(self.batch.values()))
        positions = torch.cat([torch.arange(len(x)) + self.seen[number] for number, x in self.batch.items()])
        with set_current_vllm_config(self.config), set_forward_context(metadata, self.config, num_tokens=len(ids)):
            logits = self.model.compute_logits(self.model(ids, positions))
        for number, x in self.batch.items():
            self.seen[number] += len(x)
        return logits.split(lengths.tolist())


class _SoftmaxAttention(torch.nn.Module):
    """In the place of vLLM's `Attention`, whose kernels need a GPU."""

    def __init__(self, attention, server):
        super().__init__()
        self.shape, self.scale, self.window = attention.head_size, attention.impl.scale, attention.sliding_window
        self.server, self.past = [server], {}

    def forward(self, query, key, value):
        outputs = []
        lengths = [len(ids) for ids in self.server[0].batch.values()]
        for number, *new in zip(self.server[0].batch, *(x.split(lengths) for x in (query, key, value)), strict=True):
            q, k, v = (x.unflatten(-1, (-1, self.shape)).transpose(0, 1) for x in new)
            if self.server[0].seen[number]:
                k, v = (torch.cat(both, 1) for both in zip(self.past[number], (k, v), strict=True))
            self.past[number] = k, v
            distance = torch.arange(k.shape[1]) - (torch.arange(q.shape[1]) + k.shape[1] - q.shape[1]).unsqueeze(1)
            mask = (distance <= 0) & (distance > -(self.window or k.shape[1]))
            mixed = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale, enable_gqa=True)
            outputs.append(mixed.transpose(0, 1).flatten(-2))
        return torch.cat(outputs)
