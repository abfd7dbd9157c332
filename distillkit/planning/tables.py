"""A plan as a person reads it: one screen, numbers of three digits."""

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from distillkit.formatting import byte_text, count_text, duration_text, part_text, token_text
from distillkit.planning.gpus import LINK_SHARE, NETWORK
from distillkit.planning.ledger import GATHERED
from distillkit.planning.result import CapturePlan, PhasePlan, RunPlan
from distillkit.planning.step import BACKWARD, FORWARD, TEACHER

KINDS = ("teacher weights", "student weights", "gradients", "optimizer states", "activations")


def run_tables(plan: RunPlan) -> Group:
    """Models, phases, disk, and what is doubtful."""
    parts: list[RenderableType] = [_models(plan), _phases(plan), _sum(plan)]
    parts += [_line("error", line, "red") for line in plan.errors]
    parts += [_line("warning", line, "yellow") for line in plan.warnings]
    return Group(*parts)


def _models(plan: RunPlan) -> Table:
    table = Table(title="Parameters, all and trained", title_justify="left")
    table.add_column("")
    table.add_column("all", justify="right")
    for phase in plan.phases:
        table.add_column(phase.name or "trained", justify="right")
    if plan.teacher_parameters is not None:
        table.add_row(
            f"teacher {escape(plan.teacher)}", count_text(plan.teacher_parameters), *["" for _ in plan.phases]
        )
    whole = plan.student_parameters
    trained = [part_text(phase.trained, whole) for phase in plan.phases]
    table.add_row("student", count_text(plan.student_parameters), *trained, style="bold")
    for group, (total, _) in plan.phases[0].groups.items():
        shown = [part_text(phase.groups[group][1], whole) for phase in plan.phases]
        table.add_row(f"  {group}", part_text(total, whole), *shown)
    return table


def _phases(plan: RunPlan) -> Table:
    gpus = f"{plan.gpus // plan.nodes} x {plan.gpu.name}" if plan.gpus > 1 else plan.gpu.name
    nodes = f"{plan.nodes} nodes of " if plan.nodes > 1 else ""
    table = Table(title=f"Estimate for {nodes}{gpus}", title_justify="left")
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase.name or "run", justify="right")
    rows: list[tuple[str, Callable[[PhasePlan], str]]] = [
        ("losses", lambda phase: ", ".join(phase.losses)),
        ("tokens per row", lambda phase: f"{phase.sequence_length:,}"),
        ("tokens per step", lambda phase: f"{phase.schedule.tokens_per_step:,}"),
        ("steps", lambda phase: "not known" if phase.schedule.steps is None else f"{phase.schedule.steps:,}"),
        ("tokens", _tokens),
    ]
    if plan.shard > 1:
        copies = f", {plan.replicate} copies" if plan.replicate > 1 else ""
        rows.append(("models divided over", lambda _: f"{plan.shard} GPUs{copies}"))
    if plan.context > 1:
        rows.append(("rows divided over", lambda _: f"{plan.context} GPUs"))
    for name, value in rows:
        table.add_row(name, *map(value, plan.phases))
    table.add_section()
    for kind in KINDS:
        table.add_row(kind, *(_of(phase, kind) for phase in plan.phases))
    if plan.shard > 1:
        table.add_row(GATHERED, *(_of(phase, GATHERED) for phase in plan.phases))
    table.add_row("CUDA, fragments", *(byte_text(phase.reserve) if phase.cost else "" for phase in plan.phases))
    total = [_total(phase, plan) for phase in plan.phases]
    table.add_row(f"of {byte_text(plan.gpu.memory)}", *total, style="bold")
    table.add_row("most in the", *(phase.cost.moment if phase.cost else "" for phase in plan.phases))
    table.add_section()
    for name, moment in (("teacher", TEACHER), ("forward", FORWARD), ("backward", BACKWARD)):
        per_token = [phase.gflops_per_token.get(moment, 0.0) for phase in plan.phases]
        table.add_row(f"GFLOP/token, {name}", *(f"{number:.3g}" if number else "" for number in per_token))
    if plan.gpus > 1:
        _communication(table, plan)
    speeds = [phase.tokens_per_second for phase in plan.phases]
    table.add_row("tokens/s", *("" if speed is None else count_text(speed) for speed in speeds))
    times = [phase.seconds for phase in plan.phases]
    table.add_row("time", *("not known" if time is None else duration_text(time) for time in times), style="bold")
    table.add_section()
    table.add_row("checkpoints", *(byte_text(phase.disk.checkpoints) for phase in plan.phases))
    table.add_row("saved student", *(byte_text(phase.disk.student) for phase in plan.phases))
    return table


