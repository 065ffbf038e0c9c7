"""Benchmarks, not tests: what things cost on this machine, without data.

    python studies/bench.py --what train --model XL/2 --batch-size 256 --micro-batch 64 \\
        --precision bf16 --compile
    python studies/bench.py --what train --model S/2 --latent-size 16 --batch-size 64 --peer DIR --json FILE
    python studies/bench.py --what sample --model XL/2 --sampler sde --steps 250 --batch-size 64 \\
        --precision bf16 --compile --decode
    python studies/bench.py --what load --batch-size 256                 # the loader, from a warm cache
    python studies/bench.py --what prep --num 512                        # prep_latents.py on toy scenes
    python studies/bench.py --what parts --model T/2 --latent-size 16    # what each optimisation pays alone
    python studies/bench.py --what curves --model T/2 --steps 300        # losses, plain against fast
    python studies/bench.py --what fusion --model XL/2 --flops           # FLOPs alone, no memory needed
    python studies/bench.py --what recipes --model T/2 --latent-size 16 --compile   # a step of each recipe
    python studies/bench.py --what heads --latent-size 16                # MT-Diffusion over the single task
    python studies/bench.py --what evaluate                              # FID and the like of 50,000 features
    python studies/bench.py --what equal --model XL/2 --peer DIR         # no time: both codes, one file

--peer DIR is a checkout of jiepengwang/MMGen: its model, loss and loop run by turns with ours on the same
tensors, and `ratio` is its time over ours.
"""
import argparse
import concurrent.futures
import contextlib
import copy
import functools
import importlib
import io
import json
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from typing import Callable, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from record import call, command_line, write_json

import dataset
import eval_fid
import mt_model
import prep_latents
import sample
import toy_scenes
import train
from distributed import autocast, check, command_parser, run, setup
from model import FUSIONS, SIZES, build_model, training_flops
from modalities import MODALITIES
from optimisers import OPTIMISERS, set_rates, update, update_ema
from samplers import GIVEN_TIME, SAMPLERS, Noise, Sampling, decode, sample_latents
from vae import KL, SD_CONFIG, AutoencoderKL, load_encoder
from weights import load_model

FOUR = ["rgb", "depth", "normal", "seg"]
SD_SCALE = 0.18215


# ------------------------------------------------------------------------------------------------
# Clocks.

def finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(function, device):
    finish(device)
    start = time.perf_counter()
    function()
    finish(device)
    return time.perf_counter() - start


def by_turns(rows, rounds, device):
    """Seconds of each function {name: f}, run by turns, each round in another order; two rounds warm up.

    Median over the rounds of a row's share of its round, times the median round: a slow spell of the machine
    hits all rows alike.
    """
    times, names = [], list(rows)
    for turn in range(rounds + 2):
        at = turn % len(names)
        times.append({name: seconds_of(rows[name], device) for name in names[at:] + names[:at]})
    times = times[2:]
    totals = [sum(row.values()) for row in times]
    typical = statistics.median(totals)
    return {name: typical * statistics.median(row[name] / total for row, total in zip(times, totals))
            for name in names}


def matmul_rate(precision, device):
    """FLOP/s of a large matmul, the limit of this machine."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / by_turns({"matmul": lambda: a @ b}, 8, device)["matmul"]


def peak_memory(device):
    """GB: of the device, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1e9 if sys.platform == "darwin" else 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def precisions(asked, device):
    """On a CPU fp32 is measured as well."""
    return [asked] if device.type == "cuda" else list(dict.fromkeys(("fp32", asked)))


# ------------------------------------------------------------------------------------------------
# Training.

def synthetic(args):
    """A cache's meta.json and one batch of it, on the CPU."""
    C, S, N, grid = 4, args.latent_size, args.batch_size, args.latent_size // 2
    g = torch.Generator().manual_seed(0)
    meta = dict(modalities=FOUR, latent_channels=C, latent_size=[S, S], num_classes=1000, scale=SD_SCALE,
                teacher="synthetic", grid=[grid, grid])
    batch = {"known": torch.ones(N, len(FOUR)), "aligned": torch.ones(N, dtype=torch.bool)}
    for m in FOUR:
        mean = torch.randn(N, C, S, S, generator=g) * 5
        log_std = torch.randn(N, C, S, S, generator=g) * 0.1 - 3
        batch[m] = torch.stack([mean, log_std], 1).half()
    batch["labels"] = torch.randint(1000, (N,), generator=g)
    batch["dino"] = torch.randint(-127, 128, (N, grid * grid, 768), generator=g, dtype=torch.int8)
    return meta, batch


