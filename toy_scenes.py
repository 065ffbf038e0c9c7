"""Stage 0, the embedded data set: procedural scenes with exact depth, normals, segmentation and class.

    python toy_scenes.py --num 8 --out scenes            # a picture tree as prep_latents.py --data reads it

A scene is a pure function of its integer seed. Seeds below 2**31 are for training, those from
2**31 (HELD_OUT) on are for evaluation. Everything is ray-cast analytically, so that every map is exact:

    world    x right, y up, z towards the camera at azimuth 0; the floor is y = 0
    depth    distance along the optical axis, in scene units (the main object is about 1.5 across)
    normal   camera-facing unit vectors, +x left, +y up, +z towards the viewer (StableNormal / DSINE axes)
    seg      index into SEGMENTS
    label    index into CLASSES: the main object's type and family of hue
"""
import colorsys
import io
import operator
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from distributed import check, command_parser, run, whole_file
from locks import only_writer
from modalities import MODALITIES, check_told, write_facts

HELD_OUT = 2 ** 31
SEGMENTS = ("floor", "wall", "sphere", "box", "cylinder", "cone")
PALETTE = np.array([[70, 70, 70], [200, 200, 200], [235, 50, 50], [45, 190, 60], [50, 80, 235],
                    [240, 200, 30]], np.uint8)
TYPES = SEGMENTS[2:]
HUES = {"red": (-0.03, 0.08), "green": (0.27, 0.42), "blue": (0.56, 0.70)}
CLASSES = tuple(f"{hue} {shape}" for shape in TYPES for hue in HUES)


class Scene(NamedTuple):
    rgb: np.ndarray     # (S, S, 3) uint8
    depth: np.ndarray   # (S, S) float32, scene units
    normal: np.ndarray  # (S, S, 3) float32, unit length
    seg: np.ndarray     # (S, S) uint8, index into SEGMENTS
    label: int          # index into CLASSES
    focal: float        # in half-widths of the image: u = focal * x / z lies in [-1, 1]


class Solid(NamedTuple):
    """An object that stands on the floor."""
    shape: str            # one of TYPES
    size: float
    position: np.ndarray  # (x, z)
    turn: float           # about the vertical
    colour: np.ndarray    # (3,) in [0, 1]


# ------------------------------------------------------------------------------------------------
# Ray casting. Rays o + t * d with d of unit component along the optical axis, so that t is the depth.
# Each function returns t (P,), inf where there is no hit, and normals (P, 3), for o (3,), d (P, 3).

def _nearest(ts, normals):
    """The closest of several candidate hits: ts (K, P), normals (K, P, 3)."""
    k = np.argmin(ts, axis=0)
    return np.take_along_axis(ts, k[None], 0)[0], np.take_along_axis(normals, k[None, :, None], 0)[0]


def _plane(o, d, normal, offset):
    """The plane normal . x = offset, seen from the side its normal points to."""
    facing = d @ normal
    front = facing < -1e-9
    t = np.where(front, (offset - o @ normal) / np.where(front, facing, -1.0), np.inf)
    return np.where(t > 0, t, np.inf), np.broadcast_to(normal, d.shape)


def _at(o, t, d):
    """The points at t (..., P) of the rays, o where there is no hit: (..., P, 3)."""
    return o + np.where(np.isfinite(t), t, 0.0)[..., None] * d


def _disk(o, d, height, radius, up):
    """A horizontal disk around the y axis; up is +1 or -1."""
    t, normal = _plane(o, d, np.array([0.0, up, 0.0]), up * height)
    p = _at(o, t, d)
    return np.where(p[:, 0] ** 2 + p[:, 2] ** 2 <= radius ** 2, t, np.inf), normal


def _quadric_roots(a, b, c):
    """The near and the far root of a t^2 + 2 b t + c, a not 0: (2, P), inf where there are none."""
    disc = b * b - a * c
    root = np.sqrt(np.maximum(disc, 0.0))
    one, other = (-b - root) / a, (-b + root) / a
    return np.where(disc > 0, (np.minimum(one, other), np.maximum(one, other)), np.inf)


def _sphere(o, d, size):
    q = o - np.array([0.0, size, 0.0])
    t, _ = _quadric_roots((d * d).sum(1), d @ q, q @ q - size ** 2)
    t = np.where(t > 0, t, np.inf)
    return t, _at(q, t, d) / size


