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
from PIL import Image

import dataset
import listing
import prep_latents
import sample
import toy_scenes
from conftest import ROOT, shell
from dataset import Cache, to_unit
from distributed import InputError
from images import canny, centre_crop
from modalities import MODALITIES, Facts, shown_of
from prep_latents import View
from trees import facts_of
from vae import load_vae
from weights import DEMO, load_model

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
    meta = json.loads((cache / "meta.json").read_text())
    assert meta["count"] == 24 and meta["latent_size"] == [16, 16]
    assert meta["teacher"] == "toy-teacher" and meta["num_classes"] == 12
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
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "done.npy").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    command("prep_latents", *arguments[1:])
    assert same_cache(cache, out) and not list(out.glob(".*"))


def test_a_row_is_done_when_it_is_on_the_disk(cache, tmp_path, monkeypatch):
    shutil.copytree(cache, tmp_path / "c")
    np.save(tmp_path / "c/done.npy", np.zeros(24, np.uint8))
    writer, done = prep_latents.Writer(tmp_path / "c", dataset.read_meta(cache)), []
    monkeypatch.setattr(np.memmap, "flush", lambda self: done.append(int(writer.done.sum())))
    writer.write(prep_latents.Block(range(8), {}, {}, [], {}), {})
    writer.flush()
    assert done == [0] * len(writer.arrays) + [8]  # the data of all, then the mark


def test_two_processes_write_the_same_cache(cache, tmp_path):
    result = shell("prep_latents.py", "--toy", 24, "--out", tmp_path / "two", "--batch-size", 8, processes=2,
                   torchrun=True)
    assert result.returncode == 0, result.stderr
    for stem in ("rgb", "depth", "normal", "seg"):
        a, b = (np.load(f / f"{stem}.npy") for f in (cache, tmp_path / "two"))
        ulp = np.spacing(np.maximum(np.abs(a), np.abs(b)))  # of fp16
        assert (np.abs(a.astype(np.float32) - b) <= ulp).all()


def test_verify(cache, tmp_path, command):
    flags = ("--toy", 24, "--batch-size", 8, "--verify")
    assert "24 of 24 rows" in command("prep_latents", *flags, "--out", cache)
    shutil.copytree(cache, tmp_path / "spoilt")
    array = np.load(tmp_path / "spoilt" / "seg.npy", mmap_mode="r+")
    array[11, 0, 0, 3, 3] += 1
    array.flush()
    with pytest.raises(InputError, match="seg.npy: row 11"):
        command("prep_latents", *flags, "--out", tmp_path / "spoilt")


def test_a_folder_of_pictures(tree, tmp_path, command):
    out = tmp_path / "out"
    flags = ("--data", tree, "--size", 64, "--no-dino", "--out", out, "--seg-mode", "semantic")
    command("prep_latents", *flags, "--vae", "toy")
    meta = json.loads((out / "meta.json").read_text())
    assert meta["modalities"] == list(toy_scenes.MAPS)
    assert meta["count"] == 4 and meta["teacher"] is None
    names = (out / "names.txt").read_text().split()
    assert names == sorted(names) and all("/" in name for name in names)
    seeds = [int(name.split("/")[1]) for name in names]
    command("prep_latents", "--toy", 4, "--no-dino", "--out", tmp_path / "toy")
    for m in ("rgb", "seg"):
        drawn = np.load(tmp_path / "toy" / f"{m}.npy")[seeds]
        assert np.allclose(np.load(out / f"{m}.npy"), drawn, atol=2e-2), m
    with pytest.raises(InputError, match="vae is toy, this run has"):
        command("prep_latents", *flags, "--vae", "none")


def test_rgb_alone_is_enough(tree, tmp_path, command):
    for m in ("depth", "normal", "seg"):
        shutil.rmtree(tree / m)
    flags = ("--data", tree, "--vae", "toy", "--size", 64, "--no-dino", "--out", tmp_path / "out")
    assert "4 rows of rgb," in command("prep_latents", *flags)


