"""The registry of modalities, and what their files hold.

A modality is a row of MODALITIES, of one of a few kinds. A kind says how its files are read and resized,
what the network is shown (pixels, float32 (3, H, W) in [-1, 1]), what the user is given (an array) and how
that looks (uint8 (H, W, 3)). Adding a modality of a kind that is there is one row.
"""
import hashlib
import json
import os
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from distributed import InputError, check, reading, whole_file
from images import as_it_is, canny, centre_crop, enlarge, fill_unknown, label_colour, nearest_colour, unit

MAX_PIXELS = 100_000_000  # a larger picture is refused before it is decoded
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
VOID = 255  # the label of unknown pixels


# ------------------------------------------------------------------------------------------------
# Files: what they hold, unscaled.

class Facts(NamedTuple):
    """What the files of a data set hold, where that can be read in two ways."""
    depth_space: str = "disparity"  # or "depth", or "log", minus log depth, of a model's samples alone
    depth_unit: float = None        # metres of a level of integer depth; None: a millimetre, of 16 bits
    depth_void: float = None        # value of unknown depth or disparity, beside what cannot be one
    seg_mode: str = None            # "semantic" or "instance"; None: nobody says
    palette: np.ndarray = None      # colours of labels, uint8 (K, 3)
    void: int = None                # label of unknown pixels; None: VOID
    upright: bool = False           # maps were made of the pictures as their orientation tags turn them
    focal: float = None             # focal length in pixels of files of focal_width
    focal_width: int = None         # None: the files' own
    classes: str = None             # "none": folders are no classes
    said: str = "by default"        # who says what depth files hold


PLAIN_FACTS = Facts()  # of files of which nobody says anything
FACTS_FORMAT = "mmgen-tree-1"
TOPS = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}  # the level that stands for 1


def write_facts(root, **told):
    """Write what is told of a tree's files into its tree.json, beside what it says already.

    Raises InputError where that contradicts.
    """
    path, held = root / "tree.json", {"format": FACTS_FORMAT}
    if path.is_file():
        with reading(path, "use another folder"):
            held = dict(json.loads(path.read_text()))
    check(held.get("format") == FACTS_FORMAT, f"{path}: format is not {FACTS_FORMAT!r}; use another folder")
    for key, value in told.items():
        check(held.get(key, value) == value, f"{path}: says {key} = {str(held.get(key))[:60]}, the files "
              f"would hold {str(value)[:60]}; use another folder")
    if held != {**held, **told} or not path.is_file():
        with whole_file(path) as file:
            file.write(json.dumps({**held, **told}, indent=1).encode())


def check_told(root, modalities=None):
    """Raise InputError where a tree to be written holds maps already, and no tree.json says what."""
    told = (root / "tree.json").exists() or not any((root / m).exists() for m in modalities or MODALITIES)
    check(told, f"--out {root}: holds pictures of which no tree.json tells; use another folder")


def is_array(path):
    """Whether a file is an array, not a picture."""
    return pathlib.Path(path).suffix.lower() == ".npy"


class Picture(NamedTuple):
    """A picture file as it is, but turned as its orientation tag says."""
    values: np.ndarray          # (H, W), of a palette the indices, or uint8 (H, W, 3)
    mode: str                   # Pillow's
    palette: np.ndarray = None  # uint8 (256, 3)
    alpha: np.ndarray = None    # uint8 (H, W), 0 = transparent
    turned: int = 1             # the orientation tag
    narrowed: bool = False      # several channels of 16 bits, of which Pillow gives the upper 8

    @property
    def colours(self):
        """uint8 (H, W, 3) of 8 bits a channel, else None."""
        if self.palette is not None:
            return self.palette[self.values]
        if self.values.ndim == 3:
            return self.values
        if self.values.dtype != np.uint8:
            return None
        grey = self.values * np.uint8(255) if self.mode == "1" else self.values
        return np.repeat(grey[..., None], 3, 2)


TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
         7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}  # orientation tag: what undoes it


