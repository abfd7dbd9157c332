"""`lora`: an adapter of low rank is trained instead of weights."""

from pydantic import Field, field_validator

from distillkit.config.errors import KeyProblem
from distillkit.config.section import Section

WHOLE = ("embed_tokens", "lm_head")
"""Modules whose weights are used without calling them, so that an adapter on them would have no effect."""


class LoraConfig(Section):
    """LoRA (Hu et al. 2021, arXiv 2106.09685): weight + alpha / rank · B A, of which only A and B are trained."""

    rank: int = Field(16, gt=0, description="rank of the adapter's matrices")
    alpha: float = Field(32.0, gt=0, description="the adapter's output is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the adapter's inputs that are dropped in training")
    target_modules: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        min_length=1,
        description="names of the linear layers that get an adapter, as q_proj or mlp.up_proj",
    )

    @field_validator("target_modules")
    @classmethod
    def check_target_modules(cls, names: list[str]) -> list[str]:
        for index, name in enumerate(names):
            if name.rpartition(".")[2] in WHOLE:
                raise KeyProblem(f"[{index}]", f"the losses read the weight of {name} itself; name others")
        return names
