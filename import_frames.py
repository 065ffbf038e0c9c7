"""Stage 1, from data with truth: RGB-D and labelled data sets in the layout of prep_latents.py.

    python import_frames.py --format scannet --root scans --out data/scannet --every 20
    python import_frames.py --format generic --color mine/color --depth mine/depth --focal 525 --out data/mine

Writes OUT/{rgb,depth,normal,seg}/<scene>/<name>.*, and OUT/tree.json, which says what they hold. A PNG or
JPEG of its depth's size is copied as it is; others are resized to that size and written as PNG. Depth of
whole levels stays so, as 16-bit PNG, 0 where unknown; other depth is float32 .npy in metres. Normals are
the files' own (hypersim), else made of depth, as 8-bit PNG, black where unknown; of disparity none are
made. What is there is kept: the same command continues an interrupted run, and other scenes may be added.
"""
import filecmp
import functools
import pathlib
import re
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from cameras import along_axis, facing, normals_of, window_of
from distributed import (InputError, check, check_folder, check_ranges, command_parser, prefetch, reading,
                         run, sha256, whole_file)
from formats import FORMATS, Format, find_frames, layouts, pair_folders, pick
from images import filter_of, unit
from locks import only_writer
from modalities import (MAX_PIXELS, MODALITIES, Facts, Raster, check_told, check_turned, is_array,
                        photo_of, read_array, read_picture, write_facts, write_picture)
from trees import read_facts

ASPECT = 0.02  # relative difference of the aspects that one frame's files may have; ScanNet's is 0.4 %
AGREE = 0.03   # of focal lengths that count as one: a data set's cameras are calibrated one by one


# ------------------------------------------------------------------------------------------------
# Focal lengths.

CAMERA = {1: 0, 4: 1, 9: 4, 12: 5, 16: 5}  # numbers of a camera's file, fx first: where fy stands


def own_focal(frame, row):
    """The focal length (pixels, at the Format's width) that a frame's camera file says, else the Format's.

    Raises InputError for a file that is none of a camera.
    """
    path = camera_file(frame, row)
    return focal_in(path) if path and path.is_file() else row.focal


def camera_file(frame, row):
    """Where a frame's camera file would be, None for a Format that has none."""
    if row.intrinsics is None or "depth" not in frame.files:
        return None
    path = frame.files["depth"].parent
    for part in pathlib.PurePosixPath(row.intrinsics).parts:
        path = path.parent if part == ".." else path / part
    return path


def focal_in(path):
    """The focal length of a file of numbers: fx; fx fy cx cy; or the camera's matrix, 3x3, 3x4 or 4x4."""
    forms = "give fx, or fx fy cx cy, or a matrix of 3x3, 3x4 or 4x4, in pixels"
    with reading(path, f"{forms}, nothing else; or take it away"):
        with open(path, encoding="utf-8-sig") as file:
            numbers = [float(word) for word in file.read(100_000).split()]
    check(len(numbers) in CAMERA, f"{path}: holds {len(numbers)} numbers; {forms}")
    fx, fy = numbers[0], numbers[CAMERA[len(numbers)]]
    check(0.1 < fx < 1e6 and abs(fy / fx - 1) < 0.1, f"{path}: the focal lengths are {fx:g} and {fy:g}; they "
          f"must be positive and alike; {forms}")
    return fx


def _tell_camera(recipe, frames):
    """Print which scenes have no camera file where the Format knows one, and what is taken instead."""
    sought = {camera_file(frame, recipe.row) for frame in frames} - {None}
    lost = sorted(path for path in sought if not path.is_file())
    if lost and recipe.focal is None and recipe.row.focal:
        others = f", nor are {len(lost) - 1} others" if len(lost) > 1 else ""
        print(f"{lost[0]}: not there{others}; the focal length is taken for the format's "
              f"{recipe.row.focal:g} px at a width of {recipe.row.width}")


# ------------------------------------------------------------------------------------------------
# Files.

def read_numbers(path):
    """An .npy array, or that of an .hdf5 file's "dataset". Raises InputError for anything else."""
    if path.suffix != ".hdf5":
        return read_array(path)
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path}: needs h5py; pip install h5py, or bring an .npy of this stem") from error
    with reading(path, "make it again"), h5py.File(path) as file:
        held = file["dataset"]
        check(held.dtype.kind == "f" and 0 < held.size <= 3 * MAX_PIXELS, f"{path}: holds {held.dtype} "
              f"{held.shape}; floats of up to {MAX_PIXELS / 1e6:.0f} megapixels are needed")
        return held[()]


