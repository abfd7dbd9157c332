import math

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from distillkit.compression import build_codec
from distillkit.config.errors import UserError
from distillkit.distribution import SparseDistribution
from distillkit.losses.divergences import paired_logprobs
from tests.compression import reference

FLOATS = st.sampled_from(["float16", "bfloat16", "float32", "float64"])


@st.composite
def published(draw):
    k = draw(st.integers(1, 40))
    exact_k = draw(st.integers(0, k))
    room = k - exact_k
    bins = []
    while room and len(bins) < 3 and draw(st.booleans()):
        elements = draw(st.integers(1, room))
        room -= elements
        bins.append({"scale_dtype": draw(FLOATS), "element_bits": draw(st.integers(1, 64)), "num_elements": elements})
    terms = st.lists(st.sampled_from([0, 1, 2, 3, 4, "sqrt", "exp"]), min_size=1 if room else 0)
    return {
        "d": draw(st.integers(max(k, 2), 300000)),
        "k": k,
        "exact_k": exact_k,
        "exact_dtype": draw(FLOATS),
        "polynomial_terms": draw(terms),
        "term_dtype": draw(FLOATS),
        "residual_bins": bins,
        "delta_encoding": draw(st.booleans()),
        "error_diffusion": draw(st.booleans()),
        "normalize_t": draw(st.booleans()),
    }


@st.composite
def legacy(draw):
    k = draw(st.integers(1, 40))
    return {
        "vocab_size": draw(st.integers(max(k, 2), 300000)),
        "k": k,
        "exact_k": draw(st.integers(0, k)),
        "polynomial_degree": draw(st.integers(0, 8)),
        "with_sqrt_term": draw(st.booleans()),
        "term_dtype": draw(FLOATS),
        "invert_polynomial": draw(st.booleans()),
    }


def legal(kind, config):
    """The codec; a combination that overflows its type is no legal one."""
    try:
        return build_codec(kind, config)
    except UserError as error:
        if "overflows" not in str(error):
            raise
        return reject()


def rows(codec, tokens=5, seed=0, scale=2.0):
    """Likeliest tokens of random logits over the codec's vocabulary (2,000 columns of it at most)."""
    generator = torch.Generator().manual_seed(seed)
    width = min(codec.vocabulary_size, max(codec.k, 2000))
    values = (torch.randn(tokens, width, generator=generator) * scale).log_softmax(-1)
    logprobs, ids = values.topk(codec.k)
    return SparseDistribution(codec.vocabulary_size - 1 - ids, logprobs)


@given(published(), st.integers(0, 1000))
@settings(deadline=None, max_examples=150)
def test_published_round_trip_for_every_legal_configuration(config, seed):
    codec = legal("logprob_compressor", config)
    given_rows = rows(codec, seed=seed)
    stored = codec.encode(given_rows)
    assert all(each.dtype == torch.uint8 for each in stored.values())
    assert sum(each.shape[1] for each in stored.values()) == codec.bytes_per_token
    decoded = codec.decode(stored)
    assert torch.equal(decoded.ids, given_rows.ids)
    assert decoded.logprobs.isfinite().all()
    if not config["delta_encoding"]:
        head = given_rows.logprobs[:, : config["exact_k"]].to(getattr(torch, config["exact_dtype"]))
        assert torch.equal(decoded.logprobs[:, : config["exact_k"]].to(head.dtype), head)
    for packed, ids, got in zip(
        stored["compressed_logprobs"], stored["bytepacked_indices"], decoded.logprobs, strict=True
    ):
        values, slack = reference.decode_logprobs(packed.tolist(), codec.config)
        assert all(abs(a - b) <= c for a, b, c in zip(got.tolist(), values, slack, strict=True))
        bits = math.ceil(math.log2(config["d"]))
        assert ids.tolist() == reference.pack_bytes(reference.unpack_bytes(ids.tolist(), bits, codec.k), bits)


