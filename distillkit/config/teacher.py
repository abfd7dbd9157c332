"""`teacher`: whom the student learns from. `kind` says which of three it is."""

from typing import Literal, Self

from pydantic import Field, model_validator

from distillkit.config.compression import LegacyLogitCompressionConfig, LogprobCompressorConfig
from distillkit.config.errors import KeyProblem
from distillkit.config.section import AnyMapping, PathText, Section

_BACKGROUND = (
    "the distribution that what is missing of a sparse teacher follows: a captured dataset, or its "
    "background.safetensors; for missing_probability_handling: background"
)


class HFTeacherConfig(Section):
    """A model that runs beside the student."""

    kind: Literal["hf"] = Field("hf", description="hf: a model that runs beside the student")
    path: PathText = Field(description="the teacher: a folder, a hub id or a .gguf file")
    kwargs: AnyMapping = Field(
        default={},
        description="keyword arguments of from_pretrained: attn_implementation, dtype (or torch_dtype), gguf_file, "
        "revision, device_map, ...",
    )
    top_k: int | None = Field(None, gt=0, description="only the teacher's k most probable tokens are learnt from")
    background: PathText | None = Field(None, description=_BACKGROUND)


class DatasetTeacherConfig(Section):
    """The captured outputs of a teacher, stored beside the tokens of the training dataset.

    A dataset that `distillkit capture` made says itself how. Of others the format is given here; without any, the
    columns token_ids and top_values are read as they are.
    """

    kind: Literal["dataset"] = Field(
        "dataset", description="dataset: captured outputs; their tokens are the training dataset"
    )
    logprob_compressor: LogprobCompressorConfig | None = Field(None, description="how the outputs are compressed")
    legacy_logit_compression: LegacyLogitCompressionConfig | None = Field(
        None, description="how the outputs are compressed, in the older format"
    )
    vocab_size: int | None = Field(None, gt=0, description="size of the teacher's vocabulary")
    background: PathText | None = Field(None, description=f"{_BACKGROUND}; the training dataset's own by default")

    @model_validator(mode="after")
    def check_one_format(self) -> Self:
        if self.logprob_compressor and self.legacy_logit_compression:
            raise KeyProblem("legacy_logit_compression", "logprob_compressor is given too; keep one of the two")
        return self


class VLLMTeacherConfig(Section):
    """A teacher served by vLLM: a server that runs already (`base_url`), or one to be started (`model_path`)."""

    kind: Literal["vllm"] = Field("vllm", description="vllm: a model that vLLM serves")
    top_k: int = Field(gt=0, description="log-probabilities asked for per token")

    base_url: str | None = Field(None, description="address of a running server, such as http://localhost:8000")
    model: str | None = Field(None, description="the server's name of the model")
    api_key: str | None = Field(None, repr=False, description="key of the server")
    timeout: float = Field(120.0, gt=0, description="seconds until a request is given up")
    max_retries: int = Field(3, ge=0, description="how often a failed request is sent again")

    model_path: PathText | None = Field(None, description="the teacher to start: a folder or hub id")
    teacher_gpu_ids: list[int] | None = Field(None, description="GPUs of the teacher, apart from the student's")
    tensor_parallel_size: int = Field(1, gt=0, description="GPUs that share each layer")
    dtype: str | None = Field("bfloat16", description="type of the teacher's weights")
    quantization: str | None = Field(None, description="vLLM's name of a quantisation")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of GPU memory that vLLM may take")
    max_model_len: int | None = Field(None, gt=0, description="longest sequence in tokens")
    trust_remote_code: bool = Field(False, description="run code that comes with the teacher")
    cache_size_mb: int = Field(2048, gt=0, description="cache of outputs in MB")
    request_timeout_sec: float = Field(60.0, gt=0, description="seconds until a request is given up")

    @model_validator(mode="after")
    def check_one_way(self) -> Self:
        if (self.base_url is None) == (self.model_path is None):
            raise KeyProblem("base_url", "give either base_url (a running server) or model_path (a teacher to start)")
        if self.base_url is not None and self.model is None:
            raise KeyProblem("model", "is missing: the server's name of the model")
        return self
