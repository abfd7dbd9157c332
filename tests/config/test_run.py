"""What a configuration may say: the seed document as written, every published key, overrides, numbers."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from distillkit.config import HFTeacherConfig, RunConfig, load_run

SEED = Path(__file__).with_name("seed.yaml")

ONLINE: dict[str, Any] = {
    "model": "org/student",
    "output_path": "out",
    "sequence_length": 512,
    "dataset": {"train_dataset": {"repo_id": "org/text"}},
    "teacher": {"kind": "hf", "path": "org/teacher"},
}
LOGPROB_COMPRESSOR = {
    "d": 50000,
    "k": 100,
    "exact_k": 20,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, "sqrt", "exp"],
    "term_dtype": "float32",
    "residual_bins": [{"scale_dtype": "float16", "element_bits": 8, "num_elements": 16}],
    "delta_encoding": False,
    "error_diffusion": True,
    "normalize_t": True,
}
LEGACY_COMPRESSION = {
    "vocab_size": 50000,
    "k": 64,
    "exact_k": 64,
    "polynomial_degree": 0,
    "with_sqrt_term": True,
    "term_dtype": "float32",
    "invert_polynomial": False,
}


def parse(**changes: Any) -> RunConfig:
    return RunConfig.parse({**ONLINE, **changes})


def test_the_seed_document_parses_as_written() -> None:
    config = load_run(SEED).config
    assert config.project_name == "distillkit-afm-kda"
    assert config.model == "arcee-train/afm-4p5b-kdanope-untrained"
    assert config.trust_remote_code
    assert config.frozen_res == ["embed_tokens", "lm_head", r"norm\.weight", r"^model\.layers\.[0-9]+\.mlp\..*"]
    assert config.output_path == "/workspace/models/afm-4p5b-kda-hsd"
    assert config.use_flash_attention
    assert config.sequence_length == 2048
    assert config.dataset.train_dataset.repo_id == "arcee-train/afm-autodistill-mix-v0"
    assert config.dataset.train_dataset.split == "train"
    assert config.dataset.seed == 42
    losses = [(loss.function, loss.weight, loss.temperature) for loss in config.loss_functions]
    assert losses == [("cross_entropy", 0.2, None), ("kl", 0.2, 2.0), ("hs_cosine", 0.6, None)]
    assert config.layer_mapping == "all"
    assert config.teacher == HFTeacherConfig(
        path="arcee-ai/AFM-4.5B-Base",
        kwargs={"attn_implementation": "flash_attention_2", "torch_dtype": "bfloat16"},
    )
    assert config.training_args["learning_rate"] == 1e-3
    assert config.training_args["warmup_steps"] == 0.025


def test_without_losses_half_cross_entropy_half_kl() -> None:
    losses = [(loss.function, loss.weight, loss.temperature) for loss in parse().loss_functions]
    assert losses == [("cross_entropy", 0.5, None), ("kl", 0.5, 1.0)]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"teacher": {"kind": "dataset", "logprob_compressor": LOGPROB_COMPRESSOR}}, id="captured"),
        pytest.param(
            {
                "teacher": {"kind": "dataset", "vocab_size": 50000, "legacy_logit_compression": LEGACY_COMPRESSION},
                "dataset": {
                    "train_dataset": {
                        "repo_id": "org/captured",
                        "revision": "v2",
                        "config_name": "en",
                        "split": "train",
                    },
                    "eval_dataset": {"disk_path": "held-out", "split": "test[:100]"},
                    "seed": None,
                    "num_samples": 1000,
                    "num_eval_samples": 10,
                    "eos_label_token_ids": [2, 5],
                    "prepared_dataset_path": "prepared",
                    "prepacked": True,
                },
                "model_auto_class": "AutoModelForImageTextToText",
                "model_kwargs": {"low_cpu_mem_usage": True},
                "resize_embeddings_to_multiple_of": 64,
                "frozen_modules": ["vision_tower"],
                "functionary_packing": True,
            },
            id="captured, older format",
        ),
        pytest.param(
            {
                "teacher": {"kind": "hf", "path": "org/teacher", "kwargs": None, "top_k": 32, "background": "captured"},
                "layer_mapping": [[0, 0], [6, 12]],
                "force_hidden_state_projection": True,
                "loss_functions": [
                    {"function": "hinge", "weight": 0.1, "margin": 0.05},
                    {"function": "logistic_ranking", "weight": 0.1, "top_k": 16},
                    {"function": "hs_mse", "weight": 0.3},
                    {"function": "reverse_kl", "weight": 0.5, "sparse_chunk_length": 256},
                    {"function": "kl", "weight": 0.1, "missing_probability_handling": "background"},
                ],
                "training_args": {
                    "dataset_text_field": "text",
                    "dataset_num_proc": 4,
                    "packing": True,
                    "evaluation_strategy": "no",
                    "warmup_ratio": 0.1,
                    "remove_unused_columns": False,
                    "use_liger_kernel": False,
                    "optim": "paged_adamw_8bit",
                    "lr_scheduler_type": "cosine",
                    "gradient_checkpointing_kwargs": {"use_reentrant": False},
                    "hub_strategy": "every_save",
                    "report_to": "wandb",
                },
            },
            id="online, every loss",
        ),
    ],
)
def test_published_keys_parse(changes: dict[str, Any]) -> None:
    parse(**changes)


def test_keys_of_the_dataset_may_stand_in_training_args() -> None:
    config = parse(training_args={"packing": False, "dataset_num_proc": 4, "max_steps": 3})
    assert not config.dataset.packing
    assert config.dataset.dataset_num_proc == 4
    assert config.training_args == {"max_steps": 3}


def test_older_names_of_training_arguments() -> None:
    given = {
        "warmup_ratio": 0.1,
        "evaluation_strategy": "steps",
        "remove_unused_columns": False,
        "save_strategy": False,
    }
    held_out = {**ONLINE["dataset"], "eval_dataset": {"repo_id": "org/held-out"}}
    assert parse(training_args=given, dataset=held_out).training_args == {
        "warmup_steps": 0.1,
        "eval_strategy": "steps",
        "save_strategy": "no",
    }


def test_explicit_layers_take_the_place_of_the_default_layout() -> None:
    student = parse(model=None, student={"full_attention_layers": [3, 7]}).student
    assert student is not None
    assert (student.layout, student.full_attention_layers) == (None, [3, 7])


def test_a_section_without_content_has_its_defaults() -> None:
    assert parse(model_kwargs=None, training_args=None, frozen_res=None).frozen_res == []


def test_the_home_folder_is_expanded() -> None:
    assert parse(output_path="~/run").output_path == str(Path.home() / "run")


def test_what_is_written_down_of_a_run_is_the_run() -> None:
    config = load_run(SEED, ["layer_mapping=[[1, 2]]", "model=null", "student.full_attention_layers=[3]"]).config
    assert RunConfig.parse(config.model_dump(mode="json")) == config


def test_a_key_without_effect_is_said(caplog: pytest.LogCaptureFixture) -> None:
    load_run(SEED, ["functionary_packing=true"])
    assert caplog.messages == ["functionary_packing: has no effect; packed documents never attend to each other anyway"]


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", ".001", "1.0e-3", "0.001", "+1e-3", "1_0e-4"])
def test_numbers_as_people_write_them(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(ONLINE) + f"training_args: {{learning_rate: {text}}}\n")
    assert load_run(path).config.training_args["learning_rate"] == pytest.approx(1e-3)


def test_overrides() -> None:
    config = load_run(
        SEED,
        [
            "training_args.learning_rate=3e-4",
            "sequence_length=512",
            "loss_functions.1.weight=0.5",
            "teacher.kwargs.revision=v1=2",
            "layer_mapping=[[1, 2]]",
            "model=null",
            "student.layout=kda_only",
        ],
    ).config
    assert config.training_args["learning_rate"] == 3e-4
    assert config.sequence_length == 512
    assert config.loss_functions[1].weight == 0.5
    assert isinstance(config.teacher, HFTeacherConfig)
    assert config.teacher.kwargs["revision"] == "v1=2"
    assert config.layer_mapping == [(1, 2)]
    assert config.student is not None
    assert config.student.layout == "kda_only"


def test_a_keyword_argument_that_is_null_is_not_given():
    """So one that a file inherits from another can be taken back."""
    kwargs = {"gguf_file": None, "device_map": None, "dtype": "bfloat16"}
    config = RunConfig.parse(
        {**ONLINE, "teacher": {"kind": "hf", "path": "org/teacher", "kwargs": kwargs}, "model_kwargs": {"dtype": None}}
    )
    assert isinstance(config.teacher, HFTeacherConfig)
    assert (config.teacher.kwargs, config.model_kwargs) == ({"dtype": "bfloat16"}, {})
