"""Stage 5b: dense prediction: depth (Table 3), normals, segmentation, of a checkpoint or of a folder of predictions.

    python eval_depth.py --toy 256 --sampler euler --steps 2                # held-out toy scenes, with the VAE's ceiling
    torchrun --nproc_per_node=8 -- eval_depth.py --ckpt 0600000.pt --scannet scans --num 5000 --json scannet.json
    python eval_depth.py --data DIR --depth-space depth                     # <root>/{rgb,depth,normal,seg}/<class>/<name>
    python eval_depth.py --pred samples --gt truth --modality depth         # no model: files matched by stem

Ground truth is cropped to its centre square and never resampled; predictions are brought to its size. Depth: .npy, or
16-bit PNG in millimetres; values outside --depth-range are not scored. Writes OUT/per_image.csv and OUT/grid.png (best,
median and worst cases).
"""
import argparse
import csv
import functools
import hashlib
import io
import json
import math
import pathlib
import random
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

import toy_scenes
from distributed import InputError, barrier, run, setup, whole_file
from model import MODALITIES, unit
from prep_latents import EXTENSIONS, centre_crop, nearest_colour, read_array, read_modality, read_picture, segments
from sample import (Noise, check_sampling_flags, checked_vae, class_of, decode_latents, draw_from, draw_grid, newest_checkpoint, open_model, sampling_flags,
                    sampling_recipe, settle_flags)
from weights import locate

IGNORE = 255                            # segmentation label that is not scored
ANGLES = (5, 7.5, 11.25, 22.5, 30)      # degrees whose share is reported
BINS = 1_800_000                        # of the pooled median: 1e-4 degrees each
EDGES = np.arange(1, 20) / 20           # thresholds of a soft edge map


# ------------------------------------------------------------------------------------------------
# Depth.

def align(prediction, depth, valid, space):
    """Scale and shift by least squares over the valid pixels, float64 -> depth (H, W) in the truth's unit.

    space "disparity": fit s * p + t to 1 / depth, keep it above 1e-3, invert; "depth": fit s * p + t to depth (Marigold's).
    A constant prediction gets the minimum-norm solution.
    """
    p, g = prediction.astype(np.float64), depth[valid].astype(np.float64)
    target = 1 / g if space == "disparity" else g
    scale, shift = np.linalg.lstsq(np.stack([p[valid], np.ones_like(g)], 1), target, rcond=None)[0]
    fit = p * scale + shift
    return 1 / np.maximum(fit, 1e-3) if space == "disparity" else fit


def depth_scores(aligned, depth, valid):
    """AbsRel, RMSE and shares within 1.25^k over the valid pixels of one image."""
    p, g = aligned[valid], depth[valid].astype(np.float64)
    ratio = np.maximum(p / g, g / p)
    return {"abs_rel": np.mean(np.abs(p - g) / g), "rmse": np.sqrt(np.mean((p - g) ** 2)), **{f"delta{k}": np.mean(ratio < 1.25 ** k) for k in (1, 2, 3)}}


# ------------------------------------------------------------------------------------------------
# Normals.

def angles(prediction, truth):
    """Angles in degrees, float64, where the truth is a direction: (pixels,). Zero predictions count as 90."""
    p, g = prediction.astype(np.float64), truth.astype(np.float64)
    mask = np.linalg.norm(g, axis=-1) > 0
    p, g = p[mask], g[mask]
    length = np.linalg.norm(p, axis=-1) * np.linalg.norm(g, axis=-1)
    return np.degrees(np.arccos(np.clip((p * g).sum(-1) / np.maximum(length, 1e-12), -1, 1)))


def normal_scores(angle):
    """Mean, median and RMS angle and the percentages under ANGLES, of one image or of all pixels."""
    return {"normal_mean": np.mean(angle), "normal_median": np.median(angle), "normal_rmse": np.sqrt(np.mean(angle ** 2)),
            **{f"normal_{a}": 100 * np.mean(angle < a) for a in ANGLES}}


# ------------------------------------------------------------------------------------------------
# Segmentation.

def semantic_scores(confusion, eps=None):
    """Confusion (K, K), rows truth -> pixel accuracy, class accuracy, mIoU.

    Classes absent from both sides are ignored; eps (1e-12) counts them as 0, as CycleGAN's Cityscapes script does.
    """
    hit, rows, columns = np.diag(confusion).astype(np.float64), confusion.sum(1), confusion.sum(0)
    union = rows + columns - hit
    if eps is not None:
        return {"pixel_accuracy": hit.sum() / (confusion.sum() + eps), "class_accuracy": np.mean(hit / (rows + eps)), "miou": np.mean(hit / (union + eps))}
    share = lambda parts: np.mean(hit[parts > 0] / parts[parts > 0]) if (parts > 0).any() else math.nan
    return {"pixel_accuracy": hit.sum() / max(confusion.sum(), 1), "class_accuracy": share(rows), "miou": share(union)}


def boundary(index):
    """Pixels whose right or lower neighbour is of another segment."""
    edge = np.zeros(index.shape, bool)
    edge[:, :-1] |= index[:, :-1] != index[:, 1:]
    edge[:-1] |= index[:-1] != index[1:]
    return edge


def matches(a, b):
    """Edge maps (H, W) bool -> pixels of a within ceil(0.008 * diagonal) pixels of b, pixels of a, and the same of b: (4,)."""
    radius = math.ceil(0.008 * math.hypot(*a.shape))
    near = lambda one, other: int((ndimage.distance_transform_edt(~other)[one] <= radius).sum()) if other.any() else 0
    return np.array([near(a, b), a.sum(), near(b, a), b.sum()])


