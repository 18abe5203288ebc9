"""From the command line to a checked plan of a search: what every trial shares, and what may vary.

Real configs are built at the space's corners, with LeRobot's own classes, before anything is scheduled.
"""

import contextlib
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ray_jobs.checks import preflight
from ray_jobs.checks.dataset import open_dataset, with_episodes
from ray_jobs.checks.output_dir import check_output_dir
from ray_jobs.cli.command_line import asks_to_resume, listed, read_flags
from ray_jobs.cli.resolve import resolve
from ray_jobs.config.errors import InputError, StorageError, StorageFull
from ray_jobs.config.recipe import Recipe
from ray_jobs.search.early_checks import check_steps
from ray_jobs.search.files import LEFT_OUT, SEARCH_FILE, SPACES_DIR, read_begun, read_search
from ray_jobs.search.options import SearchFlags, in_full, parse_search_flags
from ray_jobs.search.spaces.chosen import theirs
from ray_jobs.search.spaces.idle import without_effect
from ray_jobs.search.spaces.space import Config, SearchSpace, Space, flags
from ray_jobs.search.spaces.space_file import PUSH
from ray_jobs.storage import mirror
from ray_jobs.storage.bucket import is_uri
from ray_jobs.storage.records import SUCCESS, write_json
from ray_jobs.storage.trust import check_links
from ray_jobs.training.validation import chunk_length

# Validations of a trial, unless told otherwise; with asha one in three goes on at the first and at the third. Of sixteen
# trials of a recorded table, the best that is left is then within 2 % of the best in 62 of 100 cases, for 33 % of all steps.
# Judged first after three sixteenths it is in 78, for 40 %; a real search of sixteen took half as long again.
VALIDATIONS = 8
# Before the first one. Earlier, a training from scratch has not learned anything yet, and lots would be drawn.
FEWEST_STEPS = 25
FEWEST_FRAMES, MOST_FRAMES = 64, 256  # of a validation
FRAMES = "the data set's frames"  # a term that is no flag
# What is decided here where the user is silent and must not change with our version: kept with the search.
DECIDED = ("eval_steps", "max_eval_samples", "env_eval_freq")
EPISODES = 20  # in a simulator, at every validation
NOT_COMPARED = (
    "wandb.",
    "policy.repo_id",
    "policy.private",
    "policy.tags",
    "policy.license",
    "ray.address",
    "ray.cpus_per_worker",
    "ray.max_failures",
    "ray.hang_timeout",
    "checkpoint.",
    "num_workers",
    "log_freq",
    "save_freq",
    "prefetch_factor",
    "data.cache",
    "dataset.root",  # where it lies, not what it is
    "assets.",
)


@dataclass
class Plan:
    """A checked search.

    `base` are the command-line arguments that all trials share, `typed` the user's own, `recipe` the baseline of the first
    space, resolved.
    """

    output_dir: Path
    options: SearchFlags
    space: SearchSpace
    typed: dict[str, str]
    base: list[str]
    recipe: Recipe
    frames: int
    """Of the data set."""
    horizon: int
    resume: bool
    notices: list[str]
    remote: str | None = None
    """The bucket's address that `output_dir` is copied to, if there is one."""
    left_out: list[str] = field(default_factory=list)
    """What the spaces would search for nothing."""

    @property
    def place(self) -> str:
        """The user's `--output_dir`."""
        return self.remote or str(self.output_dir)

    @property
    def name(self) -> str:
        return _last_part(self.place)

    @property
    def steps(self) -> int:
        """Training steps of a whole trial."""
        return self.recipe.lerobot.steps

    @property
    def grace_steps(self) -> int:
        """Steps that every trial is given."""
        first = self.recipe.lerobot.env_eval_freq if SUCCESS in self.options.tune.metrics else 0
        return self.options.tune.grace_steps or max(first, self.recipe.eval_steps)

    @property
    def pushes(self) -> bool:
        """Whether the best policy is to be uploaded."""
        return self.typed.get(PUSH, "").lower() == "true"

    @property
    def study_name(self) -> str:
        return self.options.tune.study_name or self.name

    @property
    def terms(self) -> dict[str, str]:
        """What must be the same for trials to be compared, and its value."""
        words = (word[2:].partition("=") for word in self.base)
        same = {flag: value for flag, _, value in words if not flag.startswith(NOT_COMPARED)}
        return {**same, FRAMES: str(self.frames)}

    @property
    def scheduler(self) -> str:
        """How trials are stopped early; those with several metrics are not."""
        return "none" if len(self.options.tune.metrics) > 1 else self.options.tune.scheduler

    def save(self) -> None:
        """Write what `--resume` needs into the search's folder."""
        (self.output_dir / SPACES_DIR).mkdir(parents=True, exist_ok=True)
        policies = [space.policy for space in self.space.spaces]
        for space in self.space.spaces:
            target = self.output_dir / SPACES_DIR / f"{space.policy}.yaml"
            if not target.exists():
                shutil.copyfile(space.file, target)
        terms = self.terms
        kept = {**{flag: terms[flag] for flag in DECIDED}, **self.typed}
        content = {"flags": kept, "policies": policies, LEFT_OUT: self.left_out}
        write_json(self.output_dir / SEARCH_FILE, content)