def read_depth(path, space):
    """A depth file -> Raster of its own values, not filled, and where they are known."""
    kind, facts = MODALITIES["depth"], Facts(depth_space=space, depth_void=0)
    if is_array(path) or path.suffix == ".hdf5":
        raster = kind.of_array(path, read_numbers(path), facts)
    else:
        picture = read_picture(path)
        raster = kind.of_picture(path, picture, facts)._replace(turned=picture.turned)
    check(raster.known.any(), f"{path}: none of its depth is known; leave this frame out with --frames")
    return raster


def width_of(frame, row):
    """The width of a frame's depth file."""
    return read_depth(frame.files["depth"], row.depth_space).size[0]


def written_depth(raster, recipe, focal):
    """A depth file's Raster -> what is written, 0 where unknown: uint16 (H, W) of its levels, else metres,
    float32; focal in pixels, where depth is along the ray.

    Raises InputError for levels of which nobody says what one is in metres.
    """
    row, values, path = recipe.row, np.where(raster.known, raster.values, 0), raster.path
    whole, short = values.dtype.kind in "iu", values.dtype == np.uint16
    check(values.dtype != np.uint8 or recipe.unit, f"{path}: holds levels of 8 bits, of which nobody says "
          "the unit; bring the data set's own 16 bits, or say --depth-unit METRES of a generic one")
    if row.depth_space == "disparity":
        return np.maximum(values, 1) - np.uint16(1) if short else values.astype(np.float32)
    unit_of_one = recipe.unit or (row.depth_unit if whole else 1.0)
    check(unit_of_one, f"{path}: holds levels; what one is in metres belongs into its row of FORMATS, as "
          "depth_unit")
    if short and not row.along_ray:
        return values  # of the depth_unit of tree.json
    depth = values.astype(np.float64) * unit_of_one
    return (along_axis(depth, focal) if row.along_ray else depth).astype(np.float32)


def read_labels(path, row):
    """A label file -> Raster of the labels that are written, and its palette, uint8 (K, 3) or None.

    Raises InputError for colours, for a label that the Format does not know, and where all is void.
    """
    if is_array(path):
        labels, own, turned = read_array(path), None, 1
    else:
        picture = read_picture(path)
        labels, own, turned = picture.values, picture.palette, picture.turned
        if picture.alpha is not None and labels.ndim == 2:
            labels = np.where(picture.alpha > 0, labels, row.void)
    check(labels.ndim == 2 and labels.dtype.kind in "iu", f"{path}: holds {labels.dtype} {labels.shape}; a "
          "label for each pixel is needed, whole numbers in one channel")
    table = row.labels or (row.palette and tuple(range(len(row.palette))))
    if table:
        odd = labels[((labels < 0) | (labels >= len(table))) & (labels != row.void)]
        check(not odd.size, f"{path}: has the label {odd[:1].sum()}, the data set's go from 0 to "
              f"{len(table) - 1}, and {row.void} is void; mend the file")
        padded = np.full(max(len(table), row.void + 1), row.void, np.uint8)
        padded[:len(table)] = table
        labels = padded[labels]
    if row.palette:
        own = np.array(row.palette, np.uint8)
    check((labels != row.void).any(), f"{path}: none of its labels is known; leave this frame out with "
          "--frames")
    check(0 <= labels.min() and labels.max() <= 65535, f"{path}: labels from {labels.min()} to "
          f"{labels.max()}; they go from 0 to 65535")
    small = labels.astype(np.uint8 if labels.max() <= 255 else np.uint16)
    return Raster(path, small, turned=turned), own


def own_normals(path, focal):
    """A file of Hypersim's normals, +x right -> (H, W, 3) as ours, facing the viewer, zero where unknown."""
    vectors = read_numbers(path)
    check(vectors.ndim == 3 and vectors.shape[2] == 3 and vectors.dtype.kind == "f", f"{path}: holds "
          f"{vectors.dtype} {vectors.shape}; normals are floats (H, W, 3)")
    known = np.isfinite(vectors).all(-1, keepdims=True)
    vectors = np.where(known, vectors, 0).astype(np.float32)
    known = known & (np.linalg.norm(vectors, axis=-1, keepdims=True) > 0.5)
    normal = facing(unit(vectors) * np.float32([-1, 1, 1]), focal * vectors.shape[1])
    return np.where(known, normal, 0)


def cover(image, size):
    """A PIL image resized, in its own aspect, to cover size (width, height), and cropped at the centre."""
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = size[0] / scale, size[1] / scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, left + width, top + height)
    return image.resize(size, filter_of(image, False), box=box)


