"""Unknown pixels and missing modalities: what the cache keeps of them, what a step makes of them."""
import argparse
import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import mixture
import mt_diffusion
import train
from conftest import gap
from distributed import InputError
from mix import draws_of
from small import SMALL
from toy_scenes import HELD_OUT, render

FOUR = ("rgb", "depth", "normal", "seg")
CPU = torch.device("cpu")


def write_tree(root, count, holes=(), modalities=("rgb", "depth")):
    """Scenes of 32 px in millimetres; holes {row: (rows, columns)}, where the depth is unknown."""
    for i in range(count):
        scene = render(HELD_OUT + 900 + i, 32)
        depth = (scene.depth * 1000).astype(np.uint16)
        if i in dict(holes):
            depth[dict(holes)[i]] = 0
        for m, values in (("rgb", scene.rgb), ("depth", depth)):
            if m in modalities:
                (root / m / "a").mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(root / m / "a" / f"{i}.png")
    (root / "tree.json").write_text(json.dumps({"format": "mmgen-tree-1", "depth_space": "depth"}))
    return root


HOLES = {1: np.s_[:13, :], 2: np.s_[:17, :], 3: np.s_[1:, :]}  # rows of 3 and 5 cells; all but a line


def prepare(command, tree, out, *flags):
    return command("prep_latents", "--data", tree, "--out", out, "--vae", "toy", "--size", 32, "--no-dino",
                   "--batch-size", 4, *flags)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from conftest import start
    root, found = tmp_path_factory.mktemp("unknown"), {}
    for name, holes, modalities in (("holes", HOLES, ("rgb", "depth")), ("whole", {}, ("rgb", "depth")),
                                    ("photos", {}, ("rgb",))):
        tree, found[name] = write_tree(root / name, 8, holes, modalities), root / f"{name}-cache"
        start("prep_latents", "--data", tree, "--out", found[name], "--vae", "toy", "--size", 32, "--no-dino",
              "--batch-size", 4)
    return found


def objective_of(cache, kind=train.MMGen, flags=()):
    parser = argparse.ArgumentParser()
    train.add_flags(parser)
    kind.add_flags(parser)
    args = parser.parse_args(["--model", SMALL, "--batch-size", "8", "--precision", "fp32", *flags])
    torch.manual_seed(0)
    objective = kind(args, cache, CPU)
    for p in objective.model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.04)
    return objective


def rows_of(objective, cache, step=0):
    steps, part = range(step, step + 1), slice(0, 8)
    read = dataset.batches(cache, objective.reads, objective.modalities, 0, steps, 8, part, CPU)
    return objective.prepare(step, next(iter(read)), part)


def test_a_cell_is_known_where_half_of_its_pixels_are():
    known = np.zeros((2, 8, 12), bool)
    known[0, :2, :4], known[1, :1, 4:8], known[1, 4:, 8:11] = True, True, True  # 8, 4 and 12 of 16
    bits = dataset.known_cells(known, 4)
    cells = dataset.cells_of(torch.from_numpy(bits), (2, 3))
    expected = [[[1, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 1]]]
    assert bits.shape == (2, 1) and cells.int().tolist() == expected


def test_a_cache_keeps_what_is_known(folders, command, tmp_path):
    """And says so only where something is not; a second call and --verify find nothing to do."""
    cache = dataset.Cache(folders["holes"])
    assert [stem for stem in cache.stems if "known" in stem] == ["depth_known"]
    cells = dataset.cells_of(torch.from_numpy(np.array(cache.array("depth_known"))), (8, 8))
    lines = cells.all(2).sum(1).tolist()
    assert lines == [8, 5, 4, 0, 8, 8, 8, 8] and cells.flatten(1).sum(1).tolist() == [8 * n for n in lines]
    assert cache.known("depth").tolist() == [n / 8 for n in lines] and (cache.known("rgb") == 1).all()
    assert not list(folders["whole"].glob("*_known.npy"))
    tree = folders["holes"].parent / "holes"
    assert "largest difference 0" in prepare(command, tree, folders["holes"], "--verify")
    said = prepare(command, tree, folders["holes"])
    assert "depth: 76.6% of the cells are known; 7 of 8 rows have it, 7 may be given it" in said
    assert len(dataset.Cache(folders["holes"]).stems) == len(cache.stems)


def test_nothing_unknown_trains_as_without_masks(folders, command, tmp_path):
    """A cache without masks, and one that says of each cell that it is known."""
    flags = ("--data", folders["whole"], "--model", SMALL, "--steps", 3, "--batch-size", 8,
             "--preview-every", 99, "--repa-weight", 0, "--precision", "fp32")
    path = folders["whole"] / "depth_known.npy"
    np.save(path, np.full((8, 8), 255, np.uint8))
    try:
        command("train", *flags, "--run", tmp_path / "a")
    finally:
        path.unlink()
    command("train", *flags, "--run", tmp_path / "b")
    assert gap(tmp_path / "a/latest.pt", tmp_path / "b/latest.pt") < 1e-6


