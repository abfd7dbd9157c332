"""What transformers expects of any causal language model, after its common tests: students with and without full
attention, of two families.
"""

import re

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import send_to_device
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.distributed import DistributedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from distillkit.config import StudentConfig, UserError
from distillkit.conversion import build_student, summarize
from distillkit.student.network import KDAHybridConfig, KDAHybridForCausalLM, KDAHybridModel
from distillkit.student.network.documents import Documents

from .students import FULL, KDA, base_config, student, tokens

ids = tokens(2, 12)
of_all = pytest.mark.parametrize("family", ["llama", "qwen3"])
in_all = pytest.mark.parametrize("layers", [[KDA, FULL], [KDA, KDA]], ids=["hybrid", "kda_only"])


def greedy(model, prompt=ids, **options):
    return model.generate(prompt, max_new_tokens=6, do_sample=False, **options)


@pytest.fixture
def saved(tmp_path):
    def save(model):
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@of_all
@in_all
@torch.no_grad()
def test_offloaded_weights_give_the_same_logits(family, layers, saved, tmp_path):
    model = student(family, layers)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected, text = model(ids, attention_mask=mask).logits, greedy(model)
    on_disk = AutoModelForCausalLM.from_pretrained(
        saved(model), device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"
    )
    for offloaded in (on_disk, cpu_offload(model, execution_device="cpu")):
        assert torch.equal(offloaded(ids, attention_mask=mask).logits, expected)
        assert torch.equal(greedy(offloaded), text)


@of_all
@in_all
def test_outputs_that_the_configuration_asks_for(family, layers, saved):
    path = saved(student(family, layers))
    model = AutoModelForCausalLM.from_pretrained(path, output_hidden_states=True)
    assert len(model(ids).hidden_states) == 3
    assert model(ids, output_hidden_states=False).hidden_states is None
    model = AutoModelForCausalLM.from_pretrained(path, output_attentions=True, attn_implementation="eager")
    assert len(model(ids).attentions) == layers.count(FULL)
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3


@of_all
@in_all
def test_a_tuple_for_return_dict_false(family, layers):
    model = student(family, layers)
    output = model(ids, labels=ids)
    loss, logits = model(ids, labels=ids, return_dict=False)[:2]
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)


def test_values_of_the_configuration_can_be_set_and_given_at_loading(saved):
    model = student()
    path = saved(model)
    values = {"max_position_embeddings": 4096, "use_cache": False}
    loaded = AutoModelForCausalLM.from_pretrained(path, **values)
    for name, value in values.items():
        assert getattr(loaded.config, name) == getattr(loaded.model.config, name) == value
        setattr(model.config, name, value)
        assert getattr(model.model.config, name) == value
    model.config.save_pretrained(path)
    assert KDAHybridConfig.from_pretrained(path).max_position_embeddings == 4096


def test_layers_without_a_mixer_and_configurations_of_other_models_are_refused(saved):
    path = saved(student())
    with pytest.raises(ValueError, match="num_hidden_layers: 2 layers, and 4 mixers"):
        AutoModelForCausalLM.from_pretrained(path, num_hidden_layers=2)
    with pytest.raises(ValueError, match="configuration of a llama model; distillkit convert"):
        KDAHybridConfig(**base_config().to_dict())


@of_all
@in_all
def test_a_student_drafts_for_its_teacher_and_its_teacher_for_it(family, layers):
    model = student(family, layers)
    teacher = AutoModelForCausalLM.from_config(base_config(family, num_hidden_layers=2)).eval()
    for main, draft in ((teacher, model), (model, teacher)):
        expected = main.generate(ids[:1], max_new_tokens=20, do_sample=False)
        helped = main.generate(ids[:1], max_new_tokens=20, do_sample=False, assistant_model=draft)
        assert torch.equal(helped, expected)


