"""The part-sorting task: environment, expert, recorded data set, and what LeRobot makes of them."""

import logging
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from lerobot.datasets import LeRobotDataset
from lerobot.envs import close_envs, make_env, make_env_config, preprocess_observation

from ray_jobs.part_sorting import ENV_ID
from ray_jobs.part_sorting import record as record_module
from ray_jobs.part_sorting.env import MAX_SPEED, TASK, PartSortingEnv
from ray_jobs.part_sorting.expert import demonstrate
from ray_jobs.part_sorting.record import record


def test_seed_determines_the_episode():
    def episode(seed):
        return list(demonstrate(PartSortingEnv(image_size=32), seed))

    first, again, other = episode(3), episode(3), episode(4)
    assert len(first) == len(again)
    for (observation, action), (observation_again, action_again) in zip(first, again, strict=True):
        np.testing.assert_array_equal(observation["pixels"]["top"], observation_again["pixels"]["top"])
        np.testing.assert_array_equal(observation["agent_pos"], observation_again["agent_pos"])
        np.testing.assert_array_equal(action, action_again)
    assert not np.array_equal(first[0][0]["pixels"]["top"], other[0][0]["pixels"]["top"])


@pytest.mark.parametrize("kwargs", [{}, {"n_cameras": 2, "n_parts": 3, "image_size": 64, "fps": 20}])
def test_gymnasium_env_checker(kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(ENV_ID, **kwargs).unwrapped, skip_render_check=False)


@pytest.mark.parametrize(
    "kwargs", [{"image_size": 31}, {"image_size": 65}, {"n_cameras": 3}, {"n_parts": 0}, {"fps": 4}]
)
def test_bad_parameters_are_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        PartSortingEnv(**kwargs)


def test_rules_of_the_table():
    env = PartSortingEnv(image_size=32, n_parts=1)
    env.reset(seed=0)
    start = env.gripper.copy()
    observation, *_ = env.step(np.array([1.0, -1.0, 1.0], np.float32))
    assert np.linalg.norm(env.gripper - start) == pytest.approx(MAX_SPEED / 10)
    assert observation["agent_pos"][2] == -1, "closed on nothing, so open again"

    env.gripper, env.colours, env.parts = np.array([-0.78, 0.0]), np.array([0]), np.array([[-0.78, 0.0]])
    *_, info = env.step(np.array([-0.78, 0.0, 1.0]))
    assert env.held == 0 and not info["is_success"], "a held part is not sorted yet"
    _, reward, terminated, truncated, info = env.step(np.array([-0.78, 0.0, -1.0]))
    assert reward == 1 and terminated and not truncated and info["is_success"]

    env.reset(seed=0)
    env.gripper, env.colours, env.parts = np.array([0.78, 0.0]), np.array([0]), np.array([[0.78, 0.0]])
    _, reward, terminated, _, info = env.step(np.array([0.78, 0.0, -1.0]))
    assert reward == 0 and not terminated and not info["is_success"], "a red part in the blue bin"
    with pytest.raises(ValueError, match="finite"):
        env.step(np.array([np.nan, 0.0, 0.0]))


def test_time_limit_truncates():
    env = gym.make(ENV_ID, image_size=32, max_episode_steps=5)
    env.reset(seed=0)
    outcomes = [env.step(np.zeros(3, np.float32))[2:4] for _ in range(5)]
    assert outcomes == [(False, False)] * 4 + [(False, True)]


def test_expert_always_succeeds():
    def lengths(seeds, **kwargs):
        env = PartSortingEnv(image_size=32, **kwargs)
        return [sum(1 for _ in demonstrate(env, seed)) for seed in seeds]  # raises without success

    usual = lengths(range(100))
    assert 30 < np.mean(usual) < 80 and max(usual) < 120
    for kwargs in ({"n_parts": 3}, {"fps": 5}, {"fps": 30}):
        lengths(range(10), **kwargs)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return record(tmp_path_factory.mktemp("recording") / "parts", 3, image_size=64, n_cameras=2, seed=5)


