"""A training run's folder: args.json, log.jsonl, previews/, ckpt/<step>.pt, latest.pt; what is its own,
and resuming it.

    ckpt/<step>.pt  {model, ema, opt, step, config, ages, format}; config is {model, meta, train}: the model's
                    configuration, the cache's meta.json, all flags of the command
    latest.pt       a link to the newest, or a text of its name where the file system has no links
"""
import inspect
import json
import os
import pathlib
import time

import torch

from distributed import InputError, all_reduce, check, gather, place, reading, temporary_of, whole_file
from weights import FORMAT, load_checkpoint, load_weights, target_of

FREE = ("data", "run", "steps", "lr", "muon_lr", "warmup", "decay_from", "decay_to", "micro_batch",
        "log_every", "ckpt_every", "preview_every", "compile", "checkpointing", "tensorboard", "init",
        "rename", "ema_from_init", "eval_every", "eval_toy", "eval_data")  # what another command may change


def flags_of(args, objective):
    """What a checkpoint keeps of the command: all flags, and what the objective has made of them."""
    flags = {**vars(args), **objective.settings, "method": objective.method}
    return {name: _plain(value) for name, value in flags.items()}


def _plain(value):
    """A flag's value as a checkpoint keeps it, whether the user or the parser gave it."""
    if isinstance(value, pathlib.Path):
        return str(value)
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def options_of(network):
    """{name: default} of the keywords of a network's class: what an older file's model may lack."""
    parameters = inspect.signature(network).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def checkpoint_of(path, new, defaults, shaping):
    """The checkpoint of a run. Raises InputError where it is of another run than the one of this config.

    defaults: what an older file does not say; shaping: flags that the model's configuration tells.
    """
    checkpoint = load_checkpoint(path)
    old = checkpoint["config"]
    keys = [("train", "method")]  # first: of another method all else is puzzling
    for part in ("model", "meta", "train"):
        keys += [(part, key) for key in sorted(new[part].keys() | old[part].keys())]
    whole = isinstance(checkpoint.get("opt"), dict) and "model" in checkpoint
    check(whole, f"{path}: has no optimiser state, it was exported for sampling; start a new --run with "
          f"--init {path}")
    for part, key in keys:
        default = defaults.get(part, {}).get(key)
        theirs, ours = (_plain(config[part].get(key, default)) for config in (old, new))
        free = part == "train" and key in (*FREE, *shaping)
        gone = part == "train" and key not in new[part]
        check(theirs == ours or not gone, f"{path}: was trained with {key} = {str(theirs)[:80]}, which this "
              "version does not know; use another --run, or the version that trained it")
        check(theirs == ours or free, f"{path}: was trained with {key} = {str(theirs)[:80]}, "
              f"this command has {str(ours)[:80]}; use another --run or the same command and arguments")
    return checkpoint


def latest(folder):
    """The checkpoint that a run continues from, or None. InputError where latest.pt has lost its target."""
    path = folder / "latest.pt"
    there = path.is_symlink() or path.exists()
    if there and target_of(path).is_file():
        return path
    lost = there or any((folder / "ckpt").glob("*.pt"))
    check(not lost, f"{path}: points to no checkpoint though {folder / 'ckpt'} is there; "
          "link it to one of that folder, or write its name into it, or use another --run")
    return None


def restore(checkpoint, model, ema, optimiser):
    """Take up weights and optimiser -> the step, the ages of update_ema."""
    load_weights(model, checkpoint["model"], "the run's model")
    load_weights(ema, checkpoint["ema"], "the run's EMA")
    optimiser.load_state_dict(checkpoint["opt"])
    return checkpoint["step"], checkpoint.get("ages", {})


def agree(folder, step):
    """Raise InputError unless all processes continue at this step."""
    check(set(gather(step)) == {step}, f"{folder}: this process continues at step {step}, another one "
          "elsewhere; all nodes must share the folder's file system")