def typed_flags(argv: list[str]) -> tuple[dict[str, str], bool, list[str]]:
    """The command line by flag name, whether it asks to resume, and notices. A resumed search has the flags that
    it was begun with; what is typed again goes first.

    Raises:
        InputError: Nothing to resume, or a folder that already holds something.
    """
    typed, notices = read_flags(in_full(argv))
    resume = asks_to_resume(typed)
    typed.pop("resume", None)
    place = typed.get("output_dir", "outputs/search").rstrip("/")
    folder = _folder_for(place, resume) if is_uri(place) else Path(place)
    if resume:
        before = read_begun(folder)
        check_links(folder)
        # As they were when the search began, whatever has become of the files since.
        copies = [folder / SPACES_DIR / f"{policy}.yaml" for policy in before.policies]
        given = [Path(name) for name in listed(typed.pop("space", ""))]
        if {f.read_bytes() for f in given if f.is_file()} - {f.read_bytes() for f in copies if f.is_file()}:
            notices.append(f"--space is not what the search began with: it goes on with {copies[0].parent}.")
        typed = {**before.flags, **typed, "space": ",".join(map(str, copies))}
    else:
        check_output_dir(folder, (SEARCH_FILE,))
        name = _last_part(place) if is_uri(place) else folder.resolve().name
        typed.setdefault("tune.study_name", name)  # kept when the folder is renamed
    typed["output_dir"] = place
    return typed, resume, notices


def _folder_for(address: str, resume: bool) -> Path:
    """The folder of this node where a search lives that is copied to a bucket; on resume with what is there."""
    if resume:
        from ray_jobs.search import bucket_copy

        return bucket_copy.pull(address)
    mirror.check_new(address, SEARCH_FILE)
    return mirror.folder_of(address)


def _last_part(place: str) -> str:
    return place.rpartition("/")[2]


def make_plan(
    typed: dict[str, str],
    options: SearchFlags,
    space: SearchSpace,
    resume: bool,
    notices: list[str],
    say: Callable[[str], None],
) -> Plan:
    """Build and check configurations all over the spaces.

    Raises:
        InputError: In the user's flags, or in a space file (then with its name and line).
    """
    base, fixed = _base(theirs(typed), options), space.fixed
    remote = typed["output_dir"] if is_uri(typed["output_dir"]) else None
    output_dir = mirror.folder_of(remote) if remote else Path(typed["output_dir"]).absolute()
    scratch = f"--output_dir={output_dir / 'never'}"
    shortest, recipe = math.inf, None
    spaces, before = [], read_search(output_dir).left_out if resume else None
    wrong: dict[str, InputError] = {}
    for s in space.spaces:
        arguments = partial(_arguments, base, scratch)
        try:
            first = _checked(arguments(s.first(fixed)), output_dir)
        except (StorageError, StorageFull):  # whatever the baseline is
            raise
        except InputError as error:
            _blame_the_user(error, arguments({**s.kind(fixed), **fixed}), output_dir)
            raise _in_file(s, "baseline", {}, error) from None
        meta = open_dataset(first.lerobot.dataset)
        s = _that_matters(s, typed, bool(meta.camera_keys), before, notices)
        spaces.append(s)
        recipe = recipe or first
        notices += [notice for notice in first.notices if notice not in notices]
        shortest = min(shortest, chunk_length(first.lerobot.policy))
        for blamed, config in s.corners(fixed):
            if s.violated(config) is None:
                try:
                    built = resolve(arguments(config))
                    preflight.check_policy(with_episodes(built, meta), meta)
                except InputError as error:
                    wrong.setdefault(str(error), _in_file(s, blamed, config, error))
                    continue
                shortest = min(shortest, chunk_length(built.lerobot.policy))
        for config in s.chunk_corners(fixed):
            with contextlib.suppress(InputError):  # no such policy
                shortest = min(shortest, chunk_length(resolve(arguments(config)).lerobot.policy))
    if wrong:
        raise InputError("\n".join(map(str, wrong.values())))
    assert recipe is not None  # there is at least one space
    horizon = recipe.options.data.eval_horizon or int(shortest)
    base.append(f"--data.eval_horizon={horizon}")
    if remote:
        mirror.check_writable(remote)
    left_out = sorted(
        {p.flag for s in space.spaces for p in s.parameters} - {p.flag for s in spaces for p in s.parameters}
    )
    space = SearchSpace(tuple(spaces), fixed)
    frames = meta.total_frames
    return Plan(
        output_dir, options, space, typed, base, recipe, frames, horizon, resume, notices, remote, left_out
    )


