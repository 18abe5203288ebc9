"""Where a search's study lies: an SQLite file, another database, or Optuna's journal; and that it may be away, or gone."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import URL, make_url
from sqlalchemy.exc import OperationalError

from ray_jobs.config.errors import InputError, StorageLost
from ray_jobs.search.files import STUDY_FILE
from ray_jobs.search.plan import Plan
from ray_jobs.storage.retry import patiently

JOURNAL = "journal://"
# How long SQLite itself waits for others, a dashboard say, who hold the file: not heard by who asks it to stop.
BUSY_S = 5


def address_of(plan: Plan) -> str:
    """The address of a search's study, for Optuna."""
    own = URL.create("sqlite", database=str(plan.output_dir / STUDY_FILE))  # whatever the folder is called
    return plan.options.tune.storage or own.render_as_string()


class StudyFile:
    """The file that a study lies in, if it is one; somebody may remove it while the search goes on."""

    def __init__(self, address: str):
        self.path: Path | None = None
        self.size = 0
        if address.startswith(JOURNAL):
            self.path = Path(address.removeprefix(JOURNAL))
        elif address.startswith("sqlite") and (database := make_url(address).database):
            self.path = Path(database)
        self.is_gone()  # how large it is

    def is_gone(self) -> bool:
        """Whether it is not there any more, or holds less than it did: SQLite makes an empty one of a file that it misses."""
        try:
            size = self.path.stat().st_size if self.path else 0
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # a mount that is away
            return False
        is_less, self.size = size < self.size, max(size, self.size)
        return is_less

    def loss(self) -> StorageLost:
        """What to say of one that is gone."""
        assert self.path is not None
        if not self.path.parent.is_dir():
            return StorageLost(f"the folder {self.path.parent} is gone, and the study with it.")
        return StorageLost(
            f"{self.path} is gone, or was emptied. What the trials have found stays in their folders, from which "
            "--resume=true makes the study again."
        )


def open_storage(address: str) -> BaseStorage:
    """Raises whatever Optuna, SQLAlchemy or a driver of its has to say."""
    if address.startswith(JOURNAL):
        return JournalStorage(JournalFileBackend(address.removeprefix(JOURNAL)))
    if address.startswith("sqlite"):
        if "?" in address and not make_url(address).query:
            raise InputError("a ? that is part of a name must be written %3F, a % as %25")
        return PatientStorage(address, engine_kwargs={"connect_args": {"timeout": BUSY_S}})
    return PatientStorage(
        address, engine_kwargs={"pool_pre_ping": True}
    )  # else a connection lost overnight stays lost


class PatientStorage(RDBStorage):
    """Optuna's database, whose disk or server may be away for a while (see `retry`), once it has been opened. Each of its
    methods is one transaction, which can be tried again."""

    patient = False
    stop: Callable[[], object] = staticmethod(lambda: False)
    """Whether the search was asked to stop, which ends patience."""
    file: StudyFile | None = None
    lost: StorageLost | None = None
    """Why it was given up: what is asked of it from then on fails at once, where SQLite would wait BUSY_S each time."""

    def be_patient(self, stop: Callable[[], object]) -> None:
        """From now on."""
        self.patient, self.stop, self.file = True, stop, StudyFile(self.url)

    def may_return(self, error: Exception) -> bool:
        return self.patient and isinstance(error, OperationalError) and "disk is full" not in str(error)


def _patient(method: Callable) -> Callable:
    kept = "What is in it stays; --resume=true goes on."

    @functools.wraps(method)
    def patient(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        if self.lost:
            raise self.lost

        def use() -> Any:
            try:
                return method(self, *args, **kwargs)
            except (StorageInternalError, OperationalError) as error:
                if self.patient and self.file and self.file.is_gone():
                    raise self.file.loss() from error
                self.engine.dispose()  # what is open may be a file that was replaced, or a server that has gone
                raise (error.__cause__ or error) from error  # it says what is wrong

        how: dict[str, Any] = {"passing": self.may_return, "kept": lambda: kept, "stop": self.stop}
        try:
            return patiently(use, "the study", print, doing="used", **how)
        except StorageLost as lost:
            self.lost = lost
            raise

    return patient


# And what Optuna (5.0) itself calls on a database beside a storage's public methods.
PRIVATE = {"_create_new_trial", "_get_best_trial_id", "_get_trials", "_set_trial_param"}
for _name in BaseStorage.__abstractmethods__ | PRIVATE:
    setattr(PatientStorage, _name, _patient(getattr(RDBStorage, _name)))
