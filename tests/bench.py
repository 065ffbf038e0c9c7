"""Benchmarks, not tests: what things cost on this machine, without data.

    python tests/bench.py --what train --model XL/2 --batch-size 256 --micro-batch 64 --precision bf16 --compile   # img/s, share of a matmul, memory
    python tests/bench.py --what train --model S/2 --latent-size 16 --batch-size 64 --peer DIR --json train.json
    python tests/bench.py --what sample --model XL/2 --sampler sde --steps 250 --batch-size 64 --precision bf16 --compile --decode
    python tests/bench.py --what load --batch-size 256                                      # the loader, from a warm cache
    python tests/bench.py --what prep --num 512                                             # prep_latents.py on toy scenes
    python tests/bench.py --what parts --model T/2 --latent-size 16                         # what each optimisation pays alone
    python tests/bench.py --what curves --model T/2 --steps 300                             # loss curves, plain against fast, on toy scenes
    python tests/bench.py --what fusion --model XL/2 --latent-size 32 --flops               # FLOPs alone, no memory needed
    python tests/bench.py --what heads --model S/2 --latent-size 16 --batch-size 64         # MT-Diffusion over the single task
    python tests/bench.py --what evaluate                                                   # FID, precision and recall of 50,000 features
    python tests/bench.py --what equal --model XL/2 --peer DIR                              # no time: weights in the released format, both codes

--peer DIR is a checkout of jiepengwang/MMGen: its model, loss and loop run by turns with ours on the same tensors, and
`ratio` is its time over ours.
"""
import argparse
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
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import eval_fid  # noqa: E402
import mt_diffusion  # noqa: E402
import prep_latents  # noqa: E402
import sample  # noqa: E402
import toy_scenes  # noqa: E402
import train  # noqa: E402
from distributed import InputError, autocast, run, setup, whole_file  # noqa: E402
from model import FUSIONS, MODALITIES, SIZES, build_model, training_flops  # noqa: E402
from vae import SD_CONFIG, AutoencoderKL, load_vae  # noqa: E402

FOUR = ["rgb", "depth", "normal", "seg"]


def finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def by_turns(rows, rounds, device):
    """Seconds of each function {name: f}, run by turns, each round in another order; the first two rounds warm up.

    Median over the rounds of a row's share of its round, times the median round: a slow spell of the machine hits all rows alike.
    """
    times, names = [], list(rows)
    for round in range(rounds + 2):
        at = round % len(names)
        times.append({})
        for name in names[at:] + names[:at]:
            finish(device)
            start = time.perf_counter()
            rows[name]()
            finish(device)
            times[-1][name] = time.perf_counter() - start
    totals = [sum(t.values()) for t in times[2:]]
    return {name: statistics.median(t[name] / total for t, total in zip(times[2:], totals)) * statistics.median(totals) for name in names}


def matmul_rate(precision, device):
    """FLOP/s of a large matmul, the limit of this machine."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / by_turns({"matmul": lambda: a @ b}, 8, device)["matmul"]


def peak_memory(device):
    """GB: of the device, or resident."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


# ------------------------------------------------------------------------------------------------
# Training.

def synthetic(args):
    """A cache's meta.json and one batch of it, on the CPU."""
    C, S, N, grid = 4, args.latent_size, args.batch_size, args.latent_size // 2
    g = torch.Generator().manual_seed(0)
    meta = dict(modalities=FOUR, latent_channels=C, latent_size=[S, S], num_classes=1000, scale=0.18215, teacher="synthetic", grid=[grid, grid])
    batch = {m: torch.stack([torch.randn(N, C, S, S, generator=g) * 5, torch.randn(N, C, S, S, generator=g) * 0.1 - 3], 1).half() for m in FOUR}
    batch.update(labels=torch.randint(1000, (N,), generator=g), dino=torch.randint(-127, 128, (N, grid * grid, 768), generator=g, dtype=torch.int8))
    return meta, batch


