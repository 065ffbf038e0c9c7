"""Stage 4: sample MMGen: generate, understand, condition, translate (Fig. 1 and 5).

    python sample.py --task understand                                   # bundled weights, bundled scenes
    python sample.py --task understand --image photo.jpg --ckpt runs/mmgen/latest.pt
    python sample.py --task generate --class-id 207 --num 8 --cfg 1.8 --cfg-interval 0 0.7
    python sample.py --task condition --given depth --image depth.png
    python sample.py --task condition --given depth --image depth.png --mesh   # and its object as a PLY (Fig. 6)
    python sample.py --task translate --image photo.jpg                  # RGB -> modalities -> a new RGB from each
    python sample.py --task restore --image photo.png --mask hole.png --ckpt RUN   # MT-Diffusion's tasks: restore, classify

--ckpt defaults to the newest run, else the bundled demo. Under torchrun the samples are shared out. Noise is
seeded per sample by (seed, index): the same pictures whatever the batch size and the number of processes.
Writes OUT/<modality>/<stem>.png (.npy for depth and normals), OUT/grid.png and OUT/meta.json.
"""
import argparse
import collections
import concurrent.futures
import json
import pathlib
import zipfile
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from tqdm import tqdm

import mt_diffusion
from distributed import InputError, autocast, barrier, run, setup, whole_file
from mesh import pick_segment, write_mesh
from model import MODALITIES, build_model, load_checkpoint, load_model
from prep_latents import EXTENSIONS, centre_crop, file_pixels, nearest_colour, read_array, read_modality, read_picture, segments, to_unit
from vae import load_vae, sha256
from weights import locate

TASKS = ("generate", "understand", "condition", "translate", "restore", "classify")  # the last two: MT-Diffusion's
DEMO = pathlib.Path(__file__).parent / "demo"
GIVEN_TIME = 0.995  # the condition is held this close to clean (noise level 0.005)


# ------------------------------------------------------------------------------------------------
# Samplers: sampler(velocity, x, steps, noise) -> x at t = 1. velocity(x, t) with t a float, 0 noise, 1 data;
# noise() gives standard normals like x. None of them knows about guidance, conditions or the model.

def euler(velocity, x, steps, noise):
    for i in range(steps):
        x = x + velocity(x, i / steps) / steps
    return x


def heun(velocity, x, steps, noise):
    h = 1 / steps
    for i in range(steps):
        v = velocity(x, i * h)
        x = x + h / 2 * (v + velocity(x + h * v, (i + 1) * h))
    return x


def _runge_kutta(velocity, x, t, h):
    """One classical fourth-order step -> x at t + h and the velocity at t."""
    k1 = velocity(x, t)
    k2 = velocity(x + h / 2 * k1, t + h / 2)
    k3 = velocity(x + h / 2 * k2, t + h / 2)
    k4 = velocity(x + h * k3, t + h)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), k1


def _adams_bashforth(weights):
    """The multistep method with these weights, newest velocity first; Runge-Kutta steps build its history."""
    def sampler(velocity, x, steps, noise):
        h, history = 1 / steps, []
        for i in range(steps):
            if i < len(weights) - 1:
                x, v = _runge_kutta(velocity, x, i * h, h)
                history.insert(0, v)
            else:
                history.insert(0, velocity(x, i * h))
                x = x + h * sum(w * v for w, v in zip(weights, history))
                history.pop()
        return x
    return sampler


def sde(velocity, x, steps, noise, last=0.04):
    """Euler-Maruyama of the reverse SDE with diffusion w_t = 2 sigma_t, as the released code and REPA.

    The drift v + (w_t / 2) score is v - E[eps | x] = v - (x - t v), without a division. The times are linear
    from noise level 1 to `last`; the last step goes to the data without noise.
    """
    levels = [*np.linspace(1.0, last, steps), 0.0]
    for level, next_level in zip(levels, levels[1:]):
        t, h = 1 - level, level - next_level
        v = velocity(x, t)
        x = x + h * (v - (x - t * v))
        if next_level > 0:
            x = x + (2 * level * h) ** 0.5 * noise()
    return x


SAMPLERS = {
    "sde": sde,
    "euler": euler,
    "heun": heun,
    "ab2": _adams_bashforth((3 / 2, -1 / 2)),
    "ab4": _adams_bashforth((55 / 24, -59 / 24, 37 / 24, -9 / 24)),
}


# ------------------------------------------------------------------------------------------------

class Noise:
    """Standard normals, each sample's from a generator of its own seeded by (seed, global index)."""

    def __init__(self, seed, indices, device):  # numpy's: torch's CPU generator would read 32 bits of a seed
        self.generators, self.device = [np.random.default_rng((seed, int(i))) for i in indices], torch.device(device)

    def __call__(self, shape):
        """(N, *shape)"""
        x = torch.from_numpy(np.stack([g.standard_normal(tuple(shape), np.float32) for g in self.generators]))
        return (x.pin_memory() if self.device.type == "cuda" else x).to(self.device, non_blocking=True)  # drawn while the device works


@torch.inference_mode()
def draw_latents(model, y, held, given, noise, sampler="sde", steps=250, cfg=1.0, cfg_interval=(0.0, 1.0), precision="fp32"):
    """Sample all modalities -> scaled latents (N, M*C, H, W).

    y (N,) classes; held (N, M*C, H, W) clean scaled latents, read where given (M,) bool is set: those channels
    stay at t = 0.995 throughout and are returned clean. Guidance v = v_null + cfg (v_class - v_null) acts on all
    channels, while the noise level 1 - t lies in cfg_interval.
    """
    M, C, N = len(model.modalities), model.latent_channels, len(y)
    given = given.to(held.device)
    mask = given.repeat_interleave(C)[None, :, None, None]  # (1, M*C, 1, 1)
    rows, null = given.expand(N, M), torch.full_like(y, model.num_classes)
    clamped = GIVEN_TIME * held + (1 - GIVEN_TIME) * noise(held.shape[1:])

    def network(x, t, y, rows):
        with autocast(x.device, precision):
            return model(x, t, y, rows)[0].float()

    def velocity(x, t):
        x = torch.where(mask, clamped, x)
        times = torch.where(rows, GIVEN_TIME, t)  # (N, M)
        if cfg == 1.0 or not cfg_interval[0] <= 1 - t <= cfg_interval[1]:
            return network(x, times, y, rows)
        v, v_null = network(torch.cat([x, x]), torch.cat([times, times]), torch.cat([y, null]), torch.cat([rows, rows])).chunk(2)
        return v_null + cfg * (v - v_null)

    x = SAMPLERS[sampler](velocity, noise(held.shape[1:]), steps, lambda: noise(held.shape[1:]))
    return torch.where(mask, held, x)


