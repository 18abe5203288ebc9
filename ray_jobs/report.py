"""Write the report of a search or of a training, finished or still going on: one HTML file that opens anywhere.

    python -m ray_jobs.report --output_dir=outputs/act_search

A search writes its own when it ends; this writes it again, say while it runs, or after an evaluation whose success
rates (`ray_jobs.evaluate ... --output_dir=outputs/act_search/evaluation`) are then part of it.
"""

from pathlib import Path

from ray_jobs.cli.command_line import not_an_address, read_flags
from ray_jobs.cli.flags import check_flags, plugins_of
from ray_jobs.cli.terminal import quiet
from ray_jobs.cluster.job import run_job
from ray_jobs.config.errors import InputError
from ray_jobs.config.flag_table import Flag
from ray_jobs.reports import page, search
from ray_jobs.search.files import SEARCH_FILE

PLACE = Flag("output_dir", "path")


def main(argv: list[str]) -> int:
    quiet()
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    flags, _ = read_flags(argv)
    plugins = plugins_of(flags)
    check_flags({k: v for k, v in flags.items() if k not in plugins}, {PLACE.name: PLACE}, alone=True)
    if "output_dir" not in flags:
        raise InputError("one flag is wanted, --output_dir: the folder of a search or of a training.")
    folder = Path(flags["output_dir"])
    if mistakes := not_an_address("output_dir", flags["output_dir"]):
        raise InputError(mistakes[0])
    if not folder.is_dir():
        raise InputError(f"--output_dir={folder}: there is no such folder.")
    if plugins:
        check_flags(plugins)
    write = search.write_search if (folder / SEARCH_FILE).is_file() else page.write_run
    print(f"report      {write(folder.absolute(), print)}")
    return 0


if __name__ == "__main__":
    run_job(main, at_end=lambda: None)
