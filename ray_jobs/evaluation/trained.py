"""A trained policy as it lies on disk, opened again and scored the way its training scored it."""

import contextlib
import io
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import draccus
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.train import TRAIN_CONFIG_NAME, TrainPipelineConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.envs import EnvConfig
from lerobot.policies import PreTrainedPolicy, make_policy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import TRAINING_STATE_DIR, TRAINING_STEP

from ray_jobs.checks import preflight
from ray_jobs.checks.dataset import check_episodes, check_files, check_resize, open_dataset, with_episodes
from ray_jobs.cli.command_line import asked_device, parse_options, split_flags
from ray_jobs.cli.flags import as_arguments
from ray_jobs.cli.parse_errors import parse
from ray_jobs.config.errors import InputError, RunError
from ray_jobs.config.options import ASKED, OPTIONS_FILE
from ray_jobs.config.recipe import Recipe
from ray_jobs.data import quantiles
from ray_jobs.data.dataset import make_datasets
from ray_jobs.data.dataset_cache import once, own_metadata
from ray_jobs.data.frame_cache import open_frames
from ray_jobs.data.frames import set_frame_size
from ray_jobs.data.reader import FrameReader
from ray_jobs.evaluation.pictures import Replay, joint_names, replay
from ray_jobs.policies import assets, kernels
from ray_jobs.policies.build import check_loaded, loading, make_processors
from ray_jobs.storage import bucket
from ray_jobs.storage.records import METRIC, Damaged, read_json, read_metrics, read_summary
from ray_jobs.training import parallel
from ray_jobs.training.validation import Validation, chunk_length

PREDICTIONS = 50  # that are timed
OF_THE_DATA = (
    "dataset.",
    "rename_map",
    "max_eval_samples",
    "tolerance_s",
    "num_workers",
)  # LeRobot's flags that count


@dataclass
class Trained:
    """A checkpoint with the recipe that it was trained by. `step` and `threads` (of torch, on a CPU) are None where
    nothing tells them."""

    name: str
    folder: Path
    recipe: Recipe
    step: int | None
    threads: int | None
    fetch: Callable[[], Path] | None = None
    """Brings it to a node, under the same path, if it lies in a bucket."""

    @property
    def run_dir(self) -> Path:
        """The run's folder, if the checkpoint still lies in one."""
        return self.folder.parent.parent.parent


def open_trained(name: str, folder: Path, flags: dict[str, str]) -> Trained:
    """Read a checkpoint's configs. Which episodes are held out, over how many actions they are compared, and so on, is
    what its training said, unless `flags` say otherwise.

    Args:
        name: What it is called in tables.
        folder: Its `pretrained_model` folder.
        flags: As typed, by name.

    Raises:
        InputError: A config is damaged, or a flag will not do.
    """
    ours, theirs = split_flags(flags)
    theirs = {name: value for name, value in theirs.items() if name.startswith(OF_THE_DATA)}
    train_config = folder / TRAIN_CONFIG_NAME
    saved_options = next(
        (path for place in reversed(folder.parents[1:3]) if (path := place / OPTIONS_FILE).is_file()),
        None,
    )
    try:
        saved = read_json(saved_options) if saved_options else {}
        before = read_json(train_config, dataset=dict) if train_config.is_file() else None
        policy = PreTrainedConfig.from_pretrained(folder)
    except Exception as error:
        raise InputError(f"--checkpoint={name}: its configs cannot be read: {error}") from None
    if saved_options and not all(isinstance(group, dict) for group in saved.values()):
        raise Damaged(saved_options, "it has no groups of options")
    threads = saved.pop(ASKED, {}).get("threads")
    saved.pop("ray", None)  # what its training reserved
    if before is None and "dataset.repo_id" not in flags:
        theirs = {**theirs, "dataset.repo_id": ""}
    file = train_config if before else None
    with draccus.config_type("json"):
        cfg = parse(lambda: draccus.parse(TrainPipelineConfig, file, args=as_arguments(theirs)), flags)
    options = parse_options(ours, saved)
    options.assets.dir = options.assets.dir.absolute()
    options.ray.parallelism = "ddp"  # one process holds it all, however it was trained
    if "data.eval_episodes" in flags:
        cfg.dataset.eval_split = 0.0
    if before and before["dataset"].get("repo_id") != cfg.dataset.repo_id:
        # Data that it was not trained on: all of its episodes are held out.
        options.data.eval_episodes = None if "data.eval_episodes" not in flags else options.data.eval_episodes
        cfg.dataset.eval_split = 0.0
        cfg.dataset.episodes = None
        for place in ("root", "revision"):  # where the old data lies
            if f"dataset.{place}" not in flags:
                setattr(cfg.dataset, place, None)
    cfg.policy, cfg.resume = policy, True  # processors stay as they were saved
    policy.pretrained_path = folder
    counter = folder.parent / TRAINING_STATE_DIR / TRAINING_STEP
    step = read_json(counter, step=int)["step"] if counter.is_file() else None
    return Trained(name, folder, Recipe(cfg, options, asked_device(flags)), step, threads)


