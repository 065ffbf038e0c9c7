"""A soak, not a test: train, kill, resume, sample, kill, continue, for hours; in the end nothing may be lost.

    python tests/soak.py --minutes 120 --json results/soak.json

Each round trains a fresh run and draws a set of samples with processes that SIGKILL ends at random moments; the same commands
go on each time. A round holds when the weights, the log and the pictures are those of runs that nobody killed, bit for bit.
"""
import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

from distributed import run, whole_file  # noqa: E402
from model import load_checkpoint  # noqa: E402


def start(command, log):
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(command, log, dice=None, longest=0.0, after=lambda: None):
    """Run a command to its end, killed at random moments if there are dice -> kills. SystemExit when it fails by itself."""
    kills = 0
    while True:
        process = start(command, log)
        try:
            killing = dice is not None and dice.random() < 0.85
            code = process.wait(dice.uniform(0, longest) if killing else 1800)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not killing:
                sys.exit(f"{' '.join(map(str, command))}: hangs, see {log.name}")
            kills += 1
            after()
            continue
        if code != 0:
            sys.exit(f"{' '.join(map(str, command))}: exit code {code}, see {log.name}")
        return kills


def weights(folder):
    checkpoint = load_checkpoint(folder)
    return {f"{part} {name}": tensor.clone() for part in ("model", "ema") for name, tensor in checkpoint[part].items()}


def entries(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "img_per_s"} for line in (folder / "log.jsonl").read_text().splitlines()]


def pictures(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".npy", ".npz")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    dice, until, begun = random.Random(args.seed), time.monotonic() + 60 * args.minutes, time.monotonic()
    found = dict(rounds=0, kills_training=0, kills_sampling=0, steps_done_again=0, rounds_that_differ=0, stray_files=0)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        with open(folder / "log.txt", "w") as log:
            finish(["prep_latents.py", "--toy", 48, "--out", folder / "cache", "--batch-size", 16], log)
            train = lambda out: ["train.py", "--data", folder / "cache", "--run", folder / out, "--model", "T/2", "--steps", args.steps, "--batch-size", 8, "--lr", 5e-4,
                                 "--ckpt-every", 3, "--log-every", 1, "--preview-every", 13]
            sample = lambda run, out: ["sample.py", "--task", "generate", "--num", args.samples, "--classes", "balanced", "--ckpt", folder / run / "latest.pt", "--sampler", "sde",
                                       "--steps", 8, "--batch-size", 4, "--npz", "--out", folder / out]
            clock = time.monotonic()
            finish(train("whole"), log)
            training = time.monotonic() - clock
            clock = time.monotonic()
            finish(sample("whole", "drawn"), log)
            sampling = time.monotonic() - clock
            truth = weights(folder / "whole"), entries(folder / "whole"), pictures(folder / "drawn")
            while time.monotonic() < until:
                name = f"round{found['rounds']}"
                reached = 0

                def after():  # a kill leaves a run that can be read; what was logged after its checkpoint is done again
                    nonlocal reached
                    latest, lines = folder / name / "latest.pt", folder / name / "log.jsonl"
                    kept = load_checkpoint(latest)["step"] if latest.exists() else 0
                    logged = max([json.loads(line)["step"] for line in lines.read_text().splitlines() if line.endswith("}")], default=0) if lines.exists() else 0
                    found["steps_done_again"] += max(0, logged - kept)
                    assert kept >= reached, f"{latest}: step {kept}, it was at {reached}"
                    reached = kept
                found["kills_training"] += finish(train(name), log, dice, training, after)
                found["kills_sampling"] += finish(sample(name, f"{name}_drawn"), log, dice, sampling)
                mine = weights(folder / name), entries(folder / name), pictures(folder / f"{name}_drawn")
                same = mine[0].keys() == truth[0].keys() and all(torch.equal(mine[0][k], truth[0][k]) for k in truth[0]) and mine[1:] == truth[1:]
                found["rounds_that_differ"] += not same
                found["stray_files"] += len([p for out in (name, f"{name}_drawn") for p in (folder / out).rglob(".*")])
                found["rounds"] += 1
                for out in (name, f"{name}_drawn"):
                    subprocess.run(["rm", "-r", str(folder / out)], check=True)
                found.update(minutes=(time.monotonic() - begun) / 60, recipe=dict(command=" ".join(["tests/soak.py", *sys.argv[1:]]), torch=torch.__version__, device="cpu"))
                if args.json:
                    with whole_file(args.json) as file:
                        file.write(json.dumps(found, indent=1).encode())
                print(found, flush=True)


if __name__ == "__main__":
    run(main)
