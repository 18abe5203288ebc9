"""The tests mirror the packages, and what several of them use stands in `support`."""

import ast
from pathlib import Path

import pytest

import ray_jobs

TESTS = Path(__file__).parent
# Benchmarks are run by hand, and what made old files runs in an old checkout.
MODULES = sorted(
    path for path in TESTS.rglob("*.py") if not path.parent.name.startswith(("benchmarks", "made_by_"))
)
OF_THEIR_OWN = {"benchmarks", "docs", "end_to_end", "support", "world"}
TEST_MODULES = {path.stem for path in MODULES if path.stem == "conftest" or path.stem.startswith("test_")}
PLUGINS = {"colour_follower", "faulty", "tiny_vla"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_module_is_imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        parts = {part for name in names for part in name.split(".")}
        assert not parts & TEST_MODULES


def test_a_folder_of_tests_is_a_package():
    packages = {path.name for path in Path(ray_jobs.__file__).parent.iterdir() if path.is_dir()}
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and "cache" not in path.name}
    assert folders - OF_THEIR_OWN - PLUGINS <= packages
