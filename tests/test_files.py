"""Strangers' files: listed, named and read in one way by all commands, and never written over."""
import json
import os
import pathlib
import platform
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import distributed
import evaluation
import listing
import locks
import modalities
import prep_latents
import pseudo_label
import runs
import sample
import toy_scenes
import trees
from conftest import ROOT, TRAIN, shell
from distributed import InputError, check_apart, check_folder, whole_file
from images import centre_crop, label_colour
from locks import only_writer
from metrics import Depth, Normal, angles
from modalities import MODALITIES, PLAIN_FACTS, check_turned, read_mask, read_picture, read_rgb
from vae import load_vae
from weights import DEMO, load_model

DEPTH = PLAIN_FACTS._replace(depth_space="depth")
QUICK = ("--sampler", "euler", "--steps", 1)


def save(path, values, **options):
    """An array as a picture, whose mode numpy's type tells, or as .npy -> its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".npy":
        with open(path, "wb") as file:
            np.save(file, values)
    else:
        Image.fromarray(values).save(path, **options)
    return path


def grey(path, value=90, size=(8, 8)):
    return save(path, np.full((*size, 3), value, np.uint8))


def tree(folder, count=2):
    """A tree of toy scenes."""
    for seed in range(toy_scenes.HELD_OUT, toy_scenes.HELD_OUT + count):
        scene = toy_scenes.render(seed)
        save(folder / f"rgb/a/{seed}.png", scene.rgb)
        save(folder / f"seg/a/{seed}.png", toy_scenes.PALETTE[scene.seg])
    return folder


# ------------------------------------------------------------------------------------------------
# Lists and names.

def test_one_listing(tmp_path, capsys):
    """Links are followed, hidden names left out, endings in any case, all formats; the rest is counted."""
    base = tmp_path / "p"
    for name in ("a/1.png", "a/2.PNG", "b.c/x.0001.gif", ".hidden/3.png", "a/._4.png"):
        grey(base / name)
    save(base / "a/5.NPY", np.zeros((4, 4)))
    (base / "a/notes.txt").write_text("mine")
    grey(tmp_path / "elsewhere/6.png")
    (base / "linked").symlink_to(tmp_path / "elsewhere")
    (base / "a/circle").symlink_to(base)
    (base / "a/lost.png").symlink_to(tmp_path / "nowhere.png")
    found = [path.relative_to(base).as_posix() for path in trees.find_pictures(base)]
    assert found == ["a/1.png", "a/2.PNG", "b.c/x.0001.gif", "linked/6.png"]
    said = capsys.readouterr().out
    for part in ("2 hidden", "1 circular", "1 that lead nowhere", "ending (.txt)", "ending (.npy)"):
        assert part in said
    stems = list(trees.pictures_by_stem(base))
    assert stems == ["a/1", "a/2", "a/5", "b.c/x.0001", "linked/6"]
    assert trees.stem_of(base / "frame.0001", base) == "frame.0001"  # not an ending
    (base / ".hidden/3.png").rename(base / ".hidden/.3.png")
    with pytest.raises(InputError, match=r"no pictures in this folder \(left out: 1 hidden\)"):
        trees.find_pictures(base / ".hidden")


def test_links_that_lead_into_each_other_are_followed_once(tmp_path, capsys):
    for one, other in ("pq", "qp"):
        grey(tmp_path / one / f"{one}.png")
        for name in "12":  # the ways would double at each step
            (tmp_path / one / name).symlink_to(tmp_path / other)
    found = [path.relative_to(tmp_path).as_posix() for path in trees.find_pictures(tmp_path)]
    assert found == ["p/1/q.png", "p/2/q.png", "p/p.png", "q/1/p.png", "q/2/p.png", "q/q.png"]
    assert "8 circular" in capsys.readouterr().out


def test_accents_match_in_both_spellings(tmp_path):
    for m, form in (("rgb", "NFC"), ("seg", "NFD")):
        grey(tmp_path / m / unicodedata.normalize(form, "café") / unicodedata.normalize(form, "é.png"), 9)
    source = prep_latents.PictureSource(listing.list_samples(tmp_path), 8)
    assert source.names == ["café/é"] and source.told["class_names"] == ["café"]


def test_long_names_and_names_that_are_not_text(tmp_path, command):
    long = "n" * 251
    with whole_file(tmp_path / f"{long}.png") as file:
        file.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == [f"{long}.png"]
    short = trees.flat_name(f"folder/{long}")
    assert len(short) == trees.LONGEST and short != trees.flat_name(f"folder/{long}x")
    assert trees.flat_name(short) == short and trees.flat_name("a/b.0001") == "a_b.0001"
    assert distributed._one_line(InputError("line\nbreak.png: no file")) == "line\\nbreak.png: no file"
    odd = os.fsdecode(b"caf\xe9")
    for m in ("rgb", "seg"):
        grey(tmp_path / "t" / m / odd / f"{odd}.png", 9, (64, 64))
        grey(tmp_path / "t" / m / odd / f"{long}.png", 9, (64, 64))
    command("prep_latents", "--data", tmp_path / "t", "--out", tmp_path / "c", "--no-dino", "--vae", "none",
            "--size", 64)
    assert b"caf\xe9/caf\xe9\n" in (tmp_path / "c/names.txt").read_bytes()
    command("sample", "--task", "understand", "--image", tmp_path / "t", "--out", tmp_path / "s", *QUICK,
            "--ckpt", DEMO / "mmgen.pt")
    assert len(list((tmp_path / "s/depth").glob("*.npy"))) == 2
    done = shell("eval_depth.py", "--data", tmp_path / "t", "--seg-mode", "instance", "--out", tmp_path / "e",
                 *QUICK, "--ckpt", DEMO / "mmgen.pt", "--save-maps")
    assert done.returncode == 0 and "caf" in done.stdout
    assert len(list((tmp_path / "e/seg").glob("*.png"))) == 2


def test_classes_in_natural_order(tmp_path):
    for name in ("10", "2", "1", "0"):
        grey(tmp_path / "rgb" / name / "x.png")
    source = prep_latents.PictureSource(listing.list_samples(tmp_path), 8)
    assert source.told["class_names"] == ["0", "1", "2", "10"]
    assert [(name, int(label)) for name, label in zip(source.names, source.labels)] == [
        ("0/x", 0), ("1/x", 1), ("10/x", 3), ("2/x", 2)]


def test_a_folder_of_another_name_is_read_or_named(tmp_path, capsys):
    for m in ("rgb", "mask", "normals"):
        grey(tmp_path / m / "a.png")
    assert list(trees.folders_of(tmp_path)) == ["rgb", "seg"]
    said = capsys.readouterr().out
    assert "mask: is read as seg" in said and "normals: left out, normal is meant?" in said
    grey(tmp_path / "seg/a.png")
    assert trees.folders_of(tmp_path)["seg"].name == "seg"
    assert "mask: left out, seg is meant?" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Unknown pixels.

def test_unknown_pixels_are_filled_before_anything_is_resized(tmp_path):
    """Holes of depth change the map nowhere but in them; the range is that of the known ones."""
    full = (2000 + 2000 * np.mgrid[:480, :640][0] / 479).round().astype(np.uint16)
    holes = full.copy()
    holes[100:130, 200:260] = 0
    holes[300:305] = 65535  # the sensor's "no value"
    floats = np.where((holes == 0) | (holes == 65535), np.nan, holes / 1000)
    row, maps = MODALITIES["depth"], []
    for name, values in (("full.png", full), ("holes.png", holes), ("nan.npy", floats)):
        raster = row.open(save(tmp_path / name, values), DEPTH)
        maps.append(row.pixels(raster, lambda image, nearest: centre_crop(image, 64, nearest)))
        assert (raster.known is None) == (name == "full.png")
    for other in maps[1:]:
        assert np.abs(other - maps[0]).mean() < 0.01
        assert np.corrcoef(other.ravel(), maps[0].ravel())[0, 1] > 0.99
    one = full.copy()
    one[10, 10] = 0
    pixels = row.pixels(row.open(save(tmp_path / "one.png", one), DEPTH))
    assert pixels.min() == -1 and pixels.max() == 1 and np.sort(pixels.ravel())[100] < -0.99
    with pytest.raises(InputError, match="none of its pixels is known"):
        row.pixels(row.open(save(tmp_path / "none.png", np.zeros((4, 4), np.uint16)), DEPTH))


def test_unknown_of_normals_and_of_transparent_pixels(tmp_path):
    normal = np.zeros((4, 4, 3), np.float32)
    normal[..., 2] = 1
    normal[0] = 0
    normal[1, 0] = np.nan
    picture = ((np.nan_to_num(normal) * 0.5 + 0.5) * 255).round().astype(np.uint8)  # zero becomes grey
    black = picture.copy()
    black[:1] = 0
    black[1, 0] = 0
    clear = np.dstack([picture, np.full((4, 4), 255, np.uint8)])
    clear[0, :, 3] = clear[1, 0, 3] = 0
    row = MODALITIES["normal"]
    for name, values in (("a.npy", normal), ("b.png", picture), ("c.png", black), ("d.png", clear)):
        raster = row.open(save(tmp_path / name, values))
        assert raster.known.sum() == 11 and not raster.known[0].any() and not raster.known[1, 0], name
        assert np.abs(row.array(raster) - [0, 0, 1]).max() < 0.01, name
        truth = Normal.read(row, raster)
        assert (truth[0] == 0).all() and len(angles(normal, truth)) == 11, name
    depth = np.dstack([np.full((4, 4), 100, np.uint8)] * 3 + [np.full((4, 4), 255, np.uint8)])
    depth[0] = (255, 255, 255, 0)
    raster = MODALITIES["depth"].open(save(tmp_path / "depth.png", depth))
    assert (MODALITIES["depth"].array(raster) == 100).all()
    strokes = np.zeros((4, 4, 4), np.uint8)
    strokes[:2] = 255
    strokes[3, :, :3] = 255  # white, and transparent
    assert read_mask(save(tmp_path / "strokes.png", strokes)).values.sum() == 8


# ------------------------------------------------------------------------------------------------
# Bit depth and range.

def test_unknown_disparity_is_told(tmp_path):
    """A stereo matcher's 0 and a raster's "no data" are values, unless tree.json says which."""
    row, values = MODALITIES["depth"], np.array([[0, 50, 100, 200]] * 4, np.uint8)
    path = save(tmp_path / "t/depth/a.png", values)
    assert row.open(path).known is None
    modalities.write_facts(tmp_path / "t", depth_void=0)
    raster = row.open(path, trees.facts_of(path))
    assert raster.known[0].tolist() == [False, True, True, True] and raster.values[0, 0] == 50


def test_one_scene_in_three_files_is_one_condition(tmp_path):
    """16-bit disparity, millimetres and metres."""
    scene = toy_scenes.render(toy_scenes.HELD_OUT)
    disparity = 1 / scene.depth
    levels = ((disparity - disparity.min()) / np.ptp(disparity) * 65535).round().astype(np.uint16)
    files = [(save(tmp_path / "d.png", levels), PLAIN_FACTS), (save(tmp_path / "m.npy", scene.depth), DEPTH),
             (save(tmp_path / "mm.png", (scene.depth * 1000).round().astype(np.uint16)), DEPTH)]
    row = MODALITIES["depth"]
    first, *others = [row.pixels(row.open(path, facts)) for path, facts in files]
    for other in others:
        assert np.abs(other - first).max() < 2e-3


def test_what_could_be_read_in_two_ways_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    wall = np.full((8, 8, 3), (0.5, 0.5, 1.0), np.float32)
    cases = [
        ("depth", "map.png", colours, "is in colours .*not a colour map or packed bytes"),
        ("normal", "encoded.npy", wall, r"values in \[0, 1\] that are no unit vectors"),
        ("normal", "grey.png", colours[..., 0], "mode L; normals need three channels"),
        ("normal", "whole.npy", np.ones((8, 8, 3), np.int64), "normals are floats"),
        ("rgb", "share.npy", rng.random((8, 8, 3)), "levels from 0 to 255"),
        ("seg", "share.npy", rng.random((8, 8, 3)), "levels from 0 to 255"),
        ("rgb", "float.tiff", rng.random((8, 8)).astype(np.float32), "float32 .*have no scale as colours"),
        ("seg", "float2.tiff", rng.random((8, 8)).astype(np.float32), "labels are whole numbers"),
        ("seg", "mask.png", np.kron([[0, 255]], np.ones((4, 4))).astype(np.uint8), "holds 0 and 255 alone"),
    ]
    for modality, name, values, said in cases:
        path = save(tmp_path / name, values)
        with pytest.raises(InputError, match=f"{name}.*{said}"):
            MODALITIES[modality].open(path)
    assert MODALITIES["depth"].open(save(tmp_path / "grey3.png", colours[..., :1].repeat(3, 2))).top == 255


def test_deep_pictures_are_scaled_by_their_bits(tmp_path):
    level = np.random.default_rng(0).integers(1, 250, (8, 8)).astype(np.uint8)
    deep = level.astype(np.uint16) * 257
    paths = save(tmp_path / "8.png", level), save(tmp_path / "16.png", deep)
    assert np.array_equal(*(np.asarray(read_rgb(path)) for path in paths))
    assert np.array_equal(*(read_mask(path).values for path in paths))
    assert np.array_equal(*(MODALITIES["rgb"].array(MODALITIES["rgb"].open(path)) for path in paths))
    ids = level.astype(np.uint16) * 200
    raster = MODALITIES["seg"].open(save(tmp_path / "ids.png", ids))
    assert np.array_equal(raster.labels, ids)
    assert len(np.unique(raster.values.reshape(-1, 3), axis=0)) == len(np.unique(ids))
    bits = save(tmp_path / "bits.png", level > 100)
    assert np.array_equal(MODALITIES["seg"].open(bits).labels, level > 100)
    metres = save(tmp_path / "far.tiff", np.array([[1.5, 90.0]], np.float32))
    truth = Depth.read(MODALITIES["depth"], MODALITIES["depth"].open(metres, DEPTH))
    assert np.allclose(truth, [[1.5, 90.0]])  # not by its own maximum
    with pytest.raises(InputError, match="8.png: uint8 levels carry no unit"):
        Depth.read(MODALITIES["depth"], MODALITIES["depth"].open(paths[0], DEPTH))
    told = DEPTH._replace(depth_unit=0.01)
    truth = Depth.read(MODALITIES["depth"], MODALITIES["depth"].open(paths[0], told))
    assert np.allclose(truth, level * 0.01)


def test_thin_pictures_are_cut_before_they_grow(monkeypatch):
    sizes, resize = [], Image.Image.resize

    def watched(self, size, *args, **options):
        sizes.append(size[0] * size[1])
        return resize(self, size, *args, **options)
    monkeypatch.setattr(Image.Image, "resize", watched)
    for size in ((20000, 1), (1, 20000), (3, 7000)):
        image = Image.new("RGB", size)
        image.putpixel((size[0] // 2, size[1] // 2), (255, 255, 255))
        assert np.asarray(centre_crop(image, 32)).max() > 200
    assert max(sizes) <= 64 * 32 * 32 * 2


# ------------------------------------------------------------------------------------------------
# What files hold.

def test_tree_json_says_what_files_hold(tmp_path):
    grey(tmp_path / "t/depth/a/x.png")
    where = [tmp_path / "t", tmp_path / "t/depth", tmp_path / "t/depth/a/x.png"]
    assert all(trees.facts_of(path) == PLAIN_FACTS for path in where)
    modalities.write_facts(tmp_path / "t", depth_space="depth", palette=[[1, 2, 3]])
    modalities.write_facts(tmp_path / "t", depth_space="depth", void=7)
    for path in where:
        facts = trees.facts_of(path)
        assert facts.depth_space == "depth" and "tree.json" in facts.said and facts.void == 7
        assert facts.palette.tolist() == [[1, 2, 3]]
    told = trees.facts_of(where[2], "disparity")
    assert told.depth_space == "disparity" and told.said == "by --depth-space"
    with pytest.raises(InputError, match="says depth_space = depth, the files would hold disparity"):
        modalities.write_facts(tmp_path / "t", depth_space="disparity")
    for key, value in (("depth_space", "metres"), ("palette", [[1, 2]]), ("depth_unit", -1), ("void", "x"),
                       ("format", "other"), ("depth-space", "depth"), ("depth_unit", True)):
        held = {"format": modalities.FACTS_FORMAT, key: value}
        (tmp_path / "t/tree.json").write_text(json.dumps(held))
        with pytest.raises(InputError, match=f"tree.json: .*{key}|tree.json: not a list"):
            trees.facts_of(tmp_path / "t")


def test_labels_take_colours_from_who_says_them(tmp_path):
    row, labels = MODALITIES["seg"], np.array([[0, 1, 2, 255]] * 4, np.uint8)
    path = save(tmp_path / "ids.png", labels)
    raster = row.open(path)
    assert np.array_equal(raster.known, labels != 255)
    assert np.array_equal(raster.values[0], label_colour([0, 1, 2, 2]))  # 255 takes the nearest
    assert label_colour([1, 15, 255]).tolist() == [[128, 0, 0], [192, 128, 128], [224, 224, 192]]
    told = np.array([[9, 9, 9], [50, 0, 0], [0, 60, 0]], np.uint8)
    facts = PLAIN_FACTS._replace(palette=told)
    assert np.array_equal(row.open(path, facts).values[0], told[[0, 1, 2, 2]])
    with pytest.raises(InputError, match="labels from 0 to 2, the palette has 2 colours"):
        row.open(path, PLAIN_FACTS._replace(palette=told[:2]))
    with pytest.raises(InputError, match="labels from 0 to 255, the palette has 3 colours"):
        row.open(path, facts._replace(void=1))
    ignored = save(tmp_path / "ids.npy", np.where(labels == 255, -1, labels.astype(np.int64)))
    with pytest.raises(InputError, match='labels from -1 to 2, .*"void"'):
        row.open(ignored)
    assert np.array_equal(row.open(ignored, PLAIN_FACTS._replace(void=-1)).values, raster.values)
    own = Image.fromarray(np.array([[2, 0, 1, 1]] * 4, np.uint8))
    own.putpalette(told[[1, 2, 0]].tobytes())  # an order of its own
    own.save(tmp_path / "own.png")
    raster = row.open(tmp_path / "own.png")
    assert np.array_equal(raster.values[0], told[[0, 1, 2, 2]])
    assert row.open(tmp_path / "own.png", facts).labels[0].tolist() == [0, 1, 2, 2]


def test_colours_of_no_class_are_unknown_in_a_cache(tmp_path, command):
    for m in ("rgb", "seg"):
        colours = np.zeros((16, 16, 3), np.uint8)
        colours[:, 8:] = (200, 30, 90)
        save(tmp_path / f"t/{m}/a.png", colours)
    (tmp_path / "t/tree.json").write_text(json.dumps(
        {"format": "mmgen-tree-1", "seg_mode": "semantic", "palette": [[200, 30, 90], [9, 250, 9]]}))
    command("prep_latents", "--data", tmp_path / "t", "--out", tmp_path / "c", "--vae", "none", "--no-dino",
            "--size", 16)
    assert dataset.Cache(tmp_path / "c").known("seg").tolist() == [0.5]


def test_label_pictures_are_cached_and_scored(tmp_path, command):
    data = tree(tmp_path / "d")
    for path in (data / "seg").rglob("*.png"):
        labels = toy_scenes.render(int(path.stem)).seg.astype(np.uint8)
        labels[:4] = 255
        save(path, labels)
    out = command("prep_latents", "--data", data, "--out", tmp_path / "c", "--no-dino", "--vae", "none",
                  "--size", 64, "--seg-mode", "semantic")
    meta = json.loads((tmp_path / "c/meta.json").read_text())
    assert "files hold labels" in out and meta["palette"] == label_colour(np.arange(6)).tolist()
    (tmp_path / "p.json").write_text(json.dumps(toy_scenes.PALETTE.tolist()))
    command("prep_latents", "--data", data, "--out", tmp_path / "c2", "--no-dino", "--vae", "none", "--size",
            64, "--palette", tmp_path / "p.json")
    colours = np.load(tmp_path / "c2/seg.npy")[0].transpose(1, 2, 0)
    assert {tuple(c) for c in colours.reshape(-1, 3)} <= {tuple(c) for c in toy_scenes.PALETTE.tolist()}
    flags = ("--modality", "seg", "--out", tmp_path / "e", *QUICK, "--ckpt", DEMO / "mmgen.pt")
    for mode in ("semantic", "instance"):
        command("eval_depth", "--data", data, "--seg-mode", mode, "--json", tmp_path / "j", *flags)
        result = json.loads((tmp_path / "j").read_text())
        assert result["miou"] > 0.4 and result["ceiling"]["miou"] > 0.85, mode
    for path in (data / "seg").rglob("*.png"):
        save(path, np.full((64, 64), 255, np.uint8))
    for mode in ("semantic", "instance"):
        with pytest.raises(InputError, match="none of the 2 frames has a valid truth in seg"):
            command("eval_depth", "--data", data, "--seg-mode", mode, *flags)


def test_a_model_of_depth_reads_its_own_output_as_it_is(tmp_path, command):
    """Whatever the training files held, the model speaks disparity; what a file holds is not the model's."""
    weights = torch.load(DEMO / "mmgen.pt", weights_only=True)
    for space in ("disparity", "depth"):
        weights["config"]["meta"]["depth_space"] = space
        torch.save(weights, tmp_path / f"{space}.pt")
        ckpt = ("--ckpt", tmp_path / f"{space}.pt")
        command("sample", "--task", "understand", "--out", tmp_path / space, *QUICK, *ckpt)
        out = command("sample", "--task", "condition", "--given", "depth", "--image", tmp_path / space,
                      "--out", tmp_path / f"{space}-again", *QUICK, *ckpt)
        assert "depth files hold disparity (by default)" in out
        for path in (tmp_path / space / "depth").glob("*.npy"):
            again = np.load(tmp_path / f"{space}-again/depth/{path.name}")
            assert np.corrcoef(np.load(path).ravel(), again.ravel())[0, 1] > 0.999


