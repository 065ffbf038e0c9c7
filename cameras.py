"""A perspective camera whose axis meets the centre of its picture: rays, depth, the normals of what it sees.

Focal lengths are in pixels; normals as everywhere: +x left, +y up, +z towards the viewer.
"""
import numpy as np

from images import unit


def rays(shape, focal):
    """Offsets of the pixels' centres from the picture's centre, u rightwards (W,) and v downwards (H, 1), in
    focal lengths (pixels).
    """
    H, W = shape
    return (np.arange(W) - (W - 1) / 2) / focal, ((np.arange(H) - (H - 1) / 2) / focal)[:, None]


def along_axis(distance, focal):
    """Distance from the camera (H, W) -> depth along its axis; focal in pixels."""
    u, v = rays(distance.shape, focal)
    return distance / np.sqrt(u ** 2 + v ** 2 + 1)


def facing(normal, focal):
    """Vectors (H, W, 3), +x left, +y up, +z back -> those that point along their pixel's ray turned round."""
    u, v = rays(normal.shape[:2], focal)
    away = -u * normal[..., 0] - v * normal[..., 1] - normal[..., 2] > 0
    return np.where(away[..., None], -normal, normal)


def _slope(w, axis):
    """The smaller of the two one-sided differences of w (H, W) along an axis, NaN where there is none."""
    step = np.diff(w, axis=axis)
    behind = np.pad(step, [(k == axis, 0) for k in range(2)], constant_values=np.nan)
    ahead = np.pad(step, [(0, k == axis) for k in range(2)], constant_values=np.nan)
    return np.where(np.isnan(ahead) | (np.abs(behind) < np.abs(ahead)), behind, ahead)


def normals_of(depth, known, focal, window=5, threshold=0.02):
    """Normals of the surfaces that depth shows: float32 (H, W, 3), +x left, +y up, +z towards the viewer,
    zero where unknown.

    depth (H, W) of any unit, along the axis of a camera of this focal length (pixels) whose axis meets the
    centre; known (H, W) bool. A pixel's plane is the least-squares one of its window x window neighbours. A
    neighbour counts where its inverse depth is what the pixel's own slope predicts, to within the threshold,
    relative. Unknown where one of the four next to it is known and does not count (a jump), where fewer than
    a third of the window counts, and where they lie on a line.
    """
    # A plane is linear in inverse depth over the picture: 1/z = a u + b v + c has the normal (a f, b f, c).
    H, W = depth.shape
    r = window // 2
    w = np.where(known, 1 / np.where(known, depth, 1), np.nan).astype(np.float32)
    padded = np.pad(w, r, constant_values=np.nan)
    slope_u, slope_v = (np.nan_to_num(_slope(w, axis) / w) for axis in (1, 0))
    sums = np.zeros((9, H, W), np.float32)  # of 1, du, dv, du du, du dv, dv dv, e, e du, e dv
    jump = np.zeros((H, W), bool)
    for dv in range(-r, r + 1):
        for du in range(-r, r + 1):
            e = padded[r + dv:r + dv + H, r + du:r + du + W] / w - 1  # relative to the pixel's own
            counts = np.abs(e - slope_u * du - slope_v * dv) < threshold
            if abs(du) + abs(dv) == 1:
                jump |= ~counts & ~np.isnan(e)
            e = np.where(counts, e, 0)
            for k, term in enumerate((1, du, dv, du * du, du * dv, dv * dv)):
                sums[k] += counts * np.float32(term)
            for k, term in enumerate((1, du, dv), 6):
                sums[k] += e * np.float32(term)
    count = sums[0]
    mu, mv, uu, uv, vv, me, eu, ev = sums[1:] / np.maximum(count, 1)
    uu, uv, vv, eu, ev = uu - mu * mu, uv - mu * mv, vv - mv * mv, eu - me * mu, ev - me * mv
    spread = uu * vv - uv * uv
    there = known & ~jump & (count * 3 >= window ** 2) & (spread > 0.05)
    spread = np.where(there, spread, 1)
    a, b = (vv * eu - uv * ev) / spread, (uu * ev - uv * eu) / spread
    u, v = rays(depth.shape, focal)
    c = 1 + me - a * (u * focal + mu) - b * (v * focal + mv)
    normal = unit(np.stack([a * focal, b * focal, c], -1))
    return np.where(there[..., None], normal, 0).astype(np.float32)


def window_of(width):
    """The window of normals_of for a picture's width: 5 pixels, 9 at 640, where a sensor's steps of depth are
    as wide.
    """
    return max(5, width // 160 * 2 + 1)