def turned_of(path):
    """The orientation tag of a file, by its head alone; of an array 1."""
    if is_array(path):
        return 1
    with reading(path, "replace or remove it"), Image.open(path) as image:
        return _orientation(image)


def _orientation(image):
    """The orientation tag, 1 where there is none that can be read; no other tag is looked at."""
    try:
        tag = image.getexif().get(0x0112)
    except Exception:  # cameras write tags that Pillow cannot parse
        return 1
    return tag if isinstance(tag, int) and tag in TURNS else 1


def read_picture(path):
    """A picture file -> Picture.

    Raises InputError naming the file when it is missing, empty, cut short, too large or no picture.
    """
    with reading(path, "replace or remove it"), Image.open(path) as image:
        check(image.width * image.height <= MAX_PIXELS, f"{path}: {image.width}x{image.height} is over "
              f"{MAX_PIXELS / 1e6:.0f} megapixels; make it smaller")
        wide = any(";16" in str(tile[3]) for tile in image.tile)  # how its bytes lie; gone when it is loaded
        turned = _orientation(image)
        image.load()
        left = _orientation(image)  # Pillow has turned TIFF files itself
        if left > 1:
            image = image.transpose(TURNS[left])
        several = image.mode.startswith(("RGB", "LA"))
        return _unpacked(image)._replace(turned=turned, narrowed=wide and several)


def _unpacked(image):
    """A loaded PIL image -> Picture."""
    mode, key = image.mode, image.info.get("transparency")
    if mode in ("P", "PA"):
        palette = np.zeros((256, 3), np.uint8)
        colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        palette[:len(colours)] = colours
        if len(colours) > 1 and (colours == np.arange(len(colours))[:, None]).all():
            palette = None  # every index is its own grey: it says no more than the indices
        clear = mode == "PA" or key is not None
        alpha = np.asarray(image.convert("RGBA"))[..., 3] if clear else None
        return Picture(np.asarray(image.getchannel(0)), mode if palette is not None else "L", palette, alpha)
    if mode in ("LA", "La"):
        values, alpha = np.moveaxis(np.asarray(image.convert("LA")), -1, 0)
        return Picture(values, mode, alpha=alpha)
    if mode in ("1", "L", "F") or mode.startswith("I"):
        values = np.asarray(image)
        values = values.astype(np.uint8 if mode == "1" else values.dtype.newbyteorder("="))
        if mode.startswith("I") and values.min() >= 0 and values.max() <= 65535:
            values = values.astype(np.uint16)  # 16-bit files arrive as I;16 or I
        alpha = np.where(values == key, np.uint8(0), np.uint8(255)) if isinstance(key, int) else None
        return Picture(values, mode, alpha=alpha)
    if mode in ("RGBA", "RGBa") or key is not None:
        values = np.asarray(image.convert("RGBA"))
        return Picture(values[..., :3], mode, alpha=values[..., 3])
    return Picture(np.asarray(image.convert("RGB")), mode)


def write_picture(path, image, photo=None):
    """Write a PIL image as PNG; photo: the sha256 of the picture that it was made of."""
    text = PngImagePlugin.PngInfo()
    if photo is not None:
        text.add_text("photo", photo)
    with whole_file(path) as file:
        image.save(file, "png", pnginfo=text)


def photo_of(path):
    """The photo of write_picture that a picture says, or None."""
    with reading(path, "remove it"), Image.open(path) as image:
        return image.info.get("photo")


def _to_rgb(path, picture):
    """A Picture -> uint8 (H, W, 3), what is transparent laid over white.

    Raises InputError for values of no scale.
    """
    colours = picture.colours
    if colours is None:
        held = picture.values
        check(held.dtype == np.uint16, f"{path}: holds {held.dtype} from {held.min():.4g} to "
              f"{held.max():.4g}, which have no scale as colours; give 8 or 16 bits")
        colours = np.repeat((held / np.float32(65535) * 255).round().astype(np.uint8)[..., None], 3, 2)
    if picture.alpha is None:
        return colours
    image = Image.fromarray(np.dstack([colours, picture.alpha]))
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def read_rgb(path):
    """A picture file as PIL image in mode RGB, whatever it holds. Raises InputError as read_picture does, and
    for values without a scale.
    """
    return Image.fromarray(_to_rgb(path, read_picture(path)))


