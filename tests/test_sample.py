"""sample.py's tasks, and the folder of samples: shared out, continued, refused."""
import builtins
import json
import os
import pathlib
import types

import numpy as np
import pytest
import torch
from PIL import Image

import produce
import sample
import samplers
from conftest import shell
from distributed import InputError, command_parser, whole_file
from mix import tell_untrained
from modalities import MODALITIES, PLAIN_FACTS, PLAIN_SHOWN, Shown, shown_of
from sample import Request
from weights import DEMO, load_checkpoint

SCENES, CKPT = DEMO / "scenes", DEMO / "mmgen.pt"
ONE_STEP = ("--ckpt", CKPT, "--sampler", "euler", "--steps", 1)


def pixels(path):
    """A picture's values, signed."""
    return np.asarray(Image.open(path)).astype(int)


def read(folder):
    """{path: values} of all the pictures of a folder of samples but its grid."""
    found = [path for path in sorted(folder.rglob("*.png")) if path.name != "grid.png"]
    return {path.relative_to(folder): pixels(path) for path in found}


# ------------------------------------------------------------------------------------------------
# Requests.

def test_requests_of_classes():
    def labels(*options):
        return [request.label for request in sample.of_classes(*options, num_classes=12, seed=0)]

    assert labels([3, 12], "random", 2) == [3, 3, 12, 12] and labels([5], "random", None) == [5]
    assert labels(None, "balanced", 14) == [*range(12), 0, 1]
    drawn = labels(None, "random", None)
    assert len(drawn) == 8 and set(drawn) <= set(range(12)) and labels(None, "random", 20)[:8] == drawn
    assert sample.of_classes([3], "random", 2, 12, 0)[1] == Request(1, "000001", 3, {})
    with pytest.raises(InputError, match=r"--class-id 13: .* classes 0 to 11 \(12 is the null class\)"):
        sample.check_classes([13], 12)
    sample.check_classes([12], 12)
    sample.check_classes(None, 12)
    assert [r.label for r in sample.of_classes(None, "random", 3, num_classes=0, seed=0)] == [0, 0, 0]


def test_requests_of_pictures(tmp_path):
    """Classes by folders, files of several modalities by stems or, single ones, in order."""
    meta = dict(class_names=["red box", "green box"], num_classes=2)
    for m in ("rgb", "depth"):
        for name in ("green_box/a", "elsewhere/b"):
            path = tmp_path / m / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    tree = sample.locations_of([tmp_path], ["rgb", "depth"], "condition")
    assert tree == [tmp_path / "rgb", tmp_path / "depth"]
    requests = sample.of_pictures(["rgb", "depth"], tree, None, 2, meta)
    assert [(r.index, r.stem, r.label) for r in requests] == [
        (0, "elsewhere_b_0", 2), (1, "elsewhere_b_1", 2), (2, "green_box_a_0", 1), (3, "green_box_a_1", 1)]
    assert requests[2].files == {m: tmp_path / m / "green_box/a.png" for m in ("rgb", "depth")}
    assert {r.label for r in sample.of_pictures(["rgb"], tree[:1], 0, 1, meta)} == {0}
    files = [tmp_path / "rgb/green_box/a.png", tmp_path / "depth/elsewhere/b.png"]
    (single,) = sample.of_pictures(["rgb", "depth"], files, None, 1, meta)
    assert single == Request(0, "a", 2, dict(zip(("rgb", "depth"), files)))  # a single file has no class
    inside = sample.of_pictures(["rgb"], [tmp_path / "rgb/green_box"], None, 1, meta)
    assert [(r.stem, r.label) for r in inside] == [("a", 1)]  # a class's own folder
    (tmp_path / "depth/elsewhere/b.png").unlink()
    with pytest.raises(InputError, match="b.png: no file with this stem in .* for --given depth"):
        sample.of_pictures(["rgb", "depth"], tree, None, 1, meta)
    Image.new("RGB", (8, 8)).save(tmp_path / "rgb/green_box_a.png")
    with pytest.raises(InputError, match="two pictures share the stem green_box_a; rename one"):
        sample.of_pictures(["rgb"], tree[:1], None, 1, meta)


