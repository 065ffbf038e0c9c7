"""The objective against the released one, the task mix, the data, and one process against two."""
import argparse
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
import torch

import dataset
import evaluation
import train
from conftest import TRAIN, gap, shell
from distributed import InputError
from mix import RGB_ONLY, ROLES, TASK_MIX, Role, draws_of
from model import build_model
from samplers import Sampling
from small import SMALL
from weights import load_checkpoint

RECORDED = json.loads((pathlib.Path(__file__).parent / "released_objective.json").read_text())
FOUR = ("rgb", "depth", "normal", "seg")


# ------------------------------------------------------------------------------------------------
# The objective.

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
    t = torch.tensor(RECORDED["t"])
    given, supervised = (torch.tensor(RECORDED[name]).bool() for name in ("given", "sup"))
    x, target = train.interpolate(x0, eps, t, 4)
    v, z = model(x, t, y, given)
    velocity = train.velocity_error(v, target, supervised).sum(0)
    repa = train.alignment_error(z, dino).sum(0, keepdim=True)
    counts = supervised.sum(0)
    total = train.total_loss(torch.cat([velocity, repa]), torch.cat([counts, torch.tensor([8])]),
                             torch.tensor([1.0, 0.2, 0.1, 0.1, 0.5]))
    total.backward()
    assert total.item() == pytest.approx(RECORDED["total"], rel=1e-5)
    assert (velocity / counts).tolist() == pytest.approx(RECORDED["per"], rel=1e-5)
    assert repa.item() / 8 == pytest.approx(RECORDED["repa"], rel=1e-4)  # nearly 0 for random features
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    norm = torch.cat([x.flatten() for x in grads.values()]).double().norm()
    assert norm.item() == pytest.approx(RECORDED["grad_norm"], rel=1e-5)
    for name, norm in RECORDED["grads"].items():
        assert grads[name].double().norm().item() == pytest.approx(norm, rel=1e-5), name


def gradient(checkpointing, blocks):
    """The gradient of a drawn model, and how often its second block was run."""
    torch.manual_seed(0)
    model, passes = build_model(SMALL, num_classes=12, latent_size=8, blocks=blocks), []
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.02)
    model.train().checkpointing = checkpointing
    model.blocks[1].mlp.register_forward_hook(lambda *_: passes.append(1))
    v, z = model(torch.randn(2, 16, 8, 8), torch.rand(2, 4), torch.tensor([0, 1]),
                 torch.zeros(2, 4, dtype=torch.bool))
    (v.square().mean() + z.mean()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), len(passes)


@pytest.mark.parametrize("blocks", ("sit", "modern"))
def test_checkpointing_changes_no_gradient(blocks):
    (plain, once), (again, twice) = gradient(False, blocks), gradient(True, blocks)
    assert torch.equal(plain, again) and (once, twice) == (1, 2)


def objective_of(cache, **flags):
    """The command's objective with the small network, drawn weights, in fp32, on 8 rows."""
    parser = argparse.ArgumentParser()
    train.add_flags(parser)
    train.MMGen.add_flags(parser)
    args = parser.parse_args(["--model", SMALL, "--batch-size", "8", "--precision", "fp32"])
    vars(args).update(flags)
    torch.manual_seed(0)
    objective = train.MMGen(args, dataset.Cache(cache), torch.device("cpu"))
    for p in objective.model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.04)
    return objective


def batch_of(objective, cache, part=slice(0, 8)):
    """What `prepare` makes of the cache's first batch."""
    steps, cpu = range(1), torch.device("cpu")
    batch = next(iter(dataset.batches(dataset.Cache(cache), objective.reads, FOUR, 0, steps, 8, part, cpu)))
    return objective.prepare(0, batch, part)


