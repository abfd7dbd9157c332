"""Each recipe is accepted as it is, and is planned and run to its end on tiny models of its teacher's family.

Only paths, sizes and budgets are overridden: layouts, losses, freezing, precision and phases are the recipe's own.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import ArceeConfig, ArceeForCausalLM, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from distillkit.capture.run import capture
from distillkit.config import RunConfig, StudentConfig, load_run
from distillkit.config.capture import CaptureConfig, load_capture_config
from distillkit.config.yaml_files import read_yaml
from distillkit.conversion.convert import convert
from distillkit.planning import plan_capture, plan_run
from distillkit.training import distill
from tests.training.tiny import BYTES, save_chat_model, save_chats, save_text, tokenizer

RECIPES = Path(__file__).parent.parent / "recipes"
ALL = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml"))
CAPTURES = [name for name in ALL if "compression" in read_yaml(RECIPES / name)]
OFFLINE = "smollm2/offline.yaml"
CHAT = "chat.yaml"
ON_POLICY = "smollm2/on_policy.yaml"
ONLINE = [name for name in ALL if name not in (*CAPTURES, OFFLINE, CHAT, ON_POLICY)]
VARIANTS = [name for name in ALL if "\nextends: " in "\n" + (RECIPES / name).read_text()]

LAYERS = 4
FULL_ATTENTION = {"hybrid": [3], "front_loaded": [0], "kda_only": []}
STEPS = 2
ROWS = 2
QUIET = Console(quiet=True)
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of each family, in bf16 as the published ones are, and text."""
    folder = tmp_path_factory.mktemp("inputs")
    shape = {
        "vocab_size": BYTES,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    families = {
        "smollm2": LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)),
        "afm-4.5b": ArceeForCausalLM(ArceeConfig(**shape, tie_word_embeddings=False)),
    }
    for family, model in families.items():
        model.bfloat16().save_pretrained(folder / family)
        tokenizer().save_pretrained(folder / family)
    save_text(folder / "train.jsonl", documents=60)
    save_text(folder / "valid.jsonl", documents=30)
    return folder


def small(name: str, teacher: Path, train: Path, held_out: Path, output: Path) -> list[str]:
    """Overrides that make a recipe's run tiny."""
    recipe = read_yaml(RECIPES / name)
    overrides = [
        f"output_path={output}",
        f"dataset.train_dataset={{disk_path: {train}}}",
        f"dataset.eval_dataset={{disk_path: {held_out}}}",
        "evaluation.num_tokens=128",
        "evaluation.max_new_tokens=2",
    ]
    if recipe["teacher"]["kind"] == "hf":
        overrides.append(f"teacher.path={teacher}")
    if recipe.get("training_args", {}).get("torch_compile"):  # the CPU's compiler takes minutes for tiny models, too
        overrides.append("training_args.torch_compile=false")
    if "gguf_file" in recipe["teacher"].get("kwargs", {}):
        overrides.append(f"teacher.kwargs={{dtype: {recipe['teacher']['kwargs']['dtype']}}}")
    phases = [
        small_training(phase, f"phases.{index}.", 128 if "sequence_length" in phase else 64)
        for index, phase in enumerate(recipe.get("phases", []))
    ]
    for index, phase in enumerate(recipe.get("phases", [])):
        if "train_dataset" in phase.get("dataset", {}):
            overrides.append(f"phases.{index}.dataset.train_dataset={{disk_path: {train}}}")
    for override in small_training(recipe, "", 64):
        key = override.partition("=")[0]
        named = [any(each.split("=")[0].endswith(f".{key}") for each in phase) for phase in phases]
        if not phases or not all(named):
            overrides.append(override)
    return overrides + [each for phase in phases for each in phase]


