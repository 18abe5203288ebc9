"""What is written down is what was used: train_config.json, options.json, summary.json and W&B's config against the very
objects that trained: the optimizer, its schedule, the sampler, the reader of batches, the network. After a start, a resume, and a
resume with other flags. (What a search writes down: `test_tune`.)"""

from pathlib import Path
from typing import Any

import pytest

from ray_jobs.checks import preflight
from ray_jobs.cli.resolve import resolve
from ray_jobs.data import dataset
from ray_jobs.storage.records import read_json
from ray_jobs.training import loop, setup, step
from ray_jobs.training.tracking import save_options
from support.commands import tiny_act, tiny_diffusion
from support.data_sets import make
from support.runs import wandb_runs

STEPS = 3
ACT = (
    "--policy.optimizer_lr=3e-4", "--policy.optimizer_lr_backbone=2e-5", "--policy.optimizer_weight_decay=0.02",
    "--policy.dropout=0.2",
)  # fmt: skip
DIFFUSION = (
    "--policy.optimizer_lr=3e-4", "--policy.optimizer_betas=[0.8,0.9]", "--policy.optimizer_eps=1e-7",
    "--policy.scheduler_warmup_steps=2",
)  # fmt: skip
OWN = (
    "--use_policy_training_preset=false", "--optimizer.type=adamw", "--optimizer.lr=4e-4", "--optimizer.betas=[0.7,0.8]",
    "--optimizer.grad_clip_norm=0.5", "--scheduler.type=diffuser", "--scheduler.name=cosine",
    "--scheduler.num_warmup_steps=2",
)  # fmt: skip
# What each run is begun with, and what is changed in its third session.
RUNS = {
    "act": (ACT, ("--batch_size=3", "--num_workers=2", "--ray.grad_accumulation=2", "--log_freq=2", "--optimizer.grad_clip_norm=0.25")),
    "diffusion": (DIFFUSION, ("--batch_size=2", "--max_eval_samples=5", "--dataset.episodes=[2,3]")),
    "an optimizer of one's own": (OWN, ("--scheduler.num_warmup_steps=4", "--policy.dropout=0.3")),
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("written") / "pictures", [23, 17, 9, 20], cameras=1, seed=2)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("written") / "numbers", [23, 17, 9, 20], seed=2)


class Used:
    """What a training used, taken from its objects while it ran."""

    def __init__(self, flags: list[str]):
        self.batches, self.clipped = [], []
        recipe = resolve(flags)
        recipe = preflight.check(recipe)
        save_options(recipe)
        with pytest.MonkeyPatch.context() as patch:
            self._watch(
                patch, setup, "make_optimizer_and_scheduler", "built", lambda args, made: (args[1], *made)
            )
            self._watch(patch, dataset, "EpisodeAwareSampler", "sampler", lambda args, made: made)
            self._watch(patch, dataset, "FrameReader", "reader", lambda args, made: made)
            self._watch(patch, setup, "make_datasets", "datasets", lambda args, made: made)
            to_device, clip = step.to_device, step.clip_gradients
            patch.setattr(
                step, "to_device", lambda batch, *how: self.batches.append(batch) or to_device(batch, *how)
            )
            patch.setattr(
                step, "clip_gradients", lambda p, most, a: self.clipped.append(most) or clip(p, most, a)
            )
            self.summary = loop.train(recipe, device="cpu")
        self.folder = recipe.output_dir

    def _watch(self, patch, module, name: str, to: str, what) -> None:
        function = getattr(module, name)
        kind = function if isinstance(function, type) else None

        def watched(*args, **more):
            made = function(*args, **more)
            setattr(self, to, what(args, made))
            return made

        if kind:
            watched = type(
                kind.__name__,
                (kind,),
                {"__init__": lambda s, *a, **k: (kind.__init__(s, *a, **k), setattr(self, to, s))[0]},
            )
        patch.setattr(module, name, watched)

    @property
    def config(self) -> dict[str, Any]:
        """By the flag's name, as train_config.json and W&B's config should have it."""
        policy, optimizer, schedule = self.built
        first, last = optimizer.param_groups[0], optimizer.param_groups[-1]
        dataset, held_out = self.datasets
        values = {
            "steps": self.summary["start_step"] + len(self.clipped),
            "batch_size": len(self.batches[0]["index"]),
            "seed": self.sampler.seed,
            "num_workers": self.reader.pool._max_workers,
            "tolerance_s": self.reader.dataset.tolerance_s,
            "dataset.episodes": dataset.episodes,
            "dataset.video_backend": "pyav" if self.reader.cached else self.reader.dataset._video_backend,
            "optimizer.type": type(optimizer).__name__.lower(),
            "optimizer.lr": first.get("initial_lr", first["lr"]),
            "optimizer.betas": list(first["betas"]),
            "optimizer.eps": first["eps"],
            "optimizer.weight_decay": first["weight_decay"],
            "optimizer.grad_clip_norm": self.clipped[0],
            "policy.type": policy.name,
            "policy.n_obs_steps": self.batches[0]["observation.state"]
            .reshape(len(self.batches[0]["index"]), -1, 3)
            .shape[1],
        }
        if policy.name == "act":
            values["policy.chunk_size"] = self.batches[0]["action"].shape[1]
            values["policy.dropout"] = policy.model.encoder.layers[0].dropout.p
            values["policy.dim_model"] = policy.model.encoder.layers[0].self_attn.embed_dim
        else:
            values["policy.horizon"] = self.batches[0]["action"].shape[1]
        if len(optimizer.param_groups) > 1:
            values["policy.optimizer_lr_backbone"] = last["lr"]
        if schedule:
            values["scheduler.num_warmup_steps"] = round(1 / schedule.lr_lambdas[0](1))
        return values

    @property
    def options(self) -> dict[str, Any]:
        """As options.json and W&B's config should have it."""
        return {
            "ray.grad_accumulation": len(self.batches) // len(self.clipped),
            "data.eval_episodes": self.datasets[1].episodes,
        }

    @property
    def facts(self) -> dict[str, Any]:
        """As summary.json should have it."""
        sizes, accumulated = len(self.batches[0]["index"]), len(self.batches) // len(self.clipped)
        return {
            "batch_size": sizes,
            "grad_accumulation": accumulated,
            "global_batch_size": sizes * accumulated,
            "steps": self.summary["start_step"] + len(self.clipped),
            "step": self.summary["start_step"] + len(self.clipped),
            "episodes": len(self.datasets[0].episodes),
            "frames": len(self.datasets[0]),
            "learnable_parameters": sum(
                len(p.flatten()) for g in self.built[1].param_groups for p in g["params"]
            ),
        }