# What --fast chooses for MMGen, by quality against evaluations on the toy world (README, Few steps).
FAST = {
    "generate": dict(sampler="ab2", steps=7),
    "understand": dict(sampler="euler", steps=2),
    "condition": dict(sampler="euler", steps=4),
    "translate": dict(sampler="euler", steps=4),
}


class Method(NamedTuple):
    build: Callable      # (**the checkpoint's model configuration) -> model
    draw: Callable       # as draw_latents, with these of the commands' flags:
    flags: tuple
    preview: dict        # their values for train.py's previews
    fast: dict           # task -> those of --fast


METHODS = {
    "mmgen": Method(build_model, draw_latents, ("sampler", "steps", "cfg", "cfg_interval", "precision"), dict(sampler="euler", steps=25), FAST),
    "mt-diffusion": Method(mt_diffusion.build, mt_diffusion.draw_latents, ("start", "x_update", "steps", "cfg", "classifier_scale", "precision"), dict(steps=25),
                           dict.fromkeys(TASKS, dict(steps=50))),
}


def open_model(path, device, precision="fp32", compile=False):
    """The EMA of a checkpoint of any method, its blocks compiled or not. Raises InputError as load_model does.

    precision "bf16": the blocks' weights are rounded once; autocast would do the same at every evaluation.
    model.method is its method's name, model.pair MT-Diffusion's setting, else None.
    """
    method = load_checkpoint(path)["config"]["train"].get("method", "mmgen")
    if method not in METHODS:
        raise InputError(f"{path}: method is {method!r}; this version has {', '.join(METHODS)}")
    model = load_model(path, device=device, build=METHODS[method].build)
    model.method, model.pair = method, getattr(model, "pair", None)
    for block in getattr(model, "backbone", model).blocks:
        block.bfloat16() if precision == "bf16" else None
        block.compile(fullgraph=True) if compile else None
    return model


def evaluations(sampler, steps):
    """How often a sampler calls its velocity."""
    count, zero = 0, torch.zeros(())

    def velocity(x, t):
        nonlocal count
        count += 1
        return zero

    SAMPLERS[sampler](velocity, zero, steps, lambda: zero)
    return count


# ------------------------------------------------------------------------------------------------
# Pixels and latents.

@torch.inference_mode()
def encode_pixels(vae, pixels, noise, channels):
    """Pixels (N, 3, fH, fW) in [-1, 1] -> scaled latents (N, C, H, W), a posterior sample; pixels themselves without a VAE."""
    if vae is None:
        return pixels
    mean, logvar = vae.encode(pixels)
    return (mean + (logvar / 2).exp() * noise((channels, *mean.shape[2:]))) * vae.scale


@torch.inference_mode()
def decode_latents(vae, x, channels, precision="fp32", wanted=slice(None), batch=64):
    """Scaled latents (N, M*C, H, W) -> pixels (N, M, 3, fH, fW) in [-1, 1], fp32; of the wanted modalities (indices), all by default."""
    z = x.unflatten(1, (-1, channels))[:, wanted]
    if vae is None:
        return z.clamp(-1, 1)
    with autocast(x.device, precision):
        pixels = torch.cat([vae.decode(part / vae.scale).float() for part in z.flatten(0, 1).split(batch)])
    return pixels.clamp(-1, 1).unflatten(0, z.shape[:2])


def checked_vae(name, meta):
    """The VAE of a checkpoint's config, or --vae; InputError when the file behind the name is another one."""
    if meta["vae"] == "none" and name in (None, "none"):
        return None
    vae = None if "none" in (name, meta["vae"]) else load_vae(name or meta["vae"])
    if vae is None or meta["vae_sha256"] not in (None, sha256(vae.path)):  # None: released weights do not say
        raise InputError(f"--vae {vae.path if vae else name}: not the VAE of the training cache, which is {meta['vae']} "
                         f"(sha256 {str(meta['vae_sha256'])[:12]}); pass that one")
    return vae


# ------------------------------------------------------------------------------------------------
# A labelled grid.

