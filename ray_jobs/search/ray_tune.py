"""Ray Tune's side of a search: what asks the study, through its interfaces `Searcher` and `TrialScheduler`.

Unlike Ray's own `OptunaSearch` (2.60), which tells Optuna that a stopped trial is COMPLETE, pruned trials are PRUNED with
their intermediate values and failed ones are FAIL. Stopping is decided by Optuna's pruners, whose only state is the study:
a search that was killed goes on with all it knew.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import ray
from optuna.samplers import RandomSampler
from optuna.study import Study
from optuna.trial import Trial, TrialState
from ray.tune import Callback
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ray_jobs.cluster.channel import ChannelHandle
from ray_jobs.cluster.faults import why
from ray_jobs.config.errors import INTERRUPTED
from ray_jobs.config.events import Ended, Event, Fault, Notice
from ray_jobs.search import ray_tune_internals
from ray_jobs.search.files import ENDED, trial_name
from ray_jobs.search.options import TuneOptions
from ray_jobs.search.spaces.space import SearchSpace, flags
from ray_jobs.search.study.study import (
    BASELINE,
    BEST_STEP,
    CONFIG,
    LOST,
    POLICY,
    REASON,
    REPEATS,
    REPEATS_COST,
    SKIPPED,
    STEPS,
    TIMES,
    WALL_S,
    finished,
    id_of,
    repeats_cost,
    repeats_of,
    trials_of,
)

TRIES = 50  # drawings until one is new and keeps the constraints; then the space is taken for exhausted
DEATHS = 3  # processes a trial may cost without getting further, and trials in a row that may do so


class StudySearch(Searcher):
    """Gives Ray Tune the next configuration, and the study its outcome.

    In this order: trials that an interrupted search left behind, new ones until there are `num_samples`, then
    the finalists with other seeds.

    Args:
        study: From `open_study`.
        seed: Of all trials; repeats use the numbers after it.
        tell: Called with an event dict (`kind`: `ended`, `notice`) for whoever watches.
    """

    def __init__(
        self,
        study: Study,
        space: SearchSpace,
        options: TuneOptions,
        seed: int,
        steps: int,
        tell: Callable[[Event], None],
    ):
        super().__init__()
        self.study, self.space, self.options = study, space, options
        self.seed, self.steps, self.tell = seed, steps, tell
        self.left_behind = [t for t in trials_of(study) if t.state == TrialState.RUNNING]
        self.live: dict[str, tuple[Trial, str | None]] = {}  # Tune's trial id -> (trial, seed of a repeat)
        self.stopping = False
        self.exhausted = False
        self.failed_repeats: set[tuple[int, str]] = set()
        self.deaths_in_a_row = 0
        self.given_up = False
        self.failure: Exception | None = None
        self.slot_was_dead: set[str] = set()  # Tune's ids of trials that could not begin
        self.dead_slots: Counter[int] = Counter()  # by trial number

    def __getstate__(self) -> dict:
        """Ray Tune writes everything down for `Tuner.restore`. Nothing of this is needed: the study knows more."""
        return {}

    @contextlib.contextmanager
    def _or_end(self) -> Iterator[None]:
        """Within, an error ends the search, which says so; Ray Tune would take it for the trial's, or hide it."""
        try:
            yield
        except Exception as error:
            self.failure, self.stopping = self.failure or error, True

    def suggest(self, trial_id: str) -> dict | str | None:  # type: ignore[override]  # Ray forgets its own FINISHED
        with self._or_end():
            return self._suggest(trial_id)
        return self.FINISHED  # type: ignore[unreachable]  # after an error, which `_or_end` keeps

    def _suggest(self, trial_id: str) -> dict | str | None:
        if self.stopping:
            return self.FINISHED
        if self.options.max_concurrent and len(self.live) >= self.options.max_concurrent:
            return None
        found = self._left_behind() or self._new()
        if found is not None:
            trial, repeat = found, None
        elif (again := self._repeat()) is not None:
            trial, repeat = again
        else:
            return None if self.live else self.FINISHED
        self.live[trial_id] = trial, repeat
        return {
            "trial": trial_name(trial.number, repeat),
            "flags": flags(trial.user_attrs[CONFIG]),
            "seed": int(repeat or self.seed),
            "repeat": bool(repeat),
        }

    def _left_behind(self) -> Trial | None:
        while self.left_behind:
            frozen = self.left_behind.pop(0)
            trial = Trial(self.study, id_of(frozen))
            if CONFIG in frozen.user_attrs or self._draw(trial):  # it may have been killed while it was drawn
                return trial
        return None

    def _new(self) -> Trial | None:
        if len(trials_of(self.study)) >= self.options.num_samples or self.exhausted:
            return None
        chosen = self.study.sampler
        try:
            for number in range(TRIES):
                if number == TRIES // 2:  # a model that has found its optimum draws it again and again
                    self.study.sampler = RandomSampler(seed=self.seed + len(trials_of(self.study)))
                trial = self.study.ask()
                if self._draw(trial):
                    return trial
        finally:
            self.study.sampler = chosen
        self.exhausted = True
        self.tell(Notice(f"{TRIES} drawings in a row were nothing new: the space is exhausted."))
        return None

    def _draw(self, trial: Trial) -> bool:
        """Draw a trial's configuration; False, with the trial skipped, if it is known or breaks a constraint."""
        space, config = self.space.suggest(trial)
        known = {
            json.dumps(t.user_attrs[CONFIG], sort_keys=True): t.number
            for t in trials_of(self.study)
            if CONFIG in t.user_attrs
        }
        twin = known.get(json.dumps(config, sort_keys=True))
        skipped = f"the same as trial {twin}" if twin is not None else space.violated(config)
        if skipped is None:
            trial.set_user_attr(POLICY, space.policy)
            trial.set_user_attr(CONFIG, config)
            return True
        trial.set_user_attr(SKIPPED, skipped)
        self.study.tell(trial, state=TrialState.FAIL)
        return False

    def _repeat(self) -> tuple[Trial, str] | None:
        """The next finalist and seed, once all trials have ended."""
        if any(repeat is None for _, repeat in self.live.values()):
            return None
        repeats = repeats_of(self.study)
        not_again = self.failed_repeats | {(trial.number, repeat) for trial, repeat in self.live.values()}
        done = finished(self.study)
        baseline = [t for t in done if BASELINE in t.user_attrs]  # what is gained over it is a mean, too
        finalists = {t.number: t for t in [*done[: self.options.finalists], *baseline]}
        for trial in finalists.values():
            for seed in map(str, range(self.seed + 1, self.seed + self.options.seeds)):
                if seed not in repeats.get(str(trial.number), {}) and (trial.number, seed) not in not_again:
                    return Trial(self.study, id_of(trial)), seed
        return None

    def judge(self, trial_id: str, result: dict) -> bool:
        """Note a validation; whether its trial is hopeless. The baselines are never given up: what is
        gained over them is said at the same number of steps."""
        with self._or_end():
            return self._judge(trial_id, result)
        return False  # type: ignore[unreachable]  # after an error, which `_or_end` keeps

    def _judge(self, trial_id: str, result: dict) -> bool:
        trial, repeat = self.live[trial_id]
        if repeat or "status" in result or len(self.options.metrics) > 1:
            return False
        if result["step"] in trial.storage.get_trial(id_of(trial)).intermediate_values:
            return False  # it has gone back to a checkpoint, or tells what the study may not know
        trial.report(result[self.options.metrics[0]], result["step"])
        # Asked for the baselines, too: Optuna's pruners remember only whom they were asked about.
        hopeless = trial.should_prune()
        return hopeless and result["step"] < self.steps and BASELINE not in trial.user_attrs

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if trial_id in self.live:
            with self._or_end():
                self._note_end(trial_id, result or {}, error)

    def _note_end(self, trial_id: str, result: dict, error: bool) -> None:
        trial, repeat = self.live.pop(trial_id)
        if trial_id in self.slot_was_dead and self.dead_slots[trial.number] < DEATHS:
            # Ray Tune gives such a trial up at once: a slot that died, with its node say, while no trial was in it.
            self.dead_slots[trial.number] += 1
            if not repeat:
                self.left_behind += [t for t in trials_of(self.study) if t.number == trial.number]
            return
        status = "failed" if error else result.get("status", INTERRUPTED)
        reason = result.get("reason", f"its process died {DEATHS} times" if error else None)
        self.deaths_in_a_row = self.deaths_in_a_row + 1 if error else 0
        self.given_up = self.given_up or self.deaths_in_a_row >= DEATHS
        self.stopping = self.stopping or self.given_up
        values: list[Any] = [result.get(name) for name in self.options.metrics]
        if status in ENDED and None in values:
            status, reason = "failed", f"it has no {self.options.metric}"
        ended = Ended(
            status, reason, values[0], result.get("step"), repeat, trial=trial_name(trial.number, repeat)
        )
        if status == INTERRUPTED:
            pass  # stays RUNNING, and is taken up again
        elif repeat:
            cost = repeats_cost(self.study)
            for name, spent in ((STEPS, result.get("trained")), (WALL_S, result.get("wall_s"))):
                cost[name] += spent or 0
            self.study.set_user_attr(REPEATS_COST, cost)
            if status in ENDED:
                repeats = repeats_of(self.study)
                repeats.setdefault(str(trial.number), {})[repeat] = values[0]
                self.study.set_user_attr(REPEATS, json.dumps(repeats))
            else:
                self.failed_repeats.add((trial.number, repeat))
        else:
            times = {k.removeprefix("times/"): v for k, v in result.items() if k.startswith("times/")}
            noted = {BEST_STEP: result.get("step"), STEPS: result.get("trained"), LOST: result.get("lost_steps"),
                     WALL_S: result.get("wall_s"), REASON: reason, TIMES: times}  # fmt: skip
            for name, value in noted.items():
                if value is not None:
                    trial.set_user_attr(name, value)
            if status == "failed":
                self.study.tell(trial, state=TrialState.FAIL)
            elif status == "pruned":
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                self.study.tell(trial, values)
        self.tell(ended)