def read_array(path):
    """An .npy array of numbers, not empty. Raises InputError for anything else."""
    with reading(path, "make it again, an .npy array of numbers"):
        array = np.load(path, allow_pickle=False)
        kind = array.dtype.kind if isinstance(array, np.ndarray) else type(array).__name__
        check(kind in "fiub" and array.size, f"{path}: holds {kind} {getattr(array, 'shape', '')}, "
              "an .npy array of numbers is needed")
        return array.astype(array.dtype.newbyteorder("="), copy=False)


# ------------------------------------------------------------------------------------------------
# Kinds.

class Raster(NamedTuple):
    """A file that was read once: its values at its own size, unknown ones filled from the nearest known."""
    path: pathlib.Path
    values: np.ndarray          # (H, W) or (H, W, 3), numbers of any type
    known: np.ndarray = None    # bool (H, W); None: all
    top: int = None             # the level that stands for 1: 255, 65535; None: values are as they are
    labels: np.ndarray = None   # (H, W), of a picture of labels
    facts: Facts = PLAIN_FACTS
    turned: int = 1             # its orientation tag

    @property
    def size(self):
        """(width, height)"""
        return self.values.shape[1::-1]

    @property
    def where_known(self):
        """Where its pixels are known: bool (H, W), also of all."""
        return np.ones(self.values.shape[:2], bool) if self.known is None else self.known

    def fitted(self, fit, nearest=False):
        """Its values through a fit: (h, w) or (h, w, 3), uint8 or float32; of 16 bits in [0, 1]."""
        if self.values.dtype == np.uint8:
            return np.asarray(fit(Image.fromarray(self.values), nearest))
        values = self.values.astype(np.float32) / np.float32(self.top or 1)
        layers = np.atleast_3d(values).transpose(2, 0, 1)
        arrays = [np.asarray(fit(Image.fromarray(layer.copy()), nearest)) for layer in layers]
        return arrays[0] if len(arrays) == 1 else np.stack(arrays, -1)

    def known_at(self, fit):
        """Where its pixels are known through a fit: bool (h, w), None for all."""
        if self.known is None:
            return None
        return np.asarray(fit(Image.fromarray(self.known.astype(np.uint8)), True)) > 0


def check_turned(rasters):
    """Raise InputError where an orientation tag turns one of the rasters alone, and their shapes do not tell
    whether the others were made before or after.
    """
    for other in rasters[1:]:
        first = rasters[0]
        lies = (first.turned > 4) != (other.turned > 4)  # one alone is turned by a quarter
        told = lies and first.size[0] != first.size[1]   # else of another aspect
        check(first.turned == other.turned or told or other.facts.upright, f"{other.path}: its orientation "
              f"tag is {other.turned}, that of {first.path} is {first.turned} (1: none); one alone would be "
              "turned: make both upright")


def read_mask(path):
    """A picture of a mask -> Raster of bool (H, W): where it is white; what is transparent is not."""
    picture = read_picture(path)
    image = Image.fromarray(_to_rgb(path, picture._replace(alpha=None)))
    white = np.asarray(image.convert("L")) > 127
    if picture.alpha is not None:
        white = white & (picture.alpha > 127)
    return Raster(path, white, turned=picture.turned)


