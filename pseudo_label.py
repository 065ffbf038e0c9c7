"""Stage 1: depth, normals and segments of photos from teacher networks, in the layout that prep_latents.py reads.

    python pseudo_label.py --images photos --out data/mine --depth hf:depth-anything/Depth-Anything-V2-Large-hf \\
        --normal hub:Stable-X/StableNormal:StableNormal --seg hf:facebook/sam-vit-huge
    torchrun --nproc_per_node=8 pseudo_label.py --images imagenet_mm/rgb --out imagenet_mm --seg py:my_teachers:segments

A teacher is hf:MODEL (a transformers pipeline; MODEL may be a local folder), hub:OWNER/REPOSITORY:ENTRY (torch.hub, which
runs that repository's code) or py:MODULE:FUNCTION. A function takes a PIL image and returns
  --depth   (H, W) disparity, larger is nearer (--depth-space depth: depth)
  --normal  (H, W, 3): +x left, +y up, +z towards the viewer, as floats in [-1, 1] or uint8 xyz * 0.5 + 0.5
  --seg     masks (K, H, W) bool, labels (H, W), or colours uint8 (H, W, 3)
Writes OUT/{rgb,depth,normal,seg}/<class>/<name>.png. What is there is kept: the same command continues an interrupted run.
"""
import argparse
import hashlib
import importlib
import os
import pathlib
import sys

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from distributed import InputError, barrier, run, setup, whole_file
from model import MODALITIES, unit
from prep_latents import EXTENSIONS, read_picture

PIPELINES = {"depth": "depth-estimation", "seg": "mask-generation"}


def load_teacher(modality, name, device):
    """The function image -> array that a --depth, --normal or --seg names. Raises InputError when it cannot be loaded."""
    kind, _, rest = name.partition(":")
    flag = f"--{modality} {name}"
    if kind == "hf" and modality in PIPELINES:
        try:
            import transformers
        except ImportError:
            raise InputError(f"{flag}: needs transformers; pip install transformers")
        try:
            pipeline = transformers.pipeline(PIPELINES[modality], model=rest, device=device)
        except Exception as error:  # hub, configuration and file errors of many kinds
            raise InputError(f"{flag}: {type(error).__name__}: {' '.join(str(error).split())[:120]}; check the model's name or folder")
        if modality == "depth":
            return lambda image: pipeline(image)["predicted_depth"].squeeze().float().cpu().numpy()
        return lambda image: np.array([np.asarray(mask) for mask in pipeline(image)["masks"]], bool).reshape(-1, image.height, image.width)
    if kind == "hub":
        repository, _, entry = rest.partition(":")
        try:
            try:
                predictor = torch.hub.load(repository, entry, trust_repo=True, device=str(device))
            except TypeError:  # an entry that takes no device
                predictor = torch.hub.load(repository, entry, trust_repo=True)
        except Exception as error:  # whatever that repository's code raises
            raise InputError(f"{flag}: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}; the form is hub:OWNER/REPOSITORY:ENTRY")
        return lambda image: np.asarray(predictor(image))
    if kind == "py":
        module, _, function = rest.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            return getattr(importlib.import_module(module), function)
        except Exception as error:  # whatever that module raises
            raise InputError(f"{flag}: {type(error).__name__}: {' '.join(str(error).split())[:120]}; the form is py:MODULE:FUNCTION, found from this folder")
    raise InputError(f"{flag}: a teacher is {'hf:MODEL, ' if modality in PIPELINES else ''}hub:OWNER/REPOSITORY:ENTRY or py:MODULE:FUNCTION")


