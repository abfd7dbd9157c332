"""`distillkit report`: result files become report.md, report.html and pictures/."""

import os
from collections.abc import Sequence
from pathlib import Path

from distillkit.reporting import numbers
from distillkit.reporting.comparison import LEGEND, comparison
from distillkit.reporting.document import Paragraph, Report, Section
from distillkit.reporting.html import html
from distillkit.reporting.markdown import markdown, write_pictures
from distillkit.reporting.measured import benchmark_section, divergence_section, speed_section
from distillkit.reporting.model_card import CARD, would_lose_an_evaluation, write_model_card
from distillkit.reporting.models import Model, merge_models, the_teacher
from distillkit.reporting.needles import common_tasks, lengths, needle_section, score
from distillkit.reporting.provenance import failure_section, provenance_section
from distillkit.reporting.reading import Results, Run, number, read_results, section
from distillkit.reporting.training import run_names, training_section

MARKDOWN, HTML = "report.md", "report.html"


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Write report.md, report.html and pictures/ into `out` and return the HTML file.

    paths: result files of evaluations, folders that hold one, and folders of runs.

    Raises:
        UserError: one of the paths holds no result, or cannot be read.
    """
    report = build_report(read_results(paths))
    out.mkdir(parents=True, exist_ok=True)
    write_pictures(report, out)
    _write(out / MARKDOWN, markdown(report))
    _write(out / HTML, html(report))
    return out / HTML


def report_folder(paths: Sequence[Path]) -> Path:
    """Where a report goes that is told nothing: beside its only result, else into `report`."""
    if len(paths) > 1:
        return Path("report")
    return paths[0] if paths[0].is_dir() else paths[0].parent


def build_report(results: Results) -> Report:
    """The sections for which there is something to say."""
    models = merge_models(results.evaluations)
    table = comparison(models)
    sections = [
        None if table is None else Section("Teacher and students", [table, Paragraph(LEGEND)]),
        divergence_section(models),
        benchmark_section(models),
        needle_section(models),
        speed_section(models),
        training_section(results.runs),
        failure_section(results.evaluations),
        provenance_section(results),
    ]
    lead = [caveat for each in results.evaluations for caveat in each.caveats]
    lead += [*(_about_run(run, name) for run, name in zip(results.runs, run_names(results.runs), strict=True))]
    lead += [line for model in models if not model.is_teacher and (line := _about_student(model, models))]
    return Report(_title(models, results.runs), lead, [each for each in sections if each is not None])


def _title(models: Sequence[Model], runs: Sequence[Run]) -> str:
    teacher = the_teacher(models)
    students = [model.name for model in models if not model.is_teacher]
    names = students or run_names(runs) or ["nothing"]
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if teacher is None or not students:
        return f"Distillation: {listed}"
    return f"{listed} beside {teacher.name if teacher.name != 'teacher' else 'the teacher'}"


def _about_run(run: Run, name: str) -> str:
    if not run.results:
        return f"The run {name} is not finished."
    measured, training = section(run.results, "divergence"), section(run.results, "training")
    tokens = number(training, "tokens")
    if not tokens:
        return f"The run {name} trained on nothing."
    told = f"The run {name}: {numbers.count(tokens)} tokens"
    before, after = number(measured, "before", "kl"), number(measured, "after", "kl")
    if before is not None and after is not None:
        told += f" took the student from KL {numbers.nats(before)} to {numbers.nats(after)} nats per token"
    share = number(measured, "after", "agreement")
    return told + (f"; it agrees with its teacher on {numbers.percent(share)} of likeliest tokens." if share else ".")


def _about_student(model: Model, models: Sequence[Model]) -> str:
    parts = []
    if (kl := number(model.divergence, "kl")) is not None:
        told = f"KL {numbers.nats(kl)} nats per token from its teacher"
        share = number(model.divergence, "agreement")
        parts.append(told + ("" if share is None else f", the same likeliest token in {numbers.percent(share)}"))
    if model.needles:
        tasks = common_tasks(models)
        longest = max(lengths(models, tasks), default=0)
        if (found := score(model, tasks, longest)) is not None:
            parts.append(f"{numbers.percent(found[0])} of needles found at {numbers.length(longest)} tokens")
    return f"{model.name}: {'; '.join(parts)}." if parts else ""


def _write(path: Path, content: str) -> None:
    staged = path.with_name(f".{path.name}.tmp")
    staged.write_text(content, encoding="utf-8")
    os.replace(staged, path)


def write_run_report(folder: Path) -> str:
    """Write report and card into the folder of a finished run; the line that says so.

    A run that is finished stays so: whatever goes wrong here becomes that line.
    """
    try:
        card = write_model_card(folder)
        write_report([folder], folder)  # last, for a resumed run looks for it
    except Exception as error:
        return f"no report was written: {type(error).__name__}: {numbers.one_line(str(error))}"
    kept = f"{CARD} was left as it is" if card is None else str(card)
    return f"report: {folder / HTML} and {MARKDOWN}; model card: {kept}"


def write_cards(paths: Sequence[Path]) -> list[Path]:
    """Write the cards of the finished runs among `paths` anew, with what the evaluations among them measured.

    A card that tells of an evaluation stays where none of its student is given.
    """
    results = read_results(paths)
    students = [run.path for run in results.runs if run.results and (run.path / "config.json").exists()]
    folders = [folder for folder in students if not would_lose_an_evaluation(folder, results.evaluations)]
    return [card for folder in folders if (card := write_model_card(folder, results.evaluations)) is not None]