def plain_update(parameters, optimiser):
    """train.update without its gate, a parameter at a time."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm, torch.zeros(())


@torch.no_grad()
def plain_ema(ema, model, step):
    rate = min(0.9999, (1 + step) / (10 + step))
    for old, new in zip(ema.parameters(), model.parameters()):
        old.mul_(rate).add_(new, alpha=1 - rate)


def one_product(model):
    """Tried, not kept: the adaLN products of all blocks as one, their weights stored as one."""
    layers, shares = [block._modules.pop("adaLN_modulation")[1] for block in model.blocks], []
    with torch.no_grad():
        model.stacked = torch.nn.Linear(layers[0].in_features, len(layers) * layers[0].out_features, device=layers[0].weight.device)
        for name in ("weight", "bias"):
            getattr(model.stacked, name).copy_(torch.cat([getattr(layer, name) for layer in layers]))

    def first(c):
        shares[:] = model.stacked(F.silu(c)).chunk(len(layers), -1)  # each (N, 6D)
        return shares[0]
    for i, block in enumerate(model.blocks):
        block.adaLN_modulation = first if i == 0 else lambda c, i=i: shares[i]


def cached_conditioning(model):
    """Tried, not kept: what caching the adaLN products of an equal time and class would save at most; here they are computed once."""
    def once(layer, found=None):
        def product(c):
            nonlocal found
            found = layer(c) if found is None else found
            return found
        return product
    for block in model.blocks:
        block.adaLN_modulation = once(block._modules.pop("adaLN_modulation"))


def our_step(args, device, precision, compile=False, update=train.update, update_ema=train.update_ema, adam=dict(fused=True), read=False, change=lambda model: None):
    """train.py's step: objective, backward pass, clipping, gated AdamW, EMA; or with parts of it replaced."""
    meta, batch = synthetic(args)
    flags = argparse.Namespace(modalities=None, mix="mmgen", repa_weight=0.5, equal_weights=False, no_task_embedding=False, fusion="linear", model=args.model,
                               batch_size=args.batch_size, seed=0, precision=precision)
    objective = train.MMGen(flags, argparse.Namespace(meta=meta, modalities=FOUR, dino=True), device)
    model = objective.model.to(device)
    change(model)
    ema = copy.deepcopy(model).requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, **adam)
    if compile:
        for block in model.blocks:
            block.compile(fullgraph=True)
    batch, micro, count = {k: x.to(device) for k, x in batch.items()}, args.micro_batch or args.batch_size, 0

    def step():
        nonlocal count
        tensors, counts = objective.prepare(count, batch, slice(0, args.batch_size))
        for i in range(0, args.batch_size, micro):
            terms = objective.loss(model, {name: x[i:i + micro] for name, x in tensors.items()})
            train.total_loss(terms, counts, objective.weights).backward()
        norm, _ = update(parameters, optimiser)
        update_ema(ema, model, count)
        if read:
            [x.item() for x in (*terms, norm)]
        count += 1
    return step


def peer_model(args, device):
    """The released network in one of our sizes, with its own defaults."""
    depth, width, heads, encoder_depth = SIZES[args.model]
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module("models.sit").SiT(
            depth=depth, hidden_size=width, decoder_hidden_size=width, patch_size=2, num_heads=heads, input_size=args.latent_size, num_classes=1000, z_dims=[768],
            encoder_depth=encoder_depth, num_tasks=4, is_mmcat_diff=True, use_decouple_task=True, use_taskcond_emb=True, fused_attn=True, qk_norm=False).to(device)


