"""A run that was interrupted, and what another command may change of it."""
import errno
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch

import distributed
import model
import runs
import train
from conftest import ROOT, TRAIN, gap, start
from distributed import InputError
from small import SMALL
from weights import load_checkpoint


@pytest.fixture
def half(trained, tmp_path):
    """The run as if killed after step 3 of 6, with a longer log -> its folder."""
    folder = tmp_path / "half"
    shutil.copytree(trained, folder, symlinks=True)
    (folder / "ckpt" / "0000006.pt").unlink()
    (folder / "latest.pt").unlink()
    (folder / "latest.pt").symlink_to("ckpt/0000003.pt")
    return folder


def log_of(folder):
    """The lines of log.jsonl, without the time they took."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "img_per_s"} for entry in entries]


def without(folder, part, *keys):
    """Take keys out of config[part] of a run's latest file, as if an older version had written it."""
    path = (folder / "latest.pt").resolve()
    assert path.is_relative_to(folder.resolve())
    checkpoint = torch.load(path, weights_only=True)
    for key in keys:
        del checkpoint["config"][part][key]
    torch.save(checkpoint, path)


# ------------------------------------------------------------------------------------------------
# Going on.

def test_resume_is_bit_exact(cache, trained, half, command):
    """6 steps = 3 steps + resume, weights, EMA, optimiser and log."""
    command("train", "--data", cache, "--run", half, *TRAIN)
    assert gap(trained, half) == 0
    assert log_of(trained) == log_of(half) and [entry["step"] for entry in log_of(half)] == [2, 3, 4, 6]
    theirs, ours = (load_checkpoint(folder)["opt"]["state"] for folder in (trained, half))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[i][key], ours[i][key]) for i in theirs for key in theirs[i])


