import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from conftest import shell
from distributed import InputError
from model import load_model

STD, MEAN = 0.8, 0.3


def gaussian_velocity(x, t):
    """The exact velocity for data N(MEAN, STD^2): E[x0 - eps | x_t = x]."""
    gain = (t * STD ** 2 - (1 - t)) / (t ** 2 * STD ** 2 + (1 - t) ** 2)
    return MEAN + gain * (x - t * MEAN)


def exact_flow(x):
    """The ODE's solution at t = 1 from x at t = 0: it keeps the standardised value."""
    return MEAN + STD * x


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("ab2", 2), ("ab4", 3.7)])
def test_ode_orders(name, order):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    error = [(sample.SAMPLERS[name](gaussian_velocity, x, n, None) - exact_flow(x)).abs().max().item() for n in (256, 512)]
    measured = math.log2(error[0] / error[1])
    assert abs(measured - order) < 0.1 if name != "ab4" else measured >= order, (measured, error)


@pytest.mark.parametrize("name, steps, evaluations", [("euler", 10, 10), ("heun", 10, 20), ("ab2", 10, 13), ("ab4", 10, 19), ("sde", 10, 10)])
def test_evaluations_are_counted(name, steps, evaluations):
    calls = []
    sample.SAMPLERS[name](lambda x, t: calls.append(t) or x * 0, torch.zeros(3), steps, lambda: torch.zeros(3))
    assert len(calls) == evaluations and all(0 <= t <= 1 for t in calls)


def test_sde_follows_its_recursion_and_reaches_the_data():
    """x' = a x + b + c n with the coefficients of one step: mean and variance against samples, then against the data."""
    steps, n = 250, 200_000
    mean, variance = 0.0, 1.0
    levels = [*np.linspace(1, 0.04, steps), 0.0]
    for s, s_next in zip(levels, levels[1:]):
        t, h = 1 - s, s - s_next
        gain = (t * STD ** 2 - s) / (t ** 2 * STD ** 2 + s ** 2)
        a = 1 + h * (gain - 1 + t * gain)                   # drift v - (x - t v) = (1 + t) v - x
        b = h * (1 + t) * (MEAN - gain * t * MEAN)
        mean, variance = a * mean + b, a * a * variance + (2 * s * h if s_next > 0 else 0)
    g = torch.Generator().manual_seed(0)
    normal = lambda: torch.randn(n, generator=g, dtype=torch.float64)
    x = sample.sde(gaussian_velocity, normal(), steps, normal)
    assert abs(x.mean().item() - mean) < 3 * (variance / n) ** 0.5
    assert abs(x.var().item() - variance) < 3 * variance * (2 / n) ** 0.5
    assert abs(variance / STD ** 2 - 1) < 0.02 and abs(mean - MEAN) < 0.01


def test_guidance_acts_on_all_channels_inside_its_interval():
    model = load_model(sample.DEMO / "mmgen.pt")
    calls = []
    original = model.forward
    model.forward = lambda x, t, y, given: calls.append((len(x), round(1 - t[0, -1].item(), 3))) or original(x, t, y, given)
    y, held = torch.tensor([1, 2]), torch.zeros(2, 16, 16, 16)
    run = lambda **k: sample.draw_latents(model, y, held, torch.zeros(4, dtype=torch.bool), sample.Noise(0, [0, 1], "cpu"), "euler", 4, **k)
    plain, guided = run(), run(cfg=2.0)
    assert ((plain - guided).abs().amax((0, 2, 3)) > 1e-3).all()
    calls.clear()
    run(cfg=2.0, cfg_interval=(0.4, 0.8))
    assert calls == [(2, 1.0), (4, 0.75), (4, 0.5), (2, 0.25)]
    null = torch.full_like(y, model.num_classes)
    swap = lambda y_, **k: sample.draw_latents(model, y_, held, torch.zeros(4, dtype=torch.bool), sample.Noise(0, [0, 1], "cpu"), "euler", 1, **k)
    assert torch.allclose(swap(y, cfg=3.0), swap(null) + 3 * (swap(y) - swap(null)), atol=1e-4)


