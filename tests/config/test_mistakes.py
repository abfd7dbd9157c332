"""Each mistake in a configuration is one line that names the key and what would be right."""

from pathlib import Path

import pytest

from distillkit.config import RunConfig, UserError, load_run
from distillkit.config.yaml_files import read_yaml

SEED = Path(__file__).with_name("seed.yaml")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        # keys
        ("sequence_lenght=2048", "sequence_lenght: unknown key; did you mean 'sequence_length'?"),
        ("teacher.pth=x", "teacher.pth: unknown key; did you mean 'path'?"),
        ("loss_functions.1.temprature=2", "loss_functions[1].temprature: unknown key; did you mean 'temperature'?"),
        ("dataset.train_dataset.repo=x", "dataset.train_dataset.repo: unknown key; did you mean 'repo_id'?"),
        ("training_args.lerning_rate=1", "training_args.lerning_rate: unknown key; did you mean 'learning_rate'?"),
        ("evalution.num_tokens=9", "evalution: unknown key; did you mean 'evaluation'?"),
        ("teacher={kind: hf}", "teacher.path: is missing: the teacher: a folder, a hub id or a .gguf file"),
        ("teacher={top_k: 4}", "teacher.kind: is missing; it says what the section describes"),
        ("learning_rate=1", "learning_rate: unknown key; it is a key of training_args: training_args.learning_rate"),
        ("lr=1", "lr: unknown key; it is a key of training_args: training_args.learning_rate"),
        ("eval_dataset={}", "eval_dataset: unknown key; it is a key of dataset: dataset.eval_dataset"),
        ("training_args.lr=1", "training_args.lr: unknown key; did you mean 'learning_rate'?"),
        (
            "training_args.trained_weights=float32",
            "training_args.trained_weights: unknown key; trained_weights is a key of the top level",
        ),
        (
            "compression={}",
            "compression: a run has no such key, a capture has; where this is the file of a capture: distillkit capt",
        ),
        # values
        (
            "training_args.hub_token=hf_1",
            "training_args.hub_token: set HF_TOKEN in the environment, or log in with `hf auth "
            "login`; run.json keeps the configuration",
        ),
        ("teacher.kind=hg", "teacher.kind: must be one of hf, dataset, server; got 'hg'"),
        ("teacher=arcee-ai/AFM-4.5B", "teacher: must be a mapping of keys to values, got 'arcee-ai/AFM-4.5B'"),
        ("sequence_length=0", "sequence_length: must be > 0, got 0"),
        ("sequence_length=2k", "sequence_length: must be a whole number, got '2k'"),
        ("sequence_length=", "sequence_length: is missing: tokens per row"),
        ("sequence_length=true", "sequence_length: must be a whole number, got true"),
        ("project_name=2025", "project_name: must be text, got 2025 (put it in quotes)"),
        ("trust_remote_code=2", "trust_remote_code: must be true or false, got 2"),
        ("frozen_res=mlp", "frozen_res: must be a list, got 'mlp'"),
        (
            "frozen_res.1=norm(",
            "frozen_res[1]: 'norm(' is not a regular expression: missing ), unterminated subpattern at position 4",
        ),
        (
            "dataset.train_dataset.split=train[1000",
            "dataset.train_dataset.split: must be a split such as train, train[:1000] or train[10%:], got 'train[1000'",
        ),
        (
            "dataset.train_dataset.disk_path=text",
            "dataset.train_dataset.repo_id: disk_path is given too; keep one of the two",
        ),
        ("output_path=''", "output_path: must not be empty; name a folder, a file or a hub id"),
        # losses
        ("loss_functions.1.temperature=-2", "loss_functions[1].temperature: must be > 0, got -2"),
        ("loss_functions.1.weight=-1", "loss_functions[1].weight: must be >= 0, got -1"),
        ("loss_functions.1.weight=.nan", "loss_functions[1].weight: must be a finite number, got nan"),
        (
            "loss_functions.2.temperature=2",
            "loss_functions[2].temperature: hs_cosine has none (only kl, reverse_kl, jsd, tvd); remove it",
        ),
        ("loss_functions.1.margin=1", "loss_functions[1].margin: kl has none (only hinge); remove it"),
        (
            "loss_functions.2.function=kl",
            "loss_functions[2].function: kl is given already by loss_functions[1]; name each loss once",
        ),
        ("loss_functions=[]", "loss_functions: must have at least one entry"),
        (
            "loss_functions=[{function: kl, weight: 0}]",
            "loss_functions: all weights are 0; at least one must be > 0",
        ),
        (
            "loss_functions.1={function: jsd, weight: 1, missing_probability_handling: background}",
            "loss_functions[1].missing_probability_handling: background is for kl only, not for jsd",
        ),
        (
            "layer_mapping=null",
            "layer_mapping: is missing: loss_functions[2] (hs_cosine) needs all, or pairs",
        ),
        (
            "layer_mapping=every",
            "layer_mapping: must be all, or a list of pairs [student index, teacher index], got 'every'",
        ),
        (
            "layer_mapping=[[1, 1], [2]]",
            "layer_mapping[1]: must be a pair [student index, teacher index] into hidden_states (0 = embeddings), got",
        ),
        ("layer_mapping=[[1, -1]]", "layer_mapping[0]: indices count from 0 (the embeddings), got [1, -1]"),
        (
            "teacher={kind: dataset}",
            "loss_functions[2].function: hs_cosine needs a teacher of kind: hf; dataset has no hidden states",
        ),
        # the student
        ("model=null", "model: is missing: name a student, or give student (how to convert the teacher)"),
        ("student={}", "model: student is given too; keep one of the two"),
        ("student.layout=hibrid", "student.layout: must be one of hybrid, front_loaded, kda_only; got 'hibrid'"),
        ("student.full_attention_layers=[3, 3]", "student.full_attention_layers[1]: layer 3 is named twice"),
        (
            "student={layout: hybrid, full_attention_layers: [3]}",
            "student.layout: full_attention_layers is given too; keep one of the two",
        ),
        # the trainer
        ("training_args.output_dir=x", "training_args.output_dir: use the top-level key output_path"),
        (
            "training_args.resume_from_checkpoint=x",
            "training_args.resume_from_checkpoint: use the top-level key resume: true, or --resume",
        ),
        ("training_args.learning_rate=fast", "training_args.learning_rate: must be a number, got 'fast'"),
        ("training_args.learning_rate=-1", "training_args.learning_rate: must be >= 0, got -1"),
        ("training_args.bf16=1", "training_args.bf16: must be true or false, got 1"),
        (
            "training_args.per_device_train_batch_size=0",
            "training_args.per_device_train_batch_size: must be > 0, got 0",
        ),
        ("training_args.optim=adamwtorch", "training_args.optim: no such choice: 'adamwtorch'; did you mean"),
        (
            "training_args.lr_scheduler_type=cosin",
            "training_args.lr_scheduler_type: must be one of linear, cosine, ",
        ),
        ("training_args.save_strategy=step", "training_args.save_strategy: must be one of no, steps, epoch; got"),
        (
            "training_args.warmup_steps=9",
            "training_args.warmup_steps: is the same as warmup_ratio; keep one of the two",
        ),
        ("training_args.save_strategy=best", "training_args.save_strategy: must be one of no, steps, epoch; got"),
        ("training_args.seed=-1", "training_args.seed: must be >= 0, got -1"),
        ("training_args.seed=4294967296", "training_args.seed: must be < 4294967296, got 4.29497e+09"),
        ("training_args.dataloader_num_workers=-1", "training_args.dataloader_num_workers: must be >= 0, got -1"),
        ("training_args.adam_beta1=5.0", "training_args.adam_beta1: must be < 1, got 5"),
        ("training_args.learning_rate=.inf", "training_args.learning_rate: must be a finite number, got inf"),
        ("training_args.log_level=loud", "training_args.log_level: must be one of detail, debug, info, warning, err"),
        ("training_args.lr_scheduler_kwargs=x", "training_args.lr_scheduler_kwargs: must be a mapping of keys to"),
        ("training_args.optim_args=x", "training_args.optim_args: must be key=value pairs with commas between, got"),
        # the override itself
        ("sequence_length", "override 'sequence_length': must be key=value, such as training_args.learning_rate=3e-4"),
        ("teacher.=x", "override 'teacher.=x': must be key=value, such as training_args.learning_rate=3e-4"),
        ("extends=x.yaml", "override 'extends=x.yaml': write it into the file instead; an override cannot change"),
        ("layer_mapping=[[1", "override 'layer_mapping=[[1': the value is not YAML: line 1: expected ',' or ']'"),
        (
            "loss_functions.7.weight=1",
            "override 'loss_functions.7.weight=1': '7' must be an index from 0 to 2 of a list",
        ),
        (
            "model.layers=1",
            "override 'model.layers=1': 'layers' is not a key: the part before it is a single value",
        ),
    ],
)
def test_a_mistake_is_one_line(override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_run(SEED, [override])
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "training_args.bf16=false",
            "trained_weights: bfloat16 needs training_args.bf16: true; set it, or use float32",
        ),
        (
            "training_args.optim=adamw_bnb_8bit",
            "training_args.optim: adamw_bnb_8bit would lose small updates of trained_weights: bfloat16; use",
        ),
    ],
)
def test_weights_in_bfloat16_need_an_optimizer_that_rounds(override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_run(SEED, ["trained_weights=bfloat16", "training_args.bf16=true", override])
    assert str(caught.value).startswith(line)


BACKGROUND = "[{function: kl, weight: 1, missing_probability_handling: background}]"


@pytest.mark.parametrize(
    ("overrides", "line", "remedy"),
    [
        (
            ["evaluation.num_tokens=9"],
            "evaluation.dataset: is missing: name held-out text here or in dataset.eval_dataset",
            "dataset.eval_dataset.repo_id=org/held-out",
        ),
        (
            ["training_args.eval_strategy=steps"],
            "training_args.eval_strategy: there is no held-out text; name it in dataset.eval_dataset",
            "evaluation.dataset.repo_id=org/held-out",
        ),
        (
            ["training_args.eval_on_start=true"],
            "training_args.eval_on_start: there is no held-out text; name it in dataset.eval_dataset",
            "dataset.eval_dataset.repo_id=org/held-out",
        ),
        (
            ["teacher={kind: dataset}", f"loss_functions={BACKGROUND}"],
            "loss_functions[0].missing_probability_handling: background needs teacher.background, for a dataset of "
            "the hub has none",
            "teacher.background=captured",
        ),
    ],
)
def test_what_a_run_would_lack_is_known_from_its_configuration(overrides: list[str], line: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        load_run(SEED, overrides)
    assert str(caught.value) == line
    load_run(SEED, [*overrides, remedy])


def test_further_mistakes_are_counted() -> None:
    with pytest.raises(UserError, match=r"^trust_remote_code: must be true or false, got 7 \(and 2 more\)$"):
        load_run(SEED, ["trust_remote_code=7", "sequence_length=-1", "loss_functions.0.weight=-1"])


def test_null_is_as_if_the_key_were_not_given(tmp_path: Path) -> None:
    """In a file that extends another it takes the key out; where null is a value (`dataset.seed`), it stays one."""
    (tmp_path / "base.yaml").write_text(SEED.read_text())
    (tmp_path / "run.yaml").write_text(
        "extends: base.yaml\n"
        "teacher: {path: other/teacher, kwargs: {gguf_file: null, dtype: bfloat16}}\n"
        "trained_weights: null\n"
        "dataset: {seed: null, packing: null}\n"
        "training_args: {learning_rate: null, save_total_limit: null}\n"
    )
    config = load_run(tmp_path / "run.yaml").config
    assert config.teacher.kind == "hf" and "gguf_file" not in config.teacher.kwargs
    assert (config.trained_weights, config.dataset.seed, config.dataset.packing) == ("float32", None, True)
    assert "learning_rate" not in config.training_args
    assert config.training_args["save_total_limit"] is None


@pytest.mark.parametrize(
    "text",
    [
        "project_name: [&a0 [x, x, x, x], " + ", ".join(f"&a{i} [{f'*a{i - 1}, ' * 10}]" for i in range(1, 9)) + "]",
        "a0: &a0 {k: v}\n" + "\n".join(f"a{i}: &a{i} {{<<: [{f'*a{i - 1}, ' * 10}]}}" for i in range(1, 9)),
        "project_name: &a [*a]",
        "project_name: " + "[" * 5000,
        "project_name: " + "x" * 2**21,
        'project_name: "\\0"',
        'project_name: "\\ud800"',
        "sequence_length: 99999999999999999999",
        "sequence_length: " + "9" * 5000,
        "project_name: !!timestamp x",
        "project_name: !!bool maybe",
        "project_name: !!binary x",
        "? [a]\n: b",
    ],
    ids=lambda text: text[:25],
)
def test_hostile_yaml_is_answered_at_once(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_run(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ": is empty; it must hold the keys of a run"),
        ("# only a comment\n", ": is empty; it must hold the keys of a run"),
        ("- a\n- b\n", ": must hold keys and values (key: value), but is a list"),
        ("a: [1, 2\nb: 3\n", ": line 2: expected ',' or ']'"),
        ("a:\n\tb: 1\n", ": line 2: found character '\\t' that cannot start any token"),
        ("a: 1\nb: 2\na: 3\n", ": line 3: key 'a' appears twice"),
        ("a: !!python/object/apply:os.getcwd []\n", ": line 1: could not determine a constructor for the tag"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_run(path)
    assert str(caught.value).startswith(f"{path}{line}")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_run(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="cannot be read as text"):
        load_run(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as text"):
        load_run(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("compressor", "line"),
    [
        ({"d": 9, "k": 4, "exact_k": 5}, "exact_k: must be <= k = 4, got 5"),
        ({"d": 3, "k": 4, "exact_k": 4}, "k: must be <= d = 3, got 4"),
        ({"d": 9, "k": 4, "exact_k": 2}, "polynomial_terms: give terms (or residual_bins) for the 2 inexact values"),
        (
            {"d": 9, "k": 4, "exact_k": 2, "polynomial_terms": [0, "cubic"]},
            "polynomial_terms[1]: must be a power from 0 to 64, 'sqrt' or 'exp', got 'cubic'",
        ),
        (
            {
                "d": 9,
                "k": 4,
                "exact_k": 2,
                "residual_bins": [{"scale_dtype": "float16", "element_bits": 65, "num_elements": 2}],
            },
            "residual_bins[0].element_bits: must be <= 64, got 65",
        ),
    ],
)
def test_a_compressor_that_cannot_be(compressor: dict[str, object], line: str) -> None:
    data = read_yaml(SEED) | {"teacher": {"kind": "dataset", "logprob_compressor": compressor}}
    with pytest.raises(UserError) as caught:
        RunConfig.parse(data)
    assert str(caught.value) == f"teacher.logprob_compressor.{line}"