def test_the_middle_heads_have_the_velocities_losses_again(cache):
    """With a share of their weights; micro-batches and processes share them exactly."""
    objective, plain = objective_of(cache, middle_weight=0.25), objective_of(cache)
    assert objective.terms == [*plain.terms, *(f"loss_middle_{m}" for m in FOUR)]
    assert plain.model.middle_heads is None
    assert objective.weights.tolist() == pytest.approx([1, 0.2, 0.1, 0.1, 0.5, 0.25, 0.05, 0.025, 0.025])
    rows, counts = batch_of(objective, cache)
    sums = objective.loss(objective.model, rows)
    v_mid = objective.model(rows["x"], rows["t"], rows["y"], rows["given"], middle=True)[2]
    expected = 0.0
    for m, weight in enumerate([1, 0.2, 0.1, 0.1]):
        error = (v_mid - rows["target"])[:, 4 * m:4 * m + 4].square().mean((1, 2, 3))
        expected += weight * error[rows["supervised"][:, m]].mean().nan_to_num().item()
    assert torch.equal(counts[5:], counts[:4]) and expected > 0.1
    total = train.total_loss(sums, counts, objective.weights)
    rest = train.total_loss(sums[:5], counts[:5], objective.weights[:5])
    assert (total - rest).item() == pytest.approx(0.25 * expected, rel=1e-5)
    micro = [objective.loss(objective.model, {name: x[i:i + 4] for name, x in rows.items()}) for i in (0, 4)]
    assert torch.allclose(sum(micro), sums, rtol=1e-5)
    halves = [batch_of(objective, cache, slice(i, i + 4)) for i in (0, 4)]  # two processes
    assert all(torch.equal(each[1], counts) for each in halves)
    assert torch.allclose(sum(objective.loss(objective.model, each[0]) for each in halves), sums, rtol=1e-5)


def test_repa_is_the_mean_over_the_rows_that_have_targets(cache, monkeypatch):
    monkeypatch.setattr(dataset.Cache, "aligned", lambda self, rows: rows % 2 == 0)
    rows, counts = batch_of(objective_of(cache), cache)
    assert rows["aligned"].tolist() == (dataset.Cache(cache).order(0, 0, 8) % 2 == 0).tolist()
    assert counts[4] == rows["aligned"].sum() < 8


def test_equal_weights(cache):
    assert objective_of(cache, equal_weights=True).weights.tolist() == [1, 1, 1, 1, 0.5]


def test_a_conv_projectors_targets_are_z_scored_over_the_tokens(cache):
    dino = np.random.default_rng(0).integers(-127, 128, (2, 16, 768)).astype(np.int8)
    unit = dino / np.sqrt((dino.astype(float) ** 2).sum(-1, keepdims=True))
    expected = (unit - unit.mean(1, keepdims=True)) / unit.std(1, keepdims=True)
    found = train.spatial(torch.from_numpy(dino))
    assert np.abs(found.numpy() - expected).max() < 1e-3 and not train.spatial(torch.ones(1, 4, 8)).any()
    objective = objective_of(cache, projector="conv")
    plain, rows = (batch_of(each, cache)[0] for each in (objective_of(cache), objective))
    assert torch.equal(rows["dino"], train.spatial(plain["dino"])) and plain["dino"].dtype == torch.int8
    z = objective.model(rows["x"], rows["t"], rows["y"], rows["given"])[1]
    repa = train.alignment_error(z, train.spatial(plain["dino"])).sum()
    assert objective.loss(objective.model, rows)[4].item() == pytest.approx(repa.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------
# The task mix.

def draws(mix, rows, seed=0, step=0, modalities=FOUR, present=None):
    """The Draws of a step, four channels a modality, of one pixel."""
    known = torch.tensor(present or (1,) * len(modalities), dtype=torch.float32).expand(rows, -1)
    return draws_of(seed, step, mix, modalities, known, (rows, 4 * len(modalities), 1, 1))


def test_the_table_of_mixes():
    """Sec. 4.1 and Table 4, role by role."""
    full, given, joint = Role(), Role("random"), Role(drop=0.5)
    assert TASK_MIX["mmgen"] == (RGB_ONLY, RGB_ONLY, joint, Role("random", drop=0.5))
    assert TASK_MIX["gen-only"] == (RGB_ONLY, RGB_ONLY, joint, joint)
    assert TASK_MIX["no-aug"] == (full, full, given, given)
    assert TASK_MIX["no-drop"] == (RGB_ONLY, RGB_ONLY, full, given)
    assert all(TASK_MIX[f"{m}2x"] == (Role(m, clean=1.0),) * 4 for m in FOUR)
    assert TASK_MIX["photo"][1] == Role("rgb", no_class=0.9)


def test_dropped_classes_are_the_null_class(cache):
    y = batch_of(objective_of(cache, mix="photo"), cache)[0]["y"]
    held = dataset.Cache(cache)
    null, labels = draws("photo", 8).null, held.labels[held.order(0, 0, 8)]
    assert null.any() and y.tolist() == np.where(null, 12, labels).tolist()


def test_draws_follow_the_mix():
    d = draws("mmgen", 4000, step=5)
    role = torch.arange(4000) % 4
    assert not d.given[role < 3].any() and (d.given[role == 3].sum(1) == 1).all()
    assert (d.supervised[role < 2] == torch.tensor([1, 0, 0, 0]).bool()).all()
    joint = d.supervised[role == 2]
    assert joint[:, 0].all() and joint[:, 1:].float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert not (d.supervised & d.given).any()
    assert (d.t[d.given] >= 0.99).all()
    assert d.given[role == 3].float().mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.05)
    shared = d.t[role < 3]
    assert (shared == shared[:, :1]).all() and 0.45 < shared.mean() < 0.55
    assert d.null.float().mean().item() == pytest.approx(0.1, abs=0.02)
    again, other = (draws("mmgen", 8, step=step) for step in (5, 6))
    assert not torch.equal(again.noise, other.noise)
    rgb2x = draws("rgb2x", 8)
    assert (rgb2x.t[:, 0] == 1).all()
    assert (rgb2x.supervised == torch.tensor([0, 1, 1, 1]).bool()).all()
    free = draws("independent-t", 8)
    assert (free.t[3] != free.t[3, 0])[1:].all()


