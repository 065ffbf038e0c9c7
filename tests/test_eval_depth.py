"""eval_depth.py against closed forms, and whole commands on synthetic truth."""
import json
import os
import pathlib
import tempfile
import types

import numpy as np
import pytest
import torch
from PIL import Image

import eval_depth
import evaluation
import samplers
import toy_scenes
from conftest import shell
from distributed import InputError
from evaluation import Ceiling, Toy, Tree, evaluate, mean_of
from images import segments
from metrics import (Depth, Normal, Rules, Semantic, align, angles, boundary, depth_scores, f_score,
                     instance_scores, matches, metrics_of, normal_scores, results, semantic_scores)
from modalities import MODALITIES, Disparity, Raster, Scalar, Shown, write_facts
from model import build_model
from small import SMALL
from trees import facts_of
from vae import Pixels
from weights import DEMO, load_checkpoint

RNG = np.random.default_rng(0)
DEPTH = RNG.uniform(0.5, 8, (40, 50))
VALID = RNG.random((40, 50)) > 0.2
FEW = ("--ckpt", DEMO / "mmgen.pt", "--sampler", "euler", "--steps", 1)


# ------------------------------------------------------------------------------------------------
# Depth.

@pytest.mark.parametrize("space, target", (("disparity", 1 / DEPTH), ("depth", DEPTH), ("log", np.log(DEPTH)),
                                           ("log", -np.log(DEPTH))))
def test_an_affine_prediction_is_perfect(space, target):
    aligned = align((target - 0.3) / 1.7, DEPTH, VALID, space)
    scores = depth_scores(aligned, DEPTH, VALID)
    assert scores["abs_rel"] < 1e-6 and scores["rmse"] < 1e-6 and scores["delta1"] == 1


def test_the_wrong_space_shows():
    wrong = depth_scores(align(1 / DEPTH, DEPTH, VALID, "depth"), DEPTH, VALID)
    assert wrong["abs_rel"] > 0.1


@pytest.mark.parametrize("space, want", (("disparity", 1 / np.mean(1 / DEPTH[VALID])),
                                         ("depth", DEPTH[VALID].mean()),
                                         ("log", np.exp(np.log(DEPTH[VALID]).mean()))))
def test_a_constant_prediction_gets_the_best_constant(space, want):
    aligned = align(np.full_like(DEPTH, 0.7), DEPTH, VALID, space)
    assert np.allclose(aligned, want)


def test_log_is_fitted_by_least_squares():
    """Scale and shift, read off where the prediction is 0 and 1, are lstsq's; what overflows is clipped."""
    noisy = -0.4 * np.log(DEPTH) + 2 + np.random.default_rng(1).normal(0, 0.1, DEPTH.shape)
    hidden = np.argwhere(~VALID)[:3]
    for (y, x), value in zip(hidden, (0.0, 1.0, -1e6)):  # not scored, mapped all the same
        noisy[y, x] = value
    aligned = align(noisy, DEPTH, VALID, "log")
    columns = np.stack([noisy[VALID], np.ones(VALID.sum())], 1)
    scale, shift = np.linalg.lstsq(columns, np.log(DEPTH[VALID]), rcond=None)[0]
    zero, one, huge = aligned[tuple(hidden.T)]
    assert scale < 0 and np.log(zero) == pytest.approx(shift) and np.log(one / zero) == pytest.approx(scale)
    assert np.isfinite(huge) and huge > 1e300
    metric = metrics_of(["depth"], Rules("log", (0.4, 9.0)))["depth"]
    assert metric.aligned(DEPTH, noisy, VALID).max() == 9


def test_depth_scores_by_hand():
    guess, truth = np.array([[1.0, 2.0, 4.0]]), np.array([[1.0, 2.6, 3.5]])
    scores = depth_scores(guess, truth, truth > 0)
    assert scores["abs_rel"] == pytest.approx((0.6 / 2.6 + 0.5 / 3.5) / 3)
    assert scores["rmse"] == pytest.approx(np.sqrt((0.36 + 0.25) / 3))
    assert scores["delta1"] == pytest.approx(2 / 3) and scores["delta2"] == 1


# ------------------------------------------------------------------------------------------------
# Normals.

def test_normals_rotated_by_ten_degrees():
    normal = RNG.standard_normal((30, 30, 3))
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    axis = np.cross(normal, RNG.standard_normal(3))
    axis /= np.linalg.norm(axis, axis=-1, keepdims=True)
    angle = np.radians(10)
    turned = normal * np.cos(angle) + np.cross(axis, normal) * np.sin(angle)
    normal[:5] = 0  # unknown
    got = angles(turned.astype(np.float32), normal)
    assert len(got) == 25 * 30 and np.abs(got - 10).max() < 1e-4
    scores = normal_scores(got)
    assert scores["normal_11.25"] == 100 and scores["normal_7.5"] == 0
    assert scores["normal_rmse"] == pytest.approx(10, abs=1e-4)


def test_pooled_median_is_that_of_all_pixels(tmp_path):
    metric, every = Normal("normal", Rules()), []
    for i in range(3):
        truth, guess = (RNG.standard_normal((20, 20 + i, 3)) for _ in range(2))
        every.append(angles(guess, truth))
        metric.add(i, str(i), truth, guess)
    got, every = metric.result(), np.concatenate(every)
    assert got["normal_median"] == pytest.approx(np.median(every), abs=2e-4)
    assert got["normal_mean"] == pytest.approx(every.mean())
    assert got["normal_22.5"] == pytest.approx(100 * np.mean(every < 22.5))


# ------------------------------------------------------------------------------------------------
# Segmentation.

def test_semantic_scores_by_hand():
    confusion = np.array([[3, 1, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]])  # class 2 is absent
    got = semantic_scores(confusion)
    assert got["pixel_accuracy"] == pytest.approx(0.8)
    assert got["class_accuracy"] == pytest.approx(np.mean([3 / 4, 1, 1 / 2]))
    assert got["miou"] == pytest.approx(np.mean([3 / 5, 4 / 5, 1 / 2]))
    counted = semantic_scores(confusion, 1e-12)
    assert counted["miou"] == pytest.approx(np.mean([3 / 5, 4 / 5, 0, 1 / 2]))


