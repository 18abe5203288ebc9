"""Part sorting: a 2-D table seen from above, where a gripper carries coloured parts into their bins.

Lengths are in table units: the table spans [-1, 1] in x (right) and y (up). Needs only NumPy and Gymnasium.
"""

from typing import Any

import gymnasium as gym
import numpy as np

TASK = "sort the parts into their bins"
CAMERAS = ("top", "wrist")
STATE_NAMES = ["gripper_x", "gripper_y", "gripper_holding"]
ACTION_NAMES = ["target_x", "target_y", "target_closed"]
EPISODE_SECONDS = 15  # ample for three parts: the expert takes 3 s a part

MAX_SPEED = 0.8  # table units per second
GRASP_RADIUS = 0.2
PART_HALF = 0.12
BIN_CENTRES = np.array([[-0.78, 0.0], [0.78, 0.0]])  # by colour: red left, blue right
BIN_HALF = np.array([0.22, 0.6])
PART_AREA = np.array([[-0.35, -0.7], [0.35, 0.4]])  # parts start here, clear of the bins and the gripper
MIN_PART_GAP = 0.45  # between centres, so that a grasp is never ambiguous

_TABLE = (236, 232, 224)
_GRIPPER = (40, 40, 48)
_PART_COLOURS = ((214, 40, 40), (24, 90, 220))
_BIN_WALLS = ((150, 70, 70), (70, 90, 150))
_BIN_FLOORS = ((244, 200, 196), (196, 212, 246))

_Pair = np.ndarray | tuple[float, float]  # x and y


