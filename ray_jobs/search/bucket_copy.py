"""A search whose `--output_dir` is a bucket: the driver works in a folder of its node, and a copy of it is kept there.

    s3://bucket/search/{search.json,search_spaces/,study.db,trials.csv,summary.json,report.html,best/}    by the driver
    s3://bucket/search/trials/0003/...      every trial is a run of its own, copied there by its slot (see `mirror`)

On another node the search goes on from that: what the study there does not know has not been.
"""

import contextlib
import fcntl
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from optuna.study import Study

from ray_jobs.config.errors import InputError, RunError
from ray_jobs.config.options import OPTIONS_FILE
from ray_jobs.search.files import (
    A_TRIAL,
    BEST_DIR,
    SEARCH_FILE,
    SPACES_DIR,
    STUDY_FILE,
    TRIALS_DIR,
    ranked_links,
    read_search,
    trial_dir,
    trial_name,
    trial_place,
)
from ray_jobs.search.plan import Plan
from ray_jobs.search.study.storage import BUSY_S
from ray_jobs.search.study.study import CONFIG, ranking, trials_of
from ray_jobs.storage import mirror
from ray_jobs.storage.bucket import check_address, open_root
from ray_jobs.storage.cache_folder import default_folder
from ray_jobs.storage.fingerprint import fingerprint_of
from ray_jobs.storage.records import SUMMARY_FILE
from ray_jobs.storage.retry import patiently, storage_may_return

SESSION = ".session"  # which session of the search has written last
SEEN = ".seen"  # which one had when it was fetched
AT_ONCE = 8


def pull(address: str) -> Path:
    """The folder of this node where the search at `address` goes on, with what is there; returns it.

    Raises:
        InputError: The bucket cannot be read, or holds no search there.
    """
    here = mirror.folder_of(address)
    system, place = open_root(address, flag="output_dir")
    with mirror.told(address):
        system.invalidate_cache()
        if not system.exists(f"{place}/{SEARCH_FILE}"):
            raise InputError(f"--resume=true: nothing to resume, there is no search in {address}.")
        seen = _session_in(system, place)
        # If it was here last, or has begun here since, this node may know more than the bucket.
        last = {file.read_bytes() for file in (here / SESSION, here / SEEN) if file.is_file()}
        if not (here / SESSION).is_file() or seen not in last:
            shutil.rmtree(here, ignore_errors=True)
            for folder in ("", SPACES_DIR):
                (here / folder).mkdir(parents=True, exist_ok=True)
                for file in system.ls(f"{place}/{folder}".rstrip("/"), detail=True):
                    name = Path(file["name"]).name
                    if file["type"] == "file" and name[0] != ".":
                        system.get_file(file["name"], str(here / folder / name))
        (here / SEEN).write_bytes(seen)
        if not (here / STUDY_FILE).is_file() and "tune.storage" not in read_search(here).flags:
            _bring_trials(system, place, address, here)  # the study is gone: they know what was in it
    return here


