"""The scores of dense maps (depth, normals, segmentation) against their truth: of one image, and of a set.

A metric is a subclass of Metric and its row in METRICS: it reads the truth of its modality, scores an image,
and says how the set is summed up and how an error looks.
"""
import math
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from distributed import check, gather
from images import fill_unknown, label_colour, nearest_colour, segments, unit
from modalities import MODALITIES, PLAIN_SHOWN, VOID, Disparity, Scalar, spoken

UNKNOWN = -1                            # label of pixels that are not scored
ANGLES = (5, 7.5, 11.25, 22.5, 30)      # degrees whose share is reported
BINS = 1_800_000                        # of the pooled median: 1e-4 degrees each
THRESHOLDS = np.arange(1, 20) / 20      # of a soft edge map


# ------------------------------------------------------------------------------------------------
# Scores of one image.

def align(prediction, depth, valid, space):
    """Scale and shift by least squares over the valid pixels, float64 -> depth (H, W) in the truth's unit.

    space "disparity": fit s * p + t to 1 / depth, keep it above 1e-3 (of farther truth, above its least),
    invert; "log": to log depth, of either sign, and its exponential; "depth": to depth (Marigold's). A
    constant prediction gets the minimum-norm solution.
    """
    p, g = prediction.astype(np.float64), depth[valid].astype(np.float64)
    target = {"disparity": np.reciprocal, "log": np.log, "depth": np.positive}[space](g)
    columns = np.stack([p[valid], np.ones_like(g)], 1)
    scale, shift = np.linalg.lstsq(columns, target, rcond=None)[0]
    fit = p * scale + shift
    if space == "log":
        return np.exp(np.minimum(fit, 700))  # beyond it is infinite
    return 1 / np.maximum(fit, min(1e-3, target.min())) if space == "disparity" else fit


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


def semantic_scores(confusion, eps=None, void=None):
    """Confusion (K, K), rows truth -> pixel accuracy, class accuracy, mIoU.

    Classes absent from both sides are ignored; eps (1e-12) counts them as 0, as CycleGAN's Cityscapes script
    does. void, a label, is no class: to predict it is an error.
    """
    total, classes = confusion.sum(), np.arange(len(confusion)) != void
    hit = np.diag(confusion).astype(np.float64)[classes]
    rows, columns = confusion.sum(1)[classes], confusion.sum(0)[classes]
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
    from scipy.optimize import linear_sum_assignment  # slow to import
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
    void: int = None                    # likewise


def finite(array):
    """Where all is finite: (H, W[, 3]) -> bool (H, W)."""
    return np.isfinite(np.atleast_3d(array)).all(-1)


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
        """A file of truth -> the user's array, unknown pixels as the metric marks them: NaN."""
        array, known = kind.array(raster), raster.known
        if known is None:
            return array
        return np.where(known if array.ndim == 2 else known[..., None], array, np.float32(np.nan))

    @classmethod
    def read_prediction(cls, kind, raster):
        """A file of a prediction, likewise."""
        return cls.read(kind, raster)

    def target(self, truth, shown=PLAIN_SHOWN):
        """The truth as the map that a perfect model predicts, whose maps are shown so."""
        known = finite(truth)
        if known.all():
            return truth
        return self.kind.from_pixels(self.kind.to_pixels(fill_unknown(truth, known)))

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
        error, known = np.abs(prediction.astype(np.float64) - truth), finite(truth)
        return {self.headline: error[known].mean()} if known.any() else {}

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
        """Truth or prediction -> uint8 (H, W, 3), black where unknown."""
        return self.kind.picture(np.nan_to_num(array))

    def error(self, truth, prediction):
        """Errors (H, W), and the one that is shown white."""
        return finite(truth) * np.abs(self.look(truth).mean(-1) - self.look(prediction).mean(-1)), 255

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
        """-> metres, float64 (H, W), NaN where unknown; of disparity, which has no unit, its inverse, where
        levels are in [0, 1] and the largest of floats is 1.

        Raises InputError for depth without a unit, and for a model's log depth, which is no truth.
        """
        values, facts = raster.values, raster.facts
        check(facts.depth_space != "log", f"{raster.path}: holds a model's log depth ({facts.said}), which "
              "is no truth; give files of depth or disparity")
        known = raster.where_known
        if facts.depth_space == "disparity":
            disparity = Scalar.array(kind, raster).astype(np.float64)  # of levels in [0, 1]
            known = known & (disparity > 0)
            top = 1 if raster.top else disparity.max(initial=0, where=known)
            return np.where(known, top / np.where(known, disparity, 1), np.nan)
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
        return np.where(raster.where_known, raster.values.astype(np.float64), np.nan)

    def target(self, depth, shown=PLAIN_SHOWN):
        """Disparity or minus log depth; unknown pixels take the nearest known depth."""
        known = np.isfinite(depth) & (depth > 0)
        if not known.any():
            return np.ones_like(depth)
        return spoken(fill_unknown(depth, known), shown.depth_target)

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
        return np.where(raster.where_known[..., None], normal, 0)

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

    @property
    def palette(self):
        """The colours of the labels, uint8 (K, 3); None: nobody says."""
        return self.rules.palette

    @staticmethod
    def read(kind, raster):
        """Labels of a file of labels, or of which not all is known, else colours; those of no class are
        unknown.
        """
        return Segmentation.read_prediction(kind, kind.of_classes(raster))

    @staticmethod
    def read_prediction(kind, raster):
        """Labels of a file of labels, or of which not all is known, else colours."""
        labels, palette = raster.labels, raster.facts.palette
        if labels is None and raster.known is None:
            return kind.array(raster)
        if labels is None:
            colours = kind.array(raster)
            labels = segments(colours) if palette is None else nearest_colour(colours, palette)
        return np.where(raster.where_known, labels, UNKNOWN)

    def look(self, image):
        """Labels or colours -> colours, black where unknown."""
        if image.ndim == 3:
            return image
        colours = label_colour(image.clip(0))
        if self.palette is not None:
            colours = self.palette[image.clip(0, len(self.palette) - 1)]
        return np.where((image == UNKNOWN)[..., None], np.uint8(0), colours)

    def target(self, image, shown=PLAIN_SHOWN):
        """Colours; unknown pixels take the nearest known label's."""
        return self.look(fill_unknown(image, image != UNKNOWN) if image.ndim == 2 else image)


