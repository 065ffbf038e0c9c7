"""Stage 3: train MMGen (Sec. 3.3). The defaults are the paper's run.

    torchrun --nproc_per_node=8 train.py                                            # ImageNet cache in data/cache
    python train.py --data data/toy --model T/2 --steps 3000 --batch-size 64        # the toy world on a laptop
    python train.py --method mt-diffusion --pair rgb seg --data data/toy --model T/2 --run runs/mt   # the other system

The same command continues an interrupted run, bit for bit, on any number of processes: every random
draw of a step is made for the whole global batch by one generator seeded with (seed, step), then sliced.
"""
import argparse
import concurrent.futures
import contextlib
import copy
import functools
import json
import os
import pathlib
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import mt_diffusion
import sample
from distributed import InputError, all_reduce, autocast, barrier, run, setup, whole_file
from model import FORMAT, FUSIONS, MODALITIES, SIZES, build_model, load_checkpoint, load_weights, training_flops
from prep_latents import DEFAULT_CACHE, latents, open_array, read_meta
from weights import fit


# ------------------------------------------------------------------------------------------------
# The task mix. A row's role is its index in the global batch mod 4.

class Role(NamedTuple):
    given: str = "none"        # the condition: "none", "random" (one modality, any), "subset" (any number) or a modality's name
    supervise: str = "all"     # "all" or "rgb"; a condition is never supervised
    drop: float = 0.0          # probability that a non-RGB modality's supervision is dropped
    clean: float = 0.99        # the condition's t is uniform in [clean, 1]
    independent: bool = False  # one t per modality instead of one for all
    no_class: float = 0.1      # probability that the class is dropped


RGB_ONLY = Role(supervise="rgb")
JOINT, JOINT_FULL = Role(drop=0.5), Role()
DECOUPLED, DECOUPLED_FULL = Role("random", drop=0.5), Role("random")
FROM_RGB = Role("rgb", clean=1.0)
PHOTO = Role("rgb", no_class=0.9)  # a picture whose class nobody tells

TASK_MIX = {
    "mmgen": (RGB_ONLY, RGB_ONLY, JOINT, DECOUPLED),                      # Sec. 3.3 and 4.5
    "gen-only": (RGB_ONLY, RGB_ONLY, JOINT, JOINT),                       # Table 4
    "no-aug": (JOINT_FULL, JOINT_FULL, DECOUPLED_FULL, DECOUPLED_FULL),   # Table 4
    "no-drop": (RGB_ONLY, RGB_ONLY, JOINT_FULL, DECOUPLED_FULL),
    "independent-t": (RGB_ONLY, RGB_ONLY, JOINT, Role(drop=0.5, independent=True)),  # supplement 1.5
    "rgb2x": (FROM_RGB,) * 4,                                             # released Hypersim recipe
    "subset": (RGB_ONLY, JOINT_FULL, DECOUPLED_FULL, Role("subset")),     # ours: one to all but one modality given at once
    "photo": (JOINT_FULL, PHOTO, PHOTO, Role("random", no_class=0.5)),    # ours: fine-tune for pictures without a class
}
TASK_MIX["joint"] = TASK_MIX["mmgen"]                                     # released Hypersim recipe: the paper's mix again


class Draws(NamedTuple):
    """Everything random of one step, for the whole global batch of N rows."""
    t: torch.Tensor          # (N, M) time, 0 noise, 1 data
    given: torch.Tensor      # (N, M) bool
    supervised: torch.Tensor # (N, M) bool
    null: torch.Tensor       # (N,) bool: the class is dropped
    posterior: torch.Tensor  # (N, M*C, H, W) normal
    noise: torch.Tensor      # (N, M*C, H, W) normal