def test_an_array_counts_before_its_picture(tree, tmp_path, command):
    """A stem that is there as array and as picture counts once; twice as picture is an error."""
    path = first(tree, "normal")
    np.save(path.with_suffix(".npy"), np.tile(np.float32([0, 0, 1]), (64, 64, 1)))
    flags = ("--data", tree, "--vae", "none", "--size", 64, "--no-dino", "--modalities", "rgb", "normal")
    assert "4 rows" in command("prep_latents", *flags, "--out", tmp_path / "out")
    assert (np.load(tmp_path / "out/normal.npy")[0, 2] == 255).all()
    other = sorted((tree / "normal").rglob("*.png"))[1]
    shutil.copy(other, other.with_suffix(".webp"))
    with pytest.raises(InputError, match="is there twice"):
        command("prep_latents", *flags, "--out", tmp_path / "twice")


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
    ("truncated", "not readable"), ("empty", "not readable"), ("text", "not readable"),
    ("huge", "pixels"), ("odd stem", "no file with this stem"), ("lost", "no file with this stem"),
    ("aspect", "would not align"), ("no folder", "seg: no such folder")])
def test_bad_pictures_are_named_and_nothing_counts_as_done(kind, message, tree, tmp_path, command):
    path, out = damage(kind, tree), tmp_path / "out"
    arguments = ("--data", tree, "--vae", "toy", "--size", 64, "--no-dino", "--out", out,
                 "--modalities", "rgb", "depth", "normal", "seg")
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
    flags = ("--data", tree, "--vae", "toy", "--size", 64, "--dino", tmp_path / "dino.safetensors")
    assert "dinov2" in command("prep_latents", *flags, "--out", out)
    stored = np.load(out / "dino.npy")
    assert stored.shape == (4, 64, 768) and (np.abs(stored).max(-1) == 127).all()
    pixels = MODALITIES["rgb"].to_pixels(np.asarray(Image.open(first(tree))))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = ((torch.from_numpy(pixels)[None] + 1) / 2 - mean) / std
    with torch.inference_mode():
        x = torch.nn.functional.interpolate(x, 112, mode="bicubic")
        tokens = model.eval().forward_features(x)[0, 1:].numpy()
    found = stored[0].astype(float)
    cosine = (tokens * found).sum(-1) / np.linalg.norm(tokens, axis=-1) / np.linalg.norm(found, axis=-1)
    assert cosine.min() > 0.999


def test_missing_weights_say_how_to_get_them(tree, tmp_path, command):
    flags = ("--data", tree, "--vae", "toy", "--size", 64, "--out", tmp_path / "out")
    with pytest.raises(InputError, match="none.pth: no such file.*--no-dino"):
        command("prep_latents", *flags, "--dino", tmp_path / "none.pth")


def test_a_short_array_is_refused_and_not_filled_with_zeros(cache, tmp_path, command):
    shutil.copytree(cache, tmp_path / "short")
    path = tmp_path / "short" / "rgb.npy"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="rgb.npy: not readable"):
        command("prep_latents", "--toy", 24, "--out", tmp_path / "short", "--batch-size", 8)
    assert path.stat().st_size == 5000


