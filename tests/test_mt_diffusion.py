"""MT-Diffusion: the chain against closed forms and quadrature-free Gaussian propagation, the settings, the commands."""
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import mt_diffusion as mt
import sample
import train
from conftest import shell, start
from distributed import InputError
from model import load_checkpoint
from test_train import same_weights

FAMILIES = [name for name in mt.FAMILIES if name != "none"]


def chain(schedule, *families):
    a = 1 - mt.make_betas(schedule)
    return a, np.stack([mt.make_weights(f, a) for f in families]), mt.MTSchedule.make(schedule, families)


@pytest.mark.parametrize("schedule", ("linear", "cosine"))
@pytest.mark.parametrize("family", FAMILIES)
def test_recursion_product_and_chain_agree(schedule, family):
    a, w, made = chain(schedule, family)
    root = np.sqrt(a)
    for k in (0, 1, 7, 300, 999):  # at_k = sum_i w_i prod_{j=i..k} sqrt(a_j)
        product = sum(w[0, i] * np.prod(root[i:k + 1]) for i in range(k + 1))
        assert made.shift[0, k] == pytest.approx(product, rel=1e-10, abs=1e-14)
    z0, e, mean, variance = 0.7, -1.3, 0.7, 0.0
    for k in range(1000):  # the transition's own moments
        mean, variance = root[k] * (mean + w[0, k] * e), a[k] * variance + 1 - a[k]
        assert mean == pytest.approx(np.sqrt(made.abar[k]) * z0 + made.shift[0, k] * e, rel=1e-10, abs=1e-12)
        assert variance == pytest.approx(1 - made.abar[k], rel=1e-10)
    assert np.allclose(made.w, w, rtol=1e-8, atol=1e-9)


def test_what_the_families_add_up_to():
    """The specification's table: the factor of E(X) at the last step, linear and cosine."""
    last = {f: [chain(s, f)[2].shift[0, -1] for s in ("linear", "cosine")] for f in FAMILIES}
    assert last["paper"] == pytest.approx([4547, 51.8], rel=1e-3) and last["ramp"] == pytest.approx([97.9, 0.2074], rel=1e-3)
    assert last["revert"] == pytest.approx([0.99, 1.0], abs=0.01) and last["paper_scaled"] == pytest.approx([1, 0.058], abs=1e-3)
    assert last["vp_ramp"] == pytest.approx([0.00635, 4.93e-5], rel=1e-3)
    a, w, made = chain("linear", "vp_ramp")  # its marginal is sqrt(abar) (z0 + (t+1)/T e)
    assert np.allclose(made.shift[0], np.sqrt(made.abar) * (np.arange(1000) + 1) / 1000, rtol=1e-10)
    assert w[0, 0] == 0.001 and chain("linear", "paper")[1][0, [0, 999]].tolist() == [0, 999]


@pytest.mark.parametrize("schedule", ("linear", "cosine"))
def test_posterior_is_bayes_and_its_two_means_agree(schedule):
    """Two modalities at once, each with weights of its own."""
    a, w, made = chain(schedule, "paper_scaled", "vp_ramp")
    g = torch.Generator().manual_seed(0)
    k = torch.randint(1, 1000, (40,), generator=g)
    z0, e1, e2, eps = (torch.randn(40, 3, generator=g, dtype=torch.float64) for _ in range(4))
    e = [e1, e2]
    z = made.q_sample(z0, e, k, eps)
    one, two = made.mean(z, z0, e, k), made.mean_from_eps(z, eps, e, k)
    assert (one - two).abs().max() < 1e-10 * max(1, two.abs().max())
    i = k.numpy()
    column = lambda x: torch.from_numpy(x)[:, None]
    prior_mean = column(np.sqrt(made.abar[i - 1])) * z0 + column(made.shift[0, i - 1]) * e1 + column(made.shift[1, i - 1]) * e2
    prior, noise, root = column(1 - made.abar[i - 1]), column(1 - a[i]), column(np.sqrt(a[i]))
    weighted = column(w[0, i]) * e1 + column(w[1, i]) * e2
    precision = 1 / prior + root ** 2 / noise
    bayes = (prior_mean / prior + root * (z - root * weighted) / noise) / precision
    assert (bayes - one).abs().max() < 1e-9 and (1 / precision[:, 0] - torch.from_numpy(made.variance[i])).abs().max() < 1e-10
    spelled = ((root * prior * z + (1 - root ** 2) * column(np.sqrt(made.abar[i - 1])) * z0            # Eq. 5 as printed
                + ((1 - root ** 2) * column(made.shift[0, i]) / root - column(1 - made.abar[i]) * column(w[0, i])) * e1
                + ((1 - root ** 2) * column(made.shift[1, i]) / root - column(1 - made.abar[i]) * column(w[1, i])) * e2) / column(1 - made.abar[i]))
    assert (spelled - one).abs().max() < 1e-9


