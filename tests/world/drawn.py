"""Data sets that hypothesis draws: combinations of the properties that nobody has thought of."""

from hypothesis import strategies as st
from properties import Camera, DataSet

DTYPES = ("float32", "float64", "int64", "uint8", "bool")
CODECS = ("h264", "h264 with B-frames", "mpeg4", "hevc", "PNG", "JPEG")
CAMERAS = (
    "observation.images.top",
    "observation.images.wrist",
    "observation.image",
    "observation.images.ü b",
)
EXTRAS = (
    "next.reward",
    "next.done",
    "subtask",
    "annotation.human",
    "observation.effort",
    "count",
    "action.raw",
)

cameras = st.builds(
    Camera,
    codec=st.sampled_from(CODECS),
    height=st.sampled_from((64, 48, 32)),
    width=st.sampled_from((64, 48, 80)),
    names=st.sampled_from(
        (("height", "width", "channels"), ("channels", "height", "width"), ("h", "w", "c"))
    ),
)
numbers = st.tuples(st.sampled_from(DTYPES[:3]), st.integers(1, 4))
others = st.tuples(st.sampled_from((*DTYPES, "string")), st.integers(1, 3)).map(
    lambda column: ("string", 1) if column[0] == "string" else column
)


@st.composite
def data_sets(draw) -> DataSet:
    columns = {"observation.state": draw(numbers), "action": draw(numbers)}
    seen = draw(st.dictionaries(st.sampled_from(CAMERAS), cameras, max_size=2))
    if not seen or draw(st.booleans()):
        columns["observation.environment_state"] = draw(numbers)
    columns |= draw(st.dictionaries(st.sampled_from(EXTRAS), others, max_size=3))
    lengths = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=5)))
    chosen = draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, max_size=len(lengths)))
    flags = [f"--dataset.episodes={sorted(chosen)}"] if chosen else []
    flags += draw(st.sampled_from(([], ["--tolerance_s=0.05"], ["--dataset.use_imagenet_stats=false"])))
    flags += draw(st.sampled_from(([], ["--data.cache=off"])))
    return DataSet(
        version=draw(st.sampled_from(("v3.0", "v3.0", "v3.0", "v3.0", "v2.1", "v2.0"))),
        lengths=lengths,
        fps=draw(st.sampled_from((10, 5, 15, 24, 30, 50, 60, 29.97))),
        jitter_s=draw(st.sampled_from((0.0, 0.0, 0.0, 0.01))),
        tasks=draw(st.integers(1, 3)),
        per_file=draw(st.sampled_from((99, 1, 2))),
        cameras=seen,
        columns=columns,
        stats=tuple(
            draw(st.sets(st.sampled_from(("booleans", "no quantiles", "plain numbers", "of other data"))))
        ),
        tasks_as_column=draw(st.booleans()),
        flags=tuple(flags),
    )
