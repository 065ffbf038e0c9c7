"""A training run's folder: args.json, log.jsonl, previews/, ckpt/<step>.pt, latest.pt; what is its own,
and resuming it.

    ckpt/<step>.pt  {model, ema, opt, step, config, format}; config is {model, meta, train}: the model's
    configuration,
                    the cache's meta.json, all flags of the command
"""
import json
import os
import pathlib
import time

import torch

from distributed import all_reduce, check, whole_file
from weights import FORMAT, load_checkpoint, load_weights

FREE = ("data", "run", "steps", "lr", "micro_batch", "log_every", "ckpt_every", "preview_every", "compile",
        "checkpointing", "init")  # flags that another command of the same run may change


def flags_of(args, objective):
    """What a checkpoint keeps of the command: all flags, and what the objective has made of them."""
    flags = {**vars(args), **objective.settings, "method": objective.method}
    return {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in flags.items()}


def checkpoint_of(path, new, defaults, shaping):
    """The checkpoint of a run. Raises InputError where it is of another run than the one of this config.

    defaults: what an older file does not say; shaping: flags that the model's configuration tells.
    """
    checkpoint = load_checkpoint(path)
    whole = isinstance(checkpoint.get("opt"), dict) and "model" in checkpoint
    check(whole, f"{path}: has no optimiser state, it was exported for sampling; start a new --run with "
          f"--init {path}")
    old = checkpoint["config"]
    for part in ("model", "meta", "train"):
        for key in sorted(new[part].keys() | old[part].keys()):
            default = defaults.get(part, {}).get(key)
            theirs, ours = old[part].get(key, default), new[part].get(key, default)
            free = part == "train" and key in (*FREE, *shaping)
            check(theirs == ours or free, f"{path}: was trained with {key} = {str(theirs)[:80]}, "
                  f"this command has {str(ours)[:80]}; use another --run or the same arguments")
    return checkpoint


def latest(folder):
    """The checkpoint that a run continues from, or None. InputError where latest.pt has lost its target."""
    path = folder / "latest.pt"
    if path.exists():
        return path
    lost = path.is_symlink() or any((folder / "ckpt").glob("*.pt"))
    check(not lost, f"{path}: points to no checkpoint though {folder / 'ckpt'} is there; "
          "link it to one of that folder, or use another --run")
    return None


def restore(checkpoint, model, ema, optimiser, lr):
    """Take up weights and optimiser -> the step; the learning rate is set anew."""
    load_weights(model, checkpoint["model"], "the run's model")
    load_weights(ema, checkpoint["ema"], "the run's EMA")
    optimiser.load_state_dict(checkpoint["opt"])
    for group in optimiser.param_groups:
        group["lr"] = lr
    return checkpoint["step"]


def save_checkpoint(folder, model, ema, optimiser, step, config):
    """Write ckpt/<step>.pt under a temporary name, then point latest.pt to it."""
    path = folder / "ckpt" / f"{step:07d}.pt"
    with whole_file(path) as file:
        torch.save({"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimiser.state_dict(),
                    "step": step, "config": config, "format": FORMAT}, file)
    link = folder / f".latest.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(path.relative_to(folder))
    os.replace(link, folder / "latest.pt")


# ------------------------------------------------------------------------------------------------
# The log.

def begin_log(folder, step, notes):
    """Write args.json, and cut log.jsonl back to the step that the run continues from."""
    with whole_file(folder / "args.json") as file:
        file.write(json.dumps(notes, indent=1, default=str).encode())
    path = folder / "log.jsonl"
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]  # whole ones
        kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
        with whole_file(path) as file:
            file.write("".join(kept).encode())


def write_log(folder, entry):
    """Add a line to log.jsonl."""
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")


class Meter:
    """What the log averages between two lines, gathered on the device: a step reads nothing from it."""

    def __init__(self, terms, device):
        self.sums, self.counts = torch.zeros(terms, device=device), torch.zeros(terms, device=device)
        self.norms = torch.zeros((), device=device)
        self.skipped = torch.zeros(3, device=device)  # steps in all; in a row, now; in a row, at worst
        self.steps, self.clock = 0, time.perf_counter()

    def add(self, sums, counts, norm, bad):
        """A step's (K,) sums of this process and counts of all; bad is 1.0 where it was skipped."""
        self.sums += torch.where(bad > 0, 0.0, sums)
        self.counts += (1 - bad) * counts
        self.norms += torch.where(bad > 0, 0.0, norm)
        self.skipped[0] += bad
        self.skipped[1] = (self.skipped[1] + 1) * bad
        self.skipped[2] = torch.maximum(self.skipped[2], self.skipped[1])
        self.steps += 1

    def read(self, terms, batch_size):
        """The entry since the last one, and how many steps in a row were skipped at worst; starts anew."""
        means = (all_reduce(self.sums.clone()) / self.counts.clamp(min=1)).tolist()
        seconds = time.perf_counter() - self.clock
        entry = {**dict(zip(terms, means)), "grad_norm": (self.norms / self.steps).item(),
                 "img_per_s": self.steps * batch_size / seconds, "skipped": int(self.skipped[0])}
        worst = int(self.skipped[2])
        for counter in (self.sums, self.counts, self.norms, self.skipped[2:]):
            counter.zero_()
        self.steps, self.clock = 0, time.perf_counter()
        return entry, worst
