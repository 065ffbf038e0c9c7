"""MT-Diffusion: the chain against closed forms and exact Gaussian moments, the settings, the commands."""
import functools
import json
import shutil
import types

import numpy as np
import pytest
import torch
from PIL import Image

import mt_diffusion
import mt_model as mt
import mt_sample
import train
from conftest import gap, shell, start
from dataset import Cache
from distributed import InputError, command_parser
from images import centre_crop
from sample import Request
from samplers import Noise
from small import SMALL
from vae import load_encoder
from weights import DEMO, load_checkpoint

FAMILIES = [name for name in mt.FAMILIES if name != "none"]
SCENES = DEMO / "scenes"


def chain(schedule, *families):
    """The step factors a (T,), the weights w (I, T) and the MTSchedule of them."""
    a = 1 - mt.make_betas(schedule)
    return a, np.stack([mt.FAMILIES[f](a) for f in families]), mt.MTSchedule.make(schedule, families)


# ------------------------------------------------------------------------------------------------
# The chain.

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
        marginal = np.sqrt(made.abar[k]) * z0 + made.shift[0, k] * e
        assert mean == pytest.approx(marginal, rel=1e-10, abs=1e-12)
        assert variance == pytest.approx(1 - made.abar[k], rel=1e-10)
    assert np.allclose(made.w, w, rtol=1e-8, atol=1e-9)


def test_what_the_families_add_up_to():
    """The specification's table: the factor of E(X) at the last step, linear and cosine."""
    last = {f: [chain(s, f)[2].shift[0, -1] for s in ("linear", "cosine")] for f in FAMILIES}
    assert last["paper"] == pytest.approx([4547, 51.8], rel=1e-3)
    assert last["ramp"] == pytest.approx([97.9, 0.2074], rel=1e-3)
    assert last["revert"] == pytest.approx([0.99, 1.0], abs=0.01)
    assert last["paper_scaled"] == pytest.approx([1, 0.058], abs=1e-3)
    assert last["vp_ramp"] == pytest.approx([0.00635, 4.93e-5], rel=1e-3)
    a, w, made = chain("linear", "vp_ramp")  # its marginal is sqrt(abar) (z0 + (t+1)/T e)
    assert np.allclose(made.shift[0], np.sqrt(made.abar) * (np.arange(1000) + 1) / 1000, rtol=1e-10)
    assert w[0, 0] == 0.001 and chain("linear", "paper")[1][0, [0, 999]].tolist() == [0, 999]


def column(x):
    """(n,) numpy -> (n, 1) tensor."""
    return torch.from_numpy(x)[:, None]


def mean_from_noise(made, z, eps, e, k):
    """The posterior's mean as the paper has it, Eq. 5."""
    a, abar = column(made.a[k.numpy()]), column(made.abar[k.numpy()])
    shares = sum(column(w[k.numpy()]) * x for w, x in zip(made.w, e))
    return (z - (1 - a) / (1 - abar).sqrt() * eps) / a.sqrt() - shares


@pytest.mark.parametrize("schedule", ("linear", "cosine"))
def test_posterior_is_bayes_and_its_two_means_agree(schedule):
    """Two modalities at once, each with weights of its own."""
    a, w, made = chain(schedule, "paper_scaled", "vp_ramp")
    g = torch.Generator().manual_seed(0)
    k = torch.randint(1, 1000, (40,), generator=g)
    z0, e1, e2, eps = (torch.randn(40, 3, generator=g, dtype=torch.float64) for _ in range(4))
    e = [e1, e2]
    z = made.q_sample(z0, e, k, eps)
    one, two = made.mean(z, z0, e, k), mean_from_noise(made, z, eps, e, k)
    assert (one - two).abs().max() < 1e-10 * max(1, two.abs().max())

    i = k.numpy()
    signal, prior = column(np.sqrt(made.abar[i - 1])), column(1 - made.abar[i - 1])  # a step earlier
    noise, root = column(1 - a[i]), column(np.sqrt(a[i]))
    prior_mean = signal * z0 + column(made.shift[0, i - 1]) * e1 + column(made.shift[1, i - 1]) * e2
    weighted = column(w[0, i]) * e1 + column(w[1, i]) * e2
    precision = 1 / prior + root ** 2 / noise
    bayes = (prior_mean / prior + root * (z - root * weighted) / noise) / precision
    assert (bayes - one).abs().max() < 1e-9
    assert (1 / precision[:, 0] - torch.from_numpy(made.variance[i])).abs().max() < 1e-10

    level = column(1 - made.abar[i])
    factors = [noise * column(made.shift[m, i]) / root - level * column(w[m, i]) for m in (0, 1)]
    spelled = root * prior * z + noise * signal * z0 + factors[0] * e1 + factors[1] * e2  # Eq. 5 as printed
    assert (spelled / level - one).abs().max() < 1e-9


def test_without_weights_it_is_ddpm_bit_for_bit():
    _, _, made = chain("cosine", "none")
    g = torch.Generator().manual_seed(0)
    k = torch.randint(1, 1000, (16,), generator=g)
    z0, e, eps = (torch.randn(16, 4, 8, 8, generator=g) for _ in range(3))

    def at(x):
        return torch.from_numpy(x).float()[k].reshape(-1, 1, 1, 1)

    before = np.concatenate([[1.0], made.abar[:-1]])
    z = at(np.sqrt(made.abar)) * z0 + at(np.sqrt(1 - made.abar)) * eps
    assert torch.equal(made.q_sample(z0, [e], k, eps), z)
    from_z = at(np.sqrt(made.a) * (1 - before) / (1 - made.abar))
    from_z0 = at((1 - made.a) * np.sqrt(before) / (1 - made.abar))
    assert torch.equal(made.mean(z, z0, [e], k), from_z * z + from_z0 * z0)


