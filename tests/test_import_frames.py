"""import_frames.py: data sets with truth -> the tree that prep_latents.py reads."""
import functools
import json
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

import import_frames
import toy_scenes
from distributed import InputError
from cameras import normals_of
from formats import FORMATS, Format
from locks import only_writer
from metrics import Depth
from modalities import MODALITIES
from studies.run_docs import save
from trees import facts_of, read_facts

ABOVE = pathlib.Path(__file__).resolve().parents
REAL = next((folder / "shared/real" for folder in ABOVE[2:] if (folder / "shared/real").is_dir()), None)
H, W = 12, 16


def photo(i, height=H, width=W):
    return np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)


def ramp(i, height=H, width=W):
    """Depth in levels, 1000 + i at the left, the first two columns unknown."""
    depth = np.tile(np.arange(width, dtype=np.uint16) + 1000 + i, (height, 1))
    depth[:, :2] = 0
    return depth


def pairs(root, colour, depth, count=3):
    """Frames of a data set, names as formats of the number: pictures and 16-bit depth."""
    for i in range(count):
        save(root / colour.format(i), photo(i))
        save(root / depth.format(i), ramp(i))


def read(path):
    return np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path))


def files_of(tree):
    return sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*.*") if path.is_file())


def contents(tree):
    return {path: (tree / path).read_bytes() for path in files_of(tree)}


@pytest.fixture
def mine(tmp_path):
    """The folders of three frames, and the flags that import them."""
    root = tmp_path / "mine"
    pairs(root, "color/{}.png", "depth/{}.png")
    return ["--color", root / "color", "--depth", root / "depth", "--focal", 20, "--out", tmp_path / "tree"]


@pytest.fixture
def done(command):
    """done("--format", "tum", ...) is the command -> what it printed."""
    return functools.partial(command, "import_frames")


def refused(done, words, *flags):
    with pytest.raises(InputError, match=words) as error:
        done(*flags)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------
# Normals. Cameras of axes right, down, forward; normals are left, up, back.

def angles(normal, truth):
    """Degrees between the known of normal (H, W, 3) and truth, and where they are."""
    known = normal.any(-1)
    cosine = (normal * truth).sum(-1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))[known], known


def test_normals_of_a_plane_and_of_a_sphere():
    focal, (height, width) = 110.0, (96, 128)
    u = np.arange(width)[None] - (width - 1) / 2
    v = np.arange(height)[:, None] - (height - 1) / 2
    rays = np.stack(np.broadcast_arrays(u / focal, v / focal, 1.0), -1)
    all_known = np.ones((height, width), bool)

    n = np.array([0.3, 0.5, 0.812404])  # left, up, back: the point z * ray has -z * (n . ray) = -2
    depth = 2 / (rays @ n)
    error, known = angles(normals_of(depth, all_known, focal), n)
    assert known.all() and error.mean() < 0.05
    error, _ = angles(normals_of(np.round(depth * 1000), all_known, focal), n)
    assert error.mean() < 0.5  # of whole millimetres, and of any unit

    square, far = (rays ** 2).sum(-1), 3.0  # a sphere of radius 1 at (0, 0, 3) before a wall at 5
    root = far ** 2 - square * (far ** 2 - 1)
    hit = root > 0
    depth = np.where(hit, (far - np.sqrt(np.maximum(root, 0))) / square, 5.0)
    truth = np.where(hit[..., None], [0, 0, far] - rays * depth[..., None], [0.0, 0, 1])
    error, known = angles(normals_of(depth, all_known, focal), truth)
    assert error.mean() < 0.5 and 0.9 < known.mean() < 1
    assert not known[hit & (truth[..., 2] < 0.1)].any()  # the silhouette is a jump


def test_normals_are_unknown_where_little_is_known():
    depth = np.full((20, 20), 2.0)
    known = np.zeros((20, 20), bool)
    known[:, :10] = True
    known[3, 15] = known[9, 14:18] = True
    normal = normals_of(depth, known, 30.0)
    assert (normal[:, :10] == [0, 0, 1]).all() and not normal[:, 10:].any()