class Semantic(Segmentation):
    """Classes by labels or by the palette's colours; one confusion matrix over the set."""

    def labels(self, name, image):
        """Labels of a picture of labels or colours. Raises InputError for labels that the palette does not
        have.
        """
        palette = self.palette
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
        palette = self.palette
        if len(maps) == 1 or palette is None:
            return super().combine(maps)
        votes = np.stack([nearest_colour(image, palette) for image in maps])
        counts = np.stack([(votes == k).sum(0) for k in range(len(palette))])
        return palette[counts.argmax(0)], 1 - counts.max(0) / len(maps)

    def scores(self, name, truth, prediction):
        p, g = self.labels(name, prediction), self.labels(name, truth)
        self.pool(pixels=g.size, unknown=(g == UNKNOWN).sum())
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
        if self.palette is not None:
            K = len(self.palette)
        return semantic_scores(confusion[:K, :K], self.rules.eps, self.rules.void)

    def over_set(self):
        return self.of_confusion(self.pooled["confusion"])

    def error(self, truth, prediction):
        p, g = (self.labels("", image) for image in (prediction, truth))
        return (p != g) & (g != UNKNOWN), 1


class Instance(Segmentation):
    """Segments by whatever colours, matched in each image."""

    palette = None  # a label is a segment, not a class

    def known(self, image):
        """bool (H, W)"""
        return image != UNKNOWN if image.ndim == 2 else np.ones(image.shape[:2], bool)

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


METRICS = {"depth": Depth, "normal": Normal, "canny": Edges}  # that of seg is one of
SEGMENTATION = {"semantic": Semantic, "instance": Instance}


def metrics_of(modalities, rules):
    """{modality: a Metric without scores}, in the registry's order."""
    return {m: metric_class(m, rules.seg_mode)(m, rules) for m in MODALITIES if m in modalities}


def metric_class(modality, seg_mode="semantic"):
    """The row of METRICS that scores a modality. Raises InputError where a further disparity has none."""
    check(modality in METRICS or not isinstance(MODALITIES[modality], Disparity), f"{modality}: is known up "
          "to scale and shift; its scores need names of their own: a subclass of Depth, its row in METRICS")
    return SEGMENTATION[seg_mode] if modality == "seg" else METRICS.get(modality, Metric)


def results(metrics):
    """{score: value over the set} of all modalities."""
    return {key: value for metric in metrics.values() for key, value in metric.result().items()}


def print_table(metrics, result):
    """A line for each score: its value, and what the other predictors of the result have."""
    columns = [c for c in ("ceiling", "mean_map", "gap") if c in result]
    print(f"{'':24s} {'value':>10s} " + " ".join(f"{c.replace('_', ' '):>10s}" for c in columns))
    for metric in metrics.values():
        for key, value in metric.result().items():
            cells = [f"{result[c][key]:10.4f}" if key in result[c] else " " * 10 for c in columns]
            print(f"{key + metric.note:24s} {value:10.4f} " + " ".join(cells))
