"""Optuna's samplers and pruners by the names of `--tune.sampler` and `--tune.scheduler`: what is drawn next, what is given up."""

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler

from ray_jobs.search.options import TuneOptions
from ray_jobs.search.plan import Plan


def make_sampler(options: TuneOptions, seed: int) -> BaseSampler:
    first = min(10, max(4, options.num_samples // 4))  # random ones, before the model is asked
    match options.sampler:
        case "tpe":
            # Parallel trials keep away from each other; conditional parameters are modelled in groups.
            return TPESampler(
                n_startup_trials=first, multivariate=True, group=True, constant_liar=True, seed=seed
            )
        case "random":
            return RandomSampler(seed=seed)
        case "cmaes":
            return CmaEsSampler(n_startup_trials=first, seed=seed)
        case "gp":
            return GPSampler(n_startup_trials=first, seed=seed)
        case _:
            return NSGAIISampler(population_size=max(4, options.num_samples // 4), seed=seed)


def make_pruner(plan: Plan) -> BasePruner:
    grace, factor = plan.grace_steps, plan.options.tune.reduction_factor
    match plan.scheduler:
        case "asha":
            return SuccessiveHalvingPruner(grace, factor)
        case "hyperband":
            return HyperbandPruner(grace, plan.steps, factor)
        case "median":
            return MedianPruner(n_startup_trials=4, n_warmup_steps=grace - 1)
        case _:
            return NopPruner()
