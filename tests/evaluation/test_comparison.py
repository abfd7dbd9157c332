"""Every number of the divergence suite is what a dense computation in float64 gives, document by document."""

import json
import math
import statistics

import pytest
import torch

from distillkit.config import UserError
from distillkit.evaluation.comparison import compare
from tests.evaluation.largest_tensor import LargestTensor
from tests.training.tiny import batch, llama, row

EDGES = [2, 8, 16, 64]
ROWS = [row([9, 4, 11], seed=1), row([24], seed=2), row([1, 5, 2], seed=3), row([13, 10], seed=4, ignored=1)]
MEANS = ("kl", "reverse_kl", "jsd", "agreement", "agreement_top5")


@pytest.fixture(scope="module")
def models():
    teacher = llama(0, dtype=torch.float64)
    student = llama(0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():  # near enough to agree here and there
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return teacher, student


def batches():
    return [batch(ROWS[0], ROWS[1]), batch(ROWS[2], ROWS[3], sequence_length=24)]


def documents():
    """(tokens, labels) of each."""
    for each in ROWS:
        start = 0
        for length in each["seq_lengths"]:
            span = slice(start, start + length)
            yield each["input_ids"][span], each["labels"][span]
            start += length


def hidden_states(model, ids):
    """Of each decoder layer, before the final norm: [layers, tokens, width]."""
    kept = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: kept.append(output[0])) for layer in model.model.layers
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return torch.stack([state.squeeze(0) if state.dim() == 3 else state for state in kept])


def token_records(teacher, student):
    """For each document that has counted tokens, a dict of plain numbers for each of these."""
    found = []
    for tokens, labels in documents():
        ids = torch.tensor([tokens])
        ps, qs = (model(ids).logits[0].double().softmax(-1) for model in (teacher, student))
        states = [hidden_states(model, ids) for model in (teacher, student)]
        records = []
        for t in range(len(tokens) - 1):
            if labels[t + 1] == -100:
                continue
            p, q, target = ps[t], qs[t], tokens[t + 1]
            m = (p + q) / 2
            cosines = [torch.dot(a[t], b[t]) / (a[t].norm() * b[t].norm()) for a, b in zip(*states, strict=True)]
            records.append(
                {
                    "position": t + 1,
                    "kl": (p * (p / q).log()).sum().item(),
                    "reverse_kl": (q * (q / p).log()).sum().item(),
                    "jsd": ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()).item() / 2,
                    "agreement": float(p.argmax() == q.argmax()),
                    "agreement_top5": float(p.argmax() in q.argsort(descending=True)[:5]),
                    "teacher": (-p[target].log().item(), p.max().item(), float(p.argmax() == target)),
                    "student": (-q[target].log().item(), q.max().item(), float(q.argmax() == target)),
                    "cosines": [cosine.item() for cosine in cosines],
                }
            )
        if records:
            found.append(records)
    return found


def calibration_error(records, role):
    """Guo et al. 2017, equations 3 and 5: bins ((m - 1) / 15, m / 15]."""
    error = 0.0
    for m in range(1, 16):
        inside = [record[role] for record in records if (m - 1) / 15 < record[role][1] <= m / 15]
        if inside:
            confidence = statistics.fmean(probability for _, probability, _ in inside)
            accuracy = statistics.fmean(correct for *_, correct in inside)
            error += len(inside) / len(records) * abs(accuracy - confidence)
    return error


def numbers(by_document):
    """The suite's numbers, flat, by name."""
    records = [record for document in by_document for record in document]
    found = {name: statistics.fmean(record[name] for record in records) for name in MEANS}
    for role in ("teacher", "student"):
        found[f"{role}_perplexity"] = math.exp(statistics.fmean(record[role][0] for record in records))
        found[f"{role}_ece"] = calibration_error(records, role)
    for start, end in zip(EDGES, EDGES[1:], strict=False):
        inside = [record for record in records if start <= record["position"] < end]
        if inside:
            for name in ("kl", "agreement"):
                found[start, name] = statistics.fmean(record[name] for record in inside)
            for role in ("teacher", "student"):
                found[start, f"{role}_perplexity"] = math.exp(statistics.fmean(record[role][0] for record in inside))
    for layer in range(2):
        found["layer", layer] = statistics.fmean(record["cosines"][layer] for record in records)
    return found


def standard_errors(by_document):
    """The jackknife, as it is defined: everything again, without each document in turn."""
    left_out = [numbers(by_document[:index] + by_document[index + 1 :]) for index in range(len(by_document))]
    found = {}
    for name in numbers(by_document):
        values = [each.get(name, math.nan) for each in left_out]
        found[name] = math.sqrt(
            (len(values) - 1) / len(values) * sum((v - statistics.fmean(values)) ** 2 for v in values)
        )
    return found


def flat(measured):
    """(values, standard errors) of the suite's result, named as `numbers` names them."""
    values = {name: value for name, value in measured.items() if isinstance(value, float)}
    errors = dict(measured["standard_errors"])
    for bucket in measured["positions"]:
        for name in bucket["standard_errors"]:
            values[bucket["from"], name] = bucket[name]
            errors[bucket["from"], name] = bucket["standard_errors"][name]
    for each in measured["layers"]:
        values["layer", each["layer"]] = each["cosine"]
        errors["layer", each["layer"]] = each["standard_error"]
    return values, errors


