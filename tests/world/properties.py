"""What data sets of the world differ in, and a table of them.

A line is there because people have such data, or because hypothesis found it. What LeRobot makes of each is recorded
in `stock.json` (`python tests/world/stock.py` records it again); where it trains we train with the same losses, and
where it does not we refuse: `refused` is the pattern of what we say.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HEIGHT_WIDTH = ("height", "width", "channels")


@dataclass(frozen=True)
class Camera:
    codec: str = "h264"  # one of make.CODECS, or PNG or JPEG for pictures in the tables
    height: int = 32
    width: int = 48
    channels: int = 3
    names: tuple[str, ...] | None = HEIGHT_WIDTH
    says: tuple[int, ...] = ()  # what meta/info.json says its shape is, if it says something else
    begins_s: float = 0.0  # the time of the first frame

    @property
    def in_table(self) -> bool:
        return self.codec in ("PNG", "JPEG")


# dtype and shape by name: enough for an ACT without a camera, which trains in milliseconds.
NUMBERS = {
    "observation.state": ("float32", 3),
    "observation.environment_state": ("float32", 4),
    "action": ("float32", 3),
}


@dataclass(frozen=True)
class DataSet:
    version: str = "v3.0"
    lengths: tuple[int, ...] = (9, 14, 11)
    fps: float = 10
    jitter_s: float = 0.0
    tasks: int = 1
    per_file: int = 99  # episodes
    cameras: Mapping[str, Camera] = field(default_factory=dict)
    columns: Mapping[str, tuple] = field(default_factory=lambda: NUMBERS)
    values: tuple[tuple[str, int, Any], ...] = ()  # (column, row, value)
    stats: tuple[str, ...] = ()  # see make._statistics
    info: Mapping[str, Any] = field(default_factory=dict)  # of meta/info.json; "left out" leaves it out
    unnamed: tuple[str, ...] = ()  # columns that meta/info.json does not know
    tables_lack: tuple[str, ...] = ()
    episodes_lack: tuple[str, ...] = ()
    tasks_as_column: bool = False  # and not as the table's index
    spoilt: tuple[tuple[str, str], ...] = ()  # how (see make.SPOIL), which files
    folder: str = "set"
    recording: str = ""  # one that people made, instead of all of this
    link: str = ""
    beside: str = ""  # a folder with half of such a set
    flags: tuple[str, ...] = ()

    refused: str = ""
    """A pattern of what we say, if we do not train."""
    like: str = ""
    """Another line, which holds the same: its losses count where LeRobot cannot read this one."""
    fault: str = ""
    """A pattern of what `doctor` says would spoil a training that goes through."""
    warned: str = ""
    """A pattern of what `doctor` warns of."""
    unscored: str = ""
    """A pattern of why `evaluate` can't score what was trained on it."""
    slow: bool = False
    """Another line of the table covers it nearly: not in the quick part."""


def seen_by(**cameras: Camera) -> dict[str, Camera]:
    return {f"observation.images.{name}": camera for name, camera in cameras.items()}


def with_columns(**columns: tuple) -> dict[str, tuple]:
    """`a__b` stands for `a.b`."""
    return {**NUMBERS, **{name.replace("__", "."): column for name, column in columns.items()}}


ROBOT = {key: NUMBERS[key] for key in ("observation.state", "action")}
NEXT = {"next__reward": ("float32", 1), "next__done": ("bool", 1), "next__success": ("bool", 1)}
ONE = seen_by(top=Camera())
CONVERTS = r"v2.1 data set; this LeRobot reads v3.0.*convert_dataset_v21_to_v30"
POINTS = r"Git LFS pointer.*git lfs pull"


def filmed(**more) -> DataSet:
    """A robot with cameras, no environment state."""
    return DataSet(**{"columns": ROBOT, "cameras": ONE, **more})