def value(config: dict, flag: str) -> Any:
    for name in flag.split("."):
        config = config[name]
    return config


@pytest.mark.parametrize("name", RUNS)
def test_what_is_written_is_what_was_used(pictures, numbers, tmp_path, name):
    begun, changed = RUNS[name]
    tiny, root = (tiny_diffusion, numbers) if name == "diffusion" else (tiny_act, pictures)
    held_out = ("--data.eval_episodes=[1]", "--eval_steps=2", "--max_eval_samples=4")
    wandb = ("--wandb.enable=true", "--wandb.mode=offline")
    same = [*tiny(root, tmp_path / "run", *begun, *held_out, *wandb), "--seed=3", "--num_workers=3"]
    sessions = ((), ("--resume=true",), ("--resume=true", *changed))
    for number, more in enumerate(sessions, 1):
        used = Used([*same, *more, f"--steps={number * STEPS}"])
        saved = read_json(
            used.folder / f"checkpoints/{number * STEPS:06d}/pretrained_model/train_config.json"
        )
        for flag, was in used.config.items():
            assert value(saved, flag) == was, flag
        options = read_json(used.folder / "options.json")
        for flag, was in used.options.items():
            assert value(options, flag) == was, flag
        assert options["asked"]["eval_steps"] == 2
        summary = read_json(used.folder / "summary.json")
        for fact, was in used.facts.items():
            assert summary[fact] == was, fact
        of_wandb = wandb_runs(used.folder)[-1]["config"]
        for flag, was in {**used.config, **used.options, "eval_steps": 2}.items():
            assert value(of_wandb, flag) == was, flag


IDLE = {
    "--prefetch_factor=9": "batches are not read by processes",
    "--dataset.return_uint8=true": "uint8",
    "--eval.n_episodes=3": "--env.type names no simulator",
    "--data.eval_horizon=2": "nothing is validated",
    "--save_checkpoint=false --save_freq=3": "there are no checkpoints",
    "--data.shuffle_buffer=9": "--data.source=stream",
    "--ray.num_workers=0 --ray.cpus_per_worker=9": "all runs in this process",
    "--optimizer.type=sgd --optimizer.lr=0.5": "the policy brings its own",
    "--use_policy_training_preset=false --policy.optimizer_lr=0.5 --optimizer.type=adam --scheduler.type=diffuser --scheduler.num_warmup_steps=2": "--optimizer.* and --scheduler.* decide",
}


@pytest.mark.parametrize("flags", IDLE)
def test_what_has_no_effect_is_told(pictures, tmp_path, flags):
    """All of the flags that have none, with the reason, and no other."""
    recipe = resolve([*tiny_act(pictures, tmp_path / "run"), *flags.split()])
    recipe = preflight.check(recipe)
    (told,) = (line for line in recipe.notices if ": no effect" in line)
    assert IDLE[flags] in told
    idle = [w.partition("=")[0] for w in flags.split() if w.split(".")[0].split("=")[0] in told]
    assert idle


def test_frames_that_are_kept_are_decoded_by_pyav(pictures, tmp_path):
    """Whatever --dataset.video_backend says, and that is written down."""
    flags = [f for f in tiny_act(pictures, tmp_path / "run") if "video_backend" not in f]
    used = Used(
        [*flags, "--dataset.video_backend=torchcodec", f"--data.cache={tmp_path / 'cache'}", "--steps=1"]
    )
    saved = read_json(used.folder / "checkpoints/000001/pretrained_model/train_config.json")
    assert used.reader.cached and saved["dataset"]["video_backend"] == "pyav"
