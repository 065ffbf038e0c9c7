"""One row of MODALITIES is all that a modality takes: cache, training from the demo weights, evaluation."""
import json

import numpy as np
import pytest
from PIL import Image

import evaluation
import mix
import toy_scenes
from distributed import InputError
from modalities import MODALITIES, PLAIN_FACTS, Colour, Scalar
from weights import DEMO


def brightness(rgb):
    """uint8 (H, W, 3) -> float32 (H, W) in [0, 1]."""
    return rgb.astype(np.float32).mean(-1) / 255


@pytest.fixture
def rows(monkeypatch):
    """luma, a scalar derived from the RGB, and sketch, a picture that only files have."""
    monkeypatch.setitem(MODALITIES, "luma", Scalar(0.1, "luma in [0, 1]", brightness))
    monkeypatch.setitem(MODALITIES, "sketch", Colour(0.1, "a drawing"))
    monkeypatch.setattr(evaluation, "GUESSED", 20)


def test_from_the_cache_to_the_evaluation(rows, command, tmp_path):
    cache, run, out = tmp_path / "cache", tmp_path / "run", tmp_path / "e"
    names = ("rgb", "depth", "normal", "seg", "luma")
    command("prep_latents", "--toy", 4, "--out", cache, "--no-dino", "--batch-size", 4,
            "--modalities", *names)
    table = command("train", "--data", cache, "--model", "T/2", "--init", DEMO / "mmgen.pt", "--steps", 1,
                    "--batch-size", 4, "--run", run, "--preview-every", 1000)
    assert "heads.4" in table
    said = command("eval_depth", "--toy", 2, "--ckpt", run, "--sampler", "euler", "--steps", 1,
                   "--ensemble", 2, "--save-maps", "--out", out, "--json", tmp_path / "e.json")
    result = json.loads((tmp_path / "e.json").read_text())
    assert "luma_mae" in said and 0 < result["ceiling"]["luma_mae"] < 0.05 < result["luma_mae"] < 1
    assert result["abs_rel"] < 0.2
    assert np.load(next((out / "luma").glob("*.npy"))).shape == (64, 64)


def test_scalars_have_one_scale_whatever_the_file(rows, tmp_path):
    row, grey = MODALITIES["luma"], np.random.default_rng(0).integers(0, 256, (8, 8))
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray((grey * 257).astype(np.uint16)).save(tmp_path / "16.png")
    np.save(tmp_path / "a.npy", grey / 255)
    wanted = np.repeat(grey[None] / 255 * 2 - 1, 3, 0)
    for space in ("disparity", "depth"):
        for name in ("8.png", "16.png", "a.npy"):
            found = row.pixels(row.open(tmp_path / name, PLAIN_FACTS._replace(depth_space=space)))
            assert found.shape == (3, 8, 8) and np.abs(found - wanted).max() < 1e-5, (space, name)
    Image.fromarray((grey / 510).astype(np.float32)).save(tmp_path / "float.tiff")
    found = row.pixels(row.open(tmp_path / "float.tiff"))  # floats are as they are
    assert np.abs(found - (grey[None] / 255 - 1)).max() < 1e-5
    np.save(tmp_path / "wide.npy", grey)
    with pytest.raises(InputError, match=r"wide.npy: becomes pixels from .* luma in \[0, 1\]"):
        row.pixels(row.open(tmp_path / "wide.npy"))


def test_what_is_not_there_is_named(rows, monkeypatch, cache, command, tmp_path):
    with pytest.raises(InputError, match="--modalities sketch: the toy world has rgb, depth, normal, seg"):
        command("prep_latents", "--toy", 4, "--modalities", "rgb", "sketch", "--out", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    monkeypatch.setitem(mix.TASK_MIX, "from-luma", (mix.Role("luma"),) * 4)
    for more in ((), ("--modalities", "rgb", "depth", "luma")):
        said = "--mix from-luma: gives luma, the cache has rgb, depth, normal, seg"
        with pytest.raises(InputError, match=said):
            command("train", "--data", cache, "--model", "T/2", "--mix", "from-luma", "--run", tmp_path / "r",
                    *more)
    (tmp_path / "tree/rgb").mkdir(parents=True)
    Image.fromarray(toy_scenes.render(0).rgb).save(tmp_path / "tree/rgb/x.png")
    with pytest.raises(InputError, match="normal: no such folder; there are rgb"):
        command("sample", "--task", "condition", "--given", "normal", "--image", tmp_path / "tree",
                "--ckpt", DEMO / "mmgen.pt", "--out", tmp_path / "o")
