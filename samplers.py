"""Samplers, and the sampling of MMGen with them (Sec. 4).

A sampler is a function (velocity, x, times, noise) -> x at the last of the times. velocity(x, t) with t a
float, 0 noise, 1 data; noise() gives standard normals like x. None of them knows about guidance, conditions
or the model.
"""
import pathlib
from typing import NamedTuple

import numpy as np
import torch

from distributed import autocast, check, check_ranges
from vae import signature_of

GIVEN_TIME = 0.995  # a condition is held this close to clean (noise level 0.005)


def euler(velocity, x, times, noise):
    for t, after in zip(times, times[1:]):
        x = x + (after - t) * velocity(x, t)
    return x


def heun(velocity, x, times, noise):
    for t, after in zip(times, times[1:]):
        h, v = after - t, velocity(x, t)
        x = x + h / 2 * (v + velocity(x + h * v, after))
    return x


def _runge_kutta(velocity, x, t, h):
    """One classical fourth-order step -> x at t + h and the velocity at t."""
    k1 = velocity(x, t)
    k2 = velocity(x + h / 2 * k1, t + h / 2)
    k3 = velocity(x + h / 2 * k2, t + h / 2)
    k4 = velocity(x + h * k3, t + h)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), k1


def _adams_bashforth(weights):
    """The multistep method with these weights, newest velocity first, on equal steps.

    Runge-Kutta steps build its history. The sampler raises ValueError for unequal ones.
    """
    def sampler(velocity, x, times, noise):
        h, history = times[1] - times[0], []
        if not np.allclose(np.diff(times), h):
            raise ValueError("a multistep method's weights are of equal steps: give it the grid `even`")
        for i, t in enumerate(times[:-1]):
            if i < len(weights) - 1:
                x, v = _runge_kutta(velocity, x, t, h)
                history.insert(0, v)
            else:
                history.insert(0, velocity(x, t))
                x = x + h * sum(w * v for w, v in zip(weights, history))
                history.pop()
        return x
    return sampler


def sde(velocity, x, times, noise):
    """Euler-Maruyama of the reverse SDE with diffusion w_t = 2 sigma_t, as the released code and REPA.

    The drift v + (w_t / 2) score is v - E[eps | x] = v - (x - t v), without a division. The last step goes
    to the data without noise.
    """
    for t, after in zip(times, times[1:]):
        h, v = after - t, velocity(x, t)
        x = x + h * (v - (x - t * v))
        if after < 1:
            x = x + (2 * (1 - t) * h) ** 0.5 * noise()
    return x


# Time grids: steps -> times from 0 to 1.

def even(steps):
    return [i / steps for i in range(steps + 1)]


def even_then_clean(steps, last=0.04):
    """Linear from noise level 1 to `last`, then to the data in one step: the released code's."""
    return [*(1 - np.linspace(1.0, last, steps)).tolist(), 1.0]


SAMPLERS = {
    "sde": (sde, even_then_clean),
    "euler": (euler, even),
    "heun": (heun, even),
    "ab2": (_adams_bashforth((3 / 2, -1 / 2)), even),
    "ab4": (_adams_bashforth((55 / 24, -59 / 24, 37 / 24, -9 / 24)), even),
}


# ------------------------------------------------------------------------------------------------

class Sampling(NamedTuple):
    """How samples are drawn: the part of a recipe that the command's flags say."""
    sampler: str = "sde"
    steps: int = 250
    cfg: float = 1.0                  # guidance scale, 1 = none
    cfg_interval: tuple = (0.0, 1.0)  # noise levels with guidance
    precision: str = "fp32"
    given_time: float = GIVEN_TIME    # at which a condition is held
    middle_scale: float = 1.0         # internal guidance, away from the middle heads; 1 = none

    def run(self, velocity, x, noise):
        function, grid = SAMPLERS[self.sampler]
        return function(velocity, x, grid(self.steps), noise)

    def evaluations(self):
        """How often the sampler calls its velocity."""
        calls, zero = [], torch.zeros(())

        def velocity(x, t):
            calls.append(t)
            return zero

        self.run(velocity, zero, lambda: zero)
        return len(calls)

    def recipe(self, loaded, encoder, seed):
        """What drew samples so."""
        return recipe(loaded, encoder, seed, self.evaluations(), **self._asdict())


class Noise:
    """Standard normals, each sample's from a generator of its own seeded by (seed, global index)."""

    def __init__(self, seed, indices, device):  # numpy's: torch's CPU generator would read 32 bits of a seed
        self.generators = [np.random.default_rng((seed, int(i))) for i in indices]
        self.device = torch.device(device)

    def __call__(self, shape):
        """(N, *shape)"""
        x = np.stack([g.standard_normal(tuple(shape), np.float32) for g in self.generators])
        x = torch.from_numpy(x)
        if self.device.type == "cuda":
            x = x.pin_memory()  # drawn while the device works
        return x.to(self.device, non_blocking=True)


