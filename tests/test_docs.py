"""README and docs are true: links lead somewhere, named files and functions exist, YAML parses, output is recorded."""

import ast
import io
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from distillkit.config import RunConfig
from distillkit.config.capture import CaptureConfig
from distillkit.config.evaluate import EvaluateConfig
from distillkit.config.synthetic import SyntheticTextConfig
from distillkit.config.written import WrittenTextConfig
from distillkit.config.yaml_files import read_yaml
from tests.pages import ROOT, blocks, text_of

PACKAGE = ROOT / "distillkit"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

OTHER_KINDS = {
    "compression": CaptureConfig,
    "students": EvaluateConfig,
    "tokenizer": SyntheticTextConfig,
    "documents": WrittenTextConfig,
}
"""What a YAML is that has one of these keys at its top level; all others are runs, or parts of one."""

LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
PATH = re.compile(r"`((?:distillkit|recipes|benchmarks|tests|scripts|docs)/[\w./-]*\w)`")
DOTTED = re.compile(r"`(distillkit(?:\.\w+)+)[`(]")
STEP = re.compile(r"^ *([\w/]+\.py) +([\w.]+(?:, [\w.]+)*)(?:  .*)?$")


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def names_in(path: Path) -> set[str]:
    """Functions, classes, methods and other names of a module, without importing it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = [each for each in ast.walk(tree) if isinstance(each, ast.Import | ast.ImportFrom)]
    names = {alias.asname or alias.name for each in imported for alias in each.names}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {each.id for each in node.targets if isinstance(each, ast.Name)}
    return names


def exists(dotted: str) -> bool:
    """Whether `distillkit.room.module.name` is a module, or a name in one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if module.is_file():
            rest = ".".join(parts[end:])
            return not rest or rest in names_in(module)
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in (first or second for first, second in LINK.findall(text_of(page))):
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_modules_exist(page: Path) -> None:
    for path in PATH.findall(text_of(page)):
        assert (ROOT / path).exists(), path
    for dotted in DOTTED.findall(text_of(page)):
        assert exists(dotted), dotted


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_have_at_most_six_columns(page: Path) -> None:
    for row in re.findall(r"^\|[-:| ]+\|$", text_of(page), re.MULTILINE):
        assert row.count("|") - 1 <= 6, row


def test_each_step_of_the_walks_is_in_the_package() -> None:
    walks = blocks(ROOT / "docs/architecture.md", "text")
    steps = [step for walk in walks for step in walk.splitlines()[1:]]
    assert len(walks) == 5
    for step in steps:
        found = STEP.match(step)
        assert found is not None, step
        path, names = PACKAGE / found[1], found[2].split(", ")
        assert path.is_file(), step
        assert set(names) <= names_in(path), step


def test_the_rooms_are_those_of_the_import_linter() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text_of(ROOT / "docs/architecture.md"), re.MULTILINE)
    assert [re.findall(r"\w+", row) for row in rows] == [re.findall(r"\w+", layer) for layer in layers]


def test_the_run_of_the_readme_is_the_quickstart() -> None:
    (code,) = blocks(ROOT / "README.md", "yaml")
    assert len(code.splitlines()) == 15
    named = {"project_name": "quickstart"}
    assert RunConfig.parse(yaml.safe_load(code) | named) == RunConfig.parse(read_yaml(ROOT / "recipes/quickstart.yaml"))


def test_the_readme_shows_what_the_recorded_quickstart_printed() -> None:
    from distillkit.training.results import print_results

    printed = io.StringIO()
    results = json.loads((ROOT / "benchmarks/results/quickstart.json").read_text(encoding="utf-8"))
    print_results(Console(file=printed, width=80), {**results, "samples": []})
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    assert "\n".join(lines).strip() in text_of(ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_has_known_keys_and_whole_files_parse(page: Path, tmp_path: Path) -> None:
    for code in blocks(page, "yaml"):
        path = tmp_path / "config.yaml"
        path.write_text(code.replace("extends: recipes/", f"extends: {ROOT}/recipes/"), encoding="utf-8")
        data = read_yaml(path)
        kind = next((kind for key, kind in OTHER_KINDS.items() if key in data), RunConfig)
        if "output_path" in data:
            kind.parse(data)
        assert data.keys() <= kind.model_fields.keys()


def test_the_installation_tells_of_every_part_and_what_is_needed():
    page = text_of(ROOT / "docs" / "installation.md")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [name for name in project["optional-dependencies"] if not re.search(rf"[`,\[]{name}[`,\]]", page)] == []
    floors = dict(each.split(">=") for each in project["dependencies"])
    needed = (
        f"Python {project['requires-python'][2:]}, torch {floors['torch']} and transformers {floors['transformers']}"
    )
    assert needed in page
