"""Samplers against a Gaussian's exact flow, guidance and conditions, noise, decoding."""
import math

import numpy as np
import pytest
import torch

import samplers
from distributed import InputError
from modalities import MODALITIES
from model import build_model
from samplers import SAMPLERS, Noise, Sampling, decode, sample_latents
from small import SMALL
from vae import load_encoder
from weights import DEMO, load_model

STD, MEAN = 0.8, 0.3
CPU = torch.device("cpu")


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
    sampler, grid = SAMPLERS[name]
    error = []
    for steps in (256, 512):
        found = sampler(gaussian_velocity, x, grid(steps), None)
        error.append((found - exact_flow(x)).abs().max().item())
    measured = math.log2(error[0] / error[1])
    if name == "ab4":
        assert measured >= order, (measured, error)
    else:
        assert abs(measured - order) < 0.1, (measured, error)


@pytest.mark.parametrize("name, evaluations",
                         [("euler", 10), ("heun", 20), ("ab2", 13), ("ab4", 19), ("sde", 10)])
def test_evaluations_are_counted(name, evaluations):
    calls, sampling = [], Sampling(name, 10)

    def velocity(x, t):
        calls.append(t)
        return x * 0

    sampling.run(velocity, torch.zeros(3), lambda: torch.zeros(3))
    assert len(calls) == evaluations == sampling.evaluations() and all(0 <= t <= 1 for t in calls)
    times = SAMPLERS[name][1](10)
    assert len(times) == 11 and times[0] == 0 and times[-1] == 1


def test_sde_follows_its_recursion_and_reaches_the_data():
    """x' = a x + b + c n with the coefficients of one step: mean and variance against samples, the data."""
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

    def normal():
        return torch.randn(n, generator=g, dtype=torch.float64)

    x = Sampling("sde", steps).run(gaussian_velocity, normal(), normal)
    assert abs(x.mean().item() - mean) < 3 * (variance / n) ** 0.5
    assert abs(x.var().item() - variance) < 3 * variance * (2 / n) ** 0.5
    assert abs(variance / STD ** 2 - 1) < 0.02 and abs(mean - MEAN) < 0.01


def test_noise_is_each_samples_own():
    whole, part = Noise(7, range(5), CPU), Noise(7, [3, 1], CPU)
    for shape in ((4, 3), (2,)):  # whatever was drawn before
        a, b = whole(shape), part(shape)
        assert a.shape == (5, *shape) and torch.equal(a[[3, 1]], b)
    assert not torch.equal(Noise(8, [3], CPU)((4, 3)), Noise(7, [3], CPU)((4, 3)))


def test_guidance_acts_on_all_channels_inside_its_interval():
    model, calls = load_model(DEMO / "mmgen.pt").model, []
    original, y = model.forward, torch.tensor([1, 2])

    def watched(x, t, y, given):
        calls.append((len(x), round(1 - t[0, -1].item(), 3)))
        return original(x, t, y, given)

    def draw(y, steps, **options):
        return sample_latents(model, y, {}, Noise(0, [0, 1], CPU), Sampling("euler", steps, **options))

    model.forward = watched
    plain, guided = draw(y, 4), draw(y, 4, cfg=2.0)
    assert ((plain - guided).abs().amax((0, 2, 3)) > 1e-3).all()
    calls.clear()
    draw(y, 4, cfg=2.0, cfg_interval=(0.4, 0.8))
    assert calls == [(2, 1.0), (4, 0.75), (4, 0.5), (2, 0.25)]
    null = draw(torch.full_like(y, model.num_classes), 1)
    assert torch.allclose(draw(y, 1, cfg=3.0), null + 3 * (draw(y, 1) - null), atol=1e-4)


def test_internal_guidance_leads_away_from_the_middle_heads():
    """v_mid + S (v - v_mid), in both branches of the other guidance; with S = 1 they are not evaluated."""
    torch.manual_seed(0)
    model = build_model(SMALL, num_classes=5, latent_size=8, middle_heads=True, projector=False).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.1)
    plain = build_model(SMALL, num_classes=5, latent_size=8, projector=False).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    y, calls = torch.tensor([1, 2]), []
    model.middle_heads[0].register_forward_hook(lambda *_: calls.append(1))

    def draw(model, **options):
        return sample_latents(model, y, {}, Noise(0, [0, 1], CPU), Sampling("euler", 1, **options))

    for options in ({}, {"cfg": 2.0}):
        assert torch.equal(draw(model, **options), draw(plain, **options)) and not calls
    noise = Noise(0, [0, 1], CPU)
    clamped, begin = noise((16, 8, 8)), noise((16, 8, 8))
    null, none = torch.full_like(y, 5), torch.zeros(2, 4, dtype=torch.bool)
    guided = []
    with torch.no_grad():
        for labels in (y, null):
            v, _, v_mid = model(begin, torch.zeros(2, 4), labels, none, middle=True)
            guided.append(v_mid + 1.4 * (v - v_mid))
    assert (guided[0] - v).abs().max() > 0.01 and clamped.shape == begin.shape
    assert torch.allclose(draw(model, middle_scale=1.4), begin + guided[0], atol=1e-5)
    both = guided[1] + 3.0 * (guided[0] - guided[1])
    assert torch.allclose(draw(model, middle_scale=1.4, cfg=3.0), begin + both, atol=1e-5)


