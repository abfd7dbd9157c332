"""`teacher`: the model that the student learns from, of one of three kinds."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from distillkit.config.compression import LegacyLogitCompressionConfig, LogprobCompressorConfig
from distillkit.config.errors import KeyProblem
from distillkit.config.section import LoadingArguments, PathText, Section
from distillkit.config.server import ServerConfig

_BACKGROUND = (
    "the distribution of the probability that a sparse teacher does not list: a captured dataset, or its "
    "background.safetensors; for missing_probability_handling: background"
)


Quantization = Literal["int8", "float8", "bitsandbytes_8bit", "bitsandbytes_4bit"]

PACKAGE_OF = {"int8": "torchao", "bitsandbytes_8bit": "bitsandbytes", "bitsandbytes_4bit": "bitsandbytes"}
"""That quantises; float8 needs none."""


class HFTeacherConfig(Section):
    """A model that runs beside the student."""

    kind: Literal["hf"] = Field("hf", description="hf: a model that runs beside the student")
    path: PathText = Field(description="the teacher: a folder, a hub id or a .gguf file")
    kwargs: LoadingArguments = Field(
        default={},
        description="keyword arguments of from_pretrained: attn_implementation, dtype (or torch_dtype), gguf_file, "
        "revision, device_map, ...",
    )
    quantization: Quantization | None = Field(
        None,
        description="weights of the linear layers, but for the head, are quantised: float8 (products are float8, too), "
        "int8 (by torchao), bitsandbytes_8bit, bitsandbytes_4bit",
    )
    offload: Literal["cpu"] | None = Field(
        None, description="cpu: layers lie in the CPU's memory, and each is on the GPU while it computes"
    )
    devices: list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        min_length=1,
        description="numbers of the GPUs that hold the teacher alone, layer after layer; processes share them equally",
    )
    tokenizer: Literal["own"] | None = Field(
        None,
        description="own: the teacher reads the text by its own tokenizer, which is not the student's, and is compared "
        "where tokens of both are the same; needs top_k",
    )
    top_k: int | None = Field(None, gt=0, description="use only the teacher's k most probable tokens")
    background: PathText | None = Field(None, description=_BACKGROUND)

    @model_validator(mode="after")
    def check_quantization(self) -> Self:
        if self.quantization is None:
            return self
        for name in ("quantization_config", "load_in_8bit", "load_in_4bit"):
            if name in self.kwargs:
                raise KeyProblem("quantization", f"kwargs.{name} is given too; keep one of the two")
        if self.quantization != "float8" and (self.path.endswith(".gguf") or "gguf_file" in self.kwargs):
            raise KeyProblem("quantization", "is not for GGUF files, which are loaded as ordinary weights; remove it")
        return self

    @model_validator(mode="after")
    def check_offload(self) -> Self:
        if self.offload is not None:
            if self.quantization is not None:
                raise KeyProblem("offload", "quantised weights stay on the GPU; keep one of offload and quantization")
            if "device_map" in self.kwargs:
                raise KeyProblem("offload", "kwargs.device_map places the layers already; keep one of the two")
        return self

    @model_validator(mode="after")
    def check_tokenizer(self) -> Self:
        if self.tokenizer is not None:
            if self.top_k is None:
                raise KeyProblem("top_k", "is missing: how many of the tokens that both models have are compared")
            if self.background is not None:
                raise KeyProblem("background", "is over the student's tokens, and tokenizer: own has others; remove it")
        return self

    @model_validator(mode="after")
    def check_devices(self) -> Self:
        if self.devices is not None:
            if len(set(self.devices)) < len(self.devices):
                raise KeyProblem("devices", f"{self.devices} names a GPU twice")
            for name, given in (("offload", self.offload), ("kwargs.device_map", self.kwargs.get("device_map"))):
                if given is not None:
                    raise KeyProblem("devices", f"{name} places the layers, too; keep one of the two")
        return self


class DatasetTeacherConfig(Section):
    """The captured outputs of a teacher, stored beside the tokens of the training dataset.

    A dataset of `distillkit capture` contains its format. For other datasets the format is given here; without any,
    the columns token_ids and top_values are read as they are.
    """

    model_config = ConfigDict(json_schema_extra={"required": ["kind"]})

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


class ServerTeacherConfig(ServerConfig):
    """A model behind an OpenAI-compatible server that gives log-probabilities of prompts, as vLLM's does."""

    model_config = ConfigDict(json_schema_extra={"required": ["kind", "url", "top_k"]})

    kind: Literal["server"] = Field("server", description="server: a model that a running server answers for")
    model: str | None = Field(
        None, min_length=1, description="name under which it is served; by default the only one that is"
    )
    top_k: int = Field(
        gt=0, description="the teacher's k most probable tokens are asked for; vLLM gives --max-logprobs, by default 20"
    )
    vocab_size: int | None = Field(
        None, gt=0, description="size of the teacher's vocabulary; by default that of the student's tokenizer"
    )
    background: PathText | None = Field(None, description=_BACKGROUND)
    steps_ahead: int = Field(
        1, ge=0, description="optimizer steps whose requests are sent before the training comes to them"
    )
    patience: int = Field(
        600, ge=0, description="seconds for which a request is tried again where the server does not answer"
    )


def with_kind(teacher: Any) -> Any:
    """A teacher with a `path` and no `kind` is a model: `kind: hf`."""
    if isinstance(teacher, Mapping) and "path" in teacher and teacher.get("kind") is None:
        return {**teacher, "kind": "hf"}
    return teacher


TeacherConfig = Annotated[
    Annotated[HFTeacherConfig | DatasetTeacherConfig | ServerTeacherConfig, Field(discriminator="kind")],
    BeforeValidator(with_kind),
]
