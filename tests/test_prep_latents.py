import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import prep_latents
import toy_scenes
from conftest import ROOT, shell
from distributed import InputError
from model import MODALITIES, canny

ARRAYS = ("rgb", "depth", "normal", "seg", "dino", "labels", "done")


def same_cache(a, b):
    return all(np.array_equal(np.load(a / f"{s}.npy"), np.load(b / f"{s}.npy")) for s in ARRAYS)


@pytest.fixture
def tree(tmp_path, command):
    """Four toy scenes as a picture tree."""
    command("toy_scenes", "--num", 4, "--start", 0, "--out", tmp_path / "tree")
    return tmp_path / "tree"


def first(tree, modality="rgb"):
    return sorted((tree / modality).rglob("*.png"))[0]


def test_cache_holds_what_the_vae_says(cache):
    from vae import load_vae
    meta = json.loads((cache / "meta.json").read_text())
    assert meta["count"] == 24 and meta["latent_size"] == [16, 16] and meta["teacher"] == "toy-teacher" and meta["num_classes"] == 12
    scene = toy_scenes.render(5)
    pixels = torch.from_numpy(MODALITIES["normal"].to_pixels(scene.normal))[None]
    mean, logvar = load_vae("toy").encode(pixels)
    stored = np.load(cache / "normal.npy")[5]
    assert np.allclose(stored[0], mean[0], atol=5e-3) and np.allclose(stored[1], logvar[0] / 2, atol=1e-2)
    assert np.load(cache / "labels.npy")[5] == scene.label
    dino, exact = np.load(cache / "dino.npy")[5].astype(float), toy_scenes.teacher(scene, 8)
    cosine = (dino * exact).sum(-1) / np.linalg.norm(dino, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert cosine.min() > 0.999


def test_a_killed_run_continues_to_the_same_cache(cache, tmp_path, command):
    out = tmp_path / "killed"
    arguments = ["prep_latents.py", "--toy", "24", "--out", str(out), "--batch-size", "8"]
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "done.npy").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    command("prep_latents", *arguments[1:])
    assert same_cache(cache, out) and not list(out.glob(".*"))


def test_two_processes_write_the_same_cache(cache, tmp_path):
    result = shell("prep_latents.py", "--toy", 24, "--out", tmp_path / "two", "--batch-size", 8, processes=2)
    assert result.returncode == 0, result.stderr
    for stem in ("rgb", "depth", "normal", "seg"):
        a, b = (np.load(f / f"{stem}.npy") for f in (cache, tmp_path / "two"))
        assert (np.abs(a.astype(np.float32) - b) <= np.spacing(np.maximum(np.abs(a), np.abs(b)))).all()  # one fp16 ulp


def test_verify(cache, tmp_path, command):
    assert "24 of 24 rows" in command("prep_latents", "--toy", 24, "--out", cache, "--batch-size", 8, "--verify")
    shutil.copytree(cache, tmp_path / "spoilt")
    array = np.load(tmp_path / "spoilt" / "seg.npy", mmap_mode="r+")
    array[11, 0, 0, 3, 3] += 1
    array.flush()
    with pytest.raises(InputError, match="seg.npy: row 11"):
        command("prep_latents", "--toy", 24, "--out", tmp_path / "spoilt", "--batch-size", 8, "--verify")


def test_a_folder_of_pictures(tree, tmp_path, command):
    out = tmp_path / "out"
    command("prep_latents", "--data", tree, "--vae", "toy", "--size", 64, "--no-dino", "--out", out, "--seg-mode", "semantic")
    meta = json.loads((out / "meta.json").read_text())
    assert meta["modalities"] == ["rgb", "depth", "normal", "seg"] and meta["count"] == 4 and meta["teacher"] is None
    names = (out / "names.txt").read_text().split()
    assert names == sorted(names) and all("/" in name for name in names)
    seeds = [int(name.split("/")[1]) for name in names]
    command("prep_latents", "--toy", 4, "--no-dino", "--out", tmp_path / "toy")
    for m in ("rgb", "seg"):
        assert np.allclose(np.load(out / f"{m}.npy"), np.load(tmp_path / "toy" / f"{m}.npy")[seeds], atol=2e-2), m
    with pytest.raises(InputError, match="vae is toy, this run has"):
        command("prep_latents", "--data", tree, "--vae", "none", "--size", 64, "--no-dino", "--out", out, "--seg-mode", "semantic")


def test_rgb_alone_is_enough(tree, tmp_path, command):
    for m in ("depth", "normal", "seg"):
        shutil.rmtree(tree / m)
    assert "4 rows of rgb," in command("prep_latents", "--data", tree, "--vae", "toy", "--size", 64, "--no-dino", "--out", tmp_path / "out")


