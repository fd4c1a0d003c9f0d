"""README and the pages of docs/: every link has a target, every example runs, and lists agree with what they list."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import tiny_lora

PROJECT = Path(__file__).parents[1]
DOCS = sorted((PROJECT / "docs").glob("*.md"))
PAGES = [PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/study/README.md")] + DOCS
CONFIG = yaml.safe_load((PROJECT / "mkdocs.yml").read_text())
LINK = re.compile(r"\]\((?!https?:)([^)\s]*)\)")


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs derive them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_have_targets(page):
    for link in LINK.findall(page.read_text()):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def nav_files(entries) -> list[str]:
    for entry in entries:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else nav_files(value)


def test_every_page_is_in_the_navigation_and_in_readme():
    pages = {path.name for path in DOCS}
    assert set(nav_files(CONFIG["nav"])) == pages | {"CONTRIBUTING.md", "CHANGELOG.md"}
    assert pages <= set(re.findall(r"\(docs/([\w-]+\.md)\)", (PROJECT / "README.md").read_text()))


def test_readme_is_two_screens():
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 150


def test_every_extra_is_documented():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    section = (PROJECT / "docs/installation.md").read_text().partition("## Extras")[2]
    assert set(re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE)) == set(project["optional-dependencies"])


def test_every_make_target_is_documented():
    phony = re.search(r"^\.PHONY: (.+)$", (PROJECT / "Makefile").read_text(), re.MULTILINE)[1]
    page = (PROJECT / "docs/installation.md").read_text()
    assert all(f"`make {target}`" in page for target in phony.split())


def test_the_loop_of_the_library_page_trains_on_noise_and_restores_the_weights():
    blocks = re.findall(r"```python\n(.*?)```", (PROJECT / "docs/library.md").read_text(), re.DOTALL)
    (loop,) = [block for block in blocks if "WeightPerturbation" in block]
    model = tiny_lora()
    ids = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(0))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    before = [parameter.detach().clone() for parameter in trained]
    batches = [{"input_ids": ids, "labels": ids}]
    names = {"model": model, "optimizer": optimizer, "total_steps": 2, "micro_batches": lambda step: batches}
    exec(compile(loop, "docs/library.md", "exec"), names)
    assert not all(map(torch.equal, before, trained))
    assert all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if n in frozen)
    assert not names["perturbation"].active


def test_lora_pro_of_the_library_page_is_an_optimizer():
    blocks = re.findall(r"```python\n(.*?)```", (PROJECT / "docs/library.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "LoRAPro(" in block]
    names = {"peft_model": tiny_lora()}
    exec(compile(block, "docs/library.md", "exec"), names)
    assert isinstance(names["optimizer"], torch.optim.Optimizer)


def test_the_citation_names_the_papers_and_no_person():
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    entries = [citation, *citation["references"]]
    assert all(set(author) == {"name"} for entry in entries for author in entry["authors"])


def test_the_versions_of_ruff_agree():
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (hook,) = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())["repos"]
    assert f"ruff=={hook['rev'].removeprefix('v')}" in extras["dev"]


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((PROJECT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    assert job["strategy"]["matrix"]["python-version"] == ["3.11", "3.12"]


def test_the_container_has_versions_that_pyproject_allows():
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = re.search(r"'\.\[([\w,]+)\]'", (PROJECT / "Dockerfile").read_text())[1].split(",")
    lines = (PROJECT / "constraints.txt").read_text().splitlines()[1:]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for requirement in (Requirement(text) for extra in installed for text in extras[extra]):
        name = canonicalize_name(requirement.name)
        if name not in ("flatlora-suite", "triton"):  # triton comes with torch
            assert pins[name] in requirement.specifier, name


def test_every_dependency_has_its_reason():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {re.match(r"[\w-]+", one)[0] for one in needed} - {project["name"]}
    page = (PROJECT / "docs/dependencies.md").read_text()
    assert [name for name in sorted(names) if name not in page] == []


@pytest.mark.parametrize("group", ["model", "dataset", "peft", "rho", "trainer", "eval"])
def test_every_option_is_in_the_table_of_options(group):
    page = (PROJECT / "docs/experiments.md").read_text()
    (row,) = re.findall(rf"^\| `{group}` \|.*$", page, re.MULTILINE)
    options = {path.stem for path in (PROJECT / "conf" / group).glob("*.yaml")}
    assert options - set(re.findall(r"\w+", row)) == set()


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_files_that_are_named_exist(page):
    text = page.read_text()
    named = set(re.findall(r"`(?:python )?((?:flatlora|conf|data|eval|scripts|tests)/[\w/]+\.(?:py|yaml))", text))
    named |= set(re.findall(r"`(flatlora/[\w/]*)`", text))
    examples = {name for name in named if re.search(rf"^`{name}`$", text, re.MULTILINE)}  # a reader's own files
    assert [name for name in sorted(named - examples) if "NAME" not in name and not (PROJECT / name).exists()] == []


def test_the_architecture_page_has_every_room():
    section = (PROJECT / "docs/architecture.md").read_text().partition("## The rooms")[2].partition("\n## ")[0]
    rooms = {name for row in re.findall(r"^\| (`.+?`) \|", section, re.MULTILINE) for name in re.findall(r"\w+", row)}
    assert rooms == {path.parent.name for path in (PROJECT / "flatlora").glob("*/__init__.py")}
