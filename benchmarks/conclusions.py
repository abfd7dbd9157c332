"""The first section of docs/results.md: one line for each question, from several result files."""

import json
from pathlib import Path
from typing import Any

from cells import Part, grid
from distillkit.reporting import numbers
from distillkit.reporting.evaluated import Model, merge_models
from distillkit.reporting.reading import Evaluation
from distillkit.reporting.shares import comparable_tasks, share_of_teacher
from frame import Json
from replicated import (
    NOISE,
    PROSE,
    TITLES,
    closest,
    finished,
    last_shares,
    last_student,
    measured,
    retriever,
    shares_of,
    three,
    title,
)


def conclusions(results: Path) -> list[Part]:
    """At most seven lines; those whose files are missing are left out."""

    def content(name: str) -> Any:
        return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))

    lines = [
        line(*map(content, files))
        for line, files in (
            (closeness, ["replication"]),
            (answering, ["answers"]),
            (retrieval, ["replication"]),
            (speed, ["throughput"]),
            (writing, ["decoding_afm", "serving_afm"]),
            (memory, ["decoding_afm"]),
            (plan, ["memory", "plan_times"]),
        )
        if all((results / f"{file}.json").exists() for file in files)
    ]
    return [grid(["question", "result", "compared with", "measured with", "details"], lines, words=True)]


def closeness(content: Json) -> list[str]:
    done = finished(content)
    name, student = closest(done)
    end, before = measured(done[name], student), done[name]["phases"][0]["divergence"]["before"]
    return [
        "How close is the closest student to its teacher?",
        f"KL {three(end['kl'])} nats per token; the same likeliest token in {numbers.percent(end['agreement'])}",
        f"after conversion: KL {numbers.decimals(before['kl'])}, {numbers.percent(before['agreement'])}",
        f"SmolLM2-135M; {title(name)}; {numbers.seconds(done[name]['seconds'])} of training, {done[name]['device']}",
        "[divergence](#divergence-from-the-teacher)",
    ]


def answering(content: Json) -> list[str]:
    models = merge_models([Evaluation(Path(), each) for each in content["evaluations"]])
    teacher, *students = models
    tasks = comparable_tasks(models)

    def shown(model: Model) -> str:
        kept, unparsed = share_of_teacher(model, teacher, tasks), model.generation["choices"]["unparsed"]
        assert kept.value is not None
        name = TITLES.get(model.name, model.name)
        return f"{name}: {numbers.percent(kept.value)} kept, {numbers.percent(unparsed)} of answers are no letter"

    return [
        f"What is kept of the teacher's scores above chance ({len(tasks)} benchmarks) and of the format of answers?",
        "; ".join(map(shown, students)),
        f"teacher: {numbers.percent(teacher.generation['choices']['unparsed'])} of answers are no letter",
        f"SmolLM2-135M; {content['machine']['gpu']}",
        "[answers](#what-students-answer)",
    ]


def retrieval(content: Json) -> list[str]:
    done, teacher = finished(content), content["teacher"]
    name = retriever(done)
    trained = done[name]["trained_length"][last_student(done[name])]

    def at_lengths(lengths: dict[str, list[int]], shares: dict[str, dict[int, float]]) -> str:
        parts = []
        for kind, found in shares.items():
            ends = dict.fromkeys(length for length in lengths[kind] if length in found)
            parts.append(f"{kind} " + ", ".join(f"{numbers.percent(found[at])} at {numbers.length(at)}" for at in ends))
        return "; ".join(parts)

    kinds = {"noise": NOISE, "prose": PROSE}
    of_student = {kind: last_shares(done[name], task) for kind, task in kinds.items()}
    of_teacher = {kind: shares_of(teacher["needles"][task]) for kind, task in kinds.items()}
    lengths = {kind: [max(of_teacher[kind]), max(of_student[kind])] for kind in kinds}
    return [
        "Does a student without full attention retrieve from long contexts?",
        f"needles found: {at_lengths(lengths, of_student)}",
        f"teacher, as far as measured: {at_lengths(lengths, of_teacher)}",
        f"SmolLM2-135M; {title(name)}, trained on rows of {numbers.length(trained)}",
        "[needles](#single-needles-in-noise)",
    ]


def speed(content: Json) -> list[str]:
    rows = {row["row"]: row for row in content["rows"]}
    reference = rows["reference"]
    same = [row for row in rows.values() if row["sequence_length"] == reference["sequence_length"]]
    fastest = max(same, key=lambda row: row["tokens_per_second"])
    rates = [each["tokens_per_second"] for each in (fastest, reference)]
    return [
        "How fast is training, teacher included?",
        f"{numbers.rate(rates[0])} tokens/s ({numbers.TIMES}{rates[0] / rates[1]:.2f})",
        f"plain eager loop: {numbers.rate(rates[1])} tokens/s",
        f"shapes of {content['shape']}, hybrid; {content['machine']['gpu']}",
        "[throughput](#training-throughput-and-memory)",
    ]


def writing(content: Json, served: Json) -> list[str]:
    alone = {model: found["rows"][-1] for model, found in content["models"].items()}
    longest = max(served["settings"]["contexts"])
    many = {row["model"]: row for row in served["rows"] if row["context"] == longest}  # the last: as many as fit

    def speeds(*models: str) -> str:
        one = ", ".join(
            f"{TITLES.get(model, model)} {numbers.rate(alone[model]['decode_tokens_per_second'])}" for model in models
        )
        all_ = ", ".join(
            f"{TITLES.get(model, model)} {numbers.rate(many[model]['tokens_per_second'])}" for model in models
        )
        ends = numbers.length(alone[models[0]]["context"]), numbers.length(longest)
        return f"one sequence behind {ends[0]} tokens: {one} tokens/s; as many as fit behind {ends[1]} in vLLM: {all_}"

    return [
        "How fast does a student write?",
        speeds("hybrid", "kda_only"),
        speeds("teacher"),
        f"shapes of {content['settings']['teacher']}, random weights; {content['machine']['gpu']}",
        "[decoding](#decoding-at-afm-45bs-shapes), [vLLM](#serving-with-vllm)",
    ]


def memory(content: Json) -> list[str]:
    rows = {model: found["rows"][-1] for model, found in content["models"].items()}
    context = numbers.length(rows["teacher"]["context"])
    kept = {model: numbers.bytes_(row["kv_cache_bytes"] + row["state_bytes"]) for model, row in rows.items()}
    return [
        f"How much memory does decoding need at {context} tokens of context?",
        f"KDA only: {kept['kda_only']}; hybrid: {kept['hybrid']}",
        f"teacher: {kept['teacher']}",
        f"shapes of {content['settings']['teacher']}, one row, keys, values and states; {content['machine']['gpu']}",
        "[decoding](#decoding-at-afm-45bs-shapes)",
    ]


def plan(content: Json, times: Json) -> list[str]:
    off = [max(abs(row["ratio"] - 1) for row in each["rows"]) for each in (content, times)]
    steps = [len(each["rows"]) for each in (content, times)]
    return [
        "How accurate is `distillkit plan`?",
        f"memory within {numbers.percent(off[0])}, tokens/s within {numbers.percent(off[1])}",
        f"measured steps: {steps[0]} for memory, {steps[1]} for tokens/s",
        f"SmolLM2-135M and shapes of AFM-4.5B; {content['machine']['gpu']}",
        "[plan](#accuracy-of-the-plan)",
    ]
