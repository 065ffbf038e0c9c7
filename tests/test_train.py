import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import sample
import train
from conftest import ROOT, TRAIN, shell, start
from distributed import InputError
from model import build_model, load_checkpoint

RECORDED = json.loads((pathlib.Path(__file__).parent / "released_objective.json").read_text())


def same_weights(a, b):
    """Largest difference of model and EMA between two checkpoints."""
    a, b = load_checkpoint(a), load_checkpoint(b)
    return max((a[part][k].float() - b[part][k].float()).abs().max().item() for part in ("model", "ema") for k in a[part])


def drawn_model():
    """T/2 on 16x16 latents with every parameter but the positions drawn from N(0, 0.04^2), in name order."""
    model = build_model("T/2", num_classes=12, latent_size=16)
    g = torch.Generator().manual_seed(0)
    for name, p in sorted(model.named_parameters()):
        if name != "pos_embed":
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.04)
    return model


def test_objective_equals_the_released_one():
    """Losses and gradient norms recorded from the released loss and train-loop reduction on this batch."""
    model, g = drawn_model(), torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(8, 16, 16, 16, generator=g) for _ in range(2))
    y, dino = torch.randint(12, (8,), generator=g), torch.randn(8, 64, 768, generator=g)
    t, given, supervised = torch.tensor(RECORDED["t"]), torch.tensor(RECORDED["given"]).bool(), torch.tensor(RECORDED["sup"]).bool()
    x, target = train.interpolate(x0, eps, t, 4)
    v, z = model(x, t, y, given)
    velocity, repa = train.losses(v, target, z, dino, supervised)
    counts = supervised.sum(0)
    total = train.total_loss(torch.cat([velocity, repa[None]]), torch.cat([counts, torch.tensor([8])]), torch.tensor([1.0, 0.2, 0.1, 0.1, 0.5]))
    total.backward()
    assert total.item() == pytest.approx(RECORDED["total"], rel=1e-5)
    assert (velocity / counts).tolist() == pytest.approx(RECORDED["per"], rel=1e-5)
    assert repa.item() / 8 == pytest.approx(RECORDED["repa"], rel=1e-4)  # itself nearly 0 for random features
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert torch.cat([x.flatten() for x in grads.values()]).double().norm().item() == pytest.approx(RECORDED["grad_norm"], rel=1e-5)
    for name, norm in RECORDED["grads"].items():
        assert grads[name].double().norm().item() == pytest.approx(norm, rel=1e-5), name


def test_draws_follow_the_mix():
    modalities, present = ["rgb", "depth", "normal", "seg"], (True,) * 4
    d = train.draw(0, 5, "mmgen", modalities, present, (4000, 16, 1, 1), "cpu")
    role = torch.arange(4000) % 4
    assert not d.given[role < 3].any() and (d.given[role == 3].sum(1) == 1).all()
    assert (d.supervised[role < 2] == torch.tensor([1, 0, 0, 0]).bool()).all()
    assert d.supervised[role == 2][:, 0].all() and d.supervised[role == 2][:, 1:].float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert not (d.supervised & d.given).any()
    assert (d.t[d.given] >= 0.99).all() and d.given[role == 3].float().mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.05)
    shared = d.t[role < 3]
    assert (shared == shared[:, :1]).all() and 0.45 < shared.mean() < 0.55
    assert d.null.float().mean().item() == pytest.approx(0.1, abs=0.02)
    again, other = (train.draw(0, s, "mmgen", modalities, present, (8, 16, 1, 1), "cpu") for s in (5, 6))
    assert not torch.equal(again.noise, other.noise)
    rgb2x = train.draw(0, 0, "rgb2x", modalities, present, (8, 16, 1, 1), "cpu")
    assert (rgb2x.t[:, 0] == 1).all() and (rgb2x.supervised == torch.tensor([0, 1, 1, 1]).bool()).all()
    free = train.draw(0, 0, "independent-t", modalities, present, (8, 16, 1, 1), "cpu")
    assert (free.t[3] != free.t[3, 0])[1:].all()


def test_absent_modalities_are_neither_supervised_nor_given():
    present = (True, False, True, False)
    d = train.draw(0, 0, "no-aug", ["rgb", "depth", "normal", "seg"], present, (400, 16, 1, 1), "cpu")
    assert not d.supervised[:, [1, 3]].any() and not d.given[:, [1, 3]].any() and d.supervised[:, 2].any()


def test_every_epoch_is_a_permutation(cache):
    data = train.Cache(cache, need_dino=False)
    order = data.order(0, 0, 72).reshape(3, 24)
    assert all(sorted(epoch) == list(range(24)) for epoch in order) and (order[0] != order[1]).any()
    assert (train.Cache(cache, False).order(0, 30, 10) == data.order(0, 30, 10)).all()