@pytest.mark.parametrize("padding", [0, 2])
@torch.no_grad()
def test_a_cropped_cache_is_that_of_the_shorter_text(padding):
    model = student()
    row = tokens(2, 20)
    mask = torch.ones_like(row)
    mask[0, 8 : 8 + padding] = 0
    expected = model(row, attention_mask=mask, use_cache=False).logits
    for first, cut in ((9, 15), (9, 12), (7, 9), (1, 1)):
        cache = model(row[:, :first], attention_mask=mask[:, :first]).past_key_values
        cache.activate_past_recording()
        for start, end in ((first, 16), (16, 17), (17, 18)):
            model(row[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        cache.crop(cut - 18)
        assert cache.get_seq_length() == cut
        rest = model(row[:, cut:], attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(rest * mask[:, cut:, None], expected[:, cut:] * mask[:, cut:, None])
    with pytest.raises(RuntimeError, match="by the 19 tokens recorded"):
        cache.crop(-20)


@torch.no_grad()
def test_a_piece_that_is_all_padding_changes_nothing():
    model = student()
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    cache, pieces = None, []
    for start, end in ((0, 2), (2, 3), (3, 12)):
        output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache, pieces = output.past_key_values, [*pieces, output.logits]
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1)[:, 3:], expected[:, 3:])


@torch.no_grad()
def test_the_cache_of_another_model_is_refused():
    teacher = AutoModelForCausalLM.from_config(base_config())
    with pytest.raises(ValueError, match="layer 0 holds keys and values, and is kda here"):
        student()(ids, past_key_values=teacher(ids).past_key_values)


def test_documents_follow_a_layer_to_its_device():
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    documents = Documents.from_attention_mask(mask)
    moved = send_to_device({"documents": documents}, "meta")["documents"]
    assert moved.index.device.type == moved.cu_seqlens.device.type == "meta"
    assert moved is documents.to("meta") and documents.to("cpu") is documents


def test_devices_in_parallel_share_what_is_not_attention():
    """Results of two processes are those of one: seen on two processes; here, what the plan says."""
    plan = student(layout=[KDA, FULL]).tp_plan
    assert not [name for name in plan if "self_attn" in name]
    assert plan["model.layers.*.mlp.down_proj"] == "rowwise" and "lm_head" in plan
    assert "model.layers.*.self_attn.q_proj" in student(layout=[FULL, FULL]).tp_plan


@pytest.fixture
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.skipif(not hasattr(LlamaForCausalLM, "_resolve_parallel_plans"), reason="transformers before 5.23")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@in_all
def test_shards_of_fsdp_have_one_dtype(layers, saved, one_process):
    path = saved(student(layout=layers).bfloat16())
    expected, model = (KDAHybridForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for _ in range(2))
    assert model.model.layers[0].self_attn.A_log.dtype == torch.float32
    expected(ids, labels=ids).loss.backward()
    for name in model._resolve_parallel_plans(DistributedConfig(fsdp_size=2))[-1]:
        fully_shard(model.get_submodule(name), mesh=one_process)
    fully_shard(model, mesh=one_process)
    model(ids, labels=ids).loss.backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours.grad.full_tensor(), theirs.grad)


@of_all
@in_all
@torch.no_grad()
def test_automodel_is_the_decoder(family, layers, saved):
    model = student(family, layers)
    decoder, report = AutoModel.from_pretrained(saved(model), output_loading_info=True)
    assert isinstance(decoder, KDAHybridModel) and not any(report.values())
    expected = model(ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(decoder(ids).last_hidden_state, expected)
    decoder.save_pretrained(saved(model))
    assert torch.equal(AutoModel.from_pretrained(saved(model))(ids).last_hidden_state, expected)


def test_a_student_is_no_teacher_of_another():
    with pytest.raises(UserError, match="cannot be converted"):
        build_student(student(layout=[FULL, FULL]), StudentConfig.parse({"full_attention_layers": [0]}))


@torch.no_grad()
def test_the_decoder_takes_its_inputs_in_order():
    model = student()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = torch.arange(12).unsqueeze(0)
    named = model.model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    assert torch.equal(model.model(ids, mask, positions).last_hidden_state, named)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model.model()


@torch.no_grad()
def test_exported_without_a_mask():
    model = student(layout=[KDA])
    exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}).module()
    other = tokens(2, 12, seed=3)
    torch.testing.assert_close(exported(input_ids=other, use_cache=False).logits, model(other, use_cache=False).logits)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with pytest.raises(ValueError, match="padding cannot be exported"):
        torch.export.export(model, (), inputs)