def test_a_killed_run_continues_to_the_same_weights(cache, trained, tmp_path, command):
    """Killed between the second checkpoint and the link to it."""
    folder = tmp_path / "killed"
    code = "\n".join([
        "import os, sys",
        "sys.path[:0] = ['.', 'tests']",
        "import small, train",
        "link, latest = os.symlink, sys.argv[sys.argv.index('--run') + 1] + '/latest.pt'",
        "os.symlink = lambda *given: (link(*given), os.path.exists(latest) and os.kill(os.getpid(), 9))",
        "train.main()"])
    line = [sys.executable, "-c", code, "--data", str(cache), "--run", str(folder), *TRAIN]
    done = subprocess.run(line, cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL and load_checkpoint(folder)["step"] == 3
    assert list(folder.glob(".*.tmp")) and (folder / "ckpt/0000006.pt").exists()
    command("train", "--data", cache, "--run", folder, *TRAIN)
    assert gap(trained, folder) == 0
    assert not list(folder.rglob(".*"))


def test_another_learning_rate_is_taken_up_and_said(cache, trained, half, command):
    out = command("train", "--data", cache, "--run", half, *TRAIN, "--lr", 1e-12)
    assert "lr 1e-12" in out
    rates = {entry["step"]: entry["lr"] for entry in log_of(half)}
    assert rates == {2: 1e-4, 3: 1e-4, 4: 1e-12, 6: 1e-12}
    assert gap(half, half / "ckpt/0000003.pt", ["model"]) < 1e-9 < gap(trained, half, ["model"])
    checkpoint = load_checkpoint(half)
    assert checkpoint["step"] == 6 and checkpoint["config"]["train"]["lr"] == 1e-12
    assert [group["lr"] for group in checkpoint["opt"]["param_groups"]] == [1e-12]


def tensorboard(monkeypatch):
    """A stand-in for the package -> the list of what its writer is given."""
    events = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            events.append((str(folder), purge_step))

        def add_scalar(self, *event):
            events.append(event)

        def flush(self):
            pass

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return events


def test_what_is_not_the_runs_own_may_change(cache, trained, half, tmp_path, command, monkeypatch):
    """Every flag of runs.FREE, without a change of the weights.

    What shapes the network is compared as the model has it, not as the flags say it.
    """
    changes = {"data": tmp_path / "moved", "run": half, "micro_batch": 8, "log_every": 1, "ckpt_every": 2,
               "preview_every": 999, "init": tmp_path / "gone.pt", "lr": 1e-4, "steps": 6,
               "muon_lr": 0.5, "warmup": 2, "decay_from": 6, "decay_to": 9,
               "rename": "seg=canny", "eval_every": 3, "eval_toy": 2}
    switches = {"compile": "--no-compile", "checkpointing": "--checkpointing",
                "ema_from_init": "--ema-from-init", "tensorboard": "--tensorboard"}
    assert changes.keys() | switches.keys() | {"eval_data"} == set(runs.FREE)
    events = tensorboard(monkeypatch)
    shutil.copytree(cache, tmp_path / "moved")
    flags = [word for name, value in changes.items() for word in (f"--{name.replace('_', '-')}", value)]
    command("train", *TRAIN, *flags, *switches.values(), "--modalities", "seg", "rgb", "normal", "depth")
    assert gap(trained, half) == 0
    assert [entry["step"] for entry in log_of(half)] == [2, 3, 4, 5, 6, 6]
    assert events[0] == (str(half / "tensorboard"), 4) and ("lr", 1e-4, 4) in events
    assert ("miou", log_of(half)[-1]["miou"], 6) in events
    kept = load_checkpoint(half)["config"]["train"]
    assert kept["micro_batch"] == 8 and kept["checkpointing"] and kept["data"] == [str(tmp_path / "moved")]


@pytest.mark.parametrize("change, message", [
    (("--mix", "gen-only"), "mix = mmgen, this command has gen-only"),
    (("--seed", "1"), "seed = 0, this command has 1"),
    (("--precision", "fp32"), "precision = bf16, this command has fp32"),
    (("--batch-size", "4"), "batch_size = 8, this command has 4"),
    (("--repa-weight", "0.25"), "projector = False, this command has True"),
    (("--equal-weights",), "equal_weights = False, this command has True"),
    (("--fusion", "mlp"), "fusion = linear, this command has mlp"),
    (("--no-task-embedding",), "task_embedding = True, this command has False"),
    (("--modalities", "rgb", "depth"), r"modalities = \['rgb', 'depth', 'normal', 'seg'\], this command has"),
])
def test_what_is_the_runs_own_may_not(change, message, cache, trained, command):
    before = (trained / "log.jsonl").read_bytes()
    with pytest.raises(InputError, match=f"latest.pt: was trained with {message}"):
        command("train", "--data", cache, "--run", trained, *TRAIN, *change)
    assert (trained / "log.jsonl").read_bytes() == before


# ------------------------------------------------------------------------------------------------
# Older files.

def test_an_older_run_goes_on_with_the_defaults_of_what_it_does_not_say(cache, trained, half, command):
    """Flags have the parser's defaults, options of the model the network's."""
    without(half, "train", "method", "mix", "precision", "equal_weights", "lr")
    without(half, "train", "blocks", "projector", "middle_weight")
    without(half, "model", "fusion", "task_embedding", "blocks", "projector_kind", "middle_heads")
    without(half, "meta", "space")
    checkpoint = torch.load((half / "latest.pt").resolve(), weights_only=True)
    assert "shown" not in checkpoint["config"]["meta"]  # which means {}
    moved = half.parent / "again"
    shutil.copytree(cache, moved)
    meta = json.loads((moved / "meta.json").read_text())
    (moved / "meta.json").write_text(json.dumps({**meta, "shown": {}}))
    cache = moved
    for change, message in ((("--mix", "gen-only"), "mix = mmgen, this command has gen-only"),
                            (("--precision", "fp32"), "precision = bf16, this command has fp32"),
                            (("--fusion", "mlp"), "fusion = linear, this command has mlp"),
                            (("--blocks", "modern"), "blocks = sit, this command has modern"),
                            (("--projector", "conv"), "projector_kind = mlp, this command has conv"),
                            (("--middle-weight", 1), "middle_heads = False, this command has True")):
        with pytest.raises(InputError, match=f"was trained with {message}"):
            command("train", "--data", cache, "--run", half, *TRAIN, *change)
    command("train", "--data", cache, "--run", half, *TRAIN)
    assert gap(trained, half) == 0
    config = load_checkpoint(half)["config"]  # the next file says it
    assert config["train"]["precision"] == "bf16" and config["model"]["fusion"] == "linear"


def test_a_new_flag_is_one_line(cache, trained, half, command, monkeypatch):
    """In train.add_flags: older runs have its default, whatever its type."""
    original = train.add_flags

    def longer(parser):
        original(parser)
        parser.add_argument("--patience", type=int, default=0)
        parser.add_argument("--teachers", nargs="+", default=("a", "b"))
        parser.add_argument("--beside", type=pathlib.Path, default=pathlib.Path("data/beside"))

    monkeypatch.setattr(train, "add_flags", longer)
    flags = ("--data", cache, "--run", half, *TRAIN)
    for change, message in ((("--patience", 500), "patience = 0, this command has 500"),
                            (("--teachers", "a"), r"teachers = \['a', 'b'\], this command has \['a'\]"),
                            (("--beside", "x"), "beside = data/beside, this command has x")):
        with pytest.raises(InputError, match=f"was trained with {message}"):
            command("train", *flags, *change)
    command("train", *flags, "--teachers", "a", "b")
    assert gap(trained, half) == 0
    kept = load_checkpoint(half)["config"]["train"]
    assert (kept["patience"], kept["teachers"], kept["beside"]) == (0, ["a", "b"], "data/beside")
    command("train", *flags)  # nothing is left to do: what the file says itself is the same


class Gated(model.MMDiT):
    def __init__(self, *args, gated=False, **options):
        super().__init__(*args, **options)


def test_a_new_option_of_the_model_is_a_keyword_with_a_default(cache, trained, half, command, monkeypatch):
    monkeypatch.setattr(model, "MMDiT", Gated)
    monkeypatch.setattr(train.MMGen, "options", {**train.MMGen.options, **runs.options_of(Gated)})
    monkeypatch.setattr(train, "build_model", functools.partial(model.build_model, gated=True))
    with pytest.raises(InputError, match="was trained with gated = False, this command has True"):
        command("train", "--data", cache, "--run", half, *TRAIN)
    monkeypatch.setattr(train, "build_model", functools.partial(model.build_model, gated=False))
    command("train", "--data", cache, "--run", half, *TRAIN)
    assert gap(trained, half) == 0 and load_checkpoint(half)["config"]["model"]["gated"] is False


def test_another_methods_run_is_told_by_its_method(cache, half, command):
    """Though the model and the cache differ too."""
    path = (half / "latest.pt").resolve()
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"]["train"]["method"] = "another"
    checkpoint["config"]["model"]["pair"] = checkpoint["config"]["meta"]["another"] = "pair"
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match="was trained with method = another, this command has mmgen"):
        command("train", "--data", cache, "--run", half, *TRAIN)


