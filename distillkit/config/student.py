"""`student`: how the teacher is converted into the model that is trained."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from distillkit.config.errors import KeyProblem
from distillkit.config.section import Section

Layout = Literal["hybrid", "front_loaded", "kda_only"]
KVHeads = Literal["expand", "grouped"]


class InitializationConfig(Section):
    """`student.initialization`: initial values of the KDA parameters that have no counterpart in the teacher.

    The defaults are the best of `benchmarks/initialization.py`.
    """

    short_convolution: Literal["linear", "identity", "default"] = Field(
        "linear",
        description="identity: at first no token's queries, keys and values depend on its neighbours; linear: the "
        "same, with queries and keys so small that the SiLU after them is almost linear, which is further from the "
        "teacher at first and closer after some millions of tokens; default: random, as in fla and PyTorch",
    )
    output_scale: Literal["fitted", "default"] = Field(
        "fitted",
        description="fitted: output norm and output gate are fitted so that each channel of the layer's output is "
        "closest to the teacher's (measured on 512 random tokens); default: norm 1, gate half open",
    )
    memory: Literal["attended", "spread"] = Field(
        "attended",
        description="attended: a head's state decays by a factor e over the mean attention distance of the teacher's "
        "head, the geometric mean over 2,048 random tokens (or the teacher's positions, if fewer) whose second half "
        "repeats the first; spread: over 2 tokens in a layer's first head to 256 in its last, log-evenly between",
    )


class StudentConfig(Section):
    """`student`: which layers get another mixer (Kimi Delta Attention), and how it is initialised."""

    mixer: str = Field(
        "kda",
        description="what takes the place of full attention: kda, or a mixer of your own (docs/adding_a_mixer.md)",
    )
    layout: Layout | None = Field(
        "hybrid",
        description="hybrid: every fourth layer keeps full attention; front_loaded: the same number, the first four "
        "and the others spread; kda_only: none. Not together with full_attention_layers",
    )
    full_attention_layers: list[int] | None = Field(
        None, description="the layers (from 0) that keep full attention, instead of a layout"
    )
    kv_heads: KVHeads = Field(
        "expand",
        description="expand: key/value weights are repeated, one per query head; grouped: the teacher's are kept and "
        "their outputs repeated",
    )
    keep_rope: bool = Field(False, description="full-attention layers keep the teacher's rotary embedding")
    seed: int = Field(0, ge=0, description="seed of the random parameters")
    initialization: InitializationConfig = Field(
        default_factory=InitializationConfig, description="initial values of the new KDA parameters"
    )

    @field_validator("full_attention_layers")
    @classmethod
    def check_layers(cls, layers: list[int] | None) -> list[int] | None:
        for position, layer in enumerate(layers or []):
            if layer < 0:
                raise KeyProblem(f"[{position}]", f"layers count from 0, got {layer}")
            if layers is not None and layer in layers[:position]:
                raise KeyProblem(f"[{position}]", f"layer {layer} is named twice")
        return layers

    @model_validator(mode="before")
    @classmethod
    def layers_replace_layout(cls, data: object) -> object:
        if not isinstance(data, dict) or data.get("full_attention_layers") is None:
            return data
        return {"layout": None, **data}

    @model_validator(mode="after")
    def check_one_choice(self) -> Self:
        if self.layout is not None and self.full_attention_layers is not None:
            raise KeyProblem("layout", "full_attention_layers is given too; keep one of the two")
        if self.layout is None and self.full_attention_layers is None:
            raise KeyProblem("layout", "must be one of hybrid, front_loaded, kda_only, or give full_attention_layers")
        return self