@torch.inference_mode()
def sample_latents(model, y, given, noise, sampling):
    """Sample all modalities -> scaled latents (N, M*C, H, W).

    y (N,) classes; given {modality: clean scaled latents (N, C, H, W)}: those channels stay at given_time
    throughout and are returned clean. noise: a Noise of N samples. Guidance v = v_null + cfg (v_class -
    v_null) acts on all channels, while the noise level 1 - t lies in the interval; both are guided
    internally, v = v_mid + middle_scale (v - v_mid), where that is not 1.
    """
    N, M, C = len(y), len(model.modalities), model.latent_channels
    size = next(iter(given.values())).shape[2:] if given else model.latent_size
    blank = torch.zeros(N, C, *size, device=y.device)
    held = torch.cat([given.get(m, blank) for m in model.modalities], 1)                # (N, M*C, H, W)
    is_given = torch.tensor([m in given for m in model.modalities], device=y.device)    # (M,)
    mask = is_given.repeat_interleave(C)[None, :, None, None]                           # (1, M*C, 1, 1)
    flags, null = is_given.expand(N, M), torch.full_like(y, model.num_classes)
    shape = held.shape[1:]
    held_at = sampling.given_time
    clamped = held_at * held + (1 - held_at) * noise(shape)
    low, high = sampling.cfg_interval

    def network(x, t, y, flags):
        with autocast(x.device, sampling.precision):
            if sampling.middle_scale == 1.0:
                return model(x, t, y, flags)[0].float()
            v, _, v_mid = model(x, t, y, flags, middle=True)
        return v_mid.float() + sampling.middle_scale * (v.float() - v_mid.float())

    def velocity(x, t):
        x = torch.where(mask, clamped, x)
        times = torch.where(flags, held_at, t)                                           # (N, M)
        if sampling.cfg == 1.0 or not low <= 1 - t <= high:
            return network(x, times, y, flags)
        twice = (torch.cat(pair) for pair in ((x, x), (times, times), (y, null), (flags, flags)))
        both = network(*twice)
        v, v_null = both.chunk(2)
        return v_null + sampling.cfg * (v - v_null)

    x = sampling.run(velocity, noise(shape), lambda: noise(shape))
    return torch.where(mask, held, x)


def decode(encoder, x, wanted=None, precision="fp32"):
    """Scaled latents (N, M*C, H, W) -> pixels (N, M, 3, fH, fW), of all modalities or the wanted ones."""
    z = x.unflatten(1, (-1, encoder.channels))                                          # (N, M, C, H, W)
    z = z if wanted is None else z[:, wanted]
    return encoder.decode(z.flatten(0, 1), precision).unflatten(0, z.shape[:2])


def recipe(loaded, encoder, seed, evaluations, **settings):
    """What drew samples: the part of a recipe that all commands share."""
    return dict(checkpoint=loaded.path.name, checkpoint_sha256=loaded.sha256,
                method=loaded.train.get("method", "mmgen"), step=loaded.step, weights="ema",
                evaluations=evaluations, seed=seed, **signature_of(encoder, loaded.meta), **settings)


# ------------------------------------------------------------------------------------------------
# The flags of every command that samples: said here once, read into a Sampling by the command.

FAST = {  # --fast, by quality against evaluations on the toy world
    "generate": dict(sampler="ab2", steps=7),
    "understand": dict(sampler="euler", steps=2),
    "condition": dict(sampler="euler", steps=4),
    "translate": dict(sampler="euler", steps=4),
}


def checkpoint_flags(parser):
    """The flags of every command that samples a checkpoint, of any method."""
    parser.add_argument("--ckpt", type=pathlib.Path, help="default: the newest run, else the demo")
    parser.add_argument("--vae", help="where the VAE of the training cache lies, if not where it was; of "
                        "Stable Diffusion's latents any that speaks them: sd-mse, sd-ema, taesd, a file, or "
                        "TAESD's folder")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance scale, 1 = none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                        help="of the network and of decoding")
    parser.add_argument("--compile", action="store_true", help="a minute at first, pays for many samples")


def check_flags(args):
    """Raise InputError for values of checkpoint_flags that cannot be."""
    check_ranges(args, steps=(1, None), batch_size=(1, None), seed=(0, None))
    check(np.isfinite(args.cfg), f"--cfg {args.cfg}: must be finite")


def add_flags(parser):
    """The flags of every command that samples MMGen."""
    checkpoint_flags(parser)
    parser.add_argument("--sampler", choices=list(SAMPLERS), default="sde")
    parser.add_argument("--cfg-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"),
                        help="noise levels with guidance")
    parser.add_argument("--given-time", type=float, default=GIVEN_TIME, metavar="T",
                        help="time at which a condition is held, 1 is clean (0.995)")
    parser.add_argument("--middle-scale", type=float, default=1.0, metavar="S",
                        help="internal guidance of a model with middle heads, 1 = none")
    parser.add_argument("--fast", action="store_true", help="few steps, as recommended for the task")


def from_flags(args, task="understand"):
    """The Sampling of a command's flags. Raises InputError for values that cannot be."""
    check_flags(args)
    low, high = args.cfg_interval
    check(0 <= low <= high <= 1, f"--cfg-interval {low} {high}: 0 <= LO <= HI <= 1")
    check(np.isfinite(args.middle_scale), f"--middle-scale {args.middle_scale}: must be finite")
    check_ranges(args, given_time=(0, 1))
    chosen = dict(sampler=args.sampler, steps=args.steps)
    if args.fast:
        check(chosen == dict(sampler="sde", steps=250), f"--fast with --sampler {args.sampler} --steps "
              f"{args.steps}: --fast chooses them; leave one out")
        chosen = FAST[task]
    return Sampling(cfg=args.cfg, cfg_interval=(low, high), precision=args.precision,
                    given_time=args.given_time, middle_scale=args.middle_scale, **chosen)


def check_model(loaded, sampling):
    """Raise InputError where a checkpoint (weights.Loaded) has not what the sampling needs."""
    check(sampling.middle_scale == 1.0 or loaded.model.middle_heads is not None, f"--middle-scale "
          f"{sampling.middle_scale}: {loaded.path} has no middle heads; they are trained by train.py "
          "--middle-weight 0.5")


def make_fast(network, precision="fp32", compile=False):
    """Make a network's blocks fast: rounded once (autocast would at every call), compiled."""
    for block in network.blocks:
        if precision == "bf16":
            block.bfloat16()
        if compile:
            block.compile(fullgraph=True)