def test_a_run_with_what_this_version_has_not_is_refused(cache, half, command):
    path = (half / "latest.pt").resolve()
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"]["train"]["patience"] = 500
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match="patience = 500, which this version does not know"):
        command("train", "--data", cache, "--run", half, *TRAIN)


# ------------------------------------------------------------------------------------------------
# Starting.

def test_init_takes_what_fits(trained, cache, tmp_path, command):
    out = command("train", "--data", cache, "--run", tmp_path, "--model", SMALL, "--steps", 1,
                  "--batch-size", 4, "--preview-every", 1000, "--init", trained / "latest.pt",
                  "--repa-weight", 0, "--modalities", "rgb", "depth", "normal", "seg")
    assert "  new         0  " in out and "  inflated    0  " in out and "  left out    0  " in out


def test_a_lost_latest_link_is_not_taken_for_a_new_run(cache, half, command):
    (half / "latest.pt").unlink()
    for target in (None, "ckpt/0000009.pt"):
        if target:
            (half / "latest.pt").symlink_to(target)
        with pytest.raises(InputError, match="points to no checkpoint"):
            command("train", "--data", cache, "--run", half, *TRAIN)


def test_a_run_goes_on_where_the_file_system_has_no_links(cache, trained, half, command, monkeypatch):
    """latest.pt names the checkpoint, and is a link again where there are links."""
    def refuse(*args, **options):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    flags, latest = ("--data", cache, "--run", half), half / "latest.pt"
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", refuse)
        command("train", *flags, *TRAIN, "--steps", 5)
        assert not latest.is_symlink() and latest.read_text() == "ckpt/0000005.pt\n"
        command("train", *flags, *TRAIN)
        assert latest.read_text() == "ckpt/0000006.pt\n" and load_checkpoint(half)["step"] == 6
    assert gap(trained, half) == 0
    for text, message in (("ckpt/0000009.pt", "points to no checkpoint"), ("/x.pt", "names '/x.pt'")):
        latest.write_text(text)
        with pytest.raises(InputError, match=f"latest.pt: {message}"):
            command("train", *flags, *TRAIN)
    latest.write_text("ckpt/0000005.pt")
    command("train", *flags, *TRAIN)
    assert os.readlink(latest) == "ckpt/0000006.pt" and gap(trained, half) == 0
    assert {path.name for path in half.iterdir()} == {path.name for path in trained.iterdir()}


def test_an_exported_file_is_no_run(cache, trained, tmp_path, command):
    command("weights", "--ckpt", trained, "--export", tmp_path / "run/latest.pt")
    with pytest.raises(InputError, match="no optimiser state.*start a new --run with --init"):
        command("train", "--data", cache, "--run", tmp_path / "run", *TRAIN)


def test_nodes_that_find_different_checkpoints_stop(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "gather", lambda step: [step, step + 1])  # another process is further
    with pytest.raises(InputError, match="must share the folder's file system"):
        start("train", "--data", cache, "--run", tmp_path / "r", *TRAIN)
    assert not (tmp_path / "r" / "ckpt").exists()


# ------------------------------------------------------------------------------------------------
# Another launcher's environment.

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


def surrounded(monkeypatch, **variables):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
        if name in variables:
            monkeypatch.setenv(name, variables[name])