@pytest.mark.parametrize("family", FAMILIES)
def test_respacing_keeps_the_marginals(family):
    a, w, made = chain("linear", family)
    short = made.respaced(50)
    assert (short.abar == made.abar[short.index]).all() and short.index[[0, -1]].tolist() == [0, 999]
    assert (short.shift == made.shift[:, short.index]).all()
    mean, variance = np.array([1.0, 0.0]), 0.0  # walk the short chain: factors of z0 and e
    for k in range(50):
        mean = np.sqrt(short.a[k]) * (mean + [0, short.w[0, k]])
        variance = short.a[k] * variance + 1 - short.a[k]
    assert mean == pytest.approx([np.sqrt(made.abar[-1]), made.shift[0, -1]], rel=1e-9)
    assert variance == pytest.approx(1 - made.abar[-1], rel=1e-9)


# ------------------------------------------------------------------------------------------------
# Algorithm 1 on Gaussians. z0 ~ N(.5, 1), x ~ N(-.5, 1), covariance .8: the best denoiser is linear, and so
# is every step; moments go through exactly.

Z, X, COV = 0.5, -0.5, 0.8


def expectations(made, k, known):
    """E[eps | z_k, x] or E[eps | z_k], E[x | z_k], as functions of z (and x)."""
    signal, shift, noise = np.sqrt(made.abar[k]), made.shift[0, k], np.sqrt(1 - made.abar[k])
    mean = signal * Z + shift * X
    variance = signal ** 2 + shift ** 2 + 2 * signal * shift * COV + noise ** 2
    with_x = signal * COV + shift
    left = variance - with_x ** 2  # of z given x

    def eps_known(z, x):
        return noise / left * (z - mean - with_x * (x - X))

    def eps_unknown(z, x):
        return noise / variance * (z - mean)

    def predict(z):
        return X + with_x / variance * (z - mean)

    return (eps_known, None) if known else (eps_unknown, predict)


def number(value):
    return torch.tensor([value], dtype=torch.float64)


def last_moments(schedule, family, known, literal=False):
    """Algorithm 1 -> mean, variance of z0 beside x, covariance with x (or with the x that it predicts)."""
    _, _, made = chain(schedule, family)
    flat, slope, variance = 0.0, 0.0, 1.0  # z = flat + slope x + N(0, variance)
    if known:
        slope = made.shift[0, -1]
    covariance = None
    for i in reversed(range(1000)):
        eps, predict = expectations(made, i, known)
        ends = []
        for z, x in ((0, 0), (1, 0), (0, 1)):
            e = x if known else predict(z)
            end = mean_from_noise(made, number(z), number(eps(z, x)), [number(e)], torch.tensor([i]))
            ends.append(end.item())
        at, by_z, by_x = ends[0], ends[1] - ends[0], ends[2] - ends[0]
        if i == 0 and not known:
            covariance = by_z * (predict(1) - predict(0)) * variance
        fresh = made.variance[i] ** 2 if literal else made.variance[i]
        flat, slope, variance = at + by_z * flat, by_z * slope + by_x, by_z ** 2 * variance + fresh
    return flat + slope * X, variance, slope if known else covariance


@pytest.mark.parametrize("schedule", ("linear", "cosine"))
def test_unknown_x_comes_out_right(schedule, figure):
    mean, variance, covariance = last_moments(schedule, "vp_ramp", known=False)
    found = dict(mean=mean, variance=variance, covariance=covariance)
    figure(f"MT-Diffusion, Gaussian toy, x unknown, vp_ramp, {schedule}", found)
    assert mean == pytest.approx(0.5, abs=1e-3) and variance == pytest.approx(0.99, abs=0.01)
    assert covariance == pytest.approx(0.79, abs=0.01)
    printed = last_moments(schedule, "vp_ramp", known=False, literal=True)  # Algorithm 1 as printed
    assert printed[1] == pytest.approx(0.006, abs=0.004)


@pytest.mark.parametrize("schedule, residual", (("linear", 0.3552), ("cosine", 0.3575)))
@pytest.mark.parametrize("family", FAMILIES)
def test_known_x_comes_out_right_for_every_weight(schedule, residual, family, figure):
    mean, variance, covariance = last_moments(schedule, family, known=True)
    found = dict(mean=mean, residual_variance=variance, covariance=covariance)
    figure(f"MT-Diffusion, Gaussian toy, x known, {family}, {schedule}", found)
    assert mean == pytest.approx(0.5, abs=2e-3) and covariance == pytest.approx(0.8, abs=2e-3)
    assert variance == pytest.approx(residual, abs=2e-3)


class Exact(mt.MTDiffusion):
    """The Gaussians' own denoiser, each latent by itself; it undoes look, as a network would learn to."""

    def forward(self, z, k, x, seen):
        made, known = self.schedule, bool(seen[0])
        z = z + made.carried("shift", [x], k) if known else z / made.at("scale", k, z)
        eps, predict = expectations(made, int(k[0]), known)
        return eps(z, x), x if known else predict(z)


def exact(schedule, family):
    """An Exact of one channel and 2x2 latents, in float64."""
    model = mt.build(SMALL, "pair", ["seg", "rgb"], 12, 1, 2, agg=family)
    model.__class__, model.schedule = Exact, mt.MTSchedule.make(schedule, [family])
    return model.double()


def covariance_of(z, x):
    return torch.cov(torch.stack([z.flatten(), x.flatten()]))[0, 1].item()


@pytest.mark.parametrize("schedule", ("linear", "cosine"))
def test_the_sampler_draws_the_gaussians(schedule):
    """MTDiffusion.sample itself, 24,000 latents, against the moments above."""
    rng = np.random.default_rng(0)

    def noise(shape):
        return torch.from_numpy(rng.standard_normal((6000, *shape)))

    known = torch.ones(6000, dtype=torch.bool)
    z, x = exact(schedule, "vp_ramp").sample(noise, ~known, None, mt.Chain(steps=500))
    assert z.mean().item() == pytest.approx(0.5, abs=0.03) and z.var().item() == pytest.approx(0.99, abs=0.04)
    assert covariance_of(z, x) == pytest.approx(0.79, abs=0.04)
    if schedule == "cosine":
        return
    given = X + noise((1, 2, 2))
    for family in ("paper", "revert"):
        z, x = exact(schedule, family).sample(noise, known, given, mt.Chain(steps=300))
        assert torch.equal(x, given) and z.mean().item() == pytest.approx(0.5, abs=0.03)
        assert (z - 0.8 * x).var().item() == pytest.approx(0.357, abs=0.02)
        assert covariance_of(z, x) == pytest.approx(0.8, abs=0.04)
    standard = mt.Chain(steps=250, start="standard")
    wrong, _ = exact(schedule, "paper").sample(noise, known, given, standard)  # the finding on w
    assert abs(wrong.mean().item() - 0.5) > 0.5 or wrong.var().item() > 2


