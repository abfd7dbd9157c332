"""The card of a student: README.md beside its weights, as the hub reads it, from the files of its run alone.

A card says what others may know: paths of this machine become names. One that a person has made their own, by removing
the last line, is left as it is.
"""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from distillkit.config.errors import UserError
from distillkit.reporting import numbers
from distillkit.reporting.comparison import LEGEND, comparison
from distillkit.reporting.document import Code, Table, cells
from distillkit.reporting.markdown import code, table, text
from distillkit.reporting.models import merge_models
from distillkit.reporting.reading import Evaluation, Json, Run, number, read_json, read_results, rows, section
from distillkit.reporting.training import divergence_table, phase_table

CARD = "README.md"
MEASURED = "Beside its teacher, as `distillkit evaluate` measured it:"
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
        raise UserError("RESULTS", f"{str(folder)!r} holds no run, but an evaluation")
    run = runs[0]
    staged = path.with_name(f".{path.name}.tmp")
    staged.write_text(model_card(run, evaluations), encoding="utf-8")
    os.replace(staged, path)
    return path


def would_lose_an_evaluation(folder: Path, evaluations: Sequence[Evaluation]) -> bool:
    """Whether the card in a folder tells of an evaluation, and none of these is of the student there."""
    path = folder / CARD
    here = [model for model in merge_models(evaluations) if not model.is_teacher and model.lies_in(folder)]
    return not here and path.is_file() and MEASURED in path.read_text(encoding="utf-8", errors="replace")


def model_card(run: Run, evaluations: Sequence[Evaluation] = ()) -> str:
    """The card of the student of a run."""
    student = _student_config(run.path)
    name = str(section(run.config, "training_args").get("hub_model_id") or run.name)
    blocks = [
        f"---\n{yaml.safe_dump(_front_matter(run, student), sort_keys=False, allow_unicode=True)}---",
        f"# {text(name)}",
        text(_summary(run, student)),
        *_results(run, evaluations),
        "## How to use it",
        code(Code(_usage(name, student), "python")),
        *_architecture(student),
        *_training(run),
        "## Intended use and limits",
        "\n".join(f"- {text(line)}" for line in _limits(run, evaluations)),
        *_provenance(run),
        OURS,
    ]
    return "\n\n".join(blocks) + "\n"


def _front_matter(run: Run, student: Json) -> Json:
    """What the hub indexes. Only models of the hub are named here: a name of this machine would be someone else's."""
    known: Json = {}
    if bases := [path for path in _origins(run) if path is not None]:
        known["base_model"] = bases[0] if len(bases) == 1 else bases
    if data := section(section(run.config, "dataset"), "train_dataset").get("repo_id"):
        known["datasets"] = [str(data)]
    known["library_name"] = "transformers"
    if (licence := _licence(run)) is not None:
        known["license"] = licence
    tags = ["distillation", "distillkit"]
    if student.get("model_type") == "kda_hybrid":
        tags += ["kimi-delta-attention", "linear-attention"]
    return {**known, "pipeline_tag": "text-generation", "tags": tags}


def _summary(run: Run, student: Json) -> str:
    teacher = _teacher(run)
    kinds = _layer_types(student)
    linear = kinds.count("linear_attention")
    tokens = number(section(run.results, "training"), "tokens")
    learnt = f"distilled from it on {numbers.shown(tokens, numbers.count)} tokens"
    if not linear:
        return f"A student of {teacher}, {learnt}."
    which = "all" if linear == len(kinds) else f"{linear} of the {len(kinds)}"
    return f"{teacher} with Kimi Delta Attention in place of softmax attention in {which} layers, {learnt}."


def _results(run: Run, evaluations: Sequence[Evaluation]) -> list[str]:
    blocks = []
    if (measured := divergence_table(run.results)) is not None:
        blocks.append(table(measured))
    models = merge_models(evaluations)
    here = [model for model in models if not model.is_teacher and model.lies_in(run.path)]
    compared = comparison([*(model for model in models if model.is_teacher), *here]) if here else None
    if compared is not None:
        blocks += [MEASURED, *(text(caveat) for each in evaluations for caveat in each.caveats)]
        blocks += [table(compared), text(LEGEND)]
    for sample in rows(run.results, "samples")[:1]:
        blocks += ["It writes (after ▸):", code(Code(f"{sample.get('prompt')}▸{sample.get('continuation')}"))]
    return ["## Results", *blocks] if blocks else []