@pytest.mark.parametrize("variables, message", (
    ({"WORLD_SIZE": "2", "RANK": "0"}, "RANK=0 WORLD_SIZE=2 in the .* without MASTER_ADDR and MASTER_PORT"),
    ({"WORLD_SIZE": "2", **ADDRESS}, "WORLD_SIZE=2 .* without RANK: .* unset RANK, WORLD_SIZE and"),
    ({"WORLD_SIZE": "2", "RANK": "", **ADDRESS}, "without RANK"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment: expected a whole number from 1; .*torchrun"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment"),
    ({"RANK": "0.5"}, "RANK=0.5 in the environment: expected a whole number"),
    ({"RANK": "-1"}, "RANK=-1 in the environment"),
    ({"RANK": "1"}, "RANK=1 in the environment: RANK must be below WORLD_SIZE, which is 1"),
    ({"LOCAL_RANK": "gpu0"}, "LOCAL_RANK=gpu0 in the environment"),
    ({"WORLD_SIZE": "2", "RANK": "0", **ADDRESS, "MASTER_PORT": "x"}, "127.0.0.1:x: the .* cannot meet"),
))
def test_another_launchers_variables_are_told(variables, message, monkeypatch):
    surrounded(monkeypatch, **variables)
    with pytest.raises(InputError, match=message) as error:
        distributed.setup()
    assert "torchrun" in str(error.value) and "\n" not in str(error.value)


def test_more_processes_than_gpus_are_told(monkeypatch):
    surrounded(monkeypatch, LOCAL_RANK="3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="LOCAL_RANK=3 in the environment: this machine shows 2 GPUs"):
        distributed.setup()


@pytest.mark.parametrize("variables", ({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"},
                                       {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": " "}))
def test_a_world_of_one_needs_no_launcher(variables, monkeypatch):
    surrounded(monkeypatch, **variables)
    assert distributed.setup()[:2] == (0, 1)


@pytest.mark.parametrize("rank", ("", "x", "0"))
def test_the_line_of_an_error_does_not_depend_on_the_launcher(rank, monkeypatch, capfd):
    def main():
        raise InputError("one line")

    def leave(code):
        raise SystemExit(code)

    surrounded(monkeypatch, RANK=rank)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="2"):
        distributed.run(main)
    assert capfd.readouterr().err.endswith("error: one line\n")
    monkeypatch.setenv("MMGEN_TRACEBACK", "1")
    with pytest.raises(InputError, match="one line"):
        distributed.run(main)


# ------------------------------------------------------------------------------------------------
# Gradients that are not finite.

def test_a_non_finite_gradient_changes_nothing_and_ten_stop_the_run(cache, tmp_path, command, monkeypatch):
    true_error, calls = train.velocity_error, []

    def poisoned(v, *truth):
        calls.append(1)
        error = true_error(v, *truth)
        return error * float("nan") if len(calls) == 2 else error

    def always(v, *truth):
        return true_error(v, *truth) * float("nan")

    flags = ("--data", cache, "--model", SMALL, "--batch-size", 4, "--preview-every", 1000,
             "--repa-weight", 0)
    monkeypatch.setattr(train, "velocity_error", poisoned)
    command("train", *flags, "--run", tmp_path / "a", "--steps", 1)
    calls.clear()
    command("train", *flags, "--run", tmp_path / "b", "--steps", 2, "--log-every", 1)
    a, b = (load_checkpoint(tmp_path / name) for name in "ab")
    assert b["step"] == 2 and len(calls) == 2
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    log = log_of(tmp_path / "b")
    assert [entry["skipped"] for entry in log] == [0, 1] and log[0]["loss_rgb"] > 0
    calls.clear()
    command("train", *flags, "--run", tmp_path / "d", "--steps", 2, "--log-every", 2)
    good = log_of(tmp_path / "d")[0]["grad_norm"]
    assert good == pytest.approx(log[0]["grad_norm"])  # the bad step is not counted
    monkeypatch.setattr(train, "velocity_error", always)
    with pytest.raises(InputError, match="10 non-finite gradients in a row"):
        command("train", *flags, "--run", tmp_path / "c", "--steps", 10)
    assert not (tmp_path / "c/latest.pt").exists()


def test_a_term_without_rows_is_left_out_of_the_log(tmp_path):
    """A loss of 0 is another thing."""
    meter = runs.Meter(3, "cpu")
    for _ in range(2):
        sums, counts = torch.tensor([4.0, 0.0, 2.0]), torch.tensor([8, 0, 4])
        meter.add(sums, counts, norm=torch.tensor(1.0), bad=torch.tensor(0.0))
    means, entry = meter.read(["loss_rgb", "loss_canny", "loss_depth"], 8, tmp_path)
    assert means == {"loss_rgb": 0.5, "loss_depth": 0.5} and entry["grad_norm"] == 1