def test_without_weights_it_is_ddpm_bit_for_bit():
    _, _, made = chain("cosine", "none")
    g = torch.Generator().manual_seed(0)
    k, (z0, e, eps) = torch.randint(1, 1000, (16,), generator=g), (torch.randn(16, 4, 8, 8, generator=g) for _ in range(3))
    f = lambda x: torch.from_numpy(x).float()[k].reshape(-1, 1, 1, 1)
    before = np.concatenate([[1.0], made.abar[:-1]])
    z = f(np.sqrt(made.abar)) * z0 + f(np.sqrt(1 - made.abar)) * eps
    assert torch.equal(made.q_sample(z0, [e], k, eps), z)
    assert torch.equal(made.mean(z, z0, [e], k), f(np.sqrt(made.a) * (1 - before) / (1 - made.abar)) * z + f((1 - made.a) * np.sqrt(before) / (1 - made.abar)) * z0)


@pytest.mark.parametrize("family", FAMILIES)
def test_respacing_keeps_the_marginals(family):
    a, w, made = chain("linear", family)
    short = made.respaced(50)
    assert (short.abar == made.abar[short.index]).all() and (short.shift == made.shift[:, short.index]).all() and short.index[[0, -1]].tolist() == [0, 999]
    mean, variance = np.array([1.0, 0.0]), 0.0  # walk the short chain: factors of z0 and e
    for k in range(50):
        mean, variance = np.sqrt(short.a[k]) * (mean + [0, short.w[0, k]]), short.a[k] * variance + 1 - short.a[k]
    assert mean == pytest.approx([np.sqrt(made.abar[-1]), made.shift[0, -1]], rel=1e-9) and variance == pytest.approx(1 - made.abar[-1], rel=1e-9)


# z0 ~ N(.5, 1), x ~ N(-.5, 1), covariance .8: the best denoiser is linear, and so is every step; moments go through exactly.
Z, X, COV = 0.5, -0.5, 0.8


def expectations(made, k, known):
    """E[eps | z_k, x] or E[eps | z_k], E[x | z_k], as functions of z (and x)."""
    signal, shift, noise = np.sqrt(made.abar[k]), made.shift[0, k], np.sqrt(1 - made.abar[k])
    mean = signal * Z + shift * X
    variance = signal ** 2 + shift ** 2 + 2 * signal * shift * COV + noise ** 2
    with_x = signal * COV + shift
    if not known:
        return lambda z, x: noise / variance * (z - mean), lambda z: X + with_x / variance * (z - mean)
    left = variance - with_x ** 2  # of z given x
    return lambda z, x: noise / left * (z - mean - with_x * (x - X)), None