def small_training(section: dict[str, Any], prefix: str, sequence_length: int) -> list[str]:
    """Two steps of two rows, by the kind of budget that the recipe has itself."""
    arguments = section.get("training_args", {})
    overrides = [f"{prefix}training_args.per_device_train_batch_size={ROWS}"]
    if "sequence_length" in section:
        overrides.append(f"{prefix}sequence_length={sequence_length}")
    if "gradient_accumulation_steps" in arguments:
        overrides.append(f"{prefix}training_args.gradient_accumulation_steps=1")
    if "tokens" in section:
        overrides.append(f"{prefix}tokens={STEPS * ROWS * sequence_length}")
    elif "max_steps" in arguments or "num_train_epochs" in arguments:
        overrides.append(f"{prefix}training_args.max_steps={STEPS}")
    return overrides


def capture_config(name: str, inputs: Path, text: str, output: Path) -> CaptureConfig:
    overrides = [
        f"output_path={output}",
        f"teacher.path={inputs / 'smollm2'}",
        "teacher.kwargs={dtype: bfloat16}",
        f"dataset.train_dataset={{disk_path: {inputs / text}.jsonl}}",
        "sequence_length=64",
        f"compression.logprob_compressor.d={BYTES}",
        "tokens_per_batch=1024",
        "rows_per_shard=8",
    ]
    return load_capture_config(RECIPES / name, overrides)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def weights(folder: Path) -> Weights:
    """In float32, which holds those of any dtype as they are."""
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())


def check_layers(folder: Path, layout: str) -> None:
    """The student loads, and its layers are what the layout promises."""
    types = AutoModelForCausalLM.from_pretrained(folder).config.layer_types
    full = [index for index, kind in enumerate(types) if kind == "full_attention"]
    assert (len(types), full) == (LAYERS, FULL_ATTENTION[layout])


def check_what_trained(run: RunConfig, before: Weights, after: Weights, teacher: Weights) -> None:
    """Attention trained; the rest did where nothing is frozen, and is the teacher's bit for bit where it is."""
    changed = {name for name, each in after.items() if not torch.equal(each, before[name])}
    assert any(name.endswith("self_attn.q_proj.weight") for name in changed)
    rest = [name for name in after if ".self_attn." not in name]
    if run.frozen_res or all(loss.function.startswith("attn_") for loss in run.loss_functions):
        assert all(torch.equal(after[name], teacher[name]) for name in rest)
    else:
        assert any(".mlp." in name for name in changed)
        assert "model.embed_tokens.weight" in changed


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_is_accepted(name: str) -> None:
    load = load_capture_config if name in CAPTURES else load_run
    load(RECIPES / name)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_writes_elsewhere_than_all_other_recipes(name: str) -> None:
    paths = [read_yaml(RECIPES / each)["output_path"] for each in ALL]
    assert paths.count(read_yaml(RECIPES / name)["output_path"]) == 1


@pytest.mark.parametrize("name", ONLINE)
def test_a_recipe_is_planned_and_runs(name: str, inputs: Path, tmp_path: Path) -> None:
    layout = read_yaml(RECIPES / name)["student"]["layout"]
    teacher = inputs / ("afm-4.5b" if name.startswith("afm-4.5b") else "smollm2")
    overrides = small(name, teacher, inputs / "train.jsonl", inputs / "valid.jsonl", tmp_path / "run")
    run = load_run(RECIPES / name, overrides)
    plan = plan_run(run)
    assert plan.errors == []

    folder = distill(run, QUIET)
    results = read(folder / "results.json")
    whole = {**results["training"], "steps": results["training"]["step"], "folder": "."}
    parts = results.get("phases", [whole])
    before = weights(run.phases[0].folder / "untrained")
    for phase, planned, part in zip(run.phases, plan.phases, parts, strict=True):
        most = STEPS * ROWS * phase.config.sequence_length
        assert planned.schedule.steps == part["steps"] == STEPS
        assert 0.7 * most < part["tokens"] <= most  # rows are not quite full
        check_layers(folder / part["folder"], layout)
        after = weights(folder / part["folder"])
        check_what_trained(phase.config, before, after, weights(teacher))
        before = after
    assert all(torch.equal(each, before[name]) for name, each in weights(folder).items())