# ------------------------------------------------------------------------------------------------
# Frames.

class Recipe(NamedTuple):
    """What is made of every frame."""
    row: Format
    out: pathlib.Path
    unit: float       # metres of a level of depth, or of a float's 1; None: the row's, or 1
    focal: float      # of --focal, in widths of the depth file; None: the scene's own
    normals: bool

    def modalities(self, frame):
        """What is written of a frame."""
        files = dict(frame.files)
        if not self.normals:
            files.pop("normal", None)
        elif "depth" in files:
            files.setdefault("normal", files["depth"])
        return [m for m in MODALITIES if m in files]

    def focal_of(self, frame):
        """The focal length of a frame in widths of its depth file, None where nobody says."""
        if self.focal is not None:
            return self.focal
        focal = own_focal(frame, self.row)
        return focal and focal / (self.row.width or width_of(frame, self.row))


ENDINGS = {"rgb": (".png", ".jpg", ".jpeg"), "depth": (".png", ".npy"), "normal": (".png",), "seg": (".png",)}


def written(out, m, frame):
    """The file of a frame that is there already, None where there is none."""
    place, endings = out / m / frame.scene, ENDINGS.get(m) or (frame.files[m].suffix.lower(),)
    paths = (place / f"{frame.name}{ending}" for ending in endings)
    return next(filter(pathlib.Path.is_file, paths), None)


def check_same(path, source):
    """Raise InputError where a picture that is there was not made of this one."""
    same = filecmp.cmp(path, source, shallow=False) or photo_of(path) == sha256(source)
    check(same, f"{path}: is there, and of another picture than {source}; use another --scene or --out")


def save_picture(path, values, palette=None):
    """Write a PNG, uint8 labels in a palette's colours where there is one."""
    image = Image.fromarray(values)
    if palette is not None and values.dtype == np.uint8:
        image.putpalette(palette.tobytes().ljust(768, b"\0"))  # of fewer bits it would cut the label of void
    write_picture(path, image)


def save_array(path, values):
    with whole_file(path) as file:
        np.save(file, values)


def copy_file(path, source):
    with whole_file(path) as file:
        file.write(source.read_bytes())


def import_frame(recipe, frame):
    """Write what is missing of a frame, its RGB last -> (share of known depth or None, whether all was
    there). Raises InputError naming the file that does not fit; nothing of the frame is written then.
    """
    out, there = recipe.out, {m: written(recipe.out, m, frame) for m in recipe.modalities(frame)}
    if there["rgb"]:
        check_same(there["rgb"], frame.files["rgb"])
    if all(there.values()):
        return _share(there.get("depth"), recipe.row), True
    rasters = {"rgb": MODALITIES["rgb"].open(frame.files["rgb"])}
    focal, palette, maps = recipe.focal_of(frame), None, {}
    needed = "normal" in there or recipe.row.along_ray
    sought = camera_file(frame, recipe.row)
    where = f", there is no {sought}" if sought else ""
    check(focal is not None or not needed, f"{frame.files['rgb']}: nobody says its focal length{where}; "
          "give --focal PIXELS, at the depth files' own width, or --no-normals")
    if "depth" in frame.files:
        depth = rasters["depth"] = read_depth(frame.files["depth"], recipe.row.depth_space)
        maps["depth"] = written_depth(depth, recipe, focal and focal * depth.size[0])
    if "seg" in frame.files:
        rasters["seg"], palette = read_labels(frame.files["seg"], recipe.row)
        maps["seg"] = rasters["seg"].values
    for m in there.keys() - ENDINGS.keys():  # a modality of one's own: its files as they are
        rasters[m] = MODALITIES[m].open(frame.files[m])
    _check_sizes(rasters)
    if "normal" in there:
        maps["normal"] = _normal_picture(frame, maps.get("depth"), focal)
    for m in (m for m in there if m != "rgb" and not there[m]):
        place = out / m / frame.scene
        if m not in maps:
            copy_file(place / f"{frame.name}{frame.files[m].suffix.lower()}", frame.files[m])
        elif maps[m].dtype == np.float32:
            save_array(place / f"{frame.name}.npy", maps[m])
        else:
            save_picture(place / f"{frame.name}.png", maps[m], palette if m == "seg" else None)
    if not there["rgb"]:
        _save_rgb(out / "rgb" / frame.scene / frame.name, rasters)
    return (float((maps["depth"] > 0).mean()) if "depth" in maps else None), False