def test_unknown_cells_have_no_loss_and_no_gradient(folders):
    """The loss is the mean over the known ones, by hand; NaN behind a mask stays there."""
    cache = dataset.Cache(folders["holes"])
    objective = objective_of(cache, flags=["--mix", "no-aug"])
    rows, counts = rows_of(objective, cache)
    v = torch.randn(8, 8, 8, 8, requires_grad=True)
    truth = rows["target"], rows["supervised"], rows["cells"]
    sums = train.velocity_error(v, *truth).sum(0)
    sums.sum().backward()
    v4, target = (x.detach().unflatten(1, (2, 4)) for x in (v, rows["target"]))
    expected, has = 0.0, rows["supervised"][:, 1]
    for i in has.nonzero()[:, 0].tolist():
        error = (v4 - target)[i, 1][:, rows["cells"][i, 1]]
        expected += error.square().mean().item()
    assert sums[1].item() == pytest.approx(expected, rel=1e-5) and counts[1] == has.sum() > 2
    gradient = v.grad.unflatten(1, (2, 4))[:, 1]
    unknown = ~rows["cells"][:, 1, None].expand_as(gradient)
    assert unknown.any() and (gradient[unknown] == 0).all()
    seen = has[:, None, None, None] & ~unknown
    assert (gradient[seen] != 0).all()
    poisoned = torch.where(unknown, float("nan"), v4[:, 1])
    again = train.velocity_error(torch.cat([v.detach()[:, :4], poisoned], 1), *truth).sum(0)
    assert torch.allclose(again, sums)
    v.grad = None
    objective.loss(functools.partial(answer, (v, None)), rows).sum().backward()
    scored = (rows["cells"] & rows["supervised"][..., None, None]).repeat_interleave(4, 1)
    assert ((v.grad != 0) == scored).all()


def test_a_row_without_a_map_has_noise_in_its_place(folders):
    """Its own t = 0; never given, never supervised; the loss of a modality that no row has is 0."""
    known = torch.tensor([[1.0, 0.0, 0.6, 0.3]]).expand(400, 4)
    d = draws_of(0, 1, "no-aug", FOUR, known, (400, 16, 2, 2))
    assert (d.t[:, 1] == 0).all() and not d.given[:, [1, 3]].any() and not d.supervised[:, 1].any()
    assert d.supervised[:, 3].all() and (d.t[:, 3] > 0).any()
    shares = d.given[torch.arange(400) % 4 > 1].float().mean(0).tolist()  # a random one of the two
    assert shares == pytest.approx([0.5, 0, 0.5, 0], abs=0.1)
    alone = draws_of(0, 1, "photo", ("rgb", "depth"), torch.tensor([[1.0, 0.0]]).expand(8, 2), (8, 8, 2, 2))
    assert not alone.given.any() and alone.supervised[:, 0].all()  # nothing to supervise: joint rows
    cache = mixture.Mixture([dataset.Cache(folders["photos"]), dataset.Cache(folders["whole"])], [1, 1e-9])
    objective = objective_of(cache, flags=["--mix", "no-aug"])
    rows, counts = rows_of(objective, cache)
    sums = objective.loss(objective.model, rows)
    noise = draws_of(0, 0, "no-aug", ("rgb", "depth"), torch.ones(8, 2), (8, 8, 8, 8)).noise
    assert torch.equal(rows["x"][:, 4:], noise[:, 4:])
    assert counts[1] == 0 and sums[1] == 0 and sums[0] > 0
    train.total_loss(sums, counts, objective.weights).backward()
    assert all(torch.isfinite(p.grad).all() for p in objective.model.parameters() if p.grad is not None)


def answer(answers, *_, **__):
    """A network that gives these, whatever it is shown."""
    return answers


def test_mt_diffusion_leaves_unknown_cells_out(folders):
    cache = dataset.Cache(folders["holes"])
    for pair, name in ((["rgb", "depth"], "cells"), (["depth", "rgb"], "x_cells")):
        objective = objective_of(cache, mt_diffusion.Objective, ["--pair", *pair])
        rows, counts = rows_of(objective, cache)
        first = dataset.cells_of(torch.from_numpy(cache.array("depth_known")[cache.order(0, 0, 8)]), (8, 8))
        assert torch.equal(rows[name], first)
        bare = (~first).all(2).all(1)
        assert bare.sum() == 1 and (counts[0] == 7 if name == "cells" else rows["alone"][bare].all())
        v = torch.randn(8, 4, 8, 8, requires_grad=True)
        mt_diffusion.mean_square(v, rows[name]).sum().backward()
        gradient = v.grad.transpose(0, 1)
        assert (gradient[:, ~first] == 0).all() and (gradient[:, first] != 0).all()
        assert torch.isfinite(objective.loss(objective.model, rows)).all()
        eps, x = (torch.randn(8, 4, 8, 8, requires_grad=True) for _ in range(2))
        objective.loss(functools.partial(answer, (eps, x)), rows).sum().backward()
        assert torch.equal((eps if name == "cells" else x).grad.any(1), rows[name])


