"""Fixtures: a tiny toy cache and a short run, made once; and a way to call a command as its user does."""
import importlib
import os
import pathlib
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


@pytest.fixture
def command(monkeypatch, capsys):
    """command("train", "--steps", 3) runs train.main() in this process -> what it printed; InputError passes through."""
    def call(module, *argv):
        monkeypatch.setattr(sys, "argv", [f"{module}.py", *map(str, argv)])
        capsys.readouterr()
        importlib.import_module(module).main()
        return capsys.readouterr().out
    return call


def shell(*argv, processes=1, timeout=150, threads=None):
    """The command as a user starts it, under torchrun if there are several processes -> CompletedProcess."""
    start = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"]
    return subprocess.run([*start, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads or 2 // processes)})


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache of 24 toy scenes with alignment targets."""
    out = tmp_path_factory.mktemp("cache") / "toy"
    result = shell("prep_latents.py", "--toy", 24, "--out", out, "--batch-size", 8)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def trained(cache, tmp_path_factory):
    """The folder of an uninterrupted 6-step run on it."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    result = shell("train.py", "--data", cache, "--run", folder, *TRAIN)
    assert result.returncode == 0, result.stderr
    return folder