def test_resume_is_bit_exact(cache, trained, tmp_path, command):
    """6 steps = 3 steps + resume, weights, EMA, optimiser and log."""
    folder = tmp_path / "half"
    shutil.copytree(trained, folder, symlinks=True)
    (folder / "ckpt" / "0000006.pt").unlink()
    (folder / "latest.pt").unlink()
    (folder / "latest.pt").symlink_to("ckpt/0000003.pt")  # as if killed after step 3, with a longer log
    command("train", "--data", cache, "--run", folder, *TRAIN)
    assert same_weights(trained / "latest.pt", folder / "latest.pt") == 0
    strip = lambda f: [{k: v for k, v in json.loads(l).items() if k != "img_per_s"} for l in (f / "log.jsonl").read_text().splitlines()]
    assert strip(trained) == strip(folder)


def test_a_killed_run_continues_to_the_same_weights(cache, trained, tmp_path, command):
    folder = tmp_path / "killed"
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "train.py", "--data", str(cache), "--run", str(folder), *TRAIN], cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (folder / "latest.pt").exists():
            time.sleep(0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)  # just after the first checkpoint
            process.wait()
            break
    command("train", "--data", cache, "--run", folder, *TRAIN)
    assert same_weights(trained / "latest.pt", folder / "latest.pt") == 0
    assert not list(folder.rglob("*.tmp"))


def test_two_processes_train_as_one(cache, tmp_path, command):
    for world in (1, 2):
        arguments = ("--data", cache, "--run", tmp_path / str(world), "--model", "T/2", "--steps", 4, "--batch-size", 8,
                     "--micro-batch", 4, "--precision", "fp32", "--preview-every", 1000)
        if world == 1:
            command("train", *arguments)
        else:
            result = shell("train.py", *arguments, processes=world, torchrun=True)
            assert result.returncode == 0, result.stderr
    assert same_weights(tmp_path / "1" / "latest.pt", tmp_path / "2" / "latest.pt") < 1e-6


def test_a_non_finite_gradient_changes_nothing_and_ten_stop_the_run(cache, tmp_path, command, monkeypatch):
    true_losses, calls = train.losses, []

    def poisoned(v, *rest):
        calls.append(1)
        velocity, repa = true_losses(v, *rest)
        return (velocity * float("nan") if len(calls) == 2 else velocity), repa

    monkeypatch.setattr(train, "losses", poisoned)
    arguments = ("--data", cache, "--model", "T/2", "--batch-size", 8, "--preview-every", 1000)
    command("train", *arguments, "--run", tmp_path / "a", "--steps", 1)
    calls.clear()
    command("train", *arguments, "--run", tmp_path / "b", "--steps", 2, "--log-every", 1)
    assert load_checkpoint(tmp_path / "b" / "latest.pt")["step"] == 2
    a, b = (load_checkpoint(tmp_path / f / "latest.pt") for f in "ab")
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert json.loads((tmp_path / "b" / "log.jsonl").read_text().splitlines()[-1])["skipped"] == 1
    monkeypatch.setattr(train, "losses", lambda *a: tuple(x * float("nan") for x in true_losses(*a)))
    with pytest.raises(InputError, match="non-finite gradients in a row"):
        command("train", *arguments, "--run", tmp_path / "c", "--steps", 12, "--log-every", 12)


def test_training_without_alignment_targets_says_so(cache, tmp_path, command):
    out = command("train", "--data", cache, "--run", tmp_path, "--model", "T/2", "--steps", 1, "--batch-size", 4, "--repa-weight", 0, "--preview-every", 1000)
    assert "training without REPA" in out
    assert not any(k.startswith("projector") for k in load_checkpoint(tmp_path / "latest.pt")["model"])


def test_init_takes_what_fits(trained, cache, tmp_path, command):
    out = command("train", "--data", cache, "--run", tmp_path, "--model", "T/2", "--steps", 1, "--batch-size", 4, "--preview-every", 1000,
                  "--init", trained / "latest.pt", "--modalities", "rgb", "depth", "normal", "seg")
    assert "  new         0  " in out and "  inflated    0  " in out and "  left out    0  " in out


def test_a_preview_is_drawn(cache, tmp_path, command, monkeypatch):
    monkeypatch.setitem(sample.METHODS, "mmgen", sample.METHODS["mmgen"]._replace(preview=dict(sampler="euler", steps=2)))
    command("train", "--data", cache, "--run", tmp_path, "--model", "T/2", "--steps", 1, "--batch-size", 4, "--preview-every", 1)
    assert (tmp_path / "previews" / "0000001.png").stat().st_size > 5000


