"""The YAML of `distillkit evaluate`: models, and a section for each suite that measures them."""

import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from distillkit.config.data import DatasetSource
from distillkit.config.errors import KeyProblem
from distillkit.config.section import LoadingArguments, PathText, Section, WholeFile
from distillkit.config.server import ServerConfig

SUITES = ("divergence", "generation", "benchmarks", "needles", "long_context", "speed")

TEACHER = "teacher"
"""The teacher's name in results, which no student may have."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""The name of a student, which is part of file names."""

NeedleTask = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "niah_multikey_similar",
]

OWN_TASK = "niah_multikey_similar"
"""Not one of RULER's."""

ESSAY_TASKS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery", OWN_TASK)
"""Tasks that hide needles in prose; the others generate their haystack (Hsieh et al. 2024, arXiv 2404.06654)."""


def _ascending(values: list[int]) -> list[int]:
    if sorted(set(values)) != values:
        raise ValueError(f"must ascend, each number once; got {values}")
    return values


Positive = Annotated[int, Field(gt=0)]
Lengths = Annotated[list[Positive], Field(min_length=1), AfterValidator(_ascending)]
"""Numbers of tokens, in ascending order."""


def _with_url(server: Any) -> Any:
    """An address alone is the server's `url`."""
    return {"url": server} if isinstance(server, str) else server


class ModelConfig(Section):
    """A model to be measured."""

    path: PathText = Field(description="a folder (of a model, a run, or a checkpoint), a hub id or a .gguf file")
    kwargs: LoadingArguments = Field(
        default={}, description="keyword arguments of from_pretrained: dtype, gguf_file, revision, device_map, ..."
    )
    trained_length: int | None = Field(
        None,
        gt=0,
        description="sequence length that it was trained with, marked in the report; by default that of its run, else "
        "the model's max_position_embeddings",
    )
    server: Annotated[
        ServerConfig | None, BeforeValidator(_with_url, json_schema_input_type=str | ServerConfig | None)
    ] = Field(
        None,
        description="OpenAI-compatible server that answers for the model (its url, or url and more): benchmarks are "
        "measured through it, with the tokenizer of path",
    )


class DivergenceConfig(Section):
    """`divergence`: how far each student is from the teacher on a text."""

    dataset: DatasetSource = Field(description="held-out text: repo_id or disk_path")
    text_field: str = Field("text", description="column that holds the text")
    num_tokens: int = Field(16384, gt=0, description="tokens that are measured")
    sequence_length: int = Field(2048, gt=0, description="tokens per row; longer documents are split")
    seed: int | None = Field(42, ge=0, description="seed of the order of documents; null keeps their order")
    position_buckets: Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(_ascending)] = Field(
        default=[0, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536],
        min_length=1,
        description="positions in the document at which a bucket begins; each ends where the next begins",
    )
    layers: bool = Field(
        True, description="compare the hidden states of each layer, where both models have equally many"
    )


class GenerationSuiteConfig(Section):
    """`generation`: what models write, teacher beside student, and whether answers have the format asked for."""

    dataset: DatasetSource = Field(description="held-out text whose documents begin the prompts: repo_id or disk_path")
    text_field: str = Field("text", description="column that holds the text")
    samples: int = Field(64, gt=0, description="prompts, each continued greedily and by sampling")
    prompt_tokens: int = Field(64, gt=0, description="tokens of a prompt, the first of a document")
    new_tokens: int = Field(128, gt=0, description="tokens of a continuation, unless the text ends before")
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="temperature of sampling")
    seed: int = Field(42, ge=0, description="seed of the choice of prompts, of sampling and of the order of options")
    batch_size: int = Field(16, gt=0, description="prompts per batch")
    questions: DatasetSource | None = Field(
        None,
        description="multiple-choice questions, with the columns question, choices and answer (or answerKey, as ARC): "
        "repo_id or disk_path",
    )
    num_questions: int = Field(200, gt=0, description="questions that are asked")
    num_fewshot: int = Field(3, ge=0, description="questions with their answers before each question")