TABLE: dict[str, DataSet] = {
    "plain": DataSet(),
    # ------------------------------------------------------------------ formats
    "v2.1": filmed(version="v2.1", refused=CONVERTS),
    "v2.1 without cameras": DataSet(version="v2.1", refused=CONVERTS),
    "v2.1 with pictures in its tables": filmed(
        version="v2.1", cameras=seen_by(top=Camera("PNG")), refused=CONVERTS
    ),
    "v2.0": filmed(version="v2.0", refused=r"v2.0 data set; this LeRobot reads v3.0"),
    "v1.6": DataSet(version="v1.6", refused=r"v1.6 data set; this LeRobot reads v3.0"),
    "v3.1": DataSet(version="v3.1"),
    "a version that is yet to come": DataSet(version="v4.0", refused=r"v4.0 data set"),
    "info.json of another program": DataSet(
        spoilt=(("another thing", "meta/info.json"),), refused="not a LeRobot data set"
    ),
    "fields that LeRobot does not know": DataSet(
        info={"total_videos": 3, "total_chunks": 1, "licence": "MIT"}
    ),
    "few fields": DataSet(
        info=dict.fromkeys(
            ("robot_type", "splits", "data_files_size_in_mb", "video_files_size_in_mb"), "left out"
        )
    ),
    "video_path though there are no videos": DataSet(info={"video_path": "videos/{video_key}/x.mp4"}),
    # ------------------------------------------------------------------ cameras
    "h264": filmed(),
    "h264 with B-frames": filmed(cameras=seen_by(top=Camera("h264 with B-frames"))),
    "h264 without subsampled colours": filmed(cameras=seen_by(top=Camera("h264 4:4:4")), slow=True),
    "av1": filmed(cameras=seen_by(top=Camera("av1", 64, 64))),
    "av1 of libaom": filmed(cameras=seen_by(top=Camera("av1 of libaom")), slow=True),
    "av1 of 10 bit": filmed(cameras=seen_by(top=Camera("av1 of 10 bit", 64, 64)), slow=True),
    "hevc": filmed(cameras=seen_by(top=Camera("hevc", 64, 64))),
    "mpeg4": filmed(cameras=seen_by(top=Camera("mpeg4"))),
    "vp9": filmed(cameras=seen_by(top=Camera("vp9")), slow=True),
    "pictures in the tables": filmed(cameras=seen_by(top=Camera("PNG"))),
    "JPEG in the tables": filmed(cameras=seen_by(top=Camera("JPEG"))),
    "grey pictures in the tables": filmed(cameras=seen_by(top=Camera("PNG", channels=1))),
    "pictures with an alpha channel": filmed(
        cameras=seen_by(top=Camera("PNG", channels=4)), refused=r"top has 4 channels; act takes 3"
    ),
    "two cameras of one size": filmed(cameras=seen_by(top=Camera(), wrist=Camera("mpeg4")), slow=True),
    "two cameras of two sizes": filmed(cameras=seen_by(top=Camera(), wrist=Camera("mpeg4", 48, 40))),
    "a video and pictures in the tables": filmed(cameras=seen_by(top=Camera(), wrist=Camera("PNG"))),
    "a camera and an environment state": filmed(columns=NUMBERS),
    "a camera and nothing else": filmed(
        columns={"action": ("float32", 3)}, refused=r"ACT cannot do without observation.state"
    ),
    "channels first, and named so": filmed(
        cameras=seen_by(top=Camera(names=("channels", "height", "width")))
    ),
    "channels last, called channel": filmed(
        cameras=seen_by(top=Camera(names=("height", "width", "channel"))), slow=True
    ),
    "names that are others": filmed(cameras=seen_by(top=Camera(names=("h", "w", "c"))), slow=True),
    "a camera without names": filmed(
        cameras=seen_by(top=Camera(names=None)), refused=r"top needs a shape and names of three axes"
    ),
    "a size that info.json has wrong": filmed(
        cameras=seen_by(top=Camera(says=(64, 96, 3))), fault="the video is 32x48, meta/info.json says 64x96"
    ),
    "pictures of a size that info.json has wrong": filmed(
        cameras=seen_by(top=Camera("PNG", says=(64, 96, 3)))
    ),
    "channels first, and named otherwise": filmed(
        cameras=seen_by(top=Camera(says=(3, 32, 48))), fault="the video is 32x48, meta/info.json says 3x32"
    ),
    "one camera of two sizes": filmed(
        per_file=1,
        cameras=seen_by(top=Camera()),
        spoilt=(("twice as large", "videos/*/*/file-001.mp4"),),
        refused="size|shape",
    ),
    "a camera named after nothing": filmed(
        cameras={"top": Camera()}, refused="no policy reads top: LeRobot goes by names"
    ),
    "observation.image": filmed(cameras={"observation.image": Camera()}, slow=True),
    "videos that begin later": filmed(cameras=seen_by(top=Camera(begins_s=0.5)), slow=True),
    "a file per episode": filmed(per_file=1),
    "two episodes per file": filmed(per_file=2, cameras=seen_by(top=Camera("h264 with B-frames"))),
    # ------------------------------------------------------------------ time
    "5 fps": filmed(fps=5),
    "60 fps": filmed(fps=60, slow=True),
    "29.97 fps": filmed(fps=29.97, slow=True),
    "50.0 fps": DataSet(fps=50.0),
    "jitter": DataSet(jitter_s=0.02, warned="off the grid of 10 fps"),
    "jitter of a camera": filmed(jitter_s=0.02, refused="tolerance"),
    "jitter that is tolerated": filmed(
        jitter_s=0.02, flags=("--tolerance_s=0.06",), warned="off the grid of 10 fps"
    ),
    # ------------------------------------------------------------------ numbers
    "float64": DataSet(columns={key: ("float64", n) for key, (_, n) in NUMBERS.items()}),
    "whole numbers": DataSet(
        columns={key: ("int64", n) for key, (_, n) in NUMBERS.items()},
        refused=r"environment_state holds int64, and act does not normalize it",
    ),
    "a state and an action of whole numbers": DataSet(
        columns=with_columns(observation__state=("int32", 3), action=("int64", 3))
    ),
    "a state of booleans with statistics": DataSet(
        columns=with_columns(observation__state=("bool", 3)), stats=("booleans",), refused="holds bool"
    ),
    "bytes": DataSet(columns=with_columns(observation__state=("uint8", 3))),
    "float16": DataSet(columns=with_columns(observation__state=("float16", 3))),
    "a state of booleans": DataSet(
        columns=with_columns(observation__state=("bool", 3)), refused=r"observation.state holds bool"
    ),
    "an action of booleans": DataSet(columns=with_columns(action=("bool", 3)), refused=r"action holds bool"),
    "an action of one dimension": DataSet(
        columns=with_columns(action=("float32", 1)), refused=r"action has one dimension"
    ),
    "a state of one dimension": DataSet(
        columns=with_columns(observation__state=("float32", 1)),
        refused=r"observation.state has one dimension",
    ),
    "an environment state of one dimension": DataSet(
        columns=with_columns(observation__environment_state=("float32", 1)),
        refused=r"observation.environment_state has one dimension",
    ),
    "a state of two axes": DataSet(
        columns=with_columns(observation__state=("float32", 2, 2)), refused=r"state has the shape \(2, 2\)"
    ),
    "environment state only": DataSet(
        columns={key: NUMBERS[key] for key in ("observation.environment_state", "action")},
        refused=r"ACT cannot do without observation.state",
    ),
    "a state only": DataSet(columns=ROBOT, refused="cannot train on this data set: .*image"),
    "no action": DataSet(columns={"observation.environment_state": ("float32", 4)}, refused="no 'action'"),
    "other names": DataSet(
        columns={"state": ("float32", 3), "actions": ("float32", 3)}, refused="no 'action'"
    ),
    "NaN": DataSet(
        values=tuple(("observation.state", row, float("nan")) for row in range(0, 34, 3)),
        refused="the loss is nan",
    ),
    "infinity": DataSet(values=(("action", 5, float("inf")),), refused="the loss is (nan|inf)"),
    "more states": DataSet(
        columns=with_columns(observation__velocity=("float32", 2), observation__effort=("float64", 3))
    ),
    "action.delta beside action": DataSet(columns=with_columns(action__delta=("float32", 3))),
    # ------------------------------------------------------------------ other columns
    "rewards": DataSet(columns=with_columns(**NEXT)),
    "subtasks": DataSet(columns=with_columns(subtask_index=("int64", 1), subtask=("string", 1))),
    "annotations": filmed(
        columns={**ROBOT, "annotation.human.validity": ("int64", 1), "annotation.note": ("string", 1)},
        slow=True,
    ),
    "a string among the observations": DataSet(
        columns=with_columns(observation__note=("string", 1)), refused=r"observation.note holds strings"
    ),
    "two axes beside": DataSet(columns=with_columns(contacts=("float32", 2, 2))),
    "odd names": DataSet(
        columns={
            **NUMBERS,
            "größe [mm]": ("float32", 1),
            "a b#c?d=e": ("int64", 1),
            "observation.état": ("float32", 2),
        }
    ),
    "a slash in a name": DataSet(
        columns={**NUMBERS, "observation/extra": ("float32", 2)},
        flags=("--save_checkpoint=true",),
        refused="observation/extra has a '/' in its name",
    ),
    "a camera of an odd name": filmed(
        cameras={"observation.images.Überkopf cam-1 [#2]": Camera()}, slow=True
    ),
    "columns that info.json does not know": DataSet(
        columns=with_columns(secret=("float32", 2)),
        unnamed=("secret",),
        refused=r"has a column secret, which meta/info.json does not know",
    ),
    "a column that is missing": DataSet(
        columns=with_columns(promised=("float32", 2)),
        tables_lack=("promised",),
        refused=r"has no column promised, which",
    ),
    "no frame_index": DataSet(tables_lack=("frame_index",), refused=r"has no column frame_index, which"),
    "no index, nor said to": DataSet(tables_lack=("index",), unnamed=("index",), refused=r"no feature index"),
    "no next.done in the tables": DataSet(
        columns=with_columns(**NEXT), tables_lack=("next.done",), refused=r"has no column next.done, which"
    ),
    # ------------------------------------------------------------------ statistics
    "statistics with booleans": DataSet(columns=with_columns(**NEXT), stats=("booleans",)),
    "statistics with booleans of a camera's robot": filmed(
        columns={**ROBOT, "next.done": ("bool", 1)}, stats=("booleans", "no quantiles"), slow=True
    ),
    "statistics without quantiles": DataSet(stats=("no quantiles",)),
    "statistics of other data": DataSet(stats=("of other data",)),
    "statistics of another shape": DataSet(stats=("of another shape",), refused="action.*4 dimensions"),
    "statistics that are no lists": DataSet(stats=("plain numbers",)),
    "statistics with NaN": DataSet(stats=("NaN",), refused=r"action: std in meta/stats.json is NaN"),
    "statistics with null": DataSet(stats=("null",), refused=r"task_index has something else than numbers"),
    "statistics of strings": DataSet(
        columns=with_columns(note=("string", 1)),
        stats=("of strings",),
        refused=r"note has something else than numbers",
    ),
    "statistics of columns that are gone": DataSet(stats=("of columns that are gone",)),
    "no statistics": DataSet(stats=("none",), fault="stats.json is missing", unscored="stats"),
    "no statistics of the action": DataSet(
        stats=("not action",), fault="statistics of action", unscored="stats"
    ),
    "no statistics of the time": DataSet(stats=("not timestamp", "not index")),
    "no statistics of the camera": filmed(
        stats=("not observation.images.top",), refused="no statistics of observation.images.top"
    ),
    # ------------------------------------------------------------------ episodes and tasks
    "several tasks": DataSet(tasks=3),
    "tasks as a column": DataSet(
        tasks=2, tasks_as_column=True, warned="LeRobot takes 0 for the first one's text"
    ),
    "one episode": DataSet(lengths=(20,)),
    "one frame per episode": DataSet(lengths=(1, 1, 1, 1)),
    "one frame in all": DataSet(lengths=(1,)),
    "one frame of a camera": filmed(lengths=(1, 5, 1)),
    "some of the episodes": DataSet(flags=("--dataset.episodes=[0,2]",)),
    "some of the episodes of a camera": filmed(flags=("--dataset.episodes=[2]",), per_file=2),
    "some held out": DataSet(tasks=2, lengths=(9, 14, 11, 8), flags=("--dataset.eval_split=0.4",)),
    "metadata of episodes without tasks": DataSet(episodes_lack=("tasks",)),
    "metadata of episodes without places of videos": filmed(
        episodes_lack=("videos/observation.images.top/from_timestamp",),
        refused=r"no column videos/observation.images.top/from_timestamp",
    ),
    "more episodes than there are": DataSet(info={"total_episodes": 4}, refused="counts 4 episodes"),
    "fewer episodes than there are": DataSet(info={"total_episodes": 2}),
    "another number of frames": DataSet(info={"total_frames": 20}),
    "another number of frames of a camera": filmed(info={"total_frames": 20}, slow=True),
    "no tasks": DataSet(info={"total_tasks": 0}, refused=r"counts no tasks"),
    "rows in another order": DataSet(
        spoilt=(("in another order", "data/*/*.parquet"),), refused=r"not numbered 0, 1, 2"
    ),
    "fewer rows than frames": DataSet(
        spoilt=(("two rows fewer", "data/*/*.parquet"),), refused=r"has 32 rows, meta/episodes says 34"
    ),
    "rows numbered from 100": DataSet(
        spoilt=(("numbered from 100", "data/*/*.parquet"),), refused=r"not numbered 0, 1, 2"
    ),
    "episodes numbered from 5": DataSet(
        spoilt=(("episodes from 5", "data/*/*.parquet"),),
        refused=r"has the rows of episodes 5 to 7, meta/episodes says 0 to 2",
    ),
    "a task that nobody knows": DataSet(
        spoilt=(("a task too many", "data/*/*.parquet"),), refused=r"rows of task 7, meta/tasks has 1"
    ),
    # ------------------------------------------------------------------ damage
    **{
        f"{what}: {name}": filmed(per_file=2, spoilt=((what, file),), refused=refused)
        for what, refused in {
            "an LFS pointer": POINTS,
            "gone": "missing|no meta/info.json",
            "empty": "damaged|empty",
            "cut short": "damaged|cut short|cannot read|no frame",
        }.items()
        for name, file in {
            "info": "meta/info.json",
            "statistics": "meta/stats.json",
            "tasks": "meta/tasks.parquet",
            "episodes": "meta/episodes/*/*.parquet",
            "a table": "data/*/file-001.parquet",
            "a video": "videos/*/*/file-001.mp4",
        }.items()
    },
    "v2.1 of LFS pointers": filmed(
        version="v2.1", spoilt=(("an LFS pointer", "data/*/*.parquet"),), refused=POINTS
    ),
    # ------------------------------------------------------------------ places
    **{
        f"in a folder called {folder}": DataSet(folder=folder, like="plain")
        for folder in (
            "my data",
            "state #2",
            "what?",
            "a=b",
            "Rüstung",
            "a*b",
            "50%20",
            "a,b",
            "{x}",
            "it's",
            "a: b",
        )
        + ("2026_11_30", "a'b\"c", "~", "deep/er/set")
    },
    **{
        f"in a folder called {folder}": DataSet(folder=folder, refused="Another name will do, or a link")
        for folder in ("g1 [v2]", "deep/er [1]/set", "a::b", "$HOME")
    },
    "in a folder whose name is a pattern for another": DataSet(
        folder="a*b", beside="a1b", refused="Another name will do, or a link"
    ),
    "in a folder whose name goes on behind another's": DataSet(folder="a #b", beside="a", like="plain"),
    "a camera in a folder of an odd name": filmed(folder="g1 {v2} #3 ü?", like="h264"),
    "a link": DataSet(folder="set", link="a link"),
    # ------------------------------------------------------------------ recordings that people made
    "PushT": DataSet(recording="pusht_lowdim"),
    "GR1": DataSet(recording="gr1_picknplace", slow=True),
    "G1": DataSet(recording="g1_yellow_bottle", slow=True),
    "G1 at 480p": DataSet(recording="g1_yellow_bottle_480p", slow=True),
    "CR5 on the grid": DataSet(recording="cr5_on_grid", slow=True),
    "CR5 with its jitter": DataSet(recording="cr5_jitter", slow=True, refused="tolerance", fault="."),
}
