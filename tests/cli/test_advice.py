"""What the program advises is there: every flag, command, package, variable and file that its texts name, as the parsers
of those who take them say. `test_advice_taken` does what refusals advise."""

import ast
import importlib.metadata
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ray_jobs import cache, demo, evaluate, export
from ray_jobs.cli.command_line import build, read_flags
from ray_jobs.cli.early_checks import check_command
from ray_jobs.cli.flags import PLUGINS, check_flags
from ray_jobs.cli.translations import TRANSLATIONS
from ray_jobs.config import flag_table
from ray_jobs.config.errors import InputError
from ray_jobs.config.flag_table import Flag, flags_of
from ray_jobs.config.options import Options
from ray_jobs.search.early_checks import check_search
from ray_jobs.search.options import SearchFlags
from ray_jobs.search.spaces import new_space
from support.advice import BUILT, other_programs, parse_other
from support.commands import ROOT

FLAG = re.compile(r"(?<![\w-])--([a-z][\w.\0-]*)(?:=('[^']*'|\[[^\]]*\]|[^\s`'\",;:)|\]]*))?")
TOOL = re.compile(r"(?<![\w./-])((?:hf|wandb|ray) [a-z][^`\n;]*)")
JOB = re.compile(r"python -m (ray_jobs[\w.]*)((?:[^\n`\0]|\\\n)*)")
READ = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
READ += [*sorted((ROOT / "docs").rglob("*.yaml")), *sorted((ROOT / "examples").iterdir())]
DOCUMENTS = [*READ, *sorted((ROOT / "search_spaces").glob("*.yaml"))]
OF_OTHERS = {  # flags of other programs, which the test of their commands parses
    "local-dir": "hf download",
    "head": "ray start",
    "dashboard-host": "ray start",
    "address": "ray start",
    "node-ip-address": "ray start",
    "no-wait": "ray job submit",
    "submission-id": "ray job submit",
    "min-nodes": "ray symmetric-run",
    "from-literal": "kubectl",
    **dict.fromkeys(("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time"), "SLURM's sbatch"),
    "working-dir": "ray job submit",
    "logdir": "TensorBoard",
    "amp": "a benchmark in tests/benchmarks",
    "generate": "ray get-auth-token",
    "repo-id": "LeRobot's converter, whose command `test_bad_input` looks up",
    "root": "LeRobot's converter",
    "push-to-hub": "LeRobot's converter",
}


def texts_of(file: Path) -> list[tuple[str, str]]:
    """All texts in a file, with their places. Of Python, the strings without those that describe a function; what is put
    into one while the program runs is `BUILT`."""
    if file.suffix != ".py" or file.parent.name == "examples":
        return [(f"{file.name}:{n}", line) for n, line in enumerate(file.read_text().splitlines(), 1)]
    found = []

    def visit(node: ast.AST) -> None:
        where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else BUILT for part in node.values]
            found.append((where, "".join(parts)))
            nodes = [part for part in node.values if not isinstance(part, ast.Constant)]
        else:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append((where, node.value))
            nodes = list(ast.iter_child_nodes(node))
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                nodes.remove(node.body[0])
        for inner in nodes:
            visit(inner)

    visit(ast.parse(file.read_text()))
    return found


TEXTS = [text for file in sorted((ROOT / "ray_jobs").rglob("*.py")) for text in texts_of(file)]
TEXTS += [text for file in DOCUMENTS for text in texts_of(file)]


def own_flags() -> dict[str, Flag]:
    """The few that single jobs have beside those of a training."""
    few = {
        "help",
        "dry-run",
        "dry_run",
        "json",
        "measure",
        "cost_per_hour",
        "new-space",
        *export.FLAGS,
        "checkpoint",
    }
    return {
        **{name: Flag(name, "str") for name in few},
        **flags_of(demo.DemoOptions, ""),
        **flags_of(cache.ListOptions, ""),
        **{rule.flag: Flag(rule.flag, "str") for rule in TRANSLATIONS},
    }