@given(st.integers(2, 64), st.booleans(), FLOATS)
@settings(deadline=None, max_examples=60)
def test_a_bin_is_as_near_as_its_step(bits, diffusing, scale_dtype):
    config = {"d": 5000, "k": 30, "exact_k": 0, "delta_encoding": False, "error_diffusion": diffusing}
    residual_bin = {"scale_dtype": scale_dtype, "element_bits": bits, "num_elements": 30}
    codec = build_codec("logprob_compressor", config | {"residual_bins": [residual_bin]})
    given_rows = rows(codec)
    off = (codec.decode(codec.encode(given_rows)).logprobs - given_rows.logprobs).abs()
    largest = given_rows.logprobs.abs().amax(-1, keepdim=True)
    scale = torch.finfo(getattr(torch, scale_dtype))
    # The step is rounded to its type, and never below that type's smallest number.
    step = (largest / 2 ** (bits - 1)).clamp(min=scale.smallest_normal * scale.eps)
    smallest = scale.smallest_normal * scale.eps * 2 ** (bits - 1)
    slack = largest * (scale.eps + 2e-7) + (smallest if smallest < largest.max() else 0)
    assert (off <= step * (2 if diffusing else 1) + slack).all()


@given(legacy(), st.integers(0, 1000))
@settings(deadline=None, max_examples=80)
def test_legacy_round_trip_for_every_legal_configuration(config, seed):
    codec = legal("legacy_logit_compression", config)
    given_rows = rows(codec, seed=seed)
    stored = codec.encode(given_rows)
    assert [stored[name].dtype for name in codec.columns[:2]] == [torch.int64, torch.float16]
    assert sum(each.shape[1] * each.element_size() for each in stored.values()) == codec.bytes_per_token
    decoded = codec.decode(stored)
    assert torch.equal(decoded.ids, given_rows.ids)
    assert decoded.logprobs.isfinite().all()
    head = given_rows.logprobs[:, : config["exact_k"]].half()
    assert torch.equal(decoded.logprobs[:, : config["exact_k"]].half(), head)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_plain_round_trip(dtype):
    codec = build_codec("plain", {"k": 9, "vocab_size": 100000, "dtype": dtype})
    given_rows = rows(codec)
    given_rows.logprobs[0, 4:] = -torch.inf
    stored = codec.encode(given_rows)
    assert (stored["token_ids"].dtype, stored["top_values"].dtype) == (torch.int32, getattr(torch, dtype))
    assert codec.bytes_per_token == 9 * (4 + stored["top_values"].element_size())
    decoded = codec.decode(stored)
    assert torch.equal(decoded.ids, given_rows.ids)
    assert torch.equal(decoded.logprobs, given_rows.logprobs.to(getattr(torch, dtype)).float())


RECOMMENDED = {"d": 300, "k": 40, "exact_k": 8, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, 2, "sqrt"]}
BINS = [{"scale_dtype": "float16", "element_bits": 5, "num_elements": 20}]
VARIANTS = [
    ("logprob_compressor", RECOMMENDED | {"delta_encoding": False}),
    ("logprob_compressor", RECOMMENDED | {"delta_encoding": True}),
    ("logprob_compressor", RECOMMENDED | {"delta_encoding": True, "residual_bins": BINS, "error_diffusion": True}),
    ("logprob_compressor", RECOMMENDED | {"delta_encoding": False, "exact_k": 1, "residual_bins": BINS}),
    ("legacy_logit_compression", {"vocab_size": 300, "k": 40, "exact_k": 8, "polynomial_degree": 3}),
    ("plain", {"vocab_size": 300, "k": 40}),
]


def degenerate(k):
    decaying = (
        torch.randn(300, generator=torch.Generator().manual_seed(0)).log_softmax(-1).sort(descending=True).values[:k]
    )
    alone = torch.full((k,), -torch.inf)
    alone[0] = 0.0
    return {
        "one token has it all": alone,
        "absent behind the exact ones": decaying.clone().index_fill(0, torch.arange(20, k), -torch.inf),
        "absent among the exact ones": decaying.clone().index_fill(0, torch.arange(3, k), -torch.inf),
        "nothing present": torch.full((k,), -torch.inf),
        "masked with a huge number": decaying.clone().index_fill(0, torch.arange(3, k), torch.finfo(torch.float32).min),
        "all equal": torch.full((k,), -math.log(k)),
        "constant tail": decaying.clone().clamp(min=float(decaying[10])),
    }