def _box(o, d, size):
    half = size * np.array([0.8, 0.75, 0.8])
    q = o - np.array([0.0, half[1], 0.0])
    inverse = 1.0 / np.where(np.abs(d) < 1e-9, 1e-9, d)
    one, other = (-half - q) * inverse, (half - q) * inverse  # (P, 3), the faces of each axis
    near, far = np.minimum(one, other), np.maximum(one, other)
    t, axis = near.max(1), near.argmax(1)
    normal = np.zeros_like(d)
    rows = np.arange(len(d))
    normal[rows, axis] = -np.sign(d[rows, axis])
    return np.where((t < far.min(1)) & (t > 0), t, np.inf), normal


def _cylinder(o, d, size):
    radius, height = 0.7 * size, 1.7 * size
    a = d[:, 0] ** 2 + d[:, 2] ** 2 + 1e-12
    b = d[:, 0] * o[0] + d[:, 2] * o[2]
    t, _ = _quadric_roots(a, b, o[0] ** 2 + o[2] ** 2 - radius ** 2)
    p = _at(o, t, d)
    t = np.where((t > 0) & (p[:, 1] >= 0) & (p[:, 1] <= height), t, np.inf)
    side = p * np.array([1.0, 0.0, 1.0]) / radius
    top, up = _disk(o, d, height, radius, 1)
    return _nearest(np.stack([t, top]), np.stack([side, up]))


def _cone(o, d, size):
    radius, height = size, 1.8 * size
    k = (radius / height) ** 2
    q = o - np.array([0.0, height, 0.0])  # the apex at the origin
    w = np.array([1.0, -k, 1.0])
    a = (d * d) @ w
    ts = _quadric_roots(np.where(np.abs(a) < 1e-9, 1e-9, a), (d * q) @ w, (q * q) @ w)
    p = _at(q, ts, d)  # (2, P, 3): the near root may lie on the mirrored cone
    ts = np.where((ts > 0) & (p[..., 1] <= 0) & (p[..., 1] >= -height), ts, np.inf)
    normals = p * w
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True) + 1e-12
    return _nearest(ts, normals)


SHAPES = {"sphere": _sphere, "box": _box, "cylinder": _cylinder, "cone": _cone}


def _cast(solid, o, d):
    """A Solid."""
    c, s = np.cos(solid.turn), np.sin(solid.turn)
    rotation = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])  # world to object
    foot = np.array([solid.position[0], 0.0, solid.position[1]])
    t, normal = SHAPES[solid.shape](rotation @ (o - foot), d @ rotation.T, solid.size)
    return t, normal @ rotation


# ------------------------------------------------------------------------------------------------
# A scene. The order of the random draws is what a seed means.

def _rays(size, focal, rotation):
    """Directions (S*S, 3) of the pixel centres, row by row; rotation (3, 3) has rows right, up, forward."""
    u = (np.arange(size) * 2 + 1) / size - 1
    grid = np.stack(np.broadcast_arrays(u[None, :] / focal, -u[:, None] / focal, 1.0), -1)
    return grid.reshape(-1, 3) @ rotation


def _camera(rng, height):
    """A camera that orbits the main object: target (3,), direction back (3,), rotation (3, 3), azimuth."""
    azimuth, elevation = rng.uniform(-0.8, 0.8), rng.uniform(0.1, 0.8)
    shift = rng.uniform([-0.25, -0.2, -0.25], [0.25, 0.2, 0.25])
    target = np.array([0.0, height / 2, 0.0]) + shift
    away = np.array([np.sin(azimuth) * np.cos(elevation), np.sin(elevation),
                     np.cos(azimuth) * np.cos(elevation)])
    right = np.cross(-away, [0.0, 1.0, 0.0])
    right /= np.linalg.norm(right)
    up = np.cross(right, -away)
    roll = rng.normal(0, 0.05)
    c, s = np.cos(roll), np.sin(roll)
    return target, away, np.stack([c * right + s * up, c * up - s * right, -away]), azimuth


def _colour(rng, hue, saturation, value):
    """A colour whose hue, saturation and value are drawn from these ranges."""
    drawn = [rng.uniform(*span) for span in (hue, saturation, value)]
    return np.array(colorsys.hsv_to_rgb(drawn[0] % 1, *drawn[1:]))


def _bystander(rng, main, azimuth):
    """A small Solid around the main one, not before it."""
    size = rng.uniform(0.25, 0.45)
    side = azimuth + rng.choice([-1, 1]) * rng.uniform(0.9, 2.6)
    reach = main.size + size + rng.uniform(0.05, 0.5)
    shape, turn = str(rng.choice(TYPES)), rng.uniform(0, 2 * np.pi)
    colour = _colour(rng, (0, 1), (0.4, 0.9), (0.6, 0.95))
    return Solid(shape, size, reach * np.array([np.sin(side), np.cos(side)]), turn, colour)


