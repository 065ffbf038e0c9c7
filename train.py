"""Stage 3: train MMGen (Sec. 3.3). The defaults are the paper's run.

    torchrun --nproc_per_node=8 -- train.py                                     # ImageNet cache in data/cache
    python train.py --data data/toy --model T/2 --steps 3000 --batch-size 64    # the toy world on a laptop

The same command continues an interrupted run: on a CPU bit for bit with as many processes and threads, else
up to rounding. A step's draws are a function of (seed, step) and the kind of device, made for the whole
global batch and then sliced.
"""
import argparse
import contextlib
import copy
import pathlib
import sys

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dataset
import runs
from distributed import (autocast, barrier, check, check_ranges, command_parser, place, run, say, setup,
                         with_row)
from evaluation import ModelPredictor, Watch
from layers import BLOCKS
from locks import only_writer
from mix import ROLES, TASK_MIX, TIMES, Draws, check_mix, draws_of
from modalities import MODALITIES
from mixture import open_caches
from model import FUSIONS, PROJECTORS, SIZES, MMDiT, build_model, training_flops
from optimisers import OPTIMISERS, schedule, set_rates, update, update_ema
from samplers import Sampling, make_fast, sample_latents
from transfer import ages_of, init_from, renamed
from vae import latents
from weights import blocks_of, load_checkpoint

RECIPES = {  # what --recipe stands for
    "paper": "",
    "better": "--optimiser muon --blocks modern --times early",  # results/README.md, "A better learner"
}


# ------------------------------------------------------------------------------------------------
# The objective.

def interpolate(x0, noise, t, channels):
    """The linear path (Eq. 1): x_t = t x0 + (1 - t) eps, and its velocity x0 - eps; t (N, M)."""
    t = t.repeat_interleave(channels, 1)[:, :, None, None]  # (N, M*C, 1, 1)
    return t * x0 + (1 - t) * noise, x0 - noise


def velocity_error(v, target, supervised, known=None):
    """v, target (N, M*C, H, W) -> the mean square of each row and modality, else 0: (N, M) fp32; over the
    known cells (N, M, H, W), None for all.
    """
    error = (v.float() - target).square().unflatten(1, (supervised.shape[1], -1))        # (N, M, C, H, W)
    if known is None:
        return torch.where(supervised, error.mean((2, 3, 4)), 0.0)
    cells = torch.where(known, error.mean(2), 0.0).sum((2, 3))                           # (N, M)
    return torch.where(supervised, cells / known.sum((2, 3)).clamp(min=1), 0.0)


def alignment_error(z, dino):
    """REPA: the negative cosine of hidden states and targets (N, T, 768) of any scale: (N,) fp32."""
    cosine = (F.normalize(z.float(), dim=-1) * F.normalize(dino.float(), dim=-1)).sum(-1)  # (N, T)
    return -cosine.mean(1)


def spatial(dino):
    """iREPA's targets (N, T, 768): unit tokens, each channel z-scored over a sample's tokens; fp32."""
    unit = F.normalize(dino.float(), dim=-1)
    std, mean = torch.std_mean(unit, 1, correction=0, keepdim=True)  # (N, 1, 768) each
    return (unit - mean) / (std + 1e-6)


def total_loss(sums, counts, weights):
    """Sums (K,) over some rows, counts (K,) of the global batch -> their share of the loss: shares add up."""
    return (weights * sums / counts.clamp(min=1)).sum()