class Shown(NamedTuple):
    """How maps are shown to a network, where there are two ways; "shown" of meta.json holds what differs from
    these defaults, which are the ways of older files.
    """
    depth_over: str = "crop"   # depth is stretched to the range of its "crop", or of the whole "picture"
    uncovered: str = "black"   # black pixels of instance segments stay "black", or take a random "colour"
    depth_norm: str = "minmax"  # that range is from the least to the largest, or between two "quantile"s
    depth_target: str = "disparity"  # depth is learned as its inverse, or as minus its "log"arithm

    def told(self):
        """What is not the default, for meta.json."""
        return {key: value for key, value in self._asdict().items() if value != Shown._field_defaults[key]}

    def flags(self):
        """As prep_latents.py takes them."""
        return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in self._asdict().items())


PLAIN_SHOWN = Shown()
WAYS = {  # the first is the released one
    "depth_over": ("picture", "crop"),
    "uncovered": ("colour", "black"),
    "depth_norm": ("minmax", "quantile"),
    "depth_target": ("disparity", "log"),
}
QUANTILES = (0.02, 0.98)  # the ends of depth's range with depth_norm "quantile"


def shown_of(meta, path):
    """The Shown of the meta.json of a cache or checkpoint at a path. Raises InputError for what is not known
    here.
    """
    told = meta.get("shown", {})
    good = isinstance(told, dict) and all(told[key] in WAYS.get(key, ()) for key in told)
    check(good, f"{path}: says shown = {str(told)[:60]}; known are {WAYS}")
    return Shown(**told)


def spoken(depth, target):
    """Depth, above 0, in any unit -> what a model of this depth_target learns of it; near is the largest."""
    return -np.log(depth) if target == "log" else 1 / depth


def check_target(place, facts, target):
    """Raise InputError where files of depth do not hold, nor can be turned to, what is learned: disparity and
    log depth, known up to scale and shift alone, cannot be turned to each other.
    """
    check(facts.depth_space in ("depth", target), f"{place}: depth is learned as {target}, the files hold "
          f"{facts.depth_space} ({facts.said}), which cannot be turned to it; if they hold depth, say so by "
          "--depth-space depth or in tree.json")


class Kind:
    """What all kinds share; a modality's own are its weight in the loss, its meaning for meta.json, and
    derive.

    derive: from uint8 RGB (H, W, 3), where no files are needed; used where --modalities names the row.
    A kind also has to_pixels(array, known, shown) -> float32 (3, H, W), from_pixels(pixels) -> the user's
    array, picture(array) -> uint8 (H, W, 3).
    """

    nearest = False  # resized without new values
    mirror = 1, 1, 1  # what its channels are multiplied by in a mirrored picture
    floats = False   # an array of floats is worth keeping beside the picture

    def __init__(self, loss_weight, meaning, derive=None):
        self.loss_weight, self.meaning, self.derive = loss_weight, meaning, derive

    def open(self, path, facts=PLAIN_FACTS):
        """A file of this kind -> Raster.

        Raises InputError for what is unreadable, of another shape, or can be read in two ways.
        """
        path = pathlib.Path(path)
        if is_array(path):
            raster = self.of_array(path, read_array(path), facts)
        else:
            picture = read_picture(path)
            raster = self.of_picture(path, picture, facts)._replace(turned=picture.turned)
        known = raster.known
        if known is None or known.all():
            return raster._replace(known=None, facts=facts)
        return raster._replace(values=fill_unknown(raster.values, known), facts=facts)

    def of_array(self, path, array, facts):
        """An array file -> Raster, not filled."""
        raise NotImplementedError

    def of_picture(self, path, picture, facts):
        """A Picture -> Raster, not filled."""
        raise NotImplementedError

    def array(self, raster, fit=as_it_is):
        """A Raster through a fit -> the user's array."""
        raise NotImplementedError

    def meant(self, shown):
        """What the outputs of a network mean that is shown its maps so."""
        return self.meaning

    def pixels(self, raster, fit=as_it_is, shown=PLAIN_SHOWN):
        """A Raster through a fit -> the network's pixels. Raises InputError for values out of [-1, 1], and
        where nothing is known.
        """
        known = raster.known_at(fit)
        check(known is None or known.any(), f"{raster.path}: none of its pixels is known "
              "(zero, not finite, transparent or void); leave it out")
        return self.checked(self.shown_pixels(raster, fit, known, shown), raster.path)

    def checked(self, pixels, place):
        """The network's pixels, as they are. Raises InputError for values out of [-1, 1]."""
        check(np.abs(pixels).max() <= 1.01, f"{place}: becomes pixels from {pixels.min():.3g} to "
              f"{pixels.max():.3g}, they must lie in [-1, 1]; {self.meaning}")
        return pixels

    def mirrored(self, pixels):
        """The network's pixels (3, H, W) of the mirrored picture."""
        return pixels[..., ::-1] * np.float32(self.mirror)[:, None, None]

    def shown_pixels(self, raster, fit, known, shown):
        """A Raster through a fit, where known (h, w) there, None for all -> pixels as a network is shown."""
        return self.to_pixels(self.array(raster, fit), known)

    def crop(self, array, size):
        """The user's array (H, W[, 3]) -> ADM's centre crop of it."""
        def fit(image, nearest):
            return centre_crop(image, size, nearest)

        return Raster(None, array).fitted(fit, self.nearest)

    def resize(self, array, shape):
        """The user's array (h, w[, 3]) -> (H, W[, 3]): bilinear, of flat colours the nearest."""
        if array.shape[:2] == tuple(shape):
            return array
        x = enlarge(np.atleast_3d(array).transpose(2, 0, 1), shape, self.nearest).transpose(1, 2, 0)
        x = x.round() if array.dtype == np.uint8 else x
        return (x if array.ndim == 3 else x[..., 0]).astype(array.dtype)

    def median(self, arrays):
        """Of the user's arrays (K, H, W[, 3]), a pixel at a time."""
        return np.median(arrays, 0)

    def part(self, array, palette):
        """What is summed for the mean of many of the user's arrays; None where they have no mean."""
        return array.astype(np.float64)

    def mean(self, total, count, palette):
        """The mean of `count` arrays, whose parts sum up to this."""
        return (total / count).astype(np.float32)


