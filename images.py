"""What is done to any picture: sizes, unknown pixels, edges, segments, the labelled grid.

Arrays and PIL images in, arrays and PIL images out: nothing here knows of files or modalities.
"""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage


# ------------------------------------------------------------------------------------------------
# Sizes. A fit brings a PIL image (RGB, or L or F a channel) to the wanted size; nearest: without new values.

def as_it_is(image, nearest=False):
    """The fit that keeps a file's size."""
    return image


def filter_of(image, nearest):
    """The filter that resizes a PIL image: bicubic, bilinear for floats."""
    if nearest:
        return Image.Resampling.NEAREST
    return Image.Resampling.BILINEAR if image.mode == "F" else Image.Resampling.BICUBIC


def _shortened(image, most=64):
    """The middle of a very thin picture: what is cropped away in the end is not enlarged before."""
    width, height = image.size
    longest = most * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def centre_crop(image, size, nearest=False):
    """ADM's centre crop of a PIL image to size x size: halve by boxes, then resize, then crop."""
    image = _shortened(image)
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        if not nearest:  # whose halves would lie half a pixel off, more at each turn
            image = image.resize((width, height), Image.Resampling.BOX)
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    image = image.resize((width, height), filter_of(image, nearest))
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def enlarge(pixels, shape, nearest=False):
    """(3, h, w) -> float32 (3, H, W): bilinear, or the nearest pixel."""
    mode = dict(mode="nearest-exact") if nearest else dict(mode="bilinear", align_corners=False)
    return F.interpolate(torch.from_numpy(pixels)[None].float(), tuple(shape), **mode)[0].numpy()


# ------------------------------------------------------------------------------------------------
# Unknown pixels, vectors, edges.

def fill_unknown(values, known):
    """Values (H, W[, 3]) with the nearest known ones where known (H, W) is False; zeros if none is known."""
    if known.all():
        return values
    if not known.any():
        return np.zeros_like(values)
    near = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    return values[tuple(near)]


def unit(vectors):
    """Vectors (..., 3) at length 1; zero stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)


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


# ------------------------------------------------------------------------------------------------
# Colours of labels, and segments.

def label_colour(labels):
    """Labels (...,) from 0 to 2^24 -> uint8 (..., 3): the colour map of Pascal VOC, all different."""
    labels = np.asarray(labels, np.int64)
    channels = []
    for channel in range(3):  # its bits are every third one of the label's, the lowest becomes the highest
        bits = sum((labels >> (3 * k + channel) & 1) << (7 - k) for k in range(8))
        channels.append(bits)
    return np.stack(channels, -1).astype(np.uint8)


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
    if not debris.all():
        index = fill_unknown(index, ~debris)
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

def draw_grid(rows, cell=128):
    """rows {label, of one line or more: uint8 (H, W, 3)}, each with some of the columns -> PIL image."""
    columns = list(dict.fromkeys(label for row in rows for label in row))
    font = ImageFont.load_default(13)
    gap, lines = 4, max(label.count("\n") + 1 for label in columns)
    pitch, top = cell + gap, 8 + 15 * lines
    sheet = Image.new("RGB", (len(columns) * pitch + gap, top + len(rows) * pitch), "white")
    pen = ImageDraw.Draw(sheet)
    for j, label in enumerate(columns):
        middle = gap + j * pitch + cell / 2
        pen.text((middle, top / 2), label, fill="black", font=font, anchor="mm", align="center")
    for i, row in enumerate(rows):
        for label, picture in row.items():
            image, j = Image.fromarray(picture), columns.index(label)
            scale = cell / max(image.size)
            small = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(small, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
            left = gap + j * pitch + (cell - image.width) // 2
            sheet.paste(image, (left, top + i * pitch + (cell - image.height) // 2))
    return sheet