class MMGen:
    """The objective of the paper: velocities and REPA. What an objective brings to the loop of `train`:

    method      its name in checkpoints; group: so many rows go together
    shaping     flags that a resume compares through model.config instead
    options     {name: default} of what an older file's model.config may lack
    settings    flags as they came out (REPA's weight is 0 without targets): checkpoints keep these
    add_flags   (parser): its own flags
    meta        the cache's meta.json; cache, device: what previews and evaluations read
    model       the network; backbone, what of it has the transformer's blocks; summary(), for the first line
    terms       names of its K terms in log.jsonl; weights_at(step), (K,), of them in the loss
    reads       the cache's arrays that it needs; modalities: of which it must know what a row has
    prepare     (step, a batch on the device, this process's slice of the global batch) -> {tensors of its
                rows}, counts (K,) of the global batch, known before the forward pass
    loss        (network, {tensors of some rows}) -> (K,) sums over them; the network may wrap the model
    initialise  (checkpoint, path) -> --init's table, {weight taken as it is: the file's name of it}
    conditions  modalities that can be given; predicts: those that it predicts of the RGB
    draw        (network, y, {given modality: latents}, noise) -> latents of all modalities
    predictor   (network, encoder, metrics) -> a predictor of evaluation.py
    """

    method, group = "mmgen", ROLES
    shaping = ("model", "fusion", "modalities", "no_task_embedding", "blocks", "projector", "recipe")
    options = runs.options_of(MMDiT)

    @staticmethod
    def add_flags(parser):
        """Its own flags: the task mix, the loss, and what shapes the network."""
        parser.add_argument("--mix", default="mmgen", choices=list(TASK_MIX))
        parser.add_argument("--modalities", nargs="+", choices=list(MODALITIES), help="default: the cache's")
        parser.add_argument("--equal-weights", action="store_true", help="loss weight 1 for every modality")
        parser.add_argument("--repa-weight", type=float, default=0.5)
        parser.add_argument("--repa-until", type=int, metavar="STEP", help="REPA's weight is 0 from there on")
        parser.add_argument("--times", default="uniform", choices=list(TIMES), help="how t is drawn")
        parser.add_argument("--recipe", choices=list(RECIPES), help="a row of RECIPES, before your own flags")
        parser.add_argument("--no-task-embedding", action="store_true")
        parser.add_argument("--blocks", choices=list(BLOCKS), help="default: the run's, --init's, sit")
        parser.add_argument("--projector", default="mlp", choices=list(PROJECTORS), help="REPA's")
        parser.add_argument("--middle-weight", type=float, default=0.0, help="of internal guidance's heads")
        parser.add_argument("--rename", nargs="+", default=(), metavar="THEIRS=OURS",
                            help="a modality of --init's file goes on as another one")

    def __init__(self, args, cache, device):
        self.args, self.cache, self.meta, self.device = args, cache, cache.meta, device
        self.modalities = [m for m in MODALITIES if m in (args.modalities or cache.modalities)]
        check_mix(args.mix, self.modalities, cache.modalities)
        check_ranges(args, repa_weight=(0, 1000), middle_weight=(0, 1000), repa_until=(0, None))
        repa_weight = args.repa_weight if "dino" in cache.stems else 0.0
        blocks = args.blocks or blocks_of(runs.latest(args.run) or args.init)
        self.settings, self.middle = {"repa_weight": repa_weight, "blocks": blocks}, args.middle_weight > 0
        self.model = self.backbone = build_model(
            args.model, self.modalities, self.meta["num_classes"], self.meta["latent_channels"],
            self.meta["latent_size"], fusion=args.fusion, task_embedding=not args.no_task_embedding,
            projector=repa_weight > 0, blocks=blocks, projector_kind=args.projector,
            middle_heads=self.middle)
        self.conditions, self.predicts = self.modalities, self.modalities[1:]
        self.reads = [stem for stem in ("labels", *self.modalities) if stem in cache.stems]
        self.reads += ["dino"] * (repa_weight > 0)
        self.reads += [stem for m in self.modalities if (stem := f"{m}_known") in cache.stems]
        heads = {m: 1.0 if args.equal_weights else MODALITIES[m].loss_weight for m in self.modalities}
        weights = {**heads, "repa": repa_weight}
        if self.middle:
            weights |= {f"middle_{m}": args.middle_weight * weight for m, weight in heads.items()}
        self.terms = [f"loss_{term}" for term in weights]
        self.weights = torch.tensor(list(weights.values()), device=device)

    def weights_at(self, step):
        weights = self.weights.clone()
        if self.args.repa_until is not None and step >= self.args.repa_until:
            weights[self.terms.index("loss_repa")] = 0.0
        return weights

    def summary(self):
        flops = training_flops(self.model.config) / 1e9
        aligned = "" if self.settings["repa_weight"] else "; training without REPA"
        why = "" if "dino" in self.cache.stems else " (the cache has no alignment targets)"
        return f"{', '.join(self.modalities)}{aligned}{why}; {flops:.1f} GFLOPs a sample and step"

    def initialise(self, checkpoint, path):
        names = renamed(checkpoint, self.args.rename, self.modalities, path), self.modalities
        return init_from(self.model, self.meta, checkpoint, path, names=names)

    def prepare(self, step, batch, part):
        """n rows of the step: draws of the whole batch, sliced; noised latents and targets (n, M*C, H, W)."""
        C, N = self.meta["latent_channels"], self.args.batch_size
        shape = (N, len(self.modalities) * C, *self.meta["latent_size"])
        draws = draws_of(self.args.seed, step, self.args.mix, self.modalities, batch["known"], shape,
                         self.args.times)
        supervised = draws.supervised.sum(0)                                                 # (M,)
        aligned = batch["aligned"]                                                           # (N,)
        counts = torch.cat([supervised, aligned.sum()[None], *[supervised] * self.middle])   # (K,)
        mine = Draws(*(x[part] for x in draws))
        parts = [latents(batch[m], normals, self.meta) if m in batch else torch.zeros_like(normals)
                 for m, normals in zip(self.modalities, mine.posterior.split(C, 1))]
        x0 = torch.cat(parts, 1)                                                             # (n, M*C, H, W)
        x, target = interpolate(x0, mine.noise, mine.t, C)                                   # (n, M*C, H, W)
        y = torch.where(mine.null, self.meta["num_classes"], batch["labels"])                # (n,)
        rows = dict(x=x, target=target, t=mine.t, y=y, given=mine.given, supervised=mine.supervised,
                    aligned=aligned[part])
        cells = dataset.cells_in(batch, self.modalities, self.meta)
        rows |= {} if cells is None else {"cells": cells}                                    # (n, M, H, W)
        if "dino" in batch:
            conv = self.args.projector == "conv"
            rows["dino"] = spatial(batch["dino"]) if conv else batch["dino"]                 # (n, T, 768)
        return rows, counts

    def loss(self, network, rows):
        """{tensors (n, ...)} -> the sums (K,) of the terms over these rows, fp32."""
        with autocast(self.device, self.args.precision):
            v, z, *v_mid = network(rows["x"], rows["t"], rows["y"], rows["given"], middle=self.middle)
        truth = rows["target"], rows["supervised"], rows.get("cells")
        errors = torch.stack([velocity_error(x, *truth) for x in (v, *v_mid)])               # (1 or 2, n, M)
        repa = errors.new_zeros(len(v)) if z is None else alignment_error(z, rows["dino"])   # (n,)
        repa = torch.where(rows["aligned"], repa, 0.0)                                       # (n,)
        return torch.cat([errors[0].sum(0), repa.sum(0, keepdim=True), *errors[1:].sum(1)])  # (K,)

    def draw(self, network, y, given, noise):
        return sample_latents(network, y, given, noise, Sampling("euler", 25))

    def predictor(self, network, encoder, metrics):
        return ModelPredictor(network, self.meta["resolution"], encoder, Sampling("euler", 2), metrics)