def test_given_modalities_come_back_as_they_were():
    model = load_model(sample.DEMO / "mmgen.pt")
    held = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    given = torch.tensor([True, False, True, False])
    x = sample.draw_latents(model, torch.tensor([0, 1]), held, given, sample.Noise(0, [0, 1], "cpu"), "sde", 3)
    assert torch.equal(x[:, :4], held[:, :4]) and torch.equal(x[:, 8:12], held[:, 8:12]) and not torch.equal(x[:, 4:8], held[:, 4:8])


def read(folder):
    return {p.relative_to(folder): np.asarray(Image.open(p)).astype(int) for p in sorted(folder.rglob("*.png")) if p.name != "grid.png"}


def test_samples_do_not_depend_on_batch_or_processes(command, tmp_path):
    arguments = ("--task", "generate", "--num", 5, "--steps", 6, "--ckpt", "demo/mmgen.pt")
    for name, batch, world in (("a", 1, 1), ("b", 3, 1), ("c", 16, 2)):
        arguments = (*arguments[:7], "demo/mmgen.pt", "--batch-size", batch, "--out", tmp_path / name)
        if world == 1:
            command("sample", *arguments)
        else:
            result = shell("sample.py", *arguments, processes=world)
            assert result.returncode == 0, result.stderr
    a = read(tmp_path / "a")
    assert len(a) == 20
    for other in (read(tmp_path / "b"), read(tmp_path / "c")):
        gaps = np.concatenate([np.abs(a[k] - other[k]).ravel() for k in a])
        assert gaps.max() <= 1 and (gaps > 0).mean() < 1e-3


def test_understand_shows_the_bundled_scenes_beside_the_truth(tmp_path, command):
    out = command("sample", "--task", "understand", "--ckpt", "demo/mmgen.pt", "--sampler", "euler", "--steps", 4, "--out", tmp_path)
    assert out.strip().splitlines()[-1] == str(tmp_path / "grid.png")
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["evaluations"] == 4 and len(meta["checkpoint_sha256"]) == 64 and "disparity" in meta["outputs"]["depth"]
    stem = meta["samples"][0]["stem"]
    depth, normal = np.load(tmp_path / "depth" / f"{stem}.npy"), np.load(tmp_path / "normal" / f"{stem}.npy")
    assert depth.shape == (64, 64) and np.allclose(np.linalg.norm(normal, axis=-1), 1, atol=1e-4)
    given = meta["samples"][0]["given"]["rgb"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "rgb" / f"{stem}.png")), np.asarray(Image.open(given)))
    truth = np.asarray(Image.open(given.replace("/rgb/", "/depth/")).convert("L")) / 255.0
    assert np.corrcoef(truth.ravel(), depth.ravel())[0, 1] > 0.8  # the demo weights do understand


@pytest.mark.parametrize("arguments, folders", [
    (("--task", "condition", "--given", "depth", "--image", "demo/scenes"), ("rgb", "depth", "normal", "seg")),
    (("--task", "condition", "--given", "depth", "normal", "--image", "demo/scenes", "demo/scenes"), ("rgb", "seg")),
    (("--task", "translate", "--image", "demo/scenes"), ("depth_to_rgb", "normal_to_rgb", "seg_to_rgb")),
    (("--task", "generate", "--class-id", "3", "4", "--num", "2", "--npz"), ("rgb", "depth", "normal", "seg")),
])
def test_tasks(arguments, folders, tmp_path, command):
    command("sample", *arguments, "--ckpt", "demo/mmgen.pt", "--sampler", "euler", "--steps", 2, "--out", tmp_path)
    for folder in folders:
        assert len(list((tmp_path / folder).glob("*.png"))) == 4
    if "--npz" in arguments:
        stored = np.load(tmp_path / "samples.npz")["arr_0"]
        assert stored.shape == (4, 64, 64, 3) and stored.dtype == np.uint8
        assert np.array_equal(stored[0], np.asarray(Image.open(tmp_path / "rgb" / "000000.png")))


def test_any_size_full(tmp_path, command):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 150, 3)).astype(np.uint8)).save(tmp_path / "wide.jpg")
    command("sample", "--task", "understand", "--image", tmp_path / "wide.jpg", "--fit", "full", "--ckpt", "demo/mmgen.pt",
            "--sampler", "euler", "--steps", 1, "--out", tmp_path / "out")
    assert np.load(tmp_path / "out" / "depth" / "wide.npy").shape == (90, 150)
    assert Image.open(tmp_path / "out" / "seg" / "wide.png").size == (150, 90)
    Image.new("RGB", (2, 600)).save(tmp_path / "thread.png")
    with pytest.raises(InputError, match="2x600: 19200 tokens, at most 16384"):
        command("sample", "--task", "understand", "--image", tmp_path / "thread.png", "--fit", "full", "--ckpt", "demo/mmgen.pt", "--out", tmp_path / "thread")


