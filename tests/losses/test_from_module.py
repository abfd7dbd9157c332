"""A loss of the user's own, as docs/adding_a_loss.md describes it."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from distillkit.config import LossConfig, UserError, load_run
from distillkit.distribution import DenseDistribution
from distillkit.losses import DISTRIBUTION_LOSSES, Objective
from distillkit.losses.from_module import check_losses, load_loss

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_loss.md"
SEED = Path(__file__).parents[1] / "config" / "seed.yaml"


def block(language):
    """The first block of code of a language on the page."""
    return re.search(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A working directory that holds the module of the page; it is not on sys.path."""
    (tmp_path / "my_losses.py").write_text(
        block("python") + "\n\nmean = 3\n\n\ndef loss(logits, teacher, labels): ...\n"
    )
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("my_losses", "broken"):
        sys.modules.pop(name, None)


def own(function="my_losses:focal_kl", **options):
    return LossConfig(function=function, weight=1, **options)


def case():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 11, generator=generator) for _ in range(2))
    return student, DenseDistribution(teacher), torch.arange(6)


def test_the_example_of_the_page_is_called_with_its_options(directory):
    losses = [LossConfig.parse(loss) for loss in yaml.safe_load(block("yaml"))["loss_functions"]]
    terms = Objective(losses).terms
    assert [(term.name, term.weight) for term in terms] == [("cross_entropy", 0.2), ("focal_kl", 0.8)]
    assert terms[1].options == {"gamma": 1.5}
    sums, counts = terms[1].function(*case(), **terms[1].options)
    kl, _ = DISTRIBUTION_LOSSES["kl"](*case())
    torch.testing.assert_close(sums, (1 - torch.exp(-kl)) ** 1.5 * kl)
    assert torch.equal(counts, torch.ones(6))


def test_the_working_directory_does_not_stay_on_the_path(directory):
    before = list(sys.path)
    load_loss(own())
    assert sys.path == before


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (
            own("no_such_losses:kl2"),
            "loss_functions[0].function: cannot import 'no_such_losses': ModuleNotFoundError: No ",
        ),
        (
            own("broken:kl2"),
            "loss_functions[0].function: cannot import 'broken': ModuleNotFoundError: No module named ",
        ),
        (own("my_losses:kl2"), "loss_functions[0].function: the module has no 'kl2'; write one, or correct the name"),
        (own("my_losses:mean"), "loss_functions[0].function: the module has no function 'mean'; write one, or correct"),
        (
            own(options={"gama": 2}),
            "loss_functions[0].options: focal_kl(student_logits, teacher, labels, **options) cannot be called so: got "
            "an unexpected keyword argument 'gama'",
        ),
    ],
)
def test_a_mistake_is_one_line_before_training(directory, loss, line):
    with pytest.raises(UserError) as caught:
        check_losses([loss])
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("return student_logits.mean()", "must return two tensors, (sums, counts)"),
        ("return student_logits.mean(), student_logits.mean()", "must have one number per token, [6]; got []"),
        ("return student_logits, student_logits", "must have one number per token, [6]; got [6, 11]"),
        ("return 1.0, 1.0", "must have one number per token, [6]; got float"),
    ],
)
def test_a_result_of_another_shape_is_refused(directory, body, line):
    (directory / "my_losses.py").write_text(f"def mine(student_logits, teacher, labels):\n    {body}\n")
    with pytest.raises(UserError, match=re.escape(line)):
        load_loss(own("my_losses:mine"))(*case())


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("loss_functions.1.function=focal", "loss_functions[1].function: must be one of cross_entropy, kl, "),
        ("loss_functions.1.function=a b:c", "loss_functions[1].function: must be one of cross_entropy, kl, "),
        ("loss_functions.1.function=mine:kl", "loss_functions[1].function: kl is a name in the metrics already; give"),
        ("loss_functions.1.function=mine:loss", "loss_functions[1].function: loss is a name in the metrics already; "),
        (
            "loss_functions.1.options={gamma: 1}",
            "loss_functions[1].options: kl has none (only module:function); remove",
        ),
        (
            "loss_functions.1={function: mine:focal, weight: 1, temperature: 2}",
            "loss_functions[1].temperature: mine:focal has none (only kl, reverse_kl, jsd, tvd); remove it",
        ),
        (
            "loss_functions=[{function: a:focal, weight: 1}, {function: b:focal, weight: 1}]",
            "loss_functions[1].function: focal is given already by loss_functions[0]; name each loss once",
        ),
    ],
)
def test_a_mistake_in_the_yaml_needs_no_import(override, line):
    with pytest.raises(UserError) as caught:
        load_run(SEED, [override])
    assert str(caught.value).startswith(line)