@torch.no_grad()
@pytest.mark.parametrize("chunk_tokens", [1, 7, None])
def test_it_equals_the_dense_computation_on_documents_alone(models, chunk_tokens):
    measured = compare(
        *models, batches(), num_tokens=10**6, sequence_length=64, position_buckets=EDGES[:-1], chunk_tokens=chunk_tokens
    )
    by_document = token_records(*models)
    values, errors = flat(measured)
    assert values == pytest.approx(numbers(by_document), rel=1e-9)
    assert 0 < values["agreement"] < values["agreement_top5"] < 1
    errors = {name: math.nan if error is None else error for name, error in errors.items()}
    assert errors == pytest.approx(standard_errors(by_document), rel=1e-7, abs=1e-12, nan_ok=True)
    assert measured["positions"][-1]["standard_errors"]["kl"] is None  # of one document only
    counted = [record["position"] for document in by_document for record in document]
    assert measured["tokens"] == len(counted)
    assert measured["documents"] == len(by_document)
    assert [(each["from"], each["to"], each["tokens"]) for each in measured["positions"]] == [
        (start, end, sum(start <= position < end for position in counted))
        for start, end in zip(EDGES, EDGES[1:], strict=False)
    ]
    json.dumps(measured, allow_nan=False)


def test_a_model_beside_itself():
    model = llama(0)
    measured = compare(model, model, batches(), num_tokens=10**6, sequence_length=64)
    assert (measured["kl"], measured["agreement"], measured["agreement_top5"]) == (0, 1, 1)
    assert (measured["reverse_kl"], measured["jsd"]) == pytest.approx((0, 0), abs=1e-6)
    assert measured["student_perplexity"] == measured["teacher_perplexity"]
    assert measured["student_ece"] == measured["teacher_ece"] > 0
    assert [each["cosine"] for each in measured["layers"]] == pytest.approx([1, 1], abs=1e-6)
    assert measured["standard_errors"]["kl"] == 0


def test_standard_errors_are_those_of_documents_not_of_tokens(models):
    """The same text twice over says nothing new; tokens taken for independent would halve the variance again."""
    once = compare(*models, batches(), num_tokens=10**6, sequence_length=64)
    twice = compare(*models, [*batches(), *batches()], num_tokens=10**6, sequence_length=64)
    count = once["documents"]
    shrunk = math.sqrt((count - 1) / (2 * count - 1))
    assert twice["standard_errors"]["kl"] == pytest.approx(once["standard_errors"]["kl"] * shrunk, rel=0.02)


def test_errors_of_one_document_are_not_known(models):
    measured = compare(*models, [batch(row([24]))], num_tokens=100, sequence_length=24)
    assert set(measured["standard_errors"].values()) == {None}
    assert measured["kl"] > 0


def test_it_measures_exactly_as_many_tokens_as_asked_for_and_says_how_far_it_is(models):
    said = []
    measured = compare(
        *models, batches(), num_tokens=50, sequence_length=64, progress=lambda done, total: said.append((done, total))
    )
    assert measured["tokens"] == 50
    assert said == [(44, 50), (50, 50)]


def test_layers_are_compared_where_both_have_as_many():
    teacher, deeper = llama(0), llama(1, layers=3)
    assert compare(teacher, deeper, batches(), num_tokens=99, sequence_length=64)["layers"] == []
    wider = llama(1, hidden_size=64)
    assert compare(teacher, wider, batches(), num_tokens=99, sequence_length=64)["layers"] == []
    assert compare(teacher, teacher, batches(), num_tokens=99, sequence_length=64, layers=False)["layers"] == []


def test_a_perplexity_beyond_all_numbers_is_not_known():
    teacher, student = llama(0), llama(1)
    with torch.no_grad():
        student.lm_head.weight.mul_(1e4)
    measured = compare(teacher, student, batches(), num_tokens=10**6, sequence_length=64)
    assert measured["student_perplexity"] is None
    json.dumps(measured, allow_nan=False)


def test_models_without_finite_logits_agree_on_nothing():
    teacher, student = llama(0), llama(1)
    for model in (teacher, student):
        with torch.no_grad():
            model.lm_head.weight.fill_(math.nan)
    measured = compare(teacher, student, batches(), num_tokens=10**6, sequence_length=64)
    assert {measured[name] for name in MEANS} == {None}
    measured = compare(llama(0), student, batches(), num_tokens=10**6, sequence_length=64)
    assert measured["agreement"] is None and measured["agreement_top5"] is None
    json.dumps(measured, allow_nan=False)


def test_a_student_that_finds_all_tokens_alike_has_five_in_its_top_five():
    """Not all 97, of which each would be among the likeliest."""
    teacher, student = llama(0), llama(1)
    with torch.no_grad():
        student.lm_head.weight.zero_()
    measured = compare(teacher, student, batches(), num_tokens=10**6, sequence_length=64)
    assert measured["agreement"] <= measured["agreement_top5"] < 0.5
    itself = compare(student, student, batches(), num_tokens=10**6, sequence_length=64)
    assert (itself["agreement"], itself["agreement_top5"]) == (1, 1)


def test_an_empty_text_is_refused(models):
    with pytest.raises(UserError, match="no token"):
        compare(*models, [batch(row([1]))], num_tokens=100, sequence_length=8)


@pytest.mark.parametrize("tokens", [256, 1024])
def test_no_tensor_of_tokens_times_vocabulary_is_made(tokens):
    models = [llama(seed, attn_implementation="sdpa") for seed in (0, 1)]
    for model in models:
        model.resize_token_embeddings(4096, mean_resizing=False)
    rows = [batch(row([256], seed=seed)) for seed in range(tokens // 256)]
    with LargestTensor() as largest:
        compare(*models, rows, num_tokens=tokens, sequence_length=256, chunk_tokens=8)
    assert largest.elements <= 4096 * 32  # the head itself; the logits would be eight times as many, or 32 times