def test_recording_matches_the_episodes(recording):
    dataset = LeRobotDataset("local/part_sorting", root=recording, video_backend="pyav")
    assert (dataset.num_episodes, dataset.fps) == (3, 10)
    env = PartSortingEnv(image_size=64, n_cameras=2)
    start = 0
    for episode, seed in enumerate(np.random.default_rng(5).integers(2**31, size=3).tolist()):
        observations, actions = zip(*demonstrate(env, seed), strict=True)
        items = [dataset[start + index] for index in range(len(actions))]
        start += len(actions)
        assert {(int(item["episode_index"]), item["task"]) for item in items} == {(episode, TASK)}
        np.testing.assert_array_equal([item["action"].numpy() for item in items], actions)
        states = [observation["agent_pos"] for observation in observations]
        np.testing.assert_array_equal([item["observation.state"].numpy() for item in items], states)
        for camera in env.cameras:
            rendered = np.stack([observation["pixels"][camera] for observation in observations]) / 255.0
            decoded = np.stack([item[f"observation.images.{camera}"] for item in items]).transpose(0, 2, 3, 1)
            distances = np.abs(decoded[:, None] - rendered).mean(axis=(2, 3, 4))  # every pair of frames
            assert distances.diagonal().max() < 4 / 255, "more than codec loss"
            assert (distances.diagonal() <= distances.min(axis=1)).all(), "frames out of step"
    assert len(dataset) == start
    for key in ("action", "observation.state", "observation.images.top", "observation.images.wrist"):
        assert {"mean", "std", "q01", "q99"} <= dataset.meta.stats[key].keys()


def test_recording_is_silent_and_repeatable(recording, tmp_path, capfd, caplog):
    calls = []
    with caplog.at_level(logging.WARNING):
        again = record(
            tmp_path / "deep" / "parts",
            3,
            image_size=64,
            n_cameras=2,
            seed=5,
            progress=lambda *counts: calls.append(counts),
        )
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert calls == [(1, 3), (2, 3), (3, 3)]
    table = "data/chunk-000/file-000.parquet"
    assert (again / table).read_bytes() == (recording / table).read_bytes()


def test_recording_refuses_an_existing_folder(tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        record(tmp_path, 1)
    with pytest.raises(ValueError, match="episodes"):
        record(tmp_path / "parts", 0)


@pytest.mark.parametrize("where", ["between episodes", "within an episode"])
def test_interrupted_recording_leaves_nothing(where, tmp_path, monkeypatch, capfd):
    def stop(*_):
        raise KeyboardInterrupt

    def broken_demonstration(env, seed):
        for index, frame in enumerate(demonstrate(env, seed)):
            if index == 7:
                stop()
            yield frame

    if where == "within an episode":
        monkeypatch.setattr(record_module, "demonstrate", broken_demonstration)
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "parts", 3, image_size=64, progress=stop)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("use_async", [False, True])
def test_lerobot_makes_the_environment(use_async):
    config = make_env_config("part_sorting", image_size=64, n_cameras=2, episode_length=7)
    envs = make_env(config, n_envs=2, use_async_envs=use_async)
    env = envs["part_sorting"][0]
    try:
        observation, _ = env.reset(seed=[1000, 1001])
        batch = preprocess_observation(observation)
        assert {key: tuple(value.shape) for key, value in batch.items()} == {
            "observation.images.top": (2, 3, 64, 64),
            "observation.images.wrist": (2, 3, 64, 64),
            "observation.state": (2, 3),
        }
        assert env.call("task_description") == (TASK, TASK)
        assert env.call("_max_episode_steps") == (7, 7)
        assert env.unwrapped.metadata["render_fps"] == 10
        assert env.call("render")[0].shape == (256, 256, 3)
        for _ in range(7):
            *_, truncated, info = env.step(np.zeros((2, 3), np.float32))
        assert truncated.all() and info["final_info"]["is_success"].tolist() == [False, False]
    finally:
        close_envs(envs)
