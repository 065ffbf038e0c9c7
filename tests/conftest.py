"""Fixtures: a tiny toy cache and a short run, made once; and a way to call a command as its user does."""
import importlib
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TRAIN = ("--model", "T/2", "--steps", "6", "--batch-size", "8", "--ckpt-every", "3", "--log-every", "2", "--preview-every", "1000")


@pytest.fixture(autouse=True, scope="session")
def two_threads():
    os.environ["OMP_NUM_THREADS"] = "2"
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def figure():
    """figure("what", value) prints a measured figure; with FIGURES=FILE in the environment they are all written there."""
    found = {}

    def record(what, value):
        found[what] = value
        print(what, value)
    yield record
    if os.environ.get("FIGURES") and found:
        import json
        pathlib.Path(os.environ["FIGURES"]).write_text(json.dumps({"torch": torch.__version__, **found}, indent=1) + "\n")


def start(module, *argv):
    """start("train", "--steps", 3) runs train.main() in this process; InputError passes through."""
    before, sys.argv = sys.argv, [f"{module}.py", *map(str, argv)]
    try:
        importlib.import_module(module).main()
    finally:
        sys.argv = before


@pytest.fixture
def command(capsys):
    """command("train", "--steps", 3) is start -> what it printed."""
    def call(module, *argv):
        capsys.readouterr()
        start(module, *argv)
        return capsys.readouterr().out
    return call


def shell(*argv, processes=1, torchrun=False, timeout=150, threads=None):
    """The command as a user starts it -> CompletedProcess; of several processes, started as torchrun would, the worst one's."""
    argv, threads = list(map(str, argv)), threads or 2 // processes
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if torchrun or processes == 1:
        python = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"] if torchrun else [sys.executable]
        return subprocess.run([*python, *argv], cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    started = [subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]
    try:
        done = [(*process.communicate(timeout=timeout), process.returncode) for process in started]
    finally:
        [process.kill() for process in started]
    out, err, code = max(done, key=lambda result: result[2] != 0)
    return subprocess.CompletedProcess(argv, code, out, err)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache of 24 toy scenes with alignment targets."""
    out = tmp_path_factory.mktemp("cache") / "toy"
    start("prep_latents", "--toy", 24, "--out", out, "--batch-size", 8)
    return out


@pytest.fixture(scope="session")
def trained(cache, tmp_path_factory):
    """The folder of an uninterrupted 6-step run on it."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    start("train", "--data", cache, "--run", folder, *TRAIN)
    return folder
