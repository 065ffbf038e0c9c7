"""Data sets with truth: how their files lie below a root, what they hold, which of them are one frame."""
import re
import textwrap
from typing import NamedTuple

import numpy as np

from distributed import check, say
from modalities import VOID
from trees import natural, pictures_by_stem, walk


class Format(NamedTuple):
    """How a data set's files lie below its root, and what they hold.

    The groups scene, view and name of the patterns are what a frame's files have in common.
    """
    layout: str                # how they lie, for --help
    files: dict = {}           # {modality: patterns of paths, the better first}
    depth_space: str = "depth"
    depth_unit: float = None   # metres of a level of 16 bits or more; None: there are floats alone, in metres
    focal: float = None        # pixels, of pictures of `width`
    width: int = None          # None: of the depth files' own
    intrinsics: str = None     # the camera's file, seen from the depth's folder: see import_frames.focal_in
    along_ray: bool = False    # depth is the distance from the camera
    within: float = None       # seconds: names are times, and the nearest one is the partner
    palette: tuple = None      # colours of the labels that are written
    void: int = VOID           # the label of unknown pixels, in the files and as written
    labels: tuple = None       # the written label of each of the files'; None: they stay


CAMVID = ((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
          (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192))
CITYSCAPES = ((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
              (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180),
              (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230),
              (119, 11, 32))
TRAINED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # ids of the 19 classes
TRAIN_IDS = tuple(TRAINED.index(k) if k in TRAINED else VOID for k in range(34))

SCENE = r"(?:(?P<scene>.+)/)?"
NAME = r"(?P<name>[^/]+)"
SHOT = r"(?:(?P<scene>(?!images/).+?)/)?(?:images/)?scene_(?P<view>cam_\d+)_"  # a camera of Hypersim
CITY = r"(?:(?P<scene>[^/]+/[^/]+)/)"

FORMATS = {
    "generic": Format("--color, --depth, --label: folders with equal names, or as many files in equal order",
                      depth_unit=0.001),
    "scannet": Format(
        "<scene>/{color,depth}/<n>, mm; focal length of <scene>/intrinsic/intrinsic_depth.txt",
        {"rgb": (SCENE + r"color/(?P<name>\d+)\.(?:jpg|png)",),
         "depth": (SCENE + r"depth/(?P<name>\d+)\.png",)},
        depth_unit=0.001, focal=577.87, width=640, intrinsics="../intrinsic/intrinsic_depth.txt"),
    "7scenes": Format(
        "<scene>/frame-<n>.{color,depth}.png, mm, 0 and 65535 unknown",
        {"rgb": (SCENE + r"frame-(?P<name>\d+)\.color\.png",),
         "depth": (SCENE + r"frame-(?P<name>\d+)\.depth\.png",)},
        depth_unit=0.001, focal=585, width=640),
    "tum": Format(
        "<scene>/{rgb,depth}/<seconds>.png, 1/5000 m; paired within 0.02 s, numbered from 0 in each scene",
        {"rgb": (SCENE + r"rgb/(?P<name>\d+\.\d+)\.png",),
         "depth": (SCENE + r"depth/(?P<name>\d+\.\d+)\.png",)},
        depth_unit=1 / 5000, focal=525, width=640, within=0.02),
    "nyu": Format(
        "<scene>/{rgb,depth}/<n>, or <scene>/<n>_{rgb,depth}.png, 16-bit mm: as usually extracted (the "
        "official .mat is not read)",
        {"rgb": (SCENE + rf"rgb/{NAME}\.(?:png|jpg)", SCENE + r"(?P<name>\d+)_rgb\.(?:png|jpg)"),
         "depth": (SCENE + rf"depth/{NAME}\.png", SCENE + r"(?P<name>\d+)_depth\.png")},
        depth_unit=0.001, focal=518.86, width=640),
    "hypersim": Format(
        "<scene>/images/scene_cam_<c>_{final_preview,geometry_hdf5}/frame.<n>.*: .hdf5 (pip install h5py) or "
        ".npy of the same stem; depth along the ray becomes depth along the axis",
        {"rgb": (SHOT + r"final_preview/frame\.(?P<name>\d+)\.tonemap\.jpg",
                 SHOT + r"final_preview/frame\.(?P<name>\d+)\.color\.jpg"),
         "depth": (SHOT + r"geometry_hdf5/frame\.(?P<name>\d+)\.depth_meters\.npy",
                   SHOT + r"geometry_hdf5/frame\.(?P<name>\d+)\.depth_meters\.hdf5"),
         "normal": (SHOT + r"geometry_hdf5/frame\.(?P<name>\d+)\.normal_cam\.npy",
                    SHOT + r"geometry_hdf5/frame\.(?P<name>\d+)\.normal_cam\.hdf5")},
        focal=886.81, width=1024, along_ray=True),
    "camvid": Format(
        "<split>/{color,label}/<name>, or <split>/<name>.png and <split>annot/<name>.png; 11 is void",
        {"rgb": (SCENE + rf"color/{NAME}\.(?:png|jpg)", rf"(?P<scene>train|val|test)/{NAME}\.png"),
         "seg": (SCENE + rf"label/{NAME}\.png", rf"(?P<scene>train|val|test)annot/{NAME}\.png")},
        palette=CAMVID, void=11),
    "cityscapes": Format(
        "leftImg8bit/<split>/<city>/*, gtFine/..._labelIds.png as the 19 training classes, and disparity/ "
        "where it is there, written as level - 1, 1/256 px each",
        {"rgb": (rf"leftImg8bit/{CITY}{NAME}_leftImg8bit\.png",),
         "depth": (rf"disparity/{CITY}{NAME}_disparity\.png",),
         "seg": (rf"gtFine/{CITY}{NAME}_gtFine_labelIds\.png",)},
        depth_space="disparity", focal=2262.52, width=2048, palette=CITYSCAPES, labels=TRAIN_IDS),
}


def layouts():
    """What lies below --root, format by format, for --help."""
    rows = [textwrap.fill(row.layout, 106, initial_indent=f"  {name:12s}", subsequent_indent=" " * 14)
            for name, row in FORMATS.items()]
    return "\n".join(["What lies below --root (FORMATS of formats.py):", *rows])


# ------------------------------------------------------------------------------------------------
# Frames.

class Frame(NamedTuple):
    """A picture and its maps."""
    scene: str     # the folder that it is written into
    name: str
    number: int    # of --frames; None: its name has none
    files: dict    # {modality: path}


def number_of(name):
    """The last number in a name, None where there is none."""
    digits = re.findall(r"\d+", name)
    return int(digits[-1]) if digits else None


def find_frames(root, row, scene=None):
    """The frames below a root of a Format -> [Frame] in order, and {why: how many} of what was left out.

    scene: the folder of all of them; None: each scene's own, else the root's name. Raises InputError where
    there is none, and where a given scene would unite several.
    """
    check(root.is_dir(), f"--root {root}: no such folder")
    paths = {path.relative_to(root).as_posix(): path for path, why in walk(root) if why is None}
    found = {m: _matching(paths, patterns) for m, patterns in row.files.items()}
    found = {m: files for m, files in found.items() if files}
    missing = " and no ".join(m for m in row.files if m not in found)
    check("rgb" in found and len(found) > 1, f"--root {root}: has no {missing} of this format among its "
          f"{len(paths)} files; --help shows how they must lie")
    if row.within is not None:
        found["depth"] = _nearest_in_time(found["rgb"], found["depth"], row.within)
    keys, left = _common(found)
    check(keys, f"--root {root}: none of its {len(found['rgb'])} pictures has {' and '.join(found)}; "
          "--help shows how they must lie")
    scenes = sorted({key[0] for key in keys})
    check(scene is None or len(scenes) == 1, f"--scene {scene}: would unite {len(scenes)} scenes "
          f"({', '.join(scenes[:3])}); leave it away, or give one of them as --root")
    frames, places = [], {}
    for key in sorted(keys, key=_in_order):
        place = places[key[0]] = places.get(key[0], -1) + 1
        number = number_of(key[2]) if row.within is None else place
        files = {m: found[m][key] for m in found}
        folder = scene or key[0] or root.resolve().name or "scene"
        frames.append(Frame(folder, "_".join(filter(None, key[1:])), number, files))
    return frames, left


def _in_order(key):
    return [natural(part) for part in key]


def _matching(paths, patterns):
    """{(scene, view, name): path} of {name below the root: path} that fit a pattern, the first one before."""
    found = {}
    for pattern in map(re.compile, patterns):
        for below, path in paths.items():
            fit = pattern.fullmatch(below)
            if fit:
                named = fit.groupdict()
                found.setdefault((named["scene"] or "", named.get("view") or "", named["name"]), path)
    return found


def _common(found):
    """{modality: {key: path}} -> the keys that all have, and {why: how many} of the others."""
    keys, left = set.intersection(*map(set, found.values())), {}
    for m, files in found.items():
        alone = len(files.keys() - keys)
        if alone:
            others = " or ".join(other for other in found if other != m)
            left[f"{m} without {others}"] = alone
    return keys, left


def _nearest_in_time(colour, depth, within):
    """Depth files by the keys of the pictures of their scene, each once, the nearest in time first."""
    paired = {}
    for scene in {key[0] for key in colour} & {key[0] for key in depth}:
        ours, theirs = (sorted(key for key in keys if key[0] == scene) for keys in (colour, depth))
        apart = np.abs(np.subtract.outer([_seconds(key) for key in ours], [_seconds(key) for key in theirs]))
        near, taken = np.argwhere(apart <= within), set()
        for i, j in near[np.argsort(apart[tuple(near.T)], kind="stable")]:
            if ours[i] not in paired and j not in taken:
                paired[ours[i]] = depth[theirs[j]]
                taken.add(j)
    return paired


def _seconds(key):
    return float(key[2])


def pair_folders(folders, scene=None):
    """The frames of {modality: folder} -> as find_frames: files of equal names, or, where no names are
    equal, of equal order. Raises InputError where neither fits.
    """
    found = {m: pictures_by_stem(folder) for m, folder in folders.items()}
    keys, left = _common(found)
    if not keys:
        counts = {m: len(files) for m, files in found.items()}
        said = ", ".join(f"{count} of {folders[m]}" for m, count in counts.items())
        check(len(set(counts.values())) == 1, f"{folders['rgb']}: the names differ, and so do the numbers "
              f"of files: {said}; give equal names, or files of the same frames")
        ordered = {m: sorted(files, key=natural) for m, files in found.items()}
        keys, left = ordered["rgb"], {}
        found = {m: {key: files[own] for key, own in zip(keys, ordered[m])} for m, files in found.items()}
        first = " with ".join(str(files[keys[0]]) for files in found.values())
        say(f"names differ, {len(keys)} of each: paired by their order, {first} first")
    scene = scene or folders["rgb"].resolve().parent.name or "scene"
    return [Frame(scene, name, number_of(name), {m: found[m][name] for m in found})
            for name in sorted(keys, key=natural)], left


def pick(frames, span, every):
    """The frames of numbers in span (first, last), both ends in, None for all; of those of each scene every
    `every`-th. Raises InputError where there is none.
    """
    if span is not None:
        bare = [frame for frame in frames if frame.number is None]
        check(not bare, f"--frames: {bare[0].files['rgb'] if bare else ''} has no number in its name; leave "
              "--frames away")
        numbers = [frame.number for frame in frames]
        frames = [frame for frame in frames if span[0] <= frame.number <= span[1]]
        check(frames, f"--frames {span[0]}:{span[1]}: matches none of the {len(numbers)} frames, they are "
              f"numbered from {min(numbers)} to {max(numbers)}")
    picked, places = [], {}
    for frame in frames:
        place = places[frame.scene] = places.get(frame.scene, -1) + 1
        if place % every == 0:
            picked.append(frame)
    return picked
