"""Stage 5b: dense prediction: depth (Table 3), normals, segmentation, of a checkpoint or of predictions.

    python eval_depth.py --toy 256 --sampler euler --steps 2    # held-out toy scenes, with the VAE's ceiling
    torchrun --nproc_per_node=8 -- eval_depth.py --ckpt 0600000.pt --scannet scans --num 5000 --json t3.json
    python eval_depth.py --data DIR                             # <root>/{rgb,depth,normal,seg}/<class>/<name>
    python eval_depth.py --pred samples --gt truth --modality depth    # no model: files matched by stem

Ground truth is cropped to its centre square and never resampled; predictions are brought to its size. What
depth files hold is said by DIR/tree.json or --depth-space: disparity (of 8 or 16 bits, or floats) or depth
(floats in metres, 16 bits in millimetres), by default disparity of --data and depth of --gt. Depths outside
--depth-range and unknown pixels are not scored. Writes OUT/per_image.csv and OUT/grid.png (best, median and
worst cases).

A source gives frames with their truth, a predictor maps for frames, a metric scores the maps of one modality;
evaluate() brings them together and knows nothing else of them.
"""
import csv
import functools
import hashlib
import io
import json
import math
import os
import random
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

import samplers
import toy_scenes
from distributed import (InputError, barrier, check, check_apart, check_folder, check_replaced,
                         command_parser, gather, place, reading, run, setup, share, whole_file, write_json)
from locks import only_writer
from modalities import (MODALITIES, PLAIN, VOID, Scalar, check_turned, draw_grid, fill_unknown, is_array,
                        label_colour, nearest_colour, segments, turned_of, unit)
from trees import facts_of, find_pictures, flat_name, folders_of, pictures_by_stem, read_palette
from vae import encoder_of
from weights import classes_of, load_model, newest_checkpoint

UNKNOWN = -1                            # label of pixels that are not scored
ANGLES = (5, 7.5, 11.25, 22.5, 30)      # degrees whose share is reported
BINS = 1_800_000                        # of the pooled median: 1e-4 degrees each
THRESHOLDS = np.arange(1, 20) / 20      # of a soft edge map
SPACES = ("disparity", "depth")


# ------------------------------------------------------------------------------------------------
# Scores of one image.

def align(prediction, depth, valid, space):
    """Scale and shift by least squares over the valid pixels, float64 -> depth (H, W) in the truth's unit.

    space "disparity": fit s * p + t to 1 / depth, keep it above 1e-3, invert; "depth": fit s * p + t to depth
    (Marigold's). A constant prediction gets the minimum-norm solution.
    """
    p, g = prediction.astype(np.float64), depth[valid].astype(np.float64)
    target = 1 / g if space == "disparity" else g
    columns = np.stack([p[valid], np.ones_like(g)], 1)
    scale, shift = np.linalg.lstsq(columns, target, rcond=None)[0]
    fit = p * scale + shift
    return 1 / np.maximum(fit, 1e-3) if space == "disparity" else fit


def depth_scores(aligned, depth, valid):
    """AbsRel, RMSE and shares within 1.25^k over the valid pixels."""
    p, g = aligned[valid], depth[valid].astype(np.float64)
    ratio = np.maximum(p / g, g / p)
    scores = {"abs_rel": np.mean(np.abs(p - g) / g), "rmse": np.sqrt(np.mean((p - g) ** 2))}
    return scores | {f"delta{k}": np.mean(ratio < 1.25 ** k) for k in (1, 2, 3)}


def angles(prediction, truth):
    """Angles in degrees, float64, where the truth is a direction: (pixels,). Zero predictions count as 90."""
    p, g = prediction.astype(np.float64), truth.astype(np.float64)
    known = np.linalg.norm(g, axis=-1) > 0
    p, g = p[known], g[known]
    length = np.linalg.norm(p, axis=-1) * np.linalg.norm(g, axis=-1)
    return np.degrees(np.arccos(np.clip((p * g).sum(-1) / np.maximum(length, 1e-12), -1, 1)))


def normal_scores(angle):
    """Mean, median and RMS angle and the percentages under ANGLES."""
    scores = {"normal_mean": np.mean(angle), "normal_median": np.median(angle),
              "normal_rmse": np.sqrt(np.mean(angle ** 2))}
    return scores | {f"normal_{a}": 100 * np.mean(angle < a) for a in ANGLES}


def semantic_scores(confusion, eps=None):
    """Confusion (K, K), rows truth -> pixel accuracy, class accuracy, mIoU.

    Classes absent from both sides are ignored; eps (1e-12) counts them as 0, as CycleGAN's Cityscapes script
    does.
    """
    hit, total = np.diag(confusion).astype(np.float64), confusion.sum()
    rows, columns = confusion.sum(1), confusion.sum(0)
    union = rows + columns - hit

    def mean_share(parts):
        if eps is not None:
            return np.mean(hit / (parts + eps))
        there = parts > 0
        return np.mean(hit[there] / parts[there]) if there.any() else math.nan

    pixels = max(total, 1) if eps is None else total + eps
    return {"pixel_accuracy": hit.sum() / pixels, "class_accuracy": mean_share(rows),
            "miou": mean_share(union)}


def boundary(index):
    """Pixels whose right or lower neighbour is of another segment."""
    edge = np.zeros(index.shape, bool)
    edge[:, :-1] |= index[:, :-1] != index[:, 1:]
    edge[:-1] |= index[:-1] != index[1:]
    return edge


def matches(a, b):
    """Edge maps (H, W) bool -> pixels of a within ceil(0.008 * diagonal) pixels of b, pixels of a, and the
    same of b: (4,).
    """
    radius = math.ceil(0.008 * math.hypot(*a.shape))

    def near(one, other):
        return (ndimage.distance_transform_edt(~other)[one] <= radius).sum() if other.any() else 0

    return np.array([near(a, b), a.sum(), near(b, a), b.sum()])


def f_score(counts):
    """matches (..., 4) -> F; 1 where both maps are empty."""
    hit_a, all_a, hit_b, all_b = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    precision, recall = hit_a / np.maximum(all_a, 1), hit_b / np.maximum(all_b, 1)
    mean = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return np.where(all_a + all_b == 0, 1.0, mean)


