"""Stage 4: sample MMGen: generate, understand, condition, translate (Fig. 1 and 5).

    python sample.py --task understand                                   # bundled weights, bundled scenes
    python sample.py --task understand --image photo.jpg --ckpt runs/mmgen/latest.pt
    python sample.py --task generate --class-id 207 --num 8 --cfg 1.8 --cfg-interval 0 0.7
    python sample.py --task condition --given depth --image depth.png
    python sample.py --task condition --given depth --image depth.png --mesh   # and its object as a PLY (Fig. 6)
    python sample.py --task translate --image photo.jpg                  # RGB -> modalities -> a new RGB from each

--ckpt defaults to the newest run, else the bundled demo. Under torchrun the samples are shared out. Noise is
seeded per sample by (seed, index): the same pictures whatever the batch size and the number of processes.
Writes OUT/<modality>/<stem>.png (.npy for depth and normals), OUT/grid.png and OUT/meta.json.
"""
import argparse
import contextlib
import json
import pathlib
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from distributed import InputError, barrier, run, setup, whole_file
from mesh import pick_segment, write_mesh
from model import MODALITIES, load_model
from prep_latents import EXTENSIONS, centre_crop, nearest_colour, read_modality, segments
from vae import load_vae, sha256
from weights import locate

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
        self.generators, self.device = [np.random.default_rng((seed, int(i))) for i in indices], device

    def __call__(self, shape):
        """(N, *shape)"""
        return torch.from_numpy(np.stack([g.standard_normal(tuple(shape), np.float32) for g in self.generators])).to(self.device)


