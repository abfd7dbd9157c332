"""The command line: it parses and prints; the packages that it imports do the work.

Each command imports what it runs, because that imports torch: `--help` and a mistake in a configuration need none.
"""

import gc
import importlib.metadata
import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from distillkit.config import Run, StudentConfig, UserError, load_run
from distillkit.config.capture import CaptureConfig, check_capture_ready, load_capture_config, load_run_or_capture
from distillkit.config.evaluate_options import EvaluateOptions, check_evaluate_ready, load_evaluate_config
from distillkit.config.readiness import check_model_path, check_processes, check_ready, named_source
from distillkit.config.schema import Kind, json_schema
from distillkit.config.sharing import find_share
from distillkit.config.student import KVHeads, Layout
from distillkit.config.synthetic import check_synthetic_ready, load_synthetic_config
from distillkit.config.written import check_written_ready, load_written_config
from distillkit.console import FAILED, INTERRUPTED, USAGE_ERROR, sigterm_as_ctrl_c
from distillkit.runs.clock import command_clock
from distillkit.runs.writing import json_text

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Keys to change: training_args.learning_rate=3e-4", metavar="KEY=VALUE"),
]
Shard = Annotated[
    str | None,
    typer.Option(
        help="Make only part i of n: files i - 1, i - 1 + n, i - 1 + 2n, ... Several processes or machines can "
        "share the work, in one folder or in several that are put together; processes of torchrun do "
        "so automatically. [default: all missing files]",
        metavar="i/n",
    ),
]
GgufFile = Annotated[str | None, typer.Option(help="Name of the GGUF file in the teacher's folder.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code from the teacher's folder or repository.")
]

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"distillkit {importlib.metadata.version('distillkit')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Distil a transformer into another model.

    distillkit CONFIG.yaml runs a distillation (distillkit distill CONFIG.yaml is the same).
    """


@app.command()
def distill(
    config: Annotated[Path, typer.Argument(help="The run, as YAML.", metavar="CONFIG.yaml")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in output_path.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only estimate the cost of the run, as distillkit plan does.")
    ] = False,
) -> None:
    """Run the distillation that a YAML file describes."""
    changes = [*(overrides or []), *(["resume=true"] if resume else [])]
    run = load_run(config, changes)
    if dry_run:
        _print_plan(run)
        return
    check_ready(run)
    check_processes(run)
    from distillkit.training import distill

    clock = command_clock()
    if not gc.get_freeze_count():  # Trainer collects garbage in each phase, for a second; what is imported is none
        gc.freeze()
    distill(run, clock=clock)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A run or a capture, as YAML.", metavar="CONFIG.yaml")],
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="GPU model for the estimates of time and memory.")] = "H100",
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Number of GPUs of each node; by default as many as parallel names, or 1.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Estimate the cost of a run or a capture, and list its errors, without running it.

    Parameters, tokens, steps, memory, disk and time of each phase. Only configurations and headers are read. Exit code
    1: it has errors.
    """
    described = load_run_or_capture(config, overrides or [])
    _print_plan(described, gpu=gpu, gpus=gpus, nodes=nodes, as_json=as_json)


def _print_plan(
    described: Run | CaptureConfig,
    *,
    gpu: str = "H100",
    gpus: int | None = None,
    nodes: int = 1,
    as_json: bool = False,
) -> None:
    if isinstance(described, CaptureConfig) and (gpus or 1) * nodes > 1:
        raise UserError(
            "--gpus", "a capture is planned on one GPU; n of them share it (--shard i/n) in 1/n of the time"
        )
    from rich.console import Console

    from distillkit.planning import CapturePlan, RunPlan, capture_tables, plan_capture, plan_run, run_tables

    plan: RunPlan | CapturePlan
    match described:
        case Run():
            plan = plan_run(described, gpu=gpu, gpus=gpus, nodes=nodes)
            tables = run_tables(plan)
        case CaptureConfig():
            plan = plan_capture(described, gpu=gpu)
            tables = capture_tables(plan)
    if as_json:
        typer.echo(json_text(plan.as_dict(), indent=2))
    else:
        Console().print(tables)
    if plan.errors:
        raise typer.Exit(FAILED)