def instance_scores(prediction, truth, known=None):
    """Segment indices (H, W) -> Hungarian-matched mIoU over the true segments, mean best overlap, ARI,
    boundary F; of the pixels that are known, bool (H, W).
    """
    known = np.ones(truth.shape, bool) if known is None else known
    p, g = (np.unique(index[known], return_inverse=True)[1] for index in (prediction, truth))
    table = np.zeros((g.max() + 1, p.max() + 1), np.int64)
    np.add.at(table, (g, p), 1)
    rows, columns = table.sum(1), table.sum(0)
    iou = table / (rows[:, None] + columns - table)
    matched = iou[linear_sum_assignment(iou, maximize=True)].sum() / len(rows)

    def pairs(counts):
        return (counts * (counts - 1.0) / 2).sum()

    both, most = pairs(table), (pairs(rows) + pairs(columns)) / 2
    expected = pairs(rows) * pairs(columns) / max(pairs(np.array([len(g)])), 1)
    ari = (both - expected) / (most - expected) if most != expected else 1.0
    inner = ndimage.binary_erosion(known, border_value=1)  # a hole's rim is no edge
    edges = f_score(matches(boundary(prediction) & inner, boundary(truth) & inner))
    return {"miou": matched, "best_overlap": iou.max(1).mean(), "ari": ari, "boundary_f": float(edges)}


# ------------------------------------------------------------------------------------------------
# Metrics.

class Rules(NamedTuple):
    """What the metrics have to know beside the maps."""
    alignment: str = "disparity"        # the space in which depth's scale and shift are fitted
    depth_range: tuple = (1e-3, 10.0)   # depths that are scored
    seg_mode: str = "semantic"          # which metric is segmentation's
    palette: np.ndarray = None          # semantic colours, uint8 (K, 3)
    eps: float = None                   # of semantic_scores


def heat(error, top):
    """Errors (H, W) from 0 to top -> black, red, yellow, white."""
    x = np.clip(np.nan_to_num(error / top, nan=0), 0, 1) * 3
    return (np.stack([np.clip(x - k, 0, 1) for k in range(3)], -1) * 255).astype(np.uint8)


class Metric:
    """The scores of one modality by one predictor over a set. Here: the mean absolute error, of modalities
    without a metric of their own.

    A metric of its own is a subclass and its row in METRICS: it says the scores of an image, and what differs
    of the rest.
    """

    headline = None  # the score by which images are told better from worse
    rising = False   # whether more of it is better
    note = ""        # behind the names of its scores in the printed table

    def __init__(self, modality, rules):
        self.kind, self.rules = MODALITIES[modality], rules
        self.headline = self.headline or f"{modality}_mae"
        self.rows, self.pooled = {}, {}  # {index of an image: its scores}, {what: sum over the images}

    @staticmethod
    def read(kind, raster):
        """A file of truth -> the user's array, unknown pixels as the metric marks them."""
        return kind.array(raster)

    @classmethod
    def read_prediction(cls, kind, raster):
        """A file of a prediction, likewise."""
        return cls.read(kind, raster)

    def target(self, truth):
        """The truth as the map that a perfect model predicts."""
        return truth

    def combine(self, maps):
        """K samples of one map -> one map and its spread a pixel, None where there is none."""
        if len(maps) == 1 or self.kind.nearest:  # segments' colours change from sample to sample
            return maps[0], None
        stack = np.stack(maps)
        median = self.kind.median(stack)
        spread = stack.std(0) if median.ndim == 2 else np.linalg.norm(stack - median, axis=-1).mean(0)
        return median.astype(stack.dtype), spread

    def scores(self, name, truth, prediction):
        """{score: value} of an image, both (H, W[, 3]); {} where there is nothing to score.

        Pools what is summed over the set. Raises InputError for predictions that cannot be scored.
        """
        return {self.headline: np.abs(prediction.astype(np.float64) - truth).mean()}

    def pool(self, **sums):
        self.pooled |= {key: self.pooled.get(key, 0) + value for key, value in sums.items()}

    def add(self, index, name, truth, prediction):
        """Score image `index` of the set, called name in errors. Raises InputError as scores does."""
        if row := self.scores(name, truth, prediction):
            self.rows[index] = row

    def merge(self):
        """Bring together what the processes scored."""
        parts = gather((self.rows, self.pooled))
        self.rows, self.pooled = {}, {}
        for rows, pooled in parts:
            self.rows |= rows
            self.pool(**pooled)

    def mean(self, key):
        return np.mean([self.rows[i][key] for i in sorted(self.rows)])

    def over_set(self):
        """{score: value over the set}, of one image at least: the mean over the images."""
        return {key: self.mean(key) for key in next(iter(self.rows.values()))}

    def result(self):
        """over_set in plain floats; {} where nothing was scored."""
        return {key: float(value) for key, value in self.over_set().items()} if self.rows else {}

    def look(self, array):
        """Truth or prediction -> uint8 (H, W, 3)."""
        return self.kind.picture(array)

    def error(self, truth, prediction):
        """Errors (H, W), and the one that is shown white."""
        return np.abs(self.look(truth).mean(-1) - self.look(prediction).mean(-1)), 255

    def panels(self, truth, prediction):
        """Pictures uint8 (H, W, 3) of truth, prediction and error, and the map to save; None where nothing
        is scored.
        """
        error = heat(*self.error(truth, prediction))
        return self.look(truth), self.look(prediction), error, prediction


