"""Fixtures: a tiny toy cache and a short run, made once; and a way to call a command as its user does."""
import contextlib
import gc
import importlib.util
import json
import multiprocessing
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make the tests' time the load's
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import training_flops  # noqa: E402
from small import SMALL, forked  # noqa: E402

gc.set_threshold(100_000, 50, 50)  # what torch imports is walked through less often: 5 % of the time
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["small", "vae", "dataset", "weights", "evaluation", "torch.distributed.run"])
TRAIN = ("--model", SMALL, "--steps", "6", "--batch-size", "8", "--ckpt-every", "3", "--log-every", "2",
         "--preview-every", "1000", "--repa-weight", "0")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """A second one has nothing to do in networks so small; it is for the other half of the tests."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def counted_once():
    """The operations of a configuration are counted once for all runs of it: half a second each."""
    counted = {}

    def flops(config):
        key = json.dumps(config, sort_keys=True)
        if key not in counted:
            counted[key] = training_flops(config)
        return counted[key]
    for script in ("train", "mt_diffusion"):
        importlib.import_module(script).training_flops = flops


@pytest.fixture(scope="session")
def figure():
    """figure("what", value) prints a measured figure; FIGURES=FILE in the environment takes them all, of a
    run of the tests in one process.
    """
    found = {}

    def record(what, value):
        found[what] = value
        print(what, value)
    yield record
    if os.environ.get("FIGURES") and found:
        text = json.dumps({"torch": torch.__version__, **found}, indent=1)
        pathlib.Path(os.environ["FIGURES"]).write_text(text + "\n")


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


@pytest.fixture
def unknown(capsys):
    """unknown("train", "--pair", "label"): the command's parser does not know the flag or its value."""
    def call(module, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            start(module, *argv)
        said = capsys.readouterr().err
        return stopped.value.code == 2 and ("unrecognized arguments" in said or "invalid choice" in said)
    return call


def shell(*argv, processes=1, torchrun=False, timeout=150):
    """The command as a user starts it -> CompletedProcess.

    Of several processes, started as torchrun would, the worst one's.
    """
    argv = list(map(str, argv))
    if not torchrun:
        return _processes(argv, processes, timeout)
    argv = ["tests/small.py", *argv] if SMALL in argv else argv
    launcher = importlib.util.find_spec("torch.distributed.run").origin
    return _processes([launcher, "--standalone", f"--nproc_per_node={processes}", "--", *argv], 1, timeout)


def _free_port():
    """A port that nobody has, below those that the system gives to whoever connects: it stays free."""
    for port in range(20000 + os.getpid() % 10000, 32768):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _processes(argv, world, timeout):
    """The command in `world` processes that find each other -> the worst one's CompletedProcess. They are
    forks of one that has imported what is slow to import.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1",
              "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    started = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in map(str, range(world)):
            files = [f"{folder}/{name}{rank}" for name in ("out", "err")]
            environment = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            process = FORKS.Process(target=forked, args=(str(ROOT), argv, environment, *files))
            process.start()
            started.append((process, files))
        done = []
        for process, files in started:
            process.join(timeout)
            process.kill()
            process.join()
            done.append((process.exitcode, *(pathlib.Path(file).read_text() for file in files)))
    return subprocess.CompletedProcess(argv, *max(done, key=lambda result: result[0] != 0))


def gap(a, b, parts=("model", "ema")):
    """Largest difference of the weights of two checkpoints."""
    from weights import load_checkpoint
    a, b = load_checkpoint(a), load_checkpoint(b)
    differences = [a[part][key].float() - b[part][key].float() for part in parts for key in a[part]]
    return max(x.abs().max().item() for x in differences)


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