def test_disparity_of_any_bits_is_scored(tmp_path, command):
    """What pseudo_label.py and toy_scenes.py write is disparity, and is not taken for millimetres."""
    command("toy_scenes", "--num", 2, "--out", tmp_path / "d")
    out = command("eval_depth", "--data", tmp_path / "d", "--modality", "depth", "--out", tmp_path / "e",
                  *QUICK, "--ckpt", DEMO / "mmgen.pt", "--json", tmp_path / "j")
    assert "true depth files hold disparity (by " in out
    assert json.loads((tmp_path / "j").read_text())["ceiling"]["abs_rel"] < 0.06


# ------------------------------------------------------------------------------------------------
# Orientation.

def test_orientation_is_read_alone_and_must_agree(tmp_path):
    rgb = np.zeros((8, 16, 3), np.uint8)
    rgb[:4] = 255

    def tagged(name, tag, array=rgb):
        exif = Image.Exif()
        exif[0x0112] = tag
        Image.fromarray(array).save(tmp_path / name, exif=exif)
        return tmp_path / name
    turned = read_picture(tagged("a.jpg", 6))
    assert turned.values.shape == (16, 8, 3) and turned.turned == 6 and turned.values[0, -1].min() > 200
    assert read_picture(tagged("b.jpg", 9)).turned == 1
    square = np.zeros((8, 8, 3), np.uint8)
    photo, depth = MODALITIES["rgb"], MODALITIES["depth"]
    plain = depth.open(save(tmp_path / "d.png", square[..., 0]))
    for tag in (3, 6):
        raster = photo.open(tagged("c.jpg", tag, square))
        with pytest.raises(InputError, match=f"d.png: its orientation tag is 1, that of .*c.jpg is {tag}"):
            check_turned([raster, plain])
        check_turned([raster, plain._replace(facts=PLAIN_FACTS._replace(upright=True))])
        check_turned([raster, depth.open(tagged("e.png", tag, square))])
    turned = read_picture(tagged("f.tif", 3))  # Pillow turns TIFF files itself
    assert turned.turned == 3 and turned.values[0].max() < 50 < turned.values[-1].min()
    mask = read_mask(tagged("mask.png", 3, square))
    with pytest.raises(InputError, match="mask.png: its orientation tag is 3"):
        check_turned([plain, mask])
    tall = depth.open(save(tmp_path / "tall.png", np.zeros((16, 8), np.uint8)))
    check_turned([photo.open(tmp_path / "a.jpg"), tall])  # its shape says that it was made of the turned one


