"""Put what studies/run_recipes.sh left together: results/recipes.json.

    python studies/collect_recipes.py --control long-control-1e-3 --best long-best

samples_to_control: the share of the control's samples that the best recipe needs for the control's last
score, between two evaluations by a line, the mean over the seeds that both have; null where a seed does not
reach it.
time_to_control is the same in seconds of training: the share of samples times that of a step's seconds on an
idle machine, as `bench.py --what recipes --json results/recipes_steps.json` has them.
"""
import json
import pathlib

import numpy as np
from record import ROOT, write_json

from distributed import check, command_parser, reading, run

RESULTS = ROOT / "results"
RISING = {"abs_rel": False, "normal_mean": False, "miou": True, "latent_fd": False, "class": True,
          "given_depth": False}  # whether more of it is better
FLAGS = ("optimiser", "lr", "muon_lr", "beta2", "blocks", "times", "middle_weight", "repa_weight",
         "repa_until", "projector", "decay_from", "decay_to", "steps", "batch_size")  # that differ


def needed(evaluations, key, target):
    """The samples at which a run reaches the target, None where it does not."""
    before = None
    for entry in evaluations:
        reached = entry[key] >= target if RISING[key] else entry[key] <= target
        if reached and before is None:
            return entry["samples"]
        if reached:
            share = (target - before[key]) / (entry[key] - before[key])
            return before["samples"] + share * (entry["samples"] - before["samples"])
        before = entry
    return None


def shares(control, best):
    """{score: the share of the control's samples}; both {seed: evaluations}."""
    found = {}
    for key in RISING:
        each = []
        for seed in sorted(control.keys() & best.keys()):
            last = control[seed][-1]
            samples = needed(best[seed], key, last[key])
            each.append(None if samples is None else samples / last["samples"])
        found[key] = None if None in each or not each else float(np.mean(each))
    return found


def kind(flags):
    """A run's name in recipes_steps.json."""
    middle = ", middle heads" if flags["middle_weight"] else ""
    return f"{flags['optimiser']}, {flags['blocks']}{middle}"


def rounded(evaluation):
    return {key: value if key in ("step", "samples") else round(value, 4)
            for key, value in evaluation.items()}


def gathered(folder):
    """The runs of the search, as recipes.json has them, and what measured all of them."""
    runs, recipe = [], {}
    for path in sorted(folder.glob("*.json")):
        with reading(path, "run studies/run_recipes.sh again"):
            held = json.loads(path.read_text())
        recipe = held["recipe"]
        flags, device = recipe.pop("flags"), recipe.pop("device")
        name, _, seed = path.stem.rpartition("_")
        runs.append(dict(name=name, seed=int(seed), device=device, torch=recipe.pop("torch"),
                         img_per_s_beside_others=round(recipe.pop("img_per_s_beside_others")),
                         flags={flag: flags[flag] for flag in FLAGS},
                         evaluations=[rounded(entry) for entry in held["evaluations"]],
                         middle_scales={scale: rounded(entry) for scale, entry in
                                        held.get("middle_scales", {}).items()}))
    return runs, recipe


def main():
    parser = command_parser(__doc__)
    parser.add_argument("--control", required=True)
    parser.add_argument("--best", required=True)
    parser.add_argument("--scores", type=pathlib.Path, default=ROOT / "runs" / "recipes" / "scores")
    args = parser.parse_args()
    runs, recipe = gathered(args.scores)
    seeds = {}
    for held in runs:
        seeds.setdefault(held["name"], {})[held["seed"]] = held["evaluations"]
    for name in (args.control, args.best):
        check(name in seeds, f"{name}: no such run in {args.scores}; there are {', '.join(seeds)}")
    share, clock = shares(seeds[args.control], seeds[args.best]), RESULTS / "recipes_steps.json"
    time = None
    if clock.is_file():
        seconds, flags = json.loads(clock.read_text()), {held["name"]: held["flags"] for held in runs}
        slower = seconds[kind(flags[args.best])]["s"] / seconds[kind(flags[args.control])]["s"]
        time = {key: None if value is None else value * slower for key, value in share.items()}
    result = dict(control=args.control, best=args.best, samples_to_control=share, time_to_control=time,
                  recipe=recipe, runs=runs)
    write_json(RESULTS / "recipes.json", result)
    print(json.dumps({key: result[key] for key in list(result)[:4]}, indent=1))


if __name__ == "__main__":
    run(main)