def _share(path, row):
    """The share of known pixels of a depth file that was written; of no file None."""
    return path and float(read_depth(path, row.depth_space).known.mean())


def _check_sizes(rasters):
    """Raise InputError where maps have another aspect than their picture, or are turned otherwise."""
    rgb = rasters["rgb"]
    for raster in rasters.values():
        ratio = raster.size[0] * rgb.size[1] / (raster.size[1] * rgb.size[0])
        sizes = ["x".join(map(str, each.size)) for each in (raster, rgb)]
        check(abs(ratio - 1) <= ASPECT, f"{raster.path}: is {sizes[0]}, its picture {rgb.path} is "
              f"{sizes[1]}, of another aspect; the maps would not align, give files of the same view")
    check_turned(list(rasters.values()))


def _normal_picture(frame, depth, focal):
    """The normals of a frame, its own or its depth's -> uint8 (H, W, 3), black where unknown."""
    if "normal" in frame.files:
        normal = own_normals(frame.files["normal"], focal)
        check(depth is None or normal.shape[:2] == depth.shape, f"{frame.files['normal']}: is of "
              f"{normal.shape[:2]}, its depth of {np.shape(depth)} pixels; give files of the same frame")
    else:
        width = depth.shape[1]
        normal = normals_of(depth.astype(np.float32), depth > 0, focal * width, window_of(width))
    known = normal.any(-1, keepdims=True)
    return np.where(known, MODALITIES["normal"].picture(normal), 0).astype(np.uint8)


def _save_rgb(place, rasters):
    """Write the picture of a frame: its own bytes where it is of the depth's size and upright."""
    rgb = rasters["rgb"]
    size = rasters["depth"].size if "depth" in rasters else rgb.size
    ending = rgb.path.suffix.lower()
    if rgb.size == size and rgb.turned == 1 and ending in ENDINGS["rgb"]:
        copy_file(place.with_name(f"{place.name}{ending}"), rgb.path)
        return
    image = cover(Image.fromarray(MODALITIES["rgb"].array(rgb)), size)
    write_picture(place.with_name(f"{place.name}.png"), image, sha256(rgb.path))


# ------------------------------------------------------------------------------------------------

def told_of(recipe, frames, classes):
    """What tree.json will say of the files; classes: whether scenes are. Raises InputError where it says
    otherwise now.
    """
    row, first, path = recipe.row, frames[0], recipe.out / "tree.json"
    held = read_facts(path) if path.is_file() else None
    if held is not None:
        none = held.classes == "none"
        check(none != classes, f"{path}: its folders are {'no ' if none else ''}classes; use another folder, "
              f"or {'leave away' if none else 'add'} --scene-is-class")
    told = {} if classes else {"classes": "none"}
    if "depth" in first.files:
        told.update(depth_space=row.depth_space, depth_void=0)
        if row.depth_space == "depth" and row.depth_unit:
            told["depth_unit"] = recipe.unit or row.depth_unit
    if "seg" in first.files:
        told.update(seg_mode="semantic", void=row.void)
        if row.palette is not None:
            told["palette"] = [list(colour) for colour in row.palette]
    return {**told, **_told_focal(recipe, frames, held or Facts())}


def _told_focal(recipe, frames, held):
    """The focal length that tree.json will say, {} for none: that of the held Facts where they agree.

    Raises InputError where scenes do not agree.
    """
    scenes = {frame.scene: frame for frame in frames}
    focals = {scene: recipe.focal_of(frame) for scene, frame in scenes.items()}
    first = next(iter(focals))
    if focals[first] is None:
        return {}
    for scene, focal in focals.items():
        check(abs(focal / focals[first] - 1) <= AGREE, f"the focal lengths of {first} and {scene} are "
              f"{focals[first]:.3f} and {focal:.3f} of the width; import them into one --out each")
    width = recipe.row.width
    if recipe.focal is not None or width is None:
        width = width_of(frames[0], recipe.row)
    if held.focal and held.focal_width and abs(held.focal / held.focal_width / focals[first] - 1) <= AGREE:
        return {"focal": held.focal, "focal_width": held.focal_width}
    return {"focal": round(focals[first] * width, 4), "focal_width": width}


