"""The command line: a mistake is one line and exit code 2, and torch is not imported to say so."""

import io
import json
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distillkit.cli import main
from distillkit.config.schema import json_schema

SEED = Path(__file__).parent / "config" / "seed.yaml"
FILES = {"SEED": SEED, "CAPTURE": Path(__file__).parents[1] / "recipes" / "capture_quickstart.yaml"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("convrt teacher out", "error: No such command 'convrt'. Did you mean 'convert'?"),
        ("distill", "error: Missing argument 'CONFIG.yaml'."),
        ("--verbose", "error: No such option: --verbose"),
        ("missing.yaml", "error: missing.yaml: no such file"),
        ("distill missing.txt", "error: missing.txt: no such file"),
        ("SEED sequence_length=-1", "error: sequence_length: must be > 0, got -1"),
        ("--resume SEED sequence_length=-1", "error: sequence_length: must be > 0, got -1"),
        ("SEED sequence_length", "error: override 'sequence_length': must be key=value, such as"),
        ("SEED nothing.like=it", "error: nothing: unknown key; known keys: project_name, model,"),
        ("SEED seed=2024-99-99", "error: seed: unknown key; it is a key of dataset: dataset.seed"),
        ("SEED model=[", "error: override 'model=[': the value is not YAML: line 1: "),
        ("SEED training_args.fp16=true", "error: training_args.fp16: gradients of single tokens are too small"),
        ("SEED --resum", "error: No such option: --resum (Possible options: --resume)"),
        ("SEED teacher.path=./none", "error: teacher.path: no such file or folder: './none'"),
        ("SEED --dry-run teacher.path=./none", "error: teacher.path: no such folder: './none'"),
        ("plan", "error: Missing argument 'CONFIG.yaml'."),
        ("plan missing.yaml", "error: missing.yaml: no such file"),
        ("plan SEED sequence_length=-1", "error: sequence_length: must be > 0, got -1"),
        ("plan CAPTURE sequence_length=-1", "error: sequence_length: must be > 0, got -1"),
        ("plan SEED --gpus 0", "error: Invalid value for '--gpus': "),
        ("plan SEED --gpu TPU", "error: --gpu: 'TPU' is not known; there is "),
        ("plan CAPTURE --gpus 2", "error: --gpus: a capture is planned on one GPU; n of them share it"),
        ("schema runs", "error: Invalid value for 'KIND': Value error, 'runs' is not one of 'run', 'capture', 'eval"),
        ("convert teacher", "error: Missing argument 'out'."),
        ("convert ./none out", "error: TEACHER: no such file or folder: './none'"),
        (
            "convert teacher out --layout hibrid",
            "error: Invalid value for '--layout': Value error, 'hibrid' is not one of 'hybrid',",
        ),
        ("convert teacher out --kv-heads all", "error: Invalid value for '--kv-heads': "),
        (
            "convert teacher out --full-attention-layers 3,x",
            "error: --full-attention-layers: must be layers separated by commas, such as 3,7,11; got '3,x'",
        ),
        (
            "convert teacher out --full-attention-layers=-1",
            "error: full_attention_layers[0]: layers count from 0, got -1",
        ),
        (
            "convert teacher out --layout hybrid --full-attention-layers 3",
            "error: layout: full_attention_layers is given too; keep one of the two",
        ),
        ("convert teacher out --seed one", "error: Invalid value for '--seed': "),
        ("convert teacher out more", "error: Got unexpected extra argument(s) (more)"),
        ("evaluate --student s --data d --out o", "error: teacher: is missing: divergence compares students"),
        ("evaluate --teacher t --student s --data d", "error: --out: is missing: the folder for results.json"),
        (
            "evaluate --teacher t --student s --data none.txt --out o",
            "error: divergence.dataset.disk_path: no such file or folder: 'none.txt'",
        ),
        (
            "evaluate --teacher ./t --student s --suite speed --out o",
            "error: teacher.path: no such file or folder: './t'",
        ),
        (
            "evaluate --student s --suite sped --out o",
            "error: --suite: must be one of divergence, generation, benchmarks, needles,",
        ),
        ("evaluate --student s --suite speed --out o --limit 0", "error: Invalid value for '--limit': "),
        (
            "evaluate --student s --suite speed --out o speed.context=1",
            "error: speed.context: unknown key; did you mean",
        ),
        (
            "evaluate --student a/s --student b/s --suite speed --out o",
            "error: --student: two are named 's'; name them:",
        ),
        (
            "evaluate --student s --suite speed --out o --gguf-file f",
            "error: --gguf-file: has no effect without --teacher",
        ),
        ("evaluate --student s --suite speed --out o more", "error: override 'more': must be key=value"),
        ("evaluate missing.yaml", "error: missing.yaml: no such file"),
        ("evaluate", "error: --out: is missing"),
    ],
)
def test_a_mistake_is_one_line(words: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([str(FILES.get(word, word)) for word in words.split()])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith(line)
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    "words",
    [[], ["--help"], *([name, "--help"] for name in ("convert", "evaluate", "distill", "plan", "schema"))],
)
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert "Usage: distillkit" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["run", "capture", "evaluate"])
def test_a_schema_is_printed_as_json(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", kind]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema(kind)  # type: ignore[arg-type]


def test_an_interrupted_command_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distillkit.cli.load_run", interrupt)
    assert main([str(SEED)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--help"], 0, ""),
        (["schema", "evaluate"], 0, ""),
        (
            [str(SEED), "training_args.lerning_rate=1"],
            2,
            "error: training_args.lerning_rate: unknown key; did you mean",
        ),
        ([str(SEED), "teacher.path=./none"], 2, "error: teacher.path: no such file or folder"),
        (["capture", str(SEED), "--shard", "0/4"], 2, "error: --shard: must be i/n with i from 1 to n, such as 1/4"),
    ],
)
def test_torch_is_not_imported_to_answer(words: list[str], code: int, line: str) -> None:
    """The real process: exit code, one line on stderr, no traceback, and the list of what was imported."""
    driver = (
        "import sys; sys.argv[0] = 'distillkit'; from distillkit.cli import main; code = main()\n"
        "sys.exit(99 if {'torch', 'transformers'} & set(sys.modules) else code)"
    )
    done = subprocess.run([sys.executable, "-c", driver, *words], capture_output=True, text=True, cwd=SEED.parents[2])
    assert done.returncode == code
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == bool(line)


def test_a_shell_completes_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    completion = {"_DISTILLKIT_COMPLETE": "complete_bash", "COMP_WORDS": "distillkit eva", "COMP_CWORD": "1"}
    for name, value in completion.items():
        monkeypatch.setenv(name, value)
    with suppress(SystemExit):
        main([])
    assert capsys.readouterr().out == "evaluate\n"


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"distillkit {version('distillkit')}\n"


def test_python_m_distillkit_is_the_command() -> None:
    words = ["-X", "importtime", "-m", "distillkit", "--help"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=SEED.parents[2])
    assert done.returncode == 0
    assert "Usage: distillkit" in done.stdout
    assert "distillkit.config" in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() == "torch"]