def f_score(counts):
    """matches (..., 4) -> F; 1 where both maps are empty."""
    hit_a, all_a, hit_b, all_b = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    precision, recall = hit_a / np.maximum(all_a, 1), hit_b / np.maximum(all_b, 1)
    return np.where(all_a + all_b == 0, 1.0, 2 * precision * recall / np.maximum(precision + recall, 1e-12))


def instance_scores(prediction, truth):
    """Segment indices (H, W) of one image -> Hungarian-matched mIoU over the true segments, mean best overlap, ARI, boundary F."""
    table = np.zeros((truth.max() + 1, prediction.max() + 1), np.int64)
    np.add.at(table, (truth.ravel(), prediction.ravel()), 1)
    rows, columns = table.sum(1), table.sum(0)
    iou = table / (rows[:, None] + columns - table)
    matched = iou[linear_sum_assignment(iou, maximize=True)].sum() / len(rows)
    pairs = lambda counts: (counts * (counts - 1.0) / 2).sum()
    both, expected = pairs(table), pairs(rows) * pairs(columns) / max(pairs(np.array([truth.size])), 1)
    most = (pairs(rows) + pairs(columns)) / 2
    return {"miou": matched, "best_overlap": iou.max(1).mean(), "ari": (both - expected) / (most - expected) if most != expected else 1.0,
            "boundary_f": float(f_score(matches(boundary(prediction), boundary(truth))))}


# ------------------------------------------------------------------------------------------------
# Files of truth and predictions, in the user's units.

def _array(path):
    array = read_array(path)
    return array if array.dtype.kind == "f" else array.astype(np.float32)


def read_depth(path):
    """.npy floats (H, W), or a 16-bit picture in millimetres, 0 = unknown -> float (H, W), NaN where unknown."""
    if path.suffix == ".npy":
        depth = _array(path)
        if depth.ndim != 2:
            raise InputError(f"{path}: shape {depth.shape}; depth needs (H, W)")
        return depth
    image = read_picture(path)  # [0, 1]
    with Image.open(path) as raw:
        if not raw.mode.startswith("I"):
            raise InputError(f"{path}: pictures of mode {raw.mode} carry no unit; give depth as .npy or as 16-bit PNG in millimetres")
    depth = np.round(np.asarray(image, np.float64) * 65535) / 1000
    return np.where(depth > 0, depth, np.nan)


def read_normal(path):
    """.npy (H, W, 3) or (3, H, W), or a picture xyz * 0.5 + 0.5 -> float (H, W, 3), unit length, 0 where unknown (zero, black)."""
    if path.suffix == ".npy":
        normal = _array(path)
        if normal.ndim == 3 and normal.shape[0] == 3 and normal.shape[2] != 3:
            normal = normal.transpose(1, 2, 0)
        if normal.ndim != 3 or normal.shape[2] != 3 or not np.isfinite(normal).all():
            raise InputError(f"{path}: shape {normal.shape}; normals need (H, W, 3) of finite values")
        known = np.linalg.norm(normal, axis=-1, keepdims=True) > 1e-6
    else:
        pixels = np.asarray(read_picture(path).convert("RGB"))
        normal, known = pixels / 255.0 * 2 - 1, pixels.any(-1, keepdims=True)
    return np.where(known, unit(normal), 0)


def read_seg(path):
    """Labels (H, W) of a grey or palette picture of 8 or 16 bits, colours uint8 (H, W, 3) of any other."""
    image = read_picture(path)  # says what is wrong with the file, if anything
    with Image.open(path) as raw:
        if raw.mode in ("L", "P", "1") or raw.mode.startswith("I"):
            return np.asarray(raw).astype(np.int64)
    return np.asarray(image.convert("RGB"))


READERS = {m: functools.partial(read_modality, modality=m, fit=lambda image: image) for m in MODALITIES if m != "rgb"}
READERS |= {"depth": read_depth, "normal": read_normal, "seg": read_seg}  # their truth has a unit, unknown pixels, labels


def stems(base, modality):
    """Files of a modality below a folder -> {stem, with _ for /: path}; of a picture and an array the array counts."""
    base, files = base / modality if (base / modality).is_dir() else base, {}
    for path in sorted(base.rglob("*"), key=lambda p: (p.suffix == ".npy", p)):
        if path.suffix.lower() in EXTENSIONS and path.is_file():
            stem = path.relative_to(base).with_suffix("").as_posix().replace("/", "_")
            if stem in files and (path.suffix != ".npy" or files[stem].suffix == ".npy"):
                raise InputError(f"{path}: the stem {stem} is there twice ({files[stem]}); keep one")
            files[stem] = path
    if not files:
        raise InputError(f"{base}: no pictures or arrays of {modality} in this folder")
    return files


# ------------------------------------------------------------------------------------------------
# Sources. source.names; source.frame(i) -> Frame; source.modalities with truth; source.recipe.

class Frame(NamedTuple):
    name: str
    rgb: Image.Image        # None in a comparison of folders
    class_id: int           # None when unknown
    truth: dict             # {modality: array}
    prediction: dict        # {modality: array}, None where a model predicts


def square(array):
    """The centre square of (H, W[, 3])."""
    side = min(array.shape[:2])
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    return array[top:top + side, left:left + side]


def square_frame(name, rgb, class_id, truth):
    """A Frame of one picture and its truth: the RGB at the truth's size, both cut to the centre square."""
    for m, array in truth.items():
        height, width = array.shape[:2]
        if abs(rgb.width / rgb.height / (width / height) - 1) > 0.02:
            raise InputError(f"{name}: the RGB is {rgb.width}x{rgb.height}, its {m} {width}x{height}; they must show the same view")
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    return Frame(name, Image.fromarray(square(np.asarray(rgb))), class_id, {m: square(a) for m, a in truth.items()}, None)


