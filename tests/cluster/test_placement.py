"""On which nodes workers come to lie. The GPUs are only Ray's idea of them: what is tested is where workers start."""

import threading

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.train.torch import TorchConfig, TorchTrainer

from ray_jobs.cli.resolve import resolve
from ray_jobs.cluster import resources
from ray_jobs.cluster.channel import open_channel
from ray_jobs.cluster.driver import make_trainer
from ray_jobs.config.errors import InputError
from support.commands import tiny_act

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with four GPUs each, and a head without."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(2):
            made.add_node(num_cpus=4, num_gpus=4)
        ray.init(made.address, log_to_driver=False, logging_level="CRITICAL")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@ray.remote
class Book:
    """Who is where; all stay until all are there."""

    def __init__(self):
        self.places: dict[tuple, str] = {}

    def write(self, run: str, rank: int, node: str) -> None:
        self.places[run, rank] = node

    def read(self) -> dict[tuple, str]:
        return self.places


def places_of(parts, folder, runs: int, count: int, *flags: str) -> list[list[str]]:
    """Start several runs at once, as a search does; the nodes of each one's workers, by rank."""
    book = Book.remote()
    line = open_channel()

    def stay(config: dict) -> None:
        import time

        import ray.train

        place = ray.get_runtime_context().get_node_id()
        ray.get(book.write.remote(config["run"], ray.train.get_context().get_world_rank(), place))
        while len(ray.get(book.read.remote())) < runs * count:
            time.sleep(0.1)

    threads = []
    for number in range(runs):
        more = (f"--ray.num_workers={count}", "--ray.gpus_per_worker=1", "--ray.cpus_per_worker=1", *flags)
        recipe = resolve(tiny_act(parts, folder / f"{len(flags)}-{number}", *more))
        each = resources.per_worker(count, 1, 1.0, None)
        ours = make_trainer(recipe, each, line, max_failures=0)
        trainer = TorchTrainer(
            stay,
            train_loop_config={"run": str(number)},
            torch_config=TorchConfig("gloo"),  # there is no NCCL without GPUs
            scaling_config=ours.scaling_config,
            run_config=ours.run_config,
        )
        threads.append(threading.Thread(target=trainer.fit))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    places = ray.get(book.read.remote())
    assert len(places) == runs * count, places
    return [[places[str(run), rank] for rank in range(count)] for run in range(runs)]


def test_a_trial_lies_on_one_node(cluster, parts, tmp_path):
    """Four trials at a time with two GPUs each fill two nodes: none is torn between them."""
    runs = places_of(parts, tmp_path, 4, 2)
    assert [len(set(run)) for run in runs] == [1, 1, 1, 1]
    assert len({run[0] for run in runs}) == 2


def test_spread(cluster, parts, tmp_path):
    """`--ray.placement=spread`: a worker on each node, where one would hold both."""
    (places,) = places_of(parts, tmp_path, 1, 2, "--ray.placement=spread")
    assert len(set(places)) == 2


def test_workers_that_train_together_need_whole_gpus(cluster):
    """NCCL refuses two ranks on one GPU, after a minute; those of a simulator may share one."""
    with pytest.raises(InputError, match="--ray.num_workers=2 with 0.5 GPUs each: NCCL takes a GPU once"):
        resources.per_worker(2, 1, 0.5, None)
    assert str(resources.per_worker(2, 1, 0.5, None, alone=True)) == "1 CPUs, 0.5 GPUs"