@torch.inference_mode()
def draw_latents(model, y, held, given, noise, sampler="sde", steps=250, cfg=1.0, interval=(0.0, 1.0), precision="fp32"):
    """Sample all modalities -> scaled latents (N, M*C, H, W).

    y (N,) classes; held (N, M*C, H, W) clean scaled latents, read where given (M,) bool is set: those channels
    stay at t = 0.995 throughout and are returned clean. Guidance v = v_null + cfg (v_class - v_null) acts on all
    channels, while the noise level 1 - t lies in interval.
    """
    M, C, N = len(model.modalities), model.latent_channels, len(y)
    given = given.to(held.device)
    mask = given.repeat_interleave(C)[None, :, None, None]  # (1, M*C, 1, 1)
    rows, null = given.expand(N, M), torch.full_like(y, model.num_classes)
    clamped = GIVEN_TIME * held + (1 - GIVEN_TIME) * noise(held.shape[1:])

    def network(x, t, y, rows):
        with torch.autocast(x.device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
            return model(x, t, y, rows)[0].float()

    def velocity(x, t):
        x = torch.where(mask, clamped, x)
        times = torch.where(rows, GIVEN_TIME, t)  # (N, M)
        if cfg == 1.0 or not interval[0] <= 1 - t <= interval[1]:
            return network(x, times, y, rows)
        v, v_null = network(torch.cat([x, x]), torch.cat([times, times]), torch.cat([y, null]), torch.cat([rows, rows])).chunk(2)
        return v_null + cfg * (v - v_null)

    x = SAMPLERS[sampler](velocity, noise(held.shape[1:]), steps, lambda: noise(held.shape[1:]))
    return torch.where(mask, held, x)


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
def decode_latents(vae, x, channels, batch=64):
    """Scaled latents (N, M*C, H, W) -> pixels (N, M, 3, fH, fW) in [-1, 1]."""
    z = x.unflatten(1, (-1, channels))
    if vae is None:
        return z.clamp(-1, 1)
    pixels = torch.cat([vae.decode(part / vae.scale) for part in z.flatten(0, 1).split(batch)])
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
    """train.py's look at all tasks: a grid from four rows of the cache, in 25 Euler steps."""

    def __init__(self, meta, cache, device):
        self.meta, self.cache, self.device = meta, cache, device
        try:
            self.vae = checked_vae(None, meta)
        except InputError as error:
            self.vae = None
            print(f"no previews: {error}")
            self.cache = None
        if self.vae is not None:
            self.vae.to(device)

    def __call__(self, model, path):
        if self.cache is None:
            return
        C, rows = self.meta["latent_channels"], self.cache.rows[:4]
        stored = [torch.from_numpy(self.cache.arrays[m][rows]).float() if m in self.cache.arrays else None for m in model.modalities]
        blank = torch.zeros(len(rows), C, *self.meta["latent_size"])
        clean = [blank if s is None else s[:, 0] * self.meta["scale"] if self.vae is not None else s / 127.5 - 1 for s in stored]
        held = torch.cat(clean, 1).to(self.device)
        y = torch.from_numpy(self.cache.arrays["labels"][rows]).to(self.device)
        columns, cells = [], [[] for _ in rows]
        for task in (None, *range(len(model.modalities)), "data"):
            given = torch.tensor([i == task for i in range(len(model.modalities))])
            noise = Noise(0, range(len(rows)), self.device)
            x = held if task == "data" else draw_latents(model, y, held, given, noise, "euler", 25)
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


def class_of(path, meta):
    """The class named by a file's folder, if the checkpoint knows it."""
    names = {name.replace(" ", "_"): i for i, name in enumerate(meta["class_names"])}
    return names.get(path.parent.name.replace(" ", "_"))


def find_files(location, modality):
    """A picture, or all pictures below a folder (its <modality>/ subfolder if it has one), sorted."""
    location = pathlib.Path(location)
    if location.is_dir():
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
    stems = [item.stem for item in items]
    if len(set(stems)) < len(stems):
        raise InputError(f"--image {base}: two pictures share the stem {max(set(stems), key=stems.count)}; rename one")
    return items


def fitter(args, meta, factor, item=None):
    """What brings a PIL image to the network's size: ADM's centre crop, or (--fit full) the whole picture."""
    S = meta["resolution"]
    if args.fit == "crop":
        return lambda image: centre_crop(image, S)

    def whole(image):
        if item is not None:
            item.size = image.size
        scale, unit = S / min(image.size), 2 * factor
        size = tuple(max(unit, round(s * scale / unit) * unit) for s in image.size)
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
    """Writes an item's maps; keeps what the grid shows."""

    def __init__(self, out, modalities, fit, truncate):
        self.out, self.modalities, self.fit, self.truncate = out, modalities, fit, truncate

    def files(self, item, prefix=""):
        """The outputs of an item: {modality: its paths}."""
        base = lambda m: self.out / f"{prefix}{m}" / item.stem
        return {m: [base(m).with_name(base(m).name + end) for end in (".png", ".npy")[:1 + MODALITIES[m].keep_array]] for m in self.modalities}

    def __call__(self, item, pixels, prefix=""):
        """pixels: {modality: float32 (3, H, W) in [-1, 1]}."""
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
                    array = read_modality(truth[m], m, fitter(args, meta, 1), meta["depth_space"])
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
    parser.add_argument("--sampler", choices=list(SAMPLERS), default="sde")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance scale, 1 = none")
    parser.add_argument("--cfg-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"), help="noise levels with guidance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")


def check_sampling_flags(args):
    """Raise InputError for values of the shared flags that cannot be."""
    if args.steps < 1 or args.batch_size < 1 or args.seed < 0 or (args.num is not None and args.num < 1) or not 0 <= args.cfg_interval[0] <= args.cfg_interval[1] <= 1:
        raise InputError(f"--steps {args.steps} --batch-size {args.batch_size} --num {args.num} --seed {args.seed} --cfg-interval {args.cfg_interval}: "
                         "counts must be at least 1, the seed not negative, the interval 0 <= LO <= HI <= 1")


