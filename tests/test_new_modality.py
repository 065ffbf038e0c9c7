"""One row of MODALITIES is all that a modality takes: cache, training from the demo weights, understanding, evaluation."""
import functools
import json

import numpy as np
import pytest
from PIL import Image

import eval_depth
import sample
import toy_scenes
import train
from distributed import InputError
from model import MODALITIES, Modality
from prep_latents import file_pixels, read_modality


def _pixels(grey):
    return np.repeat(grey[None].astype(np.float32) * 2 - 1, 3, 0)


@pytest.fixture
def rows(monkeypatch):
    """luma, a scalar derived from the RGB, and albedo, a picture that only files have; depth's map and picture serve."""
    depth, colour = MODALITIES["depth"], MODALITIES["rgb"]
    luma = Modality(0.1, "scalar", _pixels, depth.from_pixels, depth.picture, True, "luma in [0, 1]", lambda rgb: rgb.astype(np.float32).mean(-1) / 255)
    for name, row in {"luma": luma, "albedo": colour._replace(loss_weight=0.1)}.items():
        monkeypatch.setitem(MODALITIES, name, row)
        monkeypatch.setitem(eval_depth.READERS, name, functools.partial(read_modality, modality=name, fit=lambda image: image))
    monkeypatch.setattr(eval_depth.Toy, "modalities", (*eval_depth.Toy.modalities, "luma"))
    monkeypatch.setattr(eval_depth, "mean_map", functools.partial(eval_depth.mean_map, 20))


def test_from_the_cache_to_the_evaluation(rows, command, tmp_path):
    cache = tmp_path / "cache"
    command("prep_latents", "--toy", 4, "--out", cache, "--no-dino", "--batch-size", 4, "--modalities", "rgb", "depth", "normal", "seg", "luma")
    table = command("train", "--data", cache, "--model", "T/2", "--init", sample.DEMO / "mmgen.pt", "--steps", 1, "--batch-size", 4, "--run", tmp_path / "run", "--preview-every", 1000)
    assert "heads.4" in table
    out = command("eval_depth", "--toy", 2, "--ckpt", tmp_path / "run", "--sampler", "euler", "--steps", 1, "--ensemble", 2, "--save-maps", "--out", tmp_path / "e", "--json", tmp_path / "e.json")
    result = json.loads((tmp_path / "e.json").read_text())
    assert "luma_mae" in out and 0 < result["ceiling"]["luma_mae"] < 0.05 < result["luma_mae"] < 1 and result["abs_rel"] < 0.2
    assert np.load(next((tmp_path / "e/luma").glob("*.npy"))).shape == (64, 64)


def test_scalars_have_one_scale_whatever_the_file(rows, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (8, 8))
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray((grey * 257).astype(np.uint16)).save(tmp_path / "16.png")
    np.save(tmp_path / "a.npy", grey / 255)
    for space in ("disparity", "depth"):
        for name in ("8.png", "16.png", "a.npy"):
            assert np.abs(file_pixels(tmp_path / name, "luma", lambda image: image, space) - _pixels(grey / 255)).max() < 1e-5, (space, name)
    Image.fromarray((grey / 510).astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(InputError, match="float.tiff: a picture of floats"):
        file_pixels(tmp_path / "float.tiff", "luma", lambda image: image)
    np.save(tmp_path / "wide.npy", grey)
    with pytest.raises(InputError, match=r"wide.npy: luma becomes pixels from .* luma in \[0, 1\]"):
        file_pixels(tmp_path / "wide.npy", "luma", lambda image: image)


def test_what_is_not_there_is_named(rows, monkeypatch, cache, command, tmp_path):
    with pytest.raises(InputError, match="--modalities albedo: the toy world has rgb, depth, normal, seg"):
        command("prep_latents", "--toy", 4, "--modalities", "rgb", "albedo", "--out", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    monkeypatch.setitem(train.TASK_MIX, "from-luma", (train.Role("luma"),) * 4)
    for more in ((), ("--modalities", "rgb", "depth", "luma")):
        with pytest.raises(InputError, match="--mix from-luma: gives luma, the cache has rgb, depth, normal, seg"):
            command("train", "--data", cache, "--model", "T/2", "--mix", "from-luma", "--run", tmp_path / "r", *more)
    Image.fromarray(toy_scenes.render(0).rgb).save(tmp_path / "x.png")
    (tmp_path / "tree/rgb").mkdir(parents=True)
    with pytest.raises(InputError, match="normal: no such folder; there are rgb"):
        command("sample", "--task", "condition", "--given", "normal", "--data", tmp_path / "tree", "--ckpt", sample.DEMO / "mmgen.pt", "--out", tmp_path / "o")