def test_maps_that_do_not_align_are_refused(tmp_path):
    Image.new("RGB", (40, 60)).save(tmp_path / "a.png")
    np.save(tmp_path / "d.npy", np.random.default_rng(0).random((60, 50)))
    request = Request(0, "a", 0, {"rgb": tmp_path / "a.png", "depth": tmp_path / "d.npy"})
    crop, full = (sample.fit_of(mode, 32, 8) for mode in ("crop", "full"))
    facts = {"rgb": PLAIN_FACTS, "depth": PLAIN_FACTS}
    one = sample.read_input(request, crop, False, facts, PLAIN_SHOWN)
    assert one.pixels["depth"].shape == (3, 32, 32) and one.shape is None
    assert all(np.array_equal(one.whole[m], pixels) for m, pixels in one.pixels.items())
    with pytest.raises(InputError, match="d.npy: its size does not match that of rgb"):
        sample.read_input(request, full, True, facts, PLAIN_SHOWN)
    alone = request._replace(files={"rgb": tmp_path / "a.png"})
    one = sample.read_input(alone, full, True, facts, PLAIN_SHOWN)
    assert one.pixels["rgb"].shape == (3, 48, 32) and one.whole["rgb"].shape == (3, 60, 40)
    assert one.shape == (60, 40)


# ------------------------------------------------------------------------------------------------
# Tasks.

def test_the_flags_of_sampling():
    parser = command_parser("")
    samplers.add_flags(parser)
    words = ("--steps 3 --sampler euler --cfg 2 --cfg-interval .1 .7 --precision bf16 --given-time .9 "
             "--middle-scale 1.2")
    assert samplers.from_flags(parser.parse_args(words.split())) == samplers.Sampling(
        "euler", 3, 2.0, (0.1, 0.7), "bf16", 0.9, 1.2)


def test_a_translation_is_of_its_own_map(monkeypatch):
    def sampled(model, y, given, noise, sampling):
        seen.append({m: x.mean().item() for m, x in given.items()})
        return torch.arange(4.0).repeat_interleave(4)[None, :, None, None].expand(1, 16, 2, 2)

    seen, four = [], ("rgb", "depth", "normal", "seg")
    monkeypatch.setattr(samplers, "sample_latents", sampled)
    model = types.SimpleNamespace(modalities=four, parameters=lambda: iter([torch.zeros(1)]))
    encoder = types.SimpleNamespace(channels=4)
    draw = sample.Drawing(model, encoder, None, 0, (), None, (), back=True)
    monkeypatch.setattr(draw, "decoded", lambda latents, modalities: np.zeros((1, 1, 3, 8, 8)))
    list(draw.sample([Request(0, "a", 0, {})], [sample.Input({}, {}, None)], None))
    assert seen[1:] == [{"depth": 1}, {"normal": 2}, {"seg": 3}]


def test_flat_colours_stay_flat_at_a_photos_size(tmp_path):
    row = MODALITIES["seg"]
    pixels = row.to_pixels(np.uint8([[[0, 0, 0], [200, 30, 90]]]))
    shown = sample.Maps({"seg": row}).write(tmp_path, Request(0, "a", 0, {}), {"seg": pixels}, (5, 7))["seg"]
    assert shown.shape == (5, 7, 3) and len(np.unique(shown.reshape(-1, 3), axis=0)) == 2


def test_samples_do_not_depend_on_batch_or_processes(command, tmp_path):
    flags = ("--task", "generate", "--num", 5, "--steps", 3, "--ckpt", CKPT)
    for name, batch, world in (("a", 1, 1), ("b", 16, 1), ("c", 2, 2)):
        more = ("--batch-size", batch, "--out", tmp_path / name)
        if world == 1:
            command("sample", *flags, *more)
        else:
            result = shell("sample.py", *flags, *more, processes=world)
            assert result.returncode == 0, result.stderr
    a = read(tmp_path / "a")
    assert len(a) == 20
    for other in "bc":
        other = read(tmp_path / other)
        gaps = np.concatenate([np.abs(a[path] - other[path]).ravel() for path in a])
        assert gaps.max() <= 1 and (gaps > 0).mean() < 1e-3