@app.command()
def schema(
    kind: Annotated[
        Kind, typer.Argument(help="Kind of YAML file: run, capture, evaluate, synthesize or write.", metavar="KIND")
    ] = "run",
) -> None:
    """Print the JSON schema of a kind of YAML file, for editors that complete and check keys and values.

    \b
    distillkit schema > schema.json, and as the first line of the YAML:
    # yaml-language-server: $schema=schema.json
    """
    typer.echo(json.dumps(json_schema(kind), indent=2))


@app.command()
def convert(
    teacher: Annotated[str, typer.Argument(help="A folder, a hub id or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="Folder for the untrained student.")],
    layout: Annotated[Layout | None, typer.Option(help="Which layers keep full attention. [default: hybrid]")] = None,
    full_attention_layers: Annotated[
        str | None, typer.Option(help="The layers that keep full attention, instead of a layout: 3,7,11")
    ] = None,
    kv_heads: Annotated[
        KVHeads, typer.Option(help="Repeat key/value weights for each query head, or keep them grouped.")
    ] = "expand",
    keep_rope: Annotated[
        bool, typer.Option("--keep-rope", help="Full-attention layers keep the rotary embedding.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random parameters.")] = 0,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Turn a teacher into an untrained KDA student."""
    options: dict[str, Any] = {"kv_heads": kv_heads, "keep_rope": keep_rope, "seed": seed}
    if layout is not None:
        options["layout"] = layout
    if full_attention_layers is not None:
        options["full_attention_layers"] = _numbers("--full-attention-layers", full_attention_layers)
    student = StudentConfig.parse(options)
    check_model_path("TEACHER", teacher)
    from rich.console import Console

    from distillkit.conversion import convert

    summary = convert(teacher, out, student, trust_remote_code=trust_remote_code, gguf_file=gguf_file)
    Console().print(summary)


@app.command()
def evaluate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="The evaluation, as YAML, and keys to change: needles.lengths=[1024,4096]",
            metavar="[CONFIG.yaml] [KEY=VALUE]",
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="A folder, a hub id or a .gguf file; replaces the section teacher of the file.")
    ] = None,
    student: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder or a hub id; may be repeated; replaces the section students of the file.",
            metavar="[NAME=]PATH",
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="divergence, generation, benchmarks, needles, long_context or speed; may be repeated."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text for divergence, generation, needles and long_context: a file, a folder, or a pattern of files."
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the results.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of samples of each task.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Test the whole evaluation on two short samples.")] = False,
    gguf_file: GgufFile = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code from the models' folders or repositories.")
    ] = False,
) -> None:
    """Evaluate models: divergence of students from the teacher, what they write, benchmarks, retrieval, speed.

    Settings come from the YAML file, from options, or from both. The same command continues after an interruption and
    adds new models and tasks. Exit code 1: at least one measurement failed.
    """
    config = load_evaluate_config(
        *_file_and_overrides(words or []),
        EvaluateOptions(
            teacher=teacher,
            gguf_file=gguf_file,
            students=student or [],
            suites=suite or [],
            data=data,
            out=out,
            limit=limit,
            switches={"smoke": smoke, "trust_remote_code": trust_remote_code},
        ),
    )
    check_evaluate_ready(config)
    from distillkit.evaluation import evaluate

    if evaluate(config)["failures"]:
        raise typer.Exit(FAILED)


@app.command()
def synthesize(
    words: Annotated[
        list[str],
        typer.Argument(
            help="The text, as YAML, and keys to change: document_length=2047. Or all keys, without a file.",
            metavar="[CONFIG.yaml] [KEY=VALUE]",
        ),
    ],
) -> None:
    """Generate text that trains retrieval: repeated passages, and questions long after the facts they are about."""
    config = load_synthetic_config(*_file_and_overrides(words))
    check_synthetic_ready(config)
    from distillkit.data.synthetic import synthesize

    synthesize(config)


@app.command()
def write(
    words: Annotated[
        list[str],
        typer.Argument(
            help="The text, as YAML, and keys to change: documents=1000. Or all keys, without a file.",
            metavar="[CONFIG.yaml] [KEY=VALUE]",
        ),
    ],
    shard: Shard = None,
) -> None:
    """Let the teacher write text to train on. The same command continues after a kill."""
    config = load_written_config(*_file_and_overrides(words))
    check_written_ready(config)
    from distillkit.capture.written_text import write_text

    write_text(config, shard)


@app.command()
def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs and evaluations, or their results.json.", metavar="RESULTS..."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the report. [default: the folder of the result if there is one only, else report]"
        ),
    ] = None,
) -> None:
    """Write report.md and report.html from results, and update the model cards of the runs among them."""
    from distillkit.reporting import report_folder, write_cards, write_report

    written = write_report(results, out or report_folder(results))
    for path in (written, *write_cards(results)):
        typer.echo(path)


@app.command()
def pack(
    dataset: Annotated[str, typer.Argument(help="A captured dataset: a folder, or a dataset of the hub.")],
    out: Annotated[Path, typer.Argument(help="Folder for the packed dataset.")],
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per row.")],
    split: Annotated[
        str | None, typer.Option(help="The split of the dataset, or a part of one: train, train[:1000].")
    ] = None,
) -> None:
    """Pack captured documents, with the teacher's outputs for each token, into rows of one length.

    Documents never attend to each other; those longer than a row are split. Train on the result with prepacked: true.
    """
    source = named_source("DATASET", dataset, split)
    from distillkit.capture.packing import pack

    pack(source, out, sequence_length)


@app.command()
def inspect(
    dataset: Annotated[Path, typer.Argument(help="The folder of a captured dataset.")],
    verify: Annotated[bool, typer.Option("--verify", help="Verify all files against the manifest.")] = False,
    tokens: Annotated[
        int, typer.Option(min=0, help="Number of tokens to show, each with the teacher's most probable next tokens.")
    ] = 12,
    teacher: Annotated[
        str | None,
        typer.Option(help="A teacher to compare the stored outputs with: a folder, a hub id or a .gguf file."),
    ] = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Describe a captured dataset: format, missing shards, examples. Exit code 1: it is not complete."""
    if teacher is not None:
        check_model_path("--teacher", teacher)
    if not dataset.is_dir():
        raise UserError("DATASET", f"no such folder: {str(dataset)!r}")
    from distillkit.capture.inspection import inspect_dataset

    complete = inspect_dataset(
        dataset,
        verify=verify,
        tokens=tokens,
        teacher=teacher,
        trust_remote_code=trust_remote_code,
        gguf_file=gguf_file,
    )
    if not complete:
        raise typer.Exit(FAILED)


@app.command()
def capture(
    config: Annotated[Path, typer.Argument(help="The capture, as YAML.", metavar="CONFIG.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys to change: compression.logprob_compressor.k=64", metavar="KEY=VALUE"),
    ] = None,
    shard: Shard = None,
) -> None:
    """Store a teacher's outputs for a text. The same command continues after an interruption."""
    find_share(shard)
    described = load_capture_config(config, overrides or [])
    check_capture_ready(described)
    from distillkit.capture.run import capture

    capture(described, shard)


def _file_and_overrides(words: list[str]) -> tuple[Path | None, list[str]]:
    """The YAML file, if the first word is one, and the `key=value` overrides."""
    has_file = bool(words) and words[0].endswith((".yaml", ".yml"))
    return (Path(words[0]), words[1:]) if has_file else (None, words)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(option, f"must be layers separated by commas, such as 3,7,11; got {text!r}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit code: 2 after a mistake of the user's, printed in one line on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    first = next((word for word in words if not word.startswith("-")), "")
    if first.endswith((".yaml", ".yml")):
        words.insert(0, "distill")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a log that is not UTF-8 gets ? for the signs that it has not
            stream.reconfigure(errors="replace")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' progress bars are for terminals, not for log files
    # transformers imports torchao where it is installed, which then warns about its kernels for other devices.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with sigterm_as_ctrl_c():
            code = app(args=words, prog_name="distillkit", standalone_mode=False)
    except UserError as error:
        return _fail(str(error))
    except OSError as error:  # a folder that cannot be made, a full disk
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error))
    except typer.TyperException as error:
        return _fail(error.format_message())
    if code == INTERRUPTED:  # before a command could print how to resume
        typer.echo("interrupted", err=True)
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    line = "".join(each if each.isprintable() else repr(each)[1:-1] for each in " ".join(message.split()))
    typer.echo(f"error: {line}", err=True)
    return USAGE_ERROR
