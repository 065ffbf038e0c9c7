"""From normals to a surface: bilateral normal integration (Cao et al. 2022) and a PLY file (MMGen, Fig. 6).

    python sample.py --task condition --given depth --image depth.png --mesh    # the whole chain
    python mesh.py --normal samples/normal/0.npy --rgb samples/rgb/0.png --out 0.ply

Normals as everywhere here: +x left, +y up, +z towards the viewer. Vertices: +x right, +y up, the camera
looks along -z.
"""
import pathlib

import numpy as np
from PIL import Image, ImageDraw
from scipy import sparse
from scipy.ndimage import binary_erosion, label
from scipy.sparse.linalg import cg

from distributed import check, check_apart, check_ranges, command_parser, run, whole_file
from images import fill_unknown
from modalities import MODALITIES, check_turned, read_mask

MADE = "comment by mesh.py"  # a line of the header: the PNG beside such a PLY shows it
FOCALS = (0.01, 1000)  # of a camera, in half-widths: 179 degrees to a tenth


def integrate(normal, mask, focal=None, sharpness=2.0, iterations=100, tolerance=1e-5):
    """Depth of a masked normal map: (H, W) float64, NaN outside of the mask.

    normal (H, W, 3), mask (H, W) bool; focal in half-widths of the image for a perspective camera whose axis
    meets the centre, None for an orthographic one. Each of the two one-sided derivatives along an axis shall
    fit the normal; their weights, a sigmoid of `sharpness` times the difference of their squares, say on
    which side of a pixel the surface goes on, so that depth may jump at a silhouette. Iteratively reweighted
    least squares, solved by conjugate gradients. Depth grows away from the camera: in pixels and up to a
    constant (orthographic), or up to a factor, with mean 1 (perspective).
    Raises InputError for an empty mask.
    """
    count = int(mask.sum())
    check(count, "the mask of the object is empty; pick another segment")
    right, down, front = (-normal[mask].astype(np.float64)).T  # camera axes: x right, y down, z forward
    if focal is not None:  # log depth obeys the same equations with another third component
        H, W = mask.shape
        v, u = np.nonzero(mask)
        front = right * (u - (W - 1) / 2) + down * (v - (H - 1) / 2) + focal * W / 2 * front
    front = np.where(np.abs(front) < 1e-3, -1e-3, front)  # a grazing ray has no finite slope
    ahead_u, behind_u, ahead_v, behind_v = _differences(mask, front)
    A = sparse.vstack([ahead_u, -behind_u, ahead_v, -behind_v]).tocsr()
    known = np.diff(A.indptr) > 0  # rows whose neighbour is inside of the mask
    b = np.concatenate([-right, -right, -down, -down])
    weight, z, energy = np.full(4 * count, 0.5), np.zeros(count), None
    for _ in range(iterations):
        system = A.T @ sparse.diags(weight) @ A
        preconditioner = sparse.diags(1 / np.maximum(system.diagonal(), 1e-9))
        z, _ = cg(system, A.T @ (weight * known * b), x0=z, rtol=1e-4, maxiter=2000, M=preconditioner)
        slope = ((A @ z) ** 2).reshape(4, count)
        u = _sigmoid(sharpness * (slope[1] - slope[0]))
        v = _sigmoid(sharpness * (slope[3] - slope[2]))
        weight = np.concatenate([u, 1 - u, v, 1 - v])
        last, energy = energy, float((weight * known * (A @ z - b) ** 2).sum())
        if last is not None and abs(last - energy) <= tolerance * max(last, 1e-12):
            break
    depth = np.full(mask.shape, np.nan)
    depth[mask] = np.exp(z - z.mean()) if focal is not None else z
    return depth


def _sigmoid(x):
    return 1 / (1 + np.exp(np.clip(-x, -50, 50)))


def _differences(mask, front):
    """Four sparse matrices (P, P): z of the masked pixels -> front * (z of a neighbour - z), the neighbours
    right, left, below and above; a row is empty where the neighbour is outside of the mask.
    """
    H, W = mask.shape
    count = len(front)
    index = np.full((H + 2, W + 2), -1)
    index[1:-1, 1:-1][mask] = np.arange(count)
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        there = index[1 + dy:H + 1 + dy, 1 + dx:W + 1 + dx][mask]
        rows = np.flatnonzero(there >= 0)
        values = np.concatenate([front[rows], -front[rows]])
        places = np.concatenate([rows, rows]), np.concatenate([there[rows], rows])
        yield sparse.csr_matrix((values, places), (count, count))


