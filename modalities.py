"""The registry of modalities, and all that is known of picture files.

A modality is a row of MODALITIES, of one of a few kinds. A kind says how its files are read and resized,
what the network is shown (pixels, float32 (3, H, W) in [-1, 1]), what the user is given (an array) and how
that looks (uint8 (H, W, 3)). Adding a modality of a kind that is there is one row.
"""
import pathlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy import ndimage

from distributed import InputError, check, reading

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 100_000_000  # a larger picture is refused before it is decoded
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def as_it_is(image, nearest=False):
    """The fit that keeps a file's size."""
    return image


# ------------------------------------------------------------------------------------------------
# Files.

def stem_of(path, base):
    """The name by which files of several modalities belong together: below base, without ending."""
    return path.relative_to(base).with_suffix("").as_posix()


def find_pictures(folder, arrays=False):
    """The pictures below a folder, with arrays also .npy files, sorted. InputError where there is none."""
    folder = pathlib.Path(folder)
    check(folder.is_dir(), f"{folder}: no such folder")
    endings = (*PICTURES, ".npy") if arrays else PICTURES
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in endings and path.is_file()]
    check(found, f"{folder}: no pictures in this folder")
    return found


def pictures_by_stem(folder):
    """{stem: path} of the pictures and arrays below a folder, sorted; an array counts before its picture.

    Raises InputError where a stem is there twice.
    """
    files = {}
    for path in find_pictures(folder, arrays=True):
        stem = stem_of(path, folder)
        other = files.get(stem, path)
        same_kind = other is not path and (other.suffix == ".npy") == (path.suffix == ".npy")
        check(not same_kind, f"{path}: the stem {stem} is there twice ({other.name}); keep one")
        if stem not in files or path.suffix == ".npy":
            files[stem] = path
    return files


def read_picture(path):
    """A picture file as PIL image in mode RGB or, for a single channel of more than 8 bits, F with values
    in [0, 1].

    Orientation tags are applied, transparency is laid over white, CMYK and palettes are converted.
    Raises InputError naming the file when it is missing, empty, cut short, too large or no picture.
    """
    with reading(path, "replace or remove it"), Image.open(path) as image:
        check(image.width * image.height <= MAX_PIXELS, f"{path}: {image.width}x{image.height} is over "
              f"{MAX_PIXELS / 1e6:.0f} megapixels; make it smaller")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16-bit files arrive as I;16 or I
            return _deep(path, image)
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _deep(path, image):
    """A channel of 16 bits over 65535, another over its own maximum: info["scale"] says which."""
    values = np.asarray(image, np.float32)
    check(np.isfinite(values).all(), f"{path}: holds values that are not finite; replace them")
    sixteen = image.mode.startswith("I") and values.max() <= 65535
    top = 65535 if sixteen else max(float(values.max()), 1e-8)
    picture = Image.fromarray(values.clip(0) / top)
    picture.info["scale"] = "16 bit" if sixteen else "own"
    return picture


def read_rgb(path):
    """A picture file as PIL image in mode RGB, whatever it holds."""
    image = read_picture(path)
    if image.mode == "F":
        image = Image.fromarray((np.asarray(image) * 255).round().astype(np.uint8))
    return image.convert("RGB")


def read_array(path):
    """An .npy array of numbers, not empty. Raises InputError for anything else."""
    with reading(path, "make it again, an .npy array of numbers"):
        array = np.load(path, allow_pickle=False)
        kind = array.dtype.kind if isinstance(array, np.ndarray) else type(array).__name__
        check(kind in "fiub" and array.size, f"{path}: holds {kind} {getattr(array, 'shape', '')}, "
              "an .npy array of numbers is needed")
        return array


# ------------------------------------------------------------------------------------------------
# Sizes. A fit brings a PIL image (RGB, or F a channel) to the wanted size; nearest: without new values.

def filter_of(image, nearest):
    """The filter that resizes a PIL image: bicubic, bilinear for floats."""
    if nearest:
        return Image.Resampling.NEAREST
    return Image.Resampling.BILINEAR if image.mode == "F" else Image.Resampling.BICUBIC


def centre_crop(image, size, nearest=False):
    """ADM's centre crop of a PIL image to size x size: halve by boxes, then resize, then crop."""
    halving = Image.Resampling.NEAREST if nearest else Image.Resampling.BOX
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), halving)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), filter_of(image, nearest))
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def enlarge(pixels, shape, nearest=False):
    """(3, h, w) -> float32 (3, H, W): bilinear, or the nearest pixel."""
    mode = dict(mode="nearest-exact") if nearest else dict(mode="bilinear", align_corners=False)
    return F.interpolate(torch.from_numpy(pixels)[None].float(), tuple(shape), **mode)[0].numpy()