def mistake(name: str, value: str | None, known: dict[str, Flag]) -> str | None:
    """What is wrong with a flag in a text, as far as it is there before the program runs."""
    if (name in OF_OTHERS or name.endswith(PLUGINS)) and name not in known:
        return None
    if BUILT in name or name not in known:
        pattern = re.escape(name).replace(BUILT, ".+")
        group = rf"{pattern}(\..+)?"  # `--peft.*`, `--dataset`
        return None if any(re.fullmatch(group, flag) for flag in known) else "there is no such flag"
    value = (value or "").strip("'").rstrip(".")
    if (
        not value
        or BUILT in value
        or "…" in value
        or "..." in value
        or value.startswith("\\")
        or value.strip("[],/").isupper()
    ):
        return None
    try:
        known[name].read(value)
        for config in (Options, SearchFlags):
            if name in flags_of(config, ""):
                build(config, {name: value})
    except (ValueError, InputError) as error:
        return str(error)
    return None


def test_flags():
    known = own_flags() | flags_of(Options, "") | flags_of(SearchFlags, "") | flag_table.load().flags()
    wrong, seen = [], 0
    for where, text in TEXTS:
        for found in FLAG.finditer(text):
            seen += 1
            if why := mistake(found[1].rstrip(f".-{BUILT}"), found[2], known):
                wrong.append(f"{where}: {found[0]}: {why}")
    assert not wrong, "\n".join(wrong)
    assert seen > 400  # or they are not found any more
    for text in ("--data.source=lerobot", "--data.cahce=off", "--policy.\0_x=1", "--steps=x"):
        found = FLAG.search(text)
        assert mistake(found[1], found[2], known), text


# Each job's own look at its command line, before anything is imported.
LOOKS = {
    "train": lambda words: check_command(read_flags(words)[0]),
    "tune": lambda words: (
        new_space.asked(words) or check_search(read_flags([word for word in words if word != "--dry-run"])[0])
    ),
    "doctor": lambda words: check_command(
        {k: v for k, v in read_flags(words)[0].items() if k not in ("json", "measure", "cost_per_hour")}
    ),
    "evaluate": lambda words: _evaluate(read_flags(words)[0]),
    "cache": lambda words: check_flags(
        read_flags([word for word in words if word.startswith("--")])[0],
        flags_of(cache.ListOptions, ""),
        alone="build" not in words,
    ),
    "demo": demo._parse,
    "report": lambda words: check_flags(
        read_flags(words)[0], {"output_dir": Flag("output_dir", "str")}, alone=True
    ),
    "export": lambda words: check_flags(
        read_flags(words)[0], {name: Flag(name, "str") for name in export.FLAGS}, alone=True
    ),
}
# What may be wrong with a command out of a text: it names data that are not here, or leaves out what is typed before.
MEANT = re.compile(
    r"there is no (such folder|checkpoint)|nothing to resume|is missing|already exists|^It can be"
)


def _evaluate(flags: dict[str, str]) -> None:
    found, output_dir = flags.pop("checkpoint", None), flags.pop("output_dir", None)
    evaluate._check(found, output_dir, flags, any(name.startswith("env.") for name in flags))


def words_of(command: str) -> list[str]:
    """A command's words, with what it has in brackets, without dots that stand for more."""
    command = re.sub(r"\\(\n|$)", " ", command).replace("[--", "--").partition(" | ")[0]
    words = [
        word.rstrip(",:.)") if word.startswith("--") else word for word in shlex.split(command, comments=True)
    ]
    words = [w[:-1] if w.endswith("]") and w.count("[") < w.count("]") else w for w in words]
    return [word for word in words if word.strip(".]\\") and word[-1] != "="]


def test_commands_of_the_jobs():
    commands = [(file.name, found) for file in READ for found in JOB.finditer(file.read_text())]
    commands += [(where, found) for where, text in TEXTS if ".py" in where for found in JOB.finditer(text)]
    wrong = []
    for where, (module, rest) in ((where, found.groups()) for where, found in commands):
        module = module.rstrip(".")
        if importlib.util.find_spec(module) is None:
            wrong.append(f"{where}: there is no {module}")
        job = module.rpartition(".")[2]
        if job not in LOOKS or not rest.strip():
            continue
        words = words_of(rest)
        if "--help" in words:
            continue
        try:
            LOOKS[job]([word for word in words if word.startswith("--") or job in ("cache", "tune")])
        except InputError as error:
            wrong += [f"{where}: {line}" for line in str(error).splitlines() if not MEANT.search(line)]
    assert not wrong, "\n".join(wrong)
    assert len(commands) > 30


