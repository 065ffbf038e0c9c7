"""Stage 1: depth, normals and segments of photos from teacher networks, in the layout of prep_latents.py.

    python pseudo_label.py --images photos --out data/mine \\
        --depth hf:depth-anything/Depth-Anything-V2-Large-hf \\
        --normal hub:Stable-X/StableNormal:StableNormal --seg hf:facebook/sam-vit-huge
    torchrun --nproc_per_node=8 -- pseudo_label.py --images imagenet_mm/rgb --out imagenet_mm \\
        --seg py:my_teachers:segments

A teacher is hf:MODEL (a transformers pipeline), hub:OWNER/REPOSITORY:ENTRY (torch.hub), py:FILE.py:FUNCTION
or py:MODULE:FUNCTION (yours). MODEL and OWNER/REPOSITORY may be local folders. Options of ENTRY stand behind
it, as in hub:../StableNormal:StableNormal,local_cache_dir=weights. hub: and py: run the code that they name.
ENTRY makes a model that is called as a function; a function takes a PIL image and returns
  --depth   (H, W) disparity, larger is nearer (--depth-space depth: depth)
  --normal  (H, W, 3): +x left, +y up, +z towards the viewer, as floats in [-1, 1] or uint8 xyz * 0.5 + 0.5
  --seg     masks (K, H, W) bool, labels (H, W), or colours uint8 (H, W, 3)
Writes OUT/{rgb,depth,normal,seg}/<class>/<name>.png, and OUT/tree.json, which says what they hold. What is
there is kept, unless its photo has changed: the same command continues an interrupted run.
"""
import ast
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import os
import pathlib
import re
import sys
import sysconfig
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from distributed import (InputError, barrier, check, check_folder, command_parser, reading, run, say,
                         setup, sha256)
from images import fill_unknown, unit
from locks import only_writer
from modalities import MODALITIES, looks_encoded, photo_of, read_rgb, write_facts, write_picture
from trees import find_pictures, stem_of


# ------------------------------------------------------------------------------------------------
# Teachers: functions from a PIL image to an array.

def _depth(pipeline, image):
    return pipeline(image)["predicted_depth"].squeeze().float().cpu().numpy()


def _masks(pipeline, image):
    masks = [np.asarray(mask) for mask in pipeline(image)["masks"]]
    return np.array(masks, bool).reshape(-1, image.height, image.width)  # there may be none


def load_teacher(modality, name, device):
    """The function that a flag of LABELS names. Raises InputError when it cannot be loaded."""
    kind, _, rest = name.partition(":")
    flag = f"--{modality} {name}"
    pipeline = LABELS[modality].pipeline
    if kind == "hf" and pipeline:
        try:
            import transformers
        except ImportError as error:
            raise InputError(f"{flag}: needs transformers; pip install transformers") from error
        task, function = pipeline
        with reading(flag, "check the model's name or folder"):
            return functools.partial(function, transformers.pipeline(task, model=rest, device=device))
    hf = "hf:MODEL, " if pipeline else ""
    check(kind in ("hub", "py"), f"{flag}: a teacher is {hf}hub:OWNER/REPOSITORY:ENTRY, hub:FOLDER:ENTRY, "
          "py:FILE.py:FUNCTION or py:MODULE:FUNCTION")
    return hub_teacher(rest, flag, device) if kind == "hub" else py_teacher(rest, flag)


HUB = re.compile(r"(?P<place>.+?):(?P<entry>[^\W\d]\w*)(?P<options>(,\w+=[^,]*)*)")