# ------------------------------------------------------------------------------------------------
# Kinds.

def unit(vectors):
    """Vectors (..., 3) at length 1; zero stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)


class Raster(NamedTuple):
    """A file that was read once: one picture in mode RGB or F, or of an array an F image for each channel."""
    path: pathlib.Path
    images: list
    is_array: bool

    @property
    def size(self):
        """(width, height)"""
        return self.images[0].size

    def fitted(self, fit, nearest):
        """Its values through a fit: (H, W) of one channel, else (H, W, 3)."""
        arrays = [np.asarray(fit(image, nearest)) for image in self.images]
        return arrays[0] if len(arrays) == 1 else np.stack(arrays, -1)


class Kind:
    """What all kinds share; a modality's own are its weight in the loss, its meaning for meta.json, and
    derive.

    derive: from uint8 RGB (H, W, 3), where no files are needed; data does not include such a row by itself.
    """

    nearest = False  # resized without new values
    floats = False   # an array of floats is worth keeping beside the picture
    channels, limit = 3, 255  # of an array file, and of its values

    def __init__(self, loss_weight, meaning, derive=None):
        self.loss_weight, self.meaning, self.derive = loss_weight, meaning, derive

    def open(self, path):
        """A file of this kind -> Raster. Raises InputError for what is unreadable or of another shape."""
        path = pathlib.Path(path)
        if path.suffix != ".npy":
            return Raster(path, [read_picture(path)], False)
        array = read_array(path).astype(np.float32)
        wanted = "(H, W)" if self.channels == 1 else f"(H, W, {self.channels})"
        fits = array.ndim == 2 if self.channels == 1 else array.ndim == 3 and array.shape[2] == self.channels
        largest = np.abs(array).max()
        check(fits and np.isfinite(array).all() and largest <= self.limit,
              f"{path}: shape {array.shape}, largest value {largest:.4g}; "
              f"needs {wanted} of finite values up to {self.limit}")
        layers = np.atleast_3d(array).transpose(2, 0, 1)
        return Raster(path, [Image.fromarray(np.ascontiguousarray(layer)) for layer in layers], True)

    def array(self, raster, fit=as_it_is, space="disparity"):
        """A Raster through a fit -> the user's array. space: what depth files hold."""
        raise NotImplementedError

    def pixels(self, raster, fit=as_it_is, space="disparity"):
        """A Raster through a fit -> the network's pixels. Raises InputError for values out of [-1, 1]."""
        pixels = self.to_pixels(self.array(raster, fit, space))
        check(np.abs(pixels).max() <= 1.01, f"{raster.path}: becomes pixels from {pixels.min():.3g} to "
              f"{pixels.max():.3g}, they must lie in [-1, 1]; {self.meaning}")
        return pixels

    def crop(self, array, size):
        """The user's array (H, W[, 3]) -> ADM's centre crop of it."""
        if array.dtype == np.uint8:
            return np.asarray(centre_crop(Image.fromarray(array), size, self.nearest))
        layers = np.atleast_3d(array.astype(np.float32)).transpose(2, 0, 1)
        crops = [np.asarray(centre_crop(Image.fromarray(layer.copy()), size)) for layer in layers]
        return np.stack(crops, -1) if array.ndim == 3 else crops[0]

    def resize(self, array, shape):
        """The user's array (h, w[, 3]) -> (H, W[, 3]): bilinear, of flat colours the nearest."""
        if array.shape[:2] == tuple(shape):
            return array
        x = enlarge(np.atleast_3d(array).transpose(2, 0, 1), shape, self.nearest).transpose(1, 2, 0)
        return (x if array.ndim == 3 else x[..., 0]).astype(array.dtype)

    def median(self, arrays):
        """Of the user's arrays (K, H, W[, 3]), a pixel at a time."""
        return np.median(arrays, 0)