class PartSortingEnv(gym.Env):
    """One gripper, one to three parts, two bins.

    Observation: `pixels` {camera: (image_size, image_size, 3) uint8} and `agent_pos` (3,) float32, the
    gripper's x, y and -1 (open) or 1 (holding a part). Action: (3,) float32 in [-1, 1], the absolute target
    x, y, approached at no more than MAX_SPEED, and the gripper command, closed if above 0. A gripper that
    closes on nothing springs open, so that a missed grasp leads back to states the expert shows. Reward: the
    change in the fraction of parts that lie in their bins. Terminates once all do (`info["is_success"]`).
    """

    metadata: dict = {"render_modes": ["rgb_array"], "render_fps": 10}
    task = TASK
    task_description = TASK

    def __init__(
        self,
        image_size: int = 96,
        n_cameras: int = 1,
        n_parts: int | None = None,
        fps: int = 10,
        render_mode: str | None = "rgb_array",
    ):
        """`n_parts` None draws one or two parts per episode; `image_size` is in pixels, `fps` in steps/s."""
        if image_size < 32 or image_size % 2:
            raise ValueError(f"image_size must be an even number of at least 32 pixels, got {image_size}")
        if n_cameras not in (1, 2):
            raise ValueError(f"n_cameras must be 1 (top) or 2 (top and wrist), got {n_cameras}")
        if n_parts not in (None, 1, 2, 3):
            raise ValueError(f"n_parts must be 1, 2, 3 or None (one or two at random), got {n_parts}")
        if fps < 5:
            raise ValueError(f"fps must be at least 5 (below, a step overshoots a part), got {fps}")
        self.image_size, self.n_parts, self.render_mode = image_size, n_parts, render_mode
        self.cameras = CAMERAS[:n_cameras]
        self.max_step = MAX_SPEED / fps
        self.episode_steps = EPISODE_SECONDS * fps
        self.metadata = {**self.metadata, "render_fps": fps}
        image = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Dict({camera: image for camera in self.cameras}),
                "agent_pos": gym.spaces.Box(-1.0, 1.0, (3,), np.float32),
            }
        )
        self.action_space = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict[str, Any]]:
        super().reset(seed=seed)
        rng = self.np_random
        n_parts = self.n_parts or int(rng.integers(1, 3))
        self.colours = rng.integers(2, size=n_parts)  # 0 red, 1 blue
        low, high = PART_AREA
        self.parts = rng.uniform(low, high, size=(n_parts, 2))  # centres, (n_parts, 2)
        while _smallest_gap(self.parts) < MIN_PART_GAP:
            self.parts = rng.uniform(low, high, size=(n_parts, 2))
        self.gripper = rng.uniform([-0.2, 0.75], [0.2, 0.95])
        self.held: int | None = None  # index of the part in the gripper
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict[str, Any]]:
        action = np.asarray(action, np.float64)
        if not np.isfinite(action).all():
            raise ValueError(f"action must be finite, got {action}")
        sorted_before = self.sorted().mean()
        move = np.clip(action[:2], -1, 1) - self.gripper
        self.gripper = self.gripper + move * min(1.0, self.max_step / max(float(np.linalg.norm(move)), 1e-9))
        if action[2] <= 0:
            self.held = None
        elif self.held is None:
            distances = np.linalg.norm(self.parts - self.gripper, axis=1)
            self.held = int(distances.argmin()) if distances.min() <= GRASP_RADIUS else None
        if self.held is not None:
            self.parts[self.held] = self.gripper
        done = self.sorted()
        reward, success = float(done.mean() - sorted_before), bool(done.all())
        return self._observation(), reward, success, False, {"is_success": success}

    def sorted(self) -> np.ndarray:
        """(n_parts,) bool: which parts have been let go inside the bin of their colour."""
        inside = (np.abs(self.parts - BIN_CENTRES[self.colours]) <= BIN_HALF).all(axis=1)
        return inside & (np.arange(len(self.parts)) != self.held)

    def render(self) -> np.ndarray:
        """The table from above, (256, 256, 3) uint8, for videos."""
        return self._view("top", 256)

    def _observation(self) -> dict:
        state = np.array([*self.gripper, -1.0 if self.held is None else 1.0], np.float32)
        return {"pixels": {c: self._view(c, self.image_size) for c in self.cameras}, "agent_pos": state}

    def _view(self, camera: str, size: int) -> np.ndarray:
        middle, half_width = ((0.0, 0.0), 1.1) if camera == "top" else (self.gripper, 0.4)
        canvas = _Canvas(size, middle, half_width)
        for centre, wall, floor in zip(BIN_CENTRES, _BIN_WALLS, _BIN_FLOORS, strict=True):
            canvas.rectangle(centre, BIN_HALF, wall)
            canvas.rectangle(centre, BIN_HALF - 0.04, floor)
        for part, colour in zip(self.parts, self.colours, strict=True):
            canvas.rectangle(part, (PART_HALF, PART_HALF), _PART_COLOURS[colour])
        gap = PART_HALF + (0.085 if self.held is None else 0.025)
        for side in (-gap, gap):
            canvas.rectangle(self.gripper + (side, 0.0), (0.03, 0.1), _GRIPPER)
        canvas.rectangle(self.gripper + (0.0, 0.12), (gap + 0.03, 0.03), _GRIPPER)
        return canvas.image


class _Canvas:
    """A square image of the table around `middle`, painted with anti-aliased axis-aligned rectangles."""

    def __init__(self, size: int, middle: _Pair, half_width: float):
        self.image = np.full((size, size, 3), _TABLE, np.uint8)
        self.left, self.top = middle[0] - half_width, middle[1] + half_width
        self.pixels_per_unit = size / (2 * half_width)

    def rectangle(self, centre: _Pair, half: _Pair, colour: tuple[int, int, int]) -> None:
        columns, x = self._coverage(centre[0] - half[0] - self.left, 2 * half[0])
        rows, y = self._coverage(self.top - centre[1] - half[1], 2 * half[1])
        patch = self.image[rows, columns]
        patch[:] = np.rint(patch + np.multiply.outer(y, x)[..., None] * (np.array(colour) - patch))

    def _coverage(self, start: float, length: float) -> tuple[slice, np.ndarray]:
        """The pixels that an interval touches along one axis, and the fraction of each that it covers."""
        low, high = start * self.pixels_per_unit, (start + length) * self.pixels_per_unit
        first, last = np.clip([np.floor(low), np.ceil(high)], 0, len(self.image)).astype(int)
        pixels = np.arange(first, last)
        return slice(first, last), np.minimum(high, pixels + 1) - np.maximum(low, pixels)


def _smallest_gap(points: np.ndarray) -> float:
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    return float(distances[np.triu_indices(len(points), 1)].min(initial=np.inf))