class Toy:
    """Held-out toy scenes."""

    modalities, palette, seg_mode = tuple(m for m in READERS if m in toy_scenes.MAPS or MODALITIES[m].derive), toy_scenes.PALETTE, "semantic"

    def __init__(self, count):
        self.names = [str(toy_scenes.HELD_OUT + i) for i in range(count)]
        self.recipe = dict(source="toy, held out", seeds=[toy_scenes.HELD_OUT, toy_scenes.HELD_OUT + count])

    def frame(self, i):
        scene = toy_scenes.render(toy_scenes.HELD_OUT + i)
        derived = {m: MODALITIES[m].derive(scene.rgb) for m in self.modalities if MODALITIES[m].derive}
        return Frame(self.names[i], Image.fromarray(scene.rgb), None, dict(depth=scene.depth, normal=scene.normal, seg=scene.seg, **derived), None)


class ScanNet:
    """Frames as ScanNet exports them: <scene>/{color,colour}/<k>.jpg and <scene>/depth/<k>.png in millimetres.

    --list names the frames (an RGB and a depth file in each line, Marigold's format); --num of them are drawn with --seed.
    """

    modalities, palette, seg_mode = ("depth",), None, "instance"

    def __init__(self, args):
        if args.list:
            try:
                lines = [line.split("\t" if "\t" in line else None) for line in args.list.read_text().splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"--list {args.list}: not readable ({error})")
            if not lines or any(len(line) < 2 for line in lines):
                raise InputError(f"--list {args.list}: each line names an RGB file and a depth file below {args.scannet}")
            pairs = [tuple(self._listed(args, file) for file in line[:2]) for line in lines]
        else:
            below = lambda path: path.relative_to(args.scannet).as_posix()
            colours = {(p.parent.parent, p.stem): p for folder in ("color", "colour") for p in args.scannet.rglob(f"{folder}/*") if p.suffix.lower() in EXTENSIONS}
            depths = sorted(args.scannet.rglob("depth/*.png"))
            pairs = [(below(colours[key]), below(p)) for p in depths if (key := (p.parent.parent, p.stem)) in colours]
            if not pairs:
                raise InputError(f"--scannet {args.scannet}: no frames; the layout is <scene>/color/<k>.jpg beside <scene>/depth/<k>.png")
            if len(pairs) < len(depths):
                print(f"{args.scannet}: {len(depths) - len(pairs)} of {len(depths)} depth frames have no picture in color/ and are not used")
        count = args.num or (len(pairs) if args.list else 5000)
        if count < len(pairs):
            pairs = sorted(random.Random(args.seed).sample(pairs, count))
        self.root, self.pairs, self.names = args.scannet, pairs, [rgb for rgb, _ in pairs]
        text = "".join(f"{rgb}\t{depth}\n" for rgb, depth in pairs)
        if not dist.is_initialized() or dist.get_rank() == 0:
            with whole_file(args.out / "frames.txt") as file:
                file.write(text.encode())
        self.recipe = dict(source="scannet", frames_sha256=hashlib.sha256(text.encode()).hexdigest(), list=args.list and args.list.name)

    @staticmethod
    def _listed(args, file):
        """A listed file; Marigold's lists write 000300.jpg where ScanNet's exporter writes 300.jpg."""
        path = pathlib.PurePosixPath(file)
        plain = path.with_name(f"{int(path.stem)}{path.suffix}") if path.stem.isdigit() else path
        for found in (path, plain):
            if (args.scannet / found).is_file():
                return found.as_posix()
        raise InputError(f"--list {args.list}: {args.scannet / file}: no such file; export this frame or leave its line out")

    def frame(self, i):
        rgb, depth = self.pairs[i]
        return square_frame(rgb, read_picture(self.root / rgb).convert("RGB"), None, dict(depth=read_depth(self.root / depth)))


class Tree:
    """A folder tree as prep_latents.py reads it, with truth in units."""

    palette = None

    def __init__(self, args, meta):
        self.files = {m: stems(args.data, m) for m in MODALITIES if (args.data / m).is_dir()}
        if "rgb" not in self.files or len(self.files) == 1:
            raise InputError(f"--data {args.data}: needs rgb/ and one of {', '.join(READERS)}; found {', '.join(self.files) or 'none'}")
        same_stems(self.files["rgb"], {m: files for m, files in self.files.items() if m != "rgb"})
        self.modalities = tuple(m for m in READERS if m in self.files or MODALITIES[m].derive)
        self.names, self.meta, self.space = sorted(self.files["rgb"]), meta, args.depth_space
        self.seg_mode = meta["seg_mode"]
        self.recipe = dict(source="folder", folder=args.data.name, depth_space=args.depth_space)

    def frame(self, i):
        name = self.names[i]
        rgb = self.files["rgb"][name]
        picture = read_picture(rgb).convert("RGB")
        truth = {m: READERS[m](self.files[m][name]) if m in self.files else MODALITIES[m].derive(np.asarray(picture)) for m in self.modalities}
        if "depth" in truth and self.space == "disparity":
            truth["depth"] = 1 / np.where(truth["depth"] > 0, truth["depth"], np.nan)
        return square_frame(name, picture, class_of(rgb, self.meta), truth)