# ------------------------------------------------------------------------------------------------
# The loop.

def begin(args, config, objective, defaults):
    """Weights, averages and optimiser: fresh, of --init, or of the run's latest checkpoint -> the EMA, the
    trained parameters, the optimiser, the step, the ages of update_ema.

    defaults: the values of flags that an older checkpoint lacks.
    """
    model, backbone = objective.model, objective.backbone
    file, first, ages = runs.latest(args.run), 0, {}
    if args.init and not file:
        checkpoint = load_checkpoint(args.init)
        table, taken = objective.initialise(checkpoint, args.init)
        say(table)
        ages = ages_of(checkpoint, taken) if args.ema_from_init else {}
    model.to(objective.device)
    backbone.checkpointing = args.checkpointing
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = OPTIMISERS[args.optimiser](parameters, backbone.blocks, args.beta2, args.precision)
    if file:
        older = {"model": objective.options, "train": {**defaults, "method": "mmgen"},
                 "meta": {"shown": {}, "space": config["meta"].get("space")}}  # vae_sha256 says as much
        checkpoint = runs.checkpoint_of(file, config, older, objective.shaping)
        first, ages = runs.restore(checkpoint, model, ema, optimiser)
    runs.agree(args.run, first)
    return ema, parameters, optimiser, first, ages