def arguments():
    """The command's flags."""
    parser = command_parser(__doc__ + layouts())
    add = parser.add_argument
    add("--format", choices=list(FORMATS), default="generic")
    add("--root", type=pathlib.Path, metavar="DIR", help="the data set, or one of its scenes")
    add("--color", type=pathlib.Path, metavar="DIR", help="generic: the folder of pictures")
    add("--depth", type=pathlib.Path, metavar="DIR", help="generic: pictures or .npy")
    add("--label", type=pathlib.Path, metavar="DIR", help="generic: labels, 255 is void")
    add("--depth-unit", type=float, metavar="METRES", help="generic: of a level of depth (0.001), or of a "
        "float's 1 (1)")
    add("--focal", type=float, metavar="PIXELS", help="at the depth files' own width; default: the format's")
    add("--scene", metavar="NAME",
        help="the folder of the frames; default: the scene's own, else the root's name")
    add("--out", type=pathlib.Path, required=True, metavar="TREE")
    add("--frames", metavar="FIRST:LAST", help="by the last number in their names, both ends in")
    add("--every", type=int, default=1, metavar="K", help="every K-th of those")
    add("--no-normals", action="store_true")
    add("--scene-is-class", action="store_true", help="scenes are classes; default: the tree has no classes")
    return parser.parse_args()


def checked(args):
    """Check the flags -> {modality: folder} of generic, else of no modality, and the span of --frames."""
    row, name, folders = FORMATS[args.format], f"--format {args.format}", {}
    for m, flag in (("rgb", "color"), ("depth", "depth"), ("seg", "label")):
        if getattr(args, flag) is not None:
            folders[m] = getattr(args, flag)
    unit_given, focal = args.depth_unit, args.focal
    check(unit_given is None or 0 < unit_given < 1e6,
          f"--depth-unit {unit_given}: must be positive, the metres of a level")
    check(focal is None or 0 < focal < 1e6,
          f"--focal {focal}: must be positive, in pixels at the width of the depth files")
    if args.format == "generic":
        check(args.root is None and "rgb" in folders and len(folders) > 1,
              f"{name}: takes --color DIR with --depth DIR or --label DIR or both, and no --root")
        told = args.focal or args.no_normals or "depth" not in folders
        check(told, f"--depth {args.depth}: normals need --focal PIXELS, at the files' own width; or give "
              "--no-normals")
    else:
        check(args.root is not None and not folders, f"{name}: takes --root DIR, and no --color, --depth or "
              "--label")
        same = unit_given in (None, row.depth_unit)
        check(same, f"--depth-unit {unit_given}: {name} tells it, {row.depth_unit or 'floats in metres'}; "
              "leave it away")
    check_ranges(args, every=(1, None))
    bad = args.scene is not None and (not args.scene.strip("./ ") or ".." in args.scene.split("/")
                                      or args.scene.startswith("/"))
    check(not bad, f"--scene {args.scene!r}: must be the name of a folder below OUT/rgb")
    span = re.fullmatch(r"(\d+):(\d+)", args.frames or "0:0")
    check(span and int(span[1]) <= int(span[2]), f"--frames {args.frames}: expected FIRST:LAST, as 0:799")
    return folders, args.frames and tuple(map(int, span.groups()))


def recipe_of(args, frames):
    """The flags, and the first frame's depth, which tells what a focal length is of -> Recipe."""
    row, focal = FORMATS[args.format], args.focal
    if focal is not None:
        there = "depth" in frames[0].files
        check(there, f"--focal {focal}: is at the width of depth files, and there are none")
        focal = focal / width_of(frames[0], row)
    return Recipe(row, args.out, args.depth_unit, focal, not args.no_normals and row.depth_space == "depth")


def main():
    """Import the frames that are not there yet. A killed run continues."""
    args = arguments()
    folders, span = checked(args)
    check_folder(args.out, folders.values() or [args.root])
    if folders:
        frames, left = pair_folders(folders, args.scene)
    else:
        frames, left = find_frames(args.root, FORMATS[args.format], args.scene)
    frames = pick(frames, span, args.every)
    recipe = recipe_of(args, frames)
    shares, kept = [], 0
    with only_writer(args.out):
        check_told(args.out)
        _tell_camera(recipe, frames)
        write_facts(args.out, **told_of(recipe, frames, args.scene_is_class))
        results = prefetch(functools.partial(import_frame, recipe), frames, ahead=4)
        for share, old in tqdm(results, "import", len(frames), unit="frame"):
            shares.append(share)
            kept += old
    depth = "" if None in shares else f", {np.mean(shares):.1%} of depth known"
    there = f" ({kept} were there)" if kept else ""
    out = "; left out: " + ", ".join(f"{count} {why}" for why, count in left.items()) if left else ""
    print(f"{args.out}: {len(frames)} frames of {', '.join(recipe.modalities(frames[0]))}{there}{depth}{out}")


if __name__ == "__main__":
    run(main)