def plain_update(parameters, optimiser):
    """optimisers.update without its gate, a parameter at a time."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm, torch.zeros(())


@torch.no_grad()
def plain_ema(ema, model, step, ages=None):
    rate = min(0.9999, (1 + step) / (10 + step))
    for old, new in zip(ema.parameters(), model.parameters()):
        old.mul_(rate).add_(new, alpha=1 - rate)


def as_it_is(model):
    """The change of a network that changes nothing."""


def one_product(model):
    """Tried, not kept: the adaLN products of all blocks as one, their weights stored as one."""
    layers = [block._modules.pop("adaLN_modulation")[1] for block in model.blocks]
    width, outputs, shares = layers[0].in_features, layers[0].out_features, []
    with torch.no_grad():
        model.stacked = torch.nn.Linear(width, len(layers) * outputs, device=layers[0].weight.device)
        for name in ("weight", "bias"):
            together = torch.cat([getattr(layer, name) for layer in layers])
            getattr(model.stacked, name).copy_(together)

    def share_of(i, c):
        if i == 0:
            shares[:] = model.stacked(F.silu(c)).chunk(len(layers), -1)  # each (N, 6D)
        return shares[i]

    for i, block in enumerate(model.blocks):
        block.adaLN_modulation = functools.partial(share_of, i)


def cached_conditioning(model):
    """Tried, not kept: what caching the adaLN products of an equal time and class would save at most; here
    they are computed once.
    """
    def once(layer):
        found = []

        def product(c):
            if not found:
                found.append(layer(c))
            return found[0]
        return product

    for block in model.blocks:
        block.adaLN_modulation = once(block._modules.pop("adaLN_modulation"))


class Step(NamedTuple):
    """The parts of a training step as they are kept."""
    compile: bool = False
    update: Callable = update
    update_ema: Callable = update_ema
    adam: dict = None            # another AdamW's options
    read: bool = False           # the host reads losses and norm at every step
    change: Callable = as_it_is  # of the network


PLAIN = Step(update=plain_update, update_ema=plain_ema, adam={"foreach": False, "fused": False}, read=True)


def paper_flags():
    """train.py's flags of the paper's run; no checkpoint that lies there says which blocks."""
    parser = argparse.ArgumentParser()
    train.add_flags(parser)
    train.MMGen.add_flags(parser)
    return {**vars(parser.parse_args([])), "blocks": "sit"}


def our_step(args, device, precision, parts, optimiser="adamw", **flags):
    """train.py's step: objective, backward pass, clipping, optimiser, EMA; parts: a Step; flags: train.py's
    that differ from the paper's.
    """
    meta, batch = synthetic(args)
    flags = argparse.Namespace(**{**paper_flags(), "model": args.model, "batch_size": args.batch_size,
                                  "precision": precision, **flags})
    cache = argparse.Namespace(meta=meta, modalities=FOUR, stems=(*FOUR, "dino"))
    with device:
        objective = train.MMGen(flags, cache, device)
    model = objective.model.to(device)
    parts.change(model)
    ema = copy.deepcopy(model).requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if parts.adam:
        optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, **parts.adam)
    else:
        optimiser = OPTIMISERS[optimiser](parameters, model.blocks, 0.999, precision)
        set_rates(optimiser, {"lr": 1e-4, "muon_lr": 0.02}, 1.0)
    if parts.compile:
        for block in model.blocks:
            block.compile(fullgraph=True)
    batch = {stem: x.to(device) for stem, x in batch.items()}
    micro, count = args.micro_batch or args.batch_size, 0

    def step():
        nonlocal count
        tensors, counts = objective.prepare(count, batch, slice(0, args.batch_size))
        for i in range(0, args.batch_size, micro):
            sums = objective.loss(model, {name: x[i:i + micro] for name, x in tensors.items()})
            train.total_loss(sums, counts, objective.weights).backward()
        norm, _ = parts.update(parameters, optimiser)
        parts.update_ema(ema, model, count)
        if parts.read:
            for x in (*sums, norm):
                x.item()
        count += 1
    return step


def training(args, device):
    """Training throughput, with --compile also compiled; with --peer the released loop by turns, in its own
    precision (fp16 on CUDA, fp32 on a CPU) and in ours.

    ratio: its time over ours; memory on CUDA: of that row alone, on a CPU of the whole run.
    """
    cuda, makers = device.type == "cuda", {}
    for compile in (False, True)[:1 + args.compile]:
        for p in precisions(args.precision, device):
            name = f"ours{', compiled' if compile else ''}, {p}"
            makers[name] = functools.partial(our_step, args, device, p, Step(compile))
    if args.peer:
        for p in dict.fromkeys(("fp16" if cuda else "fp32", args.precision)):
            makers[f"peer, {p}"] = functools.partial(peer_step, args, device, p)
    result, rows = {}, {}
    for name, make in makers.items():
        result[name] = {}
        if cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        rows[name] = make()
        for _ in range(2):
            rows[name]()
        if cuda:
            result[name]["peak_GB"] = peak_memory(device) - before / 1e9
    seconds = by_turns(rows, args.rounds, device)
    flops = training_flops(dict(name=args.model, modalities=FOUR, num_classes=1000, latent_channels=4,
                                latent_size=[args.latent_size] * 2))
    first = next((name for name in rows if name.startswith("peer")), None)
    for name, t in seconds.items():
        rate, row = args.batch_size * flops / t, result[name]
        row.update(ms=1e3 * t, img_per_s=args.batch_size / t, tflops=rate / 1e12)
        precision = name.split(", ")[-1]
        equal = f"peer, {precision}"
        if name.startswith("ours"):
            row["matmul_share"] = rate / matmul_rate(precision, device)
            if first:
                row["ratio"] = seconds[first] / t
            if equal in seconds:
                row["ratio_at_equal_precision"] = seconds[equal] / t
    if not cuda:
        result["memory"] = dict(peak_GB=peak_memory(device))
    return result


def recipes(args, device):
    """A step by optimiser, blocks and heads, without REPA, in --precision: seconds, and over the first."""
    rows = {}
    for optimiser, blocks, weight in (("adamw", "sit", 0.0), ("muon", "sit", 0.0), ("adamw", "modern", 0.0),
                                      ("muon", "modern", 0.0), ("muon", "modern", 0.5)):
        name = f"{optimiser}, {blocks}{', middle heads' if weight else ''}"
        rows[name] = our_step(args, device, args.precision, Step(args.compile), optimiser, blocks=blocks,
                              middle_weight=weight, repa_weight=0.0)
    seconds = by_turns(rows, args.rounds, device)
    return {name: dict(s=t, ratio=t / seconds["adamw, sit"]) for name, t in seconds.items()}


# ------------------------------------------------------------------------------------------------
# The released code.

def take_peer(folder):
    """Let `import models.sit`, loss and samplers of a checkout be found."""
    check((folder / "models" / "sit.py").is_file(),
          f"--peer {folder}: no checkout of jiepengwang/MMGen, models/sit.py is missing")


@functools.cache
def peer_module(folder, name):
    """A module of the checkout; its names (samplers) are also ours, which stay what they are."""
    theirs = {"models", "loss", "samplers"}
    ours = {key: sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] in theirs}
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        for key in [key for key in sys.modules if key.split(".")[0] in theirs]:
            del sys.modules[key]
        sys.modules.update(ours)


def peer_model(args, device):
    """The released network in one of our sizes, with its own defaults."""
    depth, width, heads, encoder_depth = SIZES[args.model]
    network = peer_module(args.peer, "models.sit").SiT
    with contextlib.redirect_stdout(io.StringIO()), device:
        return network(depth=depth, hidden_size=width, decoder_hidden_size=width, patch_size=2,
                       num_heads=heads, input_size=args.latent_size, num_classes=1000, z_dims=[768],
                       encoder_depth=encoder_depth, num_tasks=4, is_mmcat_diff=True, use_decouple_task=True,
                       use_taskcond_emb=True, fused_attn=True, qk_norm=False).to(device)


def peer_step(args, device, precision):
    """The released loop's step with its own model and loss: posterior, loss, reads for its log, clipping,
    AdamW, EMA.
    """
    model, loss = peer_model(args, device).train(), peer_module(args.peer, "loss")
    with contextlib.redirect_stdout(io.StringIO()):
        objective = loss.SILoss(use_decouple_task=True, num_tasks=4, ratio_train_onlyrgb=0.5,
                                use_quater_mixing=True, use_decouple_rand1=True)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    _, batch = synthetic(args)
    means, stds = (torch.cat([batch[m][:, k].float() for m in FOUR], 1).to(device) for k in (0, 1))
    stds, classes, features = stds.exp(), batch["labels"].to(device), batch["dino"].float().to(device)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    micro = args.micro_batch or args.batch_size

    def forward(rows):
        """-> the weighted sum of the velocity errors, the alignment."""
        x = (means[rows] + stds[rows] * torch.randn_like(means[rows])) * SD_SCALE
        with torch.autocast(device.type, kind, enabled=precision != "fp32"):
            errors, alignment, mask = objective(model, x, dict(y=classes[rows]), zs=[features[rows]])
        total = 0.0
        for error, valid, weight in zip(errors.chunk(4, 1), mask.chunk(4, 1), (1.0, 0.2, 0.1, 0.1)):
            supervised = error.flatten(1).mean(1)[valid[:, 0, 0, 0] > 0]
            if len(supervised):  # it reads the host here, and each item below
                total = total + weight * supervised.mean()
                supervised.mean().item()
        return total, alignment

    def step():
        for start in range(0, args.batch_size, micro):
            total, alignment = forward(slice(start, start + micro))
            value = total + 0.5 * alignment.mean()
            scaler.scale(value * micro / args.batch_size).backward()
        scaler.unscale_(optimiser)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            for old, new in zip(ema.parameters(), model.parameters()):
                if new.requires_grad:
                    old.mul_(0.9999).add_(new.data, alpha=1e-4)
        for x in (total, alignment.mean(), norm):
            x.item()
    return step


@torch.inference_mode()
def equality(args, device):
    """A file in the released format through both codes, fp32: velocities of 20 random inputs, 10
    Euler-Maruyama steps with equal noise.

    Every parameter but the positions is drawn from N(0, 0.04), of XL/2 N(0, 0.02): a fresh network's output
    is 0.
    """
    device = torch.device("cpu")  # the figures are of fp32 there
    torch.manual_seed(0)
    theirs, std = peer_model(args, device).eval(), 0.02 if args.model == "XL/2" else 0.04
    for name, p in theirs.named_parameters():
        if "pos_embed" not in name:
            p.normal_(std=std)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "0000000.pt")
        told = argparse.Namespace(encoder_depth=SIZES[args.model][3])
        torch.save(dict(ema=theirs.state_dict(), args=told, steps=0), path)
        ours = load_model(path, device).model
        result = {"velocities": velocity_difference(ours, theirs, args.latent_size)}
        sampler = peer_module(args.peer, "samplers").euler_maruyama_sampler
        for task in (None, *range(4)):
            name = "category" if task is None else f"{FOUR[task]} given"
            worst = trajectory_difference(ours, theirs, sampler, task, args.latent_size)
            result[f"trajectory, {name}"] = dict(difference=worst)
    return result


def velocity_difference(ours, theirs, size):
    """The largest difference over 20 random inputs, and the outputs' standard deviation."""
    worst, values = 0.0, []
    for i in range(20):
        x, t, y = torch.randn(1, 16, size, size), torch.rand(1, 4), torch.randint(1001, (1,))
        given = torch.arange(4)[None] == i % 5 - 1
        condition = dict(lis_idx_taskcond_rand=torch.tensor([i % 5])) if i % 5 else {}
        level = (1 - t).repeat_interleave(4, 1)[:, :, None, None]
        values.append(-theirs(x, level, y, **condition)[0])
        worst = max(worst, (ours(x, t, y, given)[0] - values[-1]).abs().max().item())
    return dict(difference=worst, std=torch.stack(values).std().item())