@pytest.mark.parametrize("arguments, message", [
    (("--task", "condition"), "needs --given"),
    (("--task", "condition", "--given", "depth"), "or --image with 1"),
    (("--task", "condition", "--given", "depth", "--image", "nowhere.png"), "nowhere.png: no such file"),
    (("--task", "generate", "--class-id", "999"), "--class-id 999: this checkpoint has classes 0 to 11"),
    (("--task", "generate", "--given", "rgb"), "--given belongs to --task condition"),
    (("--task", "generate", "--steps", "0"), "at least 1"),
    (("--task", "generate", "--num", "2147483648"), "at most a million"),
    (("--task", "generate", "--ckpt", "nowhere.pt"), "nowhere.pt: no such checkpoint"),
    (("--task", "generate", "--vae", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
])
def test_bad_arguments(arguments, message, tmp_path, command):
    with pytest.raises(InputError, match=message):
        command("sample", "--ckpt", "demo/mmgen.pt", *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    result = shell("sample.py", "--task", "generate", "--class-id", 999, "--ckpt", "demo/mmgen.pt", "--out", tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.strip().startswith("sample.py: error: --class-id 999") and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_no_file_under_the_final_name(tmp_path, monkeypatch):
    from distributed import whole_file
    import builtins
    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda path, mode="r", *a, **k: real("/dev/full", mode) if "w" in mode else real(path, mode, *a, **k))
    with pytest.raises(OSError):
        with whole_file(tmp_path / "ckpt.pt") as file:
            torch.save({"x": torch.zeros(100_000)}, file)
    assert not (tmp_path / "ckpt.pt").exists()


def test_an_interrupted_set_continues_to_the_same_file(command, monkeypatch, tmp_path):
    argv = ("--task", "generate", "--num", 10, "--classes", "balanced", "--npz", "--outputs", "rgb", "--ckpt", sample.DEMO / "mmgen.pt",
            "--sampler", "euler", "--steps", 1, "--batch-size", 3)
    command("sample", *argv, "--out", tmp_path / "whole")
    calls, one = [], sample.sample_batch

    def failing(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(one(*args))
    monkeypatch.setattr(sample, "sample_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        command("sample", *argv, "--out", tmp_path / "cut")
    assert json.loads((tmp_path / "cut/meta.json").read_text())["complete"] is False
    monkeypatch.setattr(sample, "sample_batch", one)
    assert "6 of 10 samples are there" in command("sample", *argv, "--out", tmp_path / "cut")
    for name in ("samples.npz", "meta.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    array = np.load(tmp_path / "cut/samples.npz")["arr_0"]
    assert array.dtype == np.uint8 and array.shape == (10, 64, 64, 3) and not (tmp_path / "cut/depth").exists()
    assert (array[4] == np.asarray(Image.open(tmp_path / "cut/rgb/000004.png"))).all()
    stamp = (tmp_path / "cut/rgb/000004.png").stat().st_mtime_ns
    assert "10 of 10 samples are there" in command("sample", *argv, "--out", tmp_path / "cut")
    assert (tmp_path / "cut/rgb/000004.png").stat().st_mtime_ns == stamp
    again = command("sample", *argv[:2], "--num", 6, *argv[4:], "--seed", 1, "--out", tmp_path / "cut")  # another recipe starts afresh
    assert "replaces 10 samples" in again and len(list((tmp_path / "cut/rgb").iterdir())) == 6 and not (np.load(tmp_path / "cut/samples.npz")["arr_0"] == array[:6]).all()


def test_an_error_of_a_writing_thread_is_raised(tmp_path):
    (tmp_path / "rgb").write_text("in the way")
    with pytest.raises(OSError), sample.Writer(tmp_path, ["rgb"], "crop", False) as writer:
        writer(sample.Item(0, "a", 0, {}), {"rgb": np.zeros((3, 8, 8), np.float32)})


def test_what_a_killed_process_left_is_removed(tmp_path):
    from distributed import whole_file
    for name in (".a.png.123.tmp", ".b.png.123.tmp"):
        (tmp_path / name).write_bytes(b"half")
    for _ in range(2):
        with whole_file(tmp_path / "a.png") as file:
            file.write(b"whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.png.123.tmp", "a.png"] and (tmp_path / "a.png").read_bytes() == b"whole"


def test_fast_is_the_few_steps_of_the_table(command, tmp_path):
    argv = ("--task", "understand", "--ckpt", sample.DEMO / "mmgen.pt")
    command("sample", *argv, "--fast", "--out", tmp_path / "fast")
    command("sample", *argv, "--sampler", sample.FAST["understand"]["sampler"], "--steps", sample.FAST["understand"]["steps"], "--out", tmp_path / "spelled")
    assert (tmp_path / "fast/meta.json").read_text() == (tmp_path / "spelled/meta.json").read_text()
    for path in (tmp_path / "fast/depth").iterdir():
        assert path.read_bytes() == (tmp_path / "spelled/depth" / path.name).read_bytes()
    with pytest.raises(InputError, match="--fast with --sampler heun"):
        command("sample", *argv, "--fast", "--sampler", "heun", "--out", tmp_path / "both")


def test_weights_rounded_once_are_what_autocast_makes_of_them():
    cpu, g = torch.device("cpu"), torch.Generator().manual_seed(0)
    held = torch.randn(3, 16, 16, 16, generator=g)
    draws = [sample.draw_latents(model, torch.tensor([1, 5, 12]), held, torch.tensor([True, False, False, False]), sample.Noise(0, range(3), cpu), "euler", 2, 2.0, precision="bf16")
             for model in (sample.open_model(sample.DEMO / "mmgen.pt", cpu, "bf16"), sample.open_model(sample.DEMO / "mmgen.pt", cpu))]
    assert torch.equal(*draws)


def test_bf16_decodes_to_nearly_the_same_pixels():
    vae = sample.load_vae("toy")
    x = torch.randn(3, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, rough = sample.decode_latents(vae, x, 4), sample.decode_latents(vae, x, 4, "bf16")
    gap = (whole - rough).abs() * 127.5  # levels of 8 bits
    assert 0 < gap.mean() < 0.5 and gap.max() < 8 and len(rough[0, 1].unique()) > 2000  # the last layer is not rounded
    assert torch.equal(sample.decode_latents(vae, x, 4, wanted=[3, 1]), whole[:, [3, 1]])


def test_condition_on_a_folder_tree(command, tmp_path):
    command("sample", "--task", "condition", "--given", "depth", "--data", sample.DEMO / "scenes", "--npz", "--ckpt", sample.DEMO / "mmgen.pt",
            "--sampler", "euler", "--steps", 1, "--out", tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (4, 64, 64, 3) and all("/depth/" in s["given"]["depth"] for s in meta["samples"])


def test_truncated_pixels_are_at_most_one_level_lower(command, tmp_path):
    argv = ("--task", "generate", "--num", 2, "--ckpt", sample.DEMO / "mmgen.pt", "--sampler", "euler", "--steps", 1)
    command("sample", *argv, "--out", tmp_path / "round")
    command("sample", *argv, "--truncate", "--out", tmp_path / "cut")
    a, b = (np.asarray(Image.open(tmp_path / name / "rgb/000001.png")).astype(int) for name in ("round", "cut"))
    assert set(np.unique(a - b)) == {0, 1} and 0.3 < (a - b).mean() < 0.7


def test_a_changed_picture_is_sampled_again(command, tmp_path):
    picture = tmp_path / "p.png"
    run = lambda: command("sample", "--task", "understand", "--image", picture, "--ckpt", sample.DEMO / "mmgen.pt", "--sampler", "euler", "--steps", 1, "--out", tmp_path / "o")
    Image.new("RGB", (64, 64), "red").save(picture)
    run()
    before = (tmp_path / "o/depth/p.npy").read_bytes()
    Image.new("RGB", (64, 64), "blue").save(picture)
    os.utime(picture, (2e9, 2e9))
    run()
    assert (tmp_path / "o/depth/p.npy").read_bytes() != before