class Pairs:
    """Predictions and truth of a folder each, matched by stem; nothing is cropped or resized."""

    palette, seg_mode = None, "semantic"

    def __init__(self, args):
        for folder in (args.pred, args.gt):
            if not folder.is_dir():
                raise InputError(f"{folder}: no such folder")
        both = [m for m in READERS if (args.pred / m).is_dir() and (args.gt / m).is_dir()]
        self.modalities = tuple(args.modality or both)
        if not self.modalities or (len(self.modalities) > 1 and set(self.modalities) - set(both)):
            raise InputError(f"--pred {args.pred} --gt {args.gt}: no {'/ '.join(READERS)}/ folder in both; name one with --modality when the files lie in the folders themselves")
        self.pred, self.gt = ({m: stems(folder, m) for m in self.modalities} for folder in (args.pred, args.gt))
        for m in self.modalities:
            same_stems(self.gt[m], {f"{args.pred} ({m})": self.pred[m]})
        same_stems(self.gt[self.modalities[0]], {m: self.gt[m] for m in self.modalities[1:]})
        picture = next((p for p in self.pred.get("depth", {}).values() if p.suffix != ".npy"), None)
        if picture and args.alignment == "disparity":
            raise InputError(f"{picture}: a picture in millimetres holds depth, not disparity; add --alignment depth")
        self.names = sorted(self.gt[self.modalities[0]])
        self.recipe = dict(source="predictions", pred=args.pred.name, gt=args.gt.name)

    def frame(self, i):
        name = self.names[i]
        truth, prediction = ({m: READERS[m](files[m][name]) for m in self.modalities} for files in (self.gt, self.pred))
        for m in self.modalities:
            if truth[m].shape[:2] != prediction[m].shape[:2]:
                raise InputError(f"{self.pred[m][name]}: size {prediction[m].shape[:2]}, its truth {self.gt[m][name]} has {truth[m].shape[:2]}; "
                                 "resize the prediction, never the truth")
        return Frame(name, None, None, truth, prediction)


def same_stems(files, others):
    """Raise InputError naming the first stem that is on one side only."""
    for where, other in others.items():
        odd = sorted(files.keys() ^ other.keys())
        if odd:
            path = (files if odd[0] in files else other)[odd[0]]
            raise InputError(f"{path}: no file with this stem on the other side ({where}; {len(odd)} such); names must match")


# ------------------------------------------------------------------------------------------------
# Predictions of a model, and the autoencoder's ceiling.

def to_network(modality, array, size, palette):
    """Truth of one modality -> pixels (3, S, S) as training would have seen it."""
    if modality == "depth":
        known = np.isfinite(array) & (array > 0)
        if not known.all():  # unknown pixels take the nearest known depth
            array = array[tuple(ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True))] if known.any() else np.ones_like(array)
        channels = [1 / array]
    elif array.dtype.kind == "f":
        channels = array.transpose(2, 0, 1) if array.ndim == 3 else [array]
    else:
        image = Image.fromarray(palette[np.minimum(array, len(palette) - 1)] if array.ndim == 2 else array)
        image.info["flat"] = MODALITIES[modality].file == "flat"
        return MODALITIES[modality].to_pixels(np.asarray(centre_crop(image, size)))
    resized = [np.asarray(centre_crop(Image.fromarray(c.astype(np.float32)), size)) for c in channels]
    stack = np.stack(resized, -1)
    if MODALITIES[modality].file == "vector":  # resizing shortens them
        stack = unit(stack)
    return MODALITIES[modality].to_pixels(stack if array.ndim == 3 else stack[..., 0])


def to_truth(modality, array, shape):
    """A predicted map at the truth's size (H, W): bilinear, nearest for segmentation."""
    if array.shape[:2] == tuple(shape):
        return array
    x = torch.from_numpy(np.ascontiguousarray(array)).float()
    x = x[None, None] if array.ndim == 2 else x.permute(2, 0, 1)[None]
    kind = MODALITIES[modality].file
    x = F.interpolate(x, tuple(shape), mode="nearest-exact") if kind == "flat" else F.interpolate(x, tuple(shape), mode="bilinear", align_corners=False)
    x = x[0, 0].numpy() if array.ndim == 2 else x[0].permute(1, 2, 0).numpy()
    return x.astype(np.uint8) if array.dtype == np.uint8 else unit(x) if kind == "vector" else x


def combine(modality, maps, palette):
    """K samples of one map -> one map and the per-pixel spread: median (depth, normals), vote (semantic colours)."""
    stack = np.stack(maps)
    if MODALITIES[modality].file == "flat":
        if palette is None:
            return maps[0], None  # colours of segments mean nothing from one sample to the next
        votes = np.stack([nearest_colour(m, palette) for m in maps])
        counts = np.stack([(votes == k).sum(0) for k in range(len(palette))])
        return palette[counts.argmax(0)], 1 - counts.max(0) / len(maps)
    median = np.median(stack, 0)
    if MODALITIES[modality].file == "vector":
        median = unit(median)
    return median.astype(stack.dtype), stack.std(0) if median.ndim == 2 else np.linalg.norm(stack - median, axis=-1).mean(0)


