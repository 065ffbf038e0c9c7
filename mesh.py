"""From a normal map to a surface: bilateral normal integration (Cao et al. 2022) and a PLY file (MMGen, Fig. 6).

    python sample.py --task condition --given depth --image depth.png --mesh     # the whole chain, by sample.py
    python mesh.py --normal samples/normal/0.npy --rgb samples/rgb/0.png --out 0.ply

Normals as everywhere here: +x left, +y up, +z towards the viewer. Vertices: +x right, +y up, the camera looks along -z.
"""
import argparse
import pathlib

import numpy as np
from PIL import Image, ImageDraw
from scipy import sparse
from scipy.ndimage import label
from scipy.sparse.linalg import cg

from distributed import InputError, run, whole_file
from modalities import read_array, read_picture


def integrate(normal, mask, focal=None, sharpness=2.0, iterations=100, tolerance=1e-5):
    """Depth of a masked normal map: (H, W) float64, NaN outside of the mask.

    normal (H, W, 3), mask (H, W) bool; focal in half-widths of the image for a perspective camera whose axis meets the
    centre, None for an orthographic one. Each of the two one-sided derivatives along an axis shall fit the normal; their
    weights, a sigmoid of `sharpness` times the difference of their squares, say on which side of a pixel the surface goes
    on, so that depth may jump at a silhouette. Iteratively reweighted least squares, solved by conjugate gradients. Depth
    grows away from the camera: in pixels and up to a constant (orthographic), or up to a factor, with mean 1 (perspective).
    Raises InputError for an empty mask.
    """
    count = int(mask.sum())
    if count == 0:
        raise InputError("the mask of the object is empty; pick another segment")
    H, W = mask.shape
    index = np.full((H + 2, W + 2), -1)
    index[1:-1, 1:-1][mask] = np.arange(count)
    right, down, front = (-normal[mask].astype(np.float64)).T  # camera axes: x right, y down, z forward
    if focal is not None:  # log depth obeys the same equations with another third component
        f = focal * W / 2
        v, u = np.nonzero(mask)
        front = right * (u - (W - 1) / 2) + down * (v - (H - 1) / 2) + f * front
    front = np.where(np.abs(front) < 1e-3, -1e-3, front)  # a grazing ray has no finite slope
    here = index[1:-1, 1:-1][mask]

    def difference(dy, dx):
        """front * (z of the neighbour - z), zero where the neighbour is outside of the mask."""
        there = index[1 + dy:H + 1 + dy, 1 + dx:W + 1 + dx][mask]
        inside = there >= 0
        rows = np.flatnonzero(inside)
        values = np.concatenate([front[inside], -front[inside]])
        return sparse.csr_matrix((values, (np.concatenate([rows, rows]), np.concatenate([there[inside], here[inside]]))), (count, count)), inside

    (ahead_u, known0), (behind_u, known1), (ahead_v, known2), (behind_v, known3) = (difference(*d) for d in ((0, 1), (0, -1), (1, 0), (-1, 0)))
    A = sparse.vstack([ahead_u, -behind_u, ahead_v, -behind_v]).tocsr()
    b, known = np.concatenate([-right, -right, -down, -down]), np.concatenate([known0, known1, known2, known3])
    weight, z, energy = np.full(4 * count, 0.5), np.zeros(count), None
    for _ in range(iterations):
        system = A.T @ sparse.diags(weight) @ A
        diagonal = np.maximum(system.diagonal(), 1e-9)
        z, _ = cg(system, A.T @ (weight * known * b), x0=z, rtol=1e-4, maxiter=2000, M=sparse.diags(1 / diagonal))
        slope = ((A @ z) ** 2).reshape(4, count)
        u, v = (1 / (1 + np.exp(np.clip(sharpness * (slope[i] - slope[i + 1]), -50, 50))) for i in (0, 2))
        weight = np.concatenate([u, 1 - u, v, 1 - v])
        last, energy = energy, float((weight * known * (A @ z - b) ** 2).sum())
        if last is not None and abs(last - energy) <= tolerance * max(last, 1e-12):
            break
    depth = np.full(mask.shape, np.nan)
    depth[mask] = np.exp(z - z.mean()) if focal is not None else z
    return depth


def surface(depth, focal=None):
    """Depth (H, W), NaN outside -> vertices (V, 3) with +x right, +y up, -z forward, and faces (F, 3), seen counter-clockwise."""
    H, W = depth.shape
    mask = np.isfinite(depth)
    v, u = np.nonzero(mask)
    x, y, z = u - (W - 1) / 2, (H - 1) / 2 - v, depth[mask]
    vertices = np.stack([x, y, -z], 1) if focal is None else np.stack([x * z, y * z, -z * focal * W / 2], 1) / (focal * W / 2)
    index = np.full(depth.shape, -1)
    index[mask] = np.arange(mask.sum())
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]  # corners of each quad
    whole = (a >= 0) & (b >= 0) & (c >= 0) & (d >= 0)
    a, b, c, d = (corner[whole] for corner in (a, b, c, d))
    return vertices, np.concatenate([np.stack([a, c, d], 1), np.stack([a, d, b], 1)])