def _communication(table: Table, plan: RunPlan) -> None:
    """What each GPU sends in a step, and how that takes a share of its time."""
    table.add_section()
    sent = [None if phase.cost is None else phase.cost.traffic for phase in plan.phases]

    def row(name: str, sizes: list[float]) -> None:
        if any(sizes):
            of_steps = [size * phase.micro_batches for size, phase in zip(sizes, plan.phases, strict=True)]
            table.add_row(name, *(byte_text(size) if size else "" for size in of_steps))

    for kind in dict.fromkeys(kind for each in sent if each is not None for kind in each.kinds):
        row(f"{kind} per step", [0 if each is None else each.kinds.get(kind, 0) for each in sent])
    at = f"at {LINK_SHARE:.0%} of {{:g}} GB/s"
    row(f"inside a node, {at}".format(plan.gpu.link / 1e9), [0 if each is None else each.inside for each in sent])
    row(f"between nodes, {at}".format(NETWORK / 1e9), [0 if each is None else each.between for each in sent])
    steps = [phase.step for phase in plan.phases]
    for name in ("communicated", "alone", "computed", "total"):
        label = {"alone": "  while nothing is computed", "total": "step"}.get(name, f"{name} per step")
        table.add_row(label, *("" if step is None else f"{getattr(step, name):.3g} s" for step in steps))
    table.add_row("limited by", *("" if step is None else step.limit for step in steps))


def _tokens(phase: PhasePlan) -> str:
    schedule = phase.schedule
    if schedule.tokens is None:
        return "not known (data of the hub)"
    guessed = "about " if schedule.available is not None and schedule.available.estimated else ""
    passes = "" if schedule.passes is None or schedule.passes < 0.01 else f", {guessed}{schedule.passes:.2g} x the data"
    return f"{token_text(schedule.tokens)}{passes}"


def _of(phase: PhasePlan, kind: str) -> str:
    return "" if phase.cost is None else byte_text(phase.cost.memory.get(kind, 0))


def _total(phase: PhasePlan, plan: RunPlan) -> Text:
    if phase.memory is None:
        return Text("not known")
    fits = phase.memory <= plan.gpu.memory
    return Text(f"{byte_text(phase.memory)}, {'fits' if fits else 'does not fit'}", style="green" if fits else "red")


def _sum(plan: RunPlan) -> Text:
    parts = [] if plan.seconds is None else [f"{duration_text(plan.seconds)} in all"]
    untrained = f", {byte_text(plan.untrained)} of it untrained" if plan.untrained else ""
    parts.append(f"{byte_text(plan.disk)} on disk{untrained}, {byte_text(plan.disk_peak)} while it trains")
    ends = (
        "Accuracy: memory was within 4 % of eight measured runs on one H100, all with their peak in the forward pass. "
        "With torch_compile and no checkpointing it was 0 to 15 % too high in two more; with both, it is too high. "
        "Time was within 20 % of seventeen runs on one H100, to most of which it was fitted. Nothing else was measured."
    )
    return Text(f"{'; '.join(parts)}. {ends}")


def _line(word: str, line: str, style: str) -> Text:
    return Text.assemble((f"{word}: ", style), line)


def capture_tables(plan: CapturePlan) -> Group:
    """The plan of a capture in one table, and what is doubtful."""
    table = Table(title=f"Estimate of a capture on {plan.gpu.name}", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    guessed = "" if plan.available is None or not plan.available.estimated else "about "
    tokens = "not known" if plan.available is None else f"{guessed}{token_text(plan.available.tokens)}"
    fits = "fits" if plan.memory <= plan.gpu.memory else "does not fit"
    table.add_row(f"teacher {escape(plan.teacher)}", count_text(plan.teacher_parameters))
    table.add_row("tokens", tokens)
    table.add_row("bytes per token", f"{plan.bytes_per_token:,}")
    table.add_row("on disk", "not known" if plan.disk is None else byte_text(plan.disk))
    table.add_row(f"of {byte_text(plan.gpu.memory)} per GPU", f"{byte_text(plan.memory)}, {fits}")
    table.add_row("GFLOP/token", f"{plan.gflops_per_token:.3g}")
    table.add_row("tokens/s", "not known" if plan.tokens_per_second is None else count_text(plan.tokens_per_second))
    table.add_row("time", "not known" if plan.seconds is None else duration_text(plan.seconds))
    errors = [_line("error", line, "red") for line in plan.errors]
    return Group(table, *errors, *(_line("warning", line, "yellow") for line in plan.warnings))
