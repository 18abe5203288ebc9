"""Small charts as inline SVG: no script, no fonts, colours by CSS class, so that a page follows the reader's theme.

Plotly would do more, but its script alone is 4.5 MB for every report.
"""

from collections.abc import Sequence
from html import escape
from math import log10
from typing import Any

from matplotlib.ticker import LogLocator, MaxNLocator

LEFT, RIGHT, TOP, BOTTOM = 62, 20, 26, 38  # room around the plot, in pixels


class Axis:
    """From values to pixels: linear, logarithmic, or one place for each of some words.

    Args:
        values: All that will be shown on it.
        low, high: Its ends in pixels.
    """

    def __init__(self, values: Sequence, low: float, high: float, *, log: bool | None = None, ticks: int = 5):
        self.low, self.high = low, high
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        self.words = [] if len(numbers) == len(values) else list(dict.fromkeys(map(str, values)))
        self.ticks: list = list(self.words)
        if self.words:
            return
        least, most = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
        self.log = least > 0 and most > 10 * least if log is None else log and least > 0
        if self.log:
            self.begin, self.end = log10(least), log10(most)
            subs = (1.0,) if most > 30 * least else (1.0, 3.0)
            places = LogLocator(base=10, subs=subs, numticks=99).tick_values(least, most)
        else:
            pad = 0.05 * (most - least) or abs(most) * 0.05 or 0.5
            self.begin, self.end = least - pad, most + pad
            whole = bool(numbers) and all(isinstance(v, int) for v in numbers)
            places = MaxNLocator(ticks, integer=whole).tick_values(self.begin, self.end)
        if self.log:
            pad = 0.05 * (self.end - self.begin) or 0.1
            self.begin, self.end = self.begin - pad, self.end + pad
        self.ticks = [t for t in map(float, places) if self._inside(t)]

    def _inside(self, value: float) -> bool:
        return self.begin <= (log10(value) if self.log else value) <= self.end

    def __call__(self, value: Any) -> float:
        if self.words:
            share = (self.words.index(str(value)) + 0.5) / len(self.words)
        else:
            share = ((log10(value) if self.log else value) - self.begin) / (self.end - self.begin)
        return round(self.low + share * (self.high - self.low), 1)


def short(value: Any) -> str:
    """A number as it is read, not as it is stored."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


class Chart:
    """Lines and dots over two axes.

    Args:
        xs, ys: All values that will be shown.
    """

    def __init__(
        self,
        xs: Sequence,
        ys: Sequence,
        *,
        title: str = "",
        x_label: str = "",
        y_label: str = "",
        width: int = 480,
        height: int = 300,
        log_x: bool | None = False,
        log_y: bool | None = False,
    ):
        self.width, self.height = width, height
        self.x = Axis(xs, LEFT, width - RIGHT, log=log_x)
        self.y = Axis(ys, height - BOTTOM, TOP, log=log_y)
        self.parts = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>']
        middle = (LEFT + width - RIGHT) / 2
        self.parts.append(f'<text class="label" x="{middle}" y="{height - 4}">{escape(x_label)}</text>')
        if y_label:
            place = f'x="{-(TOP + height - BOTTOM) / 2}" y="11" transform="rotate(-90)"'
            self.parts.append(f'<text class="label" {place}>{escape(y_label)}</text>')
        for tick in self.y.ticks:
            y = self.y(tick)
            self.parts.append(f'<path class="grid" d="M{LEFT} {y}H{width - RIGHT}"/>')
            self.parts.append(
                f'<text class="tick end" x="{LEFT - 6}" y="{y + 4}">{escape(short(tick))}</text>'
            )
        for tick in self.x.ticks:
            x, words = self.x(tick), escape(short(tick)[:12])
            self.parts.append(f'<path class="grid" d="M{x} {TOP}V{height - BOTTOM}"/>')
            self.parts.append(f'<text class="tick mid" x="{x}" y="{height - BOTTOM + 14}">{words}</text>')

    def line(self, xs: Sequence, ys: Sequence, kind: str, tip: str = "") -> None:
        points = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in zip(xs, ys, strict=True))
        self.parts.append(f'<polyline class="line {kind}" points="{points}">{_tip(tip)}</polyline>')

    def dot(self, x: Any, y: Any, kind: str, tip: str = "", size: float = 4) -> None:
        self.parts.append(
            f'<circle class="dot {kind}" cx="{self.x(x)}" cy="{self.y(y)}" r="{size}">{_tip(tip)}</circle>'
        )

    def cross(self, x: Any, y: Any, kind: str, tip: str = "") -> None:
        """Where something was given up."""
        at = f"M{self.x(x) - 4} {self.y(y) - 4}l8 8m0 -8l-8 8"
        self.parts.append(f'<path class="cross {kind}" d="{at}">{_tip(tip)}</path>')

    def svg(self) -> str:
        return _svg(self.width, self.height, self.parts)


def bars(shares: dict[str, float], title: str) -> str:
    """Horizontal bars of shares between 0 and 1, the largest first."""
    row, width = 26, 480
    parts = [f'<text class="title" x="0" y="16">{escape(title)}</text>']
    most = max(shares.values(), default=1) or 1
    for number, (name, share) in enumerate(sorted(shares.items(), key=lambda item: -item[1])):
        y = 30 + number * row
        parts.append(f'<text class="tick end" x="200" y="{y + 13}">{escape(name[-30:])}</text>')
        length = round(share / most * 220, 1)
        parts.append(f'<rect class="bar" x="208" y="{y}" width="{length}" height="17" rx="2"/>')
        parts.append(f'<text class="tick" x="{214 + length}" y="{y + 13}">{share:.0%}</text>')
    return _svg(width, 34 + len(shares) * row, parts)


def parallel(
    columns: dict[str, list], lines: list[tuple[int, str, str]], title: str, width: int = 960
) -> str:
    """Parallel coordinates: a vertical axis for each column, a line for each row.

    Args:
        columns: Values by name, all of the same length.
        lines: (row, CSS class, tip), in the order in which they are drawn.
    """
    height, top, bottom = 330, 62, 24
    gap = (width - 170) / max(1, len(columns) - 1)
    parts = [f'<text class="title" x="0" y="16">{escape(title)}</text>']
    axes, labels = [], []
    for number, (name, values) in enumerate(columns.items()):
        x = round(75 + number * gap, 1)
        axis = Axis([v for v in values if v is not None], height - bottom, top, log=None)
        axes.append((x, axis, values))
        group, _, leaf = name.rpartition(".")
        parts.append(f'<path class="axis" d="M{x} {top}V{height - bottom}"/>')
        parts.append(f'<text class="tick mid" x="{x}" y="{top - 26}">{escape(group)}</text>')
        parts.append(f'<text class="tick mid name" x="{x}" y="{top - 11}">{escape(leaf)}</text>')
        for tick in axis.ticks:
            labels.append(
                f'<text class="tick" x="{x + 5}" y="{axis(tick) + 4}">{escape(short(tick)[:10])}</text>'
            )
    for row, kind, tip in lines:
        # A parameter that a trial has not (a condition) is passed by.
        points = [f"{x},{axis(values[row])}" for x, axis, values in axes if values[row] is not None]
        parts.append(f'<polyline class="line {kind}" points="{" ".join(points)}">{_tip(tip)}</polyline>')
    return _svg(width, height, parts + labels)


def _svg(width: float, height: float, parts: list[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""