def test_normals_of_rendered_scenes():
    means = []
    for seed in range(4):
        scene = toy_scenes.render(seed, 128)
        normal = normals_of(scene.depth, scene.depth > 0, scene.focal * 64)
        error, known = angles(normal, scene.normal)
        means.append(error.mean())
        assert known.mean() > 0.9
    assert np.mean(means) < 1.5


# ------------------------------------------------------------------------------------------------
# Formats.

def test_scannet(tmp_path, done):
    """The colour is of another size and nearly the same aspect; each scene has its own focal length."""
    root = tmp_path / "scans"
    for scene in ("scene0000_00", "scene0001_00"):
        for i in range(2):
            save(root / scene / "color" / f"{i}.jpg", photo(i, 242, 324))
            save(root / scene / "depth" / f"{i}.png", ramp(i, 120, 160))
    matrix = "570 0 320 0\n0 570 240 0\n0 0 1 0\n0 0 0 1\n"
    for scene in ("scene0000_00", "scene0001_00"):
        (root / scene / "intrinsic").mkdir()
        (root / scene / "intrinsic/intrinsic_depth.txt").write_text(matrix)
    out = tmp_path / "tree"
    said = done("--format", "scannet", "--root", root, "--out", out)
    assert "4 frames" in said and f"{158 / 160:.1%}" in said
    facts = read_facts(out / "tree.json")
    assert facts.focal == 570 and facts.focal_width == 640 and facts.classes == "none"
    assert facts.depth_space == "depth" and facts.depth_unit == 0.001 and facts.depth_void == 0
    assert (read(out / "depth/scene0001_00/1.png") == ramp(1, 120, 160)).all()
    assert read(out / "rgb/scene0001_00/1.png").shape == (120, 160, 3)
    (root / "scene0001_00/intrinsic/intrinsic_depth.txt").unlink()
    said = done("--format", "scannet", "--root", root, "--out", tmp_path / "fallen_back")
    assert "scene0001_00/intrinsic/intrinsic_depth.txt: not there" in said and "577.87 px at" in said
    for text, message in (("nan 0 0 0", "the focal lengths are nan and 0"),
                          ("640 480 577 577 320 240", "holds 6 numbers; give fx, or fx fy cx cy, or a"),
                          ("640 480 320 240", "the focal lengths are 640 and 480; they must be positive and"),
                          ("# camera\n577", "not readable.*give fx, or fx fy cx cy")):
        (root / "scene0001_00/intrinsic/intrinsic_depth.txt").write_text(text)
        refused(done, f"intrinsic_depth.txt: {message}", "--format", "scannet", "--root", root,
                "--out", tmp_path / "other")
    (root / "scene0001_00/intrinsic/intrinsic_depth.txt").write_text(matrix.replace("570", "1170"))
    refused(done, "focal lengths of scene0000_00 and scene0001_00", "--format", "scannet", "--root", root,
            "--out", tmp_path / "other")


def test_7scenes(tmp_path, done):
    root = tmp_path / "chess"
    pairs(root, "seq-01/frame-{:06}.color.png", "seq-01/frame-{:06}.depth.png")
    lost = ramp(0)
    lost[:, 2:6] = 65535
    save(root / "seq-01/frame-000000.depth.png", lost)
    done("--format", "7scenes", "--root", root, "--out", tmp_path / "tree", "--frames", "0:1")
    assert [path for path in files_of(tmp_path / "tree") if "rgb" in path] == [
        "rgb/seq-01/000000.png", "rgb/seq-01/000001.png"]
    depth = read(tmp_path / "tree/depth/seq-01/000000.png")
    assert (depth == np.where(lost == 65535, 0, lost)).all()
    assert read_facts(tmp_path / "tree/tree.json").focal == 585


def test_tum(tmp_path, done):
    """Times pair with the nearest of 0.02 s, each once."""
    root = tmp_path / "fr1"
    for i, (colour, depth) in enumerate((("10.000000", "10.015"), ("10.030", "10.049"), ("10.1", "10.121"))):
        save(root / "rgb" / f"{colour}.png", photo(i))
        save(root / "depth" / f"{depth}.png", ramp(i))
    save(root / "rgb/10.020.png", photo(9))
    said = done("--format", "tum", "--root", root, "--out", tmp_path / "tree")
    assert "2 frames" in said and "left out: 2 rgb without depth" in said
    depth = tmp_path / "tree/depth/fr1"
    assert sorted(path.name for path in depth.iterdir()) == ["10.020.png", "10.030.png"]
    assert (read(depth / "10.020.png") == ramp(0)).all() and (read(depth / "10.030.png") == ramp(1)).all()
    assert read_facts(tmp_path / "tree/tree.json").depth_unit == 0.0002
    said = done("--format", "tum", "--root", root, "--out", tmp_path / "second", "--frames", "1:1")
    assert "1 frames" in said and (tmp_path / "second/rgb/fr1/10.030.png").is_file()