def test_mt_diffusion_is_shown_an_x_that_is_half_known(folders):
    cache = dataset.Cache(folders["holes"])
    objective = objective_of(cache, mt_diffusion.Objective, ["--pair", "depth", "rgb", "--hidden", "0"])
    batch = cache.gather(np.arange(8), objective.reads)
    batch["known"] = torch.tensor([[1, 0.3], [1, 0.5]] * 4)
    rows, counts = objective.prepare(0, batch, slice(0, 8))
    assert rows["seen"].tolist() == [False, True] * 4 and torch.equal(rows["alone"], ~rows["seen"])
    assert counts[1] == 4


# ------------------------------------------------------------------------------------------------
# Several caches.

def test_several_caches_train_as_one(folders, command, tmp_path):
    """The same samples wherever one begins; each cache's own permutation; by weight; resumed bit for bit."""
    data = [dataset.Cache(folders[name]) for name in ("holes", "photos")]
    cache = mixture.Mixture(data, [3, 1])
    rows = cache.order(0, 0, 3000)
    assert (cache.order(0, 1500, 20) == rows[1500:1520]).all() and (rows != cache.order(1, 0, 3000)).any()
    assert (rows[:, 0] == 0).mean() == pytest.approx(0.75, abs=0.03)
    for i, each in enumerate(data):
        mine = rows[rows[:, 0] == i, 1]
        assert (mine == each.order(0, 0, len(mine))).all()
    flags = ("--data", folders["holes"], folders["photos"], "--weights", 3, 1, "--model", SMALL,
             "--batch-size", 8, "--ckpt-every", 2, "--repa-weight", 0, "--mix", "photo")
    command("train", *flags, "--steps", 4, "--run", tmp_path / "a", "--preview-every", 4)
    command("train", *flags, "--steps", 2, "--run", tmp_path / "b")
    command("train", *flags, "--steps", 4, "--run", tmp_path / "b")
    assert gap(tmp_path / "a/latest.pt", tmp_path / "b/latest.pt") == 0


def test_a_caches_weight_is_its_number_of_rows(folders):
    a, b = (dataset.Cache(folders[name]) for name in ("holes", "whole"))
    a.rows = a.rows[:2]
    assert mixture.Mixture([a, b]).weights.tolist() == [0.2, 0.8]


@pytest.mark.parametrize("key", ("teacher", "palette", "seg_mode"))
def test_caches_that_speak_otherwise_are_not_united(folders, key):
    meta = {**dataset.Cache(folders["holes"]).meta, "modalities": ["rgb", "seg"], "teacher": None}
    a, b = ({**meta, key: value} for value in ("x", "y"))
    with pytest.raises(InputError, match=f"{key} differs"):
        mixture._united([a, b], ["a", "b"], ("rgb",))


def test_the_classes_of_several_caches_are_united(folders, cache, tmp_path):
    a, b = (dataset.Cache(folders[name]) for name in ("holes", "photos"))
    a.meta.update(class_names=["cat", "dog"], num_classes=2)
    b.meta.update(class_names=["dog", "emu"], num_classes=2)
    a._arrays["labels"], b._arrays["labels"] = np.arange(8) % 3, np.arange(8) % 3  # 2: none
    both = mixture.Mixture([a, b])
    assert both.meta["class_names"] == ["cat", "dog", "emu"]
    rows = np.array([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])
    found = both.gather(rows, ["labels", "depth", "depth_known"])
    assert found["labels"].tolist() == [0, 1, 3, 1, 2, 3]
    assert (found["depth"][3:] == 0).all() and (found["depth_known"][3:] == 255).all()
    assert both.known_of(rows, ["rgb", "depth"]).tolist() == [[1, 1], [1, 5 / 8], [1, 4 / 8], *[[1, 0]] * 3]
    with pytest.raises(InputError, match="latent_size is .*; caches that train together must be alike"):
        mixture.Mixture([a, dataset.Cache(cache)])
    a.meta.pop("shown")  # an older one
    with pytest.raises(InputError, match="shown is --depth-over picture .*has --depth-over crop"):
        mixture.Mixture([a, b])
    b.meta.pop("shown")
    with pytest.raises(InputError, match="--weights: 3 of them, --data has 2 caches"):
        mixture.Mixture([a, b], [1, 2, 3])
    with pytest.raises(InputError, match="--weights: of several caches"):
        mixture.open_caches([folders["holes"]], [1.0])