def _usage(name: str, student: Json) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    options = ""
    if student.get("model_type") == "kda_hybrid":
        lines.insert(
            0,
            "import distillkit  # knows the architecture; to install it: pip install . in a clone of its repository\n"
            "# or without it: trust_remote_code=True below, which runs the code beside the weights\n",
        )
    elif student.get("auto_map"):
        options = ", trust_remote_code=True"
    place = name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else "path/to/this/folder"
    return "\n".join(
        [
            *lines,
            f'model = AutoModelForCausalLM.from_pretrained("{place}"{options})',
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
            'inputs = tokenizer("The theory of relativity states that", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
        ]
    )


def _architecture(student: Json) -> list[str]:
    kinds = _layer_types(student)
    if not kinds:
        return []
    where = {
        kind: [index for index, each in enumerate(kinds) if each == kind]
        for kind in ("linear_attention", "full_attention")
    }
    lines = []
    if linear := where["linear_attention"]:
        heads = (
            "its own keys and values for each query head" if student.get("kv_heads") == "expand" else "grouped heads"
        )
        taps = student.get("conv_size")
        lines.append(f"Kimi Delta Attention in layers {_ranges(linear)}: {heads}, short convolutions of {taps} tokens")
    if full := where["full_attention"]:
        positions = "with the rotary embedding" if student.get("use_rope") else "without positions (NoPE)"
        lines.append(f"full attention in layers {_ranges(full)}, {positions}")
    lines.append("everything else as in the teacher")
    return ["## Architecture", "\n".join(f"- {text(line)}" for line in lines)]


def _training(run: Run) -> list[str]:
    blocks = ["## Training"]
    if (phases := phase_table(run)) is not None:
        blocks.append(table(phases))
    data = section(section(run.config, "dataset"), "train_dataset")
    parameters, losses = section(run.results, "parameters"), section(run.results, "losses")
    lines = [f"Text: {_place(data.get('repo_id') or data.get('disk_path'))}"]
    if (trained := number(parameters, "trained")) is not None:
        frozen = numbers.shown(number(parameters, "frozen"), numbers.count)
        lines.append(f"{numbers.count(trained)} parameters were trained, {frozen} kept as they were")
    told = [f"{name} {numbers.figures(value)}" for name in losses if (value := number(losses, name)) is not None]
    if told:
        lines.append(f"Losses at the end: {', '.join(told)}")
    return [*blocks, "\n".join(f"- {text(line)}" for line in lines)]


def _limits(run: Run, evaluations: Sequence[Evaluation]) -> list[str]:
    """Plain words, each out of a number of the run."""
    lines = [
        "For research on linear attention and distillation. It inherits what its teacher may be used for, and its "
        "teacher's faults."
    ]
    lengths = [length for phase in run.phases if (length := number(phase.config, "sequence_length")) is not None]
    if lengths:
        lines.append(
            f"Trained on rows of at most {numbers.count(max(lengths))} tokens: longer texts are not known to work."
        )
    measured = section(section(run.results, "divergence"), "after")
    kl, agreement = number(measured, "kl"), number(measured, "agreement")
    if kl is not None and agreement is not None:
        lines.append(
            f"It is not its teacher: on held-out text its likeliest next token is another in "
            f"{numbers.percent(1 - agreement)} of places (KL {numbers.nats(kl)} nats per token)."
        )
    here = [model for model in merge_models(evaluations) if model.lies_in(run.path)]
    tested = [suite for suite in ("benchmarks", "needles") if any(getattr(model, suite) for model in here)]
    missing = [name for name in ("benchmarks", "needles") if name not in tested]
    if missing:
        words = {"benchmarks": "tasks (benchmarks)", "needles": "recall over long texts"}
        lines.append(f"Not measured: {' and '.join(words[name] for name in missing)}.")
    return [*lines, "Nothing was done or measured for safety."]