def test_every_command_that_reads_maps_refuses_one_that_is_turned_alone(tmp_path, command):
    exif, few = Image.Exif(), ("--ckpt", DEMO / "mmgen.pt", *QUICK, "--out", tmp_path / "o")
    exif[0x0112] = 3
    for m, more in (("rgb", {"exif": exif}), ("seg", {})):
        (tmp_path / "t" / m).mkdir(parents=True)
        colours = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(colours).save(tmp_path / "t" / m / "a.png", **more)
    for line in (("prep_latents", "--data", tmp_path / "t", "--vae", "none", "--no-dino", "--size", 64,
                  "--out", tmp_path / "p"),
                 ("eval_depth", "--data", tmp_path / "t", "--seg-mode", "instance", *few),
                 ("sample", "--task", "condition", "--given", "rgb", "seg", "--image", tmp_path / "t", *few)):
        with pytest.raises(InputError, match="its orientation tag is 1, that of"):
            command(*line)


# ------------------------------------------------------------------------------------------------
# What is written.

def test_every_command_ends_in_one_line_and_exit_code_2():
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        assert "__main__" not in text or text.endswith('if __name__ == "__main__":\n    run(main)\n'), path


@pytest.mark.parametrize("line", (
    ("train", *TRAIN, "--data", "CACHE", "--run"), ("prep_latents", "--toy", 4, "--no-dino", "--out"),
    ("sample", "--task", "generate", "--num", 1, "--ckpt", DEMO / "mmgen.pt", *QUICK, "--out"),
    ("eval_depth", "--toy", 1, "--ckpt", DEMO / "mmgen.pt", *QUICK, "--out")))
