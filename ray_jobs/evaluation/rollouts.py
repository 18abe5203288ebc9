"""Episodes in a simulator, shared by workers of a Ray cluster. Each worker loads the checkpoint itself."""

import contextlib
import pickle
from collections.abc import Callable, Iterator

import torch

from ray_jobs.config.errors import InputError, RunError, first_line
from ray_jobs.evaluation.start_rollouts import start_rollouts
from ray_jobs.evaluation.trained import Trained, load
from ray_jobs.training import parallel
from ray_jobs.training.simulator import Simulator, SimulatorOptions


def run(
    trained: Trained,
    options: SimulatorOptions,
    *,
    num_workers: int | None,
    plugins: list[str],
    videos: int,
    show: Callable[[list[dict]], None],
) -> list[dict]:
    """Run all episodes of `options`; returns them in the order of their seeds.

    Args:
        num_workers: How many workers; 0 runs all in this process, None uses what the cluster holds.
        plugins: Packages to import first, of `--*.discover_packages_path`.
        videos: Of how many episodes to keep a video: the first ones.
        show: Called with the episodes that are done, now and then.
    """
    batches = list(enumerate(options.batches))
    done: list[dict] = []
    arriving = (
        _in_this_process(trained, options, batches, videos)
        if num_workers == 0
        else _on_workers(trained, options, batches, num_workers, plugins, videos)
    )
    try:
        for episodes in arriving:
            done += episodes
            show(done)
    except (InputError, RunError):
        raise
    except Exception as error:
        raise RunError(f"the simulator failed: {type(error).__name__}: {first_line(error)}") from error
    return sorted(done, key=lambda episode: (episode["task"], episode["seed"]))


def _in_this_process(
    trained: Trained, options: SimulatorOptions, batches: list, videos: int
) -> Iterator[list[dict]]:
    policy, before, after = load(trained, env=options.env)
    accelerator = parallel.make_accelerator(trained.recipe.lerobot, trained.recipe.options.ray)
    simulator = Simulator(options)
    size = options.eval.batch_size
    with contextlib.closing(simulator), torch.no_grad(), accelerator.autocast():
        for number, batch in batches:
            yield list(simulator.run(policy, before, after, batch, videos=max(0, videos - number * size)))


def _on_workers(
    trained: Trained,
    options: SimulatorOptions,
    batches: list,
    num_workers: int | None,
    plugins: list[str],
    videos: int,
) -> Iterator[list[dict]]:
    # Not where Ray starts: two threads that import its parts trip each other.
    import ray

    from ray_jobs.cluster import resources

    asked = trained.recipe.options.ray
    total = int(ray.cluster_resources().get("CPU", 1))
    workers = min(num_workers or total, len(batches))
    cpus = asked.cpus_per_worker or (1 if total >= workers else None)
    gpus = asked.gpus_per_worker
    if gpus is None and (trained.recipe.device or "cuda").startswith("cuda"):
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0) / workers)  # several share one
    each = resources.per_worker(workers, cpus, gpus or 0.0, trained.recipe.device, alone=True)
    task = ray.remote(
        num_cpus=each.cpus, num_gpus=each.gpus, num_returns="streaming", runtime_env={"env_vars": each.env}
    )(start_rollouts)
    # As bytes: what is in them needs the plugins.
    work = pickle.dumps((trained, options))
    running = [task.remote(work, plugins, batches[n::workers], videos) for n in range(workers)]
    while running:
        ready, _ = ray.wait(running, num_returns=1)
        try:
            yield ray.get(next(ready[0]))  # type: ignore[arg-type]  # a generator, as num_returns="streaming" makes it
        except StopIteration:
            running.remove(ready[0])
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            raise RunError(
                f"a worker of the simulator failed: {type(cause).__name__}: {first_line(cause)}"
            ) from error


def run_batches(work: bytes, batches: list, videos: int) -> Iterator[list[dict]]:
    """A worker's part of the episodes.

    Args:
        work: The pickled policy and options.
    """
    trained, options = pickle.loads(work)
    if trained.fetch:
        trained.fetch()
    yield from _in_this_process(trained, options, batches, videos)