def train(args, objective, defaults):
    """Train, or continue an interrupted run: the loop with log, previews and checkpoints; defaults as of
    begin.
    """
    (rank, world), cache, device = place(), objective.cache, objective.device
    part = dataset.part_of(args.batch_size, args.micro_batch, rank, world, objective.group)
    n, micro, terms = part.stop - part.start, args.micro_batch, objective.terms
    model, backbone = objective.model, objective.backbone
    config = {"model": model.config, "meta": cache.meta, "train": runs.flags_of(args, objective)}
    ema, parameters, optimiser, first, ages = begin(args, config, objective, defaults)
    watch = Watch(objective, args.run / "previews", args.preview_every, args.eval_every, args.eval_toy,
                  args.eval_data)
    log = runs.Log(args.run, first, {**vars(args), "world": world, "resumed_at": first}, args.tensorboard)
    rates = {"lr": args.lr, "muon_lr": args.muon_lr}
    said = ", ".join(f"{name} {rate:g}" for name, rate in set_rates(optimiser, rates, 1.0).items())
    count = sum(p.numel() for p in model.parameters())
    say(f"{args.model}, {count:,} parameters, {objective.summary()}; {len(cache.rows)} samples, "
        f"steps {first} to {args.steps}, {said}, {args.batch_size} rows on {world} processes, "
        f"in micro-batches of {min(n, micro)}, {device}")
    make_fast(backbone, compile=device.type == "cuda" if args.compile is None else args.compile)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model

    meter, steps = runs.Meter(len(terms), device), range(first, args.steps)
    data = dataset.batches(cache, objective.reads, objective.modalities, args.seed, steps, args.batch_size,
                           part, device)
    bar = tqdm(total=args.steps, initial=first, desc=args.run.name, disable=rank > 0)
    for step, batch in zip(steps, data):
        tensors, counts = objective.prepare(step, batch, part)
        total, weights = torch.zeros(len(terms), device=device), objective.weights_at(step)
        rates_now = set_rates(optimiser, rates, schedule(step, args.warmup, args.decay_from, args.decay_to))
        for i in range(0, n, micro):
            waits = world > 1 and i + micro < n  # gradients are reduced once
            with wrapped.no_sync() if waits else contextlib.nullcontext():
                sums = objective.loss(wrapped, {name: x[i:i + micro] for name, x in tensors.items()})
                loss = total_loss(sums, counts, weights)
                (world * loss).backward()  # shares add up over processes, DDP takes their mean
            total += sums.detach()
        norm, bad = update(parameters, optimiser)
        update_ema(ema, model, step, ages)
        meter.add(total, counts, norm, bad)

        done = step + 1
        saving = done % args.ckpt_every == 0 or done == args.steps
        if done % args.log_every == 0 or saving:
            means, entry = meter.read(terms, args.batch_size, args.run)
            log.write({"step": done, **rates_now, **means, **entry})
            bar.set_postfix({name.removeprefix("loss_"): f"{mean:.3f}" for name, mean in means.items()})
        try:
            scores, seconds = watch.look(ema, done)
            meter.skip(seconds)
            if scores:
                log.write({"step": done, **scores})
        finally:  # a look that is killed is taken again; one that fails costs no steps
            if saving:
                runs.save_checkpoint(args.run, model, ema, optimiser, done, config, ages)
        bar.update()
    bar.close()
    barrier()
    say(f"{args.run / 'latest.pt'}: {max(first, args.steps)} steps")