def test_understand_shows_the_bundled_scenes_beside_the_truth(tmp_path, command):
    out = command("sample", "--task", "understand", "--ckpt", CKPT, "--sampler", "euler", "--steps", 4,
                  "--out", tmp_path)
    assert out.strip().splitlines()[-1] == str(tmp_path / "grid.png")
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["evaluations"] == 4 and len(meta["checkpoint_sha256"]) == 64
    assert "disparity" in meta["outputs"]["depth"] and meta["complete"] is True
    stem = meta["samples"][0]["stem"]
    depth, normal = (np.load(tmp_path / m / f"{stem}.npy") for m in ("depth", "normal"))
    assert depth.shape == (64, 64) and np.allclose(np.linalg.norm(normal, axis=-1), 1, atol=1e-4)
    given = meta["samples"][0]["given"]["rgb"]
    assert np.array_equal(pixels(tmp_path / "rgb" / f"{stem}.png"), pixels(given))
    truth = np.asarray(Image.open(given.replace("/rgb/", "/depth/")).convert("L")) / 255.0
    assert np.corrcoef(truth.ravel(), depth.ravel())[0, 1] > 0.8  # the demo weights do understand
    crop = sample.fit_of("crop", 64, 8)
    request = Request(0, "s", 0, {"rgb": pathlib.Path(given)})
    truths = sample.truth_pictures(request, MODALITIES, crop, {"rgb": PLAIN_FACTS})
    assert truths.keys() == {"depth", "normal", "seg"}
    labels = 4 + 3  # all modalities, and the truth of three of them
    assert Image.open(tmp_path / "grid.png").width == labels * 132 + 4


@pytest.mark.parametrize("flags, folders", [
    (("--task", "condition", "--given", "depth", "--image", SCENES), ("rgb", "depth", "normal", "seg")),
    (("--task", "condition", "--given", "depth", "normal", "--image", SCENES, SCENES), ("rgb", "seg")),
    (("--task", "translate", "--image", SCENES), ("depth_to_rgb", "normal_to_rgb", "seg_to_rgb")),
    (("--task", "generate", "--class-id", 3, 4, "--num", 2, "--npz"), ("rgb", "depth", "normal", "seg")),
])
def test_tasks(flags, folders, tmp_path, command):
    command("sample", *flags, "--ckpt", CKPT, "--sampler", "euler", "--steps", 2, "--out", tmp_path)
    for folder in folders:
        assert len(list((tmp_path / folder).glob("*.png"))) == 4
    if "--npz" in flags:
        stored = np.load(tmp_path / "samples.npz")["arr_0"]
        assert stored.shape == (4, 64, 64, 3) and stored.dtype == np.uint8
        assert np.array_equal(stored[0], pixels(tmp_path / "rgb" / "000000.png"))