def _walls(rng, azimuth):
    """[(direction, distance)]: one or two at random angles and a far one that closes the view."""
    first = azimuth + np.pi + rng.uniform(-0.9, 0.9)
    walls = [(first, rng.uniform(1.2, 3.5))]
    if rng.uniform() < 0.5:
        walls.append((first + rng.choice([-1, 1]) * np.pi / 2, rng.uniform(1.2, 3.5)))
    walls.append((azimuth + np.pi, 6.0))
    return [wall for wall in walls if np.cos(wall[0] - azimuth) < 0.2]  # one beside the camera would hide all


def render(seed, size=64):
    """The scene of an integer seed at size x size pixels -> Scene. The same seed gives the same scene.

    The main object stands at the origin and fills about 15 to 40 % of the frame; up to two smaller
    ones stand around it, one or two walls at random angles behind it, and a far wall closes the view.
    """
    rng = np.random.default_rng(seed)
    label = int(rng.integers(len(CLASSES)))
    hue, shape = CLASSES[label].split()
    main = Solid(shape, rng.uniform(0.65, 1.05), np.zeros(2), rng.uniform(0, 2 * np.pi), None)
    target, away, rotation, azimuth = _camera(rng, 1.6 * main.size)
    focal = rng.uniform(1.0, 2.0)
    # Its share of the frame falls with distance^2: cast it alone, coarsely, from afar, and step closer.
    share = np.isfinite(_cast(main, target + 5.0 * away, _rays(24, focal, rotation))[0]).mean()
    distance = np.clip(5.0 * np.sqrt(share / rng.uniform(0.15, 0.36)), 2.0 * main.size, 5.0)
    o, d = target + distance * away, _rays(size, focal, rotation)

    main = main._replace(colour=_colour(rng, HUES[hue], (0.6, 0.9), (0.7, 0.95)))
    solids = [main] + [_bystander(rng, main, azimuth) for _ in range(rng.integers(3))]
    walls = _walls(rng, azimuth)
    ground = rng.uniform(0.35, 0.8, 3) * 0.5 + rng.uniform(0.2, 0.4)
    paint = rng.uniform(0.4, 0.9, 3) * 0.5 + rng.uniform(0.2, 0.45)
    albedo = [ground, *(paint * f for f in rng.uniform(0.9, 1.1, len(walls))), *(s.colour for s in solids)]
    segment = [0] + [1] * len(walls) + [SEGMENTS.index(solid.shape) for solid in solids]
    hits = [_plane(o, d, np.array([0.0, 1.0, 0.0]), 0.0)]
    hits += [_plane(o, d, -np.array([np.sin(a), 0.0, np.cos(a)]), -far) for a, far in walls]
    hits += [_cast(solid, o, d) for solid in solids]

    ts, normals = (np.stack(part) for part in zip(*hits))
    which = np.argmin(ts, axis=0)
    t, normal = _nearest(ts, normals)
    rgb = _shade(rng, o + t[:, None] * d, normal, which, np.array(albedo)[which], solids, rotation)
    camera_normal = normal @ rotation.T * np.array([-1.0, 1.0, -1.0])  # right, up, forward -> left, up, back
    return Scene(rgb=(rgb.reshape(size, size, 3) * 255).round().astype(np.uint8),
                 depth=t.reshape(size, size).astype(np.float32),
                 normal=camera_normal.reshape(size, size, 3).astype(np.float32),
                 seg=np.array(segment, np.uint8)[which].reshape(size, size), label=label, focal=focal)


def _shade(rng, points, normal, which, albedo, solids, rotation):
    """Lambert shading, one light, a broad pattern on the floor, soft contact shadows: (P, 3) in [0, 1]."""
    turn, contrast, cell = rng.uniform(0, np.pi), rng.uniform(0.0, 0.12), rng.uniform(1.6, 2.4)
    x, z = points[:, 0], points[:, 2]
    a = (x * np.cos(turn) + z * np.sin(turn)) * np.pi / cell
    b = (z * np.cos(turn) - x * np.sin(turn)) * np.pi / cell
    floor = which == 0
    gain = np.where(floor, 1 + contrast * np.sin(a) * np.sin(b), 1.0)
    for solid in solids:
        distance2 = ((points[:, [0, 2]] - solid.position) ** 2).sum(1)
        gain *= np.where(floor, 1 - 0.45 * np.exp(-distance2 / (1.1 * solid.size) ** 2), 1.0)
    light = rng.uniform([-0.8, 0.5, -1.0], [0.8, 1.0, -0.3]) @ rotation
    light /= np.linalg.norm(light)
    ambient = rng.uniform(0.4, 0.55)
    gain *= ambient + (1.05 - ambient) * np.maximum(normal @ light, 0.0)
    return np.clip(albedo * gain[:, None], 0, 1)