def settled(normal, mask, border):
    """Normals (H, W, 3) of a mask (H, W), those within `border` pixels of its edge taken from the nearest
    further inside: at a silhouette an estimated normal is mixed with what lies behind. All are as they were
    where nothing is further inside.
    """
    inside = binary_erosion(mask, iterations=border) if border else mask
    return fill_unknown(normal, inside) if inside.any() else normal


def surface(depth, focal=None):
    """Depth (H, W), NaN outside -> vertices (V, 3) with +x right, +y up, -z forward, and faces (F, 3), seen
    counter-clockwise: two of a quad of neighbours, one where a corner is missing.
    """
    H, W = depth.shape
    mask = np.isfinite(depth)
    v, u = np.nonzero(mask)
    x, y, z = u - (W - 1) / 2, (H - 1) / 2 - v, depth[mask]
    if focal is None:
        vertices = np.stack([x, y, -z], 1)
    else:
        f = focal * W / 2
        vertices = np.stack([x * z, y * z, -z * focal * W / 2], 1) / f
    index = np.full(depth.shape, -1)
    index[mask] = np.arange(mask.sum())
    quads = np.stack([index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]], -1).reshape(-1, 4)
    corners = (quads >= 0).sum(1)
    a, b, c, d = quads[corners == 4].T  # around
    three = quads[corners == 3]
    gap = three.argmin(1)[:, None]
    return vertices, np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1),
                                     np.take_along_axis(three, (gap + [1, 2, 3]) % 4, 1)])


def rounded(vertices, faces, times):
    """Vertices (V, 3) with a smooth rim: a mask ends in a staircase of pixels, so each vertex on the rim
    moves half of the way to the mean of its neighbours there, so many times.
    """
    edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    edges, faces_at = np.unique(edges, axis=0, return_counts=True)
    rim = edges[faces_at == 1]                                                    # (E, 2)
    rim = np.concatenate([rim, rim[:, ::-1]])
    neighbours = np.bincount(rim[:, 0], minlength=len(vertices))
    on = neighbours > 0
    vertices = vertices.copy()
    for _ in range(times):
        sums = np.zeros_like(vertices)
        np.add.at(sums, rim[:, 0], vertices[rim[:, 1]])
        vertices[on] = vertices[on] / 2 + sums[on] / neighbours[on, None] / 2
    return vertices


def write_ply(path, vertices, faces, colours):
    """A binary PLY: vertices (V, 3) float, colours (V, 3) uint8, faces (F, 3) int."""
    points = np.empty(len(vertices), [("place", "<f4", 3), ("colour", "u1", 3)])
    points["place"], points["colour"] = vertices, colours
    triangles = np.empty(len(faces), [("count", "u1"), ("corners", "<i4", 3)])
    triangles["count"], triangles["corners"] = 3, faces
    header = "\n".join([
        "ply",
        "format binary_little_endian 1.0",
        MADE,
        f"element vertex {len(points)}",
        *(f"property float {name}" for name in ("x", "y", "z")),
        *(f"property uchar {name}" for name in ("red", "green", "blue")),
        f"element face {len(triangles)}",
        "property list uchar int vertex_indices",
        "end_header\n",
    ])
    with whole_file(path) as file:
        file.write(header.encode() + points.tobytes() + triangles.tobytes())


def pick_segment(index, at=None):
    """Mask (H, W) of one connected segment of a label map: the one at pixel (x, y), else the largest that is
    not background.

    What holds a quarter of the picture's border or more counts as background. Raises InputError where at is
    outside, or all is background.
    """
    H, W = index.shape
    if at is not None:
        x, y = at
        check(0 <= x < W and 0 <= y < H,
              f"--segment {x},{y}: outside of the picture, which is {W}x{H}")
        parts, _ = label(index == index[y, x])
        return parts == parts[y, x]
    best, most = np.zeros((H, W), bool), 0
    for k in np.unique(index):
        parts, _ = label(index == k)
        sizes = np.bincount(parts.ravel())
        for part in 1 + np.flatnonzero(sizes[1:] > most):
            mask = parts == part
            border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).mean()
            if sizes[part] > most and border < 0.25:
                best, most = mask, sizes[part]
    check(most, "no segment stands free of the border; name one with --segment X,Y")
    return best


