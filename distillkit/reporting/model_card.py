"""The card of a student: README.md beside its weights, as the hub reads it, from the files of its run alone.

A card is public: paths of this machine become names. Whoever removes the last line keeps the card as it is.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from distillkit.config.errors import UserError
from distillkit.reporting import numbers
from distillkit.reporting.comparison import LEGEND, comparison
from distillkit.reporting.document import Bullets, Code, Part, Section, Table, markdown
from distillkit.reporting.evaluated import merge_models
from distillkit.reporting.reading import (
    Evaluation,
    Json,
    Run,
    number,
    read_content,
    read_results,
    rows,
    section,
    shown,
)
from distillkit.reporting.sources import facts_of
from distillkit.reporting.training_section import divergence_table, measured_with, over_stored_tokens, phase_table
from distillkit.runs.names import CARD
from distillkit.runs.writing import write_whole
from distillkit.student.mixers.names import FULL, is_student, mixers_in, name_of

EVALUATED = "distillkit evaluate"
"""Occurs in cards with results of an evaluation only."""
OURS = "<!-- Written by distillkit, and again when the run is reported on; remove this line to keep your changes. -->"


def write_model_card(folder: Path, evaluations: Sequence[Evaluation] = ()) -> Path | None:
    """Write README.md into the folder of a finished run; None where a person's own is there.

    evaluations: those that measured the student in this folder add their table.

    Raises:
        UserError: the folder holds no run.
    """
    path = folder / CARD
    if path.exists() and OURS not in path.read_text(encoding="utf-8", errors="replace"):
        return None
    runs = read_results([folder]).runs
    if not runs:
        raise UserError("RESULTS", f"{str(folder)!r} holds an evaluation, not a run")
    write_whole(path, model_card(runs[0], evaluations).encode())
    return path


def would_lose_an_evaluation(folder: Path, evaluations: Sequence[Evaluation]) -> bool:
    """Whether the card in a folder has results of an evaluation, and none of these is of the student there."""
    path = folder / CARD
    here = [model for model in merge_models(evaluations) if not model.is_teacher and model.lies_in(folder)]
    return not here and path.is_file() and EVALUATED in path.read_text(encoding="utf-8", errors="replace")


def model_card(run: Run, evaluations: Sequence[Evaluation] = ()) -> str:
    """The card of the student of a run."""
    path = run.path / "config.json"
    student = read_content(path) if path.is_file() else {}
    name = str(section(run.config, "training_args").get("hub_model_id") or run.name)
    sections = [
        Section("Results", _results(run, evaluations)),
        Section("How to use it", [Code(_usage(name, student, run.path), "python")]),
        Section("Architecture", _architecture(student)),
        Section("Training", _training(run)),
        Section("Intended use and limits", [Bullets(_limits(run, student, evaluations))]),
        Section("Provenance", [_provenance(run)]),
    ]
    card = Section(name, [_summary(run, student), *(each for each in sections if each.parts)])
    front_matter = yaml.safe_dump(_front_matter(run, student), sort_keys=False, allow_unicode=True)
    return f"---\n{front_matter}---\n\n{markdown(card)}\n{OURS}\n"


def _front_matter(run: Run, student: Json) -> Json:
    """What the hub indexes. Only models of the hub are named here: a name of this machine would be someone else's."""
    bases = [path for path in _origins(run) if path is not None]
    data = section(run.config, "dataset", "train_dataset").get("repo_id")
    tags = dict.fromkeys(tag for mixer in mixers_in(student) for tag in name_of(mixer).tags)
    known = {
        "base_model": bases[0] if len(bases) == 1 else bases,
        "datasets": [str(data)] if data else None,
        "library_name": "transformers",
        "license": _licence(run),
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "distillkit", *tags],
    }
    return {key: value for key, value in known.items() if value}


def _summary(run: Run, student: Json) -> str:
    mixers = mixers_in(student)
    exchanged = [mixer for mixer in mixers if mixer != FULL]
    tokens = shown(numbers.count, run.results, "training", "tokens")
    if not exchanged:
        return f"A student of {_teacher(run)}, distilled from it on {tokens} tokens."
    which = "all" if len(exchanged) == len(mixers) else f"{len(exchanged)} of the {len(mixers)}"
    titles = " and ".join(name_of(mixer).title for mixer in dict.fromkeys(exchanged))
    return (
        f"{_teacher(run)} with {titles} in place of softmax attention in {which} layers, "
        f"distilled from it on {tokens} tokens."
    )