def _disparity(scene):
    return 1 / scene.depth


def _colours(scene):
    return PALETTE[scene.seg]


MAPS = {  # what data has of a Scene, as the registry's arrays; scored is the Scene's own field of that name
    "rgb": operator.attrgetter("rgb"),
    "depth": _disparity,
    "normal": operator.attrgetter("normal"),
    "seg": _colours,
}
assert MAPS.keys() <= set(Scene._fields), "what data has of a Scene is scored against a field of its name"


def maps(scene):
    """{modality: array}, as files of the scene would hold them."""
    return {m: of(scene) for m, of in MAPS.items()}


def teacher(scene, grid):
    """Alignment targets for REPA without DINOv2: float32 (grid*grid, 768).

    Patch means of the one-hot segmentation and of the normals through one fixed random matrix.
    """
    size = scene.seg.shape[0]
    maps = np.concatenate([np.eye(len(SEGMENTS), dtype=np.float32)[scene.seg], scene.normal], -1)
    patch = size // grid
    means = maps.reshape(grid, patch, grid, patch, -1).mean((1, 3)).reshape(grid * grid, -1)
    matrix = np.random.default_rng(0).standard_normal((means.shape[1], 768)).astype(np.float32)
    return means @ matrix


# ------------------------------------------------------------------------------------------------
# The class of a picture.

def main_object(segments):
    """The type (index into TYPES) of the largest object in segment indices (H, W), -1 for none."""
    areas = [(segments == SEGMENTS.index(shape)).sum() for shape in TYPES]
    return int(np.argmax(areas)) if max(areas) else -1


def hue_of(image, mask):
    """The nearest hue (index into HUES) of the median colour under a mask (H, W), -1 for none."""
    if not mask.any():
        return -1
    hue = colorsys.rgb_to_hsv(*np.median(image[mask], 0) / 255)[0]
    distance = [abs((hue - sum(span) / 2 + 0.5) % 1 - 0.5) for span in HUES.values()]
    return int(np.argmin(distance))


def class_of(image, segments):
    """The class (index into CLASSES) that a picture and its segment indices show, -1 for none."""
    shape = main_object(segments)
    if shape < 0:
        return -1
    return shape * len(HUES) + hue_of(image, segments == SEGMENTS.index(TYPES[shape]))


# ------------------------------------------------------------------------------------------------

def write_scene(out, seed, size):
    """OUT/<modality>/<class>/<seed>.png of a scene. InputError where another picture is there already."""
    scene = render(seed, size)
    for name, array in maps(scene).items():
        row, data = MODALITIES[name], io.BytesIO()
        Image.fromarray(row.picture(row.from_pixels(row.to_pixels(array)))).save(data, "png")
        path = out / name / CLASSES[scene.label].replace(" ", "_") / f"{seed}.png"
        same = path.exists() and path.read_bytes() == data.getvalue()
        check(same or not path.exists(), f"{path}: another picture is there; use another --out")
        if not same:
            with whole_file(path) as file:
                file.write(data.getvalue())


def main():
    """Write scenes as pictures: <out>/{rgb,depth,normal,seg}/<class>/<seed>, and tree.json."""
    parser = command_parser(__doc__)
    parser.add_argument("--num", type=int, default=8, help="how many scenes")
    parser.add_argument("--start", type=int, default=HELD_OUT, help="first seed")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("scenes"))
    args = parser.parse_args()
    check(1 <= args.num <= 10 ** 7 and 8 <= args.size <= 4096 and args.start >= 0,
          f"--num {args.num} --start {args.start} --size {args.size}: "
          "1 to ten million scenes from seed 0 on, of 8 to 4096 pixels")
    with only_writer(args.out):
        check_told(args.out, MAPS)
        write_facts(args.out, depth_space="disparity", seg_mode="semantic", palette=PALETTE.tolist())
        for seed in range(args.start, args.start + args.num):
            write_scene(args.out, seed, args.size)
    print(f"{args.num} scenes in {args.out}")


if __name__ == "__main__":
    run(main)