@pytest.mark.parametrize("colour, depth", (("rgb/{}.png", "depth/{}.png"),
                                           ("bath/{}_rgb.png", "bath/{}_depth.png")))
def test_nyu(tmp_path, done, colour, depth):
    pairs(tmp_path / "nyu", colour, depth)
    done("--format", "nyu", "--root", tmp_path / "nyu", "--out", tmp_path / "tree", "--every", 2)
    scene = colour.split("/")[0].replace("rgb", "nyu")
    assert [path.name for path in sorted((tmp_path / "tree/depth" / scene).iterdir())] == ["0.png", "2.png"]
    assert (read(tmp_path / f"tree/depth/{scene}/2.png") == ramp(2)).all()


def test_hypersim(tmp_path, done):
    """A rendered scene in Hypersim's form: depth and normals come back."""
    scene = toy_scenes.render(7, 64)
    focal = scene.focal * 32  # pixels
    u = (np.arange(64) - 31.5)[None] / focal
    v = (np.arange(64) - 31.5)[:, None] / focal
    distance = scene.depth * np.sqrt(u ** 2 + v ** 2 + 1)
    distance[:5] = np.nan
    theirs = scene.normal * [-1, 1, 1]  # +x right
    theirs[20:40] *= -1                 # some face away
    theirs[:5] = np.nan
    shots = tmp_path / "evermotion/ai_001_001/images"
    save(shots / "scene_cam_00_final_preview/frame.0000.color.jpg", photo(1, 64, 64))
    save(shots / "scene_cam_00_final_preview/frame.0000.tonemap.jpg", photo(2, 64, 64))
    geometry = shots / "scene_cam_00_geometry_hdf5"
    save(geometry / "frame.0000.depth_meters.npy", distance.astype(np.float32))
    save(geometry / "frame.0000.normal_cam.npy", theirs.astype(np.float16))
    out, flags = tmp_path / "tree", ("--format", "hypersim", "--root", tmp_path / "evermotion")
    done(*flags, "--focal", focal, "--out", out)
    depth = read(out / "depth/ai_001_001/cam_00_0000.npy")
    assert depth.dtype == np.float32 and not depth[:5].any()
    assert np.abs(depth[5:] / scene.depth[5:] - 1).max() < 1e-5
    picture = read(out / "normal/ai_001_001/cam_00_0000.png")
    assert not picture[:5].any()
    assert np.abs(picture[5:] - ((scene.normal[5:] * 0.5 + 0.5) * 255)).max() <= 1
    tonemap = (shots / "scene_cam_00_final_preview/frame.0000.tonemap.jpg").read_bytes()
    assert (out / "rgb/ai_001_001/cam_00_0000.jpg").read_bytes() == tonemap
    assert read_facts(out / "tree.json").depth_unit is None

    done(*flags, "--out", tmp_path / "own")  # Hypersim's camera: 886.81 px at 1024
    corner = np.sqrt(2 * (31.5 * 16 / 886.81) ** 2 + 1)
    held = read(tmp_path / "own/depth/ai_001_001/cam_00_0000.npy")
    assert held[63, 63] == pytest.approx(distance[63, 63] / corner, rel=1e-5)


def test_hypersims_arrays_need_h5py(tmp_path, done, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)  # as where it is not installed
    shots = tmp_path / "s/images"
    save(shots / "scene_cam_00_final_preview/frame.0000.color.jpg", photo(1))
    (shots / "scene_cam_00_geometry_hdf5").mkdir()
    (shots / "scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5").write_bytes(b"HDF")
    refused(done, r"depth_meters.hdf5: needs h5py; pip install h5py", "--format", "hypersim", "--root",
            tmp_path / "s", "--out", tmp_path / "tree")