class BenchmarksConfig(Section):
    """`benchmarks`: tasks of the LM Evaluation Harness."""

    tasks: list[str] = Field(min_length=1, description="names of tasks: hellaswag, arc_challenge, mmlu, gsm8k, ...")
    include_path: list[PathText] = Field(default=[], description="folders with tasks of your own, as YAML")
    data: PathText | None = Field(
        None, description="folder of JSON-lines files that lm-eval's tasks read instead of the hub's datasets"
    )
    num_fewshot: int | None = Field(None, ge=0, description="examples before each question; the task's own by default")
    batch_size: int = Field(8, gt=0, description="samples per batch")
    share_contexts: bool = Field(
        True, description="read a context once for all options of a question; false: in lm-eval's own batches"
    )
    apply_chat_template: bool = Field(False, description="format questions with the model's chat template")
    seed: int = Field(1234, ge=0, description="seed of the choice of examples, and of sampling")


class NeedlesConfig(Section):
    """`needles`: retrieval from long texts, by length and depth (RULER's NIAH tasks)."""

    tasks: list[NeedleTask] = Field(
        default=[task for task in get_args(NeedleTask) if task != OWN_TASK],
        min_length=1,
        description=f"RULER's names of the tasks, all by default; and {OWN_TASK}, with keys like the one asked for",
    )
    lengths: Lengths = Field(description="tokens of a prompt, such as [1024, 2048, 4096]")
    depths: int = Field(5, gt=0, description="positions of a needle, evenly from the beginning of the text to its end")
    samples: int = Field(4, gt=0, description="prompts for each length and depth")
    haystack: DatasetSource | None = Field(None, description="prose that hides the needles: repo_id or disk_path")
    seed: int = Field(42, ge=0, description="seed of keys, values and text")
    batch_size: int = Field(
        8,
        gt=0,
        description="prompts per batch, all of one length; their KV cache must fit into memory",
    )
    prefill_tokens: int = Field(8192, gt=0, description="tokens per step of the prefill, of all prompts of a batch")

    @model_validator(mode="after")
    def check_haystack(self) -> Self:
        if self.haystack is None and (wanting := [task for task in self.tasks if task in ESSAY_TASKS]):
            others = "niah_single_1, niah_multikey_2 and niah_multikey_3"
            raise KeyProblem(
                "haystack", f"is missing: {wanting[0]} hides its needles in prose (only {others} need none)"
            )
        return self


class LongContextConfig(Section):
    """`long_context`: what a long text tells a model: documents by position, last words of passages by distance."""

    dataset: DatasetSource = Field(
        description="text with long documents, which also lies between the parts of passages: repo_id or disk_path"
    )
    text_field: str = Field("text", description="column that holds the text")
    documents: int = Field(8, gt=0, description="documents that are read")
    length: int = Field(8192, gt=1, description="tokens of a document that are read; shorter documents are left out")
    position_buckets: Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(_ascending)] = Field(
        default=[0, 1024, 2048, 4096, 8192, 16384, 32768],
        min_length=1,
        description="positions in the document at which a bucket begins; each ends where the next begins",
    )
    kl: bool = Field(
        True, description="compare students with the teacher at each position; false where memory holds one model only"
    )
    passages: DatasetSource | None = Field(
        None,
        description="passages of which the last word is asked, with the column text (LAMBADA): repo_id or disk_path",
    )
    num_passages: int = Field(200, gt=0, description="passages that are asked")
    distances: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_ascending)] = Field(
        default=[0, 256, 1024, 4096], description="tokens of other text between a passage's beginning and its end"
    )
    seed: int = Field(42, ge=0, description="seed of the choice of documents and passages, and of the text between")
    batch_size: int = Field(8, gt=0, description="passages per batch")
    prefill_tokens: int = Field(2048, gt=0, description="tokens that are read at a time, of all rows of a batch")

    @model_validator(mode="after")
    def check_buckets(self) -> Self:
        if self.position_buckets[0] >= self.length:
            raise KeyProblem(
                "position_buckets", f"must begin before length, {self.length}; got {self.position_buckets}"
            )
        return self