class TrialFailureCallback(Callback):
    """Tells why a trial is about to go on in another process.

    Args:
        tell: Called with an event.
        channel: Handle of the search's `channel.Channel`.
    """

    def __init__(self, tell: Callable[[Event], None], channel: ChannelHandle):
        self.tell, self.channel = tell, channel

    def __getstate__(self) -> dict:
        return {}  # as in `StudySearch`

    def on_trial_recover(self, iteration: int, trials: list, trial: TuneTrial, **info: Any) -> None:
        name, text = trial.config["trial"], "its process has ended"
        with contextlib.suppress(Exception):
            text = why(ray_tune_internals.error_of(trial))
        self.channel.forget_heartbeat.remote(name)
        self.tell(Fault(text, trial=name))


class StudyScheduler(FIFOScheduler):
    """Tells the trials that the study takes for hopeless to end. They do so by themselves: those that Ray Tune stops
    are killed, by its defaults, two seconds later, and their W&B runs with them.

    Args:
        channel: Handle of the search's `channel.Channel`.
    """

    def __init__(self, search: StudySearch, channel: ChannelHandle):
        super().__init__()
        self.search, self.channel = search, channel
        self.reached: dict[str, int] = {}  # the last step of each trial

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        if trial.status == trial.PENDING:
            self.search.slot_was_dead.add(trial.trial_id)
        self.channel.forget_heartbeat.remote(trial.config["trial"])
        super().on_trial_error(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        trial = super().choose_trial_to_run(tune_controller)
        if trial and self.search.stopping:  # there may never be a slot for it again
            ray_tune_internals.drop(tune_controller, trial, {"status": INTERRUPTED})
            return None
        return trial

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict) -> str:
        if result.get("step", 0) > self.reached.get(trial.trial_id, 0):
            # What gets further between two deaths is not to blame: spot nodes may take many of its slots away.
            self.reached[trial.trial_id] = result["step"]
            ray_tune_internals.allow_failures(trial, DEATHS - 1)
        if self.search.judge(trial.trial_id, result):
            ray.get(self.channel.give_up.remote(trial.config["trial"]))
        return TrialScheduler.CONTINUE