class Colour(Kind):
    """A picture: uint8 (H, W, 3)."""

    def array(self, raster, fit=as_it_is, space="disparity"):
        values = raster.fitted(fit, self.nearest)
        if values.ndim == 2:  # a 16-bit grey picture
            values = np.repeat((values * 255)[..., None], 3, 2)
        return values if values.dtype == np.uint8 else values.round().clip(0, 255).astype(np.uint8)

    def to_pixels(self, image):
        return image.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1

    def from_pixels(self, pixels):
        return ((pixels.transpose(1, 2, 0) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)

    def picture(self, image):
        return np.asarray(image)


class Flat(Colour):
    """Flat colours, one a class or segment: uint8 (H, W, 3)."""

    nearest = True


class Scalar(Kind):
    """One value in [0, 1]: float32 (H, W). Pictures of 8 and 16 bits, an .npy as it is."""

    floats = True
    channels, limit = 1, np.inf
    any_scale = False

    def open(self, path):
        raster = super().open(path)
        if raster.is_array:
            return raster
        image = raster.images[0]
        scaled = self.any_scale or image.info.get("scale") != "own"
        check(scaled, f"{path}: a picture of floats or of 32 bits has no fixed scale; "
              "give 8 or 16 bits, or .npy")
        return raster._replace(images=[image if image.mode == "F" else image.convert("L")])

    def array(self, raster, fit=as_it_is, space="disparity"):
        value = raster.fitted(fit, False).astype(np.float32)
        return value / 255 if raster.images[0].mode == "L" else value

    def to_pixels(self, value):
        return np.repeat((value * 2 - 1)[None].astype(np.float32), 3, 0)

    def from_pixels(self, pixels):
        return (pixels.mean(0) + 1) / 2

    def picture(self, value):
        return np.repeat((value.clip(0, 1) * 255).round().astype(np.uint8)[..., None], 3, 2)


class Disparity(Scalar):
    """Relative disparity, near is bright: files of any scale; the network's is stretched to its range."""

    any_scale = True

    def array(self, raster, fit=as_it_is, space="disparity"):
        value = raster.fitted(fit, False).astype(np.float32)
        if space == "depth":
            return np.where(value > 0, 1 / np.where(value > 0, value, 1), 0)
        return value

    def to_pixels(self, disparity):
        low, high = disparity.min(), disparity.max()
        scaled = (disparity - low) / max(high - low, 1e-8) * 2 - 1
        return np.repeat(scaled[None].astype(np.float32), 3, 0)


class Vector(Kind):
    """Unit vectors: float32 (H, W, 3) in [-1, 1]; in pictures xyz * 0.5 + 0.5."""

    floats = True
    limit = 1.01

    def array(self, raster, fit=as_it_is, space="disparity"):
        if raster.is_array:
            return unit(raster.fitted(fit, False))
        return unit(Colour.array(self, raster, fit).astype(np.float32) / 127.5 - 1)

    def crop(self, array, size):
        return unit(super().crop(array, size))  # resizing shortens them

    def resize(self, array, shape):
        return array if array.shape[:2] == tuple(shape) else unit(super().resize(array, shape))

    def median(self, arrays):
        return unit(super().median(arrays))

    def to_pixels(self, vectors):
        return vectors.astype(np.float32).transpose(2, 0, 1)

    def from_pixels(self, pixels):
        return unit(pixels.transpose(1, 2, 0))

    def picture(self, vectors):
        return ((vectors * 0.5 + 0.5) * 255).round().clip(0, 255).astype(np.uint8)


def canny(image, low=0.1, high=0.2, sigma=1.0):
    """Canny edges of uint8 (H, W, 3) -> uint8 (H, W, 3), white on black.

    Gaussian, Sobel gradient of the brightness in [0, 1], non-maximum suppression along it, hysteresis
    between the thresholds.
    """
    grey = ndimage.gaussian_filter(image.astype(np.float64).mean(2) / 255, sigma)
    dy, dx = ndimage.sobel(grey, 0), ndimage.sobel(grey, 1)
    strength = np.hypot(dx, dy)
    direction = np.round(np.arctan2(dy, dx) / (np.pi / 4)).astype(int) % 4
    padded = np.pad(strength, 1)
    H, W = strength.shape
    peak = np.zeros((H, W), bool)
    for k, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):  # along the gradient; ties go ahead
        ahead = padded[1 + y:H + 1 + y, 1 + x:W + 1 + x]
        behind = padded[1 - y:H + 1 - y, 1 - x:W + 1 - x]
        peak |= (direction == k) & (strength >= ahead) & (strength > behind)
    parts, _ = ndimage.label(peak & (strength > low), np.ones((3, 3)))
    strong = np.isin(parts, np.unique(parts[peak & (strength > high)])) & (parts > 0)
    return np.repeat((strong * np.uint8(255))[..., None], 3, 2)


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


