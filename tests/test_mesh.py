"""mesh.py against surfaces that are known exactly."""
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import mesh
import sample
import toy_scenes
from distributed import InputError
from weights import DEMO

SIZE = 96


def sphere(focal):
    """Normals, mask and exact depth of a unit sphere (perspective: at distance 3; orthographic: radius 0.4 of
    the picture).
    """
    centre = (SIZE - 1) / 2
    v, u = np.mgrid[:SIZE, :SIZE]
    if focal is None:
        radius = 0.4 * SIZE
        x, y = (u - centre) / radius, (centre - v) / radius
        mask = x * x + y * y < 0.98
        z = np.sqrt(np.where(mask, 1 - x * x - y * y, 0))
        return np.stack([-x, y, z], -1) * mask[..., None], mask, -z * radius, 2 * radius
    f = focal * SIZE / 2
    ray = np.stack([(u - centre) / f, (centre - v) / f, -np.ones((SIZE, SIZE))], -1)
    a, b = (ray ** 2).sum(-1), -3 * ray[..., 2]
    root = b * b - a * 8
    mask = root > 0.05
    depth = (b - np.sqrt(np.where(mask, root, 0))) / a
    normal = ray * depth[..., None] + [0, 0, 3]
    return normal * [-1, 1, 1] * mask[..., None], mask, depth, 2.0


def cylinder(focal):
    """An upright cylinder before a wall: orthographic, with the wall's plane beside it."""
    v, u = np.mgrid[:SIZE, :SIZE]
    radius = 0.3 * SIZE
    x = (u - (SIZE - 1) / 2) / radius
    inside = (np.abs(x) < 0.97) & (v > 10) & (v < SIZE - 10)
    z = np.sqrt(np.clip(1 - x * x, 0, None))
    return np.stack([-x, np.zeros_like(x), z], -1) * inside[..., None], inside, -z * radius, 2 * radius


@pytest.mark.parametrize("scene, focal", ((sphere, None), (sphere, 1.2), (cylinder, None)))
def test_a_known_surface_comes_back(scene, focal, figure):
    normal, mask, truth, size = scene(focal)
    depth = mesh.integrate(normal, mask, focal)
    assert np.isnan(depth[~mask]).all()
    found, true = depth[mask], truth[mask]
    if focal:
        found = found * (true @ found / (found @ found))
    else:
        found = found - (found - true).mean()
    error = np.sqrt(np.mean((found - true) ** 2)) / size
    figure(f"mesh of an exact {scene.__name__}, focal {focal}, RMS error over size", float(error))
    assert error < 0.002


def test_depth_may_jump_at_a_silhouette():
    """A sphere and the wall behind it as one surface: the sphere keeps its shape."""
    normal, inside, truth, size = sphere(None)
    normal = np.where(inside[..., None], normal, [0.0, 0, 1])
    depth = mesh.integrate(normal, np.ones_like(inside), iterations=30)
    assert (depth - truth)[inside].std() / size < 0.02


def test_the_flags_of_the_command(command, tmp_path):
    normal, inside, _, _ = sphere(None)
    half = inside & (np.arange(SIZE) < SIZE // 2)
    np.save(tmp_path / "n.npy", normal)
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "c.png")
    Image.fromarray(half).save(tmp_path / "m.png")
    given = ("--normal", tmp_path / "n.npy", "--rgb", tmp_path / "c.png", "--mask", tmp_path / "m.png")
    files = []
    for i, more in enumerate(((), ("--focal", 1.2), ("--border", 0))):
        assert f"{half.sum()} vertices" in command("mesh", *given, *more, "--out", tmp_path / f"{i}.ply")
        files.append((tmp_path / f"{i}.ply").read_bytes())
    assert len(set(files)) == 3


