"""`distillkit report`: result files become report.md, report.html, pictures/ and model cards."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from distillkit.reporting import numbers
from distillkit.reporting.comparison import LEGEND, comparison
from distillkit.reporting.document import Bullets, Part, Section, html, markdown, write_pictures
from distillkit.reporting.evaluated import Model, common_tasks, lengths, merge_models, score, the_teacher
from distillkit.reporting.evaluation_sections import (
    benchmark_section,
    divergence_section,
    generation_section,
    long_context_section,
    needle_section,
    speed_section,
)
from distillkit.reporting.model_card import would_lose_an_evaluation, write_model_card
from distillkit.reporting.reading import Results, Run, number, read_results
from distillkit.reporting.shares import comparable_tasks, pairable_tasks, paired_over, share_of_teacher
from distillkit.reporting.sources import failure_section, sources_section
from distillkit.reporting.training_section import measured_with, over_stored_tokens, training_section
from distillkit.runs.names import CARD, HTML, MARKDOWN
from distillkit.runs.writing import write_whole


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Write report.md, report.html and pictures/ into `out` and return the HTML file.

    paths: result files of evaluations, folders that hold one, and folders of runs.

    Raises:
        UserError: one of the paths holds no result, or cannot be read.
    """
    report = build_report(read_results(paths))
    out.mkdir(parents=True, exist_ok=True)
    write_pictures(report, out)
    write_whole(out / MARKDOWN, markdown(report).encode())
    write_whole(out / HTML, html(report).encode())
    return out / HTML


def report_folder(paths: Sequence[Path]) -> Path:
    """The default folder of a report: beside its only result, else `report`."""
    if len(paths) > 1:
        return Path("report")
    return paths[0] if paths[0].is_dir() else paths[0].parent


def write_run_report(folder: Path) -> str:
    """Write report and card into the folder of a finished run, and return a line about them.

    A failure here becomes that line: it must not fail a run that is finished.
    """
    try:
        card = write_model_card(folder)
        write_report([folder], folder)  # last: a resumed run takes the report as the sign that all was written
    except Exception as error:
        return f"no report was written: {type(error).__name__}: {numbers.one_line(str(error))}"
    kept = f"{CARD} was left as it is" if card is None else str(card)
    return f"report: {folder / HTML} and {MARKDOWN}; model card: {kept}"


def write_cards(paths: Sequence[Path]) -> list[Path]:
    """Rewrite the cards of the finished runs among `paths`, with the results of the evaluations among them.

    A card with an evaluation stays as it is where none of its student is given.
    """
    results = read_results(paths)
    students = [run.path for run in results.runs if run.results and (run.path / "config.json").exists()]
    folders = [folder for folder in students if not would_lose_an_evaluation(folder, results.evaluations)]
    return [card for folder in folders if (card := write_model_card(folder, results.evaluations)) is not None]


def build_report(results: Results) -> Section:
    """What a reader in a hurry should know, one sentence each; then the sections for which there are results."""
    models = merge_models(results.evaluations)
    table = comparison(models)
    sections = [
        None if table is None else Section("Teacher and students", [table, LEGEND]),
        divergence_section(models),
        generation_section(models),
        benchmark_section(models),
        needle_section(models),
        long_context_section(models),
        speed_section(models),
        training_section(results.runs),
        failure_section(results.evaluations),
        sources_section(results),
    ]
    lead = [caveat for each in results.evaluations for caveat in each.caveats]
    lead += [_about_run(run) for run in results.runs]
    for model in models:
        if not model.is_teacher and (parts := list(_about_student(model, models))):
            lead.append(f"{model.name}: {'; '.join(parts)}.")
    first: list[Part] = [Bullets(lead)] if lead else []
    return Section(_title(models, results.runs), [*first, *(each for each in sections if each is not None)])


def _title(models: Sequence[Model], runs: Sequence[Run]) -> str:
    teacher = the_teacher(models)
    students = [model.name for model in models if not model.is_teacher]
    names = students or [run.name for run in runs] or ["nothing"]
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if teacher is None or not students:
        return f"Distillation: {listed}"
    return f"{listed} beside {teacher.name if teacher.name != 'teacher' else 'the teacher'}"


def _about_run(run: Run) -> str:
    if not run.results:
        return f"The run {run.name} is not finished."
    if not (tokens := number(run.results, "training", "tokens")):
        return f"The run {run.name} had no training steps."
    text = f"The run {run.name}: {numbers.count(tokens)} tokens"
    before, after = (number(run.results, "divergence", when, "kl") for when in ("before", "after"))
    if before is not None and after is not None:
        over = " over the teacher's stored tokens" if over_stored_tokens(measured_with(run)) else ""
        text += f" took the student from KL {numbers.nats(before)} to {numbers.nats(after)} nats per token{over}"
    if share := number(run.results, "divergence", "after", "agreement"):
        text += f"; the same likeliest token as the teacher in {numbers.percent(share)} of places"
    return f"{text}."


def _about_student(model: Model, models: Sequence[Model]) -> Iterator[str]:
    teacher, compared = the_teacher(models), comparable_tasks(models)
    if teacher is not None and (kept := share_of_teacher(model, teacher, compared)).value is not None:
        error = "" if kept.error is None else f" ± {numbers.percent(kept.error).removesuffix('%')}"
        over = f"over {len(compared)} tasks" if len(compared) > 1 else f"in {compared[0]}"
        yield f"{numbers.shown(kept.value, numbers.percent)}{error} of its teacher's score above chance {over}"
    tasks = [] if teacher is None else pairable_tasks(models, teacher)
    if teacher is not None and (pair := paired_over(model, teacher, tasks)) is not None:
        error = "" if pair.not_worse_error is None else f" ± {numbers.percent(pair.not_worse_error).removesuffix('%')}"
        yield (
            f"{numbers.percent(pair.not_worse)}{error} of answers at least as right as its teacher's "
            f"(more {numbers.percent(pair.win)}, less {numbers.percent(pair.loss)})"
        )
    if (kl := number(model.divergence, "kl")) is not None:
        share = number(model.divergence, "agreement")
        same = "" if share is None else f", the same likeliest token in {numbers.percent(share)} of places"
        yield f"KL {numbers.nats(kl)} nats per token from its teacher{same}"
    tasks = common_tasks(models)
    longest = max(lengths(models, tasks), default=0)
    if (found := score(model, tasks, longest)) is not None:
        yield f"{numbers.percent(found[0])} of needles found at {numbers.length(longest)} tokens"
