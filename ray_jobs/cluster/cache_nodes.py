"""The frame cache filled ahead on every node of a cluster, at the same time. Imported once Ray is up."""

import ray
from ray.exceptions import RayError

from ray_jobs.cli.terminal import doing, quiet
from ray_jobs.cluster.channel import ChannelHandle, open_channel
from ray_jobs.cluster.faults import if_helper_dies, why
from ray_jobs.config.errors import InputError, RunError
from ray_jobs.config.events import Notice


def build_on_nodes(words: list[str]) -> None:
    """`cache_build.build_here` on each node; prints what they say.

    Raises:
        RunError: Some have failed; a line for each.
    """
    channel = open_channel()
    names = {}
    for node in ray.nodes():
        if node["Alive"]:
            name, here = node["NodeManagerAddress"], {"ray.io/node-id": node["NodeID"]}
            task = ray.remote(num_cpus=0, label_selector=here)(_build_on_node)
            names[task.remote(words, name, channel)] = name
    doing("the nodes import LeRobot")
    waiting = list(names)
    with if_helper_dies("this command's helper process", "What is decoded stays; the same command goes on."):
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.5)
            for event in ray.get(channel.hear.remote(0)):
                doing("")
                print(event.text, flush=True)
    failed = []
    for built, name in names.items():
        try:
            failed.append(ray.get(built))
        except RayError as error:
            failed.append(f"{name}: {why(error)}")
    if failed := [text for text in failed if text]:
        raise RunError("\n".join(failed))


def _build_on_node(words: list[str], name: str, channel: ChannelHandle) -> str | None:
    """Returns what went wrong."""
    quiet()
    from ray_jobs.cluster.cache_build import build_here  # LeRobot, whose noise is kept away by now

    try:
        build_here(words, lambda text: channel.tell.remote(Notice(f"{name}: {text}")))
    except (InputError, RunError) as error:
        return f"{name}: {error}"
    return None