def last_moments(schedule, family, known, literal=False):
    """Algorithm 1 -> mean, variance of z0 beside x, covariance with x (or with the x that it predicts)."""
    _, _, made = chain(schedule, family)
    number = lambda v: torch.tensor([v], dtype=torch.float64)
    flat, slope, variance = 0.0, (made.shift[0, -1] if known else 0.0), 1.0  # z = flat + slope x + N(0, variance)
    covariance = None
    for i in reversed(range(1000)):
        eps, predict = expectations(made, i, known)
        k = torch.tensor([i])
        def step(z, x):
            e = x if known else predict(z)
            return made.mean_from_eps(number(z), number(eps(z, x)), [number(e)], k).item()
        at, by_z, by_x = step(0, 0), step(1, 0) - step(0, 0), step(0, 1) - step(0, 0)
        if i == 0 and not known:
            covariance = by_z * (predict(1) - predict(0)) * variance
        flat, slope, variance = at + by_z * flat, by_z * slope + by_x, by_z ** 2 * variance + (made.variance[i] ** 2 if literal else made.variance[i])
    return flat + slope * X, variance, slope if known else covariance


@pytest.mark.parametrize("schedule", ("linear", "cosine"))
def test_unknown_x_comes_out_right(schedule, figure):
    mean, variance, covariance = last_moments(schedule, "vp_ramp", known=False)
    figure(f"MT-Diffusion, Gaussian toy, x unknown, vp_ramp, {schedule}", dict(mean=mean, variance=variance, covariance=covariance))
    assert mean == pytest.approx(0.5, abs=1e-3) and variance == pytest.approx(0.99, abs=0.01) and covariance == pytest.approx(0.79, abs=0.01)
    assert last_moments(schedule, "vp_ramp", known=False, literal=True)[1] == pytest.approx(0.006, abs=0.004)  # Algorithm 1 as printed


@pytest.mark.parametrize("schedule, residual", (("linear", 0.3552), ("cosine", 0.3575)))
@pytest.mark.parametrize("family", FAMILIES)
def test_known_x_comes_out_right_for_every_weight(schedule, residual, family, figure):
    mean, variance, covariance = last_moments(schedule, family, known=True)
    figure(f"MT-Diffusion, Gaussian toy, x known, {family}, {schedule}", dict(mean=mean, residual_variance=variance, covariance=covariance))
    assert mean == pytest.approx(0.5, abs=2e-3) and covariance == pytest.approx(0.8, abs=2e-3) and variance == pytest.approx(residual, abs=2e-3)


class Exact(mt.MTDiffusion):
    """The Gaussians' own denoiser, each latent by itself; it undoes look, as a network would learn to."""

    def forward(self, z, k, x, seen):
        made, known, i = self.schedule, bool(seen[0]), int(k[0])
        z = z + made.carried("shift", [x], k) if known else z / made.at("scale", k, z)
        eps, predict = expectations(made, i, known)
        return eps(z, x), x if known else predict(z)


def exact(schedule, family):
    model = mt.build("T/2", "pair", ["seg", "rgb"], 12, 1, 2, agg=family)
    model.__class__, model.schedule = Exact, mt.MTSchedule.make(schedule, [family])
    return model.double()


@pytest.mark.parametrize("schedule", ("linear", "cosine"))
def test_the_sampler_draws_the_gaussians(schedule):
    """MTDiffusion.sample itself, 24,000 latents, against the moments above."""
    rng = np.random.default_rng(0)
    noise = lambda shape: torch.from_numpy(rng.standard_normal((6000, *shape)))
    known = torch.ones(6000, dtype=torch.bool)
    z, x = exact(schedule, "vp_ramp").sample(noise, ~known, steps=1000)
    assert z.mean().item() == pytest.approx(0.5, abs=0.03) and z.var().item() == pytest.approx(0.99, abs=0.04)
    assert torch.cov(torch.stack([z.flatten(), x.flatten()]))[0, 1].item() == pytest.approx(0.79, abs=0.04)
    if schedule == "cosine":
        return
    given = X + noise((1, 2, 2))
    for family in ("paper", "revert"):
        z, x = exact(schedule, family).sample(noise, known, given, steps=500)
        assert torch.equal(x, given) and z.mean().item() == pytest.approx(0.5, abs=0.03)
        assert (z - 0.8 * x).var().item() == pytest.approx(0.357, abs=0.02) and torch.cov(torch.stack([z.flatten(), x.flatten()]))[0, 1].item() == pytest.approx(0.8, abs=0.04)
    wrong, _ = exact(schedule, "paper").sample(noise, known, given, start="standard", steps=250)  # the finding on w
    assert abs(wrong.mean().item() - 0.5) > 0.5 or wrong.var().item() > 2


