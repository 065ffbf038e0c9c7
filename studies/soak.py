"""A soak, not a test: train, kill, resume, sample, kill, continue, for hours; in the end nothing may be lost.

    python studies/soak.py --minutes 120 --json results/soak.json

Each round trains a fresh run and draws a set of samples with processes that SIGKILL ends at random moments;
the same commands go on each time. A round holds when the weights, the log and the pictures are those of runs
that nobody killed, bit for bit.
"""
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import torch
from record import ROOT, command_line, write_json

from distributed import command_parser, run
from weights import load_checkpoint


class Command:
    """A command of the project that is started again until it ends by itself, its output in a log."""

    def __init__(self, log, *argv):
        self.log, self.argv = log, [str(word) for word in argv]

    def start(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, *self.argv], cwd=ROOT, stdout=self.log, stderr=self.log,
                                start_new_session=True, env=environment)

    def fail(self, what):
        sys.exit(f"{' '.join(self.argv)}: {what}, see {self.log.name}")

    def finish(self):
        """Run it to its end -> seconds. SystemExit when it fails by itself or hangs."""
        begun = time.monotonic()
        self._wait(self.start(), 1800) or self.fail("hangs")
        return time.monotonic() - begun

    def finish_killed(self, dice, longest, after=None):
        """Run it to its end, killed at random moments of up to `longest` seconds -> kills. after() is called
        after each.
        """
        kills = 0
        while True:
            killing = dice.random() < 0.85
            if self._wait(self.start(), dice.uniform(0, longest) if killing else 1800):
                return kills
            if not killing:
                self.fail("hangs")
            kills += 1
            if after:
                after()

    def _wait(self, process, seconds):
        """True where the process has ended well; one that has not ended in time is killed."""
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
        if code != 0:
            self.fail(f"exit code {code}")
        return True


# ------------------------------------------------------------------------------------------------
# What must be the same.

def weights(folder):
    checkpoint = load_checkpoint(folder)
    return {f"{part} {name}": tensor.clone()
            for part in ("model", "ema") for name, tensor in checkpoint[part].items()}


def log_of(folder):
    """The run's log, without what a clock says."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "img_per_s"} for line in lines]


def pictures(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.suffix in (".png", ".npy", ".npz")}


def same(one, other):
    """Compare (weights, log, pictures)."""
    equal = one[0].keys() == other[0].keys() and one[1:] == other[1:]
    return equal and all(torch.equal(one[0][key], other[0][key]) for key in other[0])


class Progress:
    """What a run keeps over its kills: each leaves a checkpoint that can be read; what was logged after it is
    done again.
    """

    def __init__(self, folder):
        self.folder, self.reached, self.again = folder, 0, 0

    def __call__(self):
        latest, log = self.folder / "latest.pt", self.folder / "log.jsonl"
        kept = load_checkpoint(latest)["step"] if latest.exists() else 0
        lines = log.read_text().splitlines() if log.exists() else []
        logged = max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
        self.again += max(0, logged - kept)
        assert kept >= self.reached, f"{latest}: step {kept}, it was at {self.reached}"
        self.reached = kept


# ------------------------------------------------------------------------------------------------

def arguments():
    """The command's flags."""
    parser = command_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    return parser.parse_args()


class Soak:
    """The two commands, and what they do when nobody kills them."""

    def __init__(self, args, folder, log):
        self.args, self.folder, self.log, self.dice = args, folder, log, random.Random(args.seed)
        cache = folder / "cache"
        Command(log, "prep_latents.py", "--toy", 48, "--out", cache, "--batch-size", 16).finish()
        train, sample = self.commands("whole")
        self.training, self.sampling = train.finish(), sample.finish()
        self.truth = self.outcome("whole")

    def commands(self, name):
        """Training and sampling of a run of this name."""
        args, run = self.args, self.folder / name
        train = Command(self.log, "train.py", "--data", self.folder / "cache", "--run", run, "--model", "T/2",
                        "--steps", args.steps, "--batch-size", 8, "--lr", 5e-4, "--ckpt-every", 3,
                        "--log-every", 1, "--preview-every", 13)
        sample = Command(self.log, "sample.py", "--task", "generate", "--num", args.samples,
                         "--classes", "balanced", "--ckpt", run / "latest.pt", "--sampler", "sde",
                         "--steps", 8, "--batch-size", 4, "--npz", "--out", self.drawn(name))
        return train, sample

    def drawn(self, name):
        return self.folder / f"{name}_drawn"

    def outcome(self, name):
        return weights(self.folder / name), log_of(self.folder / name), pictures(self.drawn(name))

    def round(self, name):
        """Train and sample under kills -> what happened."""
        progress = Progress(self.folder / name)
        train, sample = self.commands(name)
        kills = train.finish_killed(self.dice, self.training, progress)
        more = sample.finish_killed(self.dice, self.sampling)
        folders = self.folder / name, self.drawn(name)
        stray = [path for folder in folders for path in folder.rglob(".*")]
        print(*stray, sep="\n", end="\n" if stray else "")
        differs = not same(self.outcome(name), self.truth)
        for folder in folders:
            shutil.rmtree(folder)
        return dict(rounds=1, kills_training=kills, kills_sampling=more, steps_done_again=progress.again,
                    rounds_that_differ=int(differs), stray_files=len(stray))


def main():
    args = arguments()
    found = {}
    recipe = dict(command=command_line(), torch=torch.__version__, device="cpu")
    with tempfile.TemporaryDirectory() as folder, open(pathlib.Path(folder, "log.txt"), "w") as log:
        soak, begun = Soak(args, pathlib.Path(folder), log), time.monotonic()
        while time.monotonic() - begun < 60 * args.minutes:
            one = soak.round(f"round{found.get('rounds', 0)}")
            found = {key: found.get(key, 0) + value for key, value in one.items()}
            result = {**found, "minutes": (time.monotonic() - begun) / 60, "recipe": recipe}
            if args.json:
                write_json(args.json, result)
            print(result, flush=True)


if __name__ == "__main__":
    run(main)