def _results(run: Run, evaluations: Sequence[Evaluation]) -> list[Part]:
    measured = divergence_table(run)
    parts: list[Part] = [] if measured is None else [measured]
    models = merge_models(evaluations)
    here = [model for model in models if not model.is_teacher and model.lies_in(run.path)]
    compared = comparison([*(model for model in models if model.is_teacher), *here]) if here else None
    if compared is not None:
        parts += [
            f"Beside its teacher, measured by {EVALUATED}:",
            *(line for each in evaluations for line in each.caveats),
        ]
        parts += [compared, LEGEND]
    for sample in rows(run.results, "samples")[:1]:
        parts += ["Generated text (after ▸):", Code(f"{sample.get('prompt')}▸{sample.get('continuation')}")]
    return parts


def _usage(name: str, student: Json, folder: Path) -> str:
    known, options = "", ""
    if is_student(student):
        known = (
            "import distillkit  # knows the architecture; to install it: pip install . in a clone of its repository\n"
            "# or without it: trust_remote_code=True below, which runs the code beside the weights\n\n"
        )
    elif student.get("auto_map"):
        options = ", trust_remote_code=True"
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    path = f'path = "{name}"' if on_hub else 'path = "."  # the folder of this card, or its id on the hub'
    return (
        f"{known}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"{path}\n"
        f"model = AutoModelForCausalLM.from_pretrained(path{options})\n"
        f"tokenizer = AutoTokenizer.from_pretrained(path)\n"
        f"{_prompt(folder)}"
        'output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=64)\n'
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    )


def _prompt(folder: Path) -> str:
    """A text to be continued, or a question where the tokenizer has a chat template."""
    settings = folder / "tokenizer_config.json"
    has_template = (folder / "chat_template.jinja").is_file()
    if not has_template and (not settings.is_file() or not read_content(settings).get("chat_template")):
        return 'inputs = tokenizer("The theory of relativity states that", return_tensors="pt")\n'
    return (
        'messages = [{"role": "user", "content": "What does the theory of relativity state?"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
        ")\n"
    )


def _architecture(student: Json) -> list[Part]:
    mixers = mixers_in(student)
    lines = []
    for mixer in dict.fromkeys(mixers):
        layers = _ranges([index for index, each in enumerate(mixers) if each == mixer])
        name = name_of(mixer)
        lines.append(f"{name.title} in layers {layers}{name.details(student)}")
    return [Bullets([*lines, "everything else as in the teacher"])] if lines else []


def _training(run: Run) -> list[Part]:
    phases = phase_table(run)
    lines = [f"Text: {_training_data(run)}"]
    if (trained := number(run.results, "parameters", "trained")) is not None:
        frozen = shown(numbers.count, run.results, "parameters", "frozen")
        lines.append(f"{numbers.count(trained)} parameters were trained, {frozen} were frozen")
    losses = section(run.results, "losses")
    final = [f"{name} {shown(numbers.figures, losses, name)}" for name in losses]
    lines += [f"Losses at the end: {', '.join(final)}"] if final else []
    return [*([] if phases is None else [phases]), Bullets(lines)]


def _limits(run: Run, student: Json, evaluations: Sequence[Evaluation]) -> list[str]:
    """Plain words, each out of a number of the run."""
    converted = any(mixer != "full" for mixer in mixers_in(student))
    about = "linear attention and distillation" if converted else "distillation"
    lines = [f"For research on {about}. The teacher's intended use, its limits and its faults are the student's too."]
    lengths = [length for phase in run.phases if (length := number(phase.config, "sequence_length")) is not None]
    if lengths:
        longest = numbers.count(max(lengths))
        lines.append(f"Trained on rows of at most {longest} tokens: longer texts are not known to work.")
    kl, agreement = (number(run.results, "divergence", "after", key) for key in ("kl", "agreement"))
    if kl is not None and agreement is not None:
        over = " over the teacher's stored tokens" if over_stored_tokens(measured_with(run)) else ""
        lines.append(
            f"It is not its teacher: on held-out text its likeliest next token is another in "
            f"{numbers.percent(1 - agreement)} of places (KL {numbers.nats(kl)} nats per token{over})."
        )
    here = [model for model in merge_models(evaluations) if model.lies_in(run.path)]
    missing = [] if any(model.benchmarks for model in here) else ["tasks (benchmarks)"]
    missing += [] if any(model.needles for model in here) else ["recall over long texts"]
    lines += [f"Not measured: {' and '.join(missing)}."] if missing else []
    return [*lines, "Nothing was done or measured for safety."]