# ------------------------------------------------------------------------------------------------
# The network and its objective.

def tiny(pair, **options):
    """T/2 with every trained parameter drawn from N(0, 0.04^2)."""
    torch.manual_seed(0)
    names = ["rgb", "rgb"] if "masked" in pair else ["rgb"]
    if pair == "pair":
        names = ["seg", "rgb"]
    model = mt.build(SMALL, pair, names, 12, 4, 16, features=8, **options)
    drawn(model)
    return model


def drawn(model):
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.04)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A cache of 16 toy scenes with feature vectors."""
    out = tmp_path_factory.mktemp("mt") / "cache"
    start("prep_latents", "--toy", 16, "--out", out, "--batch-size", 8, "--no-dino",
          "--feature", "toy-teacher")
    return out


def test_masks():
    """So many squares, clipped at the border."""
    corners = torch.tensor([[[0, 0], [60, 62], [1, 1]]] * 2)
    mask = mt.visible(corners, torch.tensor([2, 0]), (64, 64), 16)
    assert (mask == 0).sum() == 16 * 16 + 4 * 2
    assert (mask[0, 0, 60:, 62:] == 0).all() and (mask[1] == 1).all()


def objective(data, *flags):
    """The Objective of the training command's flags on a cache."""
    parser = command_parser("")
    train.add_flags(parser)
    mt_diffusion.Objective.add_flags(parser)
    args = parser.parse_args(["--data", str(data), "--model", SMALL, *map(str, flags)])
    return mt_diffusion.Objective(args, Cache(data), torch.device("cpu"))


def test_the_rows_of_a_masked_batch(data):
    """X is the image where it shows; a tenth of the rows sees none of it, in a tenth all is hidden."""
    made = objective(data, "--pair", "masked", "--batch-size", 400)
    batch = {"rgb": torch.zeros(400, 2, 4, 16, 16), "known": torch.ones(400, 1)}
    batch["rgb"][:, 0], batch["rgb"][:, 1] = 1.0, -20.0  # mean 1, no spread
    rows, counts = made.prepare(3, batch, slice(0, 400))
    shown = (rows["x"] != 0).float().mean((1, 2, 3))
    assert torch.equal(rows["x"][shown == 1], rows["z0"][shown == 1])
    assert set(rows["x"].unique().tolist()) <= {0.0, rows["z0"].max().item()}
    assert (shown == 0).float().mean().item() == pytest.approx(0.1, abs=0.05)
    assert (shown == 1).float().mean().item() == pytest.approx(0.9 / 11, abs=0.04)  # of 0 to 10 squares
    assert rows["seen"].float().mean().item() == pytest.approx(0.9, abs=0.05)
    assert not rows["alone"].any() and counts.tolist() == [400, 400, 400]
    part = slice(8, 16)
    one, _ = made.prepare(3, {**batch, "rgb": batch["rgb"][part]}, part)  # a process's part of the same draws
    assert all(torch.equal(one[name], rows[name][8:16]) for name in rows)


def test_vectors_are_taken_whole_and_have_no_cells(data):
    made = objective(data, "--pair", "feature")
    drawn(made.model)
    checkpoint = {"ema": made.model.state_dict(), "step": 5,
                  "config": {"model": made.model.config, "meta": made.meta, "train": {"method": made.method}}}
    _, taken = objective(data, "--pair", "feature").initialise(checkpoint, "a.pt")
    assert taken["backbone.y_embedder.weight"] == "y_embedder.weight" and taken["head.0.weight"]
    predicted, x = torch.randn(2, 4, 8)
    assert torch.equal(made.model.x_error(predicted, x, torch.zeros(4, 8, 8)),
                       made.model.x_error(predicted, x, None))


def test_init_moves_the_head_of_labels_by_their_names(data):
    made = objective(data, "--pair", "label")
    drawn(made.model)
    names = made.meta["class_names"]
    meta = {**made.meta, "class_names": names[::-1]}
    checkpoint = {"ema": made.model.state_dict(), "step": 5,
                  "config": {"model": made.model.config, "meta": meta, "train": {"method": made.method}}}
    other = objective(data, "--pair", "label")
    table, _ = other.initialise(checkpoint, "a.pt")
    assert torch.equal(other.model.head.weight, made.model.head.weight.flip(0))
    assert "of X: head.bias, head.weight" in table
    meta["class_names"] = ["else", *names[1:]]
    table, _ = objective(data, "--pair", "label").initialise(checkpoint, "a.pt")
    assert "of X, new: head.bias, head.weight" in table


def test_a_masked_image_enters_as_a_new_modality(data, tmp_path):
    """Of MMGen's weights its columns start at zero."""
    made = objective(data, "--pair", "masked", "--model", "T/2", "--init", DEMO / "mmgen.pt")
    made.initialise(load_checkpoint(DEMO / "mmgen.pt"), "demo")
    image, x = made.backbone.x_embedder.proj.weight.chunk(2, 1)
    assert image.any() and not x.any()


def test_rows_without_a_term_have_no_loss_of_it(data):
    """Plain DDPM has none of X; a row without its target none of the noise."""
    made = objective(data, "--pair", "label", "--batch-size", 8, "--agg", "none", "--single", 0.5)
    batch = {**Cache(data).gather(np.arange(8), made.reads), "known": torch.ones(8, 1)}
    rows, _ = made.prepare(0, batch, slice(0, 8))
    rows["here"][2] = False
    eps, x = torch.randn(8, 4, 16, 16, requires_grad=True), torch.randn(8, 12, requires_grad=True)
    made.loss(lambda *_: (eps, x), rows).sum().backward()
    assert torch.equal(x.grad.any(1), ~rows["alone"]) and 0 < rows["alone"].sum() < 8
    assert torch.equal(eps.grad.flatten(1).any(1), rows["here"])


