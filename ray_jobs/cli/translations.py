"""Flags of published recipes that today's LeRobot spells differently, or has no equal for."""

from dataclasses import dataclass, field

from ray_jobs.config.errors import InputError


@dataclass(frozen=True)
class Translation:
    """What a flag of an older recipe becomes, for one policy or for all (None)."""

    flag: str
    policy: str | None = None
    to: str | None = None
    """Today's name of the flag, which takes the same values."""
    values: dict[str, str | None] = field(default_factory=dict)
    """Or: today's flag and value for each old value; None where it is what happens anyway."""
    otherwise: str = ""
    """Why any other value can't be honoured."""
    mind: str = ""
    """What is not quite as it was asked for, all the same."""


TRANSLATIONS = (
    Translation("eval_freq", to="env_eval_freq"),
    Translation("policy.image_resolution", policy="smolvla", to="policy.resize_imgs_with_padding"),
    Translation(
        "policy.dtype",
        policy="smolvla",
        values={"float32": "policy.use_amp=false"},
        otherwise="SmolVLA has no such switch; --policy.use_amp=true trains in mixed precision.",
        mind="With --policy.load_vlm_weights=true LeRobot loads the vision-language model in bfloat16 all the same.",
    ),
    Translation(
        "policy.gradient_checkpointing",
        policy="smolvla",
        values={"false": None},
        otherwise="SmolVLA cannot recompute its activations; --ray.grad_accumulation with a smaller "
        "--batch_size saves memory.",
    ),
)


def translate(flags: dict[str, str], policy: str | None = None) -> tuple[dict[str, str], list[str]]:
    """The flags as today's LeRobot takes them, and a notice for each that was translated. What was typed under
    today's name goes first.

    Args:
        policy: The policy's type where `--policy.type` does not say it.

    Raises:
        InputError: A value that can't be honoured.
    """
    translated, notices = dict(flags), []
    policy = flags.get("policy.type", policy)
    for rule in TRANSLATIONS:
        if rule.flag not in translated or rule.policy not in (None, policy):
            continue
        value = translated.pop(rule.flag)
        if rule.to:
            translated.setdefault(rule.to, value)
            notices.append(f"--{rule.flag} is called --{rule.to} today: understood as that.")
        elif value.lower() not in rule.values:
            raise InputError(f"--{rule.flag}={value}: {rule.otherwise}")
        elif today := rule.values[value.lower()]:
            translated.setdefault(*today.split("="))
            mind = f" {rule.mind}" if rule.mind else ""
            notices.append(f"--{rule.flag}={value} is --{today} today: understood as that.{mind}")
        else:
            notices.append(f"--{rule.flag}={value} is what {rule.policy} does in any case.")
    return translated, notices