def test_the_ply_is_what_its_header_says(tmp_path):
    normal, mask, truth, size = sphere(1.2)
    colours = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    count, faces = mesh.write_mesh(tmp_path / "s.ply", normal, mask, colours, 1.2)
    head, body = (tmp_path / "s.ply").read_bytes().split(b"end_header\n", 1)
    assert f"element vertex {count}\n".encode() in head and f"element face {faces}\n".encode() in head
    assert len(body) == 15 * count + 13 * faces
    points = np.frombuffer(body[:15 * count], [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    triangles = np.frombuffer(body[15 * count:], [("n", "u1"), ("corners", "<i4", 3)])
    assert (points["rgb"] == colours[mask]).all()
    assert (triangles["n"] == 3).all() and triangles["corners"].max() == count - 1
    a, b, c = (points["xyz"][triangles["corners"][:, i]] for i in range(3))
    facing = np.cross(b - a, c - a)
    centre = points["xyz"].mean(0) - [0, 0, 1]
    assert ((facing * (a - centre)).sum(-1) > 0).mean() > 0.99  # seen counter-clockwise from outside


def test_normals_at_a_silhouette_come_from_inside():
    """Mixed with what lies behind, they would pull the border to a point."""
    normal, mask, truth, size = sphere(None)
    rim = mask & ~ndimage.binary_erosion(mask, iterations=2)
    mixed = np.where(rim[..., None], [1.0, 0.0, 0.02], normal)
    spiked, even = (mesh.integrate(x, mask) for x in (mixed, mesh.settled(mixed, mask, 2)))
    errors = [np.nanstd(depth - truth) / size for depth in (spiked, even)]
    assert errors[1] < 0.02 < errors[0] / 2
    assert np.array_equal(mesh.settled(normal, mask, 0)[mask], normal[mask])
    thin = np.zeros_like(mask)
    thin[5] = True
    assert mesh.settled(normal, thin, 2) is normal


def test_a_rim_is_rounded_and_nothing_else_moves():
    v, u = np.mgrid[:64, :64] - 31.5
    depth = np.where(np.hypot(u, v) < 20, 5.0, np.nan)  # a disc, whose rim is a staircase
    vertices, faces = mesh.surface(depth)
    rounded = mesh.rounded(vertices, faces, 4)
    moved = (rounded != vertices).any(1)
    radius = np.hypot(*vertices.T[:2])
    assert radius[moved].min() > 18 and moved[radius > 19.3].all()
    assert np.hypot(*rounded[moved].T[:2]).std() < 0.6 * radius[moved].std()
    assert (rounded[:, 2] == -5).all() and (mesh.rounded(vertices, faces, 0) == vertices).all()


def test_a_missing_corner_leaves_one_face():
    depth = np.ones((2, 2))
    assert len(mesh.surface(depth)[1]) == 2
    for corner in np.ndindex(2, 2):
        depth[:] = 1
        depth[corner] = np.nan
        vertices, faces = mesh.surface(depth)
        a, b, c = vertices[faces[0]]
        assert len(faces) == 1 and np.cross(b - a, c - a)[2] > 0  # towards the viewer


def test_which_segment(tmp_path):
    index = np.zeros((20, 20), int)
    index[5:15, 5:15], index[0:3, 0:3] = 1, 2
    assert mesh.pick_segment(index).sum() == 100 and mesh.pick_segment(index, (1, 1)).sum() == 9
    with pytest.raises(InputError, match="outside of the picture"):
        mesh.pick_segment(index, (20, 0))
    with pytest.raises(InputError, match="name one with --segment"):
        mesh.pick_segment(np.zeros((20, 20), int))


def test_the_chain_from_one_depth_map(command, tmp_path, monkeypatch):
    asked = []
    picture, pick = DEMO / "scenes/depth", sample.pick_segment
    first = sorted(picture.rglob("*.png"))[0]
    monkeypatch.setattr(sample, "pick_segment", lambda index, at: asked.append(at) or pick(index))
    command("sample", "--task", "condition", "--given", "depth", "--image", first, "--mesh",
            "--ckpt", DEMO / "mmgen.pt", "--sampler", "euler", "--steps", 6, "--focal", 1.2,
            "--segment", "30,40", "--out", tmp_path)
    assert asked == [(30, 40)]
    assert (tmp_path / "mesh" / f"{first.stem}.ply").read_bytes().startswith(b"ply\n")


def test_mesh_command_and_its_errors(command, tmp_path):
    normal, mask, _, _ = sphere(None)
    np.save(tmp_path / "n.npy", normal)
    Image.new("RGB", (SIZE, SIZE), "teal").save(tmp_path / "c.png")
    flags = ("--normal", tmp_path / "n.npy", "--rgb", tmp_path / "c.png")
    assert f"{mask.sum()} vertices" in command("mesh", *flags, "--out", tmp_path / "o.ply")
    Image.new("RGB", (5, 5)).save(tmp_path / "c.png")
    with pytest.raises(InputError, match="must be of one size"):
        command("mesh", *flags, "--out", tmp_path / "p.ply")
    for focal in ("inf", "0", "1e-300", "nan"):
        with pytest.raises(InputError, match=r"--focal .*: must lie in \[0.01, 1000\]"):
            command("mesh", *flags, "--focal", focal, "--out", tmp_path / "p.ply")
        with pytest.raises(InputError, match="--focal .*: must lie in"):
            command("sample", "--task", "generate", "--mesh", "--focal", focal, "--out", tmp_path / "s")
    assert not (tmp_path / "p.ply").exists() and not (tmp_path / "s").exists()


@pytest.mark.parametrize("kind", ("sphere", "cylinder"))
def test_a_rendered_object_comes_back(kind, figure):
    """The visible surface of a toy scene's main object, in perspective: RMS error over its largest extent."""
    label = toy_scenes.SEGMENTS.index(kind)
    errors = []
    for seed in range(60):
        scene = toy_scenes.render(seed, 128)
        if (scene.seg == label).sum() <= 2500:
            continue
        parts = mesh.pick_segment(scene.seg == label)
        depth = mesh.integrate(scene.normal, parts, scene.focal)
        vertices, _ = mesh.surface(depth, scene.focal)
        truth, _ = mesh.surface(np.where(parts, scene.depth, np.nan), scene.focal)
        scale = (truth * vertices).sum() / (vertices ** 2).sum()
        distance = np.sqrt(np.mean(((vertices * scale - truth) ** 2).sum(1)))
        errors.append(distance / np.ptp(truth, axis=0).max())
    figure(f"mesh of a rendered {kind}, RMS error over size",
           dict(objects=len(errors), median=float(np.median(errors)), worst=float(max(errors))))
    assert len(errors) >= 3 and np.median(errors) < 0.02