@pytest.mark.parametrize("flags", (("label",), ("label", "--head", "output"), ("feature",), ("rgb", "seg")))
def test_every_parameter_learns_in_bf16(data, flags):
    made = objective(data, "--pair", *flags, "--batch-size", 4, "--agg", "revert")
    drawn(made.model)
    batch = Cache(data).gather(np.arange(4), made.reads)
    batch["known"] = torch.ones(4, len(made.modalities))
    rows, counts = made.prepare(0, batch, slice(0, 4))
    train.total_loss(made.loss(made.model, rows), counts, made.weights).backward()
    trained = {name: p for name, p in made.model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.mark.parametrize("pair", ("pair", "masked", "label", "feature"))
def test_encoders_take_no_gradient_heads_and_backbone_do(pair):
    model = tiny(pair, agg="revert")
    z0, k = torch.randn(4, 4, 16, 16), torch.tensor([3, 200, 600, 999])
    x = {"label": torch.arange(4), "feature": torch.randn(4, 8)}.get(pair, torch.randn(4, 4, 16, 16))
    x.requires_grad_(x.is_floating_point())
    e = model.encode(x)
    assert e.shape == z0.shape
    assert model.images or (not e.requires_grad and e.abs().max() > 0.01)
    z = model.schedule.q_sample(z0, [e.detach()], k, torch.randn_like(z0))
    eps, predicted = model(z, k, x, torch.tensor([True, False, True, False]))
    (eps.square().sum() + predicted.square().sum()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert model.backbone.blocks[0].attn.qkv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("pair", ("pair", "masked"))
def test_a_hidden_x_is_not_seen_and_a_full_mask_is_ddpm(pair):
    model = tiny(pair)
    z0, noise, k = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16), torch.tensor([100, 700])
    blank, plain = torch.zeros_like(z0), mt.MTSchedule.make(model.setting.schedule, ["none"])
    with_mask = model.schedule.q_sample(z0, [model.encode(blank)], k, noise)
    assert torch.equal(with_mask, plain.q_sample(z0, [noise], k, noise))
    assert not torch.equal(with_mask, model.schedule.q_sample(z0, [noise], k, noise))

    def eps(x, seen):
        return model(z0, k, x, torch.full((2,), seen))[0]

    assert torch.equal(eps(torch.randn_like(z0), False), eps(torch.randn_like(z0), False))
    assert not torch.equal(eps(z0, True), eps(blank, True))


def test_recognition_is_of_latents_noised_to_step_50(monkeypatch):
    """Sec. 4.3: nothing of X is carried, the head of the label has the word."""
    model, seen = tiny("label"), []
    monkeypatch.setattr(model, "forward", lambda *given: seen.append(given) or (None, torch.eye(12)[:2]))
    z0, noise = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    assert torch.equal(model.recognise(z0, lambda shape: noise), torch.eye(12)[:2])
    [(z, k, x, known)] = seen
    level, schedule = torch.tensor([50, 50]), model.schedule
    noised = schedule.q_sample(z0, [torch.zeros_like(z0)], level, noise)
    assert torch.equal(z, schedule.at("scale", level, z0) * noised)
    assert k.tolist() == [50, 50] and not known.any()


# ------------------------------------------------------------------------------------------------
# The commands.

@torch.no_grad()
def test_guidance_leads_towards_what_is_known():
    """Away from the network that does not see it, and up the head's log p; of the known rows alone."""
    model = tiny("label")
    x, known, z = torch.tensor([3, 3]), torch.tensor([True, False]), torch.randn(2, 4, 16, 16)

    def walk(**options):
        return mt.Walk(model, None, known, mt.Chain(steps=10, **options))

    def chance(z):
        return plain.network(z, plain.carries, x, 5, plain.nobody)[1].log_softmax(1)[0, 3]

    plain = walk()
    eps, free = (plain.network(z, plain.carries, x, 5, seen)[0] for seen in (known, plain.nobody))
    led, _ = walk(cfg=3.0).guided(z, plain.carries, x, 5)
    assert torch.allclose(led[0], (free + 3 * (eps - free))[0], atol=1e-5) and torch.equal(led[1], eps[1])
    step = eps - walk(classifier_scale=1.0).guided(z, plain.carries, x, 5)[0]
    assert chance(z + step / step.norm()) > chance(z) and not step[1].any()
    assert walk(x_update="argmax").rule == "argmax"


def test_a_walk_begins_at_its_share_and_is_bounded():
    noise, known = Noise(0, [0], torch.device("cpu")), torch.ones(1, dtype=torch.bool)
    model, z, looks = tiny("masked"), torch.zeros(1, 4, 16, 16), []
    model.register_forward_hook(lambda *_: looks.append(1))
    model.sample(noise, known, z, mt.Chain(steps=8), (z, 0.5))
    assert len(looks) == 4
    drawn, _ = tiny("masked", bound=1e-3).sample(noise, known, z, mt.Chain(steps=3, start="standard"))
    assert drawn.abs().max() < 0.1


def test_what_is_hidden_is_not_shown_to_the_network(monkeypatch):
    model, seen, cpu = tiny("masked"), [], torch.device("cpu")
    monkeypatch.setattr(model, "sample", lambda noise, known, x, *_: seen.append(x) or (x, None))
    draw = mt_sample.Restoration(model, load_encoder("toy", cpu), mt.Chain(steps=1), 0, (), None)
    photo = np.random.default_rng(0).uniform(-1, 1, (3, 64, 64)).astype(np.float32)
    mask = np.arange(64)[:, None].repeat(64, 1) < 32
    hidden = mt_sample.Hidden({"rgb": photo}, photo, mask, mask)
    list(draw.sample([Request(0, "a", 0, {})], [hidden], Noise(0, [0], cpu)))
    assert not seen[0][:, :, :8].any() and seen[0][:, :, 8:].all()


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """trained("masked") trains 2 steps of a setting, once, and draws a preview -> run folder."""
    root = tmp_path_factory.mktemp("runs")

    def go(*pair, head="middle"):
        run = root / "-".join(pair)
        if not run.exists():
            start("mt_diffusion", "--pair", *pair, "--data", data, "--run", run, "--model", SMALL,
                  "--steps", 2, "--batch-size", 8, "--log-every", 1, "--preview-every", 2, "--head", head)
            assert (run / "previews/0000002.png").stat().st_size > 5000
        return run
    return go


def pixels(path):
    """A picture's values, signed."""
    return np.asarray(Image.open(path)).astype(int)


def test_restoration_keeps_every_other_pixel(trained, command, tmp_path):
    run, photo_file, mask_file = trained("masked"), tmp_path / "photo.png", tmp_path / "mask.png"
    photo = np.random.default_rng(0).integers(0, 256, (50, 90, 3)).astype(np.uint8)
    mask = np.zeros((50, 90), np.uint8)
    mask[10:30, 40:70] = 255
    Image.fromarray(photo).save(photo_file)
    Image.fromarray(mask).save(mask_file)
    flags = ("--task", "restore", "--image", photo_file, "--ckpt", run)
    masked = (*flags, "--mask", mask_file, "--steps", 3)
    for fit in ("full", "crop"):
        command("mt_sample", *masked, "--fit", fit, "--out", tmp_path / fit)
    out, shown = (pixels(tmp_path / "full" / m / "photo.png") for m in ("rgb", "masked_rgb"))
    assert (out[mask == 0] == photo[mask == 0]).all() and (shown[mask == 0] == photo[mask == 0]).all()
    assert (out[mask > 0] != photo[mask > 0]).mean() > 0.9
    kept = pixels(tmp_path / "crop" / "rgb" / "photo.png")
    assert kept.shape == (64, 64, 3)
    command("mt_sample", *masked, "--fit", "crop", "--whole-image", "--out", tmp_path / "whole")
    whole, left = (pixels(tmp_path / "whole" / m / "photo.png") for m in ("rgb", "masked_rgb"))
    hidden = (left == 128).all(-1)
    assert (whole == kept)[hidden].all() and (whole != kept)[~hidden].mean() > 0.5
    command("mt_sample", *flags, "--patches", 4, "--sdedit", 0.5, "--steps", 4, "--out", tmp_path / "sdedit")
    drawn, left = (pixels(tmp_path / "sdedit" / m / "photo.png") for m in ("rgb", "masked_rgb"))
    hidden = (left == 128).all(-1)
    assert 16 * 4 < hidden.sum() <= 4 * 256
    assert (drawn != left)[~hidden].mean() > 0.9  # the baseline keeps no pixel

    again = (*masked, "--fit", "full", "--out", tmp_path / "full")
    assert "1 of 1 samples are there" in command("mt_sample", *again)
    Image.fromarray(255 - mask).save(mask_file)
    assert "are there" not in command("mt_sample", *again)  # a changed mask is another task
    assert (pixels(tmp_path / "full/rgb/photo.png")[mask > 0] == photo[mask > 0]).all()
    Image.fromarray(mask // 255).save(mask_file)
    with pytest.raises(InputError, match="hides nothing"):
        command("mt_sample", *again)
    Image.fromarray(mask[:40]).save(mask_file)
    with pytest.raises(InputError, match="must be of one size"):
        command("mt_sample", *masked, "--out", tmp_path / "x")


def test_what_is_hidden_reaches_no_pixel_around_the_mask(tmp_path):
    """A resize by 300 / 64 looks beyond the pixel that it writes."""
    mask = np.zeros((300, 300), np.uint8)
    mask[100:200, 100:200] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    looks = []
    for value in (0, 255):
        photo = np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8)
        photo[mask > 0] = value
        Image.fromarray(photo).save(tmp_path / "photo.png")
        files = {"rgb": tmp_path / "photo.png", "mask": tmp_path / "mask.png"}
        request = types.SimpleNamespace(files=files, index=0)
        looks.append(mt_sample.read_hidden(request, lambda x, nearest=False: centre_crop(x, 64, nearest),
                                           False, None, 0))
    a, b = looks
    assert 20 ** 2 < a.mask.sum() < 25 ** 2 and np.array_equal(a.pixels["rgb"], b.pixels["rgb"])
    assert np.array_equal(a.whole, b.whole)


def test_a_mask_is_of_one_photo(tmp_path):
    def masked(*names):
        requests = [types.SimpleNamespace(files={"rgb": tmp_path / "p" / name}) for name in names]
        for request in requests:
            request._replace = lambda files: types.SimpleNamespace(files=files)
        found = mt_sample.with_masks(requests, tmp_path / "m", tmp_path / "p")
        return [request.files["mask"].name for request in found]

    (tmp_path / "m").mkdir()
    (tmp_path / "p").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "m/1.png")
    assert masked("cat/1.png") == ["1.png"]
    with pytest.raises(InputError, match="no mask cat_1"):
        masked("cat/1.png", "dog/1.png")
    Image.new("L", (4, 4)).save(tmp_path / "m/cat_1.png")
    assert masked("cat/1.png") == ["cat_1.png"]
    (tmp_path / "m/cat").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "m/cat/1.png")
    with pytest.raises(InputError, match="one name with _"):
        masked("cat/1.png")