# ------------------------------------------------------------------------------------------------

def add_flags(parser):
    """Flags of all training commands. Those in runs.FREE may change on resume; a run older than a flag takes
    its default.
    """
    parser.add_argument("--data", type=pathlib.Path, nargs="+", default=[dataset.DEFAULT], metavar="CACHE",
                        help="of prep_latents.py; several train together")
    parser.add_argument("--weights", type=float, nargs="+", metavar="X", help="sampling weight of each "
                        "cache; default: its number of rows")
    parser.add_argument("--run", type=pathlib.Path, default="runs/mmgen", help="an unfinished run continues")
    parser.add_argument("--model", default="XL/2", choices=list(SIZES))
    parser.add_argument("--fusion", default="linear", choices=list(FUSIONS))
    parser.add_argument("--steps", type=int, default=600_000)
    parser.add_argument("--batch-size", type=int, default=256, help="global: of all processes together")
    parser.add_argument("--micro-batch", type=int, default=64, help="at most so many rows in a forward pass")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--optimiser", default="adamw", choices=list(OPTIMISERS))
    parser.add_argument("--muon-lr", type=float, default=0.02, help="of the blocks' matrices under muon")
    parser.add_argument("--beta2", type=float, default=0.999, help="AdamW's")
    parser.add_argument("--warmup", type=int, default=0, metavar="STEPS", help="the rates rise linearly")
    parser.add_argument("--decay-from", type=int, metavar="STEP", help="the rates fall linearly from here")
    parser.add_argument("--decay-to", type=int, metavar="STEP", help="to 0 here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks: less memory")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA only")
    parser.add_argument("--ckpt-every", type=int, default=50_000)
    parser.add_argument("--preview-every", type=int, default=10_000)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--tensorboard", action="store_true", help="the log to RUN/tensorboard, too")
    parser.add_argument("--eval-every", type=int, default=0, metavar="N", help="score the EMA every N steps")
    parser.add_argument("--eval-toy", type=int, metavar="K", help="on K held-out toy scenes")
    parser.add_argument("--eval-data", type=pathlib.Path, metavar="TREE", help="on pictures with truth")
    parser.add_argument("--init", type=pathlib.Path, help="checkpoint whose EMA a new run starts from")
    parser.add_argument("--ema-from-init", action="store_true", help="what --init takes keeps its EMA's rate")


def command(objective, doc):
    """A training command: its flags, the cache, the objective (a class), the loop."""
    parser = command_parser(doc)
    add_flags(parser)
    objective.add_flags(parser)
    args = parser.parse_args()
    lost = [name for name in ("ema_from_init", "rename") if getattr(args, name, None)]
    check(args.init or not lost, f"--{' --'.join(lost).replace('_', '-')}: belongs to --init")
    counts = ("steps", "batch_size", "log_every", "ckpt_every", "preview_every", "eval_toy")
    check_ranges(args, **dict.fromkeys(counts, (1, None)), seed=(0, 2 ** 63 - 1), warmup=(0, None),
                 eval_every=(0, None), lr=(1e-12, 1000), muon_lr=(1e-12, 1000), beta2=(0, 0.99999))
    decay = args.decay_from, args.decay_to
    check(decay == (None, None) or None not in decay and 0 <= decay[0] < decay[1],
          f"--decay-from {decay[0]} --decay-to {decay[1]}: two steps, the second after the first")
    _, _, device = setup()
    cache = open_caches(args.data, args.weights)
    torch.manual_seed(args.seed)  # the initial weights, the same on every process
    defaults = {name: parser.get_default(name) for name in vars(args)}
    with only_writer(args.run):
        train(args, objective(args, cache, device), defaults)


def main():
    """Train; the flags of a --recipe are put before those of the command."""
    sys.argv[1:] = with_row(sys.argv[1:], "--recipe", RECIPES)
    command(MMGen, __doc__)


if __name__ == "__main__":
    run(main)