def test_camvid(tmp_path, done, command):
    root, labels = tmp_path / "camvid", np.tile(np.arange(W, dtype=np.uint8) % 12, (H, 1))
    for split in ("train", "val"):
        save(root / split / "color/0001TP_006690.jpg", photo(0))
        save(root / split / "label/0001TP_006690.png", labels)
    out = tmp_path / "tree"
    said = done("--format", "camvid", "--root", root, "--out", out)
    assert "2 frames of rgb, seg" in said
    assert (read(out / "seg/train/0001TP_006690.png") == labels).all()
    raster = MODALITIES["seg"].open(out / "seg/val/0001TP_006690.png", facts_of(out))
    assert (raster.labels == labels).all() and ((labels == 11) == ~raster.known).all()
    assert raster.values[0, :3].tolist() == [[128, 128, 128], [128, 0, 0], [192, 192, 128]]
    said = command("prep_latents", "--data", out, "--out", tmp_path / "cache", "--vae", "none", "--no-dino",
                   "--size", 12)
    meta = json.loads((tmp_path / "cache/meta.json").read_text())
    assert "folders are no classes" in said and meta["class_names"] == [] and len(meta["palette"]) == 11
    labels[0, 0] = 12
    save(root / "val/label/0001TP_006690.png", labels)
    refused(done, "val/label/0001TP_006690.png: has the label 12", "--format", "camvid", "--root", root,
            "--out", tmp_path / "other")
    save(root / "val/label/0001TP_006690.png", np.full((H, W), 11, np.uint8))
    refused(done, "none of its labels is known", "--format", "camvid", "--root", root,
            "--out", tmp_path / "other")


def test_cityscapes(tmp_path, done):
    root, out = tmp_path / "cityscapes", tmp_path / "tree"
    ids = np.tile(np.array([0, 7, 8, 11, 19, 24, 26, 33], np.uint8), (4, 1))
    disparity = np.tile(np.array([0, 1, 257, 513] * 2, np.uint16), (4, 1))
    stem = "train/aachen/aachen_000000_000019"
    save(root / f"leftImg8bit/{stem}_leftImg8bit.png", photo(0, 4, 8))
    save(root / f"gtFine/{stem}_gtFine_labelIds.png", ids)
    save(root / f"gtFine/{stem}_gtFine_color.png", photo(0, 4, 8))
    flags = ("--format", "cityscapes", "--root", root)
    assert "1 frames of rgb, seg" in done(*flags, "--out", out)
    assert read(out / f"seg/{stem}.png")[0].tolist() == [255, 0, 1, 2, 6, 11, 13, 18]
    facts = read_facts(out / "tree.json")
    assert facts.void == 255 and len(facts.palette) == 19 and facts.palette[13].tolist() == [0, 0, 142]
    save(root / f"disparity/{stem}_disparity.png", disparity)
    out = tmp_path / "second"
    assert "rgb, depth, seg" in done(*flags, "--out", out)
    assert read(out / f"depth/{stem}.png")[0, :4].tolist() == [0, 0, 256, 512]
    assert read_facts(out / "tree.json").depth_space == "disparity"


# ------------------------------------------------------------------------------------------------
# The generic format, and what all share.