@pytest.mark.parametrize("name", CAPTURES)
def test_a_capture_is_planned_and_made(name: str, inputs: Path, tmp_path: Path) -> None:
    config = capture_config(name, inputs, "train", tmp_path / "captured")
    assert plan_capture(config).errors == []
    summary = capture(config, None, QUIET)
    assert summary.shards == summary.shards_planned > 1


def test_a_student_learns_from_what_the_recipe_of_the_capture_writes(inputs: Path, tmp_path: Path) -> None:
    """The commands at the head of the recipe, in their order."""
    recipe, described = load_run(RECIPES / OFFLINE).config, load_capture_config(RECIPES / "smollm2/capture.yaml")
    assert recipe.dataset.train_dataset.disk_path == described.output_path
    assert recipe.sequence_length == described.sequence_length
    teacher, untrained = inputs / "smollm2", tmp_path / "untrained"
    convert(teacher, untrained, StudentConfig(), dtype="bfloat16")
    for text in ("train", "valid"):
        capture(capture_config("smollm2/capture.yaml", inputs, text, tmp_path / text), None, QUIET)

    overrides = small(OFFLINE, teacher, tmp_path / "train", tmp_path / "valid", tmp_path / "run")
    run = load_run(RECIPES / OFFLINE, [*overrides, f"model={untrained}"])
    assert plan_run(run).errors == []
    folder = distill(run, QUIET)
    results = read(folder / "results.json")
    assert results["training"]["step"] == STEPS
    assert results["divergence"]["before"]["kl"] != results["divergence"]["after"]["kl"]
    check_layers(folder, "hybrid")
    check_what_trained(run.config, weights(untrained), weights(folder), weights(teacher))


def test_a_student_goes_on_with_what_it_writes(inputs: Path, tmp_path: Path) -> None:
    assert load_run(RECIPES / ON_POLICY).config.model == str(read_yaml(RECIPES / "smollm2/closest.yaml")["output_path"])
    teacher, untrained = inputs / "smollm2", tmp_path / "untrained"
    convert(teacher, untrained, StudentConfig(), dtype="bfloat16")
    overrides = small(ON_POLICY, teacher, inputs / "train.jsonl", inputs / "valid.jsonl", tmp_path / "run")
    written = [f"rollouts.prompts.disk_path={inputs / 'train.jsonl'}", "rollouts.prompt_tokens=8"]
    run = load_run(RECIPES / ON_POLICY, [*overrides, *written, "rollouts.max_new_tokens=24", f"model={untrained}"])
    assert plan_run(run).errors == []
    folder = distill(run, QUIET)
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < first["rollout_tokens"] <= 24 and first["reverse_kl"] > 0
    check_layers(folder, "hybrid")
    check_what_trained(run.config, weights(untrained), weights(folder), weights(teacher))


def test_a_smaller_model_learns_from_conversations(tmp_path: Path) -> None:
    """Models of unequal depth and width, with the chat template of Qwen3."""
    assert load_run(RECIPES / CHAT).config.layer_mapping == [
        (7 * quarter, 9 * quarter) for quarter in range(5)
    ]  # 28 and 36 layers
    student = save_chat_model(tmp_path / "student", 1, layers=2, hidden_size=16)
    teacher = save_chat_model(tmp_path / "teacher", 0, layers=4, hidden_size=32)
    chats = Path(save_chats(tmp_path / "chats.jsonl"))

    overrides = small(CHAT, Path(teacher), chats, chats, tmp_path / "run")
    run = load_run(RECIPES / CHAT, [*overrides, f"model={student}", "layer_mapping=[[0, 0], [1, 2], [2, 4]]"])
    assert plan_run(run).errors == []
    folder = distill(run, QUIET)
    results = read(folder / "results.json")
    assert results["training"]["step"] == STEPS
    assert set(results["losses"]) == {"loss", "cross_entropy", "kl", "hs_cosine"}
    before, after = weights(Path(student)), weights(folder)
    assert before.keys() == after.keys()  # the projections of hidden states are not the student's
    assert not any(torch.equal(each, before[name]) for name, each in after.items() if name.endswith("_proj.weight"))