@torch.inference_mode()
def equality(args, device):
    """A file in the released format through both codes, fp32: velocities of 20 random inputs, 10 Euler-Maruyama steps with equal noise.

    Every parameter but the positions is drawn from N(0, 0.04), of XL/2 N(0, 0.02): a fresh network's output is 0.
    """
    device = torch.device("cpu")  # the figures are of fp32 there
    torch.manual_seed(0)
    theirs, std = peer_model(args, device).eval(), 0.02 if args.model == "XL/2" else 0.04
    for name, p in theirs.named_parameters():
        p.normal_(std=std) if "pos_embed" not in name else None
    with tempfile.TemporaryDirectory() as folder:
        torch.save(dict(ema=theirs.state_dict(), args=argparse.Namespace(encoder_depth=SIZES[args.model][3]), steps=0), f"{folder}/0000000.pt")
        ours = sample.open_model(pathlib.Path(folder) / "0000000.pt", device)
        worst, values = 0.0, []
        for i in range(20):
            x, t, y, given = torch.randn(1, 16, args.latent_size, args.latent_size), torch.rand(1, 4), torch.randint(1001, (1,)), torch.arange(4)[None] == i % 5 - 1
            condition = dict(lis_idx_taskcond_rand=torch.tensor([i % 5])) if i % 5 else {}
            values.append(-theirs(x, (1 - t).repeat_interleave(4, 1)[:, :, None, None], y, **condition)[0])
            worst = max(worst, (ours(x, t, y, given)[0] - values[-1]).abs().max().item())
        result = {"velocities": dict(difference=worst, std=torch.stack(values).std().item())}
        for task in (None, *range(4)):
            given, held, y = torch.arange(4) == (-1 if task is None else task), torch.randn(1, 16, args.latent_size, args.latent_size), torch.tensor([7])
            mine = sample.draw_latents(ours, y, held, given, sample.Noise(0, [0], device), "sde", 10)
            noise, free = sample.Noise(0, [0], device), ~given.repeat_interleave(4)
            blended = sample.GIVEN_TIME * held + (1 - sample.GIVEN_TIME) * noise(held.shape[1:])
            x = torch.where(free[None, :, None, None], noise(held.shape[1:]), blended)
            with mock.patch("torch.randn_like", lambda x: noise(x.shape[1:]).double()):
                other = importlib.import_module("samplers").euler_maruyama_sampler(theirs, x, y, 10, condition_task=task)
            result["trajectory, category" if task is None else f"trajectory, {FOUR[task]} given"] = dict(difference=(mine - other)[:, free].abs().max().item())
    return result


def peer_step(args, device, precision):
    """The released loop's step with its own model and loss: posterior, loss, reads for its log, clipping, AdamW, EMA."""
    model, loss = peer_model(args, device).train(), importlib.import_module("loss")
    with contextlib.redirect_stdout(io.StringIO()):
        objective = loss.SILoss(use_decouple_task=True, num_tasks=4, ratio_train_onlyrgb=0.5, use_quater_mixing=True, use_decouple_rand1=True)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    _, batch = synthetic(args)
    means, stds = (torch.cat([batch[m][:, k].float() for m in FOUR], 1).to(device) for k in (0, 1))
    stds, classes, features = stds.exp(), batch["labels"].to(device), batch["dino"].float().to(device)
    kind, micro = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision], args.micro_batch or args.batch_size

    def step():
        for rows in (slice(i, i + micro) for i in range(0, args.batch_size, micro)):
            x = (means[rows] + stds[rows] * torch.randn_like(means[rows])) * 0.18215
            with torch.autocast(device.type, kind, enabled=precision != "fp32"):
                errors, alignment, mask = objective(model, x, dict(y=classes[rows]), zs=[features[rows]])
            total = 0.0
            for error, valid, weight in zip(errors.chunk(4, 1), mask.chunk(4, 1), (1.0, 0.2, 0.1, 0.1)):
                supervised = error.flatten(1).mean(1)[valid[:, 0, 0, 0] > 0]
                if len(supervised):  # it reads the host here, and each item below
                    total = total + weight * supervised.mean()
                    supervised.mean().item()
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
        [x.item() for x in (total, alignment.mean(), norm)]
    return step