# ------------------------------------------------------------------------------------------------

def tiny(pair, **options):
    torch.manual_seed(0)
    model = mt.build("T/2", pair, ["seg", "rgb"] if pair == "pair" else ["rgb", "rgb"] if "masked" in pair else ["rgb"], 12, 4, 16, features=8, **options)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.04)
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("mt") / "cache"
    start("prep_latents", "--toy", 16, "--out", out, "--batch-size", 8, "--no-dino", "--feature", "toy-teacher")
    return out


def test_masks():
    """So many squares, clipped at the border."""
    corners = torch.tensor([[[0, 0], [60, 62], [1, 1]], [[0, 0], [60, 62], [1, 1]]])
    mask = mt.visible(corners, torch.tensor([2, 0]), (64, 64), 16)
    assert (mask == 0).sum() == 16 * 16 + 4 * 2 and (mask[0, 0, 60:, 62:] == 0).all() and (mask[1] == 1).all()


def objective(data, *flags):
    """The Objective of train.py's flags on a cache."""
    argv, sys.argv = sys.argv, ["train.py", "--method", "mt-diffusion", "--data", str(data), "--model", "T/2", *map(str, flags)]
    try:
        return mt.Objective(train.arguments(), train.Cache(data), torch.device("cpu"))
    finally:
        sys.argv = argv


def test_the_rows_of_a_masked_batch(data):
    """X is the image where it shows; a tenth of the rows sees none of it, in a tenth all is hidden; 0 to 10 squares."""
    made = objective(data, "--pair", "masked", "--batch-size", 400)
    batch = {"rgb": torch.zeros(400, 2, 4, 16, 16)}
    batch["rgb"][:, 0], batch["rgb"][:, 1] = 1.0, -20.0  # mean 1, no spread
    rows, counts = made.prepare(3, batch, slice(0, 400))
    shown = (rows["x"] != 0).float().mean((1, 2, 3))
    assert torch.equal(rows["x"][shown == 1], rows["z0"][shown == 1]) and set(rows["x"].unique().tolist()) <= {0.0, rows["z0"].max().item()}
    assert (shown == 0).float().mean().item() == pytest.approx(0.1, abs=0.05) and (shown == 1).float().mean().item() == pytest.approx(0.9 / 11, abs=0.04)
    assert rows["seen"].float().mean().item() == pytest.approx(0.9, abs=0.05) and not rows["alone"].any() and counts.tolist() == [400, 400, 400]
    one = made.prepare(3, {"rgb": batch["rgb"][8:16]}, slice(8, 16))[0]  # a process sees its part of the same draws
    assert all(torch.equal(one[name], rows[name][8:16]) for name in rows)


@pytest.mark.parametrize("flags", (("label",), ("label", "--head", "output"), ("feature",), ("rgb", "seg")))
def test_every_parameter_learns_in_bf16(data, flags):
    made = objective(data, "--pair", *flags, "--batch-size", 4, "--agg", "revert")
    for p in made.model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.04)
    cache = train.Cache(data)
    rows, counts = made.prepare(0, cache.gather(np.arange(4), made.reads, False), slice(0, 4))
    train.total_loss(made.loss(made.model, rows), counts, made.weights).backward()
    still = [name for name, p in made.model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().max() > 0)]
    assert not still