class Depth(Metric):
    """Truth in metres, NaN or 0 where unknown; predictions up to scale and shift."""

    headline = "abs_rel"

    @property
    def note(self):
        return f" ({self.rules.alignment})"

    @staticmethod
    def read(kind, raster):
        """-> metres, float64 (H, W), NaN where unknown; of disparity without a unit its inverse.

        Raises InputError for depth without a unit.
        """
        values, facts = raster.values, raster.facts
        known = np.ones(values.shape, bool) if raster.known is None else raster.known
        if facts.depth_space == "disparity":
            disparity = Scalar.array(kind, raster).astype(np.float64)  # of levels in [0, 1]
            known = known & (disparity > 0)
            return np.where(known, 1 / np.where(known, disparity, 1), np.nan)
        depth = values.astype(np.float64)
        if values.dtype.kind in "iu":
            check(facts.depth_unit or values.dtype == np.uint16, f"{raster.path}: {values.dtype} levels "
                  "carry no unit of depth; give floats in metres, 16-bit PNG in millimetres, or depth_unit "
                  "in tree.json; or --depth-space disparity")
            depth = depth * facts.depth_unit if facts.depth_unit else depth / 1000
        return np.where(known, depth, np.nan)

    @classmethod
    def read_prediction(cls, kind, raster):
        """-> float64 (H, W) of any scale, NaN where unknown."""
        values = raster.values.astype(np.float64)
        return values if raster.known is None else np.where(raster.known, values, np.nan)

    def target(self, depth):
        """Disparity; unknown pixels take the nearest known depth."""
        known = np.isfinite(depth) & (depth > 0)
        if not known.any():
            return np.ones_like(depth)
        return 1 / fill_unknown(depth, known)

    def valid(self, depth):
        low, high = self.rules.depth_range
        return np.isfinite(depth) & (depth > low) & (depth < high)

    def aligned(self, depth, prediction, valid):
        return np.clip(align(prediction, depth, valid, self.rules.alignment), *self.rules.depth_range)

    def scores(self, name, depth, prediction):
        valid = self.valid(depth)
        lost = (~np.isfinite(prediction[valid])).sum()
        check(not lost, f"{name}: the predicted depth is unknown or not finite at {lost} scored pixels; "
              "mend the prediction")
        return depth_scores(self.aligned(depth, prediction, valid), depth, valid) if valid.any() else {}

    def panels(self, depth, prediction):
        """Both as disparity from the least to the largest of the truth."""
        valid = self.valid(depth)
        if not valid.any():
            return None
        aligned = self.aligned(depth, prediction, valid)
        near, far = 1 / depth[valid].min(), 1 / depth[valid].max()

        def disparity(depth):
            return (1 / np.where(depth > 0, depth, 1) - far) / max(near - far, 1e-8)

        error = np.where(valid, np.abs(aligned - depth) / np.where(valid, depth, 1), 0)
        truth = np.where(valid, disparity(depth), 0)
        return self.look(truth), self.look(disparity(aligned)), heat(error, 0.5), aligned