def test_maps_are_shown_as_the_released_weights_have_them(tmp_path, command):
    """A ramp of 4:3 has its range over the whole picture: its square from -0.75 to 0.75, not from -1 to 1.
    What no segment covers is black in the file, and a colour to the network. meta.json says both, and what
    samples from the cache's models obeys it.
    """
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    segments = np.zeros((48, 64, 3), np.uint8)
    segments[:, 32:] = (200, 30, 90)
    for m, array in (("rgb", ramp), ("depth", ramp), ("seg", segments)):
        (tmp_path / "t" / m).mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / "t" / m / "a.png")
    flags = ("--data", tmp_path / "t", "--vae", "none", "--size", 48, "--no-dino", "--out")
    held = {}
    for name, more in (("new", ()), ("old", ("--depth-over", "crop", "--uncovered", "black"))):
        command("prep_latents", *flags, tmp_path / name, *more)
        cache = dataset.Cache(tmp_path / name)
        held[name] = {m: cache.array(m)[0] for m in ("depth", "seg")}
        meta = cache.meta
        request = sample.Request(0, "a", 0, {m: tmp_path / "t" / m / "a.png" for m in ("depth", "seg")})
        read = sample.read_input(request, sample.fit_of("crop", 48, 2), False,
                                 dict.fromkeys(("depth", "seg"), Facts()), shown_of(meta, "m"))
        for m, pixels in read.pixels.items():
            assert np.abs((pixels + 1) * 127.5 - held[name][m]).max() <= 1
    assert meta["shown"] == {} and dataset.read_meta(tmp_path / "new")["shown"] == {
        "depth_over": "picture", "uncovered": "colour"}
    low, high = held["new"]["depth"].min(), held["new"]["depth"].max()
    assert [low, high] == pytest.approx([255 / 8, 255 * 7 / 8], abs=3)
    assert held["old"]["depth"].min() == 0 and held["old"]["depth"].max() == 255
    assert not held["old"]["seg"][:, :, :24].any()
    colour = held["new"]["seg"][:, 0, 0]
    assert colour.any() and (held["new"]["seg"][:, :, :24] == colour[:, None, None]).all()
    assert np.array_equal(held["new"]["seg"][:, :, 24:], held["old"]["seg"][:, :, 24:])
    del meta["shown"]  # an older cache goes on as it was begun
    (tmp_path / "old/meta.json").write_text(json.dumps(meta))
    command("prep_latents", *flags, tmp_path / "old", "--depth-over", "crop", "--uncovered", "black")
    with pytest.raises(InputError, match="shown is --depth-over crop .*run has --depth-over picture"):
        command("prep_latents", *flags, tmp_path / "old")


def test_depth_is_learned_in_log_and_between_quantiles(tmp_path, command):
    """Of 16 bits in millimetres, with unknown pixels: the cache's pixels are those computed here."""
    depth = np.round(np.geomspace(500, 8000, 48 * 48)).reshape(48, 48).astype(np.uint16)
    depth[:4] = 0
    for m, array in (("rgb", np.zeros((48, 48, 3), np.uint8)), ("depth", depth)):
        (tmp_path / "t" / m).mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / "t" / m / "a.png")
    flags = ("--data", tmp_path / "t", "--vae", "none", "--size", 48, "--no-dino", "--out")
    with pytest.raises(InputError, match="t: depth is learned as log, .*by default"):
        command("prep_latents", *flags, tmp_path / "no", "--depth-target", "log")
    assert not (tmp_path / "no").exists()
    command("prep_latents", *flags, tmp_path / "log", "--depth-space", "depth", "--depth-target", "log",
            "--depth-norm", "quantile")
    cache = dataset.Cache(tmp_path / "log")
    assert cache.meta["shown"] == {"depth_over": "picture", "uncovered": "colour", "depth_norm": "quantile",
                                   "depth_target": "log"}
    near = -np.log(depth[4:] / 1000)
    low, high = np.quantile(near, (0.02, 0.98))
    want = ((near - low) / (high - low)).clip(0, 1) * 255
    assert np.abs(cache.array("depth")[0][:, 4:] - want).max() <= 1
    assert (cache.array("depth")[0][:, :4] == cache.array("depth")[0][:, 4:5]).all()  # the nearest known
    command("prep_latents", *flags, tmp_path / "plain")
    command("prep_latents", *flags, tmp_path / "told", "--depth-norm", "minmax", "--depth-target",
            "disparity")
    for name in ("meta.json", "depth.npy"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "told" / name).read_bytes()
    with pytest.raises(InputError, match="minmax .*, this run has .* --depth-norm quantile"):
        command("prep_latents", *flags, tmp_path / "plain", "--depth-norm", "quantile")