def test_labels_and_vectors(trained, command, tmp_path):
    run = trained("label", head="output")
    names = load_checkpoint(run)["config"]["meta"]["class_names"]

    command("toy_scenes", "--num", 4, "--out", tmp_path / "scenes")
    classify = ("--task", "classify", "--image", tmp_path / "scenes", "--ckpt", run, "--out", tmp_path / "c")
    text = command("mt_sample", *classify)
    files = sorted((tmp_path / "c/classes").iterdir())
    best = [[i for _, i, _ in json.loads(path.read_text())] for path in files]
    truth = [names.index(" ".join(path.stem.split("_")[:2])) for path in files]
    top1 = np.mean([label == found[0] for label, found in zip(truth, best)])
    top5 = np.mean([label in found for label, found in zip(truth, best)])
    scores = json.loads((tmp_path / "c/meta.json").read_text())["scores"]
    assert "of 4 pictures" in text and scores == dict(top1=top1, top5=top5, labelled=4)
    assert "4 of 4 samples are there" in command("mt_sample", *classify)

    generate = ("--task", "generate", "--steps", 3)
    for size in (1, 2):  # 12 is nobody's class: it is drawn
        command("mt_sample", *generate, "--class-id", 12, 3, "--cfg", 2, "--classifier-scale", 1,
                "--batch-size", size, "--ckpt", run, "--out", tmp_path / f"g{size}")
    for label in (13, -1):
        with pytest.raises(InputError, match=f"--class-id {label}: this checkpoint has classes 0 to 11"):
            command("mt_sample", *generate, "--class-id", label, "--ckpt", run, "--out", tmp_path / "g0")
    told = json.loads((tmp_path / "g1/classes/000001.json").read_text())
    assert told == [[names[3], 3, 1.0]]
    a, b = (pixels(tmp_path / name / "rgb/000001.png") for name in ("g1", "g2"))
    assert np.abs(a - b).max() <= 1

    run = trained("feature")
    vectors = np.random.default_rng(0).choice((-1, 1), (2, 768)).astype(np.float32)
    np.save(tmp_path / "f.npy", vectors)
    command("mt_sample", *generate, "--num", 3, "--features", tmp_path / "f.npy", "--ckpt", run,
            "--out", tmp_path / "v")
    assert all((np.load(tmp_path / f"v/feature/00000{i}.npy") == vectors[i % 2]).all() for i in range(3))
    with pytest.raises(InputError, match="needs a checkpoint of --pair label, this one is of feature"):
        command("mt_sample", "--task", "classify", "--image", SCENES, "--ckpt", run, "--out", tmp_path / "c")


