"""What a plan says, from configurations and headers alone."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from distillkit.config import UserError
from distillkit.config.capture import CaptureConfig
from distillkit.planning import CapturePlan, capture_tables, plan_capture, plan_run, run_tables
from distillkit.planning.tokens import Amount, amount
from tests.planning.small import ATTENTION, DISTRIBUTION, FROZEN, HIDDEN, run, teacher_folder, text_file

AFM = str(Path(__file__).parent.parent / "shapes" / "afm-4.5b")


@pytest.fixture
def teacher(tmp_path):
    return teacher_folder(tmp_path / "teacher")


@pytest.fixture
def text(tmp_path):
    path = text_file(tmp_path)
    Path(f"{path}.held-out").write_text("held out")
    return path


def printed(plan):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(capture_tables(plan) if isinstance(plan, CapturePlan) else run_tables(plan))
    return console.export_text()


def test_afm_recipe_has_the_published_sizes(text):
    """4.62 B, 4.94 B and 0.89 B trainable without MLPs; the step of 4 rows of 2,048 fits on an H100."""
    arguments = {"per_device_train_batch_size": 4, "gradient_checkpointing": True}
    shape = {"student": {"layout": "hybrid"}, "sequence_length": 2048}
    config = run(AFM, text, losses=DISTRIBUTION, arguments=arguments, frozen_res=FROZEN, **shape)
    plan = plan_run(config)
    text = printed(plan)
    assert plan.teacher_parameters == 4_619_189_760
    assert all(number in text for number in ("4.62 B", "4.94 B", "0.89 B"))
    assert plan.fits
    assert 30 < plan.phases[0].memory / 2**30 < 45
    assert max(len(line) for line in text.splitlines()) <= 100


def test_phases_have_plans_of_their_own(teacher, text):
    """Each with its losses, its length and what it trains; the student of a later phase does not exist yet."""
    phases = [
        {"name": "alignment", "tokens": 51_200, "loss_functions": ATTENTION},
        {"name": "distillation", "tokens": 102_400, "sequence_length": 512},
    ]
    config = run(teacher, text, frozen_res=["embed_tokens"], phases=phases)
    plan = plan_run(config)
    first, second = plan.phases
    assert (first.schedule.steps, second.schedule.steps) == (100, 100)
    assert (first.sequence_length, second.sequence_length) == (256, 512)
    assert first.trained == sum(
        total for group, (total, _) in first.groups.items() if group in ("KDA", "full attention")
    )
    assert second.trained > first.trained
    data = json.loads(json.dumps(plan.as_dict()))
    assert data["phases"][1]["schedule"]["tokens"] == 102_400
    assert data["phases"][0]["memory"] > 0


def test_tokens_are_those_of_the_budget_or_guessed_from_the_size_of_the_text(teacher, text):
    config = run(teacher, text, arguments={"max_steps": -1, "num_train_epochs": 2})
    schedule = plan_run(config).phases[0].schedule
    assert schedule.available.estimated
    assert schedule.available.tokens == pytest.approx(10_000, rel=0.05)
    assert schedule.tokens == pytest.approx(20_000, rel=0.1)
    hub = run(
        teacher, text, dataset={"train_dataset": {"repo_id": "some/text"}}, arguments={"max_steps": -1}, evaluation=None
    )
    assert plan_run(hub).phases[0].schedule.steps is None


def warned(config, **options):
    plan = plan_run(config, **options)
    return "\n".join([*plan.errors, *plan.warnings])


WARNINGS = {
    "budget": (
        {
            "frozen_res": ["mpl"],
            "arguments": {"gradient_accumulation_steps": 6, "max_steps": 60, "warmup_steps": 60, "push_to_hub": True},
        },
        {"gpus": 4},
        [
            "frozen_res[0]: 'mpl' matches no parameter",
            "gradient_accumulation_steps: 6 micro-batches cannot be divided over 4 GPUs",
            "training_args.max_steps: reads the data about",
            "60 steps of warmup are all of 60 steps",
            "training_args.hub_model_id: is missing",
            "sequence_length: is at most 256; with NoPE layers retrieval fails",
        ],
    ),
    "precision": (
        {
            "trained_weights": "bfloat16",
            "arguments": {"learning_rate": 1e-6, "gradient_accumulation_steps": 32},
            "sequence_length": 2048,
        },
        {"gpus": 4},
        [
            "learning_rate: 1e-06 is small for trained_weights: bfloat16",
            "the gradients of 32 micro-batches are added up in bfloat16",
            "use 8 to keep that one",
            "the teacher was trained for 1,024",
        ],
    ),
    "one micro-batch on each GPU": (
        {"arguments": {"per_device_train_batch_size": 4}},
        {"gpus": 2},
        ["per_device_train_batch_size: is per GPU, so a step is 2,048 tokens, 2 times that of one GPU; use 2 to keep"],
    ),
    "everything is frozen": ({"frozen_res": ["."]}, {}, ["frozen_res"]),
    "layers": (
        {"layer_mapping": [[9, 9]], "losses": HIDDEN, "arguments": {"bf16": False}},
        {},
        ["layer_mapping[0]: the student has no hidden state 9", "set bf16: true"],
    ),
    "memory": (
        {"sequence_length": 32768, "arguments": {"per_device_train_batch_size": 128}},
        {"gpu": "L4"},
        ["do not fit into L4's 22.0 GiB", "per_device_train_batch_size: 64", "gradient_checkpointing: true"],
    ),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_doubtful_keys_are_named_with_their_remedies(teacher, text, case):
    keys, options, expected = WARNINGS[case]
    said = warned(run(teacher, text, **keys), **options)
    assert [line for line in expected if line not in said] == []


def test_alignment_after_training_and_a_used_folder_are_noticed(teacher, text, tmp_path):
    phases = [
        {"name": "distillation", "tokens": 10_240},
        {"name": "alignment", "tokens": 10_240, "loss_functions": ATTENTION},
    ]
    lines = warned(run(teacher, text, phases=phases, output_path=str(tmp_path)))
    assert "phases[1].loss_functions: aligns attention after" in lines
    assert "exists and is not empty" in lines


def test_remedies_give_back_what_they_say(tmp_path, text):
    """Of weights in bf16 on several GPUs: 4 bytes each are moments, of which 8 bits leave 2; 4 are gradients."""
    wide = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 8}
    teacher = teacher_folder(tmp_path / "wide", "arcee", **wide)
    arguments = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True}
    config = run(teacher, text, sequence_length=65536, arguments=arguments, trained_weights="bfloat16", frozen_res=[])
    plan = plan_run(config, gpu="L4", gpus=8)
    said = next(line for line in plan.warnings if "do not fit" in line)
    given = {option: int(size) for option, size in re.findall(r"([a-z_]+: \S+) \(about (\d+) GiB\)", said)}
    assert given["optim: adamw_torch_8bit"] == pytest.approx(2 * plan.phases[0].trained / 2**30, abs=0.6)
    assert given[r"frozen_res: ['\.mlp\.']"] == pytest.approx(8 * plan.phases[0].groups["MLP"][1] / 2**30, abs=0.6)


def test_tokenised_rows_are_counted_and_samples_are_a_share(teacher, tmp_path):
    """A column of tokens takes another number of bytes per token than text does."""
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 100, "labels": [[1, 2, 3]] * 100})
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "rows")
    rows.to_json(tmp_path / "rows.jsonl")

    def available(place, **keys):
        data = {"train_dataset": {"disk_path": str(place)}, "prepacked": True, **keys}
        return amount(run(teacher, dataset=data, evaluation=None).dataset)

    for name in ("rows.parquet", "rows"):
        assert available(tmp_path / name) == Amount(300, False)
        assert available(tmp_path / name, num_samples=10) == Amount(30, True)
    assert available(tmp_path / "rows.jsonl") is None
    whole = available(text_file(tmp_path))
    assert available(text_file(tmp_path), num_samples=40).tokens == pytest.approx(whole.tokens / 10, rel=0.05)


def test_what_is_left_on_the_disk_and_the_most_that_is_there(teacher, text):
    """A checkpoint is whole before an older one is deleted."""
    config = run(teacher, text, arguments={"save_total_limit": 3})
    plan = plan_run(config)
    disk = plan.phases[0].disk
    assert plan.disk == plan.untrained + 3 * disk.checkpoint + disk.student
    assert plan.disk_peak == plan.disk + disk.checkpoint


def test_a_phase_is_warned_of_what_is_its_own(teacher, text):
    """Held-out text of one phase is seen; a key that stands at the top is named as such."""
    held_out = {"eval_dataset": {"disk_path": f"{text}.held-out"}}
    phases = [{"name": "one", "tokens": 10_240}, {"name": "two", "tokens": 1_024_000, "dataset": held_out}]
    bare, warmup = {"train_dataset": {"disk_path": text}}, {"max_steps": -1, "warmup_steps": 30}
    plan = plan_run(run(teacher, text, dataset=bare, phases=phases, evaluation=None, arguments=warmup))
    assert [line for line in plan.warnings if "no held-out" in line and line.endswith("(phase one)")]
    assert [
        line for line in plan.warnings if line.startswith("training_args.warmup_steps: 30") and "(phase one)" in line
    ]


def test_gpus_that_share_rows_read_them_once(teacher, text):
    plans = [plan_run(run(teacher, text, parallel={"context": size}), gpus=4) for size in (1, 4)]
    assert [plan.phases[0].schedule.tokens_per_step for plan in plans] == [2048, 512]


def test_time_is_not_told_in_float32(teacher, text):
    """The table's peaks are those of bf16."""
    assert plan_run(run(teacher, text)).seconds is not None
    plan = plan_run(run(teacher, text, arguments={"bf16": False}))
    assert plan.seconds is None
    assert "not known" in printed(plan)