def test_every_command_that_writes_a_folder_is_its_one_writer(line, cache, tmp_path, command):
    with only_writer(tmp_path), pytest.raises(InputError, match="is writing into it"):
        command(*(cache if word == "CACHE" else word for word in line), tmp_path)


def test_nothing_that_is_read_is_written(tmp_path, command):
    inner = tmp_path / "mine/rgb"
    inner.mkdir(parents=True)
    for out in (inner, tmp_path / "mine", inner / "a/b"):
        with pytest.raises(InputError, match="whose pictures are read; use another folder"):
            check_folder(out, [inner])
    check_folder(tmp_path / "mine/depth", [inner])
    photo = grey(inner / "a.png", 9, (64, 64))
    os.link(photo, tmp_path / "same.png")
    check_apart([tmp_path / "x.png", None], [photo, None])
    with pytest.raises(InputError, match="would be overwritten, and is read"):
        check_apart([tmp_path / "same.png"], [photo])

    before = photo.read_bytes()
    ckpt = ("--ckpt", DEMO / "mmgen.pt", *QUICK)
    with pytest.raises(InputError, match="whose pictures are read"):
        command("sample", "--task", "understand", "--image", inner, "--out", tmp_path / "mine", *ckpt)
    with pytest.raises(InputError, match="whose pictures are read"):
        command("prep_latents", "--data", tmp_path / "mine", "--out", inner, "--vae", "none", "--no-dino")
    normal = np.zeros((64, 64, 3), np.float32)
    normal[..., 2] = 1
    save(tmp_path / "gt/normal/a.npy", normal)
    save(tmp_path / "pred/normal/a.npy", np.roll(normal, 1, -1))
    flags = ("--pred", tmp_path / "pred", "--gt", tmp_path / "gt", "--modality", "normal", "--save-maps",
             "--out")
    with pytest.raises(InputError, match="whose pictures are read"):
        command("eval_depth", *flags, tmp_path / "gt")
    save(tmp_path / "out/normal/a.npy", normal)
    with pytest.raises(InputError, match="a.npy: is there, and not by an evaluation"):
        command("eval_depth", *flags, tmp_path / "out")
    for _ in range(2):  # its own maps it may replace
        command("eval_depth", *flags, tmp_path / "new")
    assert np.array_equal(np.load(tmp_path / "out/normal/a.npy"), normal)
    mesh = ("--normal", tmp_path / "gt/normal/a.npy", "--rgb", photo)
    with pytest.raises(InputError, match="a.png: would be overwritten"):
        command("mesh", *mesh, "--out", inner / "a.ply")
    grey(tmp_path / "other.png")
    with pytest.raises(InputError, match="other.png: the views would overwrite it"):
        command("mesh", *mesh, "--out", tmp_path / "other.ply")
    for _ in range(2):
        command("mesh", *mesh, "--out", tmp_path / "b.ply")
    assert photo.read_bytes() == before