class SpeedConfig(Section):
    """`speed`: tokens per second and memory against the length of the context."""

    contexts: Lengths = Field(default=[256, 1024, 4096, 8192], description="tokens in the cache at the beginning")
    decode_tokens: int = Field(32, gt=0, description="tokens that are generated")
    repeats: int = Field(3, gt=0, description="measurements of each; the median counts")
    batch_size: int = Field(1, gt=0, description="sequences at a time")
    prefill_tokens: int = Field(8192, gt=0, description="tokens of a prompt per step of the prefill")


class EvaluateConfig(WholeFile):
    """One evaluation: models and suites."""

    kind_of_file = "an evaluation"

    output_path: PathText = Field(description="folder for results.json and for intermediate results")
    teacher: ModelConfig | None = Field(None, description="the teacher, with which students are compared")
    students: dict[str, ModelConfig] = Field(default={}, description="students, by name")
    trust_remote_code: bool = Field(False, description="run code that comes with the models")
    decoding: Literal["graph", "eager"] = Field(
        "graph",
        description="graph: on CUDA, tokens are written with a static cache, each step one CUDA graph, which "
        "takes torch.compile about a minute for each model; eager: without, and each token takes several times as "
        "long",
    )
    limit: int | None = Field(None, gt=0, description="maximum number of samples of each task, and of rows of text")
    smoke: bool = Field(
        False, description="try everything on two samples of the shortest length; results go to smoke in output_path"
    )
    divergence: DivergenceConfig | None = Field(None, description="how far students are from the teacher")
    generation: GenerationSuiteConfig | None = Field(
        None, description="what models write, and the format of their answers"
    )
    benchmarks: BenchmarksConfig | None = Field(None, description="tasks of the LM Evaluation Harness")
    needles: NeedlesConfig | None = Field(None, description="retrieval from long texts")
    long_context: LongContextConfig | None = Field(None, description="what a long text tells a model")
    speed: SpeedConfig | None = Field(None, description="tokens per second and memory")

    @field_validator("students", mode="before")
    @classmethod
    def without_null(cls, students: Any) -> Any:
        """A student that is null is not given."""
        return (
            {name: each for name, each in students.items() if each is not None}
            if isinstance(students, dict)
            else students
        )

    @model_validator(mode="after")
    def check_models(self) -> Self:
        if self.teacher is None and not self.students:
            raise KeyProblem("students", "is missing: name a student with its path, a teacher, or both")
        for name in self.students:
            if name == TEACHER:
                raise KeyProblem(f"students.{name}", "is the teacher's name in results; choose another")
            if not NAME.fullmatch(name):
                raise KeyProblem(
                    f"students.{name}", "must be a name of letters, digits, points, - and _; it becomes a file's name"
                )
        for key, model in self.models().items():
            if model.server is not None and self.benchmarks is None:
                raise KeyProblem(f"{key}.server", "has no effect: only benchmarks are measured through a server")
        return self

    def models(self) -> dict[str, ModelConfig]:
        """The teacher and the students, by their key in the YAML."""
        teacher = {} if self.teacher is None else {TEACHER: self.teacher}
        return {**teacher, **{f"students.{name}": student for name, student in self.students.items()}}

    @model_validator(mode="after")
    def check_suites(self) -> Self:
        if all(getattr(self, suite) is None for suite in SUITES):
            raise KeyProblem(SUITES[0], f"is missing: give at least one of {', '.join(SUITES)} with its keys")
        if self.divergence is not None:
            for key, given in (("teacher", self.teacher), ("students", self.students)):
                if not given:
                    raise KeyProblem(key, "is missing: divergence compares students with a teacher")
        return self