def hub_teacher(text, flag, device):
    """What the entry of a hubconf.py makes; text: FOLDER:ENTRY or OWNER/REPOSITORY:ENTRY, behind it options
    as ,KEY=VALUE, Python's literals or else texts. Raises InputError when it cannot be had.
    """
    found = HUB.fullmatch(text)
    check(found, f"{flag}: the form is hub:OWNER/REPOSITORY:ENTRY or hub:FOLDER:ENTRY, and behind it options "
          "as ,KEY=VALUE")
    place, folder, told = found["place"], pathlib.Path(found["place"]), found["options"].split(",")[1:]
    options = {key: literal(value) for key, _, value in (option.partition("=") for option in told)}
    source, remedy = "github", "check OWNER/REPOSITORY:ENTRY, or give the folder of a checkout"
    if folder.is_dir():
        check((folder / "hubconf.py").is_file(), f"{flag}: {folder} has no hubconf.py; give a checkout that "
              "has one, or a function of yours as py:FILE.py:FUNCTION")
        place, source, remedy = str(folder.resolve()), "local", "check the entry, its options and its weights"
    else:
        check(re.fullmatch(r"[\w-]+/[\w.-]+(:[^:]+)?", place), f"{flag}: {place} is no folder, and not "
              "OWNER/REPOSITORY")
    say(f"{flag}: runs the code of {place}")
    load = functools.partial(torch.hub.load, place, found["entry"], source=source, trust_repo=True)
    with reading(flag, remedy):
        try:
            return load(**{"device": str(device), **options})
        except TypeError:  # an entry that takes no device
            return load(**options)


def literal(text):
    """A value of Python's, as 3, 0.5 or True; any other text as it is."""
    with contextlib.suppress(ValueError, SyntaxError, TypeError):
        return ast.literal_eval(text)
    return text


def py_teacher(text, flag):
    """A function of MODULE:FUNCTION, a module that is found from the current folder, or of FILE.py:FUNCTION,
    which may import what lies beside it. Raises InputError when it cannot be had.
    """
    name, _, function = text.rpartition(":")
    file = pathlib.Path(name).resolve()
    with reading(flag, "the form is py:FILE.py:FUNCTION, or py:MODULE:FUNCTION, found from this folder"):
        if file.suffix == ".py":
            check(file.is_file(), f"{flag}: {file}: no such file")
            say(f"{flag}: runs the code of {file}")
            return getattr(module_of(file), function)
        sys.path.insert(0, os.getcwd())
        return getattr(importlib.import_module(name), function)


