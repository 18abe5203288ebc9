"""Loads a finished search and plots it: a start for figures of your own.

    python examples/plot_search.py outputs/demo/search-1

Writes search.png into the working folder. A notebook can do the same, cell by cell.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import optuna

search = Path(sys.argv[1])
summary = json.loads((search / "summary.json").read_text())
metric = summary["metric"].split(",")[0]
print(
    f"{summary['complete']} of {summary['trials']} trials were trained to their end; best: trial {summary['best']['trial']}"
)
for name, share in summary["importances"].items():
    print(f"  {share:6.1%}  {name}")

# A row for each trial: its state, its value, and every parameter.
with (search / "trials.csv").open(newline="") as file:
    rows = [row for row in csv.DictReader(file) if row[metric]]

# The study has the values along the way as well, those of the trials that were given up, too.
storage = optuna.storages.RDBStorage(f"sqlite:///{search}/study.db")
study = optuna.load_study(study_name=summary["study"], storage=storage)

figure, (curves, rates) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for trial in study.trials:
    if trial.intermediate_values:
        steps, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
        best = trial.number == summary["best"]["trial"]
        curves.plot(steps, values, color="tab:orange" if best else "0.7", zorder=2 if best else 1)
curves.set(xlabel="step", ylabel=metric, title="validation of every trial")

for state, marker in (("COMPLETE", "o"), ("PRUNED", "x")):
    chosen = [row for row in rows if row["state"] == state and row.get("policy.optimizer_lr")]
    rates.scatter(
        [float(row["policy.optimizer_lr"]) for row in chosen],
        [float(row[metric]) for row in chosen],
        marker=marker,
        label=state.lower(),
    )
rates.set(xscale="log", xlabel="policy.optimizer_lr", ylabel=metric, title="one parameter")
rates.legend()
figure.savefig("search.png", dpi=150)
print("wrote search.png")