class MixTable(NamedTuple):
    """TASK_MIX's roles of N rows as (N, 1) columns on the device, and which of the M modalities the data has."""
    fixed: torch.Tensor        # index of the given modality, -1 for none or random
    random: torch.Tensor       # bool
    subset: torch.Tensor       # bool
    independent: torch.Tensor  # bool
    rgb_only: torch.Tensor     # bool
    drop: torch.Tensor
    clean: torch.Tensor
    no_class: torch.Tensor     # (N,)
    present: torch.Tensor      # (M,) bool
    choices: torch.Tensor      # indices of the modalities present


@functools.lru_cache(1)
def mix_table(mix, modalities, present, rows, device):
    """Built once, so that a step copies nothing to the device. modalities and present are tuples."""
    roles = [TASK_MIX[mix][i % 4] for i in range(rows)]
    column = lambda f: torch.tensor([f(role) for role in roles], device=device)[:, None]
    return MixTable(column(lambda r: modalities.index(r.given) if r.given in modalities else -1), column(lambda r: r.given == "random"),
                    column(lambda r: r.given == "subset"), column(lambda r: r.independent), column(lambda r: r.supervise == "rgb"), column(lambda r: r.drop),
                    column(lambda r: r.clean), column(lambda r: r.no_class)[:, 0], torch.tensor(present, device=device),
                    torch.tensor([i for i, here in enumerate(present) if here], device=device))


def draw(seed, step, mix, modalities, present, shape, device):
    """The Draws of a step. shape is (N, M*C, H, W); present, M bools, says which modalities the data has."""
    N, M = shape[0], len(modalities)
    table = mix_table(mix, tuple(modalities), tuple(present), N, torch.device(device))
    g = torch.Generator(device).manual_seed((seed * 0x9E3779B1 + step) % 2 ** 32)  # the CPU generator reads 32 bits
    rand = lambda *size: torch.rand(size, generator=g, device=device)
    shared, separate, clean, drop, null = rand(N, 1), rand(N, M), rand(N, 1), rand(N, M), rand(N)
    chosen = table.choices[(rand(N) * len(table.choices)).long().clamp(max=len(table.choices) - 1)]  # the random condition
    posterior, noise = (torch.randn(shape, generator=g, device=device) for _ in range(2))

    lot = torch.where(table.present, rand(N, M), 2.0)  # the modalities that draw the lowest lots are the subset
    size = 1 + (rand(N, 1) * (len(table.choices) - 1)).long().clamp(max=max(len(table.choices) - 2, 0))

    index = torch.arange(M, device=device)
    given = (index == table.fixed) | (table.random & (index == chosen[:, None])) | (table.subset & (lot.argsort(1).argsort(1) < size))  # a lot's rank
    t = torch.where(table.independent, separate, shared)
    t = torch.where(given, table.clean + (1 - table.clean) * clean, t)
    kept = (drop >= table.drop) | (index == 0)
    supervised = ~given & kept & table.present & (~table.rgb_only | (index == 0))
    return Draws(t, given, supervised, null < table.no_class, posterior, noise)


# ------------------------------------------------------------------------------------------------
# The objective.

def interpolate(x0, noise, t, channels):
    """The linear path (Eq. 1): x_t = t x0 + (1 - t) eps and its velocity x0 - eps; t (N, M), C channels each."""
    t = t.repeat_interleave(channels, 1)[:, :, None, None]  # (N, M*C, 1, 1)
    return t * x0 + (1 - t) * noise, x0 - noise


def losses(v, target, z, dino, supervised):
    """Sums over the rows of a (micro-)batch, fp32: velocity error per modality (M,) and REPA error ().

    The velocity error is each row's mean square over (C, H, W) where supervised (N, M); REPA is the
    negative cosine between projected hidden states z and alignment targets (N, T, 768), mean over tokens.
    """
    error = (v.float() - target).square().unflatten(1, (supervised.shape[1], -1)).mean((2, 3, 4))  # (N, M)
    velocity = torch.where(supervised, error, 0.0).sum(0)                                          # (M,)
    if z is None:
        return velocity, velocity.new_zeros(())
    cosine = (F.normalize(z.float(), dim=-1) * F.normalize(dino.float(), dim=-1)).sum(-1)          # (N, T)
    return velocity, -cosine.mean(1).sum()