@functools.cache
def module_of(file):
    """The module of a file, run once for all its functions; what it imports lies beside it, whatever modules
    of these names there are.
    """
    beside = {path.stem for path in file.parent.glob("*.py")}
    beside |= {path.parent.name for path in file.parent.glob("*/__init__.py")}
    others = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in beside}
    installed = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib"))
    others = {name: module for name, module in others.items()
              if not str(getattr(module, "__file__", None) or installed[0]).startswith(installed)}
    for name in others:
        del sys.modules[name]
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(f"teacher_{abs(hash(file))}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.update(others)
    return module


# ------------------------------------------------------------------------------------------------
# What a teacher returned -> a PIL image of the photo's size; seed: of the photo's name; space: of the depth
# that was returned. Each raises ValueError for what does not fit.

def _fitting(array, wanted):
    """Raise ValueError unless the array has so many dimensions, of finite numbers."""
    finite = array.dtype.kind in "iu" or (array.dtype.kind == "f" and bool(np.isfinite(array).all()))
    if array.ndim != wanted or not finite:
        form = {2: "(h, w)", 3: "(h, w, 3)"}[wanted]
        raise ValueError(f"{array.dtype} {array.shape}, finite: {finite}; return finite numbers {form}")


def depth_picture(array, size, seed=0, space="disparity"):
    """(h, w) disparity, or depth for space "depth" -> 16 bits from the farthest to the nearest."""
    _fitting(array, 2)
    disparity = array.astype(np.float64)
    if space == "depth":
        known = disparity > 0
        disparity = fill_unknown(np.where(known, 1 / np.where(known, disparity, 1), 0), known)
    scaled = (disparity - disparity.min()) / max(np.ptp(disparity), 1e-12)
    smooth = Image.fromarray(scaled.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    return Image.fromarray((np.asarray(smooth, np.float64) * 65535).round().astype(np.uint16))


def normal_picture(array, size, seed=0, space=None):
    """(h, w, 3), floats in [-1, 1] or uint8."""
    _fitting(array, 3)
    if array.dtype.kind != "f" and array.dtype != np.uint8:
        raise ValueError(f"{array.dtype}; return floats in [-1, 1], or uint8")
    if array.dtype.kind == "f" and looks_encoded(array):
        raise ValueError("values in [0, 1] that are no unit vectors; return xyz in [-1, 1], or uint8")
    if array.dtype != np.uint8:
        array = MODALITIES["normal"].picture(unit(array))
    return Image.fromarray(array).resize(size, Image.Resampling.BILINEAR)


def seg_picture(array, size, seed=0, space=None):
    """Masks (K, h, w), labels (h, w) or colours (h, w, 3 or 4); masks and labels take colours by the seed."""
    if array.ndim == 3 and array.shape[2] == 4 and array.dtype == np.uint8:
        array = array[..., :3]  # colours with alpha
    if array.ndim < 3 or array.shape[2] != 3:
        if array.dtype.kind not in "iub":
            raise ValueError(f"{array.dtype} {array.shape}; masks are bool, labels whole numbers")
    masks = array.ndim == 3 and array.shape[2] != 3 or array.dtype == bool
    if masks and array.ndim == 3:
        ratio = array.shape[2] * size[1] / max(1, array.shape[1] * size[0])  # 1: of the photo's shape
        if abs(ratio - 1) > 0.05:
            raise ValueError(f"{array.dtype} {array.shape}; masks are (K, H, W), labels (H, W)")
    if masks:
        array = paint(array.reshape(-1, *array.shape[-2:]).astype(bool), seed)
    elif array.ndim == 2:
        array = paint(np.stack([array == k for k in np.unique(array)]), seed)
    if array.ndim != 3 or array.dtype != np.uint8:
        raise ValueError(f"{array.dtype} {array.shape}; masks are (K, h, w), labels (h, w), colours uint8")
    return Image.fromarray(array).resize(size, Image.Resampling.NEAREST)


def paint(masks, seed):
    """Masks (K, H, W) bool -> uint8 (H, W, 3): painted in descending area, each in a random colour; black
    where none is.
    """
    rng = np.random.default_rng(seed)
    picture = np.zeros((*masks.shape[1:], 3), np.uint8)
    for k in np.argsort(-masks.sum((1, 2)), kind="stable"):
        picture[masks[k]] = rng.integers(0, 256, 3)
    return picture


class Label(NamedTuple):
    """What teachers of a modality make."""
    picture: object         # the function
    facts: dict = {}        # what tree.json says of it
    pipeline: tuple = None  # of transformers: its task, and the function (pipeline, image) -> array


LABELS = {
    "depth": Label(depth_picture, {"depth_space": "disparity"}, ("depth-estimation", _depth)),
    "normal": Label(normal_picture),
    "seg": Label(seg_picture, {"seg_mode": "instance"}, ("mask-generation", _masks)),
}


def to_picture(modality, array, size, stem, depth_space):
    """What a teacher returned -> a PIL image of this size."""
    seed = int.from_bytes(hashlib.sha256(os.fsencode(stem)).digest()[:8], "little")
    return LABELS[modality].picture(np.asarray(array), size, seed, depth_space)


# ------------------------------------------------------------------------------------------------

def is_of(path, digest):
    """Whether a picture is there and was made of the photo of this content, as far as it says."""
    return path.is_file() and photo_of(path) in (None, digest)


def label_photo(path, stem, out, teachers, depth_space):
    """Write what is missing of one photo, or was made of another one of its name: its modalities first, its
    RGB last. Raises InputError naming the photo.
    """
    with reading(path, "replace or remove it"):
        digest = sha256(path)
    missing = [m for m in teachers if not is_of(out / m / f"{stem}.png", digest)]
    for m in LABELS:
        other = out / m / f"{stem}.png"
        stale = m not in teachers and other.exists() and not is_of(other, digest)
        check(not stale, f"{other}: was made of another photo of this name; name its teacher, too, or "
              "remove it")
    rgb = out / "rgb" / f"{stem}.png"
    inside = path.parent.resolve().is_relative_to((out / "rgb").resolve())  # the file may be a link
    copy = not inside and not is_of(rgb, digest)
    if not missing and not copy:
        return
    image = read_rgb(path)
    for m in missing:
        with reading(f"{path}: what the {m} teacher makes of it", "mend the teacher, or remove the photo"):
            picture = to_picture(m, teachers[m](image), image.size, stem, depth_space)
        write_picture(out / m / f"{stem}.png", picture, digest)
    if copy:
        write_picture(rgb, image, digest)


def remove_own(path):
    """Remove a picture that this command has made, nobody else's."""
    with contextlib.suppress(InputError):  # it is not there, or no picture
        if photo_of(path) is not None:
            path.unlink()


def label(photos, out, teachers, depth_space, skip_broken):
    """Label photos, (stem, path) each; with skip_broken those that fail are listed in out/skipped.txt."""
    for stem, path in photos:
        try:
            label_photo(path, stem, out, teachers, depth_space)
        except InputError as error:
            check(skip_broken, f"{error}, or leave it out with --skip-broken")
            for m in teachers:  # no modality without the others
                remove_own(out / m / f"{stem}.png")
            with open(out / "skipped.txt", "a", errors="backslashreplace") as file:
                file.write(f"{stem}\t{error}\n")


def main():
    """Label every photo that lacks a modality, shared out over the processes. A killed run continues."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--images", type=pathlib.Path, required=True,
        help="folder of photos, <class>/<name>.jpg or flat; OUT/rgb itself is left as it is")
    add("--out", type=pathlib.Path, required=True)
    for modality in LABELS:
        add(f"--{modality}", metavar="TEACHER")
    add("--depth-space", choices=("disparity", "depth"), default="disparity",
        help="what the depth teacher returns")
    add("--skip-broken", action="store_true",
        help="leave out photos that fail and list them in OUT/skipped.txt")
    args = parser.parse_args()
    rank, world, device = setup()
    check(not args.out.resolve().is_relative_to(args.images.resolve()), f"--out {args.out}: lies inside of "
          f"--images {args.images}, its pictures would be taken for photos; use another folder")
    names = {m: getattr(args, m) for m in LABELS if getattr(args, m)}
    for m in names:
        check_folder(args.out / m, [args.images])
    photos = {}
    for path in find_pictures(args.images):
        stem = stem_of(path, args.images)
        check(stem not in photos, f"--images {args.images}: the stem {stem} is there twice; keep one")
        photos[stem] = path
    check(names, f"no teacher; name at least one of {', '.join(f'--{m}' for m in LABELS)}")
    said = {key: value for m in names for key, value in LABELS[m].facts.items()}
    if not any((args.out / m).is_dir() for m in LABELS):  # else some maps are of others' making
        said["upright"] = True
    if rank:
        barrier()  # the first process fetches what the others then find on the disk
    teachers = {m: load_teacher(m, name, device) for m, name in names.items()}
    left_out = args.out / "skipped.txt"
    with only_writer(args.out):
        if rank == 0:
            lines = left_out.read_text(errors="replace").splitlines() if left_out.exists() else []
            check(all("\t" in line for line in lines), f"{left_out}: is no list of photos; use another --out")
            left_out.unlink(missing_ok=True)  # what was left out is tried, and listed, again
            write_facts(args.out, **said)
            barrier()
        with torch.inference_mode():
            bar = tqdm(list(photos.items())[rank::world], "label", disable=rank > 0)
            label(bar, args.out, teachers, args.depth_space, args.skip_broken)
        barrier()
    if rank == 0:
        skipped = ""
        if left_out.is_file():
            skipped = (f", some left out: {left_out}; where they lie in {args.out / 'rgb'}, "
                       "take them away before prep_latents.py")
        print(f"{args.out}: {', '.join(names)} of {len(photos)} photos{skipped}")


if __name__ == "__main__":
    run(main)
