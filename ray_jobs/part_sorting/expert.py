"""A scripted expert for part sorting, as varied as a person's demonstrations but sure to finish."""

from collections.abc import Iterator

import numpy as np

from ray_jobs.part_sorting.env import BIN_CENTRES, PartSortingEnv

_ARRIVED = 0.05  # distance to the goal, in table units, at which the gripper closes or opens


class Expert:
    """Reads the true state of `env`; its habits (speed, arc, order of parts) are drawn once from `seed`.

    Each action depends on what the cameras show and hardly on the past, so that a policy without memory can
    imitate it: hesitations last one step, and the nearest part usually comes first.
    """

    def __init__(self, env: PartSortingEnv, seed: int):
        self.env = env
        self.rng = np.random.default_rng([seed, 1])  # unlike the stream that places the parts
        self.speed = self.rng.uniform(0.7, 1.0) * env.max_step
        self.arc = self.rng.uniform(-0.6, 0.6)  # how far, in radians, a long approach swings out
        self.any_order = self.rng.random() < 0.1
        self.target: int | None = None

    def act(self) -> np.ndarray:
        """The next action, (3,) float32: target x, y and the gripper command."""
        env = self.env
        holding = env.held is not None
        if holding:
            self.target = None
            goal = BIN_CENTRES[env.colours[env.held]].copy()
            goal[1] = np.clip(env.gripper[1], -0.4, 0.4)
        else:
            if self.target is None:
                self.target = self._choose_part()
            goal = env.parts[self.target]
        to_goal = goal - env.gripper
        distance = float(np.linalg.norm(to_goal))
        if distance < _ARRIVED:
            return np.array([*goal, -1.0 if holding else 1.0], np.float32)
        # Slow down before the goal, and let the arc fade there: the step always ends nearer than it began.
        length = min(self.speed, 0.6 * distance + 0.01) * (self.rng.random() > 0.04)
        turn = self.arc * min(1.0, distance)
        cos, sin = np.cos(turn), np.sin(turn)
        step = np.array([[cos, -sin], [sin, cos]]) @ to_goal * (length / distance)
        waypoint = env.gripper + step + self.rng.normal(0.0, 0.004, 2)
        return np.array([*np.clip(waypoint, -1, 1), 1.0 if holding else -1.0], np.float32)

    def _choose_part(self) -> int:
        todo = np.flatnonzero(~self.env.sorted())
        if self.any_order:
            return int(self.rng.choice(todo))
        return int(todo[np.linalg.norm(self.env.parts[todo] - self.env.gripper, axis=1).argmin()])


def demonstrate(env: PartSortingEnv, seed: int) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield each (observation, action) of the expert's episode for `seed`, up to success.

    RuntimeError if the episode runs out of steps first.
    """
    observation, _ = env.reset(seed=seed)
    expert = Expert(env, seed)
    for _ in range(env.episode_steps):
        action = expert.act()
        yield observation, action
        observation, _, success, _, _ = env.step(action)
        if success:
            return
    raise RuntimeError(f"the expert did not sort the parts of seed {seed} in {env.episode_steps} steps")