@torch.no_grad()
def test_a_mask_that_linear_attention_cannot_keep_to_is_refused():
    four_dimensions = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    for layers in ([KDA, FULL], [KDA, KDA]):
        model = student(layout=layers)
        for mask in (four_dimensions, {"full_attention": None}, torch.ones(2, 11)):
            with pytest.raises(ValueError, match=re.escape("a mask of padding, [batch, 12]")):
                model(ids, attention_mask=mask)
    model = student(layout=[FULL, FULL])
    torch.testing.assert_close(model(ids, attention_mask=four_dimensions).logits, model(ids).logits)


SLIDING = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
}
STORED = {"llama": [12, 12], "mistral": [7, 7], "qwen3": [12, 7]}
"""Tokens that layers 1 and 3 keep of 12."""


@pytest.mark.parametrize("use_rope", [False, True])
@pytest.mark.parametrize("family", SLIDING)
@torch.no_grad()
def test_caches_of_all_kinds_give_the_same_logits(family, use_rope):
    """Dynamic and static, windowed or not, whole and padded prompts, in pieces and token by token."""
    model = student(family, [KDA, FULL, KDA, FULL], config_changes=SLIDING[family], use_rope=use_rope)
    text = tokens(2, 20)
    for padding in (0, 5):
        mask = torch.ones_like(text)
        mask[0, :padding] = 0
        options = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        expected = model(text, attention_mask=mask, use_cache=False, **options).logits * mask.unsqueeze(-1)
        for cache in (None, StaticCache(model.config, max_cache_len=32)):
            pieces = []
            for start, end in [(0, 1), (1, 12), *((t, t + 1) for t in range(12, 20))]:
                if start == 12 and not isinstance(cache, StaticCache):
                    assert [cache.layers[i].keys.shape[-2] for i in (1, 3)] == STORED[family]
                part = {name: value[:, start:end] for name, value in options.items()}
                output = model(
                    text[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **part
                )
                cache = output.past_key_values
                pieces.append(output.logits)
            torch.testing.assert_close(torch.cat(pieces, dim=1) * mask.unsqueeze(-1), expected, rtol=0, atol=1e-5)
        static = greedy(model, text, attention_mask=mask, cache_implementation="static")
        assert torch.equal(static, greedy(model, text, attention_mask=mask, use_cache=False))


def test_a_configuration_of_before_has_the_teacher_s_windows():
    base = base_config("qwen3", **SLIDING["qwen3"])
    config = KDAHybridConfig(base.to_dict(), layer_types=[KDA, FULL, KDA, FULL])
    assert config.mixers == ["kda", "full", "kda", "full"]
    assert config.layer_types == [KDA, FULL, KDA, "sliding_attention"]
    again = KDAHybridConfig.from_dict(config.to_dict())
    assert (again.mixers, again.layer_types) == (config.mixers, config.layer_types)


@torch.no_grad()
def test_the_summary_counts_what_a_cache_keeps():
    teacher = AutoModelForCausalLM.from_config(base_config("qwen3", **SLIDING["qwen3"])).eval()
    model = build_student(teacher, StudentConfig.parse({"full_attention_layers": [1, 3]}))
    cache = model(tokens(1, 30)).past_key_values
    assert isinstance(cache.layers[3], DynamicSlidingWindowLayer)
    token = 2 * 2 * 16 * 4  # keys and values, heads, their size, bytes
    assert summarize(teacher, model).memory[0].student_kv_cache == (4096 + 8) * token
    assert cache.layers[3].keys.nbytes + cache.layers[3].values.nbytes == (8 - 1) * token


ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"factor": 2.0},
}


@pytest.mark.parametrize("kind", sorted({"default", *ROPE_INIT_FUNCTIONS}))
@torch.no_grad()
def test_without_positions_a_layer_gives_what_the_teacher_s_gives_with_all_positions_0(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    config = base_config(num_hidden_layers=2, max_position_embeddings=64, rope_parameters=rope, initializer_range=0.3)
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(config).eval()
    assert (teacher.model.rotary_emb.attention_scaling > 1.1) == (kind in ("yarn", "longrope"))
    model = build_student(teacher, StudentConfig.parse({"full_attention_layers": [0, 1]}))
    text = tokens(2, 40)
    mask = torch.ones_like(text)  # without one, positions that do not go on would mean packed documents
    expected = teacher(text, attention_mask=mask, position_ids=torch.zeros_like(text)).logits
    assert torch.equal(model(text).logits, expected)