# ------------------------------------------------------------------------------------------------
# Segments.

def nearest_colour(image, colours):
    """uint8 (H, W, 3) -> index (H, W) of the nearest of colours (K, 3)."""
    image = image.astype(np.int32)
    distance = [((image - colour.astype(np.int32)) ** 2).sum(-1) for colour in np.asarray(colours)]
    return np.argmin(distance, 0)


def segments(image, least=0.0005, small=32):
    """Flat colours uint8 (H, W, 3), or labels (H, W) -> segment index (H, W).

    At most 256 distinct colours are taken as they are. Else (a decoded picture): median 5x5, its principal
    colours, each pixel takes the nearest; components under `small` pixels take their neighbours'.
    """
    packed = image.astype(np.int64) if image.ndim == 2 else image.astype(np.int64) @ [65536, 256, 1]
    distinct, index = np.unique(packed, return_inverse=True)
    if len(distinct) <= 256 or image.ndim == 2:
        return index.reshape(image.shape[:2])
    smooth = ndimage.median_filter(image, (5, 5, 1)).astype(np.float32)
    index = nearest_colour(smooth, _principal_colours(smooth.reshape(-1, 3), least))
    debris = np.zeros(index.shape, bool)
    for k in range(index.max() + 1):
        parts, _ = ndimage.label(index == k)
        debris |= (np.bincount(parts.ravel()) < small)[parts] & (parts > 0)
    if debris.any() and not debris.all():
        nearest = ndimage.distance_transform_edt(debris, return_distances=False, return_indices=True)
        index = index[tuple(nearest)]
    return np.unique(index, return_inverse=True)[1].reshape(index.shape)


def _principal_colours(colours, least, radius=24):
    """colours (P, 3) float32 -> centres (K, 3).

    Again and again the fullest bin of 5 bits a channel, refined to the mean of the colours within the
    radius, until it holds less than `least` of the pixels.
    """
    count, centres = len(colours), []
    while len(colours):
        bins = (colours.astype(np.int64) >> 3) @ [1024, 32, 1]
        sizes = np.bincount(bins)
        if sizes.max() < least * count:
            break
        fullest = bins == sizes.argmax()
        centre = colours[fullest].mean(0)
        for _ in range(2):
            near = ((colours - centre) ** 2).sum(1) <= radius ** 2
            centre = colours[near].mean(0)
        near = ((colours - centre) ** 2).sum(1) <= radius ** 2
        centres.append(centre)
        colours = colours[~(near | fullest)]
    return np.array(centres)


# ------------------------------------------------------------------------------------------------

def draw_grid(rows, columns, cell=128):
    """rows: lists of uint8 (H, W, 3) or None; columns: their labels, of one line or more -> PIL image."""
    font = ImageFont.load_default(13)
    gap, lines = 4, max(label.count("\n") + 1 for label in columns)
    pitch, top = cell + gap, 8 + 15 * lines
    sheet = Image.new("RGB", (len(columns) * pitch + gap, top + len(rows) * pitch), "white")
    pen = ImageDraw.Draw(sheet)
    for j, label in enumerate(columns):
        middle = gap + j * pitch + cell / 2
        pen.text((middle, top / 2), label, fill="black", font=font, anchor="mm", align="center")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            if picture is None:
                continue
            image = Image.fromarray(picture)
            scale = cell / max(image.size)
            small = (round(image.width * scale), round(image.height * scale))
            image = image.resize(small, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
            left = gap + j * pitch + (cell - image.width) // 2
            sheet.paste(image, (left, top + i * pitch + (cell - image.height) // 2))
    return sheet


def draw_samples(samples, modalities, title, cell=96):
    """A labelled grid of pixels (n, M, 3, H, W), each modality as it looks."""
    rows = []
    for sample in samples:
        rows.append([MODALITIES[m].picture(MODALITIES[m].from_pixels(p)) for m, p in zip(modalities, sample)])
    return draw_grid(rows, [f"{m}\n({title})" for m in modalities], cell)


def draw_sheet(grids):
    """Grids of one size on one sheet, two in a line."""
    width, height = grids[0].size
    sheet = Image.new("RGB", (width * 2, height * ((len(grids) + 1) // 2)), "white")
    for i, grid in enumerate(grids):
        sheet.paste(grid, (i % 2 * width, i // 2 * height))
    return sheet