def _provenance(run: Run) -> Table:
    command = run.record.get("command")
    known = {
        "teacher": _teacher(run),
        "commit of distillkit": run.results.get("commit"),
        "command": _public_command(command) if isinstance(command, str) else None,
    }
    return Table(["", ""], facts_of({**run.results, **known}, [*known]), words=True)


def _origins(run: Run) -> list[str | None]:
    """Hub ids of the model that was trained, where it was not made from the teacher, and of the teacher."""
    first = run.phases[0].config if run.phases else run.config
    teacher = section(run.config, "teacher")
    return [
        _hub_id(run.config.get("model", first.get("model")), section(run.record, "origins", "student")),
        _hub_id(
            teacher.get("path") if teacher.get("kind") == "hf" else None, section(run.record, "origins", "teacher")
        ),
    ]


def _hub_id(path: object, noted: Json) -> str | None:
    """The path where it is an id of the hub: the run has noted no weights of its own for it, and no file is there."""
    if not isinstance(path, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        return None
    return None if "weights_sha256" in noted or Path(path).exists() else path


def _teacher(run: Run) -> str:
    """The name of the teacher: a hub id, or the name of its file or folder; and how it was quantised."""
    quantization = section(run.config, "teacher").get("quantization")
    return _teachers_name(run) + (f" (quantised to {quantization})" if quantization else "")


def _teachers_name(run: Run) -> str:
    teacher = section(run.config, "teacher")
    if teacher.get("kind") == "dataset":
        return f"the teacher captured in {_training_data(run)}"
    if (hub := _origins(run)[1]) is not None:
        return hub
    if teacher.get("kind") == "server":  # by the name that the server gave
        return _public_name(section(run.record, "origins", "teacher").get("model") or teacher.get("model"))
    gguf = section(teacher, "kwargs").get("gguf_file")
    return Path(gguf).stem if isinstance(gguf, str) else _public_name(teacher.get("path") or teacher.get("model"))


def _training_data(run: Run) -> str:
    data = section(run.config, "dataset", "train_dataset")
    return _public_name(data.get("repo_id") or data.get("disk_path"))


def _public_name(path: object) -> str:
    """A hub id as it is; of a path of a machine only the name."""
    if not isinstance(path, str):
        return numbers.NOTHING
    hub = re.fullmatch(r"[\w-][\w.-]*/[\w-]+", path) and not Path(path).exists()
    return path if hub else Path(path).name or path


_FOLDERS = re.compile(
    r"""(?P<url>https?://[^\s,{}\[\]'"]+)|(?P<before>^|[\s=:,{\[('"])[~/][^=,{}\[\]'"]*/(?=[^\s=,{}\[\]'"/])"""
)
"""Folders from the root or home of a machine, anywhere in a word; web addresses stay whole."""


def _public_command(command: str) -> str:
    """The command without the folders of the machine."""
    try:
        words = shlex.split(command)
    except ValueError:
        return numbers.NOTHING
    return shlex.join(_FOLDERS.sub(lambda found: found["url"] or found["before"], word) for word in words)


def _licence(run: Run) -> str | None:
    """The teacher's own, from the card beside its weights."""
    path = section(run.config, "teacher").get("path")
    card = Path(path) / CARD if isinstance(path, str) else None
    if card is None or not card.is_file():
        return None
    parts = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front_matter = yaml.safe_load(parts[1]) if parts else None
    except yaml.YAMLError:
        return None
    licence = front_matter.get("license") if isinstance(front_matter, dict) else None
    return licence if isinstance(licence, str) else None


def _ranges(indices: Sequence[int]) -> str:
    """`0-2, 4-6, 8` from the numbers one by one."""
    starts = [index for index in indices if index - 1 not in indices]
    stops = [index for index in indices if index + 1 not in indices]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))
