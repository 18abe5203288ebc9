"""The README and the pages of docs/: short, linked, made from the code where they say so, and true to the pins."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from ray_jobs import __main__, cli
from ray_jobs.cli import pages
from ray_jobs.cluster.job import shortest
from support.commands import ROOT
from support.documents import load_script

DOCS = ROOT / "docs"
READ = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
PINS = dict(
    re.match(r"([\w-]+)(?:\[[^\]]*\])?==(.+)", pin).groups()
    for pin in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
)


def anchors(page: Path) -> set[str]:
    """What links may name within a page, as repository browsers make it from headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", READ, ids=lambda page: page.name)
def test_links(page):
    """Each names a file that is there, and a heading in it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not heading or heading in anchors(file), target


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_a_page_begins_with_a_command(page):
    title, _, first, *_ = page.read_text().splitlines()
    assert title.startswith("# ") and first.startswith("    "), first


def test_what_the_code_makes_is_up_to_date():
    flags, architecture = load_script(DOCS / "make_flags.py"), load_script(DOCS / "make_architecture.py")
    assert flags.PAGE.read_text() == flags.page(), "python docs/make_flags.py"
    assert architecture.PAGE.read_text() == architecture.page(), "python docs/make_architecture.py"


def test_versions():
    badges = dict(re.findall(r"badge/(\w+)-([\d.]+)-", (ROOT / "README.md").read_text()))
    assert badges == {"LeRobot": importlib.metadata.version("lerobot"), "python": "3.12"}
    text = (DOCS / "kubernetes" / "rayjob.yaml").read_text()
    ray = PINS["ray"]
    assert yaml.safe_load(text)["spec"]["rayClusterSpec"]["rayVersion"] == ray
    assert set(re.findall(r"(?:ray|ray-jobs):(\d[\d.]+)", text)) == {ray}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_pages_of_refusals():
    """Each package has one, and each is there."""
    for page in set(pages.PAGES.values()):
        name, _, heading = page.partition("#")
        assert not heading or heading in anchors(DOCS / name), page
        assert (DOCS / name).is_file(), page
    package = Path(cli.__file__).parent.parent
    for module in pages.PAGES:
        assert (package / module).is_dir() or (package / f"{module}.py").is_file(), module
    folders = {folder.name for folder in package.iterdir() if (folder / "__init__.py").is_file()}
    assert folders <= set(pages.PAGES)


def test_each_job_has_a_shortest_command():
    for job in __main__.JOBS:
        text = importlib.import_module(f"ray_jobs.{job}").__doc__
        assert shortest(text).startswith(f"python -m ray_jobs.{job}"), job