def test_a_row_of_ones_own(tmp_path, done, monkeypatch):
    """The least that a row says: where files lie, what a level is; a camera's pixels are the files' own."""
    root, labels = tmp_path / "root", np.arange(H * W).reshape(H, W) % 3
    for scene in "ab":
        pairs(root / scene, "images/{}.png", "depth_cm/{}.png", 1)
        save(root / scene / "labels/0.png", labels.astype(np.uint8))
        save(root / scene / "edges/0.png", photo(7))
    patterns = {"rgb": "images", "depth": "depth_cm", "seg": "labels", "canny": "edges"}
    patterns = {m: (rf"(?P<scene>\w+)/{folder}/(?P<name>\d+)\.png",) for m, folder in patterns.items()}
    row = Format("<scene>/{images,depth_cm,labels}/<n>.png", patterns, depth_unit=0.01,
                 intrinsics="../camera.txt")
    monkeypatch.setitem(FORMATS, "mine", row)
    flags = ("--format", "mine", "--root", root)
    refused(done, "0.png: nobody says its focal length, there is no .*a/camera.txt; give", *flags,
            "--out", tmp_path / "tree")
    for scene in "ab":
        (root / scene / "camera.txt").write_text("20 20 8 6\n")
    assert "2 frames of rgb, depth, normal, seg, canny" in done(*flags, "--out", tmp_path / "tree")
    assert (read(tmp_path / "tree/canny/b/0.png") == photo(7)).all()
    assert "(2 were there)" in done(*flags, "--out", tmp_path / "tree")
    told = json.loads((tmp_path / "tree/tree.json").read_text())
    assert (told["focal"], told["focal_width"], told["depth_unit"]) == (20, W, 0.01)
    raster = MODALITIES["seg"].open(tmp_path / "tree/seg/a/0.png", facts_of(tmp_path / "tree"))
    assert (raster.labels == labels).all()
    monkeypatch.setitem(FORMATS, "mine", row._replace(labels=(2, 0, 1)))
    done(*flags, "--out", tmp_path / "other")
    assert (read(tmp_path / "other/seg/b/0.png") == np.array([2, 0, 1])[labels]).all()
    monkeypatch.setitem(FORMATS, "mine", row._replace(depth_unit=None))
    refused(done, "0.png: holds levels; what one is in metres belongs into its row of FORMATS",
            *flags, "--out", tmp_path / "third")