@pytest.mark.parametrize(("kind", "config"), VARIANTS)
@pytest.mark.parametrize("name", degenerate(40))
def test_degenerate_rows_give_no_nan_and_keep_their_mass(kind, config, name):
    codec = build_codec(kind, config)
    row = degenerate(codec.k)[name]
    given_rows = SparseDistribution(torch.arange(codec.k).unsqueeze(0), row.unsqueeze(0))
    decoded = codec.decode(codec.encode(given_rows))
    assert torch.equal(decoded.ids, given_rows.ids)
    assert not decoded.logprobs.isnan().any() and (decoded.logprobs < 30).all()
    if name in ("one token has it all", "absent among the exact ones", "nothing present"):
        mass = decoded.logprobs.exp().sum()
        torch.testing.assert_close(mass, row.exp().sum(), atol=0.02, rtol=0)
    if name == "all equal":
        torch.testing.assert_close(decoded.logprobs, given_rows.logprobs, atol=0.02, rtol=0)


@pytest.mark.parametrize("handling", ["zero", "symmetric_uniform"])
def test_a_curve_above_what_it_approximates_is_normalised_by_the_losses(handling):
    budget = {"d": 300, "k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"], "delta_encoding": False}
    codec = build_codec("logprob_compressor", budget)
    likely = torch.tensor([0.5, 0.4, 0.09]).log()
    row = torch.cat([likely, torch.linspace(-9, -12, 47)]).unsqueeze(0)
    decoded = codec.decode(codec.encode(SparseDistribution(torch.arange(50).unsqueeze(0), row)))
    log_p, _ = paired_logprobs(torch.zeros(1, 300), decoded, 1.0, handling)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(1))


def test_the_whole_vocabulary_is_kept():
    codec = build_codec("logprob_compressor", {"d": 64, "k": 64, "exact_k": 64, "delta_encoding": False})
    given_rows = rows(codec)
    assert torch.equal(codec.decode(codec.encode(given_rows)).logprobs, given_rows.logprobs)


@pytest.mark.parametrize(("kind", "config"), VARIANTS)
def test_rows_in_any_order_and_longer_than_k_are_sorted_and_cut(kind, config):
    codec = build_codec(kind, config)
    wide = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    everything = SparseDistribution(torch.arange(300).expand(3, -1), wide)
    expected = codec.decode(codec.encode(everything.top_k(codec.k)))
    decoded = codec.decode(codec.encode(everything))
    assert torch.equal(decoded.ids, expected.ids) and torch.equal(decoded.logprobs, expected.logprobs)


def test_more_tokens_than_a_chunk_and_none_at_all():
    codec = build_codec("logprob_compressor", RECOMMENDED | {"delta_encoding": False})
    many = rows(codec, tokens=2500)
    stored = codec.encode(many)
    last = codec.encode(SparseDistribution(many.ids[-1:], many.logprobs[-1:]))
    assert all(torch.equal(stored[name][-1:], last[name]) for name in codec.columns)
    assert torch.equal(codec.decode(stored).ids, many.ids)
    nothing = codec.encode(SparseDistribution(many.ids[:0], many.logprobs[:0]))
    assert codec.decode(nothing).logprobs.shape == (0, 40)


def test_what_does_not_fit_is_said():
    codec = build_codec("logprob_compressor", RECOMMENDED | {"delta_encoding": False})
    given_rows = rows(codec)
    with pytest.raises(UserError, match="gives token 300, but the vocabulary has 300 tokens"):
        codec.encode(SparseDistribution(given_rows.ids + 300 - given_rows.ids.max(), given_rows.logprobs))
    with pytest.raises(UserError, match="gives token -1, but the vocabulary has 300 tokens"):
        codec.encode(SparseDistribution(given_rows.ids - given_rows.ids.min() - 1, given_rows.logprobs))
    with pytest.raises(UserError, match="k: 40 log-probabilities per token are to be stored, but the teacher gives 39"):
        codec.encode(SparseDistribution(given_rows.ids[:, :39], given_rows.logprobs[:, :39]))
    with pytest.raises(ValueError, match="NaN"):
        codec.encode(SparseDistribution(given_rows.ids, given_rows.logprobs * torch.nan))
    stored = codec.encode(given_rows)
    with pytest.raises(UserError, match="'compressed_logprobs' hold 32 numbers, but this configuration makes 30"):
        build_codec("logprob_compressor", RECOMMENDED | {"exact_k": 7, "delta_encoding": False}).decode(stored)
    with pytest.raises(UserError, match="no column 'token_ids'"):
        build_codec("plain", {"k": 4, "vocab_size": 300}).decode(stored)