def test_condition_on_a_folder_tree(command, tmp_path):
    """One tree serves several given modalities."""
    flags = ("--task", "condition", "--given", "depth", "seg", "--image", SCENES)
    command("sample", *flags, "--npz", *ONE_STEP, "--out", tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (4, 64, 64, 3)
    for one in meta["samples"]:
        assert "/depth/" in one["given"]["depth"] and "/seg/" in one["given"]["seg"]


def test_any_size_full(tmp_path, command):
    noise = np.random.default_rng(0).integers(0, 255, (90, 150, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "wide.jpg")
    flags = ("--task", "understand", "--fit", "full", *ONE_STEP)
    command("sample", *flags, "--image", tmp_path / "wide.jpg", "--out", tmp_path / "out")
    assert np.load(tmp_path / "out" / "depth" / "wide.npy").shape == (90, 150)
    assert Image.open(tmp_path / "out" / "seg" / "wide.png").size == (150, 90)
    Image.new("RGB", (2, 600)).save(tmp_path / "thread.png")
    with pytest.raises(InputError, match="2x600: 19200 tokens, at most 16384"):
        command("sample", *flags, "--image", tmp_path / "thread.png", "--out", tmp_path / "thread")


def test_fast_is_the_few_steps_of_the_table(command, tmp_path):
    flags = ("--task", "understand", "--ckpt", CKPT)
    few = [word for name, value in samplers.FAST["understand"].items() for word in (f"--{name}", value)]
    command("sample", *flags, "--fast", "--out", tmp_path / "fast")
    command("sample", *flags, *few, "--out", tmp_path / "said")
    assert (tmp_path / "fast/meta.json").read_text() == (tmp_path / "said/meta.json").read_text()
    for path in (tmp_path / "fast/depth").iterdir():
        assert path.read_bytes() == (tmp_path / "said/depth" / path.name).read_bytes()
    with pytest.raises(InputError, match="--fast with --sampler heun"):
        command("sample", *flags, "--fast", "--sampler", "heun", "--out", tmp_path / "both")


def test_truncated_pixels_are_at_most_one_level_lower(command, tmp_path):
    flags = ("--task", "generate", "--num", 2, *ONE_STEP)
    command("sample", *flags, "--out", tmp_path / "round")
    command("sample", *flags, "--truncate", "--out", tmp_path / "cut")
    lower = pixels(tmp_path / "round/rgb/000001.png") - pixels(tmp_path / "cut/rgb/000001.png")
    assert set(np.unique(lower)) == {0, 1} and 0.3 < lower.mean() < 0.7


# ------------------------------------------------------------------------------------------------
# What is refused.

@pytest.mark.parametrize("flags, message", [
    (("--task", "condition"), "needs --given"),
    (("--task", "condition", "--given", "depth"), "--task condition: needs --image with 1 file.* for depth"),
    (("--task", "condition", "--given", "depth", "seg", "--image", CKPT), "needs --image with 2 file"),
    (("--task", "condition", "--given", "depth", "--image", "nowhere.png"), "nowhere.png: no such file"),
    (("--task", "generate", "--class-id", "999"), "--class-id 999: this checkpoint has classes 0 to 11"),
    (("--task", "generate", "--given", "rgb"), "--given belongs to --task condition"),
    (("--task", "generate", "--image", SCENES), "--image with --task generate"),
    (("--task", "generate", "--steps", "0"), "at least 1"),
    (("--task", "generate", "--num", "2147483648"), r"--num 2147483648: must lie in \[1, 1000000\]"),
    (("--task", "generate", "--ckpt", "nowhere.pt"), "nowhere.pt: no such checkpoint"),
    (("--task", "generate", "--vae", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
    (("--task", "generate", "--outputs", "depth", "--npz"), "--npz needs rgb: rgb is not among --outputs"),
])
def test_bad_arguments(flags, message, tmp_path, command):
    with pytest.raises(InputError, match=message):
        command("sample", "--ckpt", CKPT, *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_method_is_refused(tmp_path, command):
    checkpoint = load_checkpoint(CKPT)
    for method, remedy in (("mt-diffusion", "use mt_sample.py"), ("later", "use a newer version")):
        checkpoint["config"]["train"]["method"] = method
        torch.save(checkpoint, tmp_path / "other.pt")
        with pytest.raises(InputError, match=f"other.pt: is a checkpoint of {method}; {remedy}"):
            command("sample", "--task", "generate", "--ckpt", tmp_path / "other.pt", "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    result = shell("sample.py", "--task", "generate", "--class-id", 999, "--ckpt", CKPT, "--out", tmp_path)
    said = result.stderr.strip()
    assert result.returncode == 2 and "Traceback" not in said
    assert said.startswith("sample.py: error: --class-id 999") and len(said.splitlines()) == 1


# ------------------------------------------------------------------------------------------------
# The folder of samples.

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_no_file_under_the_final_name(tmp_path, monkeypatch):
    real = builtins.open

    def full(path, mode="r", *more, **named):
        return real("/dev/full", mode) if "w" in mode else real(path, mode, *more, **named)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(OSError):
        with whole_file(tmp_path / "ckpt.pt") as file:
            torch.save({"x": torch.zeros(100_000)}, file)
    assert not (tmp_path / "ckpt.pt").exists()


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in (".a.png.123.tmp", ".b.png.123.tmp"):
        (tmp_path / name).write_bytes(b"half")
    for _ in range(2):
        with whole_file(tmp_path / "a.png") as file:
            file.write(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.png.123.tmp", "a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"whole"


def test_an_interrupted_set_continues_to_the_same_file(command, monkeypatch, tmp_path):
    def flags(num):
        return ("--task", "generate", "--num", num, "--classes", "balanced", "--npz", "--outputs", "rgb",
                *ONE_STEP, "--batch-size", 3)

    cut, calls, one = tmp_path / "cut", [], sample.Drawing.sample
    command("sample", *flags(10), "--out", tmp_path / "whole")

    def failing(self, batch, inputs, noise):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(batch)
        return one(self, batch, inputs, noise)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sample.Drawing, "sample", failing)
        command("sample", *flags(10), "--out", cut)
    assert json.loads((cut / "meta.json").read_text())["complete"] is False
    assert "6 of 10 samples are there" in command("sample", *flags(10), "--out", cut)
    for name in ("samples.npz", "meta.json", "grid.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (cut / name).read_bytes()
    array = np.load(cut / "samples.npz")["arr_0"]
    assert array.dtype == np.uint8 and array.shape == (10, 64, 64, 3) and not (cut / "depth").exists()
    picture = cut / "rgb/000004.png"
    assert (array[4] == pixels(picture)).all()
    stamp = picture.stat().st_mtime_ns
    assert "10 of 10 samples are there" in command("sample", *flags(10), "--out", cut)
    assert picture.stat().st_mtime_ns == stamp
    assert "10 of 12 samples are there" in command("sample", *flags(12), "--out", cut)  # more are added
    assert (np.load(cut / "samples.npz")["arr_0"][:10] == array).all()
    other = (*flags(6), "--seed", 1, "--out", cut)
    with pytest.raises(InputError, match="seed was 0, is 1.*--overwrite"):
        command("sample", *other)
    assert len(list((cut / "rgb").iterdir())) == 12 and picture.stat().st_mtime_ns == stamp
    assert "12 samples are replaced" in command("sample", *other, "--overwrite")
    assert len(list((cut / "rgb").iterdir())) == 6
    assert not (np.load(cut / "samples.npz")["arr_0"] == array[:6]).all()


def test_a_given_class_and_how_files_are_read_are_part_of_a_folder(command, tmp_path):
    flags = ("--task", "condition", "--given", "depth", "--image", SCENES, *ONE_STEP, "--out", tmp_path)
    command("sample", *flags, "--class-id", 3)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert {one["class_id"] for one in meta["samples"]} == {3}
    for more, said in ((("--class-id", 4), "was of class 3, is of 4"),
                       (("--class-id", 3, "--depth-space", "depth"), "reading was .*'depth_space': 'depth'")):
        with pytest.raises(InputError, match=said):
            command("sample", *flags, *more)


def test_an_error_of_a_writing_thread_is_raised(tmp_path):
    (tmp_path / "rgb").write_text("in the way")
    outputs, requests = sample.Maps({"rgb": MODALITIES["rgb"]}), [Request(0, "a", 0, {})]

    def draw(batches):
        for batch in batches:
            for request in batch:
                yield request, {"rgb": np.zeros((3, 8, 8), np.float32)}, None

    with pytest.raises(OSError):
        produce.produce(tmp_path, requests, draw, outputs, {"seed": 0}, 1)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["seed"] == 0 and meta["complete"] is False and meta["samples"][0]["stem"] == "a"
    (tmp_path / "rgb").unlink()
    drawn = produce.produce(tmp_path, requests, draw, outputs, {"seed": 0}, 1)
    assert (drawn[0]["rgb"] == 128).all() and (pixels(tmp_path / "rgb/a.png") == 128).all()


def taken(out, recipe, requests, overwrite=False):
    """The stems still to be drawn of requests of pictures only."""
    outputs = sample.Maps({"rgb": MODALITIES["rgb"]})
    recipe = {**recipe, "endings": outputs.endings}
    return [r.stem for r in produce.take_up(out, recipe, requests, ["c"], outputs, overwrite)]


def test_a_folder_of_samples_takes_nothing_but_samples(tmp_path):
    """Nothing that is given or is somebody's is written over; of another recipe only by --overwrite."""
    out, photos = tmp_path / "o", [tmp_path / f"{name}.png" for name in "abc"]
    for photo in photos:
        photo.write_bytes(photo.name.encode())
    requests = [Request(i, path.stem, 0, {"rgb": path}) for i, path in enumerate(photos[:2])]
    for text in ('{"modalities": ["rgb"]}', "[1]", "not JSON"):
        out.mkdir(exist_ok=True)
        (out / "meta.json").write_text(text)
        with pytest.raises(InputError, match="meta.json: .*use another --out"):
            taken(out, {"seed": 0}, requests)
    (out / "meta.json").unlink()
    (out / "rgb").mkdir()
    (out / "rgb/a.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="a.png: is there, and no sample of"):
        taken(out, {"seed": 0}, requests)
    with pytest.raises(InputError, match="a.png would be overwritten, and is given"):
        taken(out, {"seed": 0}, [Request(0, "a", 0, {"rgb": out / "rgb/a.png"})])
    (out / "rgb/a.png").unlink()

    assert taken(out, {"seed": 0}, requests) == ["a", "b"]
    (out / "rgb/a.png").write_bytes(b"drawn")
    (out / "rgb/mine.png").write_bytes(b"not a sample")
    assert taken(out, {"seed": 0}, requests) == ["b"]
    (out / "rgb/b.png").write_bytes(b"drawn")
    produce.finish(out)
    assert json.loads((out / "meta.json").read_text())["complete"] is True
    more = [Request(0, "c", 0, {"rgb": photos[2]})]
    assert taken(out, {"seed": 0}, more) == ["c"]  # added
    produce.finish(out)
    meta = json.loads((out / "meta.json").read_text())
    assert meta["complete"] is False and [s["stem"] for s in meta["samples"]] == ["a", "b", "c"]
    photos[0].write_bytes(b"another photo")
    os.utime(photos[0], (0, 0))  # older than its maps
    assert taken(out, {"seed": 0}, requests) == ["a"]
    elsewhere = tmp_path / "x" / "a.png"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(b"of the same name")
    other = [Request(0, "a", 0, {"rgb": elsewhere})]
    with pytest.raises(InputError, match="the name a is taken by .*a.png, not .*x/a.png"):
        taken(out, {"seed": 0}, other)
    with pytest.raises(InputError, match="seed was 0, is 1"):
        taken(out, {"seed": 1}, requests)
    assert (out / "rgb/a.png").exists()
    assert taken(out, {"seed": 1}, requests, overwrite=True) == ["a", "b"]
    assert [path.name for path in (out / "rgb").iterdir()] == ["mine.png"]


def test_a_changed_picture_is_sampled_again(command, tmp_path):
    picture, depth = tmp_path / "p.png", tmp_path / "o/depth/p.npy"
    flags = ("--task", "understand", "--image", picture, *ONE_STEP, "--out", tmp_path / "o")
    Image.new("RGB", (64, 64), "red").save(picture)
    command("sample", *flags)
    before = depth.read_bytes()
    assert "1 of 1 samples are there" in command("sample", *flags)
    Image.new("RGB", (64, 64), "blue").save(picture)
    os.utime(picture, (2e9, 2e9))
    command("sample", *flags)
    assert depth.read_bytes() != before


def test_a_given_map_is_written_as_it_was_given(tmp_path):
    """Whatever the network is shown: black stays black, depth has its own range."""
    segments = np.zeros((64, 64, 3), np.uint8)
    segments[:, 32:] = (200, 30, 90)
    Image.fromarray(segments).save(tmp_path / "s.png")
    request = sample.Request(0, "s", 0, {"seg": tmp_path / "s.png"})
    for mode in ("crop", "full"):
        fit = sample.fit_of(mode, 64, 16)
        facts, shown = {"seg": PLAIN_FACTS}, Shown(uncovered="colour")
        read = sample.read_input(request, fit, mode == "full", facts, shown)
        assert read.pixels["seg"][:, 0, 0].max() > -1 and (read.whole["seg"][:, :, :32] == -1).all()
    for shown in ({"depth_over": "banana"}, {"depth_over": ["crop"]}, {"x": 1}, 3,
                  {"depth_norm": "log"}, {"depth_target": None}):
        with pytest.raises(InputError, match="c.pt: says shown = "):
            shown_of({"shown": shown}, "c.pt")


def test_a_model_of_log_depth_is_shown_and_speaks_it(command, monkeypatch, tmp_path):
    """Given 1 to 4 metres it is shown minus their logarithms, and gives them back in [0, 1]; files of
    disparity are refused before anything is written.
    """
    checkpoint = load_checkpoint(CKPT)
    checkpoint["config"]["meta"]["shown"] = {"depth_target": "log", "depth_norm": "quantile"}
    torch.save(checkpoint, tmp_path / "log.pt")
    depth = np.tile(np.linspace(1, 4, 64, dtype=np.float32), (64, 1))
    np.save(tmp_path / "d.npy", depth)
    shown, read_input = [], sample.read_input

    def watched(*args, **options):
        shown.append(read_input(*args, **options))
        return shown[-1]

    monkeypatch.setattr(sample, "read_input", watched)
    flags = ("--task", "condition", "--given", "depth", "--image", tmp_path / "d.npy", *ONE_STEP,
             "--ckpt", tmp_path / "log.pt", "--out", tmp_path / "o")
    with pytest.raises(InputError, match="d.npy: depth is learned as log"):
        command("sample", *flags)
    assert not (tmp_path / "o").exists()
    said = command("sample", *flags, "--depth-space", "depth")
    assert "the model speaks log" in said and "(depth_target log)" in said
    near = 1 - np.log(depth) / np.log(4)
    assert np.allclose(np.load(tmp_path / "o/depth/d.npy"), near, atol=1e-5)
    low, high = np.quantile(near, (0.02, 0.98))
    assert np.allclose(shown[0].pixels["depth"][0], ((near - low) / (high - low) * 2 - 1).clip(-1, 1),
                       atol=1e-5)
    meta = json.loads((tmp_path / "o/meta.json").read_text())
    assert meta["depth_target"] == "log" and meta["outputs"]["depth"].startswith("minus log depth")
    again = ("--task", "condition", "--given", "depth", "--image", tmp_path / "o/depth", *ONE_STEP)
    command("sample", *again, "--ckpt", tmp_path / "log.pt", "--out", tmp_path / "again")  # what it spoke
    assert np.allclose(shown[-1].pixels["depth"], shown[0].pixels["depth"], atol=1e-5)
    with pytest.raises(InputError, match="depth is learned as disparity, the files hold log .*o/meta.json"):
        command("sample", *again, "--out", tmp_path / "p")


def test_panels_show_all_maps_of_each_sample(command, tmp_path):
    """The sample's row of the grid at the maps' size, also of what is there already; made anew with it."""
    photos, out = tmp_path / "photos", tmp_path / "o"
    photos.mkdir()
    for name in "ab":
        Image.new("RGB", (64, 64), "red").save(photos / f"{name}.png")
    flags = ("--task", "understand", "--image", photos, *ONE_STEP, "--out", out)
    command("sample", *flags)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    assert "2 of 2 samples are there" in command("sample", *flags, "--panels")
    panels = [out / f"panels/{name}.png" for name in "ab"]
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    first = pixels(panels[0])
    assert first.shape == (23 + 132, 4 * 132 + 4, 3)
    assert np.array_equal(first[24:152:2, 268:396:2], pixels(out / "normal/a.png"))  # twice its size
    stamp = panels[1].stat().st_mtime_ns
    Image.new("RGB", (64, 64), "blue").save(photos / "a.png")
    command("sample", *flags)
    assert not panels[0].exists()  # it showed the older maps
    command("sample", *flags, "--panels")
    assert not np.array_equal(pixels(panels[0]), first) and panels[1].stat().st_mtime_ns == stamp
    (out / "panels/mine.png").write_bytes(b"mine")
    Image.new("RGB", (64, 64)).save(photos / "mine.png")
    with pytest.raises(InputError, match="panels/mine.png: is there, and no sample of"):
        command("sample", *flags)
    (photos / "mine.png").unlink()
    command("sample", *flags, "--seed", 1, "--overwrite")
    assert [path.name for path in (out / "panels").iterdir()] == ["mine.png"]


def test_truncation_leaves_levels_as_they_are(tmp_path):
    """What is given is of 8 bits already; what was drawn loses its fraction."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    row = MODALITIES["rgb"]
    outputs = sample.Maps({"rgb": row, "drawn": row}, truncate=True)
    pixels = row.to_pixels(levels)
    shown = outputs.write(tmp_path, sample.Request(0, "a", 0, {}), {
        "rgb": pixels, "drawn": pixels + np.float32(0.6 / 127.5)}, None)
    assert (shown["rgb"] == levels).all() and (shown["drawn"] == levels).all()


def test_what_a_mix_does_not_train_is_said(capsys):
    for mix, given, said in (("rgb2x", (), "no row is given nothing"),
                             ("gen-only", ("rgb",), "no row is given rgb alone"),
                             ("mmgen", ("rgb", "depth"), "given rgb and depth alone"),
                             ("mmgen", ("depth",), ""), ("subset", ("rgb", "depth"), ""),
                             ("photo", (), ""), (None, ("rgb",), "")):
        tell_untrained(types.SimpleNamespace(train={"mix": mix}, path="r.pt"), given)
        out = capsys.readouterr().out
        assert said in out and bool(said) == bool(out), mix