def paint(masks, seed):
    """Masks (K, H, W) bool -> uint8 (H, W, 3): painted in descending area, each in a random colour; black where none is."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((*masks.shape[1:], 3), np.uint8)
    for k in np.argsort(-masks.sum((1, 2)), kind="stable"):
        picture[masks[k]] = rng.integers(0, 256, 3)
    return picture


def to_picture(modality, array, image, seed, depth_space):
    """What a teacher returned -> a PIL image of the photo's size to be saved. Raises ValueError for what does not fit."""
    array = np.asarray(array)
    if modality == "seg":
        if array.ndim == 3 and array.shape[2] == 4 and array.dtype == np.uint8:
            array = array[..., :3]  # colours with alpha
        if array.ndim == 3 and array.shape[2] != 3 or array.dtype == bool:
            array = paint(array.reshape(-1, *array.shape[-2:]).astype(bool), seed)
        elif array.ndim == 2:
            array = paint(np.stack([array == k for k in np.unique(array)]), seed)
        if array.ndim != 3 or array.dtype != np.uint8:
            raise ValueError(f"{array.dtype} {array.shape}")
        picture = Image.fromarray(array)
        return picture.resize(image.size, Image.Resampling.NEAREST) if picture.size != image.size else picture
    if array.ndim != (2 if modality == "depth" else 3) or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise ValueError(f"{array.dtype} {array.shape}, finite: {bool(np.isfinite(array).all()) if array.dtype.kind == 'f' else True}")
    if modality == "depth":
        disparity = array.astype(np.float64) if depth_space == "disparity" else np.where(array > 0, 1 / np.where(array > 0, array.astype(np.float64), 1), 0)
        scaled = (disparity - disparity.min()) / max(np.ptp(disparity), 1e-12)
        smooth = Image.fromarray(scaled.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
        return Image.fromarray((np.asarray(smooth, np.float64) * 65535).round().astype(np.uint16))
    if array.dtype != np.uint8:
        array = MODALITIES["normal"].picture(unit(array))
    picture = Image.fromarray(array)
    return picture.resize(image.size, Image.Resampling.BILINEAR) if picture.size != image.size else picture


def label_photo(path, stem, out, teachers, depth_space):
    """Write what is missing of one photo: its modalities first, its RGB last. Raises InputError naming the photo."""
    missing = [m for m in teachers if not (out / m / f"{stem}.png").is_file()]
    rgb = out / "rgb" / f"{stem}.png"
    copy = not rgb.is_file() and not path.resolve().is_relative_to((out / "rgb").resolve())
    if not missing and not copy:
        return
    image = read_picture(path)
    if image.mode == "F":  # 16 bits, as [0, 1]
        image = Image.fromarray((np.asarray(image) * 255).round().astype(np.uint8))
    image = image.convert("RGB")
    seed = int.from_bytes(hashlib.sha256(stem.encode()).digest()[:8], "little")
    for m in missing:
        try:
            picture = to_picture(m, teachers[m](image), image, seed, depth_space)
        except Exception as error:  # a teacher may raise anything
            raise InputError(f"{path}: the {m} teacher failed on it ({type(error).__name__}: {str(error)[:120]})")
        with whole_file(out / m / f"{stem}.png") as file:
            picture.save(file, "png")
    if copy:
        with whole_file(rgb) as file:
            image.save(file, "png")


def main():
    """Label every photo that lacks a modality, shared out over the processes. A killed run continues."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=pathlib.Path, required=True, help="folder of photos, <class>/<name>.jpg or flat; OUT/rgb itself is left as it is")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    for modality in ("depth", "normal", "seg"):
        parser.add_argument(f"--{modality}", metavar="TEACHER")
    parser.add_argument("--depth-space", choices=("disparity", "depth"), default="disparity", help="what the depth teacher returns")
    parser.add_argument("--skip-broken", action="store_true", help="leave out photos that fail and list them in OUT/skipped.txt")
    args = parser.parse_args()
    rank, world, device = setup()
    files = [p for p in sorted(args.images.rglob("*")) if p.suffix.lower() in EXTENSIONS and p.suffix != ".npy" and p.is_file()]
    if args.out.resolve().is_relative_to(args.images.resolve()):
        raise InputError(f"--out {args.out}: lies inside of --images {args.images}, its pictures would be taken for photos; use another folder")
    if not files:
        raise InputError(f"--images {args.images}: no pictures in this folder")
    stems = [p.relative_to(args.images).with_suffix("").as_posix() for p in files]
    if len(set(stems)) < len(stems):
        twice = max(set(stems), key=stems.count)
        raise InputError(f"--images {args.images}: the stem {twice} is there twice; keep one")
    names = {m: getattr(args, m) for m in ("depth", "normal", "seg") if getattr(args, m)}
    if not names:
        raise InputError("no teacher; name at least one of --depth, --normal, --seg")
    if rank:
        barrier()  # the first process fetches what the others then find on the disk
    teachers, skipped = {m: load_teacher(m, name, device) for m, name in names.items()}, []
    if rank == 0:
        (args.out / "skipped.txt").unlink(missing_ok=True)  # what was left out is tried, and listed, again
        barrier()
    with torch.inference_mode():
        for path, stem in tqdm(list(zip(files, stems))[rank::world], desc="label", disable=rank > 0):
            try:
                label_photo(path, stem, args.out, teachers, args.depth_space)
            except InputError as error:
                if not args.skip_broken:
                    raise InputError(f"{error}; mend or remove it, or leave it out with --skip-broken")
                skipped.append(f"{stem}\t{error}\n")
                for m in teachers:  # no modality without the others
                    (args.out / m / f"{stem}.png").unlink(missing_ok=True)
    if skipped:
        args.out.mkdir(parents=True, exist_ok=True)
        with open(args.out / "skipped.txt", "a") as file:
            file.writelines(skipped)
    barrier()
    if rank == 0:
        print(f"{args.out}: {', '.join(names)} of {len(files)} photos"
              + (f", some left out: {args.out / 'skipped.txt'}; where they lie in {args.out / 'rgb'}, take them away before prep_latents.py"
                 if (args.out / "skipped.txt").is_file() else ""))


if __name__ == "__main__":
    run(main)
