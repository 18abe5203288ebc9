"""`docs/troubleshooting.md` has an entry for each message that the program ends with, and none for one that has gone.

Messages are found in the sources: texts of errors that are raised or built, of mistakes that are collected, and what functions
return whose texts go into these. What the program puts into a text, and `…` in the page, stand for anything."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache

from support.commands import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = sorted((ROOT / "ray_jobs").rglob("*.py"))
LISTS = {"mistakes", "wrong", "found", "faults"}  # of mistakes
# Functions that make a mistake of a text, and those whose texts are told far from where they are made.
TAKERS = {*"error_at error note wrong Fault Translation __init__".split()}
ELSEWHERE = (
    "_reason describe _end culprit _search _run warning metadata_faults missing_files file_faults _fault_of _lacking "
    "check_statistics waiting_for why_not CLEARER EXPECTED"
).split()
# Parts of messages, and what is no error.
PART = re.compile(
    r"[\s,.;:(]|(…*and |As in|Fewer|Leave|not looked|is not known here$|cannot be read$|none of them|true or false|trained in|"
    r"first in|… frames of|… rows are given|require_package|--help lists|`pip|(did you|learning rate|stream: every|…… after)|"
    r"other shapes|for … steps|before the first|a smaller|hf download|accept the|python -m|the address|… workers with … each$)"
)
WORDS = 3  # of a message itself; what has fewer passes on the text of another error
FEW = 14  # letters of an entry that must be the message itself, or it would pass for others
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
            self.take(self.constants[name], {})

    def messages(self) -> set[str]:
        """Those that say something by themselves."""
        return {text for text in self.found if len(own_words(text)) >= WORDS and not PART.match(text)}

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
            makers = {*map(name_of, ast.walk(node.func) if isinstance(node.func, ast.IfExp) else [node.func])}
            if collects or makers & (self.errors | TAKERS):
                told = [*node.args, *(keyword.value for keyword in node.keywords)]
        elif isinstance(node, ast.AugAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            told = [node.value] if LISTS & {*map(name_of, targets)} else []
        self.take(told, names)
        for inner in ast.iter_child_nodes(node):
            self.look(inner, names)

    def take(self, nodes: list[ast.AST], names: dict[str, list[ast.AST]]) -> None:
        self.found |= {re.sub(r"\s+", " ", text) for node in nodes for text in self.texts(node, names)}

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
        inside = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Dict):
            inside = node.values
        elif isinstance(node, ast.Subscript):
            inside = [node.value]
        elif isinstance(node, ast.Call) and not isinstance(getattr(node.func, "value", None), ast.Call):
            inside = [*node.args, *(keyword.value for keyword in node.keywords)]
        for inner in inside:
            in_pieces = isinstance(node, ast.JoinedStr) and isinstance(inner, ast.Constant)
            if not in_pieces and not isinstance(inner, ast.Compare | ast.comprehension):
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


@cache
def letters(text: str) -> int:
    return len(re.sub(r"\W", "", text))


def entries(page: str) -> list[str]:
    """The messages in the first column of the page's tables."""
    cells = (row.split(" | ")[0] for row in page.splitlines() if row.startswith("| `"))
    return [found[2].strip() for cell in cells for found in re.finditer(r"(`+)(.+?)\1(?!`)", cell)]


@cache
def pattern_of(entry: str) -> re.Pattern:
    return re.compile(".*".join(map(re.escape, entry.split("…"))))


def is_of(entry: str, message: str) -> bool:
    """Whether an entry says a good part of a message, piece by piece in its order."""
    message = message.strip()
    if entry == message or letters(entry) < FEW:
        return entry == message
    return bool(pattern_of(entry).fullmatch(message)) and letters(entry) >= SHARE * letters(message)


def without_entry(messages: Iterable[str], page: str) -> list[str]:
    listed = entries(page)
    return sorted(message for message in messages if not any(is_of(entry, message) for entry in listed))


@cache
def of_the_program() -> Finder:
    return Finder([file.read_text() for file in SOURCES])


def test_each_message_has_an_entry():
    messages = of_the_program().messages()
    assert len(messages) > 400  # or they are not found any more
    assert without_entry(messages, PAGE.read_text()) == []


def test_each_entry_is_of_a_message():
    listed = entries(PAGE.read_text())
    dead = [entry for entry in listed if not any(is_of(entry, message) for message in of_the_program().found)]
    assert dead == []
    assert len(listed) == len(set(listed)) > 400


def test_what_is_new_is_found():
    """A message in any of the ways in which they are told; an entry that is taken out."""
    ways = (
        "raise InputError(f'{flag}: some new text')",
        "class New(RunError):\n    pass\nclass RunError(Exception):\n    pass\nraise New('x: some new text')",
        "def f():\n    told = 'this is ' + 'some new text'\n    raise RunError(told)",
        "def why():\n    return f'some new text of {name}'\nraise InputError(f'{flag}: {why()}')",
        "with all_mistakes() as mistakes:\n    mistakes.append(f'--{flag}: some new text')",
        "def _reason(error):\n    return 2, 'it has some new text'",
    )
    base = "class InputError(Exception):\n    pass\nclass RunError(Exception):\n    pass\n"
    page = PAGE.read_text()
    for way in ways:
        lacking = without_entry(Finder([base + way]).messages(), page)
        assert any("some new text" in text for text in lacking), way
    row = next(row for row in page.splitlines() if "NCCL takes a GPU once" in row)
    messages = of_the_program().messages()
    (lacking,) = {*without_entry(messages, page.replace(row, ""))} - {*without_entry(messages, page)}
    assert "NCCL takes a GPU once" in lacking