def test_absent_modalities_are_neither_supervised_nor_given():
    d = draws("no-aug", 400, present=(True, False, True, False))
    assert not d.supervised[:, [1, 3]].any() and not d.given[:, [1, 3]].any() and d.supervised[:, 2].any()


def test_seeds_and_steps_give_different_draws():
    noise = [draws("mmgen", 8, seed, step, ("rgb",)).noise for seed, step in ((0, 5), (1, 5), (0, 6))]
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])


def test_any_subset_is_given_and_never_all():
    steps = [draws("subset", 64, step=step, present=(True, True, True, False)) for step in range(20)]
    given = torch.cat([d.given[3::4] for d in steps])
    assert set(given.sum(1).tolist()) == {1, 2} and not given[:, 3].any()  # of three present, one or two
    assert all(0.4 < given[:, m].float().mean() < 0.6 for m in range(3))
    assert not any((d.supervised & d.given).any() for d in steps)
    assert draws("mmgen", 8, step=3, modalities=("rgb", "depth")).given.sum() <= 2


# ------------------------------------------------------------------------------------------------
# The data, and its sharing.

def test_every_epoch_is_a_permutation(cache):
    data = dataset.Cache(cache)
    order = data.order(0, 0, 72).reshape(3, 24)
    assert all(sorted(epoch) == list(range(24)) for epoch in order) and (order[0] != order[1]).any()
    assert (dataset.Cache(cache).order(0, 30, 10) == data.order(0, 30, 10)).all()
    assert (order[1, 6:16] == data.order(0, 30, 10)).all() and (data.order(1, 0, 24) != order[0]).any()


def test_a_runs_seed_orders_its_data(cache, tmp_path, command, monkeypatch):
    seeds, batches = [], dataset.batches
    monkeypatch.setattr(dataset, "batches", lambda *given: seeds.append(given[3]) or batches(*given))
    command("train", "--data", cache, "--run", tmp_path, *TRAIN, "--steps", 1, "--seed", 7)
    assert seeds == [7]


def test_a_process_reads_its_rows_of_the_global_batches(cache):
    data, cpu = dataset.Cache(cache), torch.device("cpu")
    read = list(dataset.batches(data, ["rgb", "labels"], ["rgb"], 0, range(2, 5), 8, slice(4, 8), cpu))
    assert len(read) == 3
    for step, batch in zip(range(2, 5), read):
        rows = data.order(0, 8 * step, 8)[4:]
        assert (batch["labels"].numpy() == data.array("labels")[rows]).all()
        assert (batch["rgb"].numpy() == data.array("rgb")[rows]).all()