def training(args, device):
    """Training throughput, with --compile also compiled; with --peer the released loop by turns, in its own precision (fp16 on CUDA, fp32 on a CPU) and in ours.

    ratio: its time over ours; memory on CUDA: of that row alone, on a CPU of the whole run.
    """
    cuda, result, rows = device.type == "cuda", {}, {}
    precisions = [args.precision] if cuda else dict.fromkeys(("fp32", args.precision))
    makers = {f"ours{', compiled' if compile else ''}, {p}": functools.partial(our_step, args, device, p, compile) for compile in (False, True)[:1 + args.compile] for p in precisions}
    makers |= {f"peer, {p}": functools.partial(peer_step, args, device, p) for p in dict.fromkeys(("fp16" if cuda else "fp32", args.precision)) if args.peer}
    for name, make in makers.items():
        before = torch.cuda.memory_allocated() if cuda else 0
        torch.cuda.reset_peak_memory_stats() if cuda else None
        rows[name] = make()
        [rows[name]() for _ in range(2)]
        result[name] = dict(peak_GB=peak_memory(device) - before / 1e9) if cuda else {}
    meta, _ = synthetic(args)
    flops = training_flops(name=args.model, modalities=FOUR, num_classes=1000, latent_channels=4, latent_size=meta["latent_size"])
    seconds = by_turns(rows, args.rounds, device)
    first = next((name for name in rows if name.startswith("peer")), None)
    for name, t in seconds.items():
        rate, who, precision = args.batch_size * flops / t, name.split(", ")[0], name.split(", ")[-1]
        result[name].update(ms=1e3 * t, img_per_s=args.batch_size / t, tflops=rate / 1e12)
        if who == "ours":
            result[name].update(matmul_share=rate / matmul_rate(precision, device))
            result[name].update({"ratio": seconds[first] / t} if first else {})
            result[name].update({"ratio_at_equal_precision": seconds[f"peer, {precision}"] / t} if f"peer, {precision}" in seconds else {})
    return {**result, **({} if cuda else {"memory": dict(peak_GB=peak_memory(device))})}


# ------------------------------------------------------------------------------------------------
# Sampling, loading, preparing.