PUBLISHED = {"d": 100, "k": 20, "exact_k": 5, "polynomial_terms": [0, 1]}
SHORT_BIN = {"scale_dtype": "float16", "element_bits": 8, "num_elements": 3}
LEGACY = {"vocab_size": 100, "k": 20, "exact_k": 5, "polynomial_degree": 2}


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("zip", PUBLISHED, "compression: must be one of logprob_compressor, legacy_logit_compression, plain"),
        ("logprob_compressor", {"k": 20, "exact_k": 5}, "logprob_compressor.d: is missing: size of the teacher's"),
        ("logprob_compressor", PUBLISHED | {"d": 1}, "logprob_compressor.d: must be > 1, got 1"),
        ("logprob_compressor", PUBLISHED | {"k": 0}, "logprob_compressor.k: must be > 0, got 0"),
        ("logprob_compressor", PUBLISHED | {"d": 10}, "logprob_compressor.k: must be <= d = 10, got 20"),
        ("logprob_compressor", PUBLISHED | {"exact_k": 21}, "exact_k: must be <= k = 20, got 21"),
        ("logprob_compressor", PUBLISHED | {"exact_k": -1}, "exact_k: must be >= 0"),
        ("logprob_compressor", PUBLISHED | {"exact_dtype": "int8"}, "exact_dtype: must be one of float16"),
        (
            "logprob_compressor",
            PUBLISHED | {"polynomial_terms": None},
            "give terms (or residual_bins) for the 15 inexact",
        ),
        (
            "logprob_compressor",
            PUBLISHED | {"polynomial_terms": []},
            "give terms (or residual_bins) for the 15 inexact",
        ),
        (  # they would be read as log-probability 0
            "logprob_compressor",
            {"d": 100, "k": 20, "exact_k": 5, "residual_bins": [SHORT_BIN]},
            "give terms (or residual_bins) for the 12 inexact values",
        ),
        (
            "logprob_compressor",
            PUBLISHED | {"polynomial_terms": [-1]},
            "polynomial_terms[0]: must be a power from 0 to 64",
        ),
        ("logprob_compressor", PUBLISHED | {"polynomial_terms": [0, "log"]}, "polynomial_terms[1]: must be a power"),
        (
            "logprob_compressor",
            PUBLISHED | {"polynomial_terms": [0, 9], "term_dtype": "float16"},
            "polynomial_terms: 9 at t = 14 overflows float16; set normalize_t: true",
        ),
        (
            "logprob_compressor",
            {"d": 500, "k": 100, "exact_k": 5, "polynomial_terms": ["exp"]},
            "polynomial_terms: exp at t = 94 overflows float32; set normalize_t: true",
        ),
        (
            "logprob_compressor",
            PUBLISHED | {"residual_bins": [{"scale_dtype": "float16", "element_bits": 65, "num_elements": 3}]},
            "residual_bins[0].element_bits: must be <= 64, got 65",
        ),
        (
            "logprob_compressor",
            PUBLISHED | {"residual_bins": [{"scale_dtype": "float16", "element_bits": 4, "num_elements": 16}]},
            "residual_bins: hold 16 elements, but k - exact_k = 15",
        ),
        ("logprob_compressor", PUBLISHED | {"normalise_t": True}, "unknown key; did you mean 'normalize_t'?"),
        (
            "legacy_logit_compression",
            LEGACY | {"k": 101},
            "legacy_logit_compression.k: must be <= vocab_size = 100, got 101",
        ),
        ("legacy_logit_compression", LEGACY | {"exact_k": 21}, "exact_k: must be <= k = 20, got 21"),
        ("legacy_logit_compression", LEGACY | {"polynomial_degree": -1}, "polynomial_degree: must be >= 0"),
        (
            "legacy_logit_compression",
            LEGACY | {"polynomial_degree": 5, "invert_polynomial": False, "term_dtype": "float16"},
            "polynomial_degree: 15 to the power of 5 overflows float16; set invert_polynomial: true",
        ),
        ("plain", {"k": 20, "vocab_size": 10}, "plain.k: must be <= vocab_size = 10, got 20"),
        ("plain", {"k": 2, "vocab_size": 10, "dtype": "bfloat16"}, "plain.dtype: must be one of float16, float32"),
    ],
)
def test_illegal_configurations_are_one_line_with_the_key(kind, config, message):
    with pytest.raises(UserError) as error:
        build_codec(kind, config)
    assert message in str(error.value)