def test_translation_does_not_depend_on_batch_or_processes(trained, command, tmp_path):
    run = trained("rgb", "seg")
    flags = ("--task", "translate", "--image", SCENES, "--ckpt", run)
    for size in (1, 4):
        command("mt_sample", *flags, "--steps", 3, "--batch-size", size, "--out", tmp_path / str(size))
    result = shell("mt_sample.py", *flags, "--steps", 3, "--out", tmp_path / "2", processes=2)
    assert result.returncode == 0, result.stderr
    a, *others = ([pixels(path) for path in sorted((tmp_path / s / "seg").glob("*.png"))] for s in "142")
    assert len(a) == 4 and all(np.abs(np.stack(a) - np.stack(b)).max() <= 1 for b in others)
    command("mt_sample", *flags, "--outputs", "seg", "--steps", 2, "--out", tmp_path / "alone")
    assert not (tmp_path / "alone/rgb").exists() and len(list((tmp_path / "alone/seg").iterdir())) == 4
    generate = ("--task", "generate", "--num", 2, "--ckpt", run, "--steps", 3)
    command("mt_sample", *generate, "--out", tmp_path / "joint")
    assert len(list((tmp_path / "joint").glob("*/00000?.png"))) == 4


@pytest.mark.parametrize("pair, shares, flags, known, said", [
    ("label", {"single": 0}, {"task": "generate"}, True, "never shown X"),
    ("label", {"single": 0.3, "x_weight": 0}, {"task": "generate"}, False, "its head of X has learned"),
    ("feature", {"single": 1}, {"task": "generate"}, False, "never drew an image without X"),
    ("pair", {"hidden": 0}, {"task": "generate"}, False, "never drew an image without X"),
    ("pair", {"hidden": 1}, {"task": "translate"}, True, "never shown X"),
    ("masked", {"full_mask": 1, "hidden": 0}, {"task": "restore"}, True, "masks over everything alone"),
    ("masked", {"full_mask": 0, "hidden": 0.1}, {"task": "generate"}, True, "no mask over everything"),
    ("pair", {"hidden": 0.2}, {"task": "generate", "cfg": 4}, False, "--cfg and --classifier-scale have no"),
    ("masked-u", {"hidden": 1, "x_weight": 0, "agg": "none"}, {"task": "generate"}, False, ""),
    ("masked-u", {"hidden": 1, "x_weight": 0, "agg": "revert"}, {"task": "generate"}, False, "its head of X"),
    ("label", {"single": 1}, {"task": "generate", "cfg": 2}, True, "never saw an image without X"),
    ("label", {"single": 0.3, "x_weight": 0}, {"task": "generate", "classifier_scale": 1}, True,
     "its head of X"),
    ("pair", {"hidden": 0.2, "eps_weight": 0}, {"task": "evaluate"}, True, "its head of the noise"),
    ("label", {"single": 0.3}, {"task": "generate", "cfg": 4}, True, ""),
    ("pair", {"hidden": 0.2}, {"task": "translate"}, True, ""),
])
def test_what_a_run_has_not_learned_is_said(pair, shares, flags, known, said, capsys):
    """App. E's shares decide what a run has ever been asked for."""
    args = types.SimpleNamespace(**{"cfg": 1.0, "classifier_scale": 0.0, **flags})
    loaded = types.SimpleNamespace(model=types.SimpleNamespace(pair=pair), path="r.pt", train=shares)
    mt_sample.tell_unlearned(args, loaded, known)
    out = capsys.readouterr().out
    assert said in out and bool(said) == bool(out)


def test_whether_x_is_known_of_what_is_drawn():
    def known(task="generate", features=None, pair="label", label=12):
        args, model = types.SimpleNamespace(task=task, features=features), types.SimpleNamespace(
            pair=pair, num_classes=12)
        return mt_sample.told(args, model, [types.SimpleNamespace(label=label)])

    assert known(task="restore") and known(features="f.npy") and known(pair="masked") and known(label=3)
    assert not known() and not known(pair="pair") and not known(pair="masked-u")


