"""pseudo_label.py: photos -> teachers -> the tree that prep_latents.py reads."""
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import pseudo_label
from distributed import InputError

TEACHERS = '''
import numpy as np
calls = []
def depth(image):
    calls.append("depth")
    return np.linspace(0, 5, image.height * image.width // 4).reshape(image.height // 2, image.width // 2)
def normal(image):
    return np.tile(np.array([0, 0.6, 0.8]), (image.height, image.width, 1))
def seg(image):
    masks = np.zeros((2, image.height, image.width), bool)
    masks[0, :10, :10] = True
    masks[1] = True
    return masks
def wrong(image):
    return np.zeros(3)
'''
PY = ("--depth", "py:drawn_teachers:depth", "--normal", "py:drawn_teachers:normal",
      "--seg", "py:drawn_teachers:seg")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    (tmp_path / "drawn_teachers.py").write_text(TEACHERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rng = np.random.default_rng(0)
    for i, size in enumerate(((96, 80), (70, 100), (64, 64))):
        path = tmp_path / "photos" / ("a" if i < 2 else "b b") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(path)
    return tmp_path / "photos"


def read(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*.png"))}


def test_a_tree_that_prep_latents_reads(photos, command, tmp_path):
    out = tmp_path / "mine"
    command("pseudo_label", "--images", photos, "--out", out, *PY)
    assert len(read(out)) == 12
    depth = np.asarray(Image.open(out / "depth/a/0.png"))
    assert depth.dtype in (np.uint16, np.int32) and depth.shape == (80, 96)  # the latter of an older Pillow
    assert depth.min() == 0 and depth.max() == 65535
    seg = np.asarray(Image.open(out / "seg/a/0.png"))
    assert len(np.unique(seg.reshape(-1, 3), axis=0)) == 2
    assert (seg[:10, :10] == seg[0, 0]).all() and (seg[20, 20] != seg[0, 0]).any()
    normal = np.asarray(Image.open(out / "normal/b b/2.png"))
    assert np.abs(normal[0, 0] - np.array([127.5, 204, 229.5])).max() <= 1
    command("prep_latents", "--data", out, "--out", tmp_path / "cache", "--size", 32, "--vae", "toy",
            "--no-dino", "--batch-size", 2)
    assert (np.load(tmp_path / "cache/done.npy") == 1).all()


def test_an_interrupted_run_ends_with_the_same_files(photos, command, tmp_path, monkeypatch):
    command("pseudo_label", "--images", photos, "--out", tmp_path / "whole", *PY)
    true, calls = pseudo_label.label_photo, []

    def failing(*args):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(true(*args))
    monkeypatch.setattr(pseudo_label, "label_photo", failing)
    with pytest.raises(KeyboardInterrupt):
        command("pseudo_label", "--images", photos, "--out", tmp_path / "cut", *PY)
    monkeypatch.setattr(pseudo_label, "label_photo", true)
    (tmp_path / "cut/seg/a/0.png").unlink()
    command("pseudo_label", "--images", photos, "--out", tmp_path / "cut", *PY)
    assert read(tmp_path / "whole") == read(tmp_path / "cut")


def test_in_place_leaves_the_photos_alone(photos, command, tmp_path):
    (photos / "a/0.jpg").rename(photos / "a/0.JPEG")
    photos.rename(tmp_path / "rgb")
    before = sorted((tmp_path / "rgb").rglob("*"))
    command("pseudo_label", "--images", tmp_path / "rgb", "--out", tmp_path, *PY[:2])
    assert sorted((tmp_path / "rgb").rglob("*")) == before and (tmp_path / "depth/b b/2.png").is_file()


def test_broken_photos_are_named(photos, command, tmp_path):
    (photos / "a/1.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match="1.jpg: not readable.*skip-broken"):
        command("pseudo_label", "--images", photos, "--out", tmp_path / "o", *PY)
    command("pseudo_label", "--images", photos, "--out", tmp_path / "o", *PY, "--skip-broken")
    assert "a/1\t" in (tmp_path / "o/skipped.txt").read_text() and len(read(tmp_path / "o")) == 8


@pytest.mark.parametrize("teacher, words", (
    ("py:drawn_teachers:nothing", "has no attribute 'nothing'"), ("py:no_such_module:f", "No module named"),
    ("py:drawn_teachers:wrong", "0.jpg: what the depth teacher makes of it.*ValueError"),
    ("magic:x", "a teacher is hf:MODEL"), ("hub:nobody", "OWNER/REPOSITORY:ENTRY")))
def test_bad_teachers(photos, command, tmp_path, teacher, words):
    with pytest.raises(InputError, match=words):
        command("pseudo_label", "--images", photos, "--out", tmp_path / "o", "--depth", teacher)
    assert not list((tmp_path / "o").rglob("*.png"))


def test_transformers_pipelines(photos, command, tmp_path):
    """Tiny random Depth-Anything and SAM models, saved locally."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = hf.Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=56,
        patch_size=14, out_features=["stage1", "stage2", "stage3", "stage4"], apply_layernorm=True,
        reshape_hidden_states=False)
    config = hf.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, patch_size=14,
        neck_hidden_sizes=[16, 16, 16, 16], fusion_hidden_size=16, head_hidden_size=8)
    depth = tmp_path / "depth_model"
    hf.DepthAnythingForDepthEstimation(config).save_pretrained(depth)
    hf.DPTImageProcessor(size={"height": 56, "width": 56}, ensure_multiple_of=14).save_pretrained(depth)
    vision = hf.SamVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=64,
        patch_size=16, output_channels=16, num_pos_feats=8, mlp_dim=64, global_attn_indexes=[0],
        window_size=2)
    prompt = hf.SamPromptEncoderConfig(
        hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4)
    decoder = hf.SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16, num_hidden_layers=1)
    sam = hf.SamConfig(vision_config=vision.to_dict(), prompt_encoder_config=prompt.to_dict(),
                       mask_decoder_config=decoder.to_dict())
    hf.SamModel(sam).save_pretrained(tmp_path / "sam_model")
    processor = hf.SamImageProcessor(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}, mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16})
    hf.SamProcessor(processor).save_pretrained(tmp_path / "sam_model")
    command("pseudo_label", "--images", photos, "--out", tmp_path / "o", "--depth", f"hf:{depth}",
            "--seg", f"hf:{tmp_path / 'sam_model'}")
    assert np.asarray(Image.open(tmp_path / "o/depth/a/1.png")).shape == (100, 70)
    assert np.asarray(Image.open(tmp_path / "o/seg/a/1.png")).shape == (100, 70, 3)


# ------------------------------------------------------------------------------------------------
# Teachers from local folders.

HUBCONF = '''
import inner
dependencies = ["numpy"]
def depth(scale=1, device=None, weights="none"):
    assert weights == "a file:pth" and device == "cpu"
    return lambda image: inner.ramp(image) ** scale
def plain(weights="none"):
    assert weights == "none"
    return inner.ramp
'''
INNER = '''
import numpy
def ramp(image):
    return numpy.arange(1.0, 1 + image.height * image.width).reshape(image.size[::-1])
'''


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder as a repository of torch.hub has it."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    folder = tmp_path / "hub folder"
    folder.mkdir()
    (folder / "hubconf.py").write_text(HUBCONF)
    (folder / "inner.py").write_text(INNER)
    return folder


def test_a_hub_entry_of_a_local_folder(photos, checkout, command, tmp_path):
    """Its options reach the entry: numbers as numbers; a relative folder; an entry without a device."""
    flags = ("--images", photos, "--depth-space", "depth")
    for name, teacher in (("a", "hub:hub folder:depth,scale=2,weights=a file:pth"),
                          ("b", f"hub:{checkout}:plain")):
        said = command("pseudo_label", *flags, "--out", tmp_path / name, "--depth", teacher)
        assert f"--depth {teacher}: runs the code of {checkout}\n" in said
    a, b = (np.asarray(Image.open(tmp_path / name / "depth/b b/2.png")).astype(float) for name in "ab")
    ramp = np.arange(1.0, 1 + 64 * 64).reshape(64, 64)
    for found, exact in ((a, ramp ** -2.0), (b, 1 / ramp)):
        assert np.abs(found / 65535 - (exact - exact.min()) / np.ptp(exact)).max() < 1e-4


def test_a_function_of_a_file(photos, checkout, command, tmp_path):
    """Beside its own modules; of a name that a module of ours has; run once for all of its functions."""
    (checkout / "modalities.py").write_text(
        "import pathlib, inner\n"
        "with open(pathlib.Path(__file__).with_name('runs'), 'a') as file: file.write('x')\n"
        "def depth(image): return inner.ramp(image)\n"
        "def seg(image): return inner.ramp(image).astype(int) // 2000\n")
    file = checkout / "modalities.py"
    said = command("pseudo_label", "--images", photos, "--out", tmp_path / "o", "--depth", f"py:{file}:depth",
                   "--seg", f"py:{file}:seg")
    assert f"runs the code of {file}" in said and (checkout / "runs").read_text() == "x"
    assert len(read(tmp_path / "o")) == 9


def test_two_teachers_have_helpers_of_their_own(tmp_path):
    """Of one name, and of the name of a module here."""
    for k in (1, 2):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "util.py").write_text(f"K = {k}")
        (tmp_path / str(k) / "trees.py").write_text(f"K = {k}0")
        (tmp_path / str(k) / "t.py").write_text("import trees, util\nK = util.K + trees.K")
    ours = sys.modules["trees"]
    assert [pseudo_label.module_of(tmp_path / str(k) / "t.py").K for k in (1, 2)] == [11, 22]
    assert sys.modules["trees"] is ours


def test_teachers_that_cannot_be_had_say_how(photos, checkout, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "bare").mkdir()
    for teacher, words in (
            ("hf:bare", "needs transformers; pip install transformers"),
            ("hub:bare:depth", "bare has no hubconf.py; give a checkout"),
            ("hub:no/such/folder:depth", "no/such/folder is no folder, and not OWNER/REPOSITORY"),
            ("hub:hub folder:none", "not readable .*none.*check the entry, its options and its weights"),
            ("hub:hub folder:plain,size=3", "unexpected keyword argument 'size'"),
            ("hub:hub folder:plain,3", "behind it options as ,KEY=VALUE"),
            ("py:none.py:depth", "none.py: no such file"),
            ("py:hub folder/inner.py:depth", "has no attribute 'depth'")):
        with pytest.raises(InputError, match=words):
            command("pseudo_label", "--images", photos, "--out", tmp_path / "o", "--depth", teacher)
    assert not (tmp_path / "o").exists()