@pytest.mark.parametrize("pair", ("pair", "masked", "label", "feature"))
def test_encoders_take_no_gradient_heads_and_backbone_do(pair):
    model = tiny(pair, agg="revert")
    z0, k = torch.randn(4, 4, 16, 16), torch.tensor([3, 200, 600, 999])
    x = {"label": torch.arange(4), "feature": torch.randn(4, 8)}.get(pair, torch.randn(4, 4, 16, 16)).clone()
    x.requires_grad_(x.is_floating_point())
    e = model.encode(x)
    assert not (e.requires_grad and not model.images) and e.shape == z0.shape and (model.images or e.abs().max() > 0.01)
    z = model.schedule.q_sample(z0, [e.detach()], k, torch.randn_like(z0))
    eps, predicted = model(z, k, x, torch.tensor([True, False, True, False]))
    (eps.square().sum() + predicted.square().sum()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without and model.backbone.blocks[0].attn.qkv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("pair", ("pair", "masked"))
def test_a_hidden_x_is_not_seen_and_a_full_mask_is_ddpm(pair):
    model = tiny(pair)
    z0, noise, k = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16), torch.tensor([100, 700])
    blank, plain = torch.zeros_like(z0), mt.MTSchedule.make(model.setting.schedule, ["none"])
    drawn = model.schedule.q_sample(z0, [model.encode(blank)], k, noise)
    assert torch.equal(drawn, plain.q_sample(z0, [noise], k, noise)) and not torch.equal(drawn, model.schedule.q_sample(z0, [noise], k, noise))
    off = torch.zeros(2, dtype=torch.bool)
    assert torch.equal(model(z0, k, torch.randn_like(z0), off)[0], model(z0, k, torch.randn_like(z0), off)[0])
    assert not torch.equal(model(z0, k, z0, ~off)[0], model(z0, k, blank, ~off)[0])


@pytest.fixture
def trained(data, command, tmp_path):
    """trained("masked") trains 2 steps of a setting -> run folder."""
    def go(*pair, **flags):
        run = tmp_path / "-".join(pair)
        command("train", "--method", "mt-diffusion", "--pair", *pair, "--data", data, "--run", run, "--model", "T/2", "--steps", 2, "--batch-size", 8,
                "--log-every", 1, *[word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)])
        return run
    return go


def test_restoration_keeps_every_other_pixel(trained, command, tmp_path):
    run = trained("masked")
    photo = np.random.default_rng(0).integers(0, 256, (50, 90, 3)).astype(np.uint8)
    mask = np.zeros((50, 90), np.uint8)
    mask[10:30, 40:70] = 255
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for fit in ("full", "crop"):
        command("sample", "--task", "restore", "--image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png", "--ckpt", run, "--steps", 3, "--fit", fit, "--out", tmp_path / fit)
    out, shown = (np.asarray(Image.open(tmp_path / "full" / m / "photo.png")) for m in ("rgb", "masked_rgb"))
    assert (out[mask == 0] == photo[mask == 0]).all() and (shown[mask == 0] == photo[mask == 0]).all() and (out[mask > 0] != photo[mask > 0]).mean() > 0.9
    assert Image.open(tmp_path / "crop" / "rgb" / "photo.png").size == (64, 64)
    command("sample", "--task", "restore", "--image", tmp_path / "photo.png", "--patches", 4, "--sdedit", 0.5, "--ckpt", run, "--steps", 4, "--out", tmp_path / "sdedit")
    hidden = (np.asarray(Image.open(tmp_path / "sdedit/masked_rgb/photo.png")) == 128).all(-1)
    assert 16 * 4 < hidden.sum() <= 4 * 256
    again = ("sample", "--task", "restore", "--image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png", "--ckpt", run, "--steps", 3, "--fit", "full", "--out", tmp_path / "full")
    assert "1 of 1 samples are there" in command(*again)
    Image.fromarray(255 - mask).save(tmp_path / "mask.png")
    assert "are there" not in command(*again)  # a changed mask is another task
    assert (np.asarray(Image.open(tmp_path / "full/rgb/photo.png"))[mask > 0] == photo[mask > 0]).all()
    Image.fromarray(mask // 255).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match="hides nothing"):
        command(*again)
    Image.fromarray(mask[:40]).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match="must be of one size"):
        command("sample", "--task", "restore", "--image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png", "--ckpt", run, "--steps", 3, "--out", tmp_path / "x")


