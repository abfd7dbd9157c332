"""Every distribution loss as slow, obvious loops over one token: what the fast ones are compared with.

A teacher's row is a dict {token: probability} over the tokens it names, at temperature 1; a dense one names them all.
Probabilities are 0-dim tensors, so autograd gives the reference gradient too.
"""

import math

import torch


def softmax(logits, temperature=1.0):
    weights = [torch.exp(logit / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def student_and_teacher_events(student_logits, named, temperature, missing, background=None):
    """[(p, q)] over events that cover the vocabulary once, both at the temperature."""
    q = softmax(student_logits, temperature)
    others = [token for token in range(len(q)) if token not in named]
    rest = max(0.0, 1 - sum(named.values()))
    if missing == "background":
        background_of_others = sum(background[token] for token in others)
        p = {**named, **{token: rest * background[token] / background_of_others for token in others}}
        sharpened = {token: value ** (1 / temperature) for token, value in p.items()}
        return [(sharpened[token] / sum(sharpened.values()), q[token]) for token in range(len(q))]
    sharpened = {token: value ** (1 / temperature) for token, value in named.items()}
    sharpened_rest = rest ** (1 / temperature) if missing == "symmetric_uniform" else 0.0
    total = sum(sharpened.values()) + sharpened_rest
    events = [(value / total, q[token]) for token, value in sharpened.items()]
    return [*events, (sharpened_rest / total, sum(q[token] for token in others))] if others else events


def kl(events):
    return sum(p * (math.log(p) - torch.log(q)) for p, q in events if p > 0)


def reverse_kl(events):
    allowed = [(p, q) for p, q in events if p > 0]
    mass = sum(q for _, q in allowed)
    return sum(q / mass * (torch.log(q / mass) - math.log(p)) for p, q in allowed)


def jsd(events):
    return sum(
        (p * (math.log(p) - torch.log((p + q) / 2)) if p > 0 else 0) / 2
        + q * (torch.log(q) - torch.log((p + q) / 2)) / 2
        for p, q in events
    )


def tvd(events):
    return sum(torch.abs(p - q) for p, q in events) / 2


def preference_pairs(named):
    return [(better, worse) for better in named for worse in named if named[better] > named[worse]]


def hinge(student_logits, named, margin=None):
    q = softmax(student_logits)
    total = torch.zeros((), dtype=torch.float64)
    for better, worse in preference_pairs(named):
        wanted = named[better] - named[worse] if margin is None else margin
        shortfall = wanted - (q[better] - q[worse])
        if shortfall > 0:
            total = total + shortfall
    return total


def logistic_ranking(student_logits, named):
    return sum(
        torch.log(1 + torch.exp(student_logits[worse] - student_logits[better]))
        for better, worse in preference_pairs(named)
    )