def draw_grid(rows, columns, cell=128):
    """rows: lists of uint8 (H, W, 3) or None; columns: their labels, of one line or more -> PIL image."""
    font = ImageFont.load_default(13)
    top, gap = 8 + 15 * max(label.count("\n") + 1 for label in columns), 4
    sheet = Image.new("RGB", (len(columns) * (cell + gap) + gap, top + len(rows) * (cell + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for j, label in enumerate(columns):
        pen.text((gap + j * (cell + gap) + cell / 2, top / 2), label, fill="black", font=font, anchor="mm", align="center")
        for i, row in enumerate(rows):
            if row[j] is None:
                continue
            image = Image.fromarray(row[j])
            scale = cell / max(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
            sheet.paste(image, (gap + j * (cell + gap) + (cell - image.width) // 2, top + i * (cell + gap) + (cell - image.height) // 2))
    return sheet


class Preview:
    """train.py's look at all tasks: a grid from four rows of the cache, in 25 steps."""

    def __init__(self, cache, device):
        self.meta, self.cache, self.device = cache.meta, cache, device
        try:
            self.vae = checked_vae(None, self.meta)
        except InputError as error:
            self.vae = None
            print(f"no previews: {error}")
            self.cache = None
        if self.vae is not None:
            self.vae.to(device)

    def __call__(self, model, method, path):
        if self.cache is None:
            return
        C, rows = self.meta["latent_channels"], self.cache.rows[:4]
        stored = [torch.from_numpy(self.cache.arrays[m][rows]).float() if m in self.cache.arrays else None for m in model.modalities]
        blank = torch.zeros(len(rows), C, *self.meta["latent_size"])
        clean = [blank if s is None else s[:, 0] * self.meta["scale"] if self.vae is not None else s / 127.5 - 1 for s in stored]
        held = torch.cat(clean, 1).to(self.device)
        y = torch.from_numpy(self.cache.arrays["labels"][rows]).to(self.device)
        columns, cells = [], [[] for _ in rows]
        for task in (None, *model.conditions, "data"):
            given = torch.tensor([i == task for i in range(len(model.modalities))])
            noise = Noise(0, range(len(rows)), self.device)
            x = held if task == "data" else METHODS[method].draw(model, y, held, given, noise, **METHODS[method].preview)
            pixels = decode_latents(self.vae, x, C).cpu().numpy()
            name = "generate" if task is None else task if task == "data" else f"{model.modalities[task]} given"
            columns += [f"{m}\n({name})" for m in model.modalities]
            for cell, sample in zip(cells, pixels):
                cell += [MODALITIES[m].picture(MODALITIES[m].from_pixels(p)) for m, p in zip(model.modalities, sample)]
        M = len(model.modalities)
        sheets = [draw_grid([row[i:i + M] for row in cells], columns[i:i + M], 96) for i in range(0, len(columns), M)]
        width, height = sheets[0].size
        sheet = Image.new("RGB", (width * 2, height * ((len(sheets) + 1) // 2)), "white")
        for i, part in enumerate(sheets):
            sheet.paste(part, (i % 2 * width, i // 2 * height))
        with whole_file(path) as file:
            sheet.save(file, "png")


# ------------------------------------------------------------------------------------------------
# Requests: what is to be sampled.

class Item:
    """One sample: its output stem, class, global index (noise) and the files of its given modalities."""

    def __init__(self, index, stem, label, files):
        self.index, self.stem, self.label, self.files = index, stem, label, files
        self.size = None  # (width, height) of the picture that came in, for --fit full
        self.mask, self.place = None, stem  # of --task restore: the mask's file, the picture's stem


def class_of(path, meta):
    """The class named by a file's folder, if the checkpoint knows it."""
    names = {name.replace(" ", "_"): i for i, name in enumerate(meta["class_names"])}
    return names.get(path.parent.name.replace(" ", "_"))


def find_files(location, modality):
    """A picture, or all pictures below a folder (its <modality>/ subfolder if it has one), sorted. InputError for a folder of other modalities."""
    location = pathlib.Path(location)
    if location.is_dir():
        others = [m for m in MODALITIES if (location / m).is_dir()]
        if others and modality in MODALITIES and modality not in others:
            raise InputError(f"{location / modality}: no such folder; there are {', '.join(others)}")
        base = location / modality if (location / modality).is_dir() else location
        files = [p for p in sorted(base.rglob("*")) if p.suffix.lower() in EXTENSIONS and p.is_file()]
        if not files:
            raise InputError(f"{base}: no pictures in this folder")
        return base, files
    if not location.is_file():
        raise InputError(f"{location}: no such file or folder")
    return location.parent, [location]


def requests(args, given, meta):
    """The list of Items for a task; given are the names of its conditions."""
    K = meta["num_classes"]
    for label in args.class_id or []:
        if not 0 <= label <= K:
            raise InputError(f"--class-id {label}: this checkpoint has classes 0 to {K - 1} ({K} is the null class)")
    if not given:
        if args.image or args.data:
            raise InputError("--image or --data with --task generate: use --task condition --given MODALITY, or understand")
        count = args.num or 8
        labels = [label for label in args.class_id for _ in range(args.num or 1)] if args.class_id else \
            [i % K for i in range(count)] if args.classes == "balanced" else np.random.default_rng(args.seed).integers(0, K, count).tolist()
        return [Item(i, f"{i:06d}", label, {}) for i, label in enumerate(labels)]
    locations = args.image or ([args.data] * len(given) if args.data else None) or ([DEMO / "scenes"] * len(given) if args.task == "understand" else None)
    if locations is None or len(locations) != len(given):
        raise InputError(f"--given {' '.join(given)} needs --data DIR, or --image with {len(given)} file(s) or folder(s), in the same order")
    if args.class_id and len(args.class_id) > 1:
        raise InputError(f"--class-id {args.class_id}: give one class for all pictures")
    found = {m: find_files(location, m) for m, location in zip(given, locations)}
    base, files = found[given[0]]
    stem_of = lambda path, base: path.relative_to(base).with_suffix("").as_posix()
    partners = {m: {stem_of(p, found[m][0]): p for p in found[m][1]} for m in given[1:]}
    items = []
    for path in files:
        group = {given[0]: path}
        for m in given[1:]:
            group[m] = partners[m].get(stem_of(path, base)) if pathlib.Path(locations[0]).is_dir() else found[m][1][0]
            if group[m] is None:
                raise InputError(f"{path}: no file with this stem in {found[m][0]} for --given {m}")
        label = args.class_id[0] if args.class_id else class_of(path, meta)
        for k in range(args.num or 1):
            stem = stem_of(path, base).replace("/", "_") + (f"_{k}" if (args.num or 1) > 1 else "")
            items.append(Item(len(items), stem, K if label is None else label, group))
            items[-1].place = stem_of(path, base).replace("/", "_")
    stems = [item.stem for item in items]
    if len(set(stems)) < len(stems):
        raise InputError(f"--image {base}: two pictures share the stem {max(set(stems), key=stems.count)}; rename one")
    return items


MOST_TOKENS = 2 ** 14


def fitter(args, meta, unit=2, item=None):
    """What brings a PIL image to the network's size: ADM's centre crop, or (--fit full) the whole picture in multiples of unit."""
    S = meta["resolution"]
    if args.fit == "crop":
        return lambda image: centre_crop(image, S)

    def whole(image):
        if item is not None:
            item.size = image.size
        scale = S / min(image.size)
        size = tuple(max(unit, round(s * scale / unit) * unit) for s in image.size)
        if size[0] * size[1] > MOST_TOKENS * unit ** 2:
            raise InputError(f"--fit full of {image.width}x{image.height}: {size[0] * size[1] // unit ** 2} tokens, at most {MOST_TOKENS}; use --fit crop")
        return image.resize(size, Image.Resampling.NEAREST if image.info.get("flat") else Image.Resampling.BILINEAR if image.mode == "F" else Image.Resampling.BICUBIC)
    return whole


def truth_files(item, modalities):
    """Ground truth beside a given file: <root>/<given>/<rest> -> {modality: <root>/<modality>/<rest>.*}."""
    for m, path in item.files.items():
        parts = path.resolve().parts
        if m in parts:
            at = len(parts) - 1 - parts[::-1].index(m)
            rest, found = pathlib.Path(*parts[at + 1:]), {}
            for o in [o for o in modalities if o not in item.files]:
                folder = pathlib.Path(*parts[:at]) / o / rest.parent
                hits = [p for p in sorted(folder.iterdir()) if p.stem == rest.stem and p.suffix.lower() in EXTENSIONS] if folder.is_dir() else []
                found.update({o: hits[0]} if hits else {})
            return found
    return {}


# ------------------------------------------------------------------------------------------------

class Writer:
    """Writes items' maps, in threads: pictures are compressed while the device draws the next batch.

    A context; at its end every file is there, or the first error of writing one is raised.
    """

    def __init__(self, out, modalities, fit, truncate, threads=4):
        self.out, self.modalities, self.fit, self.truncate = out, modalities, fit, truncate
        self.pool, self.pending, self.most = concurrent.futures.ThreadPoolExecutor(threads), collections.deque(), 16 * threads

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.pool.shutdown()  # what is drawn is written, whatever ends this
        while self.pending and kind is None:
            self.pending.popleft().result()

    def files(self, item, prefix=""):
        """The outputs of an item: {modality: its paths}."""
        base = lambda m: self.out / f"{prefix}{m}" / item.stem
        return {m: [base(m).with_name(base(m).name + end) for end in (".png", ".npy")[:1 + MODALITIES[m].keep_array]] for m in self.modalities}

    def __call__(self, item, pixels, prefix=""):
        """pixels: {modality: float32 (3, H, W) in [-1, 1]}."""
        self.pending.append(self.pool.submit(self.write, item, pixels, prefix))
        while len(self.pending) > self.most:
            self.pending.popleft().result()

    def write(self, item, pixels, prefix):
        """What a thread does of a call."""
        for m, paths in self.files(item, prefix).items():
            if m not in pixels:
                continue
            row, p = MODALITIES[m], pixels[m]
            if self.fit == "full" and item.size:
                mode = dict(mode="nearest") if row.file == "flat" else dict(mode="bilinear", align_corners=False)
                p = F.interpolate(torch.from_numpy(p)[None], item.size[::-1], **mode)[0].numpy()
            if self.truncate and row.file == "colour":
                p = np.floor((p + 1) * 127.5) / 127.5 - 1
            array = row.from_pixels(p)
            with whole_file(paths[0]) as file:
                Image.fromarray(row.picture(array)).save(file, "png")
            if row.keep_array:
                with whole_file(paths[1]) as file:
                    np.save(file, array.astype(np.float32))


def write_object(args, item, meta):
    """OUT/mesh/<stem>.ply: the sampled normals of one segment, integrated to a surface in the colours of the RGB (Fig. 6)."""
    picture = lambda m: np.asarray(Image.open(args.out / m / f"{item.stem}.png").convert("RGB"))
    index = nearest_colour(picture("seg"), meta["palette"]) if meta["palette"] else segments(picture("seg"))
    try:
        mask = pick_segment(index, args.segment)
    except InputError as error:
        print(f"warning: no mesh of {item.stem}: {error}")
        return
    vertices, faces = write_mesh(args.out / "mesh" / f"{item.stem}.ply", np.load(args.out / "normal" / f"{item.stem}.npy"), mask, picture("rgb"), args.focal)
    print(f"{args.out / 'mesh' / item.stem}.ply: {vertices} vertices, {faces} faces")


def write_grid(args, items, model, meta, given, folders):
    """OUT/grid.png from what was written: input, samples, ground truth where it is known."""
    read = lambda folder, item: np.asarray(Image.open(args.out / folder / f"{item.stem}.png").convert("RGB"))
    rows, columns = [], []
    for item in items[:12]:
        cells = [(f"{m} (given)" if m in given else m.replace("_", " "), read(m, item)) for m in folders]
        truth = truth_files(item, model.modalities)
        for m in [m for m in model.modalities if m not in given and given]:
            image = None
            if m in truth:
                try:
                    array = read_modality(truth[m], m, fitter(args, meta), meta["depth_space"])
                    image = MODALITIES[m].picture(MODALITIES[m].from_pixels(MODALITIES[m].to_pixels(array)))
                except InputError as error:
                    print(f"warning: ground truth left out of the grid: {error}")
            cells.append((f"{m} (truth)", image))
        rows.append([image for _, image in cells])
        columns = [label for label, _ in cells]
    keep = [j for j in range(len(columns)) if any(row[j] is not None for row in rows)]
    with whole_file(args.out / "grid.png") as file:
        draw_grid([[row[j] for j in keep] for row in rows], [columns[j] for j in keep]).save(file, "png")


def newest_checkpoint():
    """The newest runs/*/latest.pt, else the bundled demo."""
    runs = [p for p in pathlib.Path("runs").glob("*/latest.pt") if p.exists()]
    return max(runs, key=lambda p: p.stat().st_mtime) if runs else DEMO / "mmgen.pt"


def sampling_flags(parser):
    """The flags of every command that samples a checkpoint."""
    parser.add_argument("--ckpt", type=pathlib.Path, help="default: the newest run, else the bundled demo")
    parser.add_argument("--vae", help="where the VAE of the training cache lies, if not where it was")
    parser.add_argument("--sampler", choices=list(SAMPLERS), default="sde", help="MMGen's; MT-Diffusion has Algorithm 1")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance scale, 1 = none")
    parser.add_argument("--cfg-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"), help="noise levels with guidance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network and of decoding")
    parser.add_argument("--compile", action="store_true", help="compile the blocks: a minute at first, pays for many samples")
    parser.add_argument("--fast", action="store_true", help="the few steps recommended for the task, in the place of --sampler and --steps")
    mt = parser.add_argument_group("MT-Diffusion")
    mt.add_argument("--start", choices=("shifted", "standard"), default="shifted", help="z_T around at_T E(X) where X is known, or N(0, 1) as the paper writes")
    mt.add_argument("--x-update", choices=("mean", "sample", "argmax"), help="how an unknown X follows its head; default: mean, of labels sample")
    mt.add_argument("--classifier-scale", type=float, default=0.0, help="label: guidance by the gradient of the model's own head")


def check_sampling_flags(args):
    """Raise InputError for values of the shared flags that cannot be."""
    if not (np.isfinite(args.cfg) and np.isfinite(args.classifier_scale)):
        raise InputError(f"--cfg {args.cfg} --classifier-scale {args.classifier_scale}: must be finite")
    num = 1 if args.num is None else args.num
    if args.steps < 1 or args.batch_size < 1 or args.seed < 0 or not 1 <= num <= 10 ** 6 or not 0 <= args.cfg_interval[0] <= args.cfg_interval[1] <= 1:
        raise InputError(f"--steps {args.steps} --batch-size {args.batch_size} --num {args.num} --seed {args.seed} --cfg-interval {args.cfg_interval}: "
                         "counts must be at least 1, --num at most a million, the seed not negative, the interval 0 <= LO <= HI <= 1")


def settle_flags(args, model):
    """Fill in --fast. Raise InputError for a flag that the checkpoint's method does not know: it would be ignored."""
    kind = model.pair
    if args.fast:
        if (args.sampler, args.steps) != ("sde", 250):
            raise InputError(f"--fast with --sampler {args.sampler} --steps {args.steps}: --fast chooses them; leave one out")
        vars(args).update(METHODS[model.method].fast[getattr(args, "task", "understand")])
    if kind is None and (args.start != "shifted" or args.x_update or args.classifier_scale):
        raise InputError("--start, --x-update and --classifier-scale belong to MT-Diffusion, this checkpoint is MMGen's")
    if kind and args.sampler != "sde":
        raise InputError(f"--sampler {args.sampler}: MMGen's, an MT-Diffusion checkpoint is sampled by its own chain")
    if kind and tuple(args.cfg_interval) != (0.0, 1.0):
        raise InputError(f"--cfg-interval {args.cfg_interval}: MMGen's, this checkpoint is MT-Diffusion's")
    if args.classifier_scale and kind != "label":
        raise InputError(f"--classifier-scale {args.classifier_scale}: needs a checkpoint of --pair label, this one is of {kind}")
    allowed = ("sample", "argmax") if kind == "label" else ("mean",)
    if kind and args.x_update not in (None, *allowed):
        raise InputError(f"--x-update {args.x_update}: with --pair {kind} an unknown X follows by {' or '.join(allowed)}")
    if kind and args.steps > mt_diffusion.T:
        raise InputError(f"--steps {args.steps}: the chain has {mt_diffusion.T}")


def pixel(text):
    """X,Y -> (x, y)."""
    x, y = text.split(",")
    return int(x), int(y)


def arguments():
    """The command's flags -> Namespace. InputError for those that contradict each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--given", nargs="+", choices=list(MODALITIES), help="conditions of --task condition")
    parser.add_argument("--image", nargs="+", help="file or folder, one for each given modality")
    parser.add_argument("--data", help="folder tree <root>/<modality>/<class>/<name>.png in the place of --image")
    parser.add_argument("--class-id", type=int, nargs="+", help="generate: default random classes; else the folder's class or none")
    parser.add_argument("--classes", choices=("random", "balanced"), default="random", help="generate without --class-id: drawn, or all in turn")
    parser.add_argument("--num", type=int, help="samples per class or picture (1); without --class-id the number of samples (8)")
    sampling_flags(parser)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("samples"))
    parser.add_argument("--outputs", nargs="+", choices=list(MODALITIES), help="modalities to write; default all")
    parser.add_argument("--npz", action="store_true", help="also OUT/samples.npz, the RGB as ADM's arr_0")
    parser.add_argument("--mesh", action="store_true", help="also OUT/mesh/<stem>.ply, the surface of one object")
    parser.add_argument("--segment", type=pixel, metavar="X,Y", help="--mesh: a pixel of the object; default: the largest segment away from the border")
    parser.add_argument("--focal", type=float, help="--mesh: perspective, in half-widths of the picture; default: orthographic")
    parser.add_argument("--truncate", action="store_true", help="cut floats to 8 bits as REPA does, in the place of rounding")
    parser.add_argument("--fit", choices=("crop", "full"), default="crop", help="full: the whole picture, maps at its size")
    parser.add_argument("--mask", type=pathlib.Path, help="restore: picture of the photo's size, white is to be restored; or a folder of such, named as the photos")
    parser.add_argument("--patches", type=int, help=f"restore: hide so many random squares of {mt_diffusion.PATCH} pixels instead, as the paper does")
    parser.add_argument("--sdedit", type=float, metavar="SHARE", help="restore: the baseline, from the masked image noised so far (0 to 1)")
    parser.add_argument("--features", type=pathlib.Path, help="generate, feature checkpoints: .npy (K, F), one vector a sample")
    args = parser.parse_args()
    if (args.task == "restore") != ((args.mask is None) != (args.patches is None)) or (args.sdedit and args.task != "restore"):
        raise InputError("--task restore, and it alone, takes one of --mask and --patches, and --sdedit")
    if (args.patches is not None and args.patches < 1) or (args.sdedit is not None and not 0 < args.sdedit <= 1):
        raise InputError(f"--patches {args.patches} --sdedit {args.sdedit}: at least 1 square; a share above 0, up to 1")
    if args.npz and args.fit == "full":
        raise InputError("--npz with --fit full: pictures of different sizes do not fit one array; use --fit crop")
    if args.mesh and args.outputs and {"rgb", "normal", "seg"} - set(args.outputs):
        raise InputError(f"--outputs {' '.join(args.outputs)}: --mesh needs rgb, normal and seg; write them as well")
    if args.focal is not None and not args.focal > 0:
        raise InputError(f"--focal {args.focal}: must be positive, in half-widths of the picture")
    if args.data and args.image:
        raise InputError(f"--data {args.data} with --image {args.image[0]}: give one of them")
    check_sampling_flags(args)
    return args


def conditions(args, model):
    """The given modalities of a task. Raises InputError when --given does not fit the task or the model."""
    if args.task == "condition" and not args.given:
        raise InputError("--task condition needs --given MODALITY and --image FILE")
    if args.task != "condition" and args.given:
        raise InputError(f"--given {' '.join(args.given)} with --task {args.task}: --given belongs to --task condition")
    kind = model.pair
    if args.mesh and {"rgb", "normal", "seg"} - set(model.modalities):
        raise InputError(f"--mesh needs rgb, normal and seg; this checkpoint has {', '.join(model.modalities)}")
    if (args.npz or (args.task == "translate" and kind is None)) and "rgb" not in (args.outputs or model.modalities):
        raise InputError(f"--npz and --task translate need the RGB: {'write it as well' if args.outputs else 'this checkpoint has ' + ', '.join(model.modalities)}")
    if args.outputs and set(args.outputs) - set(model.modalities):
        raise InputError(f"--outputs {' '.join(args.outputs)}: this checkpoint has {', '.join(model.modalities)}")
    if (args.features and kind != "feature") or (args.npz and args.task == "classify"):
        raise InputError("--features is for a checkpoint of --pair feature" if args.features else "--npz with --task classify: it makes no pictures")
    if args.task in ("restore", "classify") and kind != {"restore": "masked", "classify": "label"}[args.task]:
        raise InputError(f"--task {args.task}: needs a checkpoint of train.py --method mt-diffusion --pair {'masked' if args.task == 'restore' else 'label'}")
    if args.task in ("restore", "classify"):
        return ("rgb",)
    if args.task != "generate" and not model.conditions:
        raise InputError(f"--task {args.task}: this checkpoint (MT-Diffusion, {kind}) takes no modality as a condition; its tasks: generate"
                         + {"masked": ", restore", "label": ", classify"}.get(kind, ""))
    given = tuple(args.given or (() if args.task == "generate" else (model.modalities[model.conditions[0]],)))
    if len(set(given)) < len(given):
        raise InputError(f"--given {' '.join(given)}: a modality is there twice")
    for m in given:
        if m not in [model.modalities[i] for i in model.conditions]:
            raise InputError(f"--given {m}: this checkpoint takes {', '.join(model.modalities[i] for i in model.conditions)}")
    return given


def draw_from(args, model, vae, y, pixels, noise):
    """Sample with the flags' options, given some modalities' pixels {modality: (N, 3, fH, fW)} in [-1, 1].

    y (N,) classes -> scaled latents (N, M*C, H, W).
    """
    M, C, factor = len(model.modalities), model.latent_channels, vae.factor if vae else 1
    size = [s // factor for s in next(iter(pixels.values())).shape[2:]] if pixels else model.latent_size
    held = torch.zeros(len(y), M, C, *size, device=y.device)
    for m, p in pixels.items():
        held[:, model.modalities.index(m)] = encode_pixels(vae, p.to(y.device), noise, C)
    mask = torch.tensor([m in pixels for m in model.modalities])
    return METHODS[model.method].draw(model, y, held.flatten(1, 2), mask, noise, **options(args, model))


def options(args, model):
    """The keyword arguments of its method's draw that the flags name."""
    return {name: getattr(args, name) for name in METHODS[model.method].flags}


def read_pixels(args, items, model, vae, given, pool):
    """The items' pictures of the given modalities: {modality: (N, 3, fH, fW)} in [-1, 1], read in threads. Raises InputError where they do not match."""
    unit, meta = model.patch_size * (vae.factor if vae else 1), model.meta
    read = lambda item, m: file_pixels(item.files[m], m, fitter(args, meta, unit, item), meta["depth_space"])
    pixels = {m: torch.from_numpy(np.stack(list(pool.map(read, items, [m] * len(items))))) for m in given}
    for m in given:
        if pixels[m].shape != pixels[given[0]].shape:
            raise InputError(f"{items[0].files[m]}: its size does not match that of {given[0]}; the maps must be aligned")
    return pixels


def whole_picture(args, item, m, meta):
    """A given picture as it is to be written: with --fit full at its own size. float32 (3, H, W)."""
    fit = fitter(args, meta) if args.fit == "crop" else lambda image: image
    return file_pixels(item.files[m], m, fit, meta["depth_space"])


def sample_batch(args, items, pixels, model, meta, vae, given, device, writer):
    """Sample one batch of items of one size, their given pixels {modality: (N, 3, fH, fW)}, and write it."""
    C, M = meta["latent_channels"], len(model.modalities)
    noise = Noise(args.seed, [item.index for item in items], device)
    y = torch.tensor([item.label for item in items], device=device)
    x = draw_from(args, model, vae, y, pixels, noise)
    results = [("", x, [i for i, m in enumerate(model.modalities) if m in writer.modalities and m not in given])]
    if args.task == "translate" and model.method == "mmgen":  # a new RGB from each predicted modality
        for i, m in enumerate(model.modalities[1:], 1):
            results.append((f"{m}_to_", draw_latents(model, y, x, torch.arange(M) == i, noise, **options(args, model)), [0]))
    for prefix, latent, wanted in results:
        images = decode_latents(vae, latent, C, args.precision, wanted).cpu().numpy() if wanted else None
        for k, item in enumerate(items):
            maps = {model.modalities[i]: images[k, j] for j, i in enumerate(wanted)}
            if not prefix:  # as it was given
                maps.update({m: pixels[m][k].numpy() if args.fit == "crop" else whole_picture(args, item, m, meta) for m in given})
            writer(item, maps, prefix)


# ------------------------------------------------------------------------------------------------
# MT-Diffusion's own tasks.

def find_masks(args, items):
    """Give each item of --task restore its mask. Raises InputError where one is missing or not of its picture's size."""
    folder = {path.relative_to(args.mask).with_suffix("").as_posix().replace("/", "_"): path for path in find_files(args.mask, "mask")[1]} if args.mask.is_dir() else None
    for item in items:
        picture = item.files["rgb"]
        item.mask = folder.get(item.place, folder.get(picture.stem)) if folder is not None else args.mask
        if item.mask is None:
            raise InputError(f"{picture}: no mask {item.place} or {picture.stem} in {args.mask}")
        if not hidden_pixels(args, item, lambda mask: mask, None).any():
            raise InputError(f"{item.mask}: hides nothing; what is to be restored must be white (255)")
        sizes = [read_picture(path).size for path in (picture, item.mask)]
        if sizes[0] != sizes[1]:
            raise InputError(f"{item.mask}: {sizes[1][0]}x{sizes[1][1]}, {picture} is {sizes[0][0]}x{sizes[0][1]}; they must be of one size")


def hidden_pixels(args, item, fit, size):
    """What is to be restored, bool (H, W): white in the item's mask, or --patches random squares of a network input of this size."""
    if item.mask is None:
        corners = (np.random.default_rng((args.seed, item.index, args.patches)).random((args.patches, 2)) * size).astype(int)
        return mt_diffusion.visible(torch.from_numpy(corners)[None], torch.tensor([args.patches]), size, mt_diffusion.PATCH)[0, 0].numpy() == 0
    mask = read_picture(item.mask)
    white = mask if mask.mode == "F" else Image.fromarray((np.asarray(mask.convert("L")) > 127).astype(np.float32))
    return np.asarray(fit(white)) > 1e-3  # a pixel that shrinks away would count as known


def restore_batch(args, items, pixels, model, meta, vae, given, device, writer):
    """Fill what a mask hides; the pixels outside of it are written as they are (MT-Diffusion, Sec. 4.1).

    What lies under the mask is first filled from the nearest pixel, so that it does not leak through the autoencoder
    into the latents around it; then the latents under it are zero, as in training.
    """
    C, factor = meta["latent_channels"], vae.factor if vae else 1
    noise, fit = Noise(args.seed, [item.index for item in items], device), fitter(args, meta, model.patch_size * factor)
    pixels = pixels["rgb"]                                                                         # (N, 3, fH, fW)
    size = tuple(pixels.shape[2:])
    hidden = np.stack([hidden_pixels(args, item, fit, size) for item in items])
    filled = pixels.clone()
    for k, mask in enumerate(hidden):
        nearest = ndimage.distance_transform_edt(mask, return_distances=False, return_indices=True)
        filled[k] = 0.0 if mask.all() else pixels[k][:, nearest[0], nearest[1]]
    cells = F.max_pool2d(torch.from_numpy(hidden)[:, None].float(), factor).to(device)             # (N, 1, H, W)
    z = encode_pixels(vae, filled.to(device), noise, C)                                            # (N, C, H, W)
    x, begin = z * (1 - cells), None
    if args.sdedit:
        begin = encode_pixels(vae, torch.where(torch.from_numpy(hidden)[:, None], 0.0, pixels).to(device), noise, C), args.sdedit
        x = torch.zeros_like(x)
    known = torch.ones(len(items), dtype=torch.bool, device=device)
    latent, _ = model.sample(noise, known, x, begin=begin, size=x.shape[2:], **options(args, model))
    images = decode_latents(vae, latent, C, args.precision)[:, 0].cpu()
    for image, mask, item in zip(images, hidden, items):
        whole = whole_picture(args, item, "rgb", meta)                                             # (3, H, W) of the output
        if whole.shape[1:] != size:
            image = F.interpolate(image[None], whole.shape[1:], mode="bilinear", align_corners=False)[0]
            mask = hidden_pixels(args, item, lambda m: m, size) if item.mask else \
                F.interpolate(torch.from_numpy(mask)[None, None].float(), whole.shape[1:])[0, 0].numpy() > 0
        writer(item, {"rgb": np.where(mask, image.numpy(), whole)})
        writer(item, {"rgb": np.where(mask, np.float32(0), whole)}, "masked_")


def vector_batch(args, items, pixels, model, meta, vae, given, device, writer):
    """Images with their labels or feature vectors, both drawn where nothing is known of them (MT-Diffusion, Sec. 4.2); or
    --task classify: labels of images."""
    noise = Noise(args.seed, [item.index for item in items], device)
    if args.task == "classify":
        z = encode_pixels(vae, pixels["rgb"].to(device), noise, meta["latent_channels"])
        x = model.recognise(z, noise, precision=args.precision).softmax(1).cpu()
    else:
        x, known = torch.tensor([item.label for item in items], device=device), torch.zeros(len(items), dtype=torch.bool, device=device)
        if model.pair == "label":
            known = x < meta["num_classes"]
        elif args.features:
            vectors = read_features(args.features, model.features)
            x, known = torch.from_numpy(np.stack([vectors[item.index % len(vectors)] for item in items])).to(device), ~known
        z, x = model.sample(noise, known, x if model.pair == "label" or args.features else None, **options(args, model))
        for image, item in zip(decode_latents(vae, z, meta["latent_channels"], args.precision)[:, 0].cpu().numpy(), items):
            writer(item, {"rgb": image})
        x = x.cpu() if model.pair == "feature" else F.one_hot(x.cpu(), meta["num_classes"]).float()
    for vector, item in zip(x, items):
        path = vector_file(args.out, model.pair, item)
        with whole_file(path) as file:
            if model.pair == "feature":
                np.save(file, vector.numpy())
            else:
                chance, at = vector.topk(min(5, len(vector)))
                file.write(json.dumps([[meta["class_names"][i] if meta["class_names"] else str(i), i, p] for i, p in zip(at.tolist(), chance.tolist()) if p > 0]).encode())


def vector_file(out, pair, item):
    return out / "feature" / f"{item.stem}.npy" if pair == "feature" else out / "classes" / f"{item.stem}.json"


def read_features(path, size):
    """Vectors (K, F) of a .npy file, at the scale of the cache's. Raises InputError for anything else."""
    vectors = read_array(path)
    if vectors.dtype.kind != "f" or vectors.ndim != 2 or vectors.shape[1] != size or not np.isfinite(vectors).all():
        raise InputError(f"--features {path}: needs finite floats of shape (K, {size})")
    return to_unit(vectors.astype(np.float32)).astype(np.float32)


def report_classes(args, items, meta):
    """Print the recognised classes -> {top1, top5} over the pictures whose class is known."""
    found = [json.loads(vector_file(args.out, "label", item).read_text()) for item in items]
    for item, best in list(zip(items, found))[:12]:
        print(f"{item.stem}: " + ", ".join(f"{name} {p:.3f}" for name, _, p in best))
    told = [(item.label, [i for _, i, _ in best]) for item, best in zip(items, found) if item.label < meta["num_classes"]]
    if not told or args.task != "classify":
        return {}
    scores = dict(top1=np.mean([label == best[0] for label, best in told]), top5=np.mean([label in best for label, best in told]), labelled=len(told))
    print(f"top-1 {100 * scores['top1']:.2f} %, top-5 {100 * scores['top5']:.2f} % of {len(told)} pictures")
    return scores


def sampling_recipe(args, checkpoint, model):
    """What produced the samples: the part of a recipe that all sampling commands share."""
    chosen = options(args, model) if getattr(args, "task", None) != "classify" else {}
    count = 1 if not chosen else evaluations(args.sampler, args.steps) if "sampler" in chosen else args.steps
    return dict(checkpoint=checkpoint.name, checkpoint_sha256=sha256(checkpoint), method=model.method, step=model.step, weights="ema", evaluations=count,
                seed=args.seed, vae=model.meta["vae"], vae_sha256=model.meta["vae_sha256"], **chosen)


def take_up(out, recipe, items, files):
    """Prepare OUT -> the items still to be sampled: those without outputs newer than their inputs, if OUT is of this recipe.

    files(item) are an item's outputs. Samples of another recipe are removed at once, so that neither a later
    continuation nor an evaluation takes them for this one's.
    """
    try:
        old = json.loads((out / "meta.json").read_text())
    except (OSError, ValueError):
        old = None
    if not isinstance(old, dict) or "complete" not in old:
        old = {}
    there = lambda item, path: path.is_file() and all(given.stat().st_mtime <= path.stat().st_mtime for given in item.files.values())
    if {k: v for k, v in old.items() if k not in ("complete", "scores")} == json.loads(json.dumps(recipe)):
        left = [item for item in items if not all(there(item, path) for path in files(item))]
        if len(left) < len(items):
            print(f"{out}: {len(items) - len(left)} of {len(items)} samples are there; remove {out} to draw them again")
        return left
    if old:
        print(f"{out}: replaces {len(old.get('samples', ()))} samples of another recipe")
    for sample in old.get("samples", ()):
        for folder in (*MODALITIES, *(f"{m}_to_rgb" for m in MODALITIES), "masked_rgb", "mesh", "classes", "feature"):
            for end in (".png", ".npy", ".ply", ".json"):
                (out / folder / f"{sample['stem']}{end}").unlink(missing_ok=True)
    for name in ("meta.json", "grid.png", "samples.npz"):
        (out / name).unlink(missing_ok=True)
    with whole_file(out / "meta.json") as file:
        file.write(json.dumps({**recipe, "complete": False}, indent=1).encode())
    return items


def write_npz(out, items):
    """OUT/samples.npz: the written RGB as arr_0 uint8 (N, H, W, 3), 256 pictures in memory at a time."""
    read = lambda item: np.asarray(Image.open(out / "rgb" / f"{item.stem}.png").convert("RGB"))
    with whole_file(out / "samples.npz") as file, zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array, \
            concurrent.futures.ThreadPoolExecutor() as pool:
        np.lib.format.write_array_header_1_0(array, dict(descr="|u1", fortran_order=False, shape=(len(items), *read(items[0]).shape)))
        for at in tqdm(range(0, len(items), 256), desc="npz"):
            for image in pool.map(read, items[at:at + 256]):
                array.write(image.tobytes())


def main():
    """Sample what the flags ask for, in batches of equal size shared out over the processes; what is there already is kept."""
    args = arguments()
    rank, world, device = setup()
    checkpoint = locate(args.ckpt or newest_checkpoint())
    model = open_model(checkpoint, device, args.precision, args.compile)
    given = conditions(args, model)
    settle_flags(args, model)
    meta, vae = model.meta, checked_vae(args.vae, model.meta)
    vae = vae.to(device) if vae else None
    kind = model.pair
    if args.features:
        args.num = args.num or len(read_features(args.features, model.features))
    items = requests(args, given, meta)
    if args.mask:
        find_masks(args, items)
    if args.class_id and kind and kind != "label":
        raise InputError(f"--class-id {args.class_id[0]}: this checkpoint (MT-Diffusion, {kind}) knows nothing of classes")
    if kind == "label" and not args.class_id and args.task == "generate" and args.classes == "random":
        for item in items:  # drawn with its picture
            item.label = meta["num_classes"]
    if rank == 0:
        print(f"{checkpoint}: {', '.join(model.modalities)}, {meta['num_classes']} classes, step {model.step}; {len(items)} samples on {device}")
        if args.cfg != 1.0 and any(item.label == meta["num_classes"] for item in items):
            print(f"warning: --cfg {args.cfg} has no effect on pictures without a class; give --class-id")
    again = [f"{m}_to_" for m in model.modalities[1:]] if args.task == "translate" and model.method == "mmgen" else ["masked_"] if args.task == "restore" else []
    outputs = [m for m in model.modalities if m in (args.outputs or model.modalities) and args.task != "classify"]
    writer = Writer(args.out, outputs, args.fit, args.truncate)
    batch_of = restore_batch if args.task == "restore" else vector_batch if kind in ("label", "feature") else sample_batch
    files = lambda item: [path for prefix in ("", *again) for m, paths in writer.files(item, prefix).items() if not prefix or m == "rgb" for path in paths] \
        + ([vector_file(args.out, kind, item)] if kind in ("label", "feature") else [])
    extras = {name: str(getattr(args, name)) for name in ("mask", "patches", "sdedit", "features") if getattr(args, name) is not None}
    extras.update({"features_sha256": sha256(args.features)} if args.features else {})
    recipe = rank == 0 and dict(task=args.task, given=given, **sampling_recipe(args, checkpoint, model), fit=args.fit, truncate=args.truncate,
                  outputs={m: MODALITIES[m].meaning for m in outputs}, palette=meta["palette"],
                  **extras,
                  samples=[dict(stem=item.stem, class_id=item.label, given={m: str(p) for m, p in item.files.items()}, **({"mask_sha256": sha256(item.mask)} if item.mask else {}))
                           for item in items])
    left = take_up(args.out, recipe, items, files) if rank == 0 else None
    if world > 1:
        box = [left and [item.index for item in left]]
        torch.distributed.broadcast_object_list(box)
        left = [items[i] for i in box[0] or ()]
    size = 1 if args.fit == "full" and given else args.batch_size  # pictures of different shapes do not stack
    batches = [left[i:i + size] for i in range(0, len(left), size)]
    mine = batches[rank::world]
    with writer, concurrent.futures.ThreadPoolExecutor() as pool, concurrent.futures.ThreadPoolExecutor(1) as ahead:
        read = lambda k: ahead.submit(read_pixels, args, mine[k], model, vae, given, pool) if k < len(mine) else None
        following = read(0)
        for k, batch in enumerate(tqdm(mine, desc=args.task, disable=rank > 0)):
            pixels, following = following.result(), read(k + 1)
            batch_of(args, batch, pixels, model, meta, vae, given, device, writer)
    barrier()
    if args.mesh:
        for item in items[rank::world]:
            write_object(args, item, meta)
    barrier()
    if rank > 0:
        return
    scores = {"scores": report_classes(args, items, meta)} if kind == "label" else {}
    if args.task == "restore":
        write_grid(args, items, model, meta, (), ["masked_rgb", "rgb"])
    elif outputs:
        write_grid(args, items, model, meta, given, sorted(outputs + [f"{prefix}rgb" for prefix in again], key=lambda m: m not in given))
    if args.npz:
        write_npz(args.out, items)
    with whole_file(args.out / "meta.json") as file:
        file.write(json.dumps({**recipe, **scores, "complete": True}, indent=1).encode())
    print(args.out / ("grid.png" if outputs else "classes"))


if __name__ == "__main__":
    run(main)