def test_labels_and_vectors(trained, command, tmp_path):
    run = trained("label", head="output")
    text = command("sample", "--task", "classify", "--data", sample.DEMO / "scenes", "--ckpt", run, "--out", tmp_path / "c")
    scores = json.loads((tmp_path / "c/meta.json").read_text())["scores"]
    best = [[i for _, i, _ in json.loads(path.read_text())] for path in sorted((tmp_path / "c/classes").iterdir())]
    names = load_checkpoint(run)["config"]["meta"]["class_names"]
    truth = [names.index(" ".join(path.stem.split("_")[:2])) for path in sorted((tmp_path / "c/classes").iterdir())]
    assert "of 4 pictures" in text and scores == dict(top1=np.mean([t == b[0] for t, b in zip(truth, best)]), top5=np.mean([t in b for t, b in zip(truth, best)]), labelled=4)
    assert "4 of 4 samples are there" in command("sample", "--task", "classify", "--data", sample.DEMO / "scenes", "--ckpt", run, "--out", tmp_path / "c")
    for size in (1, 2):  # 12 is nobody's class: it is drawn
        command("sample", "--task", "generate", "--class-id", 12, 3, "--cfg", 2, "--classifier-scale", 1, "--batch-size", size, "--ckpt", run, "--steps", 3, "--out", tmp_path / f"g{size}")
    assert json.loads((tmp_path / "g1/classes/000001.json").read_text()) == [[names[3], 3, 1.0]]
    a, b = (np.asarray(Image.open(tmp_path / g / "rgb/000001.png")).astype(int) for g in ("g1", "g2"))
    assert np.abs(a - b).max() <= 1
    run = trained("feature")
    np.save(tmp_path / "f.npy", np.ones((2, 768), np.float32))
    command("sample", "--task", "generate", "--num", 3, "--features", tmp_path / "f.npy", "--ckpt", run, "--steps", 3, "--out", tmp_path / "v")
    assert (np.load(tmp_path / "v/feature/000002.npy") == 1).all()
    with pytest.raises(InputError, match="needs a checkpoint of train.py"):
        command("sample", "--task", "classify", "--data", sample.DEMO / "scenes", "--ckpt", run, "--out", tmp_path / "c")


def test_translation_does_not_depend_on_the_batch(trained, command, tmp_path):
    run = trained("rgb", "seg")
    for size in (1, 4):
        command("sample", "--task", "translate", "--image", sample.DEMO / "scenes", "--ckpt", run, "--steps", 3, "--batch-size", size, "--out", tmp_path / str(size))
    a, b = (np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted((tmp_path / s / "seg").glob("*.png"))]) for s in "14")
    assert len(a) == 4 and np.abs(a - b).max() <= 1
    command("sample", "--task", "translate", "--image", sample.DEMO / "scenes", "--outputs", "seg", "--ckpt", run, "--steps", 2, "--out", tmp_path / "alone")
    assert not (tmp_path / "alone/rgb").exists()
    command("eval_depth", "--data", sample.DEMO / "scenes", "--ckpt", run, "--steps", 2, "--out", tmp_path / "e")
    command("sample", "--task", "generate", "--num", 2, "--ckpt", run, "--steps", 3, "--out", tmp_path / "joint")
    assert len(list((tmp_path / "joint").glob("*/00000?.png"))) == 4
    with pytest.raises(InputError, match="does not take RGB"):
        command("eval_depth", "--toy", 2, "--ckpt", trained("seg", "rgb"), "--steps", 3)
    for flags, message in ((("--classifier-scale", 1), "--pair label"), (("--x-update", "argmax"), "follows by mean"), (("--steps", 1001), "has 1000"), (("--cfg-interval", 0, 0.5), "MMGen's"), (("--sampler", "euler"), "its own chain"),
                           (("--cfg", "nan"), "finite"), (("--class-id", 3), "knows nothing of classes")):
        with pytest.raises(InputError, match=message):
            command("sample", "--task", "generate", "--ckpt", run, "--out", tmp_path / "x", *flags)
    with pytest.raises(InputError, match="takes rgb"):
        command("sample", "--task", "condition", "--given", "seg", "--image", sample.DEMO / "scenes", "--ckpt", run, "--out", tmp_path / "x")