class Predictor:
    """RGB -> the other modalities, sample i's member k with the noise of index i + k * 2^32."""

    palette = None  # of semantic truth, for the vote of an ensemble and the ceiling

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.checkpoint = locate(args.ckpt or newest_checkpoint())
        self.model = open_model(self.checkpoint, device, args.precision, args.compile)
        settle_flags(args, self.model)
        if "rgb" not in [self.model.modalities[i] for i in self.model.conditions]:
            raise InputError(f"{self.checkpoint}: does not take RGB as a condition ({', '.join(self.model.modalities)})")
        self.vae = checked_vae(args.vae, self.model.meta)
        self.vae = self.vae.to(device) if self.vae else None

    def pixels(self, frames):
        size = self.model.meta["resolution"]
        return torch.from_numpy(np.stack([MODALITIES["rgb"].to_pixels(np.asarray(centre_crop(f.rgb, size))) for f in frames]))

    @torch.inference_mode()
    def __call__(self, frames, indices):
        """-> for each frame {modality: map}, {modality: spread}."""
        null, modalities = self.model.num_classes, self.model.modalities
        wanted = [m for m in modalities if any(m in frame.truth for frame in frames)]
        y = torch.tensor([null if f.class_id is None else f.class_id for f in frames], device=self.device)
        rgb, members = self.pixels(frames), []
        for k in range(self.args.ensemble):
            noise = Noise(self.args.seed, [i + (k << 32) for i in indices], self.device)
            x = draw_from(self.args, self.model, self.vae, y, {"rgb": rgb}, noise)
            members.append(decode_latents(self.vae, x, self.model.latent_channels, self.args.precision, [modalities.index(m) for m in wanted]).cpu().numpy())
        out = []
        for n, frame in enumerate(frames):
            maps, spread = {}, {}
            for m in [m for m in frame.truth if m in modalities]:
                drawn = [MODALITIES[m].from_pixels(member[n, wanted.index(m)]) for member in members]
                maps[m], spread[m] = (drawn[0], None) if len(drawn) == 1 else combine(m, drawn, self.palette if self.args.seg_mode == "semantic" else None)
                shape = frame.truth[m].shape[:2]
                maps[m], spread[m] = to_truth(m, maps[m], shape), None if spread[m] is None else to_truth("depth", spread[m], shape)
            out.append((maps, spread))
        return out

    @torch.inference_mode()
    def ceiling(self, frames):
        """The truth encoded and decoded: what a perfect model would score. None without an autoencoder."""
        out = []
        for frame in frames:
            maps = {}
            for m in [m for m in frame.truth if m in self.model.modalities]:
                x = torch.from_numpy(to_network(m, frame.truth[m], self.model.meta["resolution"], self.palette))[None].to(self.device)
                x = self.vae.decode(self.vae.encode(x)[0]).clamp(-1, 1) if self.vae else x
                maps[m] = to_truth(m, MODALITIES[m].from_pixels(x[0].cpu().numpy()), frame.truth[m].shape[:2])
            out.append(maps)
        return out


@functools.cache
def mean_map(count=2000):
    """The toy training scenes' mean disparity, mean normal and most frequent segment: what guessing scores."""
    disparity, normal, votes = 0, 0, 0
    for seed in range(count):
        scene = toy_scenes.render(seed)
        row = MODALITIES["depth"]
        disparity, normal = disparity + row.from_pixels(row.to_pixels(1 / scene.depth)), normal + scene.normal
        votes = votes + np.eye(len(toy_scenes.PALETTE))[scene.seg]
    return {"depth": disparity / count, "normal": normal / np.linalg.norm(normal, axis=-1, keepdims=True), "seg": toy_scenes.PALETTE[votes.argmax(-1)]}


# ------------------------------------------------------------------------------------------------

