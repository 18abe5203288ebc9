"""The drawing of architecture.md: which package imports which, read from the code; a test compares it.

    python docs/make_architecture.py

An arrow that follows from two others is left out, or it would be a ball of wool. Mermaid, which repository browsers draw.
"""

from pathlib import Path

import grimp

PAGE = Path(__file__).with_name("architecture.md")
BEGIN, END = "<!-- made by docs/make_architecture.py -->", "<!-- end -->"


def imports() -> dict[str, set[str]]:
    """Package or job -> those that it imports, directly."""
    graph = grimp.build_graph("ray_jobs", exclude_type_checking_imports=True)
    rooms = {child.rpartition(".")[2] for child in graph.find_children("ray_jobs")} - {"__main__"}
    jobs = {room for room in rooms if not graph.find_children(f"ray_jobs.{room}")}
    found: dict[str, set[str]] = {}
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            here, there = (name.split(".")[1] if "." in name else "" for name in (module, other))
            here, there = ("jobs" if name in jobs else name for name in (here, there))
            if here and there and here != there and "__main__" not in (here, there):
                found.setdefault(here, set()).add(there)
    return found


def reduced(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that no longer way makes superfluous."""

    def reached(room: str) -> set[str]:
        return edges.get(room, set()).union(*(reached(other) for other in edges.get(room, ())))

    return sorted(
        (room, other)
        for room, others in edges.items()
        for other in others
        if not any(other in reached(between) for between in others - {other})
    )


def drawing() -> str:
    arrows = "\n".join(f"    {room} --> {other}" for room, other in reduced(imports()))
    return f"{BEGIN}\n\n```mermaid\ngraph TD\n{arrows}\n```\n\n{END}"


def page() -> str:
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    return before + drawing() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page())