def bring(address: str) -> Path:
    """A folder of this node with what can be read of the run or the search at `address`: the checkpoint that a run, or each
    trial, is ranked by, and small files.

    Raises:
        InputError: The bucket cannot be read, or holds neither there.
    """
    check_address(address, "checkpoint")
    system, place = open_root(address, flag="checkpoint")
    with mirror.told(address, "checkpoint"), contextlib.ExitStack() as stack:
        system.invalidate_cache()
        begun = next((n for n in (SEARCH_FILE, OPTIONS_FILE) if system.exists(f"{place}/{n}")), None)
        if begun is None:
            raise InputError(f"--checkpoint={address}: there is neither a run nor a search.")
        text = system.cat_file(f"{place}/{begun}")
        # Who writes there now has a folder of its own here; another run of that address is another one.
        here = default_folder() / "fetched" / fingerprint_of(address.rstrip("/"), text.hex())
        here.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((here / ".lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of a node
        if begun == OPTIONS_FILE:
            mirror.pull_result(address, here, ("best", "last"))
            return here
        (here / SEARCH_FILE).write_bytes(text)
        _bring_trials(system, place, address, here, ranked_links(read_search(address, text).metrics))
    return here


def _bring_trials(
    system: AbstractFileSystem, place: str, address: str, here: Path, links: tuple[str, ...] = ()
) -> None:
    """The trials' small files, and of each the checkpoint that the first of `links` leads to."""
    trials = [name for path in _listed(system, place) if A_TRIAL.fullmatch(name := Path(path).name)]

    def bring_one(name: str) -> None:
        mirror.pull_result(trial_place(address, name), trial_dir(here, name), links)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(bring_one, trials))


def _listed(system: AbstractFileSystem, place: str) -> list[str]:
    """Trials of the search at a place."""
    with contextlib.suppress(FileNotFoundError):
        return system.ls(f"{place}/{TRIALS_DIR}", detail=False)
    return []


def _session_in(system: AbstractFileSystem, place: str) -> bytes:
    with contextlib.suppress(FileNotFoundError):
        return system.cat_file(f"{place}/{SESSION}")
    return b""


@contextlib.contextmanager
def kept(
    plan: Plan, study: Study, tell: Callable[[str], None], stop: Callable[[], object]
) -> Iterator["BucketCopy | None"]:
    """Within, the copy of a search in its bucket is kept up to date; None for a search in a folder.

    Args:
        stop: Whether the search was asked to stop, which does not wait for the bucket.

    Raises:
        RunError: Another search writes there, or the bucket has failed for too long.
    """
    if not plan.remote:
        yield None
        return
    session, seen = uuid.uuid4().hex, plan.output_dir / SEEN
    system, place = open_root(plan.remote, flag="output_dir")

    def as_it_was() -> None:
        if _session_in(system, place) != (seen.read_bytes() if seen.is_file() else b""):
            raise RunError(
                f"the search in {plan.remote} has gone on elsewhere meanwhile. The same command again."
            )

    with mirror.mirrored(plan.remote, plan.output_dir, tell, session, BucketCopy, as_it_was, stop) as copy:
        assert isinstance(copy, BucketCopy)
        (plan.output_dir / SESSION).write_text(session)
        copy.flush()
        copy.forget_unknown(plan, study)
        yield copy


class BucketCopy(mirror.Mirror):
    """Copies what the driver writes; trials' own files are not its business, but for those that nobody needs any more."""

    def __init__(self, *args: Any):
        self.hopeless: set[str] = set()
        self.dropped: set[str] = set()
        super().__init__(*args)

    def ended(self, hopeless: set[str]) -> None:
        """A trial has ended; those that are `hopeless` need no checkpoints any more."""
        self.hopeless = hopeless
        self.wake.set()

    def forget_unknown(self, plan: Plan, study: Study) -> None:
        """Remove trials that were begun after the study was copied last: their numbers will be given to others.

        Raises:
            RunError: The study lies elsewhere, and should know them.
        """
        known = {trial_name(trial.number) for trial in trials_of(study) if CONFIG in trial.user_attrs}
        self.system.invalidate_cache()
        names = [A_TRIAL.fullmatch(Path(path).name) for path in _listed(self.system, self.place)]
        unknown = [name[0] for name in names if name and name[1] not in known]
        if unknown and plan.options.tune.storage:
            raise RunError(
                f"{plan.remote} has trials that the study in {plan.options.tune.storage} does not know: "
                f"{', '.join(unknown[:5])}. Another --output_dir begins a new search."
            )
        for name in unknown:
            mirror.remove(self.system, f"{self.place}/{TRIALS_DIR}/{name}")

    def gather(self, plan: Plan, study: Study) -> None:
        """Bring the trials' small files here, and the best one's checkpoint, for the answer and the report."""
        best = [trial.number for trial in ranking(study)[:1]]

        def fetch(number: int) -> None:
            name = trial_name(number)
            links = ranked_links(plan.options.tune.metrics) if number in best else ()
            place, here = trial_place(self.address, name), trial_dir(plan.output_dir, name)
            pull_result = partial(mirror.pull_result, place, here, links)
            patiently(pull_result, place, self.tell, doing="read", passing=storage_may_return, stop=self.stop)

        if not self.failure:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(fetch, (trial.number for trial in trials_of(study))))

    def _kept(self) -> str:
        return f"What is there stays; the search's own files are in {self.here}. --resume=true goes on."

    def _send(self) -> None:
        self.lock.check()
        self._send_study()
        apart = (".", STUDY_FILE, SUMMARY_FILE)  # and SQLite's own files beside the study
        files = [path for path in self.here.iterdir() if not path.name.startswith(apart)]
        for path in (*files, *(self.here / SPACES_DIR).iterdir()):
            self._send_file(str(path.relative_to(self.here)), path)
        self._send_best()
        for name in (SESSION, SUMMARY_FILE):  # the summary last: it tells of the others
            self._send_file(name, self.here / name)
        for name in self.hopeless - self.dropped:
            mirror.remove(self.system, f"{self.place}/{TRIALS_DIR}/{name}/{mirror.CHECKPOINTS}")
            self.dropped.add(name)

    def _send_study(self) -> None:
        """Send the SQLite file as it was between two transactions."""
        study, copy = self.here / STUDY_FILE, self.here / f".{STUDY_FILE}.copy"
        if not study.is_file():
            return
        changed = study.stat().st_mtime_ns
        if self.sent.get(STUDY_FILE) != changed:
            with (
                contextlib.closing(sqlite3.connect(study, timeout=BUSY_S)) as source,
                contextlib.closing(sqlite3.connect(copy)) as target,
            ):
                source.backup(target)
            self.system.put_file(str(copy), f"{self.place}/{STUDY_FILE}")
            self.sent[STUDY_FILE] = changed

    def _send_best(self) -> None:
        best = self.here / BEST_DIR
        files = {str(path.relative_to(self.here)): path for path in best.rglob("*") if path.is_file()}
        before = dict(self.sent)
        for name, path in files.items():
            self._send_file(name, path, grows=False)
        if files and self.sent != before:
            self.system.invalidate_cache()
            there = self.system.find(f"{self.place}/{BEST_DIR}")
            for path in there:
                if path.removeprefix(f"{self.place}/") not in files:
                    self.system.rm_file(path)