def trajectory_difference(ours, theirs, sampler, task, size):
    """The largest difference after 10 steps, where nothing is given; task: the given modality's index."""
    device, y = torch.device("cpu"), torch.tensor([7])
    given, held = torch.arange(4) == (-1 if task is None else task), torch.randn(1, 16, size, size)
    parts = {m: part for m, part, here in zip(FOUR, held.chunk(4, 1), given) if here}
    mine = sample_latents(ours, y, parts, Noise(0, [0], device), Sampling("sde", 10))
    noise, free = Noise(0, [0], device), ~given.repeat_interleave(4)
    blended = GIVEN_TIME * held + (1 - GIVEN_TIME) * noise(held.shape[1:])
    x = torch.where(free[None, :, None, None], noise(held.shape[1:]), blended)
    with mock.patch("torch.randn_like", lambda x: noise(x.shape[1:]).double()):
        other = sampler(theirs, x, y, 10, condition_task=task)
    return (mine - other)[:, free].abs().max().item()


# ------------------------------------------------------------------------------------------------
# Sampling.

class RandomEncoder(KL):
    """The Stable Diffusion autoencoder with random weights."""

    def __init__(self, device):
        with device:
            vae = AutoencoderKL(**SD_CONFIG)
        vae = vae.to(device, memory_format=torch.channels_last)
        self.name, self.device, self.vae = "random", device, vae.eval().requires_grad_(False)
        self.factor, self.channels, self.scale = vae.factor, vae.latent_channels, vae.scale