def total_loss(sums, counts, weights):
    """(K,) sums -> the scalar loss: each term's mean over the rows that it counts, weighted."""
    return (weights * sums / counts.clamp(min=1)).sum()


class MMGen:
    """The objective of the paper: velocities and REPA. What an objective brings to the loop below:

    add_flags (an argparse group) -> the actions of its own flags; aligned: it reads the cache's alignment targets
    model     the network; backbone, its transformer blocks; recipe and method for the checkpoint; summary() for the first line
    names     of its K terms in log.jsonl; weights (K,) of the terms in the loss; reads, the cache's arrays it needs
    prepare   (step, a batch on the device, this process's slice of the global batch) -> {tensors of its rows}, counts (K,) of the
              global batch, known before the forward pass
    loss      (network, {tensors of some rows}) -> (K,) sums over them; the network may be the model or a wrapper of it
    initialise (checkpoint, path) -> --init's table
    """

    method, aligned = "mmgen", True

    @staticmethod
    def add_flags(group):
        return [group.add_argument("--mix", default="mmgen", choices=list(TASK_MIX)),
                group.add_argument("--modalities", nargs="+", choices=list(MODALITIES), help="default: the cache's; those the cache lacks are not supervised"),
                group.add_argument("--equal-weights", action="store_true", help="loss weight 1 for every modality"),
                group.add_argument("--repa-weight", type=float, default=0.5),
                group.add_argument("--no-task-embedding", action="store_true")]

    def __init__(self, args, cache, device):
        meta, self.args, self.device = cache.meta, args, device
        self.modalities = [m for m in MODALITIES if m in (args.modalities or cache.modalities)]
        if "rgb" not in self.modalities or (args.mix == "rgb2x" and not set(self.modalities[1:]) & set(cache.modalities)):
            raise InputError(f"modalities {self.modalities} of a cache with {list(cache.modalities)}: rgb must be there, and for rgb2x another one")
        named = {role.given for role in TASK_MIX[args.mix]} - {"none", "random", "subset"}
        if named - (set(self.modalities) & set(cache.modalities)):
            raise InputError(f"--mix {args.mix}: gives {', '.join(sorted(named))}, the cache has {', '.join(cache.modalities)} and the model {', '.join(self.modalities)}")
        repa_weight = args.repa_weight if cache.dino else 0.0
        self.model = self.backbone = build_model(args.model, self.modalities, meta["num_classes"], meta["latent_channels"], meta["latent_size"],
                                                 fusion=args.fusion, task_embedding=not args.no_task_embedding, projector=repa_weight > 0)
        self.meta, self.present = meta, tuple(m in cache.modalities for m in self.modalities)
        self.recipe = dict(mix=args.mix, repa_weight=repa_weight, equal_weights=args.equal_weights)
        self.names = [f"loss_{m}" for m in (*self.modalities, "repa")]
        self.reads = [m for m in self.modalities if m in cache.modalities] + ["labels"] + ["dino"] * (repa_weight > 0)
        self.weights = torch.tensor([1.0 if args.equal_weights else MODALITIES[m].loss_weight for m in self.modalities] + [repa_weight], device=device)
        self.unaligned = " (the cache has no alignment targets)" if args.repa_weight and not cache.dino else ""

    def summary(self):
        config = self.model.config
        flops, extra = training_flops(**config), ""
        if config["fusion"] != "linear":
            extra = f" ({flops / training_flops(**{**config, 'fusion': 'linear'}):.2f} times linear fusion's)"
        return f"{', '.join(self.modalities)}{'' if config['projector'] else '; training without REPA'}{self.unaligned}; {flops / 1e9:.1f} GFLOPs a sample and step{extra}"

    def initialise(self, checkpoint, path):
        return fit(self.model, self.meta, checkpoint, path)

    def prepare(self, step, batch, part):
        C, N = self.meta["latent_channels"], self.args.batch_size
        draws = draw(self.args.seed, step, self.args.mix, self.modalities, self.present, (N, len(self.modalities) * C, *self.meta["latent_size"]), self.device)
        counts = torch.cat([draws.supervised.sum(0), torch.full((1,), N, device=self.device)])            # (M+1,)
        mine = Draws(*(x[part] for x in draws))
        x0 = latents(batch, self.modalities, mine.posterior, self.meta["scale"], C)                       # (rows, M*C, H, W)
        x, target = interpolate(x0, mine.noise, mine.t, C)                                                # (rows, M*C, H, W)
        y = torch.where(mine.null, self.meta["num_classes"], batch["labels"])                             # (rows,)
        return dict(x=x, target=target, t=mine.t, y=y, given=mine.given, supervised=mine.supervised, dino=batch.get("dino", y)), counts

    def loss(self, network, rows):
        with autocast(self.device, self.args.precision):
            v, z = network(rows["x"], rows["t"], rows["y"], rows["given"])
        velocity, repa = losses(v, rows["target"], z, rows["dino"], rows["supervised"])
        return torch.cat([velocity, repa[None]])                                                          # (M+1,)