def test_generic(mine, done, tmp_path):
    """A tree that the readers read: values, unknown pixels, facts; pictures as they were."""
    save(tmp_path / "mine/label/0.png", np.zeros((H, W), np.uint8) + 3)
    assert "left out: 2 rgb without depth or seg, 2 depth" in done(*mine, "--label", tmp_path / "mine/label")
    out = tmp_path / "tree"
    assert files_of(out) == [f"{m}/mine/0.png" for m in ("depth", "normal", "rgb", "seg")] + ["tree.json"]
    assert (out / "rgb/mine/0.png").read_bytes() == (tmp_path / "mine/color/0.png").read_bytes()
    facts = facts_of(out)
    assert (facts.focal, facts.focal_width, facts.depth_unit) == (20, W, 0.001)
    raster = MODALITIES["depth"].open(out / "depth/mine/0.png", facts)
    assert (raster.known == (ramp(0) > 0)).all() and raster.values[0, 5] == 1005
    normal = MODALITIES["normal"].open(out / "normal/mine/0.png", facts)
    assert not normal.known[:, :2].any() and normal.known[:, 3:].all()
    # z = 1 + 0.001 (u + 7.5) at x = u z / 20: almost frontal, a little turned to the left
    assert (np.abs(normal.values[H // 2, 8].astype(int) - [128, 128, 255]) <= [4, 1, 1]).all()


def test_float_depth_is_in_metres(mine, done, tmp_path):
    for i in range(3):
        (tmp_path / f"mine/depth/{i}.png").unlink()
        depth = ramp(i).astype(np.float64)
        depth[0, 0] = np.nan
        save(tmp_path / f"mine/depth/{i}.npy", depth)
    done(*mine, "--depth-unit", 0.001, "--no-normals")
    held = read(tmp_path / "tree/depth/mine/1.npy")
    assert held.dtype == np.float32 and held[0, 5] == np.float32(1.006) and held[0, 0] == 0
    assert not (tmp_path / "tree/normal").exists()


@pytest.mark.parametrize("name, kind, scale, flags", [
    ("0.tif", np.float32, 1, ()),
    ("0.npy", np.int32, 1000, ()),
    ("0.npy", ">u2", 1000, ()),
    ("0.npy", np.uint16, 5000, ("--depth-unit", 0.0002)),
    ("0.png", np.uint8, 100, ("--depth-unit", 0.01)),
])
def test_depth_is_metres_whatever_holds_it(name, kind, scale, flags, done, tmp_path):
    """Floats are metres, whole numbers levels, by what a file holds and not by its ending."""
    save(tmp_path / "color/0.png", photo(0))
    depth = np.full((H, W), 1.5 * scale).astype(kind)
    path = tmp_path / "depth" / name
    path.parent.mkdir()
    np.save(path, depth) if path.suffix == ".npy" else Image.fromarray(depth).save(path)
    done("--color", tmp_path / "color", "--depth", tmp_path / "depth", "--no-normals", "--out",
         tmp_path / "tree", *flags)
    facts, row = facts_of(tmp_path / "tree"), MODALITIES["depth"]
    [path] = (tmp_path / "tree/depth").rglob("0.*")
    assert np.allclose(Depth.read(row, row.open(path, facts)), 1.5)


def test_depth_of_8_bits_has_no_unit_of_its_own(done, tmp_path):
    save(tmp_path / "s/rgb/0.png", photo(0))
    save(tmp_path / "s/depth/0.png", np.full((H, W), 40, np.uint8))
    refused(done, "depth/0.png: holds levels of 8 bits", "--format", "nyu", "--root", tmp_path / "s",
            "--no-normals", "--out", tmp_path / "tree")


@pytest.mark.parametrize("count", [2, 3, 16, 17, 200])
def test_void_is_kept_beside_few_colours(count, tmp_path):
    """Pillow packs a palette of up to 16 colours into fewer bits than 255 needs."""
    labels = np.array([[0, count - 1, 255]], np.uint8)
    import_frames.save_picture(tmp_path / "s.png", labels, np.zeros((count, 3), np.uint8))
    assert (read(tmp_path / "s.png") == labels).all()


def test_transparent_labels_are_void(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([9, 9, 9, 80, 0, 0, 0, 80, 0])
    image.save(tmp_path / "l.png", transparency=0)
    raster, _ = import_frames.read_labels(tmp_path / "l.png", FORMATS["generic"])
    assert raster.values.tolist() == [[255, 1, 2]]


def test_other_names_pair_by_order_where_counts_are_equal(mine, done, tmp_path):
    for i in (2, 1, 0):
        (tmp_path / f"mine/depth/{i}.png").rename(tmp_path / f"mine/depth/d{i + 9}.png")
    assert "names differ, 3 of each: paired by their order" in done(*mine)
    assert (read(tmp_path / "tree/depth/mine/2.png") == ramp(2)).all()
    (tmp_path / "mine/depth/d10.png").unlink()
    refused(done, "so do the numbers of files: 3 of .*color, 2 of .*depth", *mine)


def test_a_cut_run_continues(mine, done, tmp_path, monkeypatch):
    done(*mine)
    whole = contents(tmp_path / "tree")
    true, calls = import_frames.save_picture, []

    def failing(*args, **more):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return true(*args, **more)
    monkeypatch.setattr(import_frames, "save_picture", failing)
    cut = [*mine[:-1], tmp_path / "cut"]
    with pytest.raises(KeyboardInterrupt):
        done(*cut)
    assert contents(tmp_path / "cut").items() <= whole.items() and len(contents(tmp_path / "cut")) < 10
    monkeypatch.setattr(import_frames, "save_picture", true)
    done(*cut)
    assert contents(tmp_path / "cut") == whole
    kept = (tmp_path / "cut/normal/mine/0.png").stat().st_mtime_ns
    assert "(3 were there)" in done(*cut)
    assert (tmp_path / "cut/normal/mine/0.png").stat().st_mtime_ns == kept


def test_other_scenes_add_to_a_tree_and_others_of_a_name_are_refused(mine, done, tmp_path):
    done(*mine, "--scene", "one")
    done(*mine, "--scene", "two", "--frames", "1:2")
    assert len(list((tmp_path / "tree/rgb/two").iterdir())) == 2
    refused(done, "tree.json: says focal = 20.*another folder", *mine, "--focal", 30, "--scene", "three")
    refused(done, "tree.json: its folders are no classes", *mine, "--scene-is-class", "--scene", "three")
    save(tmp_path / "mine/color/0.png", photo(99))
    refused(done, "one/0.png: is there, and of another picture", *mine, "--scene", "one")
    with only_writer(tmp_path / "tree"):
        refused(done, "is writing into it", *mine, "--scene", "three")


def test_scenes_can_be_classes(mine, done, command, tmp_path):
    done(*mine, "--scene-is-class")
    command("prep_latents", "--data", tmp_path / "tree", "--out", tmp_path / "cache", "--vae", "none",
            "--no-dino", "--size", 12)
    assert json.loads((tmp_path / "cache/meta.json").read_text())["class_names"] == ["mine"]
    assert "classes" not in json.loads((tmp_path / "tree/tree.json").read_text())
    refused(done, "tree.json: its folders are classes", *mine, "--scene", "three")


def test_what_does_not_fit_is_named(mine, done, tmp_path):
    root = tmp_path / "mine"
    bare = [*mine[:4], "--out", tmp_path / "tree"]
    flags = ["--format", "scannet", "--root", tmp_path / "mine", "--out", tmp_path / "tree"]
    refused(done, "normals need --focal", *bare)
    refused(done, "--focal 0.0: must be positive", *bare, "--focal", 0)
    refused(done, "--depth-unit -1.0: must be positive", *mine, "--depth-unit", -1)
    refused(done, "--depth-unit 0.1: --format scannet tells it, 0.001", *flags, "--depth-unit", 0.1)
    refused(done, "takes --root DIR, and no --color", *mine, "--format", "scannet")
    refused(done, "takes --color DIR with --depth DIR", *mine, "--root", root)
    refused(done, "--frames 5:9: matches none of the 3 frames.*from 0 to 2", *mine, "--frames", "5:9")
    refused(done, "--frames 5: expected FIRST:LAST", *mine, "--frames", "5")
    refused(done, "--every 0: must be at least 1", *mine, "--every", 0)
    refused(done, "--scene '../x': must be the name", *mine, "--scene", "../x")
    refused(done, "has no rgb and no depth of this format", "--format", "tum", *flags[2:])
    refused(done, "is, holds or lies in", *mine[:-1], root / "color/tree")
    refused(done, "is, holds or lies in", *mine[:-1], root)
    refused(done, "is, holds or lies in", *flags[:-1], root)
    assert not (tmp_path / "tree").exists()
    (tmp_path / "pictures/rgb").mkdir(parents=True)
    refused(done, "of which no tree.json tells", *mine[:-1], tmp_path / "pictures")


@pytest.mark.parametrize("file, array, words", (
    ("color/1.png", photo(0, 16, 16), "depth/1.png: is 16x12, its picture .*color/1.png is 16x16"),
    ("depth/1.png", np.zeros((H, W), np.uint16), "depth/1.png: none of its depth is known; .*--frames"),
    ("depth/1.png", photo(1), "depth/1.png: is in colours"),
    ("color/1.png", None, "color/1.png: not readable"),
))
def test_a_frame_that_does_not_fit_is_named_and_not_begun(mine, done, tmp_path, file, array, words):
    path = tmp_path / "mine" / file
    path.write_bytes(b"no picture")
    if array is not None:
        save(path, array)
    refused(done, words, *mine)
    assert not any("/1." in name for name in files_of(tmp_path / "tree"))
    assert "2 frames" in done(*mine, "--every", 2)


@pytest.mark.parametrize("held", ({"focal": 0}, {"focal": "a"}, {"focal_width": 0.5}, {"classes": "some"}))
def test_facts_of_cameras_and_classes_are_checked(tmp_path, held):
    path = tmp_path / "tree.json"
    path.write_text(json.dumps({"format": "mmgen-tree-1", **held}))
    with pytest.raises(InputError, match=f"{path}: {next(iter(held))} is"):
        read_facts(path)


@pytest.mark.skipif(REAL is None, reason="the real frames are not here")
def test_the_kitchen(tmp_path, done):
    kitchen, out = REAL / "kitchen", tmp_path / "tree"
    done("--color", kitchen / "color", "--depth", kitchen / "depth", "--focal", 156.3, "--out", out,
         "--frames", "800:999", "--every", 100)
    facts = facts_of(out)
    for number in ("000800", "000900"):
        truth = np.asarray(Image.open(kitchen / f"depth/{number}.png"))
        raster = MODALITIES["depth"].open(out / f"depth/kitchen/{number}.png", facts)
        assert (raster.known == (truth > 0)).all() and (raster.values[truth > 0] == truth[truth > 0]).all()
        known = MODALITIES["normal"].open(out / f"normal/kitchen/{number}.png", facts).known
        assert known[truth > 0].mean() > 0.7 and not known[truth == 0].any()
        colour = out / f"rgb/kitchen/{number}.jpg"
        assert colour.read_bytes() == (kitchen / f"color/{number}.jpg").read_bytes()
