"""Which page of `docs/` says more about an error: that of the package it comes from."""

from pathlib import Path
from traceback import walk_tb

PACKAGE = Path(__file__).parent.parent
PAGES = {  # the most particular name of a module counts
    "checks": "data.md",
    "checks/output_dir": "train.md#what-a-run-leaves-behind",
    "checks/policy": "policies.md",
    "checks/preflight": "train.md",
    "checks/resume": "train.md#stopping-and-resuming",
    "checks/stream": "data.md#streams",
    "cache": "data.md#the-frame-cache",
    "cli": "flags.md",
    "cli/early_checks": "train.md",
    "cli/resume": "train.md#stopping-and-resuming",
    "cluster": "clusters.md",
    "cluster/faults": "faults.md",
    "cluster/run_folder": "train.md#what-a-run-leaves-behind",
    "cluster/watchdog": "faults.md",
    "config": "flags.md",
    "data": "data.md",
    "evaluate": "evaluate.md",
    "evaluation": "evaluate.md",
    "export": "simulator.md",
    "list": "train.md#what-a-run-leaves-behind",
    "part_sorting": "simulator.md#the-demos-task",
    "policies": "policies.md",
    "policies/export": "simulator.md",
    "report": "tune.md#watching",
    "reports": "tune.md#watching",
    "search": "tune.md",
    "search/spaces": "tune.md#spaces",
    "storage": "clusters.md#buckets",
    "storage/hub": "policies.md#without-a-network",
    "storage/trust": "train.md#whom-is-trusted",
    "training": "faults.md",
}
COLLECT = ("config/errors",)  # where several mistakes are raised together


def page_of(error: BaseException) -> str | None:
    """The page on what an error is about, as `docs/data.md`; None where there is none."""
    files = [Path(frame.f_code.co_filename) for frame, _ in walk_tb(error.__traceback__)]
    ours = [file.relative_to(PACKAGE).with_suffix("") for file in files if file.is_relative_to(PACKAGE)]
    if not files or not files[-1].is_relative_to(PACKAGE):
        return None  # not raised here
    raised = next((module for module in reversed(ours) if str(module) not in COLLECT), Path())
    page = next((PAGES[str(place)] for place in (raised, *raised.parents) if str(place) in PAGES), None)
    return page and f"docs/{page}"