def view(vertices, faces, colours, yaw, size=256):
    """A shaded picture (size, size) of the mesh turned by yaw degrees about its upright axis, lit from the
    viewer; both sides show.
    """
    c, s = np.cos(np.radians(yaw)), np.sin(np.radians(yaw))
    turn = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    turned = (vertices - (vertices.min(0) + vertices.max(0)) / 2) @ turn.T
    corners = turned[faces]                                                       # (F, 3, 3)
    facing = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    light = 0.25 + 0.75 * np.abs(facing[:, 2]) / np.maximum(np.linalg.norm(facing, axis=1), 1e-12)
    tint = (colours[faces].mean(1) * light[:, None]).astype(int)
    extent = max(np.ptp(turned[:, :2], axis=0).max(), 1e-12)
    at = corners[..., :2] * [1, -1] * 0.9 * size / extent + size / 2
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    for k in np.argsort(corners[..., 2].mean(1)):                                 # the far ones first
        pen.polygon([tuple(p) for p in at[k]], tuple(tint[k]))
    return image


def preview_of(path):
    """The picture beside a PLY file."""
    if path.suffix.lower() in (".ply", ".png"):
        return path.with_suffix(".png")
    return path.with_name(f"{path.name}.png")


def write_mesh(path, normal, mask, rgb, focal=None, border=2):
    """Integrate the masked normals, settled within `border` pixels of the edge, and write the surface, its
    rim rounded, in the colours of rgb (H, W, 3), and beside it a picture of it from three sides -> number of
    vertices and faces.
    """
    depth = integrate(settled(normal, mask, border), mask, focal)
    vertices, faces = surface(depth, focal)
    vertices = rounded(vertices, faces, 2 * border)
    colours = rgb[np.isfinite(depth)]
    write_ply(path, vertices, faces, colours)
    views = [view(vertices, faces, colours, yaw) for yaw in (-50, 0, 50)]
    with whole_file(preview_of(path)) as file:
        Image.fromarray(np.hstack(views)).save(file, "png")
    return len(vertices), len(faces)


def main():
    """The surface of one object: normals, RGB and mask from files -> a PLY. InputError where they do not
    match.
    """
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--normal", type=pathlib.Path, required=True, help=".npy (H, W, 3), or a picture")
    add("--rgb", type=pathlib.Path, required=True)
    add("--mask", type=pathlib.Path, help="white is the object; default: where normals are not zero")
    add("--focal", type=float, metavar="HALF-WIDTHS", help="default: orthographic")
    add("--border", type=int, default=2, metavar="PIXELS", help="at the object's edge normals are taken from "
        "further inside, and its rim is rounded; 0 for exact ones")
    add("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    check(args.out.name, f"--out {args.out}: is no name of a file to write")
    preview = preview_of(args.out)
    check(preview != args.out, f"{args.out}: is the name of a picture; name a PLY file")
    check_apart([args.out, preview], [args.normal, args.rgb, args.mask])
    if preview.exists():
        ours = args.out.is_file() and MADE.encode() in args.out.read_bytes()[:200]
        check(ours, f"{preview}: the views would overwrite it, and it is of no mesh; use another --out")
    row = MODALITIES["normal"]
    raster = row.open(args.normal)
    normal = row.array(raster) if raster.top else raster.values
    check_ranges(args, focal=FOCALS, border=(0, 1000))
    photo = MODALITIES["rgb"].open(args.rgb)
    masked = read_mask(args.mask) if args.mask else raster._replace(values=raster.where_known)
    check_turned([photo, raster, masked])
    rgb, mask = photo.values, masked.values
    check(normal.shape == rgb.shape and mask.shape == rgb.shape[:2], f"{args.normal}: normals "
          f"{normal.shape}, picture {rgb.shape}, mask {mask.shape}; they must be of one size")
    vertices, faces = write_mesh(args.out, normal, mask & raster.where_known, rgb, args.focal, args.border)
    print(f"{args.out}: {vertices} vertices, {faces} faces")


if __name__ == "__main__":
    run(main)