def test_permuted_labels_are_the_same_segments():
    truth = np.repeat(np.repeat(RNG.integers(0, 6, (8, 8)), 8, 0), 8, 1)
    got = instance_scores(RNG.permutation(6)[truth], truth)
    assert got == pytest.approx({"miou": 1, "best_overlap": 1, "ari": 1, "boundary_f": 1})
    noise = instance_scores(RNG.integers(0, 6, truth.shape), truth)
    assert abs(noise["ari"]) < 0.02 and noise["miou"] < 0.2


def test_a_true_segment_without_partner_counts_zero():
    truth = np.zeros((10, 10), int)
    truth[:, 5:] = 1
    assert instance_scores(np.zeros((10, 10), int), truth)["miou"] == pytest.approx(0.25)


@pytest.mark.parametrize("shift, f", ((3, 1), (4, 0)))
def test_boundary_shifted_by_pixels(shift, f):
    a, b = np.zeros((256, 256), int), np.zeros((256, 256), int)  # diagonal 362: radius ceil(2.9) = 3
    a[:, 100:], b[:, 100 + shift:] = 1, 1
    counts = matches(boundary(a), boundary(b))
    assert f_score(counts) == f


def test_soft_edges_are_scored_at_the_best_threshold():
    truth = np.zeros((64, 64, 3), np.uint8)
    truth[20] = 255
    soft = (truth * 0.3).astype(np.uint8)
    soft[40] = 30  # a weak edge that is none
    assert scored("canny", soft, truth)["edge_f"] == 1
    assert scored("canny", np.roll(truth, 3, 0), truth)["edge_f"] == 0