@pytest.mark.parametrize("change, message", [
    (("--batch-size", "10"), "multiples of 4"),
    (("--batch-size", "2147483648"), "at most 65536"),
    (("--micro-batch", "6"), "multiples of 4"),
    (("--micro-batch", "-4"), "multiples of 4"),
    (("--log-every", "0"), "at least 1"),
    (("--lr", "nan"), "finite"),
    (("--data", "nowhere"), "prep_latents.py --toy"),
    (("--seed", "1"), "seed = 0, this command has 1"),
])
def test_bad_arguments(change, message, cache, trained, command):
    with pytest.raises(InputError, match=message):
        command("train", "--data", cache, "--run", trained, *TRAIN, *change)


def test_an_older_run_goes_on(cache, trained, tmp_path, command):
    """A checkpoint of before the recipe named its method."""
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    path = (tmp_path / "run/latest.pt").resolve()
    assert path.is_relative_to(tmp_path.resolve())
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["config"]["train"].pop("method") == "mmgen"
    torch.save(checkpoint, path)
    assert "6 steps" in command("train", "--data", cache, "--run", tmp_path / "run", *TRAIN)


def test_a_damaged_cache_is_refused(cache, tmp_path, command):
    for stem, message in (("depth", "depth.npy: missing or cut short"), ("done", "not encoded yet")):
        folder = tmp_path / stem
        shutil.copytree(cache, folder)
        if stem == "depth":
            data = (folder / "depth.npy").read_bytes()
            (folder / "depth.npy").write_bytes(data[:len(data) // 2])
        else:
            np.save(folder / "done.npy", np.zeros(24, np.uint8))
        with pytest.raises(InputError, match=message):
            command("train", "--data", folder, "--run", tmp_path / "run", *TRAIN)


def test_seeds_and_steps_give_different_draws():
    d = [train.draw(seed, step, "mmgen", ["rgb"], (True,), (8, 4, 2, 2), "cpu").noise for seed, step in ((0, 5), (1, 5), (0, 6))]
    assert not torch.equal(d[0], d[1]) and not torch.equal(d[0], d[2])


def test_any_number_of_processes_shares_the_batch():
    args = train.argparse.Namespace(batch_size=256, micro_batch=64, steps=1, log_every=1, ckpt_every=1, preview_every=1, lr=1e-4, repa_weight=0.5, seed=0)
    for world in (1, 3, 6, 8, 64):
        parts = [train.split(args, rank, world)[0] for rank in range(world)]
        assert parts[0].start == 0 and parts[-1].stop == 256 and all(a.stop == b.start for a, b in zip(parts, parts[1:]))
        assert all((p.stop - p.start) % 4 == 0 and p.stop > p.start for p in parts)


def test_a_lost_latest_link_is_not_taken_for_a_new_run(cache, trained, tmp_path, command):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder, symlinks=True)
    (folder / "latest.pt").unlink()
    with pytest.raises(InputError, match="points to no checkpoint"):
        command("train", "--data", cache, "--run", folder, *TRAIN)


def test_any_subset_is_given_and_never_all():
    d = [train.draw(0, step, "subset", ["rgb", "depth", "normal", "seg"], (True, True, True, False), (64, 16, 2, 2), "cpu") for step in range(20)]
    given = torch.cat([x.given[3::4] for x in d])
    assert set(given.sum(1).tolist()) == {1, 2} and not given[:, 3].any()  # of three modalities present, one or two
    assert all(0.4 < given[:, m].float().mean() < 0.6 for m in range(3))
    assert not (torch.cat([x.supervised for x in d]) & torch.cat([x.given for x in d])).any()
    before = train.draw(0, 3, "mmgen", ["rgb", "depth"], (True, True), (8, 8, 2, 2), "cpu")
    assert before.given.sum() <= 2


def test_checkpointing_changes_no_gradient():
    gradients, forwards = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_model("T/2", num_classes=12, latent_size=8)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.02) if p.requires_grad else None
        model.train().checkpointing = checkpointing
        passes = []
        model.blocks[3].mlp.register_forward_hook(lambda *_: passes.append(1))
        v, z = model(torch.randn(2, 16, 8, 8), torch.rand(2, 4), torch.tensor([0, 1]), torch.zeros(2, 4, dtype=torch.bool))
        (v.square().mean() + z.mean()).backward()
        forwards.append(len(passes))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*gradients) and forwards == [1, 2]


def test_nodes_that_find_different_checkpoints_stop(cache, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "all_reduce", lambda tensor: tensor + 1)  # another process is further
    with pytest.raises(InputError, match="must share the file system"):
        start("train", "--data", cache, "--run", tmp_path / "r", *TRAIN)
    assert not (tmp_path / "r" / "ckpt").exists()