@contextlib.contextmanager
def tf32(device):
    """As the released sampler runs: its --tf32 is on."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def our_draw(args, device, precision):
    """A batch of category samples, with --decode as pixels."""
    with device:
        model = build_model(args.model, latent_size=args.latent_size, projector=False).to(device)
    model = model.eval().requires_grad_(False)
    encoder = RandomEncoder(device) if args.decode else None
    for block in model.blocks:
        if precision == "bf16":
            block.bfloat16()
        if args.compile:
            block.compile(fullgraph=True)
    n, sampling = args.batch_size, Sampling(args.sampler, args.steps, args.cfg, precision=precision)
    y = torch.arange(n, device=device) % 1000

    def draw():
        x = sample_latents(model, y, {}, Noise(0, range(n), device), sampling)
        return decode(encoder, x, precision=precision).cpu() if encoder else x
    return draw


def peer_draw(args, device, n):
    """The released sampler's, in its fp32; it decodes one modality after the other."""
    check(args.sampler in ("euler", "heun", "sde"),
          f"--sampler {args.sampler}: the released code has euler, heun and sde")
    peer, samplers = peer_model(args, device).eval(), peer_module(args.peer, "samplers")
    vae = AutoencoderKL(**SD_CONFIG).to(device).eval().requires_grad_(False) if args.decode else None
    y, size = torch.arange(n, device=device) % 1000, (n, 16, args.latent_size, args.latent_size)
    walk = functools.partial(samplers.euler_sampler, heun=args.sampler == "heun", use_decouple_task=True)
    if args.sampler == "sde":
        walk = samplers.euler_maruyama_sampler

    @torch.no_grad()
    def draw():
        with tf32(device):
            x = walk(peer, torch.randn(size, device=device), y, args.steps, cfg_scale=args.cfg)
            return [vae.decode(part.float() / SD_SCALE).cpu() for part in x.chunk(4, 1)] if vae else x
    return draw