def test_classes_of_a_head_that_was_not_trained_are_refused():
    args = types.SimpleNamespace(task="classify", features=None, class_id=None, classes="random")
    for shares in ({"x_weight": 0, "single": 0.3}, {"x_weight": 0.1, "single": 1}):
        loaded = types.SimpleNamespace(model=types.SimpleNamespace(pair="label"), path="r.pt", train=shares)
        with pytest.raises(InputError, match="its head has learned nothing"):
            mt_sample.check_task(args, loaded)


def test_the_scores_are_of_all_pictures_of_the_folder(tmp_path, capsys):
    """Those of an earlier command, too."""
    (tmp_path / "classes").mkdir()
    samples = []
    for stem, label, found in (("a", 1, [1, 2]), ("b", 2, [1, 2]), ("c", 12, [1]), ("d", 0, [3])):
        best = [[str(i), i, 0.5] for i in found]
        (tmp_path / f"classes/{stem}.json").write_text(json.dumps(best))
        samples.append(dict(stem=stem, class_id=label, given={"rgb": f"{stem}.png"}))
    (tmp_path / "meta.json").write_text(json.dumps({"samples": samples, "complete": True}))
    request = types.SimpleNamespace(stem="a")
    assert mt_sample.report_classes(tmp_path, [request], 12) == dict(top1=1 / 3, top5=2 / 3, labelled=3)
    assert capsys.readouterr().out.startswith("a: 1 0.500, 2 0.500")


def test_what_a_checkpoint_does_not_know_is_refused(trained, command, unknown, tmp_path):
    run = trained("rgb", "seg")
    flags = ("--task", "generate", "--ckpt", run, "--out", tmp_path / "x")
    for more, message in (
            (("--classifier-scale", 1), "--pair label"), (("--x-update", "argmax"), "follows by mean"),
            (("--steps", 1001), "has 1000"), (("--cfg", "nan"), "finite"),
            (("--class-id", 3), "knows nothing of classes"), (("--image", SCENES), "takes no --image"),
            (("--features", "f.npy"), "for a checkpoint of --pair feature"),
            (("--task", "restore", "--patches", 2, "--image", SCENES), "needs a checkpoint of --pair masked"),
            (("--classes", "balanced"), "knows nothing of classes"),
            (("--fit", "full"), "--task generate does not read it; it is of translate, restore"),
            (("--task", "classify", "--cfg", 2, "--image", SCENES), "--task classify does not read it"),
            (("--task", "restore", "--image", SCENES), "one of --mask and --patches")):
        with pytest.raises(InputError, match=message):
            command("mt_sample", *flags, *more)
    for more in (("--cfg-interval", 0, 0.5), ("--sampler", "euler"), ("--task", "condition"),
                 ("--given", "seg")):  # MMGen's
        assert unknown("mt_sample", *flags, *more)
    assert not (tmp_path / "x").exists()


def test_the_other_methods_checkpoint_is_refused(data, trained, command, tmp_path):
    """Each command says which one the file is for, and neither continues the other's run."""
    run, out = trained("rgb", "seg"), ("--out", tmp_path / "x")
    with pytest.raises(InputError, match="is a checkpoint of mt-diffusion; use mt_sample.py"):
        command("sample", "--task", "understand", "--ckpt", run, *out)
    with pytest.raises(InputError, match="mmgen.pt: is a checkpoint of mmgen; use sample.py"):
        command("mt_sample", "--task", "generate", "--ckpt", DEMO / "mmgen.pt", *out)
    flags = ("--data", data, "--model", SMALL, "--steps", 1, "--batch-size", 4)
    with pytest.raises(InputError, match="trained with method = mt-diffusion, this command has mmgen"):
        command("train", *flags, "--run", run)
    command("train", *flags, "--modalities", "rgb", "--run", tmp_path / "mmgen")
    with pytest.raises(InputError, match="trained with method = mmgen, this command has mt-diffusion"):
        command("mt_diffusion", *flags, "--pair", "label", "--run", tmp_path / "mmgen")
    assert not (tmp_path / "x").exists()


def test_presets(data, trained, command, unknown, tmp_path, monkeypatch):
    """A name's flags, then one's own; checkpoints keep them one by one; the sampler takes all steps."""
    flags = ("--data", data, "--model", SMALL, "--log-every", 1, "--preview-every", 9, "--steps", 3)
    run = tmp_path / "run"
    command("mt_diffusion", "--lr", 1e-3, "--preset", "label", "--batch-size", 8, "--patch-size", 2, *flags,
            "--run", run)
    kept = load_checkpoint(run)["config"]["train"]
    assert (kept["pair"], kept["lr"], kept["batch_size"], kept["steps"]) == (["label"], 1e-3, 8, 3)
    again = command("mt_diffusion", "--pair", "label", "--batch-size", 8, *flags, "--run", run)
    assert "steps 3 to 3" in again  # without the name: the flags are what counts
    with pytest.raises(InputError, match="batch_size = 8, this command has 75"):
        command("mt_diffusion", "--preset", "label", "--patch-size", 2, *flags, "--run", run)
    assert unknown("mt_diffusion", "--preset", "labels", *flags)
    assert unknown("mt_sample", "--preset", "label", "--task", "generate", "--ckpt", run)
    for own, steps in (((), 1000), (("--steps", "7"), 7)):
        monkeypatch.setattr("sys.argv", ["mt_sample.py", *own, "--task", "generate", "--preset", "paper"])
        assert mt_sample.arguments().steps == steps


def test_resume(data, command, tmp_path):
    """2 steps = 1 + 1; another command is refused."""
    flags = ("--pair", "label", "--data", data, "--model", SMALL, "--batch-size", 8, "--micro-batch", 4,
             "--precision", "fp32", "--ckpt-every", 1)
    for folder, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
        command("mt_diffusion", *flags, "--steps", steps, "--run", tmp_path / folder)
    assert gap(tmp_path / "whole", tmp_path / "parts") == 0
    with pytest.raises(InputError, match="agg = vp_ramp, this command has revert"):
        command("mt_diffusion", *flags, "--steps", 2, "--run", tmp_path / "parts", "--agg", "revert")
    with pytest.raises(InputError, match="x_weight = 0.1, this command has 0.5"):
        command("mt_diffusion", *flags, "--steps", 2, "--run", tmp_path / "parts", "--x-weight", 0.5)


