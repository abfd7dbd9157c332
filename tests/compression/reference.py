"""Slow and obvious: bits as text, one token and one number at a time, Python's own floats."""

import math

import numpy as np
import torch

DTYPES = {"float16": np.float16, "bfloat16": None, "float32": np.float32, "float64": np.float64}


def pack_bytes(values, bits):
    text = "".join(format(value % 2**bits, f"0{bits}b") for value in values)
    text += "0" * (-len(text) % 8)
    return [int(text[start : start + 8], 2) for start in range(0, len(text), 8)]


def unpack_bytes(packed, bits, count):
    text = "".join(format(byte, "08b") for byte in packed)
    return [int(text[number * bits : (number + 1) * bits], 2) for number in range(count)]


def pack_words(values, bits):
    words = []
    for start in range(0, len(values), 64 // bits):
        text = "".join(format(value, f"0{bits}b") for value in reversed(values[start : start + 64 // bits]))
        word = int(text, 2)
        words.append(word - 2**64 if word >= 2**63 else word)
    return words


def floats(packed, dtype):
    if dtype == "bfloat16":
        pairs = np.frombuffer(bytes(packed), dtype="<u2").astype("<u4") << 16
        return pairs.view("<f4").astype(float).tolist()
    return np.frombuffer(bytes(packed), dtype=np.dtype(DTYPES[dtype]).newbyteorder("<")).astype(float).tolist()


def term_value(term, t):
    return math.sqrt(t) if term == "sqrt" else math.exp(t) if term == "exp" else float(t) ** term


def points(config):
    count = config.k - config.exact_k
    return [t / max(count - 1, 1) if config.normalize_t else t for t in range(count)]


def decode_logprobs(packed, config):
    """(log-probabilities, how far each may be off by rounding) of one token's bytes of a `logprob_compressor`."""

    def take(count, dtype):
        size = count * getattr(torch, dtype).itemsize
        taken, packed[:] = packed[:size], packed[size:]
        return floats(taken, dtype)

    packed = list(packed)
    values, slack = take(config.exact_k, config.exact_dtype), [0.0] * config.exact_k
    coefficients = take(len(config.polynomial_terms or []), config.term_dtype)
    for t in points(config):
        products = [
            c * term_value(term, t) for c, term in zip(coefficients, config.polynomial_terms or [], strict=True)
        ]
        values.append(sum(products))
        resolution = max(torch.finfo(getattr(torch, config.term_dtype)).eps, torch.finfo(torch.float32).eps)
        powers = [term for term in config.polynomial_terms or [] if isinstance(term, int)]
        slack.append(8 * (1 + max(powers, default=1)) * resolution * sum(map(abs, products)))
    position = config.exact_k
    for each in config.residual_bins:
        (step,) = take(1, each.scale_dtype)
        size = (each.num_elements * each.element_bits + 7) // 8
        numbers, packed = unpack_bytes(packed[:size], each.element_bits, each.num_elements), packed[size:]
        for number in numbers:
            residual = (2 * number - 1 if each.element_bits == 1 else number - 2 ** (each.element_bits - 1)) * step
            values[position] += residual
            slack[position] += 2 * abs(residual) * max(torch.finfo(getattr(torch, config.exact_dtype)).eps, 1e-7)
            position += 1
    if config.delta_encoding:
        values, slack = np.cumsum(values).tolist(), (np.cumsum(slack) + 1e-6 * np.cumsum(np.abs(values))).tolist()
    return values, [each + 1e-6 for each in slack]