def pixel(text):
    """X,Y -> (x, y)."""
    x, y = text.split(",")
    return int(x), int(y)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=("generate", "understand", "condition", "translate"))
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
    args = parser.parse_args()
    if args.npz and args.fit == "full":
        raise InputError("--npz with --fit full: pictures of different sizes do not fit one array; use --fit crop")
    if (args.npz or args.task == "translate") and args.outputs and "rgb" not in args.outputs:
        raise InputError(f"--outputs {' '.join(args.outputs)}: --npz and --task translate need the RGB; write it as well")
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
    given = tuple(args.given or (() if args.task == "generate" else ("rgb",)))
    if len(set(given)) < len(given):
        raise InputError(f"--given {' '.join(given)}: a modality is there twice")
    if args.mesh and {"rgb", "normal", "seg"} - set(model.modalities):
        raise InputError(f"--mesh needs rgb, normal and seg; this checkpoint has {', '.join(model.modalities)}")
    for m in given:
        if m not in model.modalities:
            raise InputError(f"--given {m}: this checkpoint has {', '.join(model.modalities)}")
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
    return draw_latents(model, y, held.flatten(1, 2), mask, noise, **options(args))


def options(args):
    """The keyword arguments of draw_latents that the flags name."""
    return dict(sampler=args.sampler, steps=args.steps, cfg=args.cfg, interval=args.cfg_interval, precision=args.precision)


def sample_batch(args, items, model, meta, vae, given, device, writer):
    """Sample one batch of items of one size and write it."""
    C, M = meta["latent_channels"], len(model.modalities)
    noise = Noise(args.seed, [item.index for item in items], device)
    y = torch.tensor([item.label for item in items], device=device)
    read = lambda item, m, fit: MODALITIES[m].to_pixels(read_modality(item.files[m], m, fit, meta["depth_space"]))
    pixels = {m: torch.from_numpy(np.stack([read(item, m, fitter(args, meta, vae.factor if vae else 1, item)) for item in items])) for m in given}
    for m in given:
        if pixels[m].shape != pixels[given[0]].shape:
            raise InputError(f"{items[0].files[m]}: its size does not match that of {given[0]}; the maps must be aligned")
    x = draw_from(args, model, vae, y, pixels, noise)
    results = [("", x, given)]
    if args.task == "translate":  # a new RGB from each predicted modality
        for i, m in enumerate(model.modalities[1:], 1):
            results.append((f"{m}_to_", draw_latents(model, y, x, torch.arange(M) == i, noise, **options(args)), None))
    for prefix, latent, kept in results:
        images = decode_latents(vae, latent, C).cpu().numpy()
        for k, item in enumerate(items):
            maps = {m: images[k, i] for i, m in enumerate(model.modalities) if kept is not None or m == "rgb"}
            for m in kept or ():  # as it was given
                maps[m] = pixels[m][k].numpy() if args.fit == "crop" else read(item, m, lambda image: image)
            writer(item, maps, prefix)


def sampling_recipe(args, checkpoint, model):
    """What produced the samples: the part of a recipe that all sampling commands share."""
    return dict(checkpoint=checkpoint.name, checkpoint_sha256=sha256(checkpoint), step=model.step, weights="ema", sampler=args.sampler, steps=args.steps,
                evaluations=evaluations(args.sampler, args.steps), cfg=args.cfg, cfg_interval=list(args.cfg_interval), seed=args.seed, precision=args.precision, vae=model.meta["vae"], vae_sha256=model.meta["vae_sha256"])


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
    if {k: v for k, v in old.items() if k != "complete"} == json.loads(json.dumps(recipe)):
        left = [item for item in items if not all(there(item, path) for path in files(item))]
        if len(left) < len(items):
            print(f"{out}: {len(items) - len(left)} of {len(items)} samples are there; remove {out} to draw them again")
        return left
    if old:
        print(f"{out}: replaces {len(old.get('samples', ()))} samples of another recipe")
    for sample in old.get("samples", ()):
        for end in (".ply", ".png"):
            (out / "mesh" / f"{sample['stem']}{end}").unlink(missing_ok=True)
        for m in (*MODALITIES, *(f"{m}_to_rgb" for m in MODALITIES)):
            for end in (".png", ".npy"):
                (out / m / f"{sample['stem']}{end}").unlink(missing_ok=True)
    for name in ("meta.json", "grid.png", "samples.npz"):
        (out / name).unlink(missing_ok=True)
    with whole_file(out / "meta.json") as file:
        file.write(json.dumps({**recipe, "complete": False}, indent=1).encode())
    return items