def test_any_number_of_processes_shares_the_batch():
    for world in (1, 3, 6, 8, 64):
        parts = [dataset.part_of(256, 64, rank, world, ROLES) for rank in range(world)]
        assert parts[0].start == 0 and parts[-1].stop == 256
        assert all(a.stop == b.start for a, b in zip(parts, parts[1:]))
        assert all((p.stop - p.start) % 4 == 0 and p.stop > p.start for p in parts)
    with pytest.raises(InputError, match="--batch-size 256 on 65 processes"):
        dataset.part_of(256, 64, 0, 65, ROLES)


def test_a_damaged_cache_is_refused(cache, tmp_path, command):
    for stem, message in (("depth", "depth.npy: not readable"), ("done", "not encoded yet")):
        folder = tmp_path / stem
        shutil.copytree(cache, folder)
        if stem == "depth":
            data = (folder / "depth.npy").read_bytes()
            (folder / "depth.npy").write_bytes(data[:len(data) // 2])
        else:
            np.save(folder / "done.npy", np.zeros(24, np.uint8))
        with pytest.raises(InputError, match=message):
            command("train", "--data", folder, "--run", tmp_path / "run", *TRAIN)
    (tmp_path / "done/depth.npy").unlink()
    np.save(tmp_path / "done/done.npy", np.ones(24, np.uint8))
    with pytest.raises(InputError, match="depth.npy: no such file"):
        command("train", "--data", tmp_path / "done", "--run", tmp_path / "run", *TRAIN)
    meta = json.loads((tmp_path / "done/meta.json").read_text())
    for key, value in (("modalities", [[1]]), ("latent_size", 8), ("grid", None)):
        (tmp_path / "done/meta.json").write_text(json.dumps({**meta, key: value}))
        with pytest.raises(InputError, match="meta.json: not readable .*run prep_latents.py again"):
            command("train", "--data", tmp_path / "done", "--run", tmp_path / "run", *TRAIN)


# ------------------------------------------------------------------------------------------------
# The command.

def scores_of(run):
    """The lines of log.jsonl that have scores."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "abs_rel" in entry]


def test_two_processes_train_as_one(cache, tmp_path, command):
    """Both of Muon's and AdamW's weights; two go on from what one has begun."""
    flags = ("--data", cache, "--model", SMALL, "--steps", 4, "--batch-size", 8, "--micro-batch", 4,
             "--precision", "fp32", "--preview-every", 1000, "--eval-every", 4, "--eval-toy", 2,
             "--optimiser", "muon")
    command("train", *flags, "--run", tmp_path / "1")
    command("train", *flags, "--steps", 2, "--run", tmp_path / "2")
    result = shell("train.py", *flags, "--run", tmp_path / "2", processes=2)
    assert result.returncode == 0, result.stderr
    assert gap(tmp_path / "1", tmp_path / "2") < 1e-6
    one, two = scores_of(tmp_path / "1")[0], scores_of(tmp_path / "2")[0]
    assert {"normal_mean", "miou", "class"} <= one.keys() == two.keys()
    assert all(one[key] == pytest.approx(two[key], rel=1e-3) for key in one.keys() - {"eval_s"})


def test_a_run_scores_itself_and_trains_to_the_same_bits(cache, trained, tmp_path, command, monkeypatch):
    """--eval-every says what eval_depth.py would, and leaves weights and averages as they are."""
    monkeypatch.setattr(train, "Sampling", lambda sampler, steps: Sampling(sampler, 2))
    flags = ("--data", cache, *TRAIN, "--eval-every", 3)
    command("train", *flags, "--eval-toy", 3, "--run", tmp_path / "run")
    assert gap(trained, tmp_path / "run") == 0
    scores = scores_of(tmp_path / "run")
    assert [entry["step"] for entry in scores] == [3, 6] and 0 <= scores[1]["class"] <= 1
    monkeypatch.setattr(evaluation, "GUESSED", 10)
    command("eval_depth", "--toy", 3, "--ckpt", tmp_path / "run", "--sampler", "euler", "--steps", 2,
            "--out", tmp_path / "o", "--json", tmp_path / "j.json")
    said = json.loads((tmp_path / "j.json").read_text())
    shared = scores[1].keys() & said.keys()
    assert {"abs_rel", "normal_mean", "miou"} <= shared
    assert all(scores[1][key] == said[key] for key in shared)
    assert (tmp_path / "run/previews/0000006_eval.png").stat().st_size > 5000
    command("toy_scenes", "--num", 2, "--out", tmp_path / "scenes")
    command("train", *flags, "--eval-data", tmp_path / "scenes", "--run", tmp_path / "tree")
    assert {"abs_rel", "normal_mean", "miou"} <= scores_of(tmp_path / "tree")[1].keys()


def test_what_cannot_be_scored_or_logged_ends_a_run_before_it_begins(cache, tmp_path, command, monkeypatch):
    command("toy_scenes", "--num", 2, "--out", tmp_path / "scenes")
    next((tmp_path / "scenes/depth").rglob("*.png")).write_bytes(b"junk")
    flags = ("--data", cache, *TRAIN, "--run", tmp_path / "run")
    with pytest.raises(InputError, match="scenes/depth/.*not readable"):
        command("train", *flags, "--eval-every", 3, "--eval-data", tmp_path / "scenes")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="--tensorboard: .*; pip install tensorboard"):
        command("train", *flags, "--tensorboard")
    assert not (tmp_path / "run/args.json").exists() and not (tmp_path / "run/ckpt").exists()
    with pytest.raises(InputError, match="--mix rgb: is of RGB alone; add --modalities rgb"):
        command("train", *flags, "--mix", "rgb")


def test_the_default_mix_trains_rgb_alone(cache, tmp_path, command):
    """A condition that would leave nothing to supervise makes the row a joint one."""
    draws = draws_of(0, 0, "mmgen", ["rgb"], torch.ones(8, 1), (8, 4, 16, 16))
    assert draws.supervised.all() and not draws.given.any()
    command("train", "--data", cache, "--run", tmp_path, *TRAIN, "--steps", 1, "--modalities", "rgb",
            "--mix", "rgb")
    assert load_checkpoint(tmp_path)["config"]["model"]["modalities"] == ["rgb"]
    for line in (("sample", "--task", "understand", "--out", tmp_path / "o"),
                 ("eval_depth", "--toy", 1, "--out", tmp_path / "e")):
        with pytest.raises(InputError, match="would predict nothing|predicts nothing of RGB"):
            command(*line, "--ckpt", tmp_path)


def test_an_average_goes_on_at_the_files_step(cache, trained, tmp_path, command):
    """--ema-from-init: what is taken keeps its rate, what is new or inflated counts from 0."""
    flags = ("--data", cache, *TRAIN, "--steps", 1, "--init", trained, "--ema-from-init", "--modalities",
             "rgb", "depth", "normal")
    command("train", *flags, "--run", tmp_path / "run")
    before, after = load_checkpoint(trained), load_checkpoint(tmp_path / "run")
    for name, rate in (("blocks.0.mlp.fc1.weight", 7 / 16), ("x_embedder.proj.weight", 1 / 10)):
        old, new = (x[name][:, :12] if "proj" in name else x[name]
                    for x in (before["ema"], after["model"]))
        assert torch.allclose(after["ema"][name], rate * old + (1 - rate) * new, atol=1e-7), name
    assert after["ages"]["heads.0.linear.weight"] == 6 and "x_embedder.proj.weight" not in after["ages"]
    command("train", *flags, "--run", tmp_path / "run", "--steps", 2)
    assert load_checkpoint(tmp_path / "run")["ages"] == after["ages"]


def test_training_without_alignment_targets_says_so(cache, tmp_path, command):
    out = command("train", "--data", cache, "--run", tmp_path, "--model", SMALL, "--steps", 1,
                  "--batch-size", 4, "--repa-weight", 0, "--preview-every", 1000)
    assert "training without REPA" in out
    assert not any(key.startswith("projector") for key in load_checkpoint(tmp_path)["model"])


def test_a_preview_is_drawn_where_the_autoencoder_is(cache, tmp_path, command, monkeypatch):
    monkeypatch.setattr(train, "Sampling", lambda sampler, steps: Sampling(sampler, 2))
    flags = ("--model", SMALL, "--steps", 1, "--batch-size", 4, "--preview-every", 1)
    command("train", *flags, "--data", cache, "--run", tmp_path / "with")
    assert (tmp_path / "with/previews/0000001.png").stat().st_size > 5000
    shutil.copytree(cache, tmp_path / "cache")
    meta = json.loads((cache / "meta.json").read_text())
    (tmp_path / "cache/meta.json").write_text(json.dumps({**meta, "vae": "gone.safetensors"}))
    out = command("train", *flags, "--data", tmp_path / "cache", "--run", tmp_path / "without")
    assert "no preview: --vae gone.safetensors: no such file" in out
    assert (tmp_path / "without/latest.pt").exists()


def test_a_look_is_taken_before_its_steps_checkpoint(cache, tmp_path, command, monkeypatch):
    """A run that is killed in it takes it again; one that fails in it has lost no steps."""
    def look(watch, network, step):
        there.append((tmp_path / "run/latest.pt").exists())
        raise InputError("no look")

    there = []
    monkeypatch.setattr(evaluation.Watch, "look", look)
    with pytest.raises(InputError, match="no look"):
        command("train", "--data", cache, "--run", tmp_path / "run", *TRAIN, "--steps", 1)
    assert there == [False] and load_checkpoint(tmp_path / "run")["step"] == 1


@pytest.mark.parametrize("change, message", [
    (("--batch-size", "10"), "--batch-size 10 .* multiple of 4"),
    (("--batch-size", "2147483648"), "at most 65536"),
    (("--micro-batch", "6"), "--micro-batch 6: must be a multiple of 4"),
    (("--micro-batch", "-4"), "--micro-batch -4: must be a multiple of 4"),
    (("--log-every", "0"), "at least 1"),
    (("--eval-every", "2"), "--eval-every N goes with --eval-toy K or --eval-data TREE"),
    (("--eval-toy", "2"), "--eval-every N goes with"),
    (("--eval-every", "2", "--eval-toy", "-3"), "--eval-toy -3: must be at least 1"),
    (("--rename", "seg=canny"), "--rename: belongs to --init"),
    (("--eval-every", "-5"), "--eval-every -5: must be at least 0"),
    (("--lr", "nan"), r"must lie in \[1e-12, 1000\]"),
    (("--repa-weight", "nan"), r"must lie in \[0, 1000\]"),
    (("--middle-weight", "-1"), r"--middle-weight -1.0: must lie in \[0, 1000\]"),
    (("--data", "nowhere"), "prep_latents.py --toy"),
])
def test_bad_arguments(change, message, cache, trained, command):
    with pytest.raises(InputError, match=message):
        command("train", "--data", cache, "--run", trained, *TRAIN, *change)


def test_flags_of_another_method_are_unknown(cache, tmp_path, unknown):
    assert unknown("train", "--data", cache, "--run", tmp_path, *TRAIN, "--agg", "revert")


def test_a_run_of_all_options_goes_on_and_is_sampled(cache, tmp_path, command):
    flags = ("--data", cache, "--model", SMALL, "--batch-size", 8, "--log-every", 1, "--preview-every", 1000,
             "--blocks", "modern", "--projector", "conv", "--middle-weight", 0.5)
    for steps in (1, 2):
        command("train", *flags, "--run", tmp_path / "run", "--steps", steps)
    entries = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(entry["loss_middle_depth"] > 0 and -1 <= entry["loss_repa"] <= 1 for entry in entries)
    with pytest.raises(InputError, match="middle_weight = 0.5, this command has 0.25"):
        command("train", *flags, "--run", tmp_path / "run", "--steps", 3, "--middle-weight", 0.25)
    command("weights", "--ckpt", tmp_path / "run", "--export", tmp_path / "small.pt")
    draw_one = ("--task", "generate", "--ckpt", tmp_path / "small.pt", "--sampler", "euler", "--steps", 1,
                "--class-id", 1, "--out", tmp_path / "out")
    command("sample", *draw_one)
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta.pop("middle_scale") == 1.0
    (tmp_path / "out/meta.json").write_text(json.dumps(meta))  # as an older version wrote it
    with pytest.raises(InputError, match="middle_scale was 1.0, is 1.4"):
        command("sample", *draw_one, "--middle-scale", 1.4)
    command("sample", *draw_one, "--middle-scale", 1.4, "--overwrite")
    assert json.loads((tmp_path / "out/meta.json").read_text())["middle_scale"] == 1.4
