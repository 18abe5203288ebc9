"""What texts of the program advise."""

import contextlib
import shlex

BUILT = "\0"  # stands for what a text gets while the program runs


def other_programs() -> dict:
    import ray.scripts.scripts
    import wandb.cli.cli
    from huggingface_hub.cli import hf

    return {
        "hf": hf.app,
        "wandb": wandb.cli.cli.cli,
        "ray": ray.scripts.scripts.cli,
    }


def parse_other(programs: dict, command: str) -> None:
    """Raises what the program's own parser says. One that is only named has no arguments."""
    import click

    name, *words = shlex.split(command.replace(BUILT, "x"), comments=True)
    parser = programs[name]
    while isinstance(parser, click.Group):
        with parser.make_context(name, words, resilient_parsing=True) as context:
            named = words[0]
            name, parser, words = parser.resolve_command(context, words)
        assert parser, f"there is no {named}"
    with contextlib.suppress(click.MissingParameter):
        parser.make_context(name, words) if words else None