@contextlib.contextmanager
def tf32(device):
    """As the released sampler runs: its --tf32 is on."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def sampling(args, device):
    """--steps of a sampler for a batch of category samples; the peer's Euler, Heun or Euler-Maruyama in its fp32 (TF32 on CUDA).

    The network alone, or with --decode also the four modalities by a random Stable Diffusion autoencoder: ours batched, the
    peer's one modality after the other.
    """
    n, theirs = args.batch_size, args.peer_batch or args.batch_size
    inputs = lambda n: (torch.arange(n, device=device) % 1000, torch.zeros(n, 16, args.latent_size, args.latent_size, device=device), torch.zeros(4, dtype=torch.bool))
    rows = {}
    for precision in [args.precision] if device.type == "cuda" else dict.fromkeys(("fp32", args.precision)):
        model = build_model(args.model, latent_size=args.latent_size, projector=False).to(device).eval().requires_grad_(False)
        vae = AutoencoderKL(**SD_CONFIG).to(device, memory_format=torch.channels_last).eval().requires_grad_(False) if args.decode else None
        for block in model.blocks:
            block.bfloat16() if precision == "bf16" else None
            block.compile(fullgraph=True) if args.compile else None

        def draw(model=model, vae=vae, precision=precision):
            x = sample.draw_latents(model, *inputs(n), sample.Noise(0, range(n), device), args.sampler, args.steps, args.cfg, precision=precision)
            return sample.decode_latents(vae, x, 4, precision).cpu() if vae else x
        rows[f"ours, {precision}"] = draw
    if args.peer:
        if args.sampler not in ("euler", "heun", "sde"):
            raise InputError(f"--sampler {args.sampler}: the released code has euler, heun and sde")
        peer, samplers = peer_model(args, device).eval(), importlib.import_module("samplers")
        vae = AutoencoderKL(**SD_CONFIG).to(device).eval().requires_grad_(False) if args.decode else None

        @torch.no_grad()
        def draw():
            y, x, _ = inputs(theirs)
            with tf32(device):
                x = {"euler": lambda x: samplers.euler_sampler(peer, x, y, args.steps, cfg_scale=args.cfg, use_decouple_task=True),
                     "heun": lambda x: samplers.euler_sampler(peer, x, y, args.steps, heun=True, cfg_scale=args.cfg, use_decouple_task=True),
                     "sde": lambda x: samplers.euler_maruyama_sampler(peer, x, y, args.steps, cfg_scale=args.cfg)}[args.sampler](torch.randn_like(x))
                return [vae.decode(part.float() / 0.18215).cpu() for part in x.chunk(4, 1)] if vae else x
        rows["peer, fp32"] = draw
    seconds = by_turns(rows, args.rounds, device)
    rate = {name: (theirs if name.startswith("peer") else n) / t for name, t in seconds.items()}
    return {name: dict(s=t, img_per_s=rate[name]) | ({"ratio": rate[name] / rate["peer, fp32"]} if args.peer and not name.startswith("peer") else {}) for name, t in seconds.items()}


def loading(args, device):
    """Samples a second from prefetch, of a cache of --num rows in the page cache, with and without alignment targets."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        folder, n, S, grid = pathlib.Path(folder), args.num, args.latent_size, args.latent_size // 2
        meta = dict(format=prep_latents.FORMAT, modalities=FOUR, vae="sd-mse", vae_sha256=None, scale=0.18215, latent_channels=4, latent_size=[S, S], resolution=8 * S, count=n,
                    num_classes=1000, class_names=[str(i) for i in range(1000)], palette=None, grid=[grid, grid], teacher="synthetic", names_sha256="", seg_mode="instance",
                    depth_space="disparity", batch_size=32)
        (folder / "meta.json").write_text(json.dumps(meta))
        rng = np.random.default_rng(0)
        for m in FOUR:
            np.save(folder / f"{m}.npy", rng.standard_normal((n, 2, 4, S, S), np.float32).astype(np.float16))
        np.save(folder / "dino.npy", rng.integers(-127, 128, (n, grid * grid, 768), np.int8))
        np.save(folder / "labels.npy", rng.integers(0, 1000, n))
        np.save(folder / "done.npy", np.ones(n, np.uint8))
        result = {}
        for name, dino in (("with DINO", True), ("without", False)):
            cache, steps = train.Cache(folder, need_dino=dino), range(max(8, 3 * n // args.batch_size))
            stems = FOUR + ["labels"] + ["dino"] * dino
            for _ in train.prefetch(cache, stems, 0, steps, args.batch_size, slice(0, args.batch_size), device):  # warms up
                pass
            start = time.perf_counter()
            for _ in train.prefetch(cache, stems, 1, steps, args.batch_size, slice(0, args.batch_size), device):
                pass
            t = time.perf_counter() - start
            size = sum(cache.arrays[stem][0].nbytes for stem in stems)
            result[name] = dict(samples_per_s=len(steps) * args.batch_size / t, GB_per_s=len(steps) * args.batch_size * size / t / 1e9)
    return result


def command(module, *argv):
    """Run a command's main in this process."""
    with mock.patch.object(sys, "argv", [module.__name__, *map(str, argv)]):
        module.main()


def curves(args, device):
    """Loss curves of train.py over --steps, in ten windows, three seeds: plain (fp32, eager, clipping and EMA a parameter at a time) and fast (as on CUDA).

    distance: mean over the windows of the absolute difference of two curves, as a share of the loss.
    """
    found, weights = {}, dict(rgb=1, depth=0.2, normal=0.1, seg=0.1, repa=0.5)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        command(prep_latents, "--toy", args.num, "--out", f"{folder}/cache", "--batch-size", 64)
        for kind, flags, replaced in (("plain", ["--precision", "fp32", "--no-compile"], dict(update=plain_update, update_ema=plain_ema)), ("fast", ["--compile"], {})):
            for seed in range(3):
                run = pathlib.Path(folder, f"{kind}{seed}")
                with mock.patch.multiple(train, **replaced) if replaced else contextlib.nullcontext():
                    command(train, "--data", f"{folder}/cache", "--run", run, "--model", args.model, "--batch-size", args.batch_size, "--steps", args.steps, "--lr", 5e-4,
                            "--seed", seed, "--log-every", max(1, args.steps // 10), *flags)
                entries = map(json.loads, (run / "log.jsonl").read_text().splitlines())
                found[kind, seed] = np.array([sum(w * entry[f"loss_{m}"] for m, w in weights.items()) for entry in entries])
    distance = lambda a, b: float(np.mean(np.abs(found[a] - found[b]) / (np.abs(found[a]) + np.abs(found[b])) * 2))
    pairs = [(0, 1), (0, 2), (1, 2)]
    at = lambda curve: {f"step {args.steps * (k + 1) // len(curve)}": float(x) for k, x in enumerate(curve)}
    return {**{f"{kind}, seed {seed}": at(curve) for (kind, seed), curve in found.items()},
            "distance": {"fast to plain, equal seed": float(np.mean([distance(("plain", i), ("fast", i)) for i in range(3)])),
                         "plain to plain, seed to seed": float(np.mean([distance(("plain", i), ("plain", j)) for i, j in pairs])),
                         "fast to fast, seed to seed": float(np.mean([distance(("fast", i), ("fast", j)) for i, j in pairs]))}}


def preparing(args, device):
    """prep_latents.py on --num toy scenes: scenes a second, and the share of the time in the encoder."""
    inside, encode = [0.0], prep_latents.encode

    def timed(vae, pixels, device):
        finish(device)
        start = time.perf_counter()
        out = encode(vae, pixels, device)
        inside[0] += time.perf_counter() - start
        return out
    prep_latents.encode = timed
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        start = time.perf_counter()
        command(prep_latents, "--toy", args.num, "--out", f"{folder}/cache", "--batch-size", args.batch_size)
        t = time.perf_counter() - start
    return {"prep": dict(img_per_s=args.num / t, encoder_share=inside[0] / t)}


# ------------------------------------------------------------------------------------------------
# What each optimisation pays, alone on top of the plain version.

def parts(args, device):
    """Speed-up of each part of the training step and of sampling over the plain version, by turns; the last of each group is all that is kept."""
    plain = dict(compile=False, update=plain_update, update_ema=plain_ema, adam=dict(foreach=False, fused=False), read=True)
    step = lambda precision="fp32", **parts: our_step(args, device, precision, **{**plain, **parts})
    groups = {"training": {"plain": step(), "bf16": step("bf16"), "compiled blocks": step(compile=True), "no reads by the host": step(read=False),
                           "all adaLN products as one (not kept)": step(change=one_product), "all that is kept": our_step(args, device, "bf16", compile=True)}}

    def after_backward(update, update_ema, **adam):
        model = build_model(args.model, latent_size=args.latent_size).to(device)
        ema, parameters = copy.deepcopy(model), [p for p in model.parameters() if p.requires_grad]
        gradients, optimiser = [torch.randn_like(p) for p in parameters], torch.optim.AdamW(parameters, **adam)

        def work():
            for p, gradient in zip(parameters, gradients):
                p.grad = gradient
            update(parameters, optimiser)
            update_ema(ema, model, 10 ** 6)
        return work
    groups["clipping, AdamW, EMA"] = {"a parameter at a time": after_backward(plain_update, plain_ema, foreach=False, fused=False), "fused AdamW": after_backward(plain_update, plain_ema, fused=True),
                                      "and foreach clipping, gated": after_backward(train.update, plain_ema, fused=True), "and foreach EMA": after_backward(train.update, train.update_ema, fused=True)}

    n, S = args.batch_size, args.latent_size
    y, held, nothing = torch.arange(n, device=device) % 1000, torch.zeros(n, 16, S, S, device=device), torch.zeros(4, dtype=torch.bool)

    def draw(precision="fp32", compile=False, projector=False, cfg=1.0, interval=(0.0, 1.0), change=lambda model: None):
        model = build_model(args.model, latent_size=S, projector=projector).to(device).eval().requires_grad_(False)
        change(model)
        for block in model.blocks if compile else ():
            block.compile(fullgraph=True)
        return lambda: sample.draw_latents(model, y, held, nothing, sample.Noise(0, range(n), device), "euler", 4, cfg, interval, precision)

    def rounded(model):
        for block in model.blocks:
            block.bfloat16()
    groups["sampling"] = {"plain": draw(projector=True), "bf16": draw("bf16", projector=True), "bf16, weights rounded once": draw("bf16", projector=True, change=rounded), "compiled blocks": draw(compile=True, projector=True), "without projector": draw(),
                          "all adaLN products as one (not kept)": draw(projector=True, change=one_product),
                          "adaLN products cached (not kept)": draw(projector=True, change=cached_conditioning), "all that is kept": draw("bf16", compile=True, change=rounded)}
    groups["guidance, scale 2"] = {"at all noise levels": draw(cfg=2.0), "at levels from 0 to 0.7": draw(cfg=2.0, interval=(0.0, 0.7))}

    vae = load_vae("toy").to(device)
    z = torch.randn(n, 16, S, S, device=device)
    groups["decoding, toy autoencoder"] = {"a modality of a sample at a time": lambda: [sample.decode_latents(vae, part[None], 4) for part in z.reshape(-1, 4, S, S)],
                                           "batched": lambda: sample.decode_latents(vae, z, 4), "batched, bf16": lambda: sample.decode_latents(vae, z, 4, "bf16")}
    pixels = [MODALITIES["rgb"].to_pixels(toy_scenes.render(i, 256).rgb) for i in range(64)]

    def write(threads):
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder, sample.Writer(pathlib.Path(folder), ["rgb"], "crop", False, threads) as writer:
            for i, image in enumerate(pixels):
                writer(sample.Item(i, str(i), 0, {}), {"rgb": image})
    groups["writing 256 px PNG"] = {"one thread": lambda: write(1), "4 threads": lambda: write(4)}
    result = {}
    for group, rows in groups.items():
        seconds = by_turns(rows, args.rounds, device)
        first = next(iter(seconds.values()))
        result.update({f"{group}: {name}": dict(ms=1e3 * t, ratio=first / t) for name, t in seconds.items()})
    return result


# ------------------------------------------------------------------------------------------------
# Architecture.

def inputs(model, batch_size, device):
    M, C, (H, W) = len(model.modalities), model.latent_channels, model.latent_size
    given = torch.zeros(batch_size, M, dtype=torch.bool, device=device)
    return (torch.randn(batch_size, M * C, H, W, device=device), torch.rand(batch_size, M, device=device),
            torch.zeros(batch_size, dtype=torch.long, device=device), given)


def step(model, batch, precision, device):
    """One forward and backward pass."""
    with autocast(device, precision):
        v, z = model(*batch)
    (v.float().square().mean() + z.float().mean()).backward()
    model.zero_grad(set_to_none=True)


def fusion(args, device):
    """The cost of four modalities, fused or as a sequence, beside RGB alone: FLOPs, and time by turns in one run."""
    rows = {"rgb only": dict(modalities=("rgb",)), **{name: dict(fusion=name) for name in FUSIONS}}
    common = dict(name=args.model, latent_size=args.latent_size)
    result = {name: {"gflops": training_flops(**common, **options) / 1e9} for name, options in rows.items()}
    if not args.flops:
        models = {name: build_model(**common, **options).to(device).train() for name, options in rows.items()}
        work = {name: functools.partial(step, model, inputs(model, args.batch_size, device), args.precision, device) for name, model in models.items()}
        for name, seconds in by_turns(work, args.rounds, device).items():
            result[name]["ms_per_sample"] = 1e3 * seconds / args.batch_size
    for row in result.values():
        row.update({f"{key}_ratio": row[key] / result["linear"][key] for key in ("gflops", "ms_per_sample") if key in row})
    return result


def heads(args, device):
    """MT-Diffusion's training step over that of a model of the noise alone, which sees X as well, by turns in one run.

    Image heads: the backbone with the second head against the same with one. Label: the head (-M), with E(y), and the
    classifier on the output (-E), against none.
    """
    n, size, rows = args.batch_size, (4, args.latent_size, args.latent_size), {}
    common = dict(num_classes=args.classes, latent_channels=4, latent_size=args.latent_size)
    z, k, seen = torch.randn(n, *size, device=device), torch.randint(1000, (n,), device=device), torch.ones(n, dtype=torch.bool, device=device)
    y = torch.arange(n, device=device) % args.classes
    image, label = (mt_diffusion.build(args.model, pair, ["rgb"] * (1 + (pair == "masked")), **common).to(device) for pair in ("masked", "label"))
    output = mt_diffusion.build(args.model, "label", ["rgb"], head="output", **common).to(device)
    single = mt_diffusion.build(args.model, "masked", ["rgb", "rgb"], **common).to(device)
    del single.backbone.heads[1]
    zero = torch.zeros_like(z)

    def both():
        return sum(part.float().square().mean() for part in image(z, k, z, seen))

    def alone():
        out, _ = single.backbone(torch.cat([z, z], 1), torch.stack([1 - k / 1000, seen.float()], 1), y * 0, torch.stack([~seen, seen], 1))
        return out.float().square().mean()

    def with_label(model, encode):
        e = model.encode(y) if encode else zero
        eps, logits = model(z + 0 * e, k, y, ~seen)
        return eps.float().square().mean() + model.x_error(logits, y).mean()

    def without_label():
        return label.backbone(z, 1 - k[:, None] / 1000, y, ~seen[:, None])[0].float().square().mean()

    rows = {"image, single": alone, "image, both": both, "label, single": without_label, "label, head -M": lambda: with_label(label, False),
            "label, head -M and E(y)": lambda: with_label(label, True), "label, head -E": lambda: with_label(output, False)}
    def work(loss):
        with autocast(device, args.precision):
            value = loss()
        value.backward()
    seconds = by_turns({name: functools.partial(work, loss) for name, loss in rows.items()}, args.rounds, device)
    return {name: {"ms_per_sample": 1e3 * t / n, "ratio": t / seconds[name.split(",")[0] + ", single"]} for name, t in seconds.items()}


def evaluate(args, device):
    """eval_fid.py's arithmetic on 50,000 synthetic features of 2048 against 10,000."""
    samples, reference = (torch.randn(n, 2048, generator=torch.Generator().manual_seed(n)).abs_().to(device) for n in (50_000, 10_000))

    def moments(features):
        sums = torch.zeros(2049, 2048, dtype=torch.float64, device=device)
        for part in features.split(64):
            eval_fid.add_moments(sums, part)
        return eval_fid.finish_moments(sums, len(features))

    clock = [time.perf_counter()]
    both = [*moments(samples), *moments(reference)]
    clock.append(time.perf_counter())
    eval_fid.frechet(*(m.cpu() for m in both))
    clock.append(time.perf_counter())
    eval_fid.precision_recall(samples, reference)
    clock.append(time.perf_counter())
    return {"seconds": dict(zip(("moments", "frechet", "precision_recall"), (b - a for a, b in zip(clock, clock[1:])))) | {"all": clock[-1] - clock[0]},
            "memory": {"peak_GB": peak_memory(device)}}


WHAT = {"train": training, "sample": sampling, "load": loading, "prep": preparing, "curves": curves, "parts": parts, "fusion": fusion, "heads": heads, "evaluate": evaluate,
        "equal": equality}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=list(WHAT), required=True)
    parser.add_argument("--model", default="S/2")
    parser.add_argument("--latent-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, help="train: rows in one forward pass")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="on a CPU train and sample measure fp32 as well")
    parser.add_argument("--compile", action="store_true", help="train, sample: our blocks")
    parser.add_argument("--peer", type=pathlib.Path, metavar="DIR", help="train, sample: a checkout of jiepengwang/MMGen to run by turns")
    parser.add_argument("--decode", action="store_true", help="sample: the four modalities too, by a random Stable Diffusion autoencoder")
    parser.add_argument("--peer-batch", type=int, help="sample: rows that the peer draws at once")
    parser.add_argument("--sampler", choices=list(sample.SAMPLERS), default="euler")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--num", type=int, default=4096, help="load, prep: rows")
    parser.add_argument("--scratch", type=pathlib.Path, help="load, prep: folder for the temporary cache")
    parser.add_argument("--classes", type=int, default=1000, help="heads: of the label setting")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--flops", action="store_true", help="fusion: count only")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    if args.what == "equal" and not args.peer:
        raise InputError("--what equal: needs --peer DIR")
    if args.peer:
        if not (args.peer / "models" / "sit.py").is_file():
            raise InputError(f"--peer {args.peer}: no checkout of jiepengwang/MMGen, models/sit.py is missing")
        sys.path.insert(0, str(args.peer))
        for name in ("models", "loss", "samplers"):
            sys.modules.pop(name, None)
    _, _, device = setup()
    result = WHAT[args.what](args, device)
    for name, row in result.items():
        print(f"{name:15s}" + "".join(f"  {key} {value:.4g}" for key, value in row.items()))
    if args.json:
        recipe = dict(command=" ".join(["tests/bench.py", *[{str(args.peer): "DIR", str(args.json): "FILE", str(args.scratch): "DIR"}.get(a, a) for a in sys.argv[1:]]]), threads=torch.get_num_threads(),
                      torch=torch.__version__, device=torch.cuda.get_device_name() if device.type == "cuda" else device.type)
        with whole_file(args.json) as file:
            file.write(json.dumps({**result, "recipe": recipe}, indent=1).encode())


if __name__ == "__main__":
    run(main)