def test_unusual_pictures_are_read_correctly(tmp_path):
    rng = np.random.default_rng(0)
    colours = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    image = Image.fromarray(colours)
    image.save(tmp_path / "plain.png")
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    image.quantize(256).save(tmp_path / "palette.png")
    alpha = image.copy()
    alpha.putalpha(255)
    alpha.save(tmp_path / "alpha.png")
    for name in ("plain.png", "cmyk.tif", "palette.png", "alpha.png"):
        read = prep_latents.read_modality(tmp_path / name, "rgb", lambda i: prep_latents.centre_crop(i, 64))
        assert read.shape == (64, 64, 3) and np.abs(read.astype(int) - colours).mean() < 2, name
    alpha.putalpha(0)
    alpha.save(tmp_path / "clear.png")
    assert (prep_latents.read_modality(tmp_path / "clear.png", "rgb", lambda i: i) == 255).all()
    grey = rng.integers(0, 65536, (64, 64)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey16.png")
    as_depth = prep_latents.read_modality(tmp_path / "grey16.png", "depth", lambda i: i)
    assert np.allclose(as_depth, grey / 65535, atol=1e-6)  # all 16 bits
    as_rgb = prep_latents.read_modality(tmp_path / "grey16.png", "rgb", lambda i: i)
    assert as_rgb.shape == (64, 64, 3) and np.abs(as_rgb[..., 0] - grey / 257).max() < 1
    Image.fromarray(colours[..., 0]).save(tmp_path / "grey.png")
    assert prep_latents.read_modality(tmp_path / "grey.png", "rgb", lambda i: i).shape == (64, 64, 3)
    np.save(tmp_path / "depth.npy", np.array([[1.0, 2.0], [4.0, 0.0]], np.float32))
    disparity = prep_latents.read_modality(tmp_path / "depth.npy", "depth", lambda i: i, depth_space="depth")
    assert disparity.tolist() == [[1.0, 0.5], [0.25, 0.0]]


def test_adm_centre_crop():
    image = Image.fromarray(np.arange(200 * 300 * 3, dtype=np.uint32).reshape(200, 300, 3).astype(np.uint8))
    assert prep_latents.centre_crop(image, 64).size == (64, 64)
    square = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    assert np.array_equal(np.asarray(prep_latents.centre_crop(square, 64)), np.asarray(square))
    flat = Image.fromarray(np.kron(np.array([[0, 255]]), np.ones((300, 150))).astype(np.uint8))
    flat.info["flat"] = True
    assert set(np.unique(np.asarray(prep_latents.centre_crop(flat, 64)))) == {0, 255}


def damage(kind, tree):
    path = first(tree)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a picture")
    elif kind == "huge":
        Image.new("1", (20000, 20000)).save(path)
    elif kind == "odd stem":
        target = first(tree, "depth")
        target.rename(target.with_name("other.png"))
    elif kind == "lost":
        first(tree, "normal").unlink()
    elif kind == "aspect":
        Image.new("RGB", (64, 200)).save(first(tree, "seg"))
    elif kind == "no folder":
        shutil.rmtree(tree / "seg")
    return path


@pytest.mark.parametrize("kind, message", [
    ("truncated", "not a readable picture"), ("empty", r"not a readable picture \(0 bytes"), ("text", "not a readable picture"),
    ("huge", "megapixels"), ("odd stem", "no file with this stem"), ("lost", "no file with this stem"), ("aspect", "would not align"),
    ("no folder", "seg: no such folder")])
def test_bad_pictures_are_named_and_nothing_counts_as_done(kind, message, tree, tmp_path, command):
    path, out = damage(kind, tree), tmp_path / "out"
    arguments = ("--data", tree, "--vae", "toy", "--size", 64, "--no-dino", "--out", out, "--modalities", "rgb", "depth", "normal", "seg")
    with pytest.raises(InputError, match=message):
        command("prep_latents", *arguments)
    if kind in ("truncated", "empty", "text", "huge"):
        with pytest.raises(InputError, match=path.name):
            command("prep_latents", *arguments)
        assert "3 rows" in command("prep_latents", *arguments, "--skip-broken")
        assert path.stem in (out / "skipped.txt").read_text()
        assert sorted(np.load(out / "done.npy")) == [1, 1, 1, 2]


def test_held_out_seeds_need_to_be_named(tmp_path, command):
    with pytest.raises(InputError, match="held-out"):
        command("prep_latents", "--toy", 10, "--toy-start", 2 ** 31 - 5, "--out", tmp_path)


def test_dino_features_from_a_local_file(tree, tmp_path, command):
    """Random DINOv2-B/14 weights in timm's file format: 8x8 tokens of 112 px, after the final norm."""
    import timm
    from safetensors.torch import save_file
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch14_dinov2.lvd142m", img_size=112, num_classes=0)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "dino.safetensors")
    out = tmp_path / "out"
    assert "dinov2" in command("prep_latents", "--data", tree, "--vae", "toy", "--size", 64, "--dino", tmp_path / "dino.safetensors", "--out", out)
    stored = np.load(out / "dino.npy")
    assert stored.shape == (4, 64, 768) and (np.abs(stored).max(-1) == 127).all()
    pixels = MODALITIES["rgb"].to_pixels(np.asarray(Image.open(first(tree))))
    x = (torch.from_numpy(pixels)[None] + 1) / 2
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        tokens = model.eval().forward_features(torch.nn.functional.interpolate(x, 112, mode="bicubic"))[0, 1:].numpy()
    cosine = (tokens * stored[0]).sum(-1) / np.linalg.norm(tokens, axis=-1) / np.linalg.norm(stored[0].astype(float), axis=-1)
    assert cosine.min() > 0.999


def test_missing_weights_say_how_to_get_them(tree, tmp_path, command):
    with pytest.raises(InputError, match="--no-dino"):
        command("prep_latents", "--data", tree, "--vae", "toy", "--size", 64, "--dino", tmp_path / "none.pth", "--out", tmp_path / "out")


def test_a_short_array_is_refused_and_not_filled_with_zeros(cache, tmp_path, command):
    shutil.copytree(cache, tmp_path / "short")
    path = tmp_path / "short" / "rgb.npy"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="rgb.npy: missing or cut short"):
        command("prep_latents", "--toy", 24, "--out", tmp_path / "short", "--batch-size", 8)
    assert path.stat().st_size == 5000


