"""Hand a trained policy to an older LeRobot: a copy of a checkpoint that LeRobot 0.4 loads.

    python -m ray_jobs.export --lerobot=0.4 --checkpoint=outputs/act --output_dir=act_for_the_simulator

Simulators such as Isaac Sim bring Python 3.11, which LeRobot 0.5 and later do not run on. `--checkpoint` is a run's folder
(its best checkpoint, else its last), a checkpoint or a `pretrained_model` folder. The copy opens with
`from_pretrained` and in 0.4's `lerobot-eval`; a training cannot be resumed from it. What LoRA adapters adapt is found
under its Hub name in `--assets.dir` (default `pretrained`).
"""

from pathlib import Path

from ray_jobs.checks.output_dir import check_output_dir
from ray_jobs.cli.command_line import read_flags
from ray_jobs.cli.flags import check_flags
from ray_jobs.cli.terminal import doing, quiet
from ray_jobs.cluster.job import run_job
from ray_jobs.config.errors import InputError
from ray_jobs.config.flag_table import Flag
from ray_jobs.policies.facts import facts_of

FLAGS = ("lerobot", "checkpoint", "output_dir", "assets.dir")
# No package registry has the transformers that 0.4's pi0 and pi0.5 need, nor the extra that asks for it.
FORK = "pip install 'lerobot[pi] @ git+https://github.com/huggingface/lerobot@v0.4.4'"


def main(argv: list[str]) -> int:
    """Write the copy, and say where it is and what to mind."""
    quiet()
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    flags, _ = read_flags(argv)
    check_flags(flags, {name: Flag(name, "str") for name in FLAGS}, alone=True)
    for name, example in (("lerobot", "0.4"), ("checkpoint", "outputs/act"), ("output_dir", "exported")):
        if not flags.get(name):
            raise InputError(f"--{name} is missing, as in --{name}={example}.")
    if flags["lerobot"] not in ("0.4", "0.4.4"):
        raise InputError(f"--lerobot={flags['lerobot']}: only 0.4 is known here (tried with 0.4.4).")
    source, target = (Path(flags[name]) for name in ("checkpoint", "output_dir"))
    if not source.exists() and "://" not in str(source):
        raise InputError(f"--checkpoint={source}: there is no checkpoint, nor such a folder.")
    check_output_dir(target)
    doing("importing LeRobot")
    from ray_jobs.policies.export import export
    from ray_jobs.storage.bucket import local_folder
    from ray_jobs.training.checkpoint import pretrained_dir

    source, target = (local_folder(flags[name], name) for name in ("checkpoint", "output_dir"))
    source = pretrained_dir(source)
    doing("writing the copy")
    kind = export(source, target, assets_dir=Path(flags.get("assets.dir") or "pretrained"))
    doing("")
    print(f"exported    {source}\nto          {target}, for LeRobot 0.4")
    if facts_of(kind).forked_transformers:
        print(
            f"mind        0.4's pi0 needs a fork of transformers, which comes from LeRobot's repository:\n{FORK}"
        )
    return 0


if __name__ == "__main__":
    run_job(main, at_end=lambda: None)