def sampling(args, device):
    """--steps of a sampler for a batch of category samples; the peer's Euler, Heun or Euler-Maruyama in its
    fp32 (TF32 on CUDA).

    The network alone, or with --decode also the four modalities by a random Stable Diffusion autoencoder:
    ours batched, the peer's one modality after the other.
    """
    rows = {f"ours, {p}": our_draw(args, device, p) for p in precisions(args.precision, device)}
    count = dict.fromkeys(rows, args.batch_size)
    if args.peer:
        count["peer, fp32"] = args.peer_batch or args.batch_size
        rows["peer, fp32"] = peer_draw(args, device, count["peer, fp32"])
    seconds = by_turns(rows, args.rounds, device)
    result = {name: dict(s=t, img_per_s=count[name] / t) for name, t in seconds.items()}
    if args.peer:
        for name in rows.keys() - {"peer, fp32"}:
            result[name]["ratio"] = result[name]["img_per_s"] / result["peer, fp32"]["img_per_s"]
    return result


# ------------------------------------------------------------------------------------------------
# Loading and preparing.

def make_cache(folder, n, S):
    """A finished cache of n random rows of four modalities, with alignment targets."""
    grid, rng = S // 2, np.random.default_rng(0)
    meta = dict(format=dataset.FORMAT, modalities=FOUR, vae="sd-mse", vae_sha256=None, scale=SD_SCALE,
                latent_channels=4, latent_size=[S, S], resolution=8 * S, count=n, num_classes=1000,
                class_names=[str(i) for i in range(1000)], palette=None, grid=[grid, grid],
                teacher="synthetic", names_sha256="", seg_mode="instance", depth_space="disparity",
                batch_size=32)
    (folder / "meta.json").write_text(json.dumps(meta))
    for m in FOUR:
        moments = rng.standard_normal((n, 2, 4, S, S), np.float32)
        np.save(folder / f"{m}.npy", moments.astype(np.float16))
    np.save(folder / "dino.npy", rng.integers(-127, 128, (n, grid * grid, 768), np.int8))
    np.save(folder / "labels.npy", rng.integers(0, 1000, n))
    np.save(folder / "done.npy", np.ones(n, np.uint8))