def test_the_command_silences_other_packages() -> None:
    driver = (
        "import logging, sys; sys.argv[0] = 'distillkit'; from distillkit.cli import main; main(['--help'])\n"
        "raise SystemExit(7 if logging.getLogger('torchao').level > logging.WARNING else 8)"
    )
    done = subprocess.run([sys.executable, "-c", driver], capture_output=True, text=True, cwd=SEED.parents[2])
    assert done.returncode == 7, done.stderr


def test_convert_and_evaluate(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    """A conversion that keeps all attention and its rotary embedding is the teacher: no divergence is measured."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), num_hidden_layers=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("A text to be measured on. " * 20)
    teacher, student, text = (str(tmp_path / name) for name in ("teacher", "student", "text.txt"))

    assert main(["convert", teacher, student, "--full-attention-layers", "0,1", "--keep-rope"]) == 0
    assert "full attention" in capsys.readouterr().out
    words = [
        "--teacher",
        teacher,
        "--student",
        student,
        "--data",
        text,
        "--out",
        str(tmp_path / "evaluation"),
        "divergence.num_tokens=50",
        "divergence.sequence_length=32",
    ]
    assert main(["evaluate", *words]) == 0
    assert "0.0000" in capsys.readouterr().out
    assert main(["convert", teacher, student]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.fixture
def planned(tmp_path: Path) -> list[str]:
    """A run whose teacher is a configuration without weights, and overrides that give it two phases."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaConfig(vocab_size=64, num_hidden_layers=1, dtype="bfloat16", **sizes).save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("A text to be learnt from. " * 20)
    return [
        str(SEED),
        "model=null",
        "student={layout: kda_only}",
        "sequence_length=32",
        f"teacher.path={tmp_path / 'teacher'}",
        f"dataset.train_dataset={{disk_path: {tmp_path / 'text.txt'}}}",
        f"output_path={tmp_path / 'run'}",
        "phases=[{name: short, tokens: 1k}, {name: long, tokens: 2k, sequence_length: 64}]",
    ]


def test_a_plan_needs_no_weights_and_leaves_nothing(
    planned: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *planned, "--gpu", "A100-80GB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(phase["name"], phase["sequence_length"]) for phase in plan["phases"]] == [("short", 32), ("long", 64)]
    assert plan["gpu"]["name"] == "A100-80GB"
    assert not (tmp_path / "run").exists()
    assert main([*planned, "--dry-run"]) == 0
    assert "short" in (dry := capsys.readouterr().out) and "H100" in dry
    assert main(["plan", *planned]) == 0
    assert capsys.readouterr().out == dry
    assert not (tmp_path / "run").exists()


def test_a_plan_of_what_could_not_run_says_so_with_its_exit_code(
    planned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *planned, "dataset.train_dataset={disk_path: none.txt}", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["errors"] == [
        "dataset.train_dataset.disk_path: no such file or folder: 'none.txt'"
    ]


def test_a_capture_is_planned_too(planned: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        "sequence_length=32",
        f"teacher={{path: {tmp_path / 'teacher'}}}",
        f"dataset.train_dataset.disk_path={tmp_path / 'text.txt'}",
        f"output_path={tmp_path / 'captured'}",
        "compression={plain: {vocab_size: 64, k: 4}}",
    ]
    assert main(["plan", str(FILES["CAPTURE"]), *overrides, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes_per_token"] > 0


def test_an_error_of_the_system_names_a_file_only_where_it_has_one(
    planned: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, line in (
        (OSError(28, "No space left on device"), "error: No space left on device\n"),
        (OSError(28, "No space left on device", "a/b"), "error: a/b: No space left on device\n"),
    ):

        def failing(config: object, clock: object, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr("distillkit.training.distill", failing)
        assert main(planned) == 2
        assert capsys.readouterr().err == line


def test_a_log_that_has_not_all_signs_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stderr", log)
    assert main(["capture", "∥.yaml"]) == 2
    log.flush()
    assert log.buffer.getvalue() == b"error: ?.yaml: no such file\n"