def write_npz(out, items):
    """OUT/samples.npz: the written RGB as arr_0 uint8 (N, H, W, 3), one picture in memory at a time."""
    read = lambda item: np.asarray(Image.open(out / "rgb" / f"{item.stem}.png").convert("RGB"))
    with whole_file(out / "samples.npz") as file, zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
        np.lib.format.write_array_header_1_0(array, dict(descr="|u1", fortran_order=False, shape=(len(items), *read(items[0]).shape)))
        for item in tqdm(items, desc="npz"):
            array.write(read(item).tobytes())


def main():
    args = arguments()
    rank, world, device = setup()
    checkpoint = locate(args.ckpt or newest_checkpoint())
    model = load_model(checkpoint, device=device)
    meta, vae = model.meta, checked_vae(args.vae, model.meta)
    vae = vae.to(device) if vae else None
    given = conditions(args, model)
    items = requests(args, given, meta)
    if rank == 0:
        print(f"{checkpoint}: {', '.join(model.modalities)}, {meta['num_classes']} classes, step {model.step}; {len(items)} samples on {device}")
        if args.cfg != 1.0 and any(item.label == meta["num_classes"] for item in items):
            print(f"warning: --cfg {args.cfg} has no effect on pictures without a class; give --class-id")
    outputs = [m for m in model.modalities if m in (args.outputs or model.modalities)]
    writer = Writer(args.out, outputs, args.fit, args.truncate)
    prefixes = ("", *(f"{m}_to_" for m in model.modalities[1:])) if args.task == "translate" else ("",)
    files = lambda item: [path for prefix in prefixes for m, paths in writer.files(item, prefix).items() if not prefix or m == "rgb" for path in paths]
    recipe = rank == 0 and dict(task=args.task, given=given, **sampling_recipe(args, checkpoint, model), fit=args.fit, truncate=args.truncate,
                  outputs={m: MODALITIES[m].meaning for m in outputs}, palette=meta["palette"],
                  samples=[dict(stem=item.stem, class_id=item.label, given={m: str(p) for m, p in item.files.items()}) for item in items])
    left = take_up(args.out, recipe, items, files) if rank == 0 else None
    if world > 1:
        box = [left and [item.index for item in left]]
        torch.distributed.broadcast_object_list(box)
        left = [items[i] for i in box[0] or ()]
    size = 1 if args.fit == "full" and given else args.batch_size  # pictures of different shapes do not stack
    batches = [left[i:i + size] for i in range(0, len(left), size)]
    for batch in tqdm(batches[rank::world], desc=args.task, disable=rank > 0):
        sample_batch(args, batch, model, meta, vae, given, device, writer)
    barrier()
    if args.mesh:
        for item in items[rank::world]:
            write_object(args, item, meta)
    barrier()
    if rank > 0:
        return
    folders = outputs + ([f"{m}_to_rgb" for m in model.modalities[1:]] if args.task == "translate" else [])
    folders.sort(key=lambda m: m not in given)
    write_grid(args, items, model, meta, given, folders)
    if args.npz:
        write_npz(args.out, items)
    with whole_file(args.out / "meta.json") as file:
        file.write(json.dumps({**recipe, "complete": True}, indent=1).encode())
    print(args.out / "grid.png")


if __name__ == "__main__":
    run(main)