def test_a_repaired_picture_is_taken_up(tree, tmp_path, command):
    path, out = first(tree), tmp_path / "out"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    arguments = ("--data", tree, "--vae", "toy", "--size", 64, "--no-dino", "--out", out)
    command("prep_latents", *arguments, "--skip-broken")
    path.write_bytes(whole)
    assert "4 rows" in command("prep_latents", *arguments)


def test_arrays_are_checked_and_flat_ones_stay_flat(tmp_path):
    np.save(tmp_path / "seg.npy", np.kron(np.array([[0, 200], [200, 0]]), np.ones((40, 40)))[..., None].repeat(3, 2).astype(np.float32))
    seg = prep_latents.read_modality(tmp_path / "seg.npy", "seg", lambda i: prep_latents.centre_crop(i, 33))
    assert set(np.unique(seg)) == {0, 200} and seg.dtype == np.uint8
    np.save(tmp_path / "normal.npy", np.full((8, 8, 3), 200.0))
    np.save(tmp_path / "nan.npy", np.full((8, 8), np.nan))
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04" + bytes(100))
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (8, 8\n"  # never closed: tokenize's error, not a ValueError
    (tmp_path / "header.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    for name, modality in (("normal", "normal"), ("nan", "depth"), ("zip", "depth"), ("header", "depth")):
        with pytest.raises(InputError, match=f"{name}.npy"):
            prep_latents.read_modality(tmp_path / f"{name}.npy", modality, lambda i: i)


def test_a_derived_modality_needs_no_files(command, tmp_path):
    for i in range(2):
        path = tmp_path / "tree/rgb/a" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(toy_scenes.render(i).rgb).save(path)
    command("prep_latents", "--data", tmp_path / "tree", "--out", tmp_path / "cache", "--size", 64, "--vae", "none", "--no-dino", "--modalities", "rgb", "canny")
    rgb, edges = (np.load(tmp_path / "cache" / f"{m}.npy") for m in ("rgb", "canny"))
    assert (edges[0] == canny(rgb[0].transpose(1, 2, 0)).transpose(2, 0, 1)).all() and edges.any()
    command("prep_latents", "--toy", 2, "--out", tmp_path / "toy", "--vae", "none", "--modalities", "rgb", "seg", "canny")
    assert (np.load(tmp_path / "toy/canny.npy") == edges).all()


def test_feature_vectors_of_a_timm_model(tree, tmp_path, command):
    """The pooled vector of a small random model from a local file, at mean square 1; unknown names and absent weights are named."""
    import timm
    from safetensors.torch import save_file
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    flags = ("--data", tree, "--size", 64, "--vae", "toy", "--no-dino", "--seg-mode", "semantic", "--feature", "test_vit")
    command("prep_latents", *flags, "--feature-file", tmp_path / "vit.safetensors", "--out", tmp_path / "c")
    meta, rows = json.loads((tmp_path / "c/meta.json").read_text()), np.load(tmp_path / "c/feature.npy").astype(float)
    assert meta["feature"] == "test_vit" and rows.shape == (4, meta["feature_size"]) and np.allclose((rows ** 2).mean(1), 1, atol=1e-2)
    config, rgb = model.pretrained_cfg, np.asarray(Image.open(first(tree)))
    x = (torch.from_numpy(rgb.copy()).permute(2, 0, 1).float() / 255 - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
    with torch.no_grad():
        direct = model(torch.nn.functional.interpolate(x[None], config["input_size"][1:], mode="bicubic", antialias=True))[0].double().numpy()
    assert (rows[0] @ direct) / np.linalg.norm(rows[0]) / np.linalg.norm(direct) > 0.999
    assert "largest difference" in command("prep_latents", *flags, "--feature-file", tmp_path / "vit.safetensors", "--out", tmp_path / "c", "--verify")
    with pytest.raises(InputError, match="--feature nonsense"):
        command("prep_latents", *flags[:-1], "nonsense", "--out", tmp_path / "d")
    with pytest.raises(InputError, match="toy-teacher, and it alone"):
        command("prep_latents", "--toy", 4, "--feature", "test_vit", "--out", tmp_path / "d")