def _held(array):
    """What an array holds, for a message."""
    return f"{array.dtype} {array.shape} from {array.min():.4g} to {array.max():.4g}"


class Colour(Kind):
    """A picture: uint8 (H, W, 3)."""

    def of_array(self, path, array, facts):
        """(H, W, 3) of 0 to 255; floats of a few units could be levels or shares of them."""
        shaped = array.ndim == 3 and array.shape[2] == 3 and np.isfinite(array).all()
        levels = array.dtype.kind in "iu" or array.max() > 16 or not array.any()
        check(shaped and levels and 0 <= array.min() and array.max() <= 255,
              f"{path}: holds {_held(array)}; needs (H, W, 3) of levels from 0 to 255, best as uint8")
        return Raster(path, array if array.dtype == np.uint8 else array.astype(np.float32))

    def of_picture(self, path, picture, facts):
        return Raster(path, _to_rgb(path, picture))

    def array(self, raster, fit=as_it_is):
        values = raster.fitted(fit, self.nearest)
        return values if values.dtype == np.uint8 else values.round().clip(0, 255).astype(np.uint8)

    def to_pixels(self, image, known=None, shown=PLAIN_SHOWN):
        return image.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1

    def from_pixels(self, pixels):
        return ((pixels.transpose(1, 2, 0) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)

    def picture(self, image):
        return np.asarray(image, np.uint8)

    def mean(self, total, count, palette):
        return (total / count).round().astype(np.uint8)


class Flat(Colour):
    """Flat colours, one a class or segment: uint8 (H, W, 3). Pictures of one channel and of a palette, and
    arrays (H, W), are labels: their colours are facts.palette, else the file's own, else label_colour.
    """

    nearest = True

    def of_array(self, path, array, facts):
        if array.ndim == 2 and array.dtype.kind in "iub":
            return self._labelled(path, array.astype(np.int64), facts)
        return super().of_array(path, array, facts)

    def of_picture(self, path, picture, facts):
        seen = None if picture.alpha is None else picture.alpha > 0
        if picture.values.ndim == 2:
            check(picture.values.dtype.kind in "iu", f"{path}: holds {_held(picture.values)}; labels are "
                  "whole numbers")
            raster = self._labelled(path, picture.values.astype(np.int64), facts, picture.palette)
            return raster if seen is None else raster._replace(known=raster.known & seen)
        if facts.palette is not None and facts.void is not None and 0 <= facts.void < len(facts.palette):
            there = (picture.values != facts.palette[facts.void]).any(-1)
            seen = there if seen is None else seen & there
        return Raster(path, picture.values, seen)

    def of_classes(self, raster, radius=16):
        """A Raster of labels or colours -> the same, unknown where a colour is near none of the palette's."""
        palette, image = raster.facts.palette, raster.values
        if palette is None or raster.labels is not None:
            return raster
        distinct, index = np.unique(image.astype(np.int64) @ [65536, 256, 1], return_inverse=True)
        colours = np.stack([distinct >> 16, distinct >> 8 & 255, distinct & 255], -1)
        nearest = palette[nearest_colour(colours[None], palette)[0]].astype(np.int64)
        near = ((colours - nearest) ** 2).sum(-1) <= radius ** 2
        known = near[index].reshape(image.shape[:2]) & raster.where_known
        return raster if known.all() else raster._replace(values=fill_unknown(image, known), known=known)

    def _labelled(self, path, labels, facts, own=None):
        """Labels (H, W), and the colours that the file itself gives them -> Raster."""
        void, told = facts.void, facts.palette
        used = np.unique(labels)
        sure = void is not None or own is not None or used.tolist() != [0, VOID]
        check(sure, f"{path}: holds 0 and {VOID} alone, and a label {VOID} is unknown; if this is a mask, "
              "write labels 0 and 1, or colours")
        void = VOID if void is None else void
        first, last = used.min(), used.max()
        check((first >= 0 or first == void) and last < 2 ** 24, f"{path}: labels from {first} to {last}, "
              'they go from 0 to 2^24; say in tree.json which one is unknown, as "void"')
        used = used[used != void]
        if told is None:
            colours = label_colour(labels.clip(0)) if own is None else own[labels.clip(0, 255)]
            return Raster(path, colours, labels != void, labels=labels)
        place = {tuple(colour): k for k, colour in reversed(list(enumerate(told.tolist())))}
        if own is not None and all(tuple(own[k].tolist()) in place for k in used):
            table = np.full(256, void)  # the file numbers the colours in an order of its own
            table[used] = [place[tuple(own[k].tolist())] for k in used]
            labels, used = table[labels], np.unique(table[used])
        check(not len(used) or (used[0] >= 0 and used[-1] < len(told)), f"{path}: labels from "
              f"{used.min(initial=0)} to {used.max(initial=0)}, the palette has {len(told)} colours; bring "
              "the palette of all classes")
        return Raster(path, told[labels.clip(0, len(told) - 1)], labels != void, labels=labels)

    def shown_pixels(self, raster, fit, known, shown):
        """Pixels that no segment covers are one more, in a colour drawn by the file's name."""
        image = self.array(raster, fit)
        if shown.uncovered == "colour" and raster.facts.palette is None:
            bare = ~image.any(-1)
            digest = hashlib.sha256(os.fsencode(raster.path.stem)).digest()
            image = np.where(bare[..., None], np.frombuffer(digest[:3], np.uint8), image)
        return self.to_pixels(image, known)

    def part(self, image, palette):
        """Votes for the palette's colours (H, W, K)."""
        return None if palette is None else np.eye(len(palette))[nearest_colour(image, palette)]

    def mean(self, total, count, palette):
        """The most frequent colour."""
        return palette[total.argmax(-1)]


class Scalar(Kind):
    """One value in [0, 1]: float32 (H, W). Levels of 8 and 16 bits are scaled, floats are as they are."""

    floats = True

    def known(self, values, facts):
        """Where values (H, W) are known."""
        return np.isfinite(values)

    def of_array(self, path, array, facts):
        check(array.ndim == 2, f"{path}: shape {array.shape}; needs (H, W)")
        return Raster(path, array, self.known(array, facts), TOPS.get(array.dtype))

    def of_picture(self, path, picture, facts):
        values = picture.values
        check(not picture.narrowed, f"{path}: has several channels of 16 bits, of which 8 would be read; "
              "write one grey channel of 16 bits")
        if values.ndim == 3 or picture.palette is not None or picture.mode == "1":
            colours = picture.colours
            spread = np.ptp(colours.astype(np.int16), 2).max()
            check(spread <= 16, f"{path}: is in colours (mode {picture.mode}, channels up to {spread} levels "
                  "apart); one grey channel of values is needed, not a colour map or packed bytes")
            values = np.asarray(Image.fromarray(colours).convert("L"))
        known = self.known(values, facts)
        if picture.alpha is not None:
            known = known & (picture.alpha > 0)
        return Raster(path, values, known, TOPS.get(values.dtype))

    def array(self, raster, fit=as_it_is):
        value = raster.fitted(fit)
        return value / np.float32(255) if value.dtype == np.uint8 else value

    def to_pixels(self, value, known=None, shown=PLAIN_SHOWN):
        return np.repeat((value * 2 - 1)[None].astype(np.float32), 3, 0)

    def from_pixels(self, pixels):
        return (pixels.mean(0) + 1) / 2

    def picture(self, value):
        return np.repeat((value.clip(0, 1) * 255).round().astype(np.uint8)[..., None], 3, 2)


def span_of(values, norm):
    """The two of known values that become -1 and 1."""
    if norm == "quantile":
        return tuple(np.quantile(values, QUANTILES))
    return values.min(), values.max()


class Disparity(Scalar):
    """Relative disparity or minus log depth, near is bright: files of any scale, which hold it or, of
    facts.depth_space "depth", depth; the network's is stretched to the range of the known pixels.
    """

    def meant(self, shown):
        if shown.depth_target == "log":
            return "minus log depth, scaled to [0, 1], near = 1; affine-invariant, no unit"
        return self.meaning

    def known(self, values, facts):
        """In files of depth zero and, of 16 bits, the highest level are unknown."""
        known = np.isfinite(values)
        if facts.depth_void is not None:
            known &= values != facts.depth_void
        if facts.depth_space == "depth":
            known &= values > 0
            if values.dtype == np.uint16:
                known &= values < 65535
        return known

    def array(self, raster, fit=as_it_is):
        return self.spoken(raster, fit, "disparity" if raster.facts.depth_space == "depth" else None)

    def spoken(self, raster, fit, target):
        """A Raster through a fit -> what is learned, of None what is held, float32 (h, w), not scaled yet."""
        value = raster.fitted(fit).astype(np.float32)  # of any scale
        if target is None or raster.facts.depth_space == target:
            return value
        check_target(raster.path, raster.facts, target)
        least = max(raster.fitted(as_it_is).min(), np.finfo(np.float32).tiny)  # bicubic goes below it
        return spoken(np.maximum(value, least), target)

    def shown_pixels(self, raster, fit, known, shown):
        """With the range of the crop, or of the whole picture."""
        values = self.spoken(raster, fit, shown.depth_target)
        if shown.depth_over == "crop":
            return self.to_pixels(values, known, shown)
        whole = self.spoken(raster, as_it_is, shown.depth_target)
        there = whole[raster.where_known]
        return self.to_pixels(values, known, shown, span_of(there, shown.depth_norm))

    def to_pixels(self, values, known=None, shown=PLAIN_SHOWN, span=None):
        """values (H, W), of shown.depth_target; span: the range that becomes [-1, 1], what is outside is
        clipped; None: that of the known ones.
        """
        there = values if known is None else values[known]
        low, high = span or span_of(there, shown.depth_norm)
        scaled = ((values - low) / max(high - low, 1e-8) * 2 - 1).clip(-1, 1)
        return np.repeat(scaled[None].astype(np.float32), 3, 0)


def looks_encoded(vectors):
    """Whether floats (..., 3) look like xyz * 0.5 + 0.5: none is negative, and they are no unit vectors."""
    odd = np.abs(np.linalg.norm(vectors, axis=-1) - 1) > 0.05
    return bool(odd.size and odd.mean() > 0.3 and vectors.min() >= 0)


class Vector(Kind):
    """Unit vectors: float32 (H, W, 3) in [-1, 1], zero where unknown; in pictures xyz * 0.5 + 0.5."""

    mirror = -1, 1, 1
    floats = True

    def of_array(self, path, array, facts):
        """(H, W, 3) or (3, H, W): floats in [-1, 1], or uint8 as in a picture."""
        if array.ndim == 3 and array.shape[2] != 3 and array.shape[0] == 3:
            array = array.transpose(1, 2, 0)
        check(array.ndim == 3 and array.shape[2] == 3 and array.dtype.kind in "fu",
              f"{path}: holds {array.dtype} {array.shape}; normals are floats (H, W, 3)")
        if array.dtype == np.uint8:
            return self.of_picture(path, Picture(array, "RGB"), facts)
        vectors = np.where(np.isfinite(array).all(-1, keepdims=True), array, 0)
        known = np.linalg.norm(vectors, axis=-1) > 1e-3
        check(array.dtype.kind == "f" and np.abs(vectors).max() <= 1.01,
              f"{path}: holds {_held(vectors)}; normals are floats in [-1, 1]")
        check(not looks_encoded(vectors[known]), f"{path}: holds values in [0, 1] that are no unit vectors, "
              "as a picture holds them; give xyz in [-1, 1]")
        return Raster(path, vectors, known)

    def of_picture(self, path, picture, facts):
        """Black, and what decodes to nearly no length, is unknown."""
        colours = picture.colours
        check(colours is not None and picture.mode not in ("1", "L", "LA", "La"), f"{path}: is of mode "
              f"{picture.mode}; normals need three channels, xyz * 0.5 + 0.5")
        length = np.linalg.norm(colours / 127.5 - 1, axis=-1)
        known = (length > 0.05) & colours.any(-1)
        if picture.alpha is not None:
            known &= picture.alpha > 0
        return Raster(path, colours, known, 255)

    def array(self, raster, fit=as_it_is):
        values = raster.fitted(fit)
        return unit(values.astype(np.float32) / 127.5 - 1 if raster.top else values)

    def crop(self, array, size):
        return unit(super().crop(array, size))  # resizing shortens them

    def resize(self, array, shape):
        return array if array.shape[:2] == tuple(shape) else unit(super().resize(array, shape))

    def median(self, arrays):
        return unit(super().median(arrays))

    def mean(self, total, count, palette):
        return unit(super().mean(total, count, palette))

    def to_pixels(self, vectors, known=None, shown=PLAIN_SHOWN):
        return vectors.astype(np.float32).transpose(2, 0, 1)

    def from_pixels(self, pixels):
        return unit(pixels.transpose(1, 2, 0))

    def picture(self, vectors):
        return ((vectors * 0.5 + 0.5) * 255).round().clip(0, 255).astype(np.uint8)


class Registry(dict):
    def __missing__(self, name):
        raise InputError(f"modality {name!r} is not in the registry: {', '.join(self)}")


MODALITIES = Registry({  # weight in the loss, meaning
    "rgb": Colour(1.0, "sRGB, 8 bit"),
    "depth": Disparity(0.2, "relative disparity in [0, 1], near = 1; affine-invariant, no unit"),
    "normal": Vector(0.1, "unit vectors, +x left, +y up, +z towards the viewer; picture = xyz * 0.5 + 0.5"),
    "seg": Flat(0.1, "flat colours, one per class or segment"),
    "canny": Colour(0.1, "Canny edges of the RGB, white on black", derive=canny),
})