def test_internal_guidance_needs_middle_heads(command):
    guided = ("--ckpt", DEMO / "mmgen.pt", "--middle-scale")
    with pytest.raises(InputError, match="--middle-scale 1.4: .*mmgen.pt has no middle heads"):
        command("sample", "--task", "generate", *guided, 1.4)
    with pytest.raises(InputError, match="--middle-scale 1.4: .* no middle heads"):
        command("eval_depth", "--toy", 1, *guided, 1.4)
    with pytest.raises(InputError, match="--middle-scale nan: must be finite"):
        command("sample", "--task", "generate", *guided, "nan")


def test_given_modalities_come_back_as_they_were():
    model = load_model(DEMO / "mmgen.pt").model
    held = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    given = {"rgb": held[:, :4], "normal": held[:, 8:12]}
    x = sample_latents(model, torch.tensor([0, 1]), given, Noise(0, [0, 1], CPU), Sampling("sde", 3))
    assert torch.equal(x[:, :4], held[:, :4]) and torch.equal(x[:, 8:12], held[:, 8:12])
    assert not torch.equal(x[:, 4:8], held[:, 4:8])


def test_a_condition_is_held_nearly_clean_throughout():
    """The network sees 0.995 of it, with the same noise at every step, at the time 0.995."""
    model, seen = load_model(DEMO / "mmgen.pt").model, []
    original = model.forward

    def watched(x, t, y, given):
        seen.append((x[:, 4:8].clone(), t.clone(), given.clone()))
        return original(x, t, y, given)

    model.forward = watched
    depth = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    sample_latents(model, torch.tensor([0, 1]), {"depth": depth}, Noise(3, [0, 1], CPU), Sampling("euler", 3))
    noise = (seen[0][0] - 0.995 * depth) / 0.005
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    for i, (x, t, given) in enumerate(seen):
        assert torch.equal(x, seen[0][0]) and given.tolist() == [[False, True, False, False]] * 2
        assert t[0].tolist() == pytest.approx([i / 3, 0.995, i / 3, i / 3])
    seen.clear()
    exact = Sampling("euler", 1, given_time=1.0)
    sample_latents(model, torch.tensor([0, 1]), {"depth": depth}, Noise(3, [0, 1], CPU), exact)
    assert torch.equal(seen[0][0], depth) and seen[0][1][0].tolist() == [0, 1, 0, 0]


def test_weights_rounded_once_are_what_autocast_makes_of_them():
    held = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    sampling = Sampling("euler", 2, cfg=2.0, precision="bf16")
    drawn = []
    for precision in ("fp32", "bf16"):
        model = load_model(DEMO / "mmgen.pt").model
        samplers.make_fast(model, precision)
        y, noise = torch.tensor([1, 5, 12]), Noise(0, range(3), CPU)
        drawn.append(sample_latents(model, y, {"rgb": held}, noise, sampling))
    assert model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16 and torch.equal(*drawn)


def test_bf16_decodes_to_nearly_the_same_pixels():
    encoder = load_encoder("toy", CPU)
    x = torch.randn(3, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, rough = decode(encoder, x), decode(encoder, x, precision="bf16")
    assert whole.shape == (3, 4, 3, 64, 64)
    levels = (whole - rough).abs() * 127.5  # of 8 bits
    assert 0 < levels.mean() < 0.5 and levels.max() < 8
    assert len(rough[0, 1].unique()) > 2000  # the last layer is not rounded
    assert torch.equal(decode(encoder, x, wanted=[3, 1]), whole[:, [3, 1]])


def test_latents_of_pixels_are_the_pixels():
    """Without an autoencoder."""
    encoder, row = load_encoder("none", CPU), MODALITIES["rgb"]
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    latents = encoder.encode(torch.from_numpy(row.to_pixels(image))[None])
    pixels = decode(encoder, torch.cat([latents, latents * 2], 1))
    assert (row.from_pixels(pixels[0, 0].numpy()) == image).all() and pixels.abs().max() <= 1


def test_a_multistep_sampler_takes_equal_steps_alone():
    """Its weights are theirs: on the grid `late` of the README it would end at another time."""
    late = [(i / 40) ** 0.5 for i in range(41)]
    for name in ("ab2", "ab4"):
        with pytest.raises(ValueError, match="equal steps"):
            SAMPLERS[name][0](lambda x, t: -x, torch.ones(1), late, None)