def save_checkpoint(folder, model, ema, optimiser, step, config, ages):
    """Process 0 writes ckpt/<step>.pt under a temporary name, then points latest.pt to it: a link, or its
    name.
    """
    if place()[0] > 0:
        return
    path = folder / "ckpt" / f"{step:07d}.pt"
    with whole_file(path) as file:
        torch.save({"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimiser.state_dict(),
                    "step": step, "config": config, "ages": ages, "format": FORMAT}, file)
    name, link = path.relative_to(folder).as_posix(), temporary_of(folder / "latest.pt")
    link.unlink(missing_ok=True)
    try:
        os.symlink(name, link)
    except OSError:  # network drives and exFAT have no links
        with whole_file(folder / "latest.pt") as file:
            file.write(f"{name}\n".encode())
    else:
        os.replace(link, folder / "latest.pt")


# ------------------------------------------------------------------------------------------------
# The log.

class Log:
    """log.jsonl, and with tensorboard its event files in RUN/tensorboard; process 0 writes."""

    def __init__(self, folder, step, notes, tensorboard=False):
        """Begin as begin_log does. Raises InputError as that does, and where tensorboard is not installed."""
        self.folder, self.events, self.first = folder, None, place()[0] == 0
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError(f"--tensorboard: {error}; pip install tensorboard") from error
        if self.first:
            begin_log(folder, step, notes)
        if self.first and tensorboard:
            self.events = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, entry):
        """Add a line; entry["step"] says of which step."""
        if not self.first:
            return
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        if self.events:
            for name, value in entry.items():
                self.events.add_scalar(name, value, entry["step"])
            self.events.flush()


def begin_log(folder, step, notes):
    """Write args.json, and cut log.jsonl back to the step that the run continues from.

    Raises InputError where files of these names are of something else than a run.
    """
    path, log, kept = folder / "args.json", folder / "log.jsonl", None
    foreign = "is of no training run; use another --run"
    if path.exists():
        with reading(path, foreign):
            check("batch_size" in json.loads(path.read_text()), f"{path}: {foreign}")
    if log.exists():
        check(path.exists() or not log.stat().st_size, f"{log}: {foreign}")
        with reading(log, foreign):
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")]  # whole ones
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
    with whole_file(path) as file:
        file.write(json.dumps(notes, indent=1, default=str).encode())
    if kept is not None:
        with whole_file(log) as file:
            file.write("".join(kept).encode())


class Meter:
    """What the log averages between two lines, gathered on the device: a step reads nothing from it."""

    def __init__(self, K, device):
        """Of K terms."""
        self.sums, self.counts = torch.zeros(K, device=device), torch.zeros(K, device=device)
        self.norms, self.good = torch.zeros((), device=device), torch.zeros((), device=device)
        self.skipped = torch.zeros(3, device=device)  # steps in all; in a row, now; in a row, at worst
        self.steps, self.clock = 0, time.perf_counter()

    def add(self, sums, counts, norm, bad):
        """A step's (K,) sums of this process and counts of all; bad is 1.0 where it was skipped."""
        self.sums += torch.where(bad > 0, 0.0, sums)
        self.counts += (1 - bad) * counts
        self.norms += torch.where(bad > 0, 0.0, norm)
        self.good += 1 - bad
        self.skipped[0] += bad
        self.skipped[1] = (self.skipped[1] + 1) * bad
        self.skipped[2] = torch.maximum(self.skipped[2], self.skipped[1])
        self.steps += 1

    def skip(self, seconds):
        """Count so many seconds not as training's."""
        self.clock += seconds

    def read(self, terms, batch_size, folder):
        """What the log says since the last one: {term: mean} of those that had rows, and the rest; starts
        anew. Raises InputError after ten bad steps in a row.
        """
        means, counts = all_reduce(self.sums.clone()) / self.counts.clamp(min=1), self.counts.tolist()
        means = {term: mean for term, mean, count in zip(terms, means.tolist(), counts) if count}
        seconds = time.perf_counter() - self.clock
        entry = {"grad_norm": (self.norms / self.good.clamp(min=1)).item(),
                 "img_per_s": self.steps * batch_size / seconds, "skipped": int(self.skipped[0])}
        worst = int(self.skipped[2])
        check(worst < 10, f"{worst} non-finite gradients in a row, the run stops; the last file in "
              f"{folder / 'ckpt'} (if any) is good: start a new --run with --init FILE and a lower --lr or "
              "--precision fp32")
        for counter in (self.sums, self.counts, self.norms, self.good, self.skipped[2:]):
            counter.zero_()
        self.steps, self.clock = 0, time.perf_counter()
        return means, entry