def _provenance(run: Run) -> list[str]:
    facts = [("teacher", _teacher(run)), ("commit of distillkit", run.results.get("commit"))]
    command = run.record.get("command")
    if isinstance(command, str):
        facts.append(("command", _public_command(command)))
    for key in ("machine", "versions"):
        facts += section(run.results, key).items()
    facts += [(f"seed: {name}", seed) for name, seed in section(run.results, "seeds").items()]
    body = [cells(str(label), str(value)) for label, value in facts if value is not None]
    return ["## Provenance", table(Table(["", ""], body, words=True))]


def _origins(run: Run) -> list[str | None]:
    """Hub ids of the model that was trained, where it was not made from the teacher, and of the teacher."""
    noted = section(run.record, "origins")
    first = run.phases[0].config if run.phases else run.config
    teacher = section(run.config, "teacher")
    return [
        _hub_id(run.config.get("model") if "model" in run.config else first.get("model"), section(noted, "student")),
        _hub_id(teacher.get("path") if teacher.get("kind") == "hf" else None, section(noted, "teacher")),
    ]


def _hub_id(path: object, noted: Json) -> str | None:
    """The path where it is an id of the hub: the run has noted no weights of its own for it, and no file is there."""
    if not isinstance(path, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        return None
    return None if "weights_sha256" in noted or Path(path).exists() else path


def _teacher(run: Run) -> str:
    """What the teacher is called: a hub id, or the name of its file or folder."""
    teacher = section(run.config, "teacher")
    if teacher.get("kind") == "dataset":
        data = section(section(run.config, "dataset"), "train_dataset")
        return f"the teacher captured in {_place(data.get('repo_id') or data.get('disk_path'))}"
    if (hub := _origins(run)[1]) is not None:
        return hub
    gguf = section(teacher, "kwargs").get("gguf_file")
    return Path(gguf).stem if isinstance(gguf, str) else _place(teacher.get("path") or teacher.get("model"))


def _place(path: object) -> str:
    """A hub id as it is; of a path of a machine only the name."""
    if not isinstance(path, str):
        return numbers.NOTHING
    hub = re.fullmatch(r"[\w-][\w.-]*/[\w-]+", path) and not Path(path).exists()
    return path if hub else Path(path).name or path


_FOLDERS = re.compile(
    r"""(?P<url>https?://[^\s,{}\[\]'"]+)|(?P<before>^|[\s=:,{\[('"])[~/][^=,{}\[\]'"]*/(?=[^\s=,{}\[\]'"/])"""
)
"""Folders from the root or home of a machine, anywhere in a word; an address of the web is left whole."""


def _public_command(command: str) -> str:
    """The command without the folders of the machine."""
    try:
        words = shlex.split(command)
    except ValueError:
        return numbers.NOTHING
    return shlex.join(_FOLDERS.sub(lambda found: found["url"] or found["before"], word) for word in words)


def _licence(run: Run) -> str | None:
    """The teacher's own, as the card beside its weights says."""
    path = section(run.config, "teacher").get("path")
    card = Path(path) / CARD if isinstance(path, str) else None
    if card is None or not card.is_file():
        return None
    parts = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        told = yaml.safe_load(parts[1]) if parts else None
    except yaml.YAMLError:
        return None
    licence = told.get("license") if isinstance(told, dict) else None
    return licence if isinstance(licence, str) else None


def _student_config(folder: Path) -> Json:
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def _layer_types(student: Json) -> list[str]:
    kinds = student.get("layer_types")
    return kinds if isinstance(kinds, list) and "linear_attention" in kinds else []


def _ranges(indices: Sequence[int]) -> str:
    """`0-2, 4-6, 8` from the numbers one by one."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][-1] + 1:
            spans[-1].append(index)
        else:
            spans.append([index])
    return ", ".join(f"{span[0]}" if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)