def use_device(trained: Trained) -> torch.device:
    """The device that was asked for, else this process's GPU if it has one; the config then names it."""
    device = torch.device(trained.recipe.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    trained.recipe.lerobot.policy.device = device.type
    return device


def load(
    trained: Trained, *, meta: LeRobotDatasetMetadata | None = None, env: EnvConfig | None = None
) -> tuple[PreTrainedPolicy, PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """The policy with its weights, its preprocessor and its postprocessor.

    Args:
        meta, env: What it will act on, the data of one or the environment.

    Raises:
        RunError: The weights do not fit.
    """
    cfg, options = trained.recipe.lerobot, trained.recipe.options
    device = use_device(trained)
    cfg.policy.use_peft = cfg.policy.use_peft or cfg.peft is not None
    with assets.mounted(options.assets.dir, cfg.policy, weights=True):
        with loading(cfg.policy), contextlib.redirect_stdout(io.StringIO()) as printed:
            policy = make_policy(cfg.policy, ds_meta=meta, env_cfg=env, rename_map=cfg.rename_map)
        check_loaded(trained.folder, printed.getvalue())
        processors = make_processors(cfg, policy, meta and meta.stats, device)
    kernels.speed_up(policy)  # as in the training
    policy.eval()
    return policy, *processors


def score(
    trained: Trained, *, predictions: int = PREDICTIONS, say: Callable[[str], None]
) -> tuple[dict, Replay]:
    """Score a checkpoint on its held-out episodes.

    Args:
        predictions: How many are timed, at the batch size of 1 that a robot has; 0 times none.
        say: Takes notices.

    Returns:
        The values, and a replay of the first held-out episode.

    Raises:
        InputError: There are no held-out episodes, the data set is not there, or it is another robot's.
        RunError: The policy predicts NaN.
    """
    recipe = trained.recipe
    cfg, options, dataset_cfg = recipe.lerobot, recipe.options, recipe.lerobot.dataset
    if bucket.is_uri(dataset_cfg.root):
        dataset_cfg.root = str(bucket.fetch_whole(dataset_cfg.root))
    meta = own_metadata(once(dataset_cfg, "metadata", lambda: open_dataset(dataset_cfg)))
    if options.data.eval_episodes is None and not dataset_cfg.eval_split:
        if not _of_other_data(trained):
            raise InputError(
                f"--checkpoint={trained.name}: it was trained without held-out episodes, so there are none to score it on. "
                "--data.eval_episodes='[0,1]' names some (the policy knows those it was trained on)."
            )
        options.data.eval_episodes = list(range(meta.total_episodes))
    held_out = options.data.eval_episodes
    if held_out is not None:
        recipe = replace(recipe, eval_steps=1)
        known = dataset_cfg.episodes if dataset_cfg.episodes is not None else range(meta.total_episodes)
        dataset_cfg.episodes = None
        check_episodes("data.eval_episodes", held_out, meta.total_episodes)
        if len(held_out) < meta.total_episodes:
            with_episodes(recipe, meta)  # raises
        if not _of_other_data(trained) and (seen := sorted(set(held_out) & set(known))):
            say(
                f"{trained.name}: it was trained on episodes {seen}; how well it does elsewhere, they do not tell."
            )
        dataset_cfg.episodes = held_out[:1]  # the training episodes are of no interest here
    check_files(dataset_cfg, meta, held_out)
    check_resize(options.data.resize, meta, cfg.rename_map)
    set_frame_size(meta, options.data.resize)
    preflight.check_features(recipe, meta)

    _, eval_dataset = make_datasets(cfg, held_out, options.data.resize)
    assert eval_dataset is not None  # some episodes are held out
    quantiles.complete(cfg.policy, eval_dataset.meta)
    policy, before, after = load(trained, meta=eval_dataset.meta)
    accelerator = parallel.make_accelerator(cfg, options.ray)
    frames = None
    if FrameReader.can_read(eval_dataset):
        frames = open_frames(
            eval_dataset, options.data, reads=cfg.max_eval_samples or eval_dataset.num_frames
        )
    validation = Validation.of(cfg, options.data, eval_dataset, frames, detailed=True)
    with _threads(trained.threads if accelerator.device.type == "cpu" else None):
        values = validation(policy, before, after, accelerator)
    if not math.isfinite(values[METRIC]):
        raise RunError(f"--checkpoint={trained.name}: what it predicts are no finite numbers.")
    raw, grown = values.pop("val/action_error_raw"), values.pop("val/action_error_over_horizon")
    with torch.no_grad(), accelerator.autocast():
        times = validation.inference_ms(policy, before, after, accelerator.device, predictions)
        drawn = replay(validation, policy, before, after, accelerator.device)
    moving, std = validation.moving.tolist(), validation.std.tolist()
    return {
        "checkpoint": str(trained.folder),
        "policy": cfg.policy.type,
        "step": trained.step,
        "dataset": dataset_cfg.repo_id,
        "episodes": validation.episodes,
        "frames": sum(len(rows) for _, rows in validation.groups),
        "horizon": validation.horizon,
        **values,
        "reported": _reported(trained),
        "over_horizon": grown,
        "joints": [
            {"joint": name, "error": error, "std": s, "error_in_std": error / s if moves else None}
            for name, error, s, moves in zip(joint_names(eval_dataset.meta), raw, std, moving, strict=True)
        ],
        **_timing(times, cfg.policy, eval_dataset.meta.fps),
    }, drawn


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Within, torch has as many threads as the training had: the last digits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _of_other_data(trained: Trained) -> bool:
    """Whether the data set is another one than the checkpoint was trained on, as far as its name tells."""
    file = trained.folder / TRAIN_CONFIG_NAME
    if not file.is_file():
        return True
    return read_json(file, dataset=dict)["dataset"].get("repo_id") != trained.recipe.lerobot.dataset.repo_id


def _reported(trained: Trained) -> float | None:
    """What the training said about this checkpoint, if it still lies in its run's or its search's folder."""
    if _of_other_data(trained):
        return None
    if trained.folder.parents[1].name == "best" and (summary := read_summary(trained.run_dir)):
        return ((summary["best"] or {}).get("values") or {}).get(METRIC)
    records = [r for r in read_metrics(trained.run_dir) if r["step"] == trained.step]
    return next((r[METRIC] for r in records if METRIC in r), None)


def _timing(times: list[float], policy: PreTrainedConfig, fps: int) -> dict:
    """Milliseconds of a prediction; the real-time factor is how much motion one of them gives, over the time it takes."""
    if not times:
        return {}
    executed = getattr(policy, "n_action_steps", None) or chunk_length(policy)
    median, p95 = (
        statistics.median(times),
        statistics.quantiles(times, n=20)[-1] if len(times) > 1 else times[0],
    )
    return {
        "inference_ms": {"p50": median, "p95": p95, "predictions": len(times), "batch_size": 1},
        "actions_per_prediction": executed,
        "fps": fps,
        "real_time_factor": 1000 * executed / fps / median,
    }
