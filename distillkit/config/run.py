"""The YAML of a run: models, data, losses, and the arguments of the trainer."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from distillkit.config.data import DatasetConfig, DatasetSource, move_dataset_keys
from distillkit.config.errors import KeyProblem, did_you_mean, shown
from distillkit.config.lora import LoraConfig
from distillkit.config.losses import ATTENTION_FUNCTIONS, HIDDEN_STATE_FUNCTIONS, LossConfig, align_attention_alone
from distillkit.config.parallel import ParallelConfig
from distillkit.config.phases import PhaseConfig
from distillkit.config.rollouts import RolloutsConfig, check_rollouts
from distillkit.config.run_evaluation import RunEvaluationConfig
from distillkit.config.section import LoadingArguments, PathText, WholeFile
from distillkit.config.student import StudentConfig
from distillkit.config.teacher import TeacherConfig
from distillkit.config.tokens import TokenBudget, check_one_budget
from distillkit.config.training_args import (
    SHARDED_OPTIMIZERS,
    STOCHASTIC_OPTIMIZERS,
    argument_named,
    check_training_args,
    takes_null,
)


def _check_layer_mapping(value: Any) -> Any:
    """`all`, or a list of pairs. Raises `KeyProblem` with the position of a wrong pair."""
    if value is None or value == "all":
        return value
    if not isinstance(value, list) or not value:
        wanted = "must be all, or a list of pairs [student index, teacher index]"
        raise KeyProblem("", f"{wanted}, got {shown(value)}{did_you_mean(str(value), ['all'])}")
    for position, pair in enumerate(value):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(type(each) is int for each in pair):
            wanted = "must be a pair [student index, teacher index] into hidden_states (0 = embeddings)"
            raise KeyProblem(f"[{position}]", f"{wanted}, got {shown(pair)}")
        if min(pair) < 0:
            raise KeyProblem(f"[{position}]", f"indices count from 0 (the embeddings), got {shown(pair)}")
    return [tuple(pair) for pair in value]


LayerMapping = Annotated[Literal["all"] | list[tuple[int, int]] | None, BeforeValidator(_check_layer_mapping)]


def _default_losses() -> list[LossConfig]:
    return [
        LossConfig(function="cross_entropy", weight=0.5),
        LossConfig(function="kl", weight=0.5, temperature=1.0, missing_probability_handling="zero"),
    ]


class RunConfig(WholeFile):
    """One distillation."""

    kind_of_file = "a run"

    project_name: str = Field("distillkit", description="name of the project for trackers")
    model: PathText | None = Field(None, description="the student to train: a folder or hub id; instead of student")
    student: StudentConfig | None = Field(
        None, description="how the teacher is converted into the student first; instead of model"
    )
    teacher: TeacherConfig = Field(
        description="the model that the student learns from; kind: hf (the default for a path), dataset or server"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the student, teacher or tokenizer")
    model_kwargs: LoadingArguments = Field(
        default={}, description="keyword arguments of from_pretrained for the student"
    )
    model_auto_class: str | None = Field(
        "AutoModelForCausalLM", description="the class of transformers that loads the student"
    )
    frozen_modules: list[str] = Field(default=[], description="modules of the student that are not trained, by name")
    frozen_res: list[str] = Field(
        default=[], description="regular expressions; parameters whose name they are found in are not trained"
    )
    output_path: PathText = Field(description="folder for the trained student and its checkpoints")
    use_flash_attention: bool = Field(
        True, description="flash attention on CUDA: the package where it is installed, else PyTorch's own; false: SDPA"
    )
    lora: LoraConfig | None = Field(None, description="trains an adapter of low rank (LoRA) instead of weights")
    sequence_length: int = Field(gt=0, description="tokens per row")
    resize_embeddings_to_multiple_of: int | None = Field(
        None, gt=0, description="the student's embeddings grow to a multiple of this"
    )
    functionary_packing: bool = Field(
        False, description="no effect: packed documents never attend to each other anyway"
    )

    dataset: DatasetConfig = Field(description="the training text")
    rollouts: RolloutsConfig | None = Field(
        None, description="rows that the student writes while it is trained (on-policy distillation)"
    )
    loss_functions: list[LossConfig] = Field(
        default_factory=_default_losses, min_length=1, description="what is minimised: a weighted mean of losses"
    )
    layer_mapping: LayerMapping = Field(
        None, description="layers whose hidden states hs_ losses compare: all, or pairs [student index, teacher index]"
    )
    force_hidden_state_projection: bool = Field(
        False, description="compare hidden states through a learned projection even where widths are equal"
    )
    tokens: TokenBudget = Field(
        None,
        description="length of the training in tokens, without padding: 300M, 1.5B; instead of "
        "training_args.max_steps or num_train_epochs",
    )
    training_args: dict[str, Any] = Field(default={}, description="arguments of transformers' Trainer")
    trained_weights: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="how trained weights are stored: float32, also under training_args.bf16; or bfloat16 with "
        "stochastic rounding: half the memory for weights, gradients and optimizer, and more noise",
    )
    frozen_precision: Literal["float8"] | None = Field(
        None,
        description="float8: linear layers of the student that are frozen, but for the head, compute in it and take "
        "half the memory while others train; what is saved is as without it",
    )
    parallel: ParallelConfig | None = Field(
        None, description="divides models over several GPUs; without it each GPU holds them whole"
    )
    resume: bool = Field(False, description="continue from the last checkpoint in output_path")
    evaluation: RunEvaluationConfig | None = Field(None, description="what is measured before and after")
    phases: list[PhaseConfig] = Field(
        default=[], description="phases, one after another, each from the weights of the one before; what each changes"
    )

    @model_validator(mode="before")
    @classmethod
    def move_keys(cls, data: Any) -> Any:
        """Published configurations have a few keys of `dataset` among the arguments of TRL's trainer."""
        if isinstance(data, dict) and "dataset" not in data:
            return data
        return move_dataset_keys(data)

    @classmethod
    def instead_of(cls, key: str) -> str:
        """Keys that are often written at the top level by mistake."""
        if key in DatasetConfig.model_fields:
            return f"; it is a key of dataset: dataset.{key}"
        if (argument := argument_named(key)) is not None:
            return f"; it is a key of training_args: training_args.{argument}"
        return super().instead_of(key)

    @field_validator("frozen_res")
    @classmethod
    def check_patterns(cls, patterns: list[str]) -> list[str]:
        for position, pattern in enumerate(patterns):
            try:
                re.compile(pattern)
            except re.error as error:
                raise KeyProblem(f"[{position}]", f"{pattern!r} is not a regular expression: {error}") from None
        return patterns

    @field_validator("loss_functions")
    @classmethod
    def check_losses(cls, losses: list[LossConfig]) -> list[LossConfig]:
        names = [loss.name for loss in losses]
        for position, name in enumerate(names):
            if (first := names.index(name)) < position:
                also = f"{name} is given already by loss_functions[{first}]"
                raise KeyProblem(f"[{position}].function", f"{also}; name each loss once")
        if not any(loss.weight for loss in losses):
            raise KeyProblem("", "all weights are 0; at least one must be > 0")
        return losses

    @field_validator("training_args")
    @classmethod
    def check_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        checked = check_training_args(arguments, cls.model_fields)
        return {name: value for name, value in checked.items() if value is not None or takes_null(name)}

    @field_validator("phases")
    @classmethod
    def check_phase_names(cls, phases: list[PhaseConfig]) -> list[PhaseConfig]:
        names = [phase.name for phase in phases]
        for position, name in enumerate(names):
            if (first := names.index(name)) < position:
                raise KeyProblem(f"[{position}].name", f"{name!r} is phases[{first}] already; name each once")
        return phases

    @model_validator(mode="after")
    def check_budget(self) -> Self:
        check_one_budget({"tokens": self.tokens, "training_args": self.training_args})
        return self

    @model_validator(mode="after")
    def check_trained_weights(self) -> Self:
        if self.trained_weights == "float32":
            return self
        if not self.training_args.get("bf16"):
            raise KeyProblem("trained_weights", "bfloat16 needs training_args.bf16: true; set it, or use float32")
        optim = self.training_args.get("optim", STOCHASTIC_OPTIMIZERS[0])
        if optim not in STOCHASTIC_OPTIMIZERS:
            raise KeyProblem(
                "training_args.optim",
                f"{optim} would lose small updates of trained_weights: bfloat16; use trained_weights: float32, or one "
                f"of {', '.join(STOCHASTIC_OPTIMIZERS)}",
            )
        return self

    @model_validator(mode="after")
    def check_frozen_precision(self) -> Self:
        if self.frozen_precision is None:
            return self
        if not self.training_args.get("bf16"):
            raise KeyProblem("frozen_precision", "float8 needs training_args.bf16: true; set it, or remove this")
        if self.parallel is not None:
            raise KeyProblem("frozen_precision", "float8 weights are not divided over GPUs; remove parallel, or this")
        freezes = self.frozen_res or self.frozen_modules or self.lora or align_attention_alone(self.loss_functions)
        if not freezes and not self.phases:
            problem = "float8 is for what is frozen, and all is trained; freeze some by frozen_res, or set it to null"
            raise KeyProblem("frozen_precision", problem)
        return self

    @property
    def in_float8(self) -> dict[str, str]:
        """The keys that ask for products in float8, each with what to do where there are none."""
        keys = {} if self.frozen_precision is None else {"frozen_precision": "remove it"}
        if self.teacher.kind == "hf" and self.teacher.quantization == "float8":
            keys["teacher.quantization"] = "use int8, or remove it"
        return keys

    @model_validator(mode="after")
    def check_parallel(self) -> Self:
        if self.parallel is None:
            return self
        optim = self.training_args.get("optim", SHARDED_OPTIMIZERS[0])
        if optim not in SHARDED_OPTIMIZERS:
            raise KeyProblem(
                "training_args.optim",
                f"{optim} cannot be divided (parallel); use one of {', '.join(SHARDED_OPTIMIZERS)}",
            )
        return self

    @property
    def divides_rows(self) -> bool:
        """Whether several processes share the tokens of each row."""
        return self.parallel is not None and self.parallel.context > 1

    @model_validator(mode="after")
    def check_context(self) -> Self:
        if not self.divides_rows:
            return self
        if self.teacher.kind == "server":
            raise KeyProblem("parallel.context", "a server reads whole rows; use a live or captured teacher, or 1")
        kwargs = {"model_kwargs": self.model_kwargs}
        if self.teacher.kind == "hf":
            kwargs["teacher.kwargs"] = self.teacher.kwargs
            if self.teacher.devices is not None or self.teacher.kwargs.get("device_map") is not None:
                key = "devices" if self.teacher.devices is not None else "kwargs.device_map"
                remedy = "remove it; the teacher works on the GPUs that share its rows"
                raise KeyProblem(f"teacher.{key}", f"cannot be where rows are divided (parallel.context); {remedy}")
        for key, values in kwargs.items():
            if values.get("attn_implementation", "sdpa") != "sdpa":
                raise KeyProblem(
                    f"{key}.attn_implementation", "must be sdpa where rows are divided (parallel.context); remove it"
                )
        return self

    @model_validator(mode="after")
    def check_own_tokenizer(self) -> Self:
        if self.teacher.kind != "hf" or self.teacher.tokenizer is None:
            return self
        others = {
            "student": self.student is not None,
            "rollouts": self.rollouts is not None,
            "parallel.context": self.divides_rows,
        }
        for key, given in others.items():
            if given:
                raise KeyProblem(key, "is not for a teacher with another tokenizer (teacher.tokenizer)")
        for position, loss in enumerate(self.loss_functions):
            if loss.function in ATTENTION_FUNCTIONS or loss.missing_probability_handling == "background":
                what = "attention outputs" if loss.function in ATTENTION_FUNCTIONS else "background"
                problem = f"a teacher with another tokenizer (teacher.tokenizer) has no {what} of the student's tokens"
                raise KeyProblem(f"loss_functions[{position}]", problem)
        return self

    @model_validator(mode="after")
    def check_lora(self) -> Self:
        if self.lora is not None:
            for key in ("frozen_res", "frozen_modules"):
                if getattr(self, key):
                    raise KeyProblem(key, "has no effect with lora, which trains nothing but its adapter; remove one")
            if self.parallel is not None:
                raise KeyProblem("lora", "an adapter is not divided over GPUs; remove parallel, or lora")
        return self

    @model_validator(mode="after")
    def check_rollouts(self) -> Self:
        if self.rollouts is not None:
            functions = [loss.function for loss in self.loss_functions]
            divided = self.parallel is not None
            check_rollouts(self.rollouts, self.sequence_length, self.teacher.kind, functions, divided=divided)
        return self

    @model_validator(mode="after")
    def check_student(self) -> Self:
        if self.model is None and self.student is None:
            raise KeyProblem("model", "is missing: name a student, or give student (how to convert the teacher)")
        if self.student is None:
            return self
        if self.model is not None:
            raise KeyProblem("model", "student is given too; keep one of the two")
        if self.teacher.kind == "hf" and self.teacher.quantization not in (None, "float8"):
            raise KeyProblem(
                "teacher.quantization",
                "the student would be converted from quantised weights; convert the teacher first "
                "(distillkit convert) and name the result in model",
            )
        if self.teacher.kind != "hf":
            raise KeyProblem(
                "student",
                f"converts the teacher, but a teacher of kind: {self.teacher.kind} has no weights; convert it first "
                "(distillkit convert) and name the result in model",
            )
        return self

    @property
    def held_out_text(self) -> tuple[DatasetSource | None, str]:
        """Where held-out text is, if there is any, and the key of the YAML that says so."""
        if self.evaluation is not None and self.evaluation.dataset is not None:
            return self.evaluation.dataset, "evaluation.dataset"
        return self.dataset.eval_dataset, "dataset.eval_dataset"

    @model_validator(mode="after")
    def check_held_out_text(self) -> Self:
        if self.held_out_text[0] is not None:
            return self
        if self.evaluation is not None and not self.evaluation.prompts:
            raise KeyProblem("evaluation.dataset", "is missing: name held-out text here or in dataset.eval_dataset")
        for name, off in (("eval_strategy", "no"), ("eval_on_start", False)):
            if self.training_args.get(name, off) != off:
                raise KeyProblem(f"training_args.{name}", "there is no held-out text; name it in dataset.eval_dataset")
        return self

    @model_validator(mode="after")
    def check_losses_have_inputs(self) -> Self:
        """Each loss that needs more than the teacher's distribution has a teacher that gives it, and a mapping."""
        for position, loss in enumerate(self.loss_functions):
            key, function = f"loss_functions[{position}]", loss.function
            if loss.missing_probability_handling == "background" and (missing := self._missing_for_background()):
                raise KeyProblem(f"{key}.missing_probability_handling", f"background needs {missing}")
            if function in HIDDEN_STATE_FUNCTIONS and self.layer_mapping is None:
                raise KeyProblem("layer_mapping", f"is missing: {key} ({function}) needs all, or pairs")
            if function in (*HIDDEN_STATE_FUNCTIONS, *ATTENTION_FUNCTIONS) and self.teacher.kind != "hf":
                states = "hidden states" if function in HIDDEN_STATE_FUNCTIONS else "attention outputs"
                needs = f"{function} needs a teacher of kind: hf; {self.teacher.kind} has no {states}"
                raise KeyProblem(f"{key}.function", needs)
        return self

    def _missing_for_background(self) -> str | None:
        """What `missing_probability_handling: background` still needs; a captured dataset on disk may bring its own."""
        if self.teacher.kind == "dataset":
            has_one = self.teacher.background is not None or self.dataset.train_dataset.disk_path is not None
            return None if has_one else "teacher.background, for a dataset of the hub has none"
        if self.teacher.top_k is None:
            return "teacher.top_k: of a whole distribution nothing is missing"
        return "teacher.background: a captured dataset that has one" if self.teacher.background is None else None
