"""What a model says does not depend on how it is read: in pieces, from its cache, alone or beside longer prompts."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import CompileConfig

from distillkit.evaluation import generation
from distillkit.evaluation.generation import decode_as_graphs, decode_greedily, left_padded, prefill
from distillkit.student.network import KimiDeltaAttention

from ..student.students import student, tokens
from ..training.tiny import llama

MODELS = {
    "teacher": lambda: llama(0, vocab=128),
    "hybrid": lambda: student(layout="hybrid"),
    "hybrid with rope": lambda: student(layout="hybrid", use_rope=True),
    "kda_only": lambda: student(layout="kda_only"),
    "grouped": lambda: student(layout="hybrid", kv_heads="grouped"),
    "mistral": lambda: student("mistral", layout="hybrid", config_changes={"sliding_window": 50}),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_pieces_equal_the_whole(name):
    model = MODELS[name]().double()
    ids = tokens(2, 130)
    expected = model(ids, use_cache=False).logits[:, -1]
    for piece in (31, 64, 129, 1000):
        logits, cache = prefill(model, ids, piece)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
        assert cache.get_seq_length() == 130


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tokens_are_those_without_a_cache(name):
    model = MODELS[name]().double()
    ids = tokens(1, 90)
    expected = ids
    for _ in range(12):
        following = model(expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, following], dim=1)
    written = torch.stack(list(decode_greedily(model, *prefill(model, ids, 64), at_most=12)), dim=1)
    assert torch.equal(written, expected[:, 90:])


LENGTHS = (130, 61, 97, 129)
"""Of rows that are read together."""


def attentive(name, device="cpu"):
    """A model in which padding would be noticed: it is a token as any other, and states keep what they have seen."""
    model = MODELS[name]()
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.2)
        if isinstance(module, KimiDeltaAttention):
            torch.nn.init.zeros_(module.f_proj[1].weight)
            torch.nn.init.constant_(module.dt_bias, -8)
    return model.to(device)


def rows_of(lengths):
    return [tokens(1, length, seed=length)[0].tolist() for length in lengths]


def answers(model, rows, piece):
    """First logits, and the twelve tokens that are written, of rows that are read together."""
    ids, mask = left_padded(rows, model.device)
    logits, cache = prefill(model, ids, piece, mask)
    written = torch.stack(list(decode_greedily(model, logits, cache, mask, at_most=12)), dim=1)
    return logits, written


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_row_is_answered_in_company_as_it_is_alone(name):
    """Of pieces of 16 tokens the first ones hold nothing but padding for most rows."""
    model, rows = attentive(name), rows_of(LENGTHS)
    logits, written = (torch.cat(parts) for parts in zip(*(answers(model, [row], 1000) for row in rows), strict=True))
    for piece in (16, 1000):
        together = answers(model, rows, piece)
        torch.testing.assert_close(together[0], logits, rtol=1e-4, atol=3e-5)
        assert torch.equal(together[1], written)
    unmasked, _ = prefill(model, left_padded(rows, model.device)[0], 1000)
    assert (unmasked - logits).abs().max() > 0.1  # padding does matter to this model


@pytest.mark.parametrize("name", ["teacher", "hybrid", "mistral"])
@torch.no_grad()
def test_a_static_cache_gives_the_same_tokens(name, monkeypatch):
    """What was read into a growing cache goes on in a static one; a layer with a window has no such cache."""
    monkeypatch.setattr(generation, "CAPACITY_STEP", 16)
    model, rows = attentive(name), rows_of(LENGTHS[:2])
    expected = answers(model, rows, 16)[1]
    model.generation_config.cache_implementation = "static"
    model.generation_config.compile_config = CompileConfig(backend="eager", mode=None)
    model.generation_config.compile_config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(answers(model, rows, 16)[1], expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (0 if name == "mistral" else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["teacher", "hybrid", "kda_only"])
@torch.no_grad()
def test_logits_of_a_graph_are_those_of_eager_decoding(name):
    """In bfloat16, 256 tokens, padded: as near as those of float32 are to them."""
    model, rows = attentive(name, "cuda").bfloat16(), rows_of(LENGTHS)
    given = torch.randint(128, (256, len(rows)), device="cuda")

    def logits_of(model):
        ids, mask = left_padded(rows, model.device)
        _, cache = prefill(model, ids, 1000, mask)
        step = generation.decoding_step(model, cache, mask, at_most=len(given))
        return torch.stack([step(tokens).float().clone() for tokens in given])

    eager = logits_of(model)
    decode_as_graphs(model)
    graph = logits_of(model)
    model.generation_config.cache_implementation = None
    exact = logits_of(model.float())
    assert (graph - exact).norm() < 1.2 * (eager - exact).norm() < 0.1 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["teacher", "hybrid", "kda_only"])
@torch.no_grad()
def test_a_row_is_answered_in_company_as_it_is_alone_on_cuda(name):
    model, rows = attentive(name, "cuda"), rows_of(LENGTHS)
    alone = torch.cat([answers(model, [row], 1000)[0] for row in rows])
    for piece in (16, 40, 1000):  # 40: more than one kernel of decoding takes, and a row of it is nothing but padding
        logits, _ = answers(model, rows, piece)
        torch.testing.assert_close(logits, alone, rtol=0, atol=0.05)


@torch.no_grad()
def test_positions_are_counted_without_padding():
    """Learned positions, unlike rotary ones, notice when a whole row is shifted."""
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "n_positions": 70, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**shape, initializer_range=0.5, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    rows = rows_of((40, 50))
    alone, together = answers(model, rows[:1], 16), answers(model, rows, 16)
    torch.testing.assert_close(together[0][:1], alone[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(together[1][:1], alone[1])


def test_rows_of_one_length_need_no_mask():
    ids, mask = left_padded([[5, 6], [7, 8]], torch.device("cpu"))
    assert ids.tolist() == [[5, 6], [7, 8]] and mask is None


@pytest.mark.parametrize("layout", [None, "hybrid", "kda_only"])
@torch.no_grad()
def test_prompts_may_be_longer_than_what_a_model_was_made_for(layout):
    """Rotary positions go on as they would in a model made for more; a student has none that could run out."""
    logits = []
    for positions in (32, 4096):
        changes = {"max_position_embeddings": positions}
        teacher = layout is None
        model = llama(0, vocab=128, **changes) if teacher else student(layout=layout, config_changes=changes)
        logits.append(answers(model, rows_of((90, 130)), 64)[0])
    assert torch.equal(*logits)