class Tally:
    """Scores of one predictor over the set: per image, and the sums that are pooled over it."""

    def __init__(self, args, palette):
        self.args, self.palette = args, palette
        self.rows, self.empty = {}, {}
        self.histogram, self.sums = np.zeros(BINS + 1, np.int64), np.zeros(3 + len(ANGLES))
        self.confusion, self.edges = np.zeros((256, 256), np.int64), np.zeros((len(EDGES), 4), np.int64)

    def labels(self, image, name):
        """Labels of a picture of labels or colours; InputError for labels that the palette does not have."""
        if image.ndim == 2:
            top = len(self.palette) if self.palette is not None else IGNORE
            if ((image >= top) & (image != IGNORE)).any() or image.min() < 0:
                raise InputError(f"{name}: label {int(image[image != IGNORE].max(initial=0))}, labels go from 0 to {top - 1} ({IGNORE} is not scored); "
                                 + ("bring the palette of all classes" if self.palette is not None else "use --seg-mode instance"))
            return image.astype(np.int64)
        if self.palette is None:
            raise InputError(f"{name}: a picture of colours without --palette FILE (JSON list of colours, or the meta.json of sample.py); "
                             "or compare segments with --seg-mode instance")
        return nearest_colour(image, self.palette)

    def add(self, i, frame, maps):
        """Score predicted maps {modality: (H, W[, 3])} of image i in the truth's units. InputError for values that are not finite where pixels are scored."""
        row = {"name": frame.name}
        if "depth" in maps:
            depth, (low, high) = frame.truth["depth"], self.args.depth_range
            valid = np.isfinite(depth) & (depth > low) & (depth < high)
            if not np.isfinite(maps["depth"][valid]).all():
                raise InputError(f"{frame.name}: the predicted depth is unknown or not finite at {int((~np.isfinite(maps['depth'][valid])).sum())} scored pixels; mend the prediction")
            if valid.any():
                row |= depth_scores(np.clip(align(maps["depth"], depth, valid, self.args.alignment), low, high), depth, valid)
            else:
                self.empty[i] = frame.name
        if "normal" in maps:
            angle = angles(maps["normal"], frame.truth["normal"])
            if len(angle):
                row |= normal_scores(angle)
                self.histogram += np.bincount((angle * (BINS / 180)).astype(np.int64), minlength=BINS + 1)
                self.sums += [len(angle), angle.sum(), (angle ** 2).sum(), *((angle < a).sum() for a in ANGLES)]
        if "seg" in maps and self.args.seg_mode == "semantic":
            p, g = (self.labels(x["seg"], frame.name) for x in (maps, frame.truth))
            scored = g != IGNORE
            if (p[scored] == IGNORE).any():
                raise InputError(f"{frame.name}: the prediction has the label {IGNORE} at {int((p[scored] == IGNORE).sum())} scored pixels; label every pixel")
            one = np.bincount(g[scored] * 256 + p[scored], minlength=65536).reshape(256, 256)
            self.confusion += one
            K = len(self.palette) if self.palette is not None else 256
            row |= semantic_scores(one[:K, :K], self.args.eps)
        elif "seg" in maps:
            row |= instance_scores(segments(maps["seg"]), segments(frame.truth["seg"]))
        if "canny" in maps:
            soft, hard = (x["canny"].mean(-1) / 255 for x in (maps, frame.truth))
            counts = np.stack([matches(soft > threshold, hard > 0.5) for threshold in EDGES])
            self.edges += counts
            row["edge_f"] = float(f_score(counts).max())
        for m in maps.keys() - {"depth", "normal", "seg", "canny"}:  # no metric of its own
            row[f"{m}_mae"] = float(np.abs(maps[m].astype(np.float64) - frame.truth[m]).mean())
        self.rows[i] = row

    def merge(self):
        """Bring the tallies of all processes together."""
        if dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, (self.rows, self.empty, self.histogram, self.sums, self.confusion, self.edges))
            self.rows, self.empty = ({k: v for part in parts for k, v in part[j].items()} for j in (0, 1))
            self.histogram, self.sums, self.confusion, self.edges = (sum(part[j] for part in parts) for j in (2, 3, 4, 5))
        return self

    def result(self):
        """{metric: value over the set}. Depth and instances: means over images; normals: pooled, and per image; semantic: one confusion matrix."""
        rows = [self.rows[i] for i in sorted(self.rows)]
        mean = lambda key: float(np.mean([row[key] for row in rows if key in row]))
        out = {k: mean(k) for k in ("abs_rel", "rmse", "delta1", "delta2", "delta3") if any(k in row for row in rows)}
        if self.sums[0]:
            n, total, squares, *under = self.sums
            ranks = np.searchsorted(self.histogram.cumsum(), [(n - 1) // 2 + 1, n // 2 + 1])
            out |= {"normal_mean": total / n, "normal_median": float((ranks + 0.5).mean() * 180 / BINS), "normal_rmse": math.sqrt(squares / n),
                    **{f"normal_{a}": 100 * u / n for a, u in zip(ANGLES, under)},
                    "normal_mean_per_image": mean("normal_mean"), "normal_median_per_image": mean("normal_median")}
        if self.confusion.any():
            K = len(self.palette) if self.palette is not None else int(max(np.nonzero(self.confusion + self.confusion.T)[0])) + 1
            out |= semantic_scores(self.confusion[:K, :K], self.args.eps)
        elif any("miou" in row for row in rows):
            out |= {k: mean(k) for k in ("miou", "best_overlap", "ari", "boundary_f")}
        if any("edge_f" in row for row in rows):
            out["edge_f"] = f_score(self.edges).max()  # at the set's best threshold, as edge detectors are scored
        out |= {k: mean(k) for k in dict.fromkeys(k for row in rows for k in row if k.endswith("_mae"))}
        return {k: float(v) for k, v in out.items()}


# ------------------------------------------------------------------------------------------------
# Pictures.

def heat(error, top):
    """Errors (H, W) from 0 to top -> black, red, yellow, white."""
    x = np.clip(np.nan_to_num(error / top, nan=0), 0, 1) * 3
    return (np.stack([np.clip(x - k, 0, 1) for k in range(3)], -1) * 255).astype(np.uint8)


def panels(frame, maps, args, palette):
    """{modality: (truth, prediction, error) as uint8 pictures, and the map to save}."""
    out = {}
    for m, prediction in maps.items():
        truth = frame.truth[m]
        if m == "depth":
            low, high = args.depth_range
            valid = np.isfinite(truth) & (truth > low) & (truth < high)
            if not valid.any():
                continue
            aligned = np.clip(align(prediction, truth, valid, args.alignment), low, high)
            near, far = 1 / truth[valid].min(), 1 / truth[valid].max()
            look = lambda d: MODALITIES[m].picture(np.where(valid if d is truth else True, (1 / np.where(d > 0, d, 1) - far) / max(near - far, 1e-8), 0))
            out[m] = look(truth), look(aligned), heat(np.where(valid, np.abs(aligned - truth) / np.where(valid, truth, 1), 0), 0.5), aligned
        elif m == "normal":
            known = np.linalg.norm(truth, axis=-1) > 0
            error = np.zeros(known.shape)
            error[known] = angles(prediction, truth)
            out[m] = *(MODALITIES[m].picture(x) for x in (truth, prediction)), heat(error, 60), prediction
        elif m != "seg":
            shown = [MODALITIES[m].picture(x) for x in (truth, prediction)]
            out[m] = *shown, heat(np.abs(shown[0].mean(-1) - shown[1].mean(-1)), 255), prediction
        else:
            colours = palette if palette is not None else np.random.default_rng(0).integers(30, 256, (256, 3)).astype(np.uint8)
            look = lambda x: colours[np.minimum(x, len(colours) - 1)] if x.ndim == 2 else x
            index = [nearest_colour(look(x), colours) if args.seg_mode == "semantic" else segments(x) for x in (truth, prediction)]
            wrong = index[0] != index[1] if args.seg_mode == "semantic" else boundary(index[0]) ^ boundary(index[1])
            out[m] = look(truth), look(prediction), heat(wrong.astype(float), 1), look(prediction)
    return out


def save_maps(out, frame, maps, spread, args, palette):
    """OUT/<modality>/<stem>.png and .npy, OUT/error_<modality>/<stem>.png, OUT/spread_<modality>/<stem>.npy."""
    stem = pathlib.PurePosixPath(frame.name).with_suffix("").as_posix().replace("/", "_")
    for m, (_, shown, error, values) in panels(frame, maps, args, palette).items():
        for folder, image in ((m, shown), (f"error_{m}", error)):
            with whole_file(out / folder / f"{stem}.png") as file:
                Image.fromarray(image).save(file, "png")
        arrays = {m: values if MODALITIES[m].keep_array else None, f"spread_{m}": spread.get(m)}
        for folder, array in arrays.items():
            if array is not None:
                with whole_file(out / folder / f"{stem}.npy") as file:
                    np.save(file, array.astype(np.float32))


def cases(rows, count=2):
    """Indices of the best, median and worst images by the first metric there is."""
    known = dict.fromkeys(k for row in rows.values() for k in row)
    key = next((k for k in ("abs_rel", "normal_mean", "miou", "edge_f", *known) if k in known and k != "name"), None)
    order = sorted((i for i in rows if np.isfinite(rows[i].get(key, np.nan))), key=lambda i: rows[i][key] * (-1 if key in ("miou", "edge_f") else 1))
    middle = max(0, len(order) // 2 - count // 2)
    picks = dict.fromkeys(order[:count] + order[middle:middle + count] + order[-count:])
    return key, list(picks)


# ------------------------------------------------------------------------------------------------

def arguments():
    """The command's flags -> Namespace. InputError for those that contradict each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--toy", type=int, metavar="N", help="N held-out toy scenes")
    what.add_argument("--scannet", type=pathlib.Path, metavar="DIR", help="<scene>/{color,depth}/ as ScanNet exports them")
    what.add_argument("--data", type=pathlib.Path, metavar="DIR", help="folder tree <root>/<modality>/<class>/<name>")
    what.add_argument("--pred", type=pathlib.Path, metavar="DIR", help="predictions, with --gt; no model runs")
    parser.add_argument("--gt", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--list", type=pathlib.Path, metavar="FILE", help="--scannet: the frames, a line each: rgb depth")
    parser.add_argument("--num", type=int, help="--scannet: frames to draw with --seed; default 5000, with --list all")
    parser.add_argument("--modality", nargs="+", choices=list(READERS), help="default: all that are there")
    parser.add_argument("--alignment", choices=("disparity", "depth"), default="disparity", help="the space in which scale and shift are fitted")
    parser.add_argument("--depth-range", type=float, nargs=2, default=(1e-3, 10.0), metavar=("MIN", "MAX"), help="depths that are scored")
    parser.add_argument("--depth-space", choices=("disparity", "depth"), default="depth", help="--data: what the depth files hold")
    parser.add_argument("--axes", choices=("ours", "marigold"), default="ours", help="of the true normals; marigold: +x right")
    parser.add_argument("--seg-mode", choices=("semantic", "instance"), help="default: the checkpoint's; semantic for --pred")
    parser.add_argument("--palette", type=pathlib.Path, metavar="FILE", help="semantic colours: a JSON list, or the meta.json of sample.py")
    parser.add_argument("--cityscapes-eps", dest="eps", action="store_const", const=1e-12, help="absent classes count as 0, as in CycleGAN's script")
    parser.add_argument("--ensemble", type=int, default=1, metavar="K", help="median of K samples")
    sampling_flags(parser)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("evaluation"))
    parser.add_argument("--save-maps", action="store_true", help="also all maps and error maps")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args()
    check_sampling_flags(args)
    if bool(args.pred) != bool(args.gt):
        raise InputError("--pred DIR and --gt DIR go together")
    if args.ensemble < 1 or (args.toy is not None and not 1 <= args.toy <= 10 ** 6) or not 0 <= args.depth_range[0] < args.depth_range[1]:
        raise InputError(f"--ensemble {args.ensemble} --toy {args.toy} --depth-range {args.depth_range}: counts from 1 to a million, 0 <= MIN < MAX")
    if (args.list or args.num) and not args.scannet:
        raise InputError("--list and --num belong to --scannet")
    return args


def read_palette(path):
    """Colours (K, 3) of a JSON list, or under the key "palette"."""
    try:
        found = json.loads(path.read_text())
        found = found["palette"] if isinstance(found, dict) else found
        if found is None:  # meta.json of a model of instance segmentation
            return None
        colours = np.array(found)
        if colours.ndim == 2 and colours.shape[1] == 3 and 0 < len(colours) <= 255 and colours.min() >= 0 and colours.max() <= 255:
            return colours.astype(np.uint8)
        raise ValueError(f"shape {colours.shape}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--palette {path}: not a list of up to 255 colours [r, g, b] ({error})")


def main():
    """Predict (or read predictions), score against the truth, write per_image.csv, grid.png and the JSON; rank 0 gathers the others' scores."""
    args = arguments()
    rank, world, device = setup()
    predictor = None
    if args.pred:
        source = Pairs(args)
    else:
        predictor = Predictor(args, device)
        source = Toy(args.toy) if args.toy else ScanNet(args) if args.scannet else Tree(args, predictor.model.meta)
        if args.data and predictor.model.meta["palette"]:
            source.palette = np.array(predictor.model.meta["palette"], np.uint8)
    if args.pred and not args.palette and (args.pred / "meta.json").is_file():  # predictions of sample.py
        args.palette = args.pred / "meta.json"
    if args.palette:
        source.palette = read_palette(args.palette)
    args.seg_mode = args.seg_mode or source.seg_mode
    known = [m for m in source.modalities if predictor is None or m in predictor.model.modalities]
    wanted = [m for m in args.modality or known if m in known]
    if not wanted or set(args.modality or ()) - set(known):
        raise InputError(f"--modality {' '.join(args.modality or ())}: there are {', '.join(known) or 'none'} in both truth and prediction")
    source.modalities = tuple(wanted)  # nothing else is read
    if predictor:
        predictor.palette = source.palette
    tallies = {"value": Tally(args, source.palette)}
    if predictor:
        tallies["ceiling"] = Tally(args, source.palette)
    baseline = mean_map() if args.toy else None
    if baseline:
        tallies["mean_map"] = Tally(args, source.palette)

    def load(i):
        frame = source.frame(i)
        truth = {m: a for m, a in frame.truth.items() if m in wanted}
        if args.axes == "marigold" and "normal" in truth:
            truth["normal"] = truth["normal"] * [-1, 1, 1]
        return frame._replace(truth=truth)

    def predict(indices):
        frames = [load(i) for i in indices]
        if predictor:
            return frames, predictor(frames, indices)
        return frames, [({m: f.prediction[m] for m in wanted}, {}) for f in frames]

    total = len(source.names)
    blocks = [range(s, min(s + args.batch_size, total)) for s in range(0, total, args.batch_size)][rank::world]
    with tqdm(total=total, desc="evaluate", disable=rank > 0) as bar:
        for block in blocks:
            frames, predictions = predict(block)
            for i, frame, (maps, spread) in zip(block, frames, predictions):
                tallies["value"].add(i, frame, maps)
                if args.save_maps:
                    save_maps(args.out, frame, maps, spread, args, source.palette)
                if baseline:
                    tallies["mean_map"].add(i, frame, {m: baseline[m] for m in wanted if m in baseline})
            for i, frame, maps in zip(block, frames, predictor.ceiling(frames) if predictor else ()):
                tallies["ceiling"].add(i, frame, maps)
            bar.update(len(block) * world)
    results = {name: tally.merge().result() for name, tally in tallies.items()}
    barrier()
    if rank > 0:
        return
    value = tallies["value"]
    recipe = dict(**source.recipe, count=total, modalities=wanted, alignment=f"{args.alignment}, least squares per image", depth_range=list(args.depth_range),
                  axes=args.axes, seg_mode=args.seg_mode, cityscapes_eps=args.eps, torch=torch.__version__, device=device.type)
    if predictor:
        recipe |= dict(ensemble=args.ensemble, **sampling_recipe(args, predictor.checkpoint, predictor.model))
    if not results["value"]:
        raise InputError(f"none of the {total} frames has a valid truth in {', '.join(wanted)}" + (f" (depth between {args.depth_range[0]} and {args.depth_range[1]})" if "depth" in wanted else ""))
    result = {**results.pop("value"), **results}
    if baseline:
        result["gap"] = {k: (result[k] - result["ceiling"][k]) / (result["mean_map"][k] - result["ceiling"][k])
                         for k in ("abs_rel", "normal_mean", "miou") if k in result}
    result |= {"no_valid_depth": [value.empty[i] for i in sorted(value.empty)], "recipe": recipe}
    report(args, result, value, predict, source)
    if args.json:
        with whole_file(args.json) as file:
            file.write(json.dumps(result, indent=1).encode())


def report(args, result, tally, predict, source):
    """Print the table; write per_image.csv and grid.png."""
    columns = [c for c in ("ceiling", "mean_map", "gap") if c in result]
    print(f"{'':24s} {'value':>10s} " + " ".join(f"{c.replace('_', ' '):>10s}" for c in columns))
    for key, value in result.items():
        if isinstance(value, float):
            space = f" ({args.alignment})" if key in ("abs_rel", "rmse", "delta1", "delta2", "delta3") else ""
            print(f"{key + space:24s} {value:10.4f} " + " ".join(f"{result[c][key]:10.4f}" if key in result[c] else " " * 10 for c in columns))
    empty = result["no_valid_depth"]
    if empty:
        print(f"{len(empty)} of {len(source.names)} frames have no valid depth and are left out of the depth figures: {', '.join(empty[:10])}{' ...' if len(empty) > 10 else ''}")
    keys = list(dict.fromkeys(k for row in tally.rows.values() for k in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(tally.rows[i] for i in sorted(tally.rows))
    with whole_file(args.out / "per_image.csv") as file:
        file.write(text.getvalue().encode())
    key, picks = cases(tally.rows)
    lines, labels = [], []
    for i in picks:
        (frame,), ((maps, _),) = predict([i])
        shown = panels(frame, maps, args, source.palette)
        lines.append([None if frame.rgb is None else np.asarray(frame.rgb)] + [image for m in shown for image in shown[m][:3]])
        labels = ["rgb"] + [f"{m}\n({part})" for m in shown for part in ("truth", "prediction", "error")]
    if lines:
        keep = [j for j in range(len(labels)) if lines[0][j] is not None]
        with whole_file(args.out / "grid.png") as file:
            draw_grid([[line[j] for j in keep] for line in lines], [labels[j] for j in keep]).save(file, "png")
        print(f"{args.out / 'grid.png'}: best, median and worst by {key}: {', '.join(tally.rows[i]['name'] for i in picks)}")


if __name__ == "__main__":
    run(main)