METHODS = {objective.method: objective for objective in (MMGen, mt_diffusion.Objective)}


# ------------------------------------------------------------------------------------------------
# Data: rows of the memory-mapped cache, gathered in threads while the device works.

class Cache:
    """A finished cache. Raises InputError when it is missing, unfinished or damaged."""

    def __init__(self, folder, need_dino=False):
        self.meta = read_meta(folder)
        n = self.meta["count"]
        done = open_array(folder, "done", n)
        if (done == 0).any():
            raise InputError(f"{folder}: {int((done == 0).sum())} of {n} rows are not encoded yet; run the same prep_latents.py command again")
        self.rows = np.flatnonzero(done == 1)
        if not len(self.rows):
            raise InputError(f"{folder}: none of its {n} rows could be encoded, see skipped.txt")
        self.modalities = tuple(self.meta["modalities"])
        self.dino = self.meta["teacher"] is not None and need_dino
        stems = (*self.modalities, *["dino"] * self.dino, *["feature"] * bool(self.meta.get("feature")), "labels")
        self.arrays = {stem: open_array(folder, stem, n) for stem in stems}
        C, size = self.meta["latent_channels"], tuple(self.meta["latent_size"])
        moments = (np.uint8, (n, C, *size)) if self.meta["vae"] == "none" else (np.float16, (n, 2, C, *size))
        expected = {m: moments for m in self.modalities}
        expected["labels"] = (np.int64, (n,))
        if self.dino:
            expected["dino"] = (np.int8, (n, self.meta["grid"][0] * self.meta["grid"][1], 768))
        if self.meta.get("feature"):
            expected["feature"] = (np.float16, (n, self.meta["feature_size"]))
        for stem, (dtype, shape) in expected.items():
            array = self.arrays[stem]
            if array.dtype != dtype or array.shape != shape:
                raise InputError(f"{folder}/{stem}.npy: {array.dtype} {array.shape}, meta.json asks for {np.dtype(dtype)} {shape}; delete {folder} and run prep_latents.py again")
        labels = self.arrays["labels"][self.rows]
        if labels.min() < 0 or labels.max() >= self.meta["num_classes"]:
            raise InputError(f"{folder}/labels.npy: classes {labels.min()} to {labels.max()}, meta.json has {self.meta['num_classes']}")
        self._epoch, self._order = None, None

    def order(self, seed, start, count):
        """Cache rows of the global samples start .. start + count: one permutation per epoch, seeded by (seed, epoch)."""
        out = []
        for k in range(start, start + count):
            epoch, position = divmod(k, len(self.rows))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, np.random.default_rng((seed, epoch)).permutation(self.rows)
            out.append(self._order[position])
        return np.array(out)

    def gather(self, rows, stems, pin):
        """Rows -> {array: CPU tensor}."""
        batch = {stem: torch.from_numpy(self.arrays[stem][rows]) for stem in stems}
        return {stem: x.pin_memory() for stem, x in batch.items()} if pin else batch