def test_a_folder_without_weights_is_enough_and_a_hub_that_does_not_answer_is_told(text, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"teacher\.path: .*name a local folder that has the config\.json"):
        plan_run(run("nobody/nothing", text))


def test_unknown_gpu_lists_those_that_are_known(teacher, text):
    with pytest.raises(UserError, match="--gpu: 'H900' is not known; there is A100-40GB"):
        plan_run(run(teacher, text), gpu="H900")


def test_a_capture_is_planned_from_its_codec(teacher, text, tmp_path):
    config = CaptureConfig.parse(
        {
            "teacher": {"path": teacher, "kwargs": {"dtype": "bfloat16"}},
            "sequence_length": 256,
            "dataset": {"train_dataset": {"disk_path": text}},
            "compression": {"plain": {"k": 8, "vocab_size": 500}},
            "output_path": str(tmp_path / "captured"),
        }
    )
    plan = plan_capture(config)
    assert plan.disk == plan.available.tokens * (plan.bytes_per_token + 4) + 4 * 512
    assert "use 512" in plan.errors[0]
    assert "bytes per token" in printed(plan)
    json.dumps(plan.as_dict())


@pytest.mark.parametrize(
    "content",
    [
        (2**63 - 1).to_bytes(8, "little") + b"{}",
        bytes(8) + b"{}",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        (2).to_bytes(8, "little") + b"[]",
        b"",
    ],
)
def test_a_hostile_header_is_told_in_one_line(teacher, text, content):
    (Path(teacher) / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"^teacher\.path: '.*model\.safetensors' is damaged \(.+\); download"):
        plan_run(run(teacher, text))


def test_files_that_hold_another_model_are_told(teacher, text):
    weights = {name: torch.zeros(1).expand(shape.shape) for name, shape in llama_shapes(teacher).items()}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, Path(teacher) / "model.safetensors")
    plan_run(run(teacher, text))
    weights.pop("model.norm.weight")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, Path(teacher) / "model.safetensors")
    with pytest.raises(UserError, match=r"teacher\.path: .* tensors 1 missing \(model\.norm\.weight\)"):
        plan_run(run(teacher, text))
    with pytest.raises(UserError, match=r"^model: .* tensors 1 missing"):
        plan_run(run(teacher_folder(Path(teacher).with_name("whole")), text, student=None, model=teacher))


def llama_shapes(folder):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
