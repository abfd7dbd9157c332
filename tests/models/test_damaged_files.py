"""A model folder with a damaged file is refused in one line, or is the model that its files say.

A folder of a model has no digests: what its files say is the model, after a bit of a weight or of a number has flipped,
too. So such damage may change what the file holds and nothing else; damage that leaves no JSON, no whole safetensors or
no whole GGUF is refused by the name of the file, or changes nothing.
"""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings, strategies
from safetensors import SafetensorError, safe_open

from distillkit.config import StudentConfig, UserError
from distillkit.conversion import convert
from distillkit.models.loading import load_model, load_pretrained_config, load_tokenizer
from distillkit.planning.meta_models import check_files
from tests.damage import ALL_KINDS, damage, damages
from tests.models.test_gguf_files import made, write
from tests.training.tiny import BYTES, llama, tokenizer

HOLDS = {
    "config.json": {"configuration"},
    "generation_config.json": {"generation"},
    "model.safetensors.index.json": set(),
    "chat_template.jinja": {"tokenizer"},
    "tokenizer.json": {"tokenizer"},
    "tokenizer_config.json": {"tokenizer"},
    "m.gguf": {"configuration", "generation", "weights"},
}
"""What a file may change of a model, beside weights; the code of a student is not run here, and changes nothing."""

NEED_NOT_BE = ("generation_config.json", "chat_template.jinja", "tokenizer_config.json")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher in two parts, a student of it, and a GGUF file, each with what `loaded` makes of it."""
    folder = tmp_path_factory.mktemp("models")
    llama(0, layers=1, hidden_size=8, vocab=BYTES).save_pretrained(folder / "teacher", max_shard_size="9KB")
    own = tokenizer()
    own.chat_template = "{{ messages }}"
    own.save_pretrained(folder / "teacher")
    convert(folder / "teacher", folder / "student", StudentConfig.parse({"layout": "kda_only"}))
    (folder / "gguf").mkdir()
    write(folder / "gguf" / "m.gguf", made(num_hidden_layers=1))
    assert len([*(folder / "teacher").glob("*.safetensors")]) == 2
    for code in {*(folder / "student").glob("*.py")} - {folder / "student" / "modeling.py"}:
        code.unlink()  # one of them is example enough
    return {path: loaded(path) for path in folder.iterdir()}


def loaded(folder):
    """All that convert, run, plan and inspect take from a model, by the name of what it is."""
    path = str(folder / "m.gguf" if folder.name == "gguf" else folder)
    config = load_pretrained_config(path, key="teacher.path")
    check_files(path, "teacher.path", config, {}, False)
    model = load_model(path, key="teacher.path")
    parts = {"configuration": [config.to_dict(), model.config.to_dict()]}
    for described in parts["configuration"]:
        described.pop("_name_or_path", None)
    parts["generation"] = model.generation_config.to_dict()
    parts["weights"] = [(name, tensor.detach().numpy().tobytes()) for name, tensor in model.named_parameters()]
    if folder.name != "gguf":
        own = load_tokenizer(path, key="teacher.path")
        parts["tokenizer"] = [own.backend_tokenizer.to_str(), own.special_tokens_map, own.chat_template]
        parts["tokenizer"].append(own("<s> Größe, 12 x</s>\n").input_ids)
    return parts


def readable(path):
    """Whether a file is still one of its kind, whatever it says."""
    try:
        if path.suffix == ".json":
            return isinstance(json.loads(path.read_bytes()), dict)
        if path.suffix == ".safetensors":
            return bool(safe_open(path, "pt").keys())
        return path.read_bytes()[:4] == b"GGUF" if path.suffix == ".gguf" else path.is_file()
    except (OSError, ValueError, SafetensorError):
        return False


def flipped_bits(ours, theirs):
    assert [(name, len(content)) for name, content in ours] == [(name, len(content)) for name, content in theirs]
    pairs = zip(ours, theirs, strict=True)
    return sum((mine ^ other).bit_count() for (_, a), (_, b) in pairs for mine, other in zip(a, b, strict=True))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=strategies.data(), done=damages(ALL_KINDS))
def test_damage_is_refused_by_name_or_the_model_is_what_its_files_say(folders, tmp_path, data, done):
    original = data.draw(strategies.sampled_from(sorted(path for folder in folders for path in folder.iterdir())))
    whole, folder = folders[original.parent], tmp_path / original.parent.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original.parent, folder)
    hit = folder / original.name
    damage(hit, *done)
    says_something, gone = readable(hit), done[0] == "gone"
    try:
        found = loaded(folder)
    except UserError as error:
        line = str(error)
        assert line.startswith("teacher.path: ") and "\n" not in line and str(folder) in line
        assert says_something or gone or hit.name in line
        return
    changed = {name for name in whole if found[name] != whole[name]}
    assert changed <= HOLDS.get(hit.name, {"weights"} if hit.suffix == ".safetensors" else set())
    assert says_something or not changed or (gone and hit.name in NEED_NOT_BE)
    if "weights" in changed:
        assert done[0] == "one bit" and flipped_bits(found["weights"], whole["weights"]) == 1


@pytest.mark.parametrize(
    ("name", "before", "after", "line"),
    [
        ("teacher/config.json", b'"silu"', b'"Silu"', r"cannot load '.*': KeyError: 'Silu'"),
        ("teacher/generation_config.json", b"}", b"", r"generation_config\.json' is damaged \(Expecting ',' delimiter"),
        ("teacher/tokenizer_config.json", None, None, r"tokenizer_config\.json' is damaged \(.*Is a directory"),
        ("gguf/m.gguf", b"ffn_up.weight\2\0\0\0 \0", b"ffn_up.weight\2\0\0\0\x10\0", r"begin too early or late"),
    ],
)
def test_what_was_read_as_another_model_is_refused(folders, tmp_path, name, before, after, line):
    original = next(folder for folder in folders if folder.name == name.split("/")[0])
    shutil.copytree(original, tmp_path / original.name)
    path = tmp_path / name
    if before is None:
        damage(path, "a folder", 0)
    else:
        assert path.read_bytes().count(before) == 1
        path.write_bytes(path.read_bytes().replace(before, after))
    with pytest.raises(UserError, match=rf"^teacher\.path: .*{line}"):
        loaded(path.parent)