def test_results_never_take_the_place_of_what_they_are_of(tmp_path, command):
    """Pictures of a set, checkpoints by their folder, autoencoders, lists."""
    data = tree(tmp_path / "d")
    photo, vae, ckpt = next(data.glob("rgb/a/*.png")), tmp_path / "v.safetensors", tmp_path / "run/1.pt"
    ckpt.parent.mkdir()
    vae.write_bytes((DEMO / "vae.safetensors").read_bytes())
    ckpt.write_bytes((DEMO / "mmgen.pt").read_bytes())
    (tmp_path / "run/latest.pt").symlink_to("1.pt")
    (tmp_path / "run/args.json").write_text('{"lr": 1e-4}')
    grey(tmp_path / "s/x/color/1.jpg")
    save(tmp_path / "s/x/depth/1.png", np.full((8, 8), 900, np.uint16))
    (tmp_path / "frames.txt").write_text("x/color/1.jpg x/depth/1.png\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    own = ("--out", tmp_path / "e", *QUICK, "--ckpt", DEMO / "mmgen.pt")
    for line in (
            ("eval_depth", "--data", data, "--json", photo, *own),
            ("eval_depth", "--toy", 1, "--vae", vae, "--json", vae, *own),
            ("eval_depth", "--toy", 1, *own[:-1], tmp_path / "run", "--json", tmp_path / "run/latest.pt"),
            ("eval_depth", "--scannet", tmp_path / "s", "--list", tmp_path / "frames.txt", "--out", tmp_path),
            ("eval_fid", data, data, "--metrics", "latent-fd", "--json", photo),
            ("eval_fid", data, data, "--metrics", "latent-fd", "--json", tmp_path / "run/args.json"),
            ("eval_fid", data, "--metrics", "latent-fd", "--save-stats", photo),
            ("weights", "--ckpt", ckpt, "--export", ckpt),
            ("weights", "--ckpt", tmp_path / "run", "--export", tmp_path / "run/latest.pt"),
            ("toy_vae", "--init", vae, "--out", vae, "--steps", 1)):
        with pytest.raises(InputError, match="would be overwritten, and is read|no earlier result"):
            command(*line)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_strange_record_is_refused_and_deletes_nothing(tmp_path, command):
    """meta.json of another form, or that names files elsewhere; a log of no run; no name of a mesh."""
    out, mine = tmp_path / "o", grey(tmp_path / "mine.png")
    (out / "rgb").mkdir(parents=True)
    own = {"stem": "x", "index": 0, "class_id": 1, "given": {}}
    good = {"complete": True, "samples": [own], "endings": {"rgb": [".png"]}, "extras": {}}
    for bad in ({"samples": 7}, {"samples": [7]}, {"samples": [{"index": 0}]}, {"endings": 7},
                {"samples": [{**own, "stem": "../../mine"}]}, {"endings": {"..": [".png"]}},
                {"endings": {"rgb": ["/../../mine.png"]}}, {"endings": {"rgb": 7}}, {"extras": [1]}):
        (out / "meta.json").write_text(json.dumps({**good, **bad}))
        with pytest.raises(InputError, match="names its samples in another way"):
            command("sample", "--task", "generate", "--num", 1, "--out", out, "--overwrite", *QUICK, "--ckpt",
                    DEMO / "mmgen.pt")
    assert mine.is_file()
    (tmp_path / "log.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(InputError, match="log.jsonl: is of no training run"):
        runs.begin_log(tmp_path, 0, {})
    assert not (tmp_path / "args.json").exists()
    with pytest.raises(InputError, match="--out .: is no name of a file"):
        command("mesh", "--normal", mine, "--rgb", mine, "--out", ".")


HOLD = """
import sys, time; sys.path.insert(0, sys.argv[1])
import pathlib, distributed, locks
with locks.only_writer(sys.argv[2]), distributed.whole_file(pathlib.Path(sys.argv[2], "a.png")) as file:
    print("held", flush=True); time.sleep(60)
"""


def test_links_hide_no_folder_that_is_read(tmp_path, command):
    """OUT must lie apart from where links lead; a tree.json is found through them."""
    grey(tmp_path / "real/1.png", 9, (64, 64))
    (tmp_path / "list").mkdir()
    (tmp_path / "list/cls").symlink_to(tmp_path / "real")
    with pytest.raises(InputError, match="whose pictures are read"):
        command("sample", "--task", "understand", "--image", tmp_path / "list", "--out", tmp_path / "real",
                "--ckpt", DEMO / "mmgen.pt", *QUICK)
    assert len(list((tmp_path / "real").iterdir())) == 1
    grey(tmp_path / "t/depth/x.png")
    modalities.write_facts(tmp_path / "t", depth_space="depth")
    (tmp_path / "short").symlink_to(tmp_path / "t/depth")
    assert trees.facts_of(tmp_path / "short/x.png").depth_space == "depth"
    odd = tmp_path / os.fsdecode(b"odd\xff")
    odd.mkdir()
    for name in ("mmgen.pt", "vae.safetensors"):
        (odd / name).write_bytes((DEMO / name).read_bytes())
    assert load_model(odd / "mmgen.pt").step == load_model(DEMO / "mmgen.pt").step
    assert load_vae(odd / "vae.safetensors").scale == load_vae("toy").scale


def test_a_folder_has_one_writer(tmp_path, monkeypatch):
    """The second is refused by name, its neighbours' files are left; death frees the folder."""
    folder = tmp_path / "out"
    other = subprocess.Popen([sys.executable, "-c", HOLD, ROOT, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {other.pid} on .* is writing into it"):
            with only_writer(folder):
                pass
        with whole_file(folder / "a.png") as file:
            file.write(b"mine")
        assert len(list(folder.glob(".*.tmp"))) == 1  # the living neighbour's
    finally:
        other.kill()
        other.wait()
    with only_writer(folder), whole_file(folder / "b.png") as file:
        file.write(b"mine")
    distributed._leftovers.cache_clear()
    with whole_file(folder / "a.png") as file:
        file.write(b"again")
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.png"]

    def no_locks(path):
        raise OSError("no locks here")
    monkeypatch.setattr(locks, "_kernel_lock", no_locks)
    with only_writer(folder):
        with pytest.raises(InputError, match="is writing into it"):
            with only_writer(folder):
                pass
    (folder / ".writer").write_text("process 1 on elsewhere")
    with pytest.raises(InputError, match="process 1 on elsewhere"):
        with only_writer(folder):
            pass
    (folder / ".writer").write_text(f"process {other.pid} on {platform.node()}")
    with only_writer(folder):  # that one is dead
        pass
    (folder / ".writer").write_text("process 1 on elsewhere")
    os.utime(folder / ".writer", (0, 0))  # its heart has stopped
    with only_writer(folder):
        pass
    assert not (folder / ".writer").exists()
    with only_writer(tmp_path / "empty"):
        pass
    assert not (tmp_path / "empty").exists()


def test_a_changed_photo_is_labelled_again(tmp_path, command, monkeypatch):
    """By its content: a photo that is replaced by an older file has another map."""
    (tmp_path / "teach.py").write_text("import numpy as np\n"
                                       "def depth(image): return np.asarray(image.convert('L'), float)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rng = np.random.default_rng(0)
    for name in "ab":
        save(tmp_path / f"photos/{name}.png", rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
    flags = ("--images", "photos", "--out", "out", "--depth", "py:teach:depth")
    command("pseudo_label", *flags)
    maps = [tmp_path / f"out/depth/{name}.png" for name in "ab"]
    before = [path.read_bytes() for path in maps]
    save(tmp_path / "photos/a.png", rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
    os.utime(tmp_path / "photos/a.png", (0, 0))
    command("pseudo_label", *flags)
    after = [path.read_bytes() for path in maps]
    assert after[0] != before[0] and after[1] == before[1]
    assert np.array_equal(read_rgb(tmp_path / "out/rgb/a.png"), read_rgb(tmp_path / "photos/a.png"))
    held = json.loads((tmp_path / "out/tree.json").read_text())
    assert held["depth_space"] == "disparity" and held["upright"] is True
    with pytest.raises(InputError, match="depth/a.png: was made of another photo of this name"):
        save(tmp_path / "photos/a.png", rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
        command("pseudo_label", "--images", "photos", "--out", "out", "--seg", "py:teach:depth")
    with pytest.raises(ValueError, match="masks are"):
        pseudo_label.seg_picture(np.zeros((6, 9, 4), bool), (9, 6), 0)  # (H, W, K)
    with pytest.raises(ValueError, match="no unit vectors"):
        pseudo_label.normal_picture(np.full((4, 4, 3), (0.5, 0.5, 1.0)), (4, 4))
    flat = pseudo_label.depth_picture(np.array([[1.0, 2.0], [0.0, 4.0]]), (2, 2), space="depth")
    assert np.asarray(flat).min() == 0 and np.asarray(flat)[1, 0] != 0  # unknown is not the farthest


def test_what_others_have_in_a_folder_is_left(tmp_path, command, monkeypatch):
    """Files of the names that a command writes, but not by it: refused, and as they were."""
    monkeypatch.setattr(evaluation, "GUESSED", 20)
    files = {name: tmp_path / name for name in (
        "c/rgb.npy", "r/log.jsonl", "q/args.json", "e/per_image.csv", "f/grid.png", "g/maps.json", "m.ply",
        "m.png", "p/skipped.txt")}
    for path in files.values():
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    scene = toy_scenes.render(toy_scenes.HELD_OUT)
    picture = tmp_path / "t/rgb/red_cone/2147483649.png"
    grey(picture)
    save(tmp_path / "n.npy", scene.normal.astype(np.float32))
    save(tmp_path / "i/a.png", scene.rgb)
    command("prep_latents", "--toy", 4, "--no-dino", "--out", tmp_path / "cache")
    train = ("train", "--data", tmp_path / "cache", "--model", "T/2", "--steps", 1, "--batch-size", 4,
             "--run")
    score = ("eval_depth", "--toy", 1, "--ckpt", DEMO / "mmgen.pt", *QUICK, "--save-maps", "--out")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teach2.py").write_text("def depth(image): return 1 / 0")
    before = {path: path.read_bytes() for path in (*files.values(), picture)}
    for flag in ("--json", "--save-stats"):
        with pytest.raises(InputError, match="is there, and no earlier result"):
            command("eval_fid", tmp_path / "i", tmp_path / "i", "--metrics", "latent-fd", flag, picture)
    with pytest.raises(InputError, match="is there, and no earlier result"):
        command("eval_depth", "--toy", 1, "--json", picture)
    for line in (
            ("prep_latents", "--toy", 4, "--no-dino", "--out", tmp_path / "c"),
            (*train, tmp_path / "r"), (*train, tmp_path / "q"),
            (*score, tmp_path / "e"), (*score, tmp_path / "f"), (*score, tmp_path / "g"),
            ("mesh", "--normal", "n.npy", "--rgb", "i/a.png", "--out", "m.ply"),
            ("toy_scenes", "--num", 2, "--out", tmp_path / "t"),
            ("pseudo_label", "--images", "i", "--out", "p", "--depth", "py:teach2:depth")):
        with pytest.raises(InputError, match="use another|is of no"):
            command(*line)
    assert before == {path: path.read_bytes() for path in before}
    own = save(tmp_path / "o/depth/a.png", scene.rgb[..., 0])  # not made by the command: not removed by it
    kept = own.read_bytes()
    command("pseudo_label", "--images", tmp_path / "i", "--out", tmp_path / "o", "--depth", "py:teach2:depth",
            "--normal", "py:teach2:depth", "--skip-broken")
    assert own.read_bytes() == kept and "a\t" in (tmp_path / "o/skipped.txt").read_text()


def test_samples_name_their_class_and_say_who_has_none(tmp_path, command):
    for folder in ("red_cone", "elsewhere"):
        grey(tmp_path / "rgb/train" / folder / "x.png", 9, (64, 64))
    out = command("sample", "--task", "understand", "--image", tmp_path, "--out", tmp_path / "s", *QUICK,
                  "--ckpt", DEMO / "mmgen.pt")
    samples = json.loads((tmp_path / "s/meta.json").read_text())["samples"]
    assert [sample["class_name"] for sample in samples] == [None, "red cone"]
    assert "1 of 2 pictures are told their class, 1 have none" in out
    meta = dict(class_names=["x"], num_classes=1)
    assert sample.labels_of(pathlib.Path("x.png"), ["x"], meta) == {"x": 1}
    flat = dict(class_names=["."], num_classes=1)
    assert sample.labels_of(tmp_path, ["y"], flat) == {"y": 0}
