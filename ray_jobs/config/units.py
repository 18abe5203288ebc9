"""Figures as people read them."""


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min, 1 d 4 h."""
    seconds = int(seconds)
    for unit, name, lesser, lesser_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= unit:
            return f"{seconds // unit} {name} {seconds % unit // lesser:02d} {lesser_name}"
    return f"{seconds} s"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