def test_resume_and_processes(data, trained, command, tmp_path):
    """2 steps = 1 + 1, and one process against two, fp32, in micro-batches."""
    flags = ("--method", "mt-diffusion", "--pair", "label", "--data", data, "--model", "T/2", "--batch-size", 16, "--micro-batch", 4, "--precision", "fp32", "--ckpt-every", 1)
    for folder, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
        command("train", *flags, "--steps", steps, "--run", tmp_path / folder)
    assert same_weights(tmp_path / "whole/latest.pt", tmp_path / "parts/latest.pt") == 0
    result = shell("train.py", *flags, "--steps", 2, "--run", tmp_path / "two", processes=2)
    assert result.returncode == 0, result.stderr
    assert same_weights(tmp_path / "whole/latest.pt", tmp_path / "two/latest.pt") < 1e-6


def test_init_goes_by_role(data, trained, command, tmp_path):
    """Noise to noise and X to X between settings; between methods without heads; and the table says what was left out."""
    flags = ("--method", "mt-diffusion", "--data", data, "--model", "T/2", "--steps", 1, "--batch-size", 8, "--lr", 1e-12)
    first = trained("rgb", "seg")
    theirs = load_checkpoint(first)["ema"]
    for name, pair in (("turned", ("seg", "rgb")), ("masked", ("masked",)), ("label", ("label",))):
        table = command("train", *flags, "--pair", *pair, "--x-weight", 0, "--agg", "none", "--init", first, "--run", tmp_path / name)
        mine = load_checkpoint(tmp_path / name)["ema"]
        places = 1 if name == "label" else 2
        for key in ("backbone.heads.{}.adaLN_modulation.1.bias", "backbone.x_embedder.proj.weight"):
            for place in range(places):
                a, b = (ema[key.format(place)] for ema in (mine, theirs))
                b = b[:, :a.shape[1]] if "x_embedder" in key else b
                assert (a - b).abs().max() < 1e-6, (name, key)
        assert ("left out    0" in table) == (name != "label")
    table = command("train", *flags, "--pair", "rgb", "seg", "--init", sample.DEMO / "mmgen.pt", "--run", tmp_path / "from-mmgen")
    assert "inflated" in table and "heads.0, heads.1" in table.split("left out")[0] and "heads.3" in table.split("left out")[1]
    back = command("train", "--data", data, "--model", "T/2", "--steps", 1, "--batch-size", 8, "--repa-weight", 0, "--init", first, "--run", tmp_path / "back")
    assert "heads.1" in back.split("left out")[1]
    command("train", *flags, "--pair", "feature", "--init", tmp_path / "label", "--run", tmp_path / "feature")


@pytest.mark.parametrize("flags, message", (
    (("--pair", "rgb", "canny"), "two modalities of the cache"), (("--pair", "rgb", "rgb"), "two modalities"), (("--pair", "nonsense"), "two modalities"),
    (("--pair", "label", "--single", "1.5"), "must lie in"), (("--pair", "feature"), "has no feature vectors"), (("--pair", "label", "--mix", "rgb2x"), "does not belong"),
    (("--pair", "label", "--eps-weight", "0", "--x-weight", "0"), "nothing would be trained"), (("--pair", "masked", "--head", "output"), "belongs to --pair label")))
def test_bad_flags(cache, command, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        command("train", "--method", "mt-diffusion", *flags, "--data", cache, "--model", "T/2", "--steps", 1, "--batch-size", 8, "--run", tmp_path / "r")