def test_commands_of_other_programs():
    programs, seen = other_programs(), 0
    for where, text in TEXTS:
        for found in TOOL.finditer(text):
            seen += 1
            try:
                parse_other(programs, found[1].rstrip("\\ "))
            except Exception as error:
                raise AssertionError(f"{where}: {found[1]}: {error}") from error
    assert seen > 15
    for command, why in (("hf dowload a/b", "dowload"), ("ray start --haed", "haed")):
        with pytest.raises(Exception, match=why):
            parse_other(programs, command)


def test_programs_and_modules_of_lerobot():
    scripts = {e.name for e in importlib.metadata.entry_points(group="console_scripts")}
    for where, text in TEXTS:
        for name in re.findall(r"(?<![\w/.-])lerobot-[a-z]+(?:-[a-z]+)*", text):
            assert name in scripts, f"{where}: {name}"
        for module in re.findall(r"python -m (lerobot[\w.]*)", text):
            assert importlib.util.find_spec(module.rstrip(".")), f"{where}: {module}"


def test_nothing_that_publishes_is_advised():
    """LeRobot's script for quantiles uploads the data set, without a flag against it; its converter does unless it is told not to."""
    converts = [text for _, text in TEXTS if "convert_dataset_v21_to_v30 --" in text]
    assert converts and all("--push-to-hub=false" in text for text in converts)
    for where, text in TEXTS:
        assert not re.search(r"lerobot\S*augment_dataset_quantile_stats", text), where


def test_packages():
    """Those with a version are the ones that are installed, or that pyproject.toml or cluster.yaml names."""
    pinned = (ROOT / "pyproject.toml").read_text() + (ROOT / "cluster.yaml").read_text()
    seen = 0
    for where, text in TEXTS:
        for found in re.finditer(r"pip install ((?:'[^'\n]+'|[\w.\[\]=-]+)(?: [\w.-]+==[\w.]+)*)", text):
            for word in shlex.split(found[1]):
                if BUILT in word or word.startswith("-") or word == "uv":
                    continue  # from metadata and sources, see below
                seen += 1
                requirement = Requirement(word)
                if requirement.url:
                    assert word == shlex.split(export.FORK)[2]  # no registry has it
                    continue
                if str(requirement) in pinned:
                    continue
                installed = importlib.metadata.distribution(requirement.name)
                assert requirement.specifier.contains(installed.version), f"{where}: {word}"
                extras = installed.metadata.get_all("Provides-Extra") or []
                assert requirement.extras <= set(extras), f"{where}: {word}"
    assert seen >= 5


def test_extras_of_policies():
    """Those that are advised where a policy's packages are missing are found in LeRobot's sources."""
    from lerobot.configs.policies import PreTrainedConfig

    from ray_jobs.checks import policy

    extras = importlib.metadata.metadata("lerobot").get_all("Provides-Extra")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "is_package_available", lambda *names: False)
        for kind in PreTrainedConfig.get_known_choices().values():
            if kind.__module__.startswith("lerobot."):
                advised = policy.missing_packages(kind.__new__(kind))
                assert set(advised.values()) <= set(extras), (kind, advised)


def test_environment_variables():
    """Ours are read somewhere."""
    read = {text for _, text in TEXTS}
    for where, text in TEXTS:
        for name in re.findall(r"(?<!\w)RAY_JOBS_(?!TEST)[A-Z_]+", text):
            assert name in read, f"{where}: {name}"


def test_files():
    for where, text in TEXTS:
        for name in re.findall(r"search_spaces/\w+\.yaml", text):
            assert (ROOT / name).is_file(), f"{where}: {name}"