def prefetch(cache, stems, seed, steps, batch_size, part, device, ahead=4):
    """Yield the part (a slice of the global batch) of each step's rows on the device; the next steps' are gathered in threads: pages may be cold."""
    submit = lambda step: pool.submit(cache.gather, cache.order(seed, step * batch_size, batch_size)[part], stems, device.type == "cuda")
    with concurrent.futures.ThreadPoolExecutor(ahead) as pool:
        waiting = [submit(step) for step in steps[:ahead]]
        for k in range(len(steps)):
            batch = waiting.pop(0).result()
            waiting += [submit(steps[k + ahead])] if k + ahead < len(steps) else []
            yield {stem: x.to(device, non_blocking=True) for stem, x in batch.items()}


# ------------------------------------------------------------------------------------------------
# The run folder: args.json, log.jsonl, previews/, ckpt/<step>.pt, latest.pt.

def save_checkpoint(folder, model, ema, optimiser, step, config):
    """Write ckpt/<step>.pt under a temporary name, then point latest.pt to it."""
    path = folder / "ckpt" / f"{step:07d}.pt"
    with whole_file(path) as file:
        torch.save({"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimiser.state_dict(), "step": step,
                    "config": config, "format": FORMAT}, file)
    link = folder / f".latest.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(path.relative_to(folder))
    os.replace(link, folder / "latest.pt")


LATER = {"method": "mmgen"}  # keys of config["train"] that older checkpoints do not have, and what they did