def test_views_of_pictures(tree, tmp_path, command, monkeypatch):
    path = first(tree, "normal")
    normal = np.array(Image.open(path))
    normal[:8, :24] = 0  # unknown, at the left
    Image.fromarray(normal).save(path)
    views = {"whole": View(), "mirrored": View(mirrored=True), "part": View(0.75, 1.0, 0.25)}
    for name, view in views.items():
        monkeypatch.setattr(View, "of", lambda *_, view=view: view)
        command("prep_latents", "--data", tree, "--vae", "none", "--size", 64, "--no-dino", "--views", 2,
                "--out", tmp_path / name)

    def rows(name, m):
        return np.split(Cache(tmp_path / name).array(m), 2)                    # (4, ...) each

    for m in ("rgb", "depth", "normal", "seg"):
        whole, again = rows("whole", m)                                        # (4, 3, 64, 64) each
        assert np.array_equal(whole, again)
        if m == "normal":
            whole = np.concatenate([255 - whole[:, :1], whole[:, 1:]], 1)  # -x
        assert np.array_equal(whole[..., ::-1], rows("mirrored", m)[1]), m
    image = Image.open(first(tree)).crop((16, 4, 64, 52))
    assert np.array_equal(rows("part", "rgb")[1][0], np.moveaxis(np.array(centre_crop(image, 64)), 2, 0))
    whole, mirrored = (np.unpackbits(x, axis=1).reshape(4, 64, 64) for x in rows("mirrored", "normal_known"))
    assert not whole.all() and np.array_equal(whole[..., ::-1], mirrored)
    assert np.array_equal(*rows("part", "labels"))
    assert (tmp_path / "part/names.txt").read_text().splitlines()[4].endswith(" (view 1)")
    with pytest.raises(InputError, match="--views, .* belong to --data"):
        command("prep_latents", "--toy", 2, "--views", 2, "--out", tmp_path / "toy")
    normal[4:] = 0  # known above the part alone: such a view does not have it
    Image.fromarray(normal).save(path)
    command("prep_latents", "--data", tree, "--vae", "none", "--size", 64, "--no-dino", "--views", 2,
            "--out", tmp_path / "above")
    whole, part = rows("above", "normal_known")
    assert whole[0].any() and not part[0].any() and part[1:].any(1).all()


def test_the_toy_world_knows_its_log_depth(cache, tmp_path, command):
    flags = ("--toy", 2, "--vae", "none", "--no-dino", "--out", tmp_path / "log", "--depth-target", "log")
    command("prep_latents", *flags)
    held = dataset.Cache(tmp_path / "log")
    assert held.meta["shown"] == {"depth_target": "log"} and "shown" not in dataset.read_meta(cache)
    far = np.log(toy_scenes.render(1).depth)
    want = (far.max() - far) / np.ptp(far) * 255
    assert np.abs(held.array("depth")[1] - want).max() <= 1


def test_a_repaired_picture_is_taken_up(tree, tmp_path, command):
    path, out = first(tree), tmp_path / "out"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    arguments = ("--data", tree, "--vae", "toy", "--size", 64, "--no-dino", "--out", out)
    command("prep_latents", *arguments, "--skip-broken")
    path.write_bytes(whole)
    assert "4 rows" in command("prep_latents", *arguments)


def test_a_derived_modality_needs_no_files(command, tmp_path):
    for i in range(2):
        path = tmp_path / "tree/rgb/a" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(toy_scenes.render(i).rgb).save(path)
    command("prep_latents", "--data", tmp_path / "tree", "--out", tmp_path / "cache", "--size", 64,
            "--vae", "none", "--no-dino", "--modalities", "rgb", "canny")
    rgb, edges = (np.load(tmp_path / "cache" / f"{m}.npy") for m in ("rgb", "canny"))
    assert (edges[0] == canny(rgb[0].transpose(1, 2, 0)).transpose(2, 0, 1)).all() and edges.any()
    command("prep_latents", "--toy", 2, "--out", tmp_path / "toy", "--vae", "none",
            "--modalities", "rgb", "seg", "canny")
    assert (np.load(tmp_path / "toy/canny.npy") == edges).all()


