"""`docs/troubleshooting.md` has an entry for each message that the program ends with, and none for one that has gone.

Messages are found in the sources: texts of errors that are raised or built, of mistakes that are collected, and what functions
return whose texts go into these. What the program puts into a text, and `…` in the page, stand for anything."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from support.commands import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = sorted((ROOT / "ray_jobs").rglob("*.py"))
LISTS = {"mistakes", "wrong", "found", "faults"}  # of mistakes
TAKERS = {"error_at", "error", "note", "wrong", "Fault", "Rule"}  # functions that make a mistake of a text
# Functions whose texts are told far from where they are made.
ELSEWHERE = "_reason", "_end", "culprit", "metadata_faults", "missing_files", "file_faults", "_lacking", "without_hope"
ENDING = re.compile(r"[\s,.;:(]| ?(did you|and|for|before|after|none|python|hf|learning|stream:) ")  # no message of its own
WORDS = 3  # of a message itself; what has fewer passes on the text of another error
SHARE = 0.3  # of a message's letters, which its entry has at least


def name_of(node: ast.AST) -> str:
    """Of a name, or of the last part of one with dots."""
    return getattr(node, "id", getattr(node, "attr", ""))


def given(nodes: Iterable[ast.AST]) -> dict[str, list[ast.AST]]:
    """What names are given."""
    values = defaultdict(list)
    for node in nodes:
        if isinstance(node, ast.Assign | ast.NamedExpr):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                values[name_of(target)].append(node.value)
    return values


class Finder:
    """The messages of Python texts: `found`, with `…` where something is put in."""

    def __init__(self, texts: list[str]):
        trees = [ast.parse(text) for text in texts]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        self.constants = given(node for tree in trees for node in tree.body)
        self.functions = defaultdict(list)
        for node in nodes:
            if isinstance(node, ast.FunctionDef):
                self.functions[node.name].append(node)
        self.errors = {"Exception"}
        for _ in range(3):  # those that are derived from others
            classes = (node for node in nodes if isinstance(node, ast.ClassDef))
            self.errors |= {one.name for one in classes if self.errors & {*map(name_of, one.bases)}}
        self.found: set[str] = set()
        self.returning: set[str] = set()  # functions that have been looked at
        for tree in trees:
            self.look(tree, {})
        for name in ELSEWHERE:
            self.returned(name)

    def look(self, node: ast.AST, names: dict[str, list[ast.AST]]) -> None:
        """Find where something is told; `names` are those of the function around it."""
        if isinstance(node, ast.FunctionDef):
            names = {**names, **given(ast.walk(node))}
        told: list[ast.AST] = []
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            told = node.exc.args
        elif isinstance(node, ast.Call):
            owner = name_of(getattr(node.func, "value", node))
            collects = name_of(node.func) in ("append", "extend") and owner in LISTS
            if collects or name_of(node.func) in self.errors | TAKERS:
                told = [*node.args, *(keyword.value for keyword in node.keywords)]
        elif isinstance(node, ast.AugAssign | ast.Assign) and LISTS & {*map(name_of, getattr(node, "targets", [node]))}:
            told = [node.value]
        elif isinstance(node, ast.AugAssign) and name_of(node.target) in LISTS:
            told = [node.value]
        self.take(told, names)
        for inner in ast.iter_child_nodes(node):
            self.look(inner, names)

    def take(self, nodes: list[ast.AST], names: dict[str, list[ast.AST]]) -> None:
        self.found |= {
            text
            for node in nodes
            for text in self.texts(node, names)
            if len(own_words(text)) >= WORDS and not ENDING.match(text)
        }

    def texts(self, node: ast.AST, names: dict[str, list[ast.AST]]) -> Iterator[str]:
        """The texts in an expression, with what its names have been given and its functions return."""
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.Call):
            self.returned(name_of(node.func))
        if isinstance(node, ast.Name):
            left = {name: values for name, values in names.items() if name != node.id}
            for value in names.get(node.id) or self.constants.get(node.id, []):
                yield from self.texts(value, left)
        for inner in ast.iter_child_nodes(node):
            if not (isinstance(node, ast.JoinedStr) and isinstance(inner, ast.Constant)):
                yield from self.texts(inner, names)

    def returned(self, name: str) -> None:
        """Find what functions of a name return."""
        if name not in self.returning:
            self.returning.add(name)
            for function in self.functions[name]:
                returns = (node for node in ast.walk(function) if isinstance(node, ast.Return) and node.value)
                self.take([node.value for node in returns], given(ast.walk(function)))


def own_words(text: str) -> list[str]:
    return [word for word in text.split() if re.search(r"[A-Za-z]{2}", word)]