def test_segments_of_a_noisy_picture():
    truth = np.repeat(np.repeat(np.arange(16).reshape(4, 4), 32, 0), 32, 1)
    colours = np.array([[50 + 60 * (k % 4), 40 + 60 * (k // 4), (k * 97) % 256] for k in range(16)])
    noisy = (colours[truth] + RNG.normal(0, 4, (128, 128, 3))).clip(0, 255).astype(np.uint8)
    noisy[60:64, 20:24] = 255  # a speck of its own colour
    index = segments(noisy)
    assert index.max() + 1 == 16 and instance_scores(index, truth)["miou"] > 0.99
    exact = segments(colours[truth].astype(np.uint8))  # at most 256 colours: taken as they are
    assert instance_scores(exact, truth)["miou"] == 1


def test_ari_and_confusion_equal_scikit_learn(figure):
    metrics = pytest.importorskip("sklearn.metrics")
    a, b = RNG.integers(0, 5, (30, 30)), RNG.integers(0, 7, (30, 30))
    b[:15] = a[:15]
    ours = instance_scores(a, b)["ari"]
    theirs = metrics.adjusted_rand_score(b.ravel(), a.ravel())
    confusion = metrics.confusion_matrix(b.ravel(), a.ravel(), labels=range(7))
    iou = metrics.jaccard_score(b.ravel(), a.ravel(), average="macro")
    figure("scikit-learn adjusted Rand index: theirs, ours", [float(theirs), float(ours)])
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert semantic_scores(confusion)["miou"] == pytest.approx(iou, abs=1e-12)


def scored(modality, prediction, truth, palette=None):
    """Scores over a set of one image, fitted in depth."""
    metric = metrics_of([modality], Rules("depth", palette=palette))[modality]
    metric.add(0, "f", truth, prediction)
    return metric.result()


def test_depths_are_clipped_after_the_fit():
    truth = np.array([[1.0, 2.0, 3.0, 4.0, 9.9]])
    guess = np.array([[1.0, 2.0, 3.0, 4.0, 30.0]])
    valid = truth > 0
    fit = align(guess, truth, valid, "depth")
    want = depth_scores(np.minimum(np.maximum(fit, 1e-3), 10), truth, valid)
    assert scored("depth", guess, truth)["abs_rel"] == pytest.approx(want["abs_rel"])
    below = np.array([[1.0, 2.0, 3.0, -50.0, 0.2]])  # the fit leaves the range
    truth = np.array([[0.01, 5.0, 9.9, 0.01, 0.5]])
    fit = align(below, truth, truth > 0, "depth")
    rmse = np.sqrt(np.mean((np.clip(fit, 1e-3, 10) - truth) ** 2))
    assert fit.min() < 0 and scored("depth", below, truth)["rmse"] == pytest.approx(rmse)


def test_ignored_and_unknown_labels():
    truth = np.array([[0, 1, 255, 255]])
    assert scored("seg", np.array([[0, 1, 0, 0]]), truth)["pixel_accuracy"] == 1
    assert scored("seg", np.array([[0, 0, 1, 1]]), truth)["pixel_accuracy"] == 0.5
    palette = np.array([[0, 0, 0], [9, 9, 9]], np.uint8)
    for guess, words in (([[0, 2, 0, 0]], "labels go from 0 to 1"), ([[0, 255, 0, 0]], "label every pixel")):
        with pytest.raises(InputError, match=words):
            scored("seg", np.array(guess), truth, palette)


def test_an_ensemble_is_its_median():
    metrics = metrics_of(("depth", "normal", "seg"), Rules(palette=toy_scenes.PALETTE))
    median, spread = metrics["depth"].combine([np.full((4, 4), v) for v in (0.1, 0.2, 0.9)])
    assert np.allclose(median, 0.2) and np.allclose(spread, np.std([0.1, 0.2, 0.9]))
    vote, doubt = metrics["seg"].combine([toy_scenes.PALETTE[np.full((4, 4), k)] for k in (1, 2, 2)])
    assert (vote == toy_scenes.PALETTE[2]).all() and np.allclose(doubt, 1 / 3)
    vectors = [0, 0, 1.0], [0, 0.6, 0.8], [0, 0.8, 0.6]
    normal, _ = metrics["normal"].combine([np.tile(v, (2, 2, 1)) for v in vectors])
    assert np.allclose(np.linalg.norm(normal, axis=-1), 1) and np.allclose(normal[0, 0], [0, 0.6, 0.8])


@pytest.mark.skipif("MARIGOLD" not in os.environ, reason="MARIGOLD names no checkout of prs-eth/Marigold")
@pytest.mark.parametrize("space", ("disparity", "depth"))
def test_depth_scores_equal_marigold(space, figure):
    """Their alignment, clipping and metrics in float64 on 200 random predictions and truths with holes."""
    def load(name):
        source = (pathlib.Path(os.environ["MARIGOLD"]) / "src/util" / name).read_text()
        module = types.ModuleType(name)
        exec(source.replace("import pandas as pd", ""), module.__dict__)  # only their logger needs it
        return module
    metric, alignment = load("metric.py"), load("alignment.py")
    worst, rng = {}, np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(40, 120, 2)
        truth = rng.uniform(0.2, 12, (height, width)) * (rng.random((height, width)) > 0.25)
        target = 1 / np.maximum(truth, 0.3) if space == "disparity" else truth
        guess = np.abs(target * rng.uniform(0.5, 3) + rng.normal(1, 0.2, truth.shape)) + 1e-3
        valid = (truth > 1e-3) & (truth < 10)
        if space == "depth":
            theirs = alignment.align_depth_least_square(truth, guess, valid)[0]
        else:
            disparity = alignment.depth2disparity(truth)
            theirs = alignment.align_depth_least_square(disparity, guess, valid)[0]
            theirs = alignment.disparity2depth(np.clip(theirs, 1e-3, None))
        p, g, mask = (torch.from_numpy(x) for x in (np.clip(theirs, 1e-3, 10), truth, valid))
        want = dict(abs_rel=metric.abs_relative_difference(p, g, mask), rmse=metric.rmse_linear(p, g, mask),
                    delta1=metric.delta1_acc(p, g, mask))
        ours = np.clip(align(guess, truth, valid, space), 1e-3, 10)
        got = depth_scores(ours, truth, valid)
        worst = {k: max(worst.get(k, 0.0), abs(float(v) - float(got[k]))) for k, v in want.items()}
    figure(f"Marigold, 200 random maps with holes, {space} alignment: largest differences", worst)
    assert max(worst.values()) <= 1e-6


# ------------------------------------------------------------------------------------------------
# Whole commands.

def test_toy_command_reproduces_its_json(command, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "GUESSED", 10)

    def run(name, *more):
        return command("eval_depth", "--toy", 6, *FEW, "--out", tmp_path / name,
                       "--json", tmp_path / f"{name}.json", *more)

    text = run("a", "--batch-size", 6, "--save-maps")
    run("b", "--batch-size", 4)
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    for key in ("abs_rel", "delta1", "rmse", "normal_mean", "miou"):
        assert a[key] == pytest.approx(b[key], rel=1e-3) and key in text
    assert a["ceiling"]["abs_rel"] < a["abs_rel"] < 3 * a["mean_map"]["abs_rel"]
    assert a["ceiling"]["miou"] > 0.95 and "abs_rel (disparity)" in text
    assert len((tmp_path / "a/per_image.csv").read_text().splitlines()) == 7
    assert (tmp_path / "a/grid.png").is_file() and len(list((tmp_path / "a/error_depth").iterdir())) == 6
    first = (tmp_path / "a.json").read_text()
    run("a", "--batch-size", 6)
    assert (tmp_path / "a.json").read_text() == first


def test_an_ensemble_of_samples(command, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "GUESSED", 10)

    def run(name, *more):
        command("eval_depth", "--toy", 3, *FEW, "--out", tmp_path / name, "--save-maps",
                "--modality", "depth", *more)
        return tmp_path / name

    one, three = run("one"), run("three", "--ensemble", 3)
    name = f"{toy_scenes.HELD_OUT}.npy"
    spread = np.load(three / "spread_depth" / name)
    assert spread.shape == (64, 64) and 0 < spread.mean() < 0.5 and not (one / "spread_depth").exists()
    assert not np.array_equal(np.load(one / "depth" / name), np.load(three / "depth" / name))


def test_two_processes_score_as_one(command, pairs, tmp_path):
    pred, gt, palette = pairs
    arguments = ("--pred", pred, "--gt", gt, "--palette", palette, "--batch-size", 2, "--out", tmp_path / "o")
    command("eval_depth", *arguments, "--json", tmp_path / "one.json")
    done = shell("eval_depth.py", *arguments, "--json", tmp_path / "two.json", processes=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()


def test_the_square_is_the_middle():
    assert evaluation.square(np.arange(8).reshape(2, 4)).tolist() == [[1, 2], [5, 6]]
    assert evaluation.square(np.arange(8).reshape(4, 2)).tolist() == [[2, 3], [4, 5]]


def test_edges_have_one_threshold_for_the_set():
    metric = metrics_of(["canny"], Rules())["canny"]
    line = np.zeros((64, 64, 3), np.uint8)
    line[20] = 255
    for k, level in enumerate((60, 200)):
        soft = (line > 0) * np.uint8(level)
        soft[40] = level - 40
        metric.add(k, str(k), line, soft)
    assert [row["edge_f"] for row in metric.rows.values()] == [1, 1] and metric.result()["edge_f"] < 1


def test_what_a_frame_is_drawn_with(monkeypatch):
    """Its folder's class, else none; noise by its place, the seed and the member of an ensemble."""
    class Watched(evaluation.ModelPredictor):
        def latents(self, rgb, y, noise):
            seen.append(y.tolist())
            return torch.cat([rgb, rgb], 1)

    def noise(seed, rows, device):
        rolled.append((seed, list(rows)))
        return samplers_noise(seed, rows, device)

    seen, rolled, samplers_noise = [], [], samplers.Noise
    monkeypatch.setattr(samplers, "Noise", noise)
    model = build_model(SMALL, ["rgb", "seg"], 5, 3, 8, projector=False)
    fresh = metrics_of(["seg"], Rules(seg_mode="instance"))
    predict = Watched(model, 8, Pixels(), samplers.Sampling("euler", 1), fresh, 3, 2)
    image = np.zeros((8, 8, 3), np.uint8)
    predict([evaluation.Frame(i, str(i), {"seg": image}, image, label) for i, label in ((4, 2), (5, None))])
    assert seen == [[2, 5]] * 2 and rolled == [(3, [4, 5]), (3, [4 + 2 ** 32, 5 + 2 ** 32])]


def test_truth_of_another_view_is_refused(tmp_path):
    for m, size in (("rgb", (64, 48)), ("seg", (48, 48))):
        (tmp_path / m).mkdir()
        Image.new("RGB", size).save(tmp_path / m / "x.png")
    tree = Tree(tmp_path, dict(seg_mode="instance", class_names=[], palette=None))
    tree.modalities = ["seg"]
    with pytest.raises(InputError, match="must show the same view"):
        tree.frame(0)


@pytest.fixture
def scannet(tmp_path):
    """Two scenes of three synthetic frames as ScanNet exports them; one has no valid depth."""
    root = tmp_path / "scans"
    for scene in ("scene0000_00", "scene0001_00"):
        for k in range(3):
            s = toy_scenes.render(toy_scenes.HELD_OUT + k, 96)
            for folder in ("color", "depth"):
                (root / scene / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(s.rgb).resize((258, 192)).save(root / scene / "color" / f"{k:06d}.jpg")
            depth = np.pad((s.depth * 1000).round().astype(np.uint16), ((0, 0), (16, 16)))
            depth[:, :20] = 0  # holes
            if (scene, k) == ("scene0001_00", 1):
                depth[:] = 0
            Image.fromarray(depth).save(root / scene / "depth" / f"{k:06d}.png")
    return root


def test_scannet_folder(command, scannet, tmp_path):
    def run(out, *more):
        text = command("eval_depth", "--scannet", scannet, *FEW, "--out", tmp_path / out,
                       "--json", tmp_path / "o.json", *more)
        return text, json.loads((tmp_path / "o.json").read_text())

    text, result = run("o", "--save-crops", tmp_path / "crops")
    assert np.load(tmp_path / "crops/depth/scene0000_00/color/000001.npy").shape == (96, 96)
    with pytest.raises(InputError, match="holds something else than the squares of these frames"):
        run("o", "--num", 3, "--save-crops", tmp_path / "crops")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/crops.json").write_text("a list of mine")
    with pytest.raises(InputError, match="own/crops.json: .* it is of no evaluation"):
        run("o", "--save-crops", tmp_path / "own")
    command("eval_depth", "--data", tmp_path / "crops", *FEW, "--out", tmp_path / "c", "--json",
            tmp_path / "c.json")  # the model again, on the squares
    again = json.loads((tmp_path / "c.json").read_text())
    assert all(again[key] == pytest.approx(result[key], rel=1e-5) for key in ("abs_rel", "rmse", "delta1"))
    assert again["recipe"]["count"] == 6 and len(again["no_valid_depth"]) == 1
    with pytest.raises(InputError, match="--save-crops .*: is, holds or lies in"):
        run("o", "--save-crops", scannet / "crops")
    assert result["no_valid_depth"] == ["scene0001_00/color/000001.jpg"]
    assert "1 of 6 frames have no valid depth" in text
    assert 0 < result["abs_rel"] < 1 and result["recipe"]["count"] == 6
    assert 0 <= result["ceiling"]["abs_rel"] < result["abs_rel"]
    for folder, end in (("color", "jpg"), ("depth", "png")):
        first = scannet / "scene0000_00" / folder / f"000000.{end}"
        first.rename(first.with_name(f"0.{end}"))
    frames = tmp_path / "o/frames.txt"
    assert len(evaluation.ScanNet(scannet, frames, 4, 0).names) == 4  # finds 0.jpg
    run("p", "--num", 2, "--seed", 3)
    drawn = evaluation.ScanNet(scannet, None, 2, 3)
    assert (tmp_path / "p/frames.txt").read_bytes() == drawn.list
    assert evaluation.ScanNet(scannet, tmp_path / "p/frames.txt", None, 0).names == drawn.names
    frames.write_text("scene0000_00/color/7.jpg scene0000_00/depth/7.png")
    with pytest.raises(InputError, match="no such file; export this frame"):
        run("l", "--list", frames)


def test_scannets_frames_are_drawn_by_the_seed(tmp_path):
    lines = [f"color/{i}.jpg depth/{i}.png" for i in range(20)]
    for name in " ".join(lines).split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "l.txt").write_text("\n".join(lines))
    drawn = [evaluation.ScanNet(tmp_path, tmp_path / "l.txt", 5, seed).names for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def write_pairs(root, modality, arrays, end=".npy"):
    for i, array in enumerate(arrays):
        path = root / modality / "c" / f"{i}{end}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if end == ".npy":
            np.save(path, array)
        else:
            Image.fromarray(array).save(path)


@pytest.fixture
def pairs(tmp_path):
    scenes = [toy_scenes.render(i) for i in range(3)]
    gt, pred = tmp_path / "gt", tmp_path / "pred"
    write_pairs(gt, "depth", [(s.depth * 1000).round().astype(np.uint16) for s in scenes], ".png")
    write_pairs(pred, "depth", [1 / s.depth for s in scenes])
    write_pairs(gt, "normal", [s.normal for s in scenes])
    write_pairs(pred, "normal", [MODALITIES["normal"].picture(s.normal) for s in scenes], ".png")
    write_pairs(gt, "seg", [s.seg for s in scenes], ".png")
    write_pairs(pred, "seg", [toy_scenes.PALETTE[s.seg] for s in scenes], ".png")
    (tmp_path / "palette.json").write_text(json.dumps(toy_scenes.PALETTE.tolist()))
    return pred, gt, tmp_path / "palette.json"


def test_predictions_against_truth_without_a_model(command, pairs, tmp_path):
    pred, gt, palette = pairs
    def run(*more):
        command("eval_depth", "--pred", pred, "--gt", gt, "--out", tmp_path / "o",
                "--json", tmp_path / "o.json", *more)
        return json.loads((tmp_path / "o.json").read_text())

    result = run("--palette", palette)
    assert result["abs_rel"] < 1e-3 and result["normal_mean"] < 0.3 and result["miou"] == 1
    assert result["recipe"]["alignment"].startswith("disparity")
    assert run("--seg-mode", "instance")["ari"] == 1
    with pytest.raises(InputError, match="none of the 3 frames has a valid truth in depth"):
        run("--modality", "depth", "--depth-range", 50, 60)
    colours = [*json.loads(palette.read_text()), [1, 2, 3]]  # a class that does not occur
    palette.write_text(json.dumps(colours))
    assert run("--modality", "seg", "--palette", palette)["miou"] == 1
    absent = run("--modality", "seg", "--palette", palette, "--cityscapes-eps")
    assert absent["miou"] < 1 - 0.9 / len(colours)
    assert run("--modality", "normal", "--axes", "marigold")["normal_mean"] > 10
    swap = ("--pred", gt, "--gt", pred, "--modality", "depth", "--out", tmp_path / "o")
    with pytest.raises(InputError, match="add --alignment depth"):
        command("eval_depth", *swap)
    command("eval_depth", *swap, "--alignment", "depth")
    wrong = command("eval_depth", "--pred", pred / "depth", "--gt", gt / "depth", "--modality", "depth",
                    "--alignment", "depth", "--out", tmp_path / "o")
    assert "abs_rel (depth)" in wrong


def test_bad_predictions(command, pairs, tmp_path):
    pred, gt, palette = pairs

    def run(*more):
        command("eval_depth", "--pred", pred, "--gt", gt, "--out", tmp_path / "o",
                "--json", tmp_path / "o.json", *more)

    with pytest.raises(InputError, match="colours without --palette"):
        run("--modality", "seg")
    (tmp_path / "bad.json").write_text('{"palette": [[1, 2]]}')
    with pytest.raises(InputError, match="not a list of up to 255 colours"):
        run("--palette", tmp_path / "bad.json")
    good = np.load(pred / "depth/c/1.npy")
    wrong = ((np.where(good > good.mean(), np.nan, good), "not finite"), (good[:60], "resize the prediction"),
             (good[None], r"needs \(H, W\)"))
    for array, words in wrong:
        np.save(pred / "depth/c/1.npy", array)
        with pytest.raises(InputError, match=words) as error:
            run("--modality", "depth")
        assert "1" in str(error.value)
    (pred / "depth/c/1.npy").write_bytes(b"\x93NUMPY junk")
    with pytest.raises(InputError, match="1.npy: not readable"):
        run("--modality", "depth")
    (pred / "depth/c/1.npy").rename(pred / "depth/c/7.npy")
    with pytest.raises(InputError, match="no file with this stem on the other side"):
        run("--modality", "depth")
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(gt / "depth/c/1.png")
    (pred / "depth/c/7.npy").unlink()
    np.save(pred / "depth/c/1.npy", good)
    with pytest.raises(InputError, match="carry no unit"):
        run("--modality", "depth")
    (tmp_path / "empty/depth").mkdir(parents=True)
    with pytest.raises(InputError, match="no pictures in this folder"):
        command("eval_depth", "--pred", tmp_path / "empty", "--gt", gt, "--modality", "depth")
    assert not (tmp_path / "o.json").exists()


def test_folder_tree(command, tmp_path):
    for i in range(3):
        s = toy_scenes.render(toy_scenes.HELD_OUT + i, 64)
        millimetres = (s.depth * 1000).round().astype(np.uint16)
        for m, array in (("rgb", s.rgb), ("seg", toy_scenes.PALETTE[s.seg]), ("depth", millimetres)):
            path = tmp_path / "tree" / m / "red_box" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    command("eval_depth", "--data", tmp_path / "tree", *FEW, "--cfg", 2, "--out", tmp_path / "o",
            "--json", tmp_path / "o.json")
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["recipe"]["modalities"] == ["depth", "seg"]
    assert result["abs_rel"] < 0.4 and result["miou"] > 0.3
    assert result["ceiling"]["miou"] > 0.9


@pytest.mark.parametrize("mode", ("semantic", "instance"))
def test_crops_hold_the_truth_that_was_scored(mode, tmp_path):
    """Read again, unknown pixels are unknown: of depth, normals and labels, of few and of many."""
    labels = np.arange(48 * 64).reshape(48, 64) % (7 if mode == "semantic" else 400)
    truth = {"depth": np.where(labels == 1, np.nan, 1 + labels / 7), "seg": np.where(labels == 2, -1, labels),
             "normal": np.where(labels[..., None] == 3, 0, [0.6, 0.0, 0.8])}
    square = {m: evaluation.square(array) for m, array in truth.items()}
    frame = evaluation.Frame(0, "a", square, np.zeros((48, 48, 3), np.uint8))
    eval_depth.save_crop(tmp_path, "red/a", frame._replace(truth={"seg": np.full((48, 48), 300)}))
    eval_depth.save_crop(tmp_path, "red/a", frame)  # again: nothing of the first time is left
    write_facts(tmp_path, depth_space="depth", seg_mode=mode, void=255)
    meta = dict(seg_mode="semantic", class_names=["red"], palette=None)
    tree = Tree(tmp_path, meta, facts_of(tmp_path))
    assert tree.frame(0).class_id == 0 and tree.place(0) == "red/a"
    tree.modalities = ["depth", "normal", "seg"]
    read = tree.frame(0).truth
    assert np.allclose(read["depth"], square["depth"], equal_nan=True)
    assert np.allclose(read["normal"], square["normal"])
    ours, theirs = read["seg"], square["seg"]
    assert np.array_equal(ours == -1, theirs == -1)
    assert np.array_equal(ours, theirs + (theirs >= 255))


def ceiling(size):
    metrics = metrics_of(MODALITIES, Rules(palette=toy_scenes.PALETTE))
    return Ceiling(Pixels(), size, metrics)


def test_truth_is_resized_as_training_resizes_it():
    """Normals keep their length, colour maps are smoothed, segments are not."""
    scene = toy_scenes.render(3, 128)
    normal = ceiling(48).pixels("normal", scene.normal.astype(np.float32))
    assert np.abs(np.linalg.norm(normal, axis=0) - 1).max() < 1e-5
    edges = ceiling(64).pixels("canny", MODALITIES["canny"].derive(scene.rgb))
    seg = ceiling(64).pixels("seg", scene.seg)
    assert len(np.unique(edges)) > 2
    assert len(np.unique(seg.reshape(3, -1), axis=1).T) <= len(toy_scenes.PALETTE)


@pytest.mark.parametrize("norm, most", (("minmax", 1e-5), ("quantile", 0.05)))
def test_ceiling_and_mean_map_speak_as_the_model(norm, most):
    """Of an autoencoder without loss the ceiling is perfect in log, but for what quantiles cut off; the mean
    map is the mean of what training saw.
    """
    shown, source = Shown(depth_norm=norm, depth_target="log"), Toy(2)
    source.modalities, rules = ["depth"], Rules("log", (1e-3, 100))
    perfect = Ceiling(Pixels(), 64, metrics_of(["depth"], rules), shown)
    got = results(evaluate(source, {"ceiling": perfect}, rules)["ceiling"])["abs_rel"]
    assert got < most and (norm == "minmax" or got > 1e-4)
    maps = []
    for seed in range(2):
        near = -np.log(toy_scenes.render(seed).depth)
        low, high = np.quantile(near, (0, 1) if norm == "minmax" else (0.02, 0.98))
        maps.append(((near - low) / (high - low)).clip(0, 1))
    training = Toy(2, 0)
    training.modalities = ["depth"]
    assert np.allclose(mean_of(training, perfect, None)["depth"], np.mean(maps, 0), atol=1e-5)


def test_the_mean_of_many_maps_is_as_its_kind_says():
    """Levels do not wrap at 256; normals are unit vectors; segments are voted for."""
    training, names, white = Toy(5, 0), ["rgb", "normal", "seg", "canny"], np.full((64, 64, 3), 255, np.uint8)
    training.modalities = names
    ceiling = Ceiling(None, 64, metrics_of(names, Rules(palette=toy_scenes.PALETTE)))
    means = mean_of(training, ceiling, toy_scenes.PALETTE)
    scenes = [toy_scenes.render(seed) for seed in range(5)]
    assert np.abs(means["rgb"] - np.mean([scene.rgb for scene in scenes], 0)).max() <= 0.5
    normal = np.mean([scene.normal for scene in scenes], 0)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    assert np.abs(means["normal"] - normal).max() < 1e-5
    votes = np.stack([(np.stack([scene.seg for scene in scenes]) == k).sum(0) for k in range(99)])
    assert (means["seg"] == toy_scenes.PALETTE[votes.argmax(0)]).all()
    assert "seg" not in mean_of(training, ceiling, None)
    row = MODALITIES["rgb"]
    assert (row.mean(sum(row.part(white, None) for _ in range(3)), 3, None) == white).all()


def test_the_checkpoint_says_the_alignment(command, monkeypatch, tmp_path):
    """A model that learned log depth is aligned in log, in training, too; --alignment wins."""
    monkeypatch.setattr(evaluation, "GUESSED", 4)
    checkpoint = load_checkpoint(DEMO / "mmgen.pt")
    meta = checkpoint["config"]["meta"]
    meta["shown"] = {"depth_target": "log"}
    torch.save(checkpoint, tmp_path / "log.pt")
    for more, space, why in (((), "log", "log.pt learned log"),
                             (("--alignment", "disparity"), "disparity", "by --alignment")):
        said = command("eval_depth", "--toy", 1, *FEW, "--ckpt", tmp_path / "log.pt", "--modality", "depth",
                       "--out", tmp_path / "o", "--json", tmp_path / "j.json", *more)
        assert f"predictions are aligned in {space} (" in said and why in said and f"({space})" in said
        result = json.loads((tmp_path / "j.json").read_text())
        assert result["recipe"]["alignment"].startswith(space) and result["recipe"]["depth_target"] == "log"
        assert result["ceiling"]["abs_rel"] < result["mean_map"]["abs_rel"]
    objective = types.SimpleNamespace(meta=meta, predicts=["depth"], device=torch.device("cpu"))
    assert evaluation.Trial(Toy(1), objective).rules.alignment == "log"
    del meta["shown"]
    trial = evaluation.Trial(Toy(1), objective)
    assert trial.rules.alignment == "disparity"
    objective.reads = ["rgb", "seg"]  # as of a translation: what it draws has no class
    assert trial.classes(types.SimpleNamespace(modalities=("rgb", "seg")), 4) == {}


def test_predictions_in_log_are_said_so(command, tmp_path):
    """Arrays of minus log depth score 0; sample.py's say in meta.json what they are, and are no truth."""
    for folder in ("pred", "gt"):
        (tmp_path / folder).mkdir()
    np.save(tmp_path / "gt/a.npy", DEPTH)
    np.save(tmp_path / "pred/a.npy", -np.log(DEPTH))
    (tmp_path / "pred/meta.json").write_text(json.dumps(dict(checkpoint_sha256="", depth_target="log",
                                                             palette=None)))
    flags = ("--pred", tmp_path / "pred", "--gt", tmp_path / "gt", "--modality", "depth",
             "--out", tmp_path / "o", "--json", tmp_path / "j.json")
    with pytest.raises(InputError, match="holds log .*add --alignment log"):
        command("eval_depth", *flags)
    command("eval_depth", *flags, "--alignment", "log")
    assert json.loads((tmp_path / "j.json").read_text())["abs_rel"] < 1e-6
    with pytest.raises(InputError, match="a.npy: holds a model's log depth .*is no truth"):
        command("eval_depth", "--pred", tmp_path / "gt", "--gt", tmp_path / "pred", "--modality", "depth",
                "--out", tmp_path / "p")


def test_an_image_without_a_score_is_no_case():
    metric = Semantic("seg", Rules())
    metric.rows = {0: {"miou": np.nan}, 1: {"miou": 0.1}, 2: {"miou": 0.9}}
    picks = eval_depth.cases(metric, 1)
    assert picks[0] == 2 and 0 not in picks


def test_a_tree_derives_what_it_has_no_folder_for(tmp_path):
    for folder in ("rgb", "seg"):
        (tmp_path / folder / "a").mkdir(parents=True)
    scene = toy_scenes.render(3)
    Image.fromarray(scene.rgb).save(tmp_path / "rgb/a/x.png")
    Image.fromarray(toy_scenes.PALETTE[scene.seg]).save(tmp_path / "seg/a/x.png")
    tree = Tree(tmp_path, dict(seg_mode="semantic", class_names=["a"], palette=None))
    assert tree.modalities == ["seg", "canny"] and tree.frame(0).class_id == 0
    assert (tree.frame(0).truth["canny"] == MODALITIES["canny"].derive(scene.rgb)).all()


def test_unknown_depth_is_filled_for_the_ceiling_only():
    depth = np.full((64, 64), 2.0, np.float32)
    depth[10:20] = 0
    pixels = ceiling(64).pixels("depth", depth)
    assert np.isfinite(pixels).all() and torch.from_numpy(pixels).std() == 0


def test_another_scripts_predictor():
    """evaluate() with a predictor that gives the truth, and one that gives one modality alone."""
    source = Toy(3)
    source.modalities = ["normal", "seg"]
    scored = evaluate(source, {
        "value": lambda frames: [frame.truth for frame in frames],
        "flat": lambda frames: [{"normal": np.ones_like(frame.truth["normal"])} for frame in frames],
    }, Rules(palette=source.palette), batch_size=2)
    perfect, flat = (results(scored[name]) for name in ("value", "flat"))
    assert perfect["normal_mean"] < 1e-3 and perfect["miou"] == 1
    assert flat["normal_mean"] > 20 and "miou" not in flat


def test_the_mean_of_other_frames_is_scored_beside(command, tmp_path):
    """Of one frame it is that frame; a gap of 1 is what guessing scores."""
    command("toy_scenes", "--num", 1, "--out", tmp_path / "one")
    command("toy_scenes", "--num", 3, "--out", tmp_path / "three")
    flags = ("--ckpt", DEMO / "mmgen.pt", "--sampler", "euler", "--steps", 1, "--mean-of", tmp_path / "one",
             "--json", tmp_path / "found.json", "--out", tmp_path / "out")
    found = {}
    for name in ("one", "three"):
        command("eval_depth", "--data", tmp_path / name, *flags)
        found[name] = json.loads((tmp_path / "found.json").read_text())
    itself, others = (found[name]["mean_map"] for name in ("one", "three"))
    assert itself["abs_rel"] < 1e-3 and itself["normal_mean"] < 0.5 and itself["miou"] > 0.999
    assert others["abs_rel"] > 0.05 and others["normal_mean"] > 5 and others["miou"] < 0.7
    ceiling, value = found["three"]["ceiling"]["miou"], found["three"]["miou"]
    gap = (value - ceiling) / (others["miou"] - ceiling)
    assert found["three"]["gap"]["miou"] == pytest.approx(gap)
    with pytest.raises(InputError, match="one/rgb"):
        command("eval_depth", "--data", tmp_path / "three", *flags, "--out", tmp_path / "one/rgb")
    assert not list((tmp_path / "one/rgb").glob("*.*"))
    with pytest.raises(InputError, match="one/tree.json"):
        command("eval_depth", "--data", tmp_path / "three", *flags, "--json", tmp_path / "one/tree.json")
    with pytest.raises(InputError, match="--mean-of belongs to --data"):
        command("eval_depth", "--toy", 1, *flags)
    with pytest.raises(InputError, match="the toy world's normals are in our axes"):
        command("eval_depth", "--toy", 1, "--axes", "marigold", "--out", tmp_path / "out")
    with pytest.raises(InputError, match="--num -3: must be at least 1"):
        command("eval_depth", "--scannet", tmp_path, "--num", -3, "--out", tmp_path / "out")


# ------------------------------------------------------------------------------------------------
# What is told of files.

A, B, C = [10, 200, 30], [200, 10, 30], [30, 30, 220]
LABELS = RNG.integers(0, 3, (24, 24))
COLOURS = np.array([A, B, C], np.uint8)[LABELS]


def compared(pred, gt):
    """{score} of predictions of segments, (tree.json's facts, array) each, against the truth likewise."""
    folder = pathlib.Path(tempfile.mkdtemp())
    for side, (facts, array) in (("pred", pred), ("gt", gt)):
        (folder / side / "seg").mkdir(parents=True)
        Image.fromarray(array.astype(np.uint8)).save(folder / side / "seg/0.png")
        if facts:
            write_facts(folder / side, **facts)
    source = evaluation.Pairs(folder / "pred", folder / "gt", facts=facts_of(folder / "gt"))
    rules = Rules(seg_mode=source.seg_mode, palette=source.palette, void=source.void)
    return results(evaluate(source, {"value": source.predict}, rules)["value"])


def test_each_side_numbers_labels_by_its_own_palette():
    truth = {"palette": [A, B, C]}, LABELS
    order = np.array([2, 0, 1])  # the place of each class in [B, C, A]
    assert compared(({"palette": [B, C, A]}, order[LABELS]), truth)["miou"] == 1
    assert compared((None, LABELS), truth)["miou"] == 1  # whose palette nobody says: the truth's
    assert compared((None, COLOURS), truth)["miou"] == 1


def test_void_and_colours_of_no_class_are_not_compared():
    noisy = COLOURS.copy()
    noisy[:12] = 0  # black, which is no class
    assert compared((None, COLOURS), ({"palette": [A, B, C]}, noisy))["miou"] == 1
    wrong = np.where(LABELS == 2, 0, LABELS)
    third = (LABELS == 2).mean()
    found = compared((None, wrong), ({"palette": [A, B, C], "void": -1}, COLOURS))
    assert found["pixel_accuracy"] == pytest.approx(1 - third) and found["miou"] < 0.6
    predicted, of_a = COLOURS.copy(), np.argwhere(LABELS == 0)
    predicted[tuple(of_a[:8].T)] = C  # the colour of void, which is no class but an error
    found = compared((None, predicted), ({"palette": [A, B, C], "void": 2}, COLOURS))
    assert found["miou"] == pytest.approx((1 - 8 / len(of_a) + 1) / 2)
    hit = np.array([[90, 6, 4], [0, 100, 0], [0, 0, 0]])
    assert semantic_scores(hit, void=2)["miou"] == pytest.approx((90 / 100 + 100 / 106) / 2)
    assert semantic_scores(hit)["miou"] == pytest.approx((90 / 100 + 100 / 106) / 3)


def test_the_truths_palette_goes_before_that_of_the_samples(command, tmp_path):
    for side, array in (("pred", COLOURS), ("gt", LABELS.astype(np.uint8))):
        (tmp_path / side / "seg").mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / side / "seg/0.png")
    write_facts(tmp_path / "gt", palette=[A, B, C])
    (tmp_path / "pred/meta.json").write_text(json.dumps({"checkpoint_sha256": "0", "palette": [C, B, A]}))
    command("eval_depth", "--pred", tmp_path / "pred", "--gt", tmp_path / "gt", "--out", tmp_path / "o",
            "--json", tmp_path / "j.json")
    assert json.loads((tmp_path / "j.json").read_text())["miou"] == 1


def test_labels_of_instances_are_no_classes():
    """Whatever palette the checkpoint has, a segment keeps a colour of its own."""
    rules = Rules(seg_mode="instance", palette=np.array([A, B], np.uint8))
    look = metrics_of(["seg"], rules)["seg"].look(np.arange(16)[None])
    assert len(np.unique(look.reshape(-1, 3), axis=0)) == 16


def test_disparity_has_no_scale_and_far_truth_no_floor():
    kind, rules = MODALITIES["depth"], Rules()
    disparity = RNG.uniform(0.05, 1, (20, 20)).astype(np.float32)
    guess = disparity + RNG.normal(0, 0.02, disparity.shape)
    found = []
    for scale in (1, 3000):
        metric = metrics_of(["depth"], rules)["depth"]
        truth = Depth.read(kind, Raster("d.npy", disparity * np.float32(scale)))
        metric.add(0, "d", truth, guess)
        found.append(metric.result()["abs_rel"])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and 0 < found[0] < 0.2
    far = RNG.uniform(2000, 9000, (20, 20))
    metric = metrics_of(["depth"], Rules(depth_range=(1, 1e4)))["depth"]
    metric.add(0, "far", far, 1 / far)
    assert metric.result()["abs_rel"] < 1e-6


def test_a_tree_gives_the_model_its_pictures_and_no_class_that_is_none(tmp_path):
    scene = toy_scenes.render(3)
    for folder, image in (("rgb", scene.rgb), ("seg", toy_scenes.PALETTE[scene.seg][::4, ::4])):
        (tmp_path / folder / "a").mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / folder / "a/x.png")
    write_facts(tmp_path, classes="none")
    tree = Tree(tmp_path, dict(seg_mode="semantic", class_names=["a"], palette=None), facts_of(tmp_path))
    tree.modalities = ["seg"]
    frame = tree.frame(0)
    assert (frame.rgb == scene.rgb).all() and frame.truth["seg"].shape[:2] == (16, 16)
    assert frame.class_id is None


def test_unknown_pixels_of_a_further_modality_are_not_compared(monkeypatch, tmp_path):
    monkeypatch.setitem(MODALITIES, "shine", Scalar(0.1, "shine"))
    values = RNG.random((8, 8)).astype(np.float32)
    values[:4] = np.nan
    np.save(tmp_path / "a.npy", values)
    row = MODALITIES["shine"]
    metric = metrics_of(["shine"], Rules())["shine"]
    truth = metric.read(row, row.open(tmp_path / "a.npy"))
    metric.add(0, "a", truth, np.where(np.isnan(values), 9, values))
    assert metric.result() == {"shine_mae": 0} and np.isfinite(metric.target(truth)).all()
    assert metric.panels(truth, np.nan_to_num(values))[2].max() == 0
    monkeypatch.setitem(MODALITIES, "far", Disparity(0.1, "far"))
    with pytest.raises(InputError, match="far: is known up to scale and shift"):
        metrics_of(["far"], Rules())


def test_the_mean_of_other_frames_is_read_by_their_own_palette(tmp_path):
    """The same map, its labels in another order: the same mean."""
    maps = []
    for palette, order in (([A, B, C], [0, 1, 2]), ([C, A, B], [1, 2, 0])):
        metric = metrics_of(["seg"], Rules(palette=np.array(palette, np.uint8)))
        source = types.SimpleNamespace(names=["0"])
        source.frame = lambda i, order=order: evaluation.Frame(0, "0", {"seg": np.array(order)[LABELS]})
        found = mean_of(source, Ceiling(Pixels(), 24, metric), np.array([A, B, C], np.uint8))
        maps.append(found["seg"])
    assert (maps[0] == COLOURS).all() and (maps[1] == COLOURS).all()