def loading(args, device):
    """Samples a second of the loader, of a cache of --num rows in the page cache, with and without alignment
    targets.
    """
    result, size = {}, args.batch_size
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        make_cache(pathlib.Path(folder), args.num, args.latent_size)
        cache, steps = dataset.Cache(pathlib.Path(folder)), range(max(8, 3 * args.num // size))
        for name, stems in (("with DINO", [*FOUR, "labels", "dino"]), ("without", [*FOUR, "labels"])):
            def read(seed, stems=stems):
                for _ in dataset.batches(cache, stems, FOUR, seed, steps, size, slice(0, size), device):
                    pass
            read(0)  # warms up
            t, samples = seconds_of(lambda: read(1), device), len(steps) * size  # noqa: B023
            row = sum(cache.array(stem)[0].nbytes for stem in stems)
            result[name] = dict(samples_per_s=samples / t, GB_per_s=samples * row / t / 1e9)
    return result


def preparing(args, device):
    """prep_latents.py on --num toy scenes: scenes a second, and the share of the time in the encoder."""
    inside, store = [], KL.store

    def timed(encoder, pixels):
        found = []
        inside.append(seconds_of(lambda: found.append(store(encoder, pixels)), device))
        return found[0]

    with tempfile.TemporaryDirectory(dir=args.scratch) as folder, mock.patch.object(KL, "store", timed):
        start = time.perf_counter()
        call(prep_latents, "--toy", args.num, "--out", f"{folder}/cache", "--batch-size", args.batch_size)
        t = time.perf_counter() - start
    return {"prep": dict(img_per_s=args.num / t, encoder_share=sum(inside) / t)}


# ------------------------------------------------------------------------------------------------
# Loss curves.

def curve(args, cache, run, seed, flags):
    """Losses of a run of train.py, weighted, in about ten windows."""
    weights = dict(rgb=1, depth=0.2, normal=0.1, seg=0.1, repa=0.5)
    call(train, "--data", cache, "--run", run, "--model", args.model, "--batch-size", args.batch_size,
         "--steps", args.steps, "--lr", 5e-4, "--seed", seed, "--log-every", max(1, args.steps // 10), *flags)
    entries = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return np.array([sum(w * entry[f"loss_{m}"] for m, w in weights.items()) for entry in entries])


def distance(a, b):
    """Mean over the windows of the absolute difference of two curves, as a share of the loss."""
    return float(np.mean(np.abs(a - b) / (np.abs(a) + np.abs(b)) * 2))


def curves(args, device):
    """Loss curves of train.py over --steps, in ten windows, three seeds: plain (fp32, eager, clipping and EMA
    a parameter at a time) and fast (as on CUDA).
    """
    plain, fast = {}, {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        folder = pathlib.Path(folder)
        call(prep_latents, "--toy", args.num, "--out", folder / "cache", "--batch-size", 64)
        for seed in range(3):
            with mock.patch.multiple(train, update=plain_update, update_ema=plain_ema):
                flags = "--precision", "fp32", "--no-compile"
                plain[seed] = curve(args, folder / "cache", folder / f"plain{seed}", seed, flags)
            fast[seed] = curve(args, folder / "cache", folder / f"fast{seed}", seed, ["--compile"])
    result, pairs = {}, ((0, 1), (0, 2), (1, 2))
    for kind, found in (("plain", plain), ("fast", fast)):
        for seed, values in found.items():
            steps = (f"step {args.steps * (k + 1) // len(values)}" for k in range(len(values)))
            result[f"{kind}, seed {seed}"] = dict(zip(steps, map(float, values)))
    return result | {"distance": {
        "fast to plain, equal seed": statistics.mean(distance(plain[i], fast[i]) for i in range(3)),
        "plain to plain, seed to seed": statistics.mean(distance(plain[i], plain[j]) for i, j in pairs),
        "fast to fast, seed to seed": statistics.mean(distance(fast[i], fast[j]) for i, j in pairs)}}


# ------------------------------------------------------------------------------------------------
# What each optimisation pays, alone on top of the plain version.

def parts_of_training(args, device):
    """Rows {name: work} of a whole training step."""
    def step(precision="fp32", **replaced):
        return our_step(args, device, precision, PLAIN._replace(**replaced))

    return {"plain": step(),
            "bf16": step("bf16"),
            "compiled blocks": step(compile=True),
            "no reads by the host": step(read=False),
            "all adaLN products as one (not kept)": step(change=one_product),
            "all that is kept": our_step(args, device, "bf16", Step(compile=True))}


def parts_of_update(args, device):
    """Rows of what follows the backward pass."""
    def after_backward(update, update_ema, **adam):
        model = build_model(args.model, latent_size=args.latent_size).to(device)
        ema, parameters = copy.deepcopy(model), [p for p in model.parameters() if p.requires_grad]
        gradients = [torch.randn_like(p) for p in parameters]
        optimiser = torch.optim.AdamW(parameters, **adam)

        def work():
            for p, gradient in zip(parameters, gradients):
                p.grad = gradient
            update(parameters, optimiser)
            update_ema(ema, model, 10 ** 6)
        return work

    return {"a parameter at a time": after_backward(plain_update, plain_ema, foreach=False, fused=False),
            "fused AdamW": after_backward(plain_update, plain_ema, fused=True),
            "and foreach clipping, gated": after_backward(update, plain_ema, fused=True),
            "and foreach EMA": after_backward(update, update_ema, fused=True)}


def drawing(args, device, sampling, compile=False, projector=False, change=as_it_is):
    """A batch of samples by a network that was changed."""
    n = args.batch_size
    model = build_model(args.model, latent_size=args.latent_size, projector=projector).to(device)
    model = model.eval().requires_grad_(False)
    change(model)
    if compile:
        for block in model.blocks:
            block.compile(fullgraph=True)
    y = torch.arange(n, device=device) % 1000
    return lambda: sample_latents(model, y, {}, Noise(0, range(n), device), sampling)


def rounded(model):
    """The blocks in bf16: rounded once."""
    for block in model.blocks:
        block.bfloat16()


def parts_of_sampling(args, device):
    fp32, bf16 = Sampling("euler", 4), Sampling("euler", 4, precision="bf16")

    def draw(sampling=fp32, projector=True, **options):
        return drawing(args, device, sampling, projector=projector, **options)

    return {"plain": draw(),
            "bf16": draw(bf16),
            "bf16, weights rounded once": draw(bf16, change=rounded),
            "compiled blocks": draw(compile=True),
            "without projector": draw(projector=False),
            "all adaLN products as one (not kept)": draw(change=one_product),
            "adaLN products cached (not kept)": draw(change=cached_conditioning),
            "all that is kept": draw(bf16, compile=True, projector=False, change=rounded)}


def parts_of_guidance(args, device):
    everywhere = Sampling("euler", 4, cfg=2.0)
    return {"at all noise levels": drawing(args, device, everywhere),
            "at levels from 0 to 0.7": drawing(args, device, everywhere._replace(cfg_interval=(0.0, 0.7)))}


def parts_of_decoding(args, device):
    encoder = load_encoder("toy", device)
    z = torch.randn(args.batch_size, 16, args.latent_size, args.latent_size, device=device)

    def one_by_one():
        for part in z.unflatten(1, (4, 4)).flatten(0, 1):
            encoder.decode(part[None])

    return {"a modality of a sample at a time": one_by_one,
            "batched": lambda: decode(encoder, z),
            "batched, bf16": lambda: decode(encoder, z, precision="bf16")}


def parts_of_writing(args, device):
    """sample.py's pictures, 64 of 256 px."""
    row = MODALITIES["rgb"]
    pixels = [row.to_pixels(toy_scenes.render(i, 256).rgb) for i in range(64)]
    outputs = sample.Maps({"rgb": row})

    def write(threads):
        with (tempfile.TemporaryDirectory(dir=args.scratch) as folder,
              concurrent.futures.ThreadPoolExecutor(threads) as pool):
            writing = []
            for i, image in enumerate(pixels):
                request = sample.Request(i, str(i), 0, {})
                job = outputs.write, pathlib.Path(folder), request, {"rgb": image}, None
                writing.append(pool.submit(*job))
            for one in writing:
                one.result()  # raises what went wrong

    return {"one thread": lambda: write(1), "4 threads": lambda: write(4)}


PARTS = {
    "training": parts_of_training,
    "clipping, AdamW, EMA": parts_of_update,
    "sampling": parts_of_sampling,
    "guidance, scale 2": parts_of_guidance,
    "decoding, toy autoencoder": parts_of_decoding,
    "writing 256 px PNG": parts_of_writing,
}


def parts(args, device):
    """Speed-up of each part of the training step and of sampling over the plain version, by turns; the last
    of each group is all that is kept.
    """
    result = {}
    for group, make in PARTS.items():
        seconds = by_turns(make(args, device), args.rounds, device)
        first = next(iter(seconds.values()))
        result |= {f"{group}: {name}": dict(ms=1e3 * t, ratio=first / t) for name, t in seconds.items()}
    return result


# ------------------------------------------------------------------------------------------------
# Architecture.

def inputs(model, batch_size, device):
    M, C, (H, W) = len(model.modalities), model.latent_channels, model.latent_size
    x, t = torch.randn(batch_size, M * C, H, W, device=device), torch.rand(batch_size, M, device=device)
    y = torch.zeros(batch_size, dtype=torch.long, device=device)
    return x, t, y, torch.zeros(batch_size, M, dtype=torch.bool, device=device)


def forward_backward(model, batch, precision, device):
    with autocast(device, precision):
        v, z = model(*batch)
    (v.float().square().mean() + z.float().mean()).backward()
    model.zero_grad(set_to_none=True)


def fusion(args, device):
    """The cost of four modalities, fused or as a sequence, beside RGB alone: FLOPs, and time by turns in one
    run.
    """
    rows = {"rgb only": dict(modalities=("rgb",)), **{name: dict(fusion=name) for name in FUSIONS}}
    common, result, work = dict(name=args.model, latent_size=args.latent_size), {}, {}
    for name, options in rows.items():
        result[name] = {"gflops": training_flops({**common, **options}) / 1e9}
        if not args.flops:
            model = build_model(**common, **options).to(device).train()
            batch = inputs(model, args.batch_size, device)
            work[name] = functools.partial(forward_backward, model, batch, args.precision, device)
    if work:
        for name, seconds in by_turns(work, args.rounds, device).items():
            result[name]["ms_per_sample"] = 1e3 * seconds / args.batch_size
    for row in result.values():
        row |= {f"{key}_ratio": row[key] / result["linear"][key] for key in list(row)}
    return result


def heads(args, device):
    """MT-Diffusion's training step over that of a model of the noise alone, which sees X as well, by turns in
    one run.

    Image heads: the backbone with the second head against the same with one. Label: the head (-M), with
    E(y), and the classifier on the output (-E), against none.
    """
    n, size = args.batch_size, (4, args.latent_size, args.latent_size)
    z, k = torch.randn(n, *size, device=device), torch.randint(1000, (n,), device=device)
    y, seen = torch.arange(n, device=device) % args.classes, torch.ones(n, dtype=torch.bool, device=device)
    at, zero = 1 - k / 1000, torch.zeros_like(z)

    def build(pair, modalities, **options):
        return mt_model.build(args.model, pair, modalities, args.classes, 4, args.latent_size,
                                  **options).to(device)

    image, label = build("masked", ["rgb", "rgb"]), build("label", ["rgb"])
    output, single = build("label", ["rgb"], head="output"), build("masked", ["rgb", "rgb"])
    del single.backbone.heads[1]

    def both():
        return sum(part.float().square().mean() for part in image(z, k, z, seen))

    def alone():
        times, given = torch.stack([at, seen.float()], 1), torch.stack([~seen, seen], 1)
        out, _ = single.backbone(torch.cat([z, z], 1), times, y * 0, given)
        return out.float().square().mean()

    def with_label(model, encode):
        e = model.encode(y) if encode else zero
        eps, logits = model(z + 0 * e, k, y, ~seen)
        return eps.float().square().mean() + model.x_error(logits, y).mean()

    def without_label():
        return label.backbone(z, at[:, None], y, ~seen[:, None])[0].float().square().mean()

    def work(loss):
        with autocast(device, args.precision):
            value = loss()
        value.backward()

    rows = {"image, single": alone,
            "image, both": both,
            "label, single": without_label,
            "label, head -M": functools.partial(with_label, label, False),
            "label, head -M and E(y)": functools.partial(with_label, label, True),
            "label, head -E": functools.partial(with_label, output, False)}
    rows = {name: functools.partial(work, loss) for name, loss in rows.items()}
    seconds = by_turns(rows, args.rounds, device)
    result = {}
    for name, t in seconds.items():
        first = seconds[name.split(",")[0] + ", single"]
        result[name] = {"ms_per_sample": 1e3 * t / n, "ratio": t / first}
    return result


# ------------------------------------------------------------------------------------------------

def evaluate(args, device):
    """eval_fid.py's arithmetic on 50,000 synthetic features of 2048 against 10,000."""
    def features(n):
        return torch.randn(n, 2048, generator=torch.Generator().manual_seed(n)).abs_().to(device)

    def moments(features):
        sums = torch.zeros(2049, 2048, dtype=torch.float64, device=device)
        for part in features.split(64):
            eval_fid.add_moments(sums, part)
        return eval_fid.finish_moments(sums, len(features))

    samples, reference, found = features(args.features), features(args.features // 5), []
    seconds = {
        "moments": seconds_of(lambda: found.extend((*moments(samples), *moments(reference))), device),
        "frechet": seconds_of(lambda: eval_fid.frechet(*(m.cpu() for m in found)), device),
        "precision_recall": seconds_of(lambda: eval_fid.precision_recall(samples, reference), device)}
    return {"seconds": seconds | {"all": sum(seconds.values())}, "memory": {"peak_GB": peak_memory(device)}}


WHAT = {"train": training, "recipes": recipes, "sample": sampling, "load": loading, "prep": preparing,
        "curves": curves, "parts": parts, "fusion": fusion, "heads": heads, "evaluate": evaluate,
        "equal": equality}


def arguments():
    """The command's flags."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--what", choices=list(WHAT), required=True)
    add("--model", default="S/2", choices=list(SIZES))
    add("--latent-size", type=int, default=32)
    add("--batch-size", type=int, default=16)
    add("--micro-batch", type=int, help="train: rows in one forward pass")
    add("--precision", choices=("fp32", "bf16"), default="fp32",
        help="on a CPU train and sample measure fp32 as well")
    add("--compile", action="store_true", help="train, sample: our blocks")
    add("--peer", type=pathlib.Path, metavar="DIR",
        help="train, sample, equal: a checkout of jiepengwang/MMGen to run by turns")
    add("--decode", action="store_true",
        help="sample: the four modalities too, by a random Stable Diffusion autoencoder")
    add("--peer-batch", type=int, help="sample: rows that the peer draws at once")
    add("--sampler", choices=list(SAMPLERS), default="euler")
    add("--steps", type=int, default=25)
    add("--cfg", type=float, default=1.0)
    add("--num", type=int, default=4096, help="load, prep, curves: rows")
    add("--features", type=int, default=50_000, help="evaluate: of the samples; the reference has a fifth")
    add("--scratch", type=pathlib.Path, metavar="DIR", help="where temporary caches are made")
    add("--classes", type=int, default=1000, help="heads: of the label setting")
    add("--rounds", type=int, default=10)
    add("--flops", action="store_true", help="fusion: count only")
    add("--json", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args()
    check(args.what != "equal" or args.peer, "--what equal: needs --peer DIR")
    if args.peer:
        take_peer(args.peer)
    return args


def main():
    args = arguments()
    _, _, device = setup()
    result = WHAT[args.what](args, device)
    for name, row in result.items():
        print(f"{name:15s}" + "".join(f"  {key} {value:.4g}" for key, value in row.items()))
    if args.json:
        name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        places = {"DIR": args.peer or args.scratch, "FILE": args.json}
        recipe = dict(command=command_line(**places), threads=torch.get_num_threads(),
                      torch=torch.__version__, device=name)
        write_json(args.json, {**result, "recipe": recipe})


if __name__ == "__main__":
    run(main)