def test_feature_vectors_of_a_timm_model(tree, tmp_path, command):
    """The pooled vector of a small random model from a local file, at mean square 1; errors are named."""
    import timm
    from safetensors.torch import save_file
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    flags = ("--data", tree, "--size", 64, "--vae", "toy", "--no-dino", "--seg-mode", "semantic")
    local = ("--feature", "test_vit", "--feature-file", tmp_path / "vit.safetensors", "--out", tmp_path / "c")
    command("prep_latents", *flags, *local)
    meta = json.loads((tmp_path / "c/meta.json").read_text())
    rows = np.load(tmp_path / "c/feature.npy").astype(float)
    assert meta["feature"] == "test_vit" and rows.shape == (4, meta["feature_size"])
    assert np.allclose((rows ** 2).mean(1), 1, atol=1e-2)
    config, rgb = model.pretrained_cfg, np.asarray(Image.open(first(tree)))
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    x = (torch.from_numpy(rgb.copy()).permute(2, 0, 1).float() / 255 - mean) / std
    size = config["input_size"][1:]
    with torch.no_grad():
        x = torch.nn.functional.interpolate(x[None], size, mode="bicubic", antialias=True)
        direct = model(x)[0].double().numpy()
    assert (rows[0] @ direct) / np.linalg.norm(rows[0]) / np.linalg.norm(direct) > 0.999
    assert np.allclose(rows[0], to_unit(direct), atol=1e-2)
    assert "largest difference" in command("prep_latents", *flags, *local, "--verify")
    with pytest.raises(InputError, match="nonsense: .*--feature nonsense"):
        command("prep_latents", *flags, "--feature", "nonsense", "--out", tmp_path / "d")
    for files in (("--seg-mode", "instance"), ("--depth-space", "depth"), ("--palette", "p.json")):
        with pytest.raises(InputError, match="and --palette belong to --data"):
            command("prep_latents", "--toy", 4, *files, "--out", tmp_path / "none")
    with pytest.raises(InputError, match="--feature-file belongs to --feature"):
        command("prep_latents", "--toy", 4, "--feature-file", "f.pt", "--out", tmp_path / "none")
    with pytest.raises(InputError, match="toy-teacher, and it alone"):
        command("prep_latents", "--toy", 4, "--feature", "test_vit", "--out", tmp_path / "d")


# ------------------------------------------------------------------------------------------------
# No classes, and indices.

PLAIN_FACTS = ("--vae", "none", "--no-dino", "--size", 64)