def resume(folder, model, ema, optimiser, config, rank):
    """Load latest.pt, if there is one, and cut log.jsonl back to it -> its step, else 0.

    Raises InputError when the checkpoint was trained with another configuration.
    """
    path, step = folder / "latest.pt", 0
    if not path.exists() and (path.is_symlink() or any((folder / "ckpt").glob("*.pt"))):
        raise InputError(f"{path}: points to no checkpoint though {folder / 'ckpt'} is there; link it to one of that folder, or use another --run")
    if path.exists():
        checkpoint = load_checkpoint(path)
        if not isinstance(checkpoint.get("opt"), dict) or "model" not in checkpoint:
            raise InputError(f"{path}: has no optimiser state, it was exported for sampling; start a new --run with --init {path}")
        checkpoint["config"]["train"] = LATER | checkpoint["config"]["train"]
        for part in ("model", "meta", "train"):
            for key in sorted(config[part].keys() | checkpoint["config"][part].keys()):
                old, new = checkpoint["config"][part].get(key), config[part].get(key)
                if old != new:
                    raise InputError(f"{path}: was trained with {key} = {str(old)[:80]}, this command has {str(new)[:80]}; use another --run or the same arguments")
        load_weights(model, checkpoint["model"], path)
        load_weights(ema, checkpoint["ema"], path)
        optimiser.load_state_dict(checkpoint["opt"])
        step = checkpoint["step"]
    log = folder / "log.jsonl"
    if rank == 0 and log.exists():
        lines = [line for line in log.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        with whole_file(log) as file:
            file.write("".join(line + "\n" for line in lines).encode())
    return step


def update(parameters, optimiser):
    """Clip to norm 1 and step -> the gradient's norm, and 1.0 where it is not finite: then the weights are left alone, without a host read."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    bad = (~torch.isfinite(norm)).float()
    optimiser.found_inf, optimiser.grad_scale = bad, None  # what a gradient scaler would tell the fused step
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm, bad


@torch.no_grad()
def update_ema(ema, model, step):
    """EMA with the rate min(0.9999, (1 + n) / (10 + n)): a short run's average is not its initial weights."""
    rate = min(0.9999, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - rate)


# ------------------------------------------------------------------------------------------------

def arguments():
    """The command's flags -> Namespace. InputError for flags of the other method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, default=DEFAULT_CACHE, help="cache written by prep_latents.py")
    parser.add_argument("--run", type=pathlib.Path, default=pathlib.Path("runs/mmgen"), help="run folder; an unfinished run continues")
    parser.add_argument("--model", default="XL/2", choices=list(SIZES))
    parser.add_argument("--fusion", default="linear", choices=list(FUSIONS))
    parser.add_argument("--steps", type=int, default=600_000)
    parser.add_argument("--batch-size", type=int, default=256, help="global, whatever the number of processes")
    parser.add_argument("--micro-batch", type=int, default=64, help="at most so many rows in one forward pass, the rest is accumulated")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true", help="recompute each block in the backward pass: less memory, a third more time")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA only")
    parser.add_argument("--ckpt-every", type=int, default=50_000)
    parser.add_argument("--preview-every", type=int, default=10_000)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--init", type=pathlib.Path, help="start from the EMA of this checkpoint")
    parser.add_argument("--method", default="mmgen", choices=list(METHODS))
    flags = {name: objective.add_flags(parser.add_argument_group(f"--method {name}")) for name, objective in METHODS.items()}
    args = parser.parse_args()
    for action in [action for name, actions in flags.items() if name != args.method for action in actions]:
        if getattr(args, action.dest) != action.default:
            raise InputError(f"{action.option_strings[0]}: does not belong to --method {args.method}")
    return args


def split(args, rank, world):
    """This process's rows of the global batch (a slice) and the rows of a micro-batch.

    Raises InputError when a number makes no sense or the batch has fewer groups of four roles than processes.
    """
    for name in ("steps", "batch_size", "log_every", "ckpt_every", "preview_every"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if not 0 < args.lr < 1e3 or not 0 <= args.repa_weight < 1e3 or not 0 <= args.seed < 2 ** 63:
        raise InputError(f"--lr {args.lr} --repa-weight {args.repa_weight} --seed {args.seed}: must be finite, and not negative")
    groups, micro = args.batch_size // 4, args.micro_batch
    if args.batch_size > 2 ** 16:  # every process draws the noise of the whole batch
        raise InputError(f"--batch-size {args.batch_size}: at most {2 ** 16}")
    if args.batch_size % 4 or groups < world or micro < 4 or micro % 4:
        raise InputError(f"--batch-size {args.batch_size} on {world} processes with --micro-batch {micro}: both must be multiples of 4 "
                         "(the task mix), with at least 4 rows for each process")
    return slice(groups * rank // world * 4, groups * (rank + 1) // world * 4), micro


def main():
    """Train, or continue an interrupted run: data, weights, then the loop with log, previews and checkpoints."""
    args = arguments()
    rank, world, device = setup()
    part, micro = split(args, rank, world)
    rows = part.stop - part.start
    cache = Cache(args.data, need_dino=METHODS[args.method].aligned and args.repa_weight > 0)
    torch.manual_seed(args.seed)
    objective = METHODS[args.method](args, cache, device)
    model = objective.model
    config = {"model": model.config, "meta": cache.meta,
              "train": dict(method=args.method, batch_size=args.batch_size, lr=args.lr, seed=args.seed, precision=args.precision, **objective.recipe)}
    if args.init and not (args.run / "latest.pt").exists():
        table = objective.initialise(load_checkpoint(args.init), args.init)
        print(table) if rank == 0 else None
    model.to(device)
    objective.backbone.checkpointing = args.checkpointing
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    first = resume(args.run, model, ema, optimiser, config, rank)
    if all_reduce(torch.tensor(first, device=device)).item() != first * world:
        raise InputError(f"{args.run}: this process continues at step {first}, another one elsewhere; all nodes must share the file system of the run folder")
    if rank == 0:
        with whole_file(args.run / "args.json") as file:
            file.write(json.dumps({**vars(args), "world": world, "resumed_at": first}, indent=1, default=str).encode())
        print(f"{args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, {objective.summary()}; {len(cache.rows)} samples, "
              f"steps {first} to {args.steps}, {world} x {rows} rows in micro-batches of {min(rows, micro)}, {device}")
    if args.compile if args.compile is not None else device.type == "cuda":
        for block in objective.backbone.blocks:
            block.compile(fullgraph=True)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    preview = sample.Preview(cache, device) if rank == 0 and args.preview_every <= args.steps else None

    K = len(objective.names)
    sums, counted, skipped = torch.zeros(K, device=device), torch.zeros(K, device=device), torch.zeros(3, device=device)
    norms, since, clock = torch.zeros((), device=device), 0, time.perf_counter()
    steps = range(first, args.steps)
    bar = tqdm(total=args.steps, initial=first, desc=args.run.name, disable=rank > 0)
    for step, batch in zip(steps, prefetch(cache, objective.reads, args.seed, steps, args.batch_size, part, device)):
        tensors, counts = objective.prepare(step, batch, part)
        total = torch.zeros_like(sums)
        for i in range(0, rows, micro):
            last = i + micro >= rows
            with contextlib.nullcontext() if world == 1 or last else wrapped.no_sync():
                terms = objective.loss(wrapped, {name: x[i:i + micro] for name, x in tensors.items()})
                (world * total_loss(terms, counts, objective.weights)).backward()  # DDP averages
            total += terms.detach()
        norm, bad = update(parameters, optimiser)
        update_ema(ema, model, step)
        sums += torch.where(bad > 0, 0.0, total)               # a skipped step does not count
        counted += (1 - bad) * counts
        norms += torch.where(bad > 0, 0.0, norm)
        skipped[0] += bad                                      # in all
        skipped[1] = (skipped[1] + 1) * bad                    # in a row, now
        skipped[2] = torch.maximum(skipped[2], skipped[1])     # in a row, at worst
        since += 1

        done = step + 1
        saving = done % args.ckpt_every == 0 or done == args.steps
        if done % args.log_every == 0 or saving:
            mean = (all_reduce(sums.clone()) / counted.clamp(min=1)).tolist()
            entry = {"step": done, **dict(zip(objective.names, mean)),
                     "grad_norm": (norms / since).item(), "img_per_s": since * args.batch_size / (time.perf_counter() - clock),
                     "skipped": int(skipped[0])}
            if skipped[2] >= 10:
                raise InputError(f"step {done}: {int(skipped[2])} non-finite gradients in a row, the run stops; the last checkpoint in "
                                 f"{args.run / 'ckpt'} (if any) is good: start a new --run with --init FILE and a lower --lr or --precision fp32")
            if rank == 0:
                with open(args.run / "log.jsonl", "a") as file:
                    file.write(json.dumps(entry) + "\n")
                bar.set_postfix({name.removeprefix("loss_"): f"{x:.3f}" for name, x in zip(objective.names, mean)})
            for counter in (sums, counted, norms, skipped[2:]):
                counter.zero_()
            since, clock = 0, time.perf_counter()
        if saving and rank == 0:
            save_checkpoint(args.run, model, ema, optimiser, done, config)
        if preview is not None and done % args.preview_every == 0:
            preview(ema, args.method, args.run / "previews" / f"{done:07d}.png")
        bar.update()
    bar.close()
    barrier()
    if rank == 0:
        print(f"{args.run / 'latest.pt'}: {max(first, args.steps)} steps")


if __name__ == "__main__":
    run(main)