def _that_matters(
    space: Space, typed: dict[str, str], cameras: bool, before: list[str] | None, notices: list[str]
) -> Space:
    """The space without what has no effect.

    Args:
        before: What was left out when the search that goes on began.
    """
    reasons: dict[str, list[str]] = {}
    for flag, why in without_effect(space, typed, cameras).items():
        if before is None or flag in before:
            reasons.setdefault(why, []).append(flag)
    notices += [
        f"{why}, so this has no effect and is not searched: {', '.join(flags)}"
        for why, flags in reasons.items()
    ]
    left = space.without({flag for flags in reasons.values() for flag in flags})
    if not any(p.drawn is not None for p in left.parameters):
        raise space.error("search", f"nothing of it has an effect: {'; '.join(reasons)}.")
    return left


def steps_between(steps: int) -> int:
    """Training steps from one validation of a trial to the next, of which it has `steps` in all."""
    return max(math.ceil(steps / VALIDATIONS), min(FEWEST_STEPS, math.ceil(steps / 4)))


def _base(given: dict[str, str], options: SearchFlags) -> list[str]:
    """The arguments that all trials share: the user's, and what a search needs where the user is silent."""
    check_steps(given)
    steps = given["steps"]
    every = steps_between(int(steps))
    defaults = {
        "eval_steps": str(every),
        # Two for each step in between: with batches of 8, a tenth of a trial's time.
        "max_eval_samples": str(min(MOST_FRAMES, max(FEWEST_FRAMES, 2 * every))),
        "log_freq": str(max(1, every // 2)),
        "save_freq": steps,
        "env_eval_freq": "0",
        "checkpoint.keep_last": "1",
        "wandb.disable_artifact": "true",
    }
    if not given.keys() & {"data.eval_episodes", "dataset.eval_split"}:
        defaults["dataset.eval_split"] = "0.1"
    if SUCCESS in options.tune.metrics:
        if "env.type" not in given:
            raise InputError(f"--tune.metric={options.tune.metric} needs a simulator: --env.type=pusht, say.")
        defaults |= {"env_eval_freq": defaults["eval_steps"], "eval.n_episodes": str(EPISODES)}
    if "val/inference_ms" in options.tune.metrics:
        defaults["data.eval_timing"] = "true"
    if options.tune.workers_per_trial > 1:
        defaults["ray.num_workers"] = str(options.tune.workers_per_trial)
    # All trials would go to the same repository, the last one to stay.
    both = {**defaults, **given, PUSH: "false"}
    if both["eval_steps"] == "0":
        raise InputError("--eval_steps=0: trials are compared by their validations; leave it out.")
    both["assets.dir"] = str(Path(both.get("assets.dir", "pretrained")).absolute())
    return [f"--{flag}={value}" for flag, value in both.items()]


def _arguments(base: list[str], scratch: str, config: Config) -> list[str]:
    return [*base, *flags(config), scratch]


def _checked(arguments: list[str], output_dir: Path) -> Recipe:
    """A recipe, checked as one that writes into the search's folder. `resolve` gets another: it refuses one that is there."""
    recipe = resolve(arguments)
    recipe.lerobot.output_dir = output_dir
    return preflight.check(recipe)


def _blame_the_user(error: InputError, without_space: list[str], output_dir: Path) -> None:
    """Raise an error of the baseline as the user's own, if it is there without the space file as well."""
    try:
        _checked(without_space, output_dir)
    except InputError as own:
        if str(own) == str(error):
            raise own from None


def _in_file(space: Space, blamed: str, config: Config, error: InputError) -> InputError:
    """An error about a configuration, with the file and line it comes from."""
    message = str(error)
    named = [flag for flag in re.findall(r"--([\w.]+)", message) if flag in space.lines]
    varied = f"{blamed}={config[blamed]}" if blamed in config else f"the {blamed}"
    return space.error(named[0] if named and blamed not in config else blamed, f"with {varied}: {message}")


def read_command(argv: list[str]) -> tuple[dict[str, str], SearchFlags, bool, list[str]]:
    """The command line: all flags by name, the tuner's own parsed, whether to resume, notices."""
    typed, resume, notices = typed_flags(argv)
    options = parse_search_flags(typed)
    if len(options.tune.metrics) > 1 and options.tune.scheduler != "none" and "tune.scheduler" in typed:
        notices.append(
            f"--tune.scheduler={options.tune.scheduler}: trials with several metrics are not stopped early."
        )
    return typed, options, resume, notices