def write_index(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(tree, base):
    """A tree's samples as lines of an index beside it, the last first."""
    names = sorted(path.relative_to(tree / "rgb") for path in (tree / "rgb").rglob("*.png"))[::-1]
    return [{m: str((tree / m / name).relative_to(base)) for m in ("rgb", "depth", "normal", "seg")}
            for name in names]


def test_a_cache_without_classes_is_trained_and_sampled(tree, tmp_path, command):
    """Of scenes and of files: all is of the null class, from a checkpoint of any number of classes."""
    command("prep_latents", "--data", tree, "--out", tmp_path / "files", *PLAIN_FACTS, "--no-class")
    command("prep_latents", "--toy", 4, "--out", tmp_path / "toy", "--no-dino", "--no-class")
    for name in ("files", "toy"):
        meta = json.loads((tmp_path / name / "meta.json").read_text())
        assert meta["num_classes"] == 0 and meta["class_names"] == []
        assert not np.load(tmp_path / name / "labels.npy").any() and len(Cache(tmp_path / name).rows) == 4
    run, out = tmp_path / "run", ("--out", tmp_path / "out")
    said = command("train", "--data", tmp_path / "toy", "--run", run, "--model", "T/2", "--steps", 1,
                   "--batch-size", 4, "--repa-weight", 0, "--init", DEMO / "mmgen.pt")
    assert "class rows: 0 of 0 known" in said
    null, classes = (load_model(path, weights=part).model.y_embedder.weight
                     for path, part in ((run, "model"), (DEMO / "mmgen.pt", "ema")))
    assert null.shape == (1, 192) and (null - classes[-1:]).abs().max() < 2e-4  # of one step
    generate = ("sample", "--task", "generate", "--ckpt", run, "--sampler", "euler", "--steps", 1, *out)
    for flags in (("--class-id", 0), ("--classes", "balanced")):
        with pytest.raises(InputError, match=f"{flags[0]} .*this checkpoint has no classes; leave it out"):
            command(*generate, *flags)
    said = command(*generate, "--num", 2, "--cfg", 2)
    assert "no effect on pictures without a class\n" in said
    samples = json.loads((tmp_path / "out/meta.json").read_text())["samples"]
    assert [(one["class_id"], one["class_name"]) for one in samples] == [(0, None)] * 2


def test_an_index_is_the_tree_that_it_lists(tree, tmp_path, command):
    """The same rows in its own order; a class is its own to tell, and may be none."""
    flags = (*PLAIN_FACTS, "--seg-mode", "semantic")
    command("prep_latents", "--data", tree, "--out", tmp_path / "a", *flags)
    rows = rows_of(tree, tmp_path)
    for row, label in zip(rows, ("10", 2, None, "2")):
        row.update({"class": label})
    rows[3]["rgb"] = str(tmp_path / rows[3]["rgb"])  # absolute
    rows[2]["name"] = "e\u0301"
    index = write_index(tmp_path / "list.jsonl", rows)
    index.write_text(index.read_text().replace("\n", "\n\n", 1) + "  \n")
    out = command("prep_latents", "--data", index, "--out", tmp_path / "b", *flags)
    assert "4 samples, 1 of no class, 2 classes" in out and "depth files hold disparity (by " in out
    for stem in ("rgb", "depth", "normal", "seg"):
        a, b = (np.load(tmp_path / name / f"{stem}.npy") for name in "ab")
        assert np.array_equal(a[::-1], b), stem
    meta = json.loads((tmp_path / "b/meta.json").read_text())
    assert meta["class_names"] == ["2", "10"] and meta["source"] == "index"
    assert np.load(tmp_path / "b/labels.npy").tolist() == [1, 0, 2, 0]
    assert Cache(tmp_path / "b").gather(np.arange(4), ["labels"])["labels"].tolist() == [1, 0, 2, 0]
    names = (tmp_path / "b/names.txt").read_text().splitlines()
    assert names[2] == "\u00e9" and names[3] == rows[3]["rgb"][len(str(tmp_path)) + 1:-len(".png")]
    rows[0]["class"] = "2"
    rows[1]["class"] = "10"
    write_index(index, rows)
    with pytest.raises(InputError, match="labels.npy: row 0 is of class 1, in this run of 0; use another"):
        command("prep_latents", "--data", index, "--out", tmp_path / "b", *flags)


def test_the_released_codes_metadata_is_an_index(tree, tmp_path, command):
    """Its keys; classes as idx_cat numbers them, 1000 is none; what is broken is named by its line."""
    theirs = {"rgb": "path_rgb", "depth": "path_depth", "normal": "path_normal", "seg": "path_mask"}
    rows = [{theirs[m]: str(tmp_path / path) for m, path in row.items()} for row in rows_of(tree, tmp_path)]
    for i, (row, label) in enumerate(zip(rows, ("a", "b", "indoor", "outdoor"))):
        row.update(cat=label, idx_cat=(7, 3, 1000, 1000)[i], path_rel_rgb=f"x/{i}.png", caption="a room")
    index = write_index(tmp_path / "list.jsonl", rows)
    out = command("prep_latents", "--data", index, "--out", tmp_path / "a", *PLAIN_FACTS)
    assert "the key 'caption' of 4 lines is left out, no modality" in out
    meta = json.loads((tmp_path / "a/meta.json").read_text())
    assert meta["class_names"] == ["b", "a"] and meta["modalities"] == ["rgb", "depth", "normal", "seg"]
    assert np.load(tmp_path / "a/labels.npy").tolist() == [1, 0, 2, 2]
    assert (tmp_path / "a/names.txt").read_text() == "x/0\nx/1\nx/2\nx/3\n"
    pathlib.Path(rows[2]["path_mask"]).unlink()
    with pytest.raises(InputError, match=r"list.jsonl: line 3: .*\.png: no such file"):
        command("prep_latents", "--data", index, "--out", tmp_path / "b", *PLAIN_FACTS)
    command("prep_latents", "--data", index, "--out", tmp_path / "b", *PLAIN_FACTS, "--skip-broken")
    assert np.load(tmp_path / "b/done.npy").tolist() == [1, 1, 2, 1]
    for out in (tree, pathlib.Path(rows[0]["path_rgb"]).parent / "more"):
        with pytest.raises(InputError, match="whose pictures are read; use another folder"):
            command("prep_latents", "--data", index, "--out", out, *PLAIN_FACTS)


@pytest.mark.parametrize("lines, message", [
    (["[1]"], "line 1: holds a list"), (["{"], "line 1: not readable"),
    ([b"\xff\xfe"], "line 1: not readable"), (["[" * 60000], "line 1: not readable"),
    (["x" * 70000], "line 1: is over 65536 bytes"),
    (["", " "], "holds no sample"), (['{"depth": "a"}'], "line 1: has no rgb"),
    (['{"rgb": "a", "depth": "b"}', '{"rgb": "c"}'], "line 2: has no depth, line 1 has"),
    (['{"rgb": "a"}', '{"rgb": "c", "mask": "b"}'], "line 1: has no seg, line 2 has"),
    (['{"rgb": "a.png"}', "", '{"rgb": "./a.jpg"}'], "line 3: is of the name a, as line 1"),
    (['{"rgb": "a", "path_rgb": "b"}'], "line 1: says rgb twice"), (['{"rgb": 3}'], "line 1: rgb is '3'"),
    (['{"rgb": ""}'], "line 1: rgb is ''"), (['{"rgb": "a\\u0000"}'], "line 1: rgb is"),
    (['{"rgb": "a\\ud800"}'], "line 1: not readable"), (['{"rgb": "a", "name": "x\\ny"}'], "line 1: name is"),
    (['{"rgb": "a", "class": ["x"]}'], "line 1: class is"), (['{"rgb": "a", "class": true}'], "class is 'T"),
    (['{"rgb": "a", "idx_cat": -1}'], "line 1: idx_cat is -1"),
    (['{"rgb": "a", "cat": "x", "idx_cat": 1}', '{"rgb": "b", "cat": "y", "idx_cat": 1}'],
     "line 2: class y is number 1, in line 1 x is 1"),
    (['{"rgb": "a", "cat": "x", "idx_cat": 1}', '{"rgb": "b", "cat": "x", "idx_cat": 2}'],
     "line 2: class x is number 2, in line 1 x is 1"),
    (['{"rgb": "a", "depth": "t/depth/a.png"}', '{"rgb": "b", "depth": "u/depth/a.png"}'],
     "trees of different tree.json .*say what they hold in")])
def test_what_is_no_index_is_named_by_its_line(lines, message, tmp_path, command):
    index = tmp_path / "list.jsonl"
    index.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    for name in "tu":
        (tmp_path / name).mkdir()
        (tmp_path / name / "tree.json").write_text('{"format": "mmgen-tree-1"}')
    with pytest.raises(InputError, match=message) as error:
        command("prep_latents", "--data", index, "--out", tmp_path / "out", *PLAIN_FACTS)
    assert str(error.value).startswith(str(index)) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("label", (-1, 13))
def test_a_label_beyond_the_classes_is_named(label, cache, tmp_path):
    """12 stands for none."""
    shutil.copytree(cache, tmp_path / "c")
    labels = np.load(cache / "labels.npy")
    labels[3] = label
    np.save(tmp_path / "c/labels.npy", labels)
    with pytest.raises(InputError, match=f"c/labels.npy: classes .*{label}.*, meta.json has 12"):
        Cache(tmp_path / "c")


def test_a_class_of_null_is_none_whatever_its_number(tmp_path):
    row = {"rgb": "a.png", "class": None, "idx_cat": 5}
    index = write_index(tmp_path / "list.jsonl", [row, {"rgb": "b.png", "idx_cat": 5}])
    assert listing.list_samples(index).labels == [None, "5"]


def test_an_index_holds_what_its_files_tree_says(tmp_path):
    for name in ("near", "far"):
        (tmp_path / name).mkdir()
    (tmp_path / "far/tree.json").write_text('{"format": "mmgen-tree-1", "depth_space": "depth"}')
    row = {"rgb": "photos/a.png", "depth": "../far/depth/x/a.png"}
    found = listing.list_samples(write_index(tmp_path / "near/list.jsonl", [row]))
    assert found.files["depth"] == {"photos/a": tmp_path / "near/../far/depth/x/a.png"}
    assert facts_of(listing.place_of_facts(found)).depth_space == "depth"
    (tmp_path / "near/tree.json").write_text('{"format": "mmgen-tree-1"}')
    assert facts_of(listing.place_of_facts(found)).depth_space == "disparity"  # beside it goes before
    wanted = ("rgb", "canny")
    assert listing.list_samples(tmp_path / "near/list.jsonl", wanted).modalities == wanted