class Normal(Metric):
    """Unit vectors, zero where unknown."""

    headline = "normal_mean"

    @staticmethod
    def read(kind, raster):
        """-> floats (H, W, 3) of unit length, 0 where unknown."""
        values = raster.values
        normal = unit(values / 255.0 * 2 - 1 if raster.top else values)
        return normal if raster.known is None else np.where(raster.known[..., None], normal, 0)

    def scores(self, name, truth, prediction):
        angle = angles(prediction, truth)
        if not len(angle):
            return {}
        histogram = np.bincount((angle * (BINS / 180)).astype(np.int64), minlength=BINS + 1)
        under = [(angle < a).sum() for a in ANGLES]
        self.pool(histogram=histogram, total=angle.sum(), squares=(angle ** 2).sum(), under=np.array(under))
        return normal_scores(angle)

    def over_set(self):
        """Over all pixels; mean and median also as means over the images."""
        below = self.pooled["histogram"].cumsum()
        n = below[-1]
        ranks = np.searchsorted(below, [(n - 1) // 2 + 1, n // 2 + 1])
        return {"normal_mean": self.pooled["total"] / n, "normal_median": (ranks + 0.5).mean() * 180 / BINS,
                "normal_rmse": math.sqrt(self.pooled["squares"] / n),
                **{f"normal_{a}": 100 * u / n for a, u in zip(ANGLES, self.pooled["under"])},
                **{f"{key}_per_image": self.mean(key) for key in ("normal_mean", "normal_median")}}

    def error(self, truth, prediction):
        known = np.linalg.norm(truth, axis=-1) > 0
        error = np.zeros(known.shape)
        error[known] = angles(prediction, truth)
        return error, 60


class Segmentation(Metric):
    """What both metrics of segmentation share: maps of labels (H, W), UNKNOWN where they are not known, or
    of colours uint8 (H, W, 3).
    """

    headline, rising = "miou", True

    @staticmethod
    def read(kind, raster):
        """Labels of a file of labels, or of which not all is known, else colours."""
        labels, palette = raster.labels, raster.facts.palette
        if labels is None and raster.known is None:
            return kind.array(raster)
        if labels is None:
            colours = kind.array(raster)
            labels = segments(colours) if palette is None else nearest_colour(colours, palette)
        return labels if raster.known is None else np.where(raster.known, labels, UNKNOWN)

    def look(self, image):
        """Labels or colours -> colours, black where unknown."""
        if image.ndim == 3:
            return image
        colours = label_colour(image.clip(0))
        if self.rules.palette is not None:
            colours = self.rules.palette[image.clip(0, len(self.rules.palette) - 1)]
        return np.where((image == UNKNOWN)[..., None], np.uint8(0), colours)

    def target(self, image):
        """Colours; unknown pixels take the nearest known label's."""
        return self.look(fill_unknown(image, image != UNKNOWN) if image.ndim == 2 else image)

    def known(self, image):
        """bool (H, W)"""
        return image != UNKNOWN if image.ndim == 2 else np.ones(image.shape[:2], bool)


class Semantic(Segmentation):
    """Classes by labels or by the palette's colours; one confusion matrix over the set."""

    def labels(self, name, image):
        """Labels of a picture of labels or colours. Raises InputError for labels that the palette does not
        have.
        """
        palette = self.rules.palette
        if image.ndim == 3:
            check(palette is not None, f"{name}: a picture of colours without --palette FILE (JSON list of "
                  "colours, or sample.py's meta.json); or compare segments with --seg-mode instance")
            return nearest_colour(image, palette)
        top = 255 if palette is None else len(palette)
        image = np.where(image == VOID, UNKNOWN, image.astype(np.int64))
        known = image[image != UNKNOWN]
        low, high = known.min(initial=0), known.max(initial=0)
        check(low >= 0 and high < top, f"{name}: label {min(low, 0) or high}, labels go from 0 to {top - 1} "
              f"({VOID} is not scored); bring the palette of all classes, or compare segments with "
              "--seg-mode instance")
        return image

    def combine(self, maps):
        """The vote, and the share of the samples that voted otherwise."""
        palette = self.rules.palette
        if len(maps) == 1 or palette is None:
            return super().combine(maps)
        votes = np.stack([nearest_colour(image, palette) for image in maps])
        counts = np.stack([(votes == k).sum(0) for k in range(len(palette))])
        return palette[counts.argmax(0)], 1 - counts.max(0) / len(maps)

    def scores(self, name, truth, prediction):
        p, g = self.labels(name, prediction), self.labels(name, truth)
        p, g = p[g != UNKNOWN], g[g != UNKNOWN]
        if not len(g):
            return {}
        lost = (p == UNKNOWN).sum()
        check(not lost, f"{name}: the prediction is unknown at {lost} scored pixels; label every pixel")
        confusion = np.bincount(g * 256 + p, minlength=65536).reshape(256, 256)
        self.pool(confusion=confusion)
        return self.of_confusion(confusion)

    def of_confusion(self, confusion):
        """semantic_scores of the palette's classes; without one, of those up to the highest label."""
        K = np.nonzero(confusion + confusion.T)[0].max(initial=0) + 1
        if self.rules.palette is not None:
            K = len(self.rules.palette)
        return semantic_scores(confusion[:K, :K], self.rules.eps)

    def over_set(self):
        return self.of_confusion(self.pooled["confusion"])

    def error(self, truth, prediction):
        p, g = (self.labels("", image) for image in (prediction, truth))
        return (p != g) & (g != UNKNOWN), 1


class Instance(Segmentation):
    """Segments by whatever colours, matched in each image."""

    def scores(self, name, truth, prediction):
        known = self.known(truth)
        return instance_scores(segments(prediction), segments(truth), known) if known.any() else {}

    def error(self, truth, prediction):
        return (boundary(segments(truth)) ^ boundary(segments(prediction))) & self.known(truth), 1


class Edges(Metric):
    """White on black; a soft edge map is scored at the set's best threshold, as edge detectors are."""

    headline, rising = "edge_f", True

    def scores(self, name, truth, prediction):
        soft, hard = prediction.mean(-1) / 255, truth.mean(-1) / 255 > 0.5
        counts = np.stack([matches(soft > threshold, hard) for threshold in THRESHOLDS])
        self.pool(counts=counts)
        return {"edge_f": f_score(counts).max()}

    def over_set(self):
        return {"edge_f": f_score(self.pooled["counts"]).max()}


METRICS = {"depth": Depth, "normal": Normal, "seg": Semantic, "canny": Edges}
SEGMENTATION = {"semantic": Semantic, "instance": Instance}


def metrics_of(modalities, rules):
    """{modality: a Metric without scores}, in the registry's order."""
    return {m: metric_class(m, rules.seg_mode)(m, rules) for m in MODALITIES if m in modalities}


# ------------------------------------------------------------------------------------------------
# Files of truth and predictions.

def metric_class(modality, seg_mode="semantic"):
    """The row of METRICS that scores a modality."""
    return SEGMENTATION[seg_mode] if modality == "seg" else METRICS.get(modality, Metric)


def stems(base):
    """Files below a folder -> {stem as one name: path}."""
    found = pictures_by_stem(base)
    files = {flat_name(stem): path for stem, path in found.items()}
    names = list(map(flat_name, found))
    twice = [stem for stem in found if names.count(flat_name(stem)) > 1] if len(files) < len(found) else []
    check(not twice, f"{base}: {' and '.join(twice[:2])} have one name with _ for /; rename one")
    return files


def matched(sides):
    """{what: {stem: path}} -> the stems, sorted, and of each {what: path}. Raises InputError naming the first
    one that not all have.
    """
    first = next(iter(sides.values()))
    for what, files in sides.items():
        odd = sorted(first.keys() ^ files.keys())
        if odd:
            path = (first | files)[odd[0]]
            raise InputError(f"{path}: no file with this stem on the other side ({what}; {len(odd)} such); "
                             "names must match")
    return sorted(first), [{what: files[stem] for what, files in sides.items()} for stem in sorted(first)]


def dense():
    """The modalities that are predicted."""
    return [m for m in MODALITIES if m != "rgb"]


def sampled(folder):
    """Whether sample.py made a folder: it says so in meta.json."""
    try:
        return "checkpoint_sha256" in json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def available(given):
    """Those that are given or can be derived of the RGB."""
    return [m for m in dense() if m in given or MODALITIES[m].derive]


# ------------------------------------------------------------------------------------------------
# Sources.

class Frame(NamedTuple):
    index: int               # in the set
    name: str
    truth: dict              # {modality: (H, W[, 3])}
    rgb: np.ndarray = None   # uint8 (H, W, 3); None in a comparison of folders
    class_id: int = None     # None when unknown


class Source:
    """Frames with truth. It says names, recipe, the folders and files that it reads, the modalities of its
    truth (a caller may narrow them), what its segmentation is, and load(i) -> Frame.
    """

    palette, seg_mode, folders, files = None, "semantic", (), ()
    axes = "ours"  # of the true normals

    def frame(self, i):
        """Frame i, its normals in our axes."""
        frame = self.load(i)
        if self.axes == "marigold" and "normal" in frame.truth:
            frame.truth["normal"] = frame.truth["normal"] * [-1, 1, 1]
        return frame

    def stem(self, i):
        """The name of frame i's maps."""
        return flat_name(self.names[i])

    def truth(self, given, rgb):
        """The modalities' maps: given ones, and what is derived of the RGB."""
        return {m: given[m] if m in given else MODALITIES[m].derive(rgb) for m in self.modalities}


class Toy(Source):
    """Held-out toy scenes."""

    palette = toy_scenes.PALETTE

    def __init__(self, count):
        self.seeds = range(toy_scenes.HELD_OUT, toy_scenes.HELD_OUT + count)
        self.names, self.modalities = list(map(str, self.seeds)), available(toy_scenes.MAPS)
        self.recipe = dict(source="toy, held out", seeds=[self.seeds.start, self.seeds.stop])

    def load(self, i):
        scene = toy_scenes.render(self.seeds[i])
        return Frame(i, self.names[i], self.truth(scene._asdict(), scene.rgb), scene.rgb)


def square(array):
    """The centre square of (H, W[, 3])."""
    height, width = array.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return array[top:top + side, left:left + side]


class Files(Source):
    """Frames of files: {modality: path} of each; facts: what they hold; classes {name: class}."""

    facts, classes = PLAIN, {}

    def told(self):
        """The facts by which files are read."""
        return self.facts._replace(palette=self.palette if self.seg_mode == "semantic" else None)

    def load(self, i):
        """RGB is brought to the truth's size, and both are cut to the centre square; without RGB nothing is.

        Raises InputError where they differ in shape.
        """
        name, files, facts = self.names[i], self.files[i], self.told()
        read = [m for m in ("rgb", *self.modalities) if m in files]
        rasters = {m: MODALITIES[m].open(files[m], facts) for m in read}
        check_turned(list(rasters.values()))
        truth = {m: metric_class(m, self.seg_mode).read(MODALITIES[m], raster)
                 for m, raster in rasters.items() if m != "rgb"}
        if "rgb" not in files:
            return Frame(i, name, truth)
        rgb = Image.fromarray(MODALITIES["rgb"].array(rasters["rgb"]))
        truth = self.truth(truth, np.asarray(rgb))
        for m, array in truth.items():
            height, width = array.shape[:2]
            check(abs(rgb.width / rgb.height / (width / height) - 1) <= 0.02, f"{name}: the RGB is "
                  f"{rgb.width}x{rgb.height}, its {m} {width}x{height}; they must show the same view")
        if rgb.size != (width, height):
            rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
        label = self.classes.get(name)
        truth = {m: square(array) for m, array in truth.items()}
        return Frame(i, name, truth, square(np.asarray(rgb)), label)


class ScanNet(Files):
    """Frames as ScanNet exports them: <scene>/{color,colour}/<k>.jpg and <scene>/depth/<k>.png in
    millimetres.

    listed, a file, names the frames (an RGB and a depth file in each line, Marigold's format); count of them
    are drawn with the seed. list: the frames taken, in the same format.
    """

    seg_mode, facts = "instance", PLAIN._replace(depth_space="depth", said="ScanNet's millimetres")

    def __init__(self, root, listed=None, count=None, seed=0):
        self.root, self.modalities, self.folders = root, ["depth"], [root]
        pairs = self._listed(listed) if listed else self._found()
        count = count or (len(pairs) if listed else 5000)
        if count < len(pairs):
            pairs = sorted(random.Random(seed).sample(pairs, count))
        self.names = [rgb for rgb, _ in pairs]
        self.files = [{"rgb": root / rgb, "depth": root / depth} for rgb, depth in pairs]
        self.list = os.fsencode("".join(f"{rgb}\t{depth}\n" for rgb, depth in pairs))
        digest = hashlib.sha256(self.list).hexdigest()
        self.recipe = dict(source="scannet", frames_sha256=digest, list=listed and listed.name)

    def stem(self, i):
        return flat_name(PurePosixPath(self.names[i]).with_suffix("").as_posix())

    def _found(self):
        """All frames below the root: (RGB file, depth file), each relative to it."""
        found = [path.relative_to(self.root) for path in find_pictures(self.root)]
        colours = {(p.parents[1], p.stem): p for p in found if p.match("color/*") or p.match("colour/*")}
        depths = {(p.parents[1], p.stem): p for p in found if p.match("depth/*.[pP][nN][gG]")}
        pairs = [(colours[key].as_posix(), p.as_posix()) for key, p in depths.items() if key in colours]
        check(pairs, f"--scannet {self.root}: no frames; the layout is <scene>/color/<k>.jpg beside "
              "<scene>/depth/<k>.png")
        lost = len(depths) - len(pairs)
        if lost:
            print(f"{self.root}: {lost} of {len(depths)} depth frames have no picture in color/ "
                  "and are not used")
        return pairs

    def _listed(self, listed):
        """The frames of a list. Marigold's write 000300.jpg where ScanNet's exporter writes 300.jpg."""
        def there(file):
            path = plain = PurePosixPath(file)
            if path.stem.isdecimal():
                plain = path.with_name(f"{int(path.stem)}{path.suffix}")
            found = [p for p in (path, plain) if (self.root / p).is_file()]
            check(found, f"--list {listed}: {self.root / file}: no such file; "
                  "export this frame or leave its line out")
            return found[0].as_posix()

        with reading(f"--list {listed}", "give a text file"):
            lines = os.fsdecode(listed.read_bytes()).splitlines()
        lines = [line for line in lines if line.strip()]
        pairs = [line.split("\t" if "\t" in line else None)[:2] for line in lines]
        check(pairs and all(len(pair) == 2 for pair in pairs),
              f"--list {listed}: each line names an RGB file and a depth file below {self.root}")
        return [(there(rgb), there(depth)) for rgb, depth in pairs]


class Tree(Files):
    """A folder tree as prep_latents.py reads it; meta: the checkpoint's; facts: what the files hold."""

    def __init__(self, root, meta, facts=PLAIN):
        folders = folders_of(root)
        found = {m: stems(folder) for m, folder in folders.items()}
        check("rgb" in found and len(found) > 1, f"--data {root}: needs rgb/ and one of "
              f"{', '.join(dense())}; found {', '.join(found) or 'none'}")
        self.names, self.files = matched(found)
        self.modalities, self.facts, self.folders = available(found), facts, list(folders.values())
        if "instance" in (facts.seg_mode, meta["seg_mode"]):  # one of both knows no classes
            self.seg_mode = "instance"
        self.palette = facts.palette
        if self.palette is None and meta["palette"]:
            self.palette = np.array(meta["palette"], np.uint8)
        within = {name: path.relative_to(folders["rgb"]).parent.as_posix()
                  for name, path in found["rgb"].items()}
        known = classes_of(set(within.values()), meta["class_names"])
        self.classes = {name: known[folder] for name, folder in within.items()}
        self.recipe = dict(source="folder", folder=root.name, depth_space=facts.depth_space)


class Pairs(Files):
    """Truth and predictions of a folder each, matched by stem; nothing is cropped or resized."""

    def __init__(self, pred, gt, modalities=None, alignment="disparity", facts=PLAIN):
        """facts: what the truth holds."""
        of_pred, of_gt = folders_of(pred), folders_of(gt)
        both = [m for m in dense() if m in of_pred and m in of_gt]
        self.modalities, self.facts, self.alignment = modalities or both, facts, alignment
        self.seg_mode, self.palette = facts.seg_mode or self.seg_mode, facts.palette
        alone = len(self.modalities) == 1  # its files may lie in the folders themselves
        check(alone or (both and set(self.modalities) <= set(both)),
              f"--pred {pred} --gt {gt}: no {'/ '.join(dense())}/ folder in both; name one with --modality "
              "when the files lie in the folders themselves")
        truth = {m: stems(of_gt.get(m, gt)) for m in self.modalities}
        predictions = {f"predicted_{m}": stems(of_pred.get(m, pred)) for m in self.modalities}
        self.folders = [folder.get(m, base) for m in self.modalities
                        for folder, base in ((of_gt, gt), (of_pred, pred))]
        self._check_space(pred, predictions.get("predicted_depth", {}).values())
        self.names, self.files = matched(truth | predictions)
        self.recipe = dict(source="predictions", pred=pred.name, gt=gt.name, depth_space=facts.depth_space)

    def _check_space(self, pred, files):
        """Raise InputError where depth is predicted in another space than the alignment's, or in which one
        nobody says.
        """
        facts = facts_of(pred)
        space = None if facts.said == PLAIN.said else facts.depth_space
        if space is None and sampled(pred):
            space = "disparity"
        check(not files or space in (None, self.alignment), f"--pred {pred}: holds {space} ({facts.said}); "
              f"add --alignment {space}")
        for path in files if space is None else ():
            check(self.alignment == "depth" or is_array(path), f"{path}: a picture may be in millimetres, "
                  f"which is depth; if so, add --alignment depth; of disparity say so in {pred}/tree.json")

    def predict(self, frames):
        """A predictor."""
        return [{m: self._prediction(frame, m) for m in frame.truth} for frame in frames]

    def _prediction(self, frame, modality):
        files = self.files[frame.index]
        path = files[f"predicted_{modality}"]
        kind, facts = MODALITIES[modality], self.told()
        space = "disparity" if is_array(path) else self.alignment  # a zero of an array is a value
        raster = kind.open(path, facts._replace(depth_space=space))
        truth = files[modality]
        check_turned([raster._replace(path=truth, turned=turned_of(truth)), raster])
        found = metric_class(modality, self.seg_mode).read_prediction(kind, raster)
        size, wanted = found.shape[:2], frame.truth[modality].shape[:2]
        check(size == wanted, f"{path}: size {size}, its truth {files[modality]} has {wanted}; "
              "resize the prediction, never the truth")
        return found


# ------------------------------------------------------------------------------------------------
# Predictors. A predictor is called with a list of Frames and returns a dict for each: {modality: map}, of
# those of frame.truth that it can predict, (H, W[, 3]) at the truth's size, as the modality's metric takes
# it. There may be a spread_<modality>, (H, W), beside a map: it is saved, not scored.

class Checkpoint(NamedTuple):
    """A model's maps of RGB: frame i's member k of the ensemble is drawn with the noise of i + k * 2^32.

    A model of another kind overrides draw.
    """
    model: torch.nn.Module
    resolution: int
    encoder: object              # of vae.py
    sampling: samplers.Sampling
    metrics: dict                # as of metrics_of
    seed: int = 0
    ensemble: int = 1

    def inputs(self, frames):
        """Pixels (N, 3, S, S) and classes (N,) on the model's device."""
        kind, null = MODALITIES["rgb"], self.model.num_classes
        device = next(self.model.parameters()).device
        rgb = np.stack([kind.to_pixels(kind.crop(frame.rgb, self.resolution)) for frame in frames])
        y = [null if frame.class_id is None else frame.class_id for frame in frames]
        return torch.from_numpy(rgb).to(device), torch.tensor(y, device=device)

    def draw(self, frames, modalities, indices):
        """Pixels (N, len(modalities), 3, S, S), with the noise of these indices."""
        rgb, y = self.inputs(frames)
        noise = samplers.Noise(self.seed, indices, y.device)
        given = {"rgb": self.encoder.encode(rgb, noise)}
        x = samplers.sample_latents(self.model, y, given, noise, self.sampling)
        wanted = [self.model.modalities.index(m) for m in modalities]
        return samplers.decode(self.encoder, x, wanted, self.sampling.precision)

    def __call__(self, frames):
        wanted = [m for m in self.model.modalities if m in frames[0].truth]
        members = []
        for k in range(self.ensemble):
            indices = [frame.index + (k << 32) for frame in frames]
            members.append(self.draw(frames, wanted, indices).cpu().numpy())
        members = np.stack(members, 2)  # (N, len(wanted), ensemble, 3, S, S)
        return [self._combined(frame, dict(zip(wanted, pixels))) for frame, pixels in zip(frames, members)]

    def _combined(self, frame, members):
        """{modality: pixels (ensemble, 3, S, S)} of one frame -> its maps and spreads."""
        maps = {}
        for m, pixels in members.items():
            kind, shape = MODALITIES[m], frame.truth[m].shape[:2]
            one, spread = self.metrics[m].combine([kind.from_pixels(x) for x in pixels])
            maps[m] = kind.resize(one, shape)
            if spread is not None:
                maps[f"spread_{m}"] = MODALITIES["depth"].resize(spread, shape)
        return maps


class Ceiling(NamedTuple):
    """The truth encoded and decoded: what a perfect model would score."""
    encoder: object
    resolution: int
    metrics: dict

    def pixels(self, modality, truth):
        """Truth -> pixels (3, S, S) as training would have seen it."""
        kind = MODALITIES[modality]
        return kind.to_pixels(kind.crop(self.metrics[modality].target(truth), self.resolution))

    def decoded(self, modality, truth):
        kind, pixels = MODALITIES[modality], torch.from_numpy(self.pixels(modality, truth))
        x = self.encoder.round_trip(pixels[None])[0].cpu().numpy()
        return kind.resize(kind.from_pixels(x), truth.shape[:2])

    def __call__(self, frames):
        return [{m: self.decoded(m, truth) for m, truth in frame.truth.items()} for frame in frames]


@functools.cache
def mean_map(count=2000):
    """The toy training scenes' mean disparity, mean normal and most frequent segment: what guessing
    scores.
    """
    kind, disparity, normal, votes = MODALITIES["depth"], 0, 0, 0
    for seed in range(count):
        scene = toy_scenes.render(seed)
        disparity = disparity + kind.from_pixels(kind.to_pixels(1 / scene.depth))
        normal = normal + scene.normal
        votes = votes + np.eye(len(toy_scenes.PALETTE))[scene.seg]
    return {"depth": disparity / count, "normal": normal / np.linalg.norm(normal, axis=-1, keepdims=True),
            "seg": toy_scenes.PALETTE[votes.argmax(-1)]}


def guess(frames):
    """The predictor of the mean map."""
    return [mean_map()] * len(frames)


# ------------------------------------------------------------------------------------------------

def evaluate(source, predictors, rules, batch_size=16, save=None):
    """Score predictors {name: predictor} on a source's frames, shared out over the processes -> {name:
    {modality: Metric}}, the same on all.

    save(frame, maps), if given, is called with what the first predictor gave. Raises InputError for truth
    that cannot be read and for predictions that cannot be scored.
    """
    rank, world = place()
    scored = {name: metrics_of(source.modalities, rules) for name in predictors}
    total, first = len(source.names), next(iter(predictors))
    with tqdm(total=total, desc="evaluate", disable=rank > 0) as bar:
        for block in share(range(total), rank, world, batch_size):
            frames = [source.frame(i) for i in block]
            for name, predict in predictors.items():
                for frame, maps in zip(frames, predict(frames)):
                    for m, metric in scored[name].items():
                        if m in maps:
                            metric.add(frame.index, frame.name, frame.truth[m], maps[m])
                    if save and name == first:
                        save(frame, maps)
            bar.update(len(block) * world)
    for metrics in scored.values():
        for metric in metrics.values():
            metric.merge()
    barrier()
    return scored


def results(metrics):
    """{score: value over the set} of all modalities."""
    return {key: value for metric in metrics.values() for key, value in metric.result().items()}


def cases(metric, count=2):
    """Indices of the best, median and worst images by the metric's headline."""
    values = {i: row[metric.headline] for i, row in metric.rows.items()}
    order = sorted((i for i in values if np.isfinite(values[i])), key=values.get, reverse=metric.rising)
    middle = max(0, len(order) // 2 - count // 2)
    return list(dict.fromkeys(order[:count] + order[middle:middle + count] + order[-count:]))


# ------------------------------------------------------------------------------------------------
# Output.

def panels_of(metrics, frame, maps):
    """{modality: panels} of a frame's maps that can be compared."""
    panels = {m: metrics[m].panels(truth, maps[m]) for m, truth in frame.truth.items() if m in maps}
    return {m: found for m, found in panels.items() if found}


def save_array(path, array):
    """A picture as .png, floats as .npy."""
    with whole_file(path) as file:
        if path.suffix == ".png":
            Image.fromarray(array).save(file, "png")
        else:
            np.save(file, array.astype(np.float32))


def save_maps(out, metrics, source, frame, maps):
    """OUT/<modality>/<stem>.png and .npy, OUT/error_<modality>/<stem>.png,
    OUT/spread_<modality>/<stem>.npy.
    """
    stem = source.stem(frame.index)
    for m, (_, shown, error, values) in panels_of(metrics, frame, maps).items():
        spread = f"spread_{m}"
        save_array(out / m / f"{stem}.png", shown)
        save_array(out / f"error_{m}" / f"{stem}.png", error)
        if MODALITIES[m].floats:
            save_array(out / m / f"{stem}.npy", values)
        if spread in maps:
            save_array(out / spread / f"{stem}.npy", maps[spread])


def check_report(out):
    """Raise InputError where files of the report's names are there that no evaluation has written."""
    table = out / "per_image.csv"
    ours = table.is_file() and table.read_bytes()[:5] in (b"name,", b"name\n")
    for name in ("per_image.csv", "grid.png", "frames.txt"):
        check(ours or not (out / name).exists(), f"{out / name}: is there, and of no evaluation; use another "
              "--out")


def claim_maps(out, source):
    """Note in OUT/maps.json whose maps OUT holds. Raises InputError where there are others already."""
    path, own = out / "maps.json", []
    if path.is_file():
        with reading(path, "it is of no evaluation; use another --out"):
            own = list(map(str, json.loads(path.read_text())["stems"]))
    folders = [f"{before}{m}" for m in source.modalities for before in ("", "error_", "spread_")]
    stems = [source.stem(i) for i in range(len(source.names))]
    there = [out / folder / f"{stem}{end}" for folder in folders if (out / folder).is_dir()
             for stem in set(stems) - set(own) for end in (".png", ".npy")]
    for file in there:
        check(not file.exists(), f"{file}: is there, and not by an evaluation; use another --out")
    with whole_file(path) as file:
        file.write(json.dumps({"stems": sorted({*stems, *own})}).encode())


def write_table(path, names, metrics):
    """The scores of each image, a line each."""
    rows = [{"name": name} for name in names]
    for metric in metrics.values():
        for i, scores in metric.rows.items():
            rows[i] |= scores
    text = io.StringIO()
    keys = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(path) as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))


def write_grid(path, source, predict, metrics):
    """Pictures of the best, median and worst images by the first modality that has scores."""
    metric = next(metric for metric in metrics.values() if metric.rows)
    picks = cases(metric)
    lines = []
    for i in picks:
        frame = source.frame(i)
        maps, = predict([frame])
        line = {} if frame.rgb is None else {"rgb": frame.rgb}
        for m, panels in panels_of(metrics, frame, maps).items():
            line |= {f"{m}\n({part})": image for part, image in zip(("truth", "prediction", "error"), panels)}
        lines.append(line)
    if lines:
        grid = draw_grid([list(line.values()) for line in lines], list(lines[-1]))
        save_array(path, np.asarray(grid))
        names = ", ".join(source.names[i] for i in picks)
        print(f"{path}: best, median and worst by {metric.headline}: {names}")


def print_table(metrics, result):
    """A line for each score: its value, and what the other predictors of the result have."""
    columns = [c for c in ("ceiling", "mean_map", "gap") if c in result]
    print(f"{'':24s} {'value':>10s} " + " ".join(f"{c.replace('_', ' '):>10s}" for c in columns))
    for metric in metrics.values():
        for key, value in metric.result().items():
            cells = [f"{result[c][key]:10.4f}" if key in result[c] else " " * 10 for c in columns]
            print(f"{key + metric.note:24s} {value:10.4f} " + " ".join(cells))


# ------------------------------------------------------------------------------------------------

def arguments():
    """The command's flags -> Namespace. Raises InputError for those that contradict each other."""
    parser = command_parser(__doc__)
    what, flag = parser.add_mutually_exclusive_group(required=True).add_argument, parser.add_argument
    what("--toy", type=int, metavar="N", help="N held-out toy scenes")
    what("--scannet", type=Path, metavar="DIR", help="<scene>/{color,depth}/ as ScanNet exports them")
    what("--data", type=Path, metavar="DIR", help="folder tree <root>/<modality>/<class>/<name>")
    what("--pred", type=Path, metavar="DIR", help="predictions, with --gt; no model runs")
    flag("--gt", type=Path, metavar="DIR")
    flag("--list", type=Path, metavar="FILE", help="--scannet: the frames, a line each: rgb depth")
    flag("--num", type=int, help="--scannet: frames to draw with --seed; default 5000, with --list all")
    flag("--modality", nargs="+", choices=dense(), help="default: all that are there")
    flag("--alignment", choices=SPACES, default="disparity", help="in which scale and shift are fitted")
    flag("--depth-range", type=float, nargs=2, default=(1e-3, 10.0), metavar=("MIN", "MAX"),
         help="depths that are scored")
    flag("--depth-space", choices=SPACES, help="what true depth files hold; default: what their tree.json "
         "says, else disparity of --data, depth of --gt")
    flag("--axes", choices=("ours", "marigold"), default="ours",
         help="of the true normals; marigold: +x right")
    flag("--seg-mode", choices=list(SEGMENTATION), help="default: the checkpoint's; semantic for --pred")
    flag("--palette", type=Path, metavar="FILE",
         help="semantic colours: a JSON list, or the meta.json of sample.py")
    flag("--cityscapes-eps", dest="eps", action="store_const", const=1e-12,
         help="absent classes count as 0, as in CycleGAN's script")
    flag("--ensemble", type=int, default=1, metavar="K", help="median of K samples")
    samplers.add_flags(parser)
    flag("--out", type=Path, default=Path("evaluation"))
    flag("--save-maps", action="store_true", help="also all maps and error maps")
    flag("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    check(bool(args.pred) == bool(args.gt), "--pred DIR and --gt DIR go together")
    low, high = args.depth_range
    scenes = args.toy is None or 1 <= args.toy <= 10 ** 6
    check(scenes and args.ensemble >= 1 and 0 <= low < high, f"--ensemble {args.ensemble} --toy {args.toy} "
          f"--depth-range {low} {high}: counts from 1 to a million, 0 <= MIN < MAX")
    check(args.scannet or not (args.list or args.num), "--list and --num belong to --scannet")
    check_replaced(args.json, b"{")
    check_apart([args.json, args.scannet and args.out / "frames.txt"],
                [args.ckpt, args.list, args.palette, args.vae])
    return args


def truth_of(args, meta):
    """The Source of the flags; meta: the checkpoint's, None without a model."""
    if args.toy:
        return Toy(args.toy)
    if args.scannet:
        return ScanNet(args.scannet, args.list, args.num, args.seed)
    facts = facts_of(args.data or args.gt, args.depth_space)
    if args.data:
        return Tree(args.data, meta, facts)
    if facts.said == PLAIN.said:
        made = sampled(args.gt)
        facts = facts._replace(depth_space="disparity" if made else "depth",
                               said="by its meta.json" if made else facts.said)
    return Pairs(args.pred, args.gt, args.modality, args.alignment, facts)


def main():
    """Predict (or read predictions), score against the truth, write per_image.csv, grid.png and the JSON.

    Rank 0 gathers the others' scores.
    """
    args = arguments()
    sampling = samplers.from_flags(args)
    rank, _, device = setup()
    loaded, palette = None, args.palette
    if args.pred:
        source = truth_of(args, None)
        palette = palette or (args.pred / "meta.json" if sampled(args.pred) else None)
    else:
        loaded = load_model(args.ckpt or newest_checkpoint(), device)
        known = loaded.model.modalities
        check("rgb" in known, f"{loaded.path}: does not take RGB as a condition ({', '.join(known)})")
        samplers.prepare(loaded.model, args.precision, args.compile)
        encoder = encoder_of(loaded.meta, device, args.vae)
        source = truth_of(args, loaded.meta)
        source.modalities = [m for m in source.modalities if m in known]
    both, total = source.modalities, len(source.names)
    asked = args.modality or both
    check(both and set(asked) <= set(both), f"--modality {' '.join(asked)}: there are "
          f"{', '.join(both) or 'none'} in both truth and prediction")
    source.modalities, source.axes = asked, args.axes  # nothing else is read
    if palette:
        source.palette = read_palette(palette)
    seg_mode = source.seg_mode = args.seg_mode or source.seg_mode
    inner = {path.parent for files in source.files for path in files.values()}
    check_folder(args.out, [*source.folders, *inner])
    read = [path for files in source.files for path in files.values()]
    said = [root / "tree.json" for root in (args.data, args.gt, args.pred) if root]
    check_apart([args.json], [*read, *said, loaded and loaded.path])
    if rank == 0 and "depth" in asked and isinstance(source, Files):
        print(f"true depth files hold {source.facts.depth_space} ({source.facts.said}); predictions are "
              f"aligned in {args.alignment}")
        if source.facts.depth_space == "disparity":
            low, high = args.depth_range
            print(f"of disparity, of 8 and 16 bits in [0, 1], its inverse from {low:g} to {high:g} is scored")
    rules = Rules(args.alignment, args.depth_range, seg_mode, source.palette, args.eps)
    recipe = dict(**source.recipe, count=total, modalities=asked,
                  alignment=f"{args.alignment}, least squares per image", depth_range=args.depth_range,
                  axes=args.axes, seg_mode=seg_mode, cityscapes_eps=args.eps, torch=torch.__version__,
                  device=device.type)
    fresh = metrics_of(asked, rules)
    if loaded:
        size = loaded.meta["resolution"]
        drawn = Checkpoint(loaded.model, size, encoder, sampling, fresh, args.seed, args.ensemble)
        predictors = {"value": drawn, "ceiling": Ceiling(encoder, size, fresh)}
        recipe |= dict(ensemble=args.ensemble, **samplers.recipe(loaded, sampling, args.seed))
    else:
        predictors = {"value": source.predict}
    if args.toy:
        predictors["mean_map"] = guess
    with only_writer(args.out):
        if rank == 0:
            check_report(args.out)
            if args.save_maps:
                claim_maps(args.out, source)
        barrier()
        save = functools.partial(save_maps, args.out, fresh, source) if args.save_maps else None
        scored = evaluate(source, predictors, rules, args.batch_size, save)
        if rank == 0:
            report(args, source, predictors["value"], scored, recipe)


def report(args, source, predict, scored, recipe):
    """Print the scores of {predictor: {modality: Metric}} and write OUT's files and --json.

    Raises InputError where nothing was scored.
    """
    asked, total = source.modalities, len(source.names)
    found = {name: results(metrics) for name, metrics in scored.items()}
    metrics, result = scored["value"], found.pop("value")
    check(result, f"none of the {total} frames has a valid truth in {', '.join(asked)} "
          f"(depth between {args.depth_range[0]} and {args.depth_range[1]}; unknown pixels are not scored)")
    result |= found
    if args.toy:
        ceiling, guessed = found["ceiling"], found["mean_map"]
        headlines = [metric.headline for metric in metrics.values()]
        result["gap"] = {key: (result[key] - ceiling[key]) / (guessed[key] - ceiling[key])
                         for key in headlines if key in guessed and guessed[key] != ceiling[key]}
    valid = metrics["depth"].rows if "depth" in asked else range(total)
    unknown = [name for i, name in enumerate(source.names) if i not in valid]
    result |= dict(no_valid_depth=unknown, recipe=recipe)
    print_table(metrics, result)
    if unknown:
        print(f"{len(unknown)} of {total} frames have no valid depth and are left out of the depth figures: "
              f"{', '.join(unknown[:10])}{' ...' if len(unknown) > 10 else ''}")
    write_table(args.out / "per_image.csv", source.names, metrics)
    write_grid(args.out / "grid.png", source, predict, metrics)
    if args.scannet:
        with whole_file(args.out / "frames.txt") as file:
            file.write(source.list)
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    run(main)