def test_two_processes_train_as_one(data, command, tmp_path):
    """In fp32 and micro-batches."""
    flags = ("--pair", "label", "--data", data, "--model", SMALL, "--batch-size", 8, "--micro-batch", 4,
             "--precision", "fp32", "--steps", 2)
    command("mt_diffusion", *flags, "--run", tmp_path / "one")
    result = shell("mt_diffusion.py", *flags, "--run", tmp_path / "two", processes=2)
    assert result.returncode == 0, result.stderr
    assert gap(tmp_path / "one", tmp_path / "two") < 1e-6


class Gated(mt.MTDiffusion):
    def __init__(self, *args, gated=False, **options):
        super().__init__(*args, **options)


def test_older_runs_go_on_with_the_defaults_of_what_is_new(data, trained, command, tmp_path, monkeypatch):
    """A flag is one line in Objective.add_flags, an option a keyword of the network; --lr may change."""
    run, original = tmp_path / "run", mt_diffusion.Objective.add_flags
    shutil.copytree(trained("rgb", "seg"), run, symlinks=True)
    flags = ("--pair", "rgb", "seg", "--data", data, "--run", run, "--model", SMALL, "--batch-size", 8,
             "--preview-every", 9, "--steps", 3)

    def longer(parser):
        original(parser)
        parser.add_argument("--ramp", type=float, default=0.5)

    assert mt.OPTIONS == {"agg": "vp_ramp", "head": "middle", "features": None, "bound": 8.0,
                          "patch_size": 2, "fusion": "linear", "blocks": "sit"}
    monkeypatch.setattr(mt_diffusion.Objective, "add_flags", staticmethod(longer))
    monkeypatch.setattr(mt, "MTDiffusion", Gated)
    monkeypatch.setitem(mt.OPTIONS, "gated", False)
    with pytest.raises(InputError, match="ramp = 0.5, this command has 1.0"):
        command("mt_diffusion", *flags, "--ramp", 1)
    out = command("mt_diffusion", *flags, "--lr", 1e-12)
    assert "lr 1e-12" in out and "steps 2 to 3" in out
    assert gap(run, trained("rgb", "seg"), ["model"]) < 1e-9
    config = load_checkpoint(run)["config"]
    assert config["train"]["ramp"] == 0.5 and config["model"]["gated"] is False
    monkeypatch.setattr(mt_diffusion, "build", functools.partial(mt.build, gated=True))
    with pytest.raises(InputError, match="gated = False, this command has True"):
        command("mt_diffusion", *flags)


def test_init_goes_by_role(data, trained, command, tmp_path):
    """Noise to noise and X to X between settings; between methods without heads; the table says the rest."""
    plain = ("--data", data, "--model", SMALL, "--steps", 1, "--batch-size", 8)
    flags = (*plain, "--lr", 1e-12)
    first = trained("rgb", "seg")
    theirs = load_checkpoint(first)["ema"]
    for name, pair in (("turned", ("seg", "rgb")), ("masked", ("masked",)), ("label", ("label",))):
        table = command("mt_diffusion", *flags, "--pair", *pair, "--x-weight", 0, "--agg", "none",
                        "--init", first, "--run", tmp_path / name)
        mine = load_checkpoint(tmp_path / name)["ema"]
        places = 1 if name == "label" else 2
        for i in range(places):
            bias = f"backbone.heads.{i}.adaLN_modulation.1.bias"
            assert (mine[bias] - theirs[bias]).abs().max() < 1e-6, (name, i)
        a, b = (ema["backbone.x_embedder.proj.weight"] for ema in (mine, theirs))
        assert (a - b[:, :a.shape[1]]).abs().max() < 1e-6, name
        assert ("left out    0" in table) == (name != "label")
    table = command("mt_diffusion", *flags, "--pair", "rgb", "seg", "--init", DEMO / "mmgen.pt",
                    "--model", "T/2", "--run", tmp_path / "from-mmgen")
    before, after = table.split("left out")
    assert "inflated" in table and "heads.0, heads.1" in before and "heads.3" in after
    back = command("train", *plain, "--repa-weight", 0, "--init", first, "--run", tmp_path / "back")
    assert "heads.1" in back.split("left out")[1]
    command("mt_diffusion", *flags, "--pair", "feature", "--init", tmp_path / "label",
            "--run", tmp_path / "feature")


@pytest.mark.parametrize("flags, message", (
    (("rgb", "canny"), "two modalities of the cache"),
    (("rgb", "rgb"), "two modalities"),
    (("nonsense",), "two modalities"),
    (("label", "--single", "1.5"), "must lie in"),
    (("feature",), "has no feature vectors"),
    (("label", "--eps-weight", "0", "--x-weight", "0"), "nothing would be trained"),
    (("masked", "--head", "output"), "belongs to --pair label"),
    (("masked", "--single", "0.5"), "--single: of --pair label and feature"),
    (("label", "--patch-size", "3"), "must tile latents of 16x16"),
    (("label", "--full-mask", "1"), "--full-mask: of --pair masked"),
    (("masked", "--full-mask", "2"), "must lie in"),
    (("label", "--eps-weight", "0"), "add --agg none"),
    (("label", "--eps-weight", "0", "--agg", "none", "--single", "1"), "nothing would be trained"),
))
def test_bad_flags(cache, command, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        command("mt_diffusion", "--pair", *flags, "--data", cache, "--model", SMALL, "--steps", 1,
                "--batch-size", 8, "--run", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_mmgens_flags_are_unknown(cache, tmp_path, unknown):
    flags = ("--data", cache, "--model", "T/2", "--steps", 1, "--batch-size", 8, "--run", tmp_path / "r")
    assert unknown("mt_diffusion", "--pair", "label", *flags, "--mix", "rgb2x")
    assert unknown("train", *flags, "--pair", "label")