def write_ply(path, vertices, faces, colours):
    """A binary PLY: vertices (V, 3) float, colours (V, 3) uint8, faces (F, 3) int."""
    points = np.empty(len(vertices), [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")])
    for i, name in enumerate("xyz"):
        points[name] = vertices[:, i]
    for i, name in enumerate(("red", "green", "blue")):
        points[name] = colours[:, i]
    triangles = np.empty(len(faces), [("count", "u1"), ("corners", "<i4", 3)])
    triangles["count"], triangles["corners"] = 3, faces
    kinds = "".join(f"property {'float' if n in 'xyz' else 'uchar'} {n}\n" for n in points.dtype.names)
    header = (f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{kinds}element face {len(triangles)}\n"
              "property list uchar int vertex_indices\nend_header\n")
    with whole_file(path) as file:
        file.write(header.encode() + points.tobytes() + triangles.tobytes())


def pick_segment(index, at=None):
    """Mask (H, W) of one connected segment of a label map: the one at pixel (x, y), else the largest that is not background.

    What holds a quarter of the picture's border or more counts as background.
    """
    H, W = index.shape
    if at is not None:
        x, y = at
        if not (0 <= x < W and 0 <= y < H):
            raise InputError(f"--segment {x},{y}: outside of the picture, which is {W}x{H}")
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
    if not most:
        raise InputError("no segment stands free of the border; name one with --segment X,Y")
    return best


def view(vertices, faces, colours, yaw, size=256):
    """A shaded picture (size, size) of the mesh turned by yaw degrees about its upright axis, lit from the viewer; both sides show."""
    angle = np.radians(yaw)
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    turned = (vertices - (vertices.min(0) + vertices.max(0)) / 2) @ turn.T
    corners = turned[faces]                                                       # (F, 3, 3)
    facing = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    light = 0.25 + 0.75 * np.abs(facing[:, 2]) / np.maximum(np.linalg.norm(facing, axis=1), 1e-12)
    tint = (colours[faces].mean(1) * light[:, None]).astype(int)
    at = corners[..., :2] * [1, -1] * 0.9 * size / max(np.ptp(turned[:, :2], axis=0).max(), 1e-12) + size / 2
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    for k in np.argsort(corners[..., 2].mean(1)):                                 # the far ones first
        pen.polygon([tuple(p) for p in at[k]], tuple(tint[k]))
    return image


def write_mesh(path, normal, mask, rgb, focal=None):
    """Integrate the masked normals and write the surface in the colours of rgb (H, W, 3), and beside it a picture of it
    from three sides -> number of vertices and faces."""
    depth = integrate(normal, mask, focal)
    vertices, faces = surface(depth, focal)
    colours = rgb[np.isfinite(depth)]
    write_ply(path, vertices, faces, colours)
    with whole_file(path.with_suffix(".png")) as file:
        Image.fromarray(np.hstack([view(vertices, faces, colours, yaw) for yaw in (-50, 0, 50)])).save(file, "png")
    return len(vertices), len(faces)


def main():
    """The surface of one object: normals, RGB and mask from files -> a PLY. InputError where they do not match."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--normal", type=pathlib.Path, required=True, help=".npy (H, W, 3)")
    parser.add_argument("--rgb", type=pathlib.Path, required=True)
    parser.add_argument("--mask", type=pathlib.Path, help="white is the object; default: where normals are not zero")
    parser.add_argument("--focal", type=float, help="in half-widths of the picture; default: orthographic")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    normal = read_array(args.normal)
    if normal.ndim != 3 or normal.dtype.kind != "f" or not np.isfinite(normal).all():
        raise InputError(f"{args.normal}: normals are finite floats of shape (H, W, 3)")
    if args.focal is not None and not args.focal > 0:
        raise InputError(f"--focal {args.focal}: must be positive, in half-widths of the picture")
    rgb = np.asarray(read_picture(args.rgb).convert("RGB"))
    mask = np.linalg.norm(normal, axis=-1) > 0.5 if args.mask is None else np.asarray(read_picture(args.mask).convert("L")) > 127
    if normal.ndim != 3 or normal.shape != rgb.shape or mask.shape != rgb.shape[:2]:
        raise InputError(f"{args.normal}: normals {normal.shape}, picture {rgb.shape}, mask {mask.shape}; they must be of one size")
    vertices, faces = write_mesh(args.out, normal, mask, rgb, args.focal)
    print(f"{args.out}: {vertices} vertices, {faces} faces")


if __name__ == "__main__":
    run(main)
