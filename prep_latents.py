"""Stage 2: encode every modality once into a memory-mapped cache that train.py reads.

    python prep_latents.py --toy 20000                                    # the toy world -> data/cache
    torchrun --nproc_per_node=8 prep_latents.py --data imagenet_mm        # <root>/{rgb,depth,normal,seg}/<class>/<name>.png

The cache is a folder: <modality>.npy float16 (n, 2, C, H, W), mean and log-std of the VAE posterior (unscaled);
dino.npy int8 (n, T, 768), alignment targets for REPA; feature.npy float16 (n, F), with --feature; labels.npy, names.txt, done.npy, meta.json.
An interrupted run continues with the same command. Blocks of --batch-size consecutive rows are encoded
together whatever the number of processes, so that the cache depends on neither it nor on interruptions.
"""
import argparse
import concurrent.futures
import hashlib
import io
import json
import os
import pathlib
import pickle
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError
from scipy import ndimage
from tqdm import tqdm

import toy_scenes
from distributed import InputError, barrier, run, setup, whole_file
from model import MODALITIES, unit
from vae import load_vae, sha256

FORMAT = "mmgen-cache-1"
META_KEYS = ("modalities", "vae", "vae_sha256", "scale", "latent_channels", "latent_size", "resolution", "count", "num_classes",
             "class_names", "palette", "grid", "teacher", "names_sha256", "seg_mode", "depth_space", "batch_size")
DEFAULT_CACHE = pathlib.Path("data/cache")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".npy")
MAX_PIXELS = 100_000_000  # a larger picture is refused before it is decoded
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


# ------------------------------------------------------------------------------------------------
# Pictures of any kind -> arrays.

def read_picture(path):
    """A picture file as PIL image in mode RGB or, for a single channel of more than 8 bits, F with values in [0, 1].

    Orientation tags are applied, transparency is laid over white, CMYK and palettes are converted.
    Raises InputError naming the file when it is missing, empty, cut short, too large or no picture.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"{path}: {image.width}x{image.height} is over {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller")
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":  # 16-bit files arrive as I;16 or I
                values = np.asarray(image, np.float32)
                if not np.isfinite(values).all():
                    raise InputError(f"{path}: holds values that are not finite; replace them")
                fixed = image.mode.startswith("I") and values.max() <= 65535
                picture = Image.fromarray(values.clip(0) / (65535 if fixed else max(float(values.max()), 1e-8)))
                picture.info["scale"] = "16 bit" if fixed else "own"
                return picture
            if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file")
    except Image.DecompressionBombError:
        raise InputError(f"{path}: over {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller")
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        size = pathlib.Path(path).stat().st_size
        raise InputError(f"{path}: not a readable picture ({size} bytes: {error}); replace or remove it")


def centre_crop(image, size):
    """ADM's centre crop of a PIL image to size x size: halve by boxes, then bicubic (nearest, bilinear below), then crop."""
    flat = image.info.get("flat", False)
    if flat:
        resample, reducing = Image.Resampling.NEAREST, Image.Resampling.NEAREST
    else:
        resample = Image.Resampling.BILINEAR if image.mode == "F" else Image.Resampling.BICUBIC
        reducing = Image.Resampling.BOX
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), reducing)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_array(path):
    """An .npy array of numbers, not empty. Raises InputError for anything else."""
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or not array.size:
            raise ValueError(f"{getattr(array, 'dtype', type(array).__name__)} {getattr(array, 'shape', '')}")
        return array
    except FileNotFoundError:
        raise InputError(f"{path}: no such file")
    except Exception as error:  # numpy raises many kinds for a foreign or damaged file
        raise InputError(f"{path}: not a readable .npy array of numbers ({type(error).__name__}: {str(error)[:80]}); make it again")


def read_modality(path, modality, fit, depth_space="disparity"):
    """A file of one modality as the registry's array; fit maps a PIL image (RGB, or F per channel) to the wanted size.

    colour, flat: uint8 (H, W, 3); vector: float32 (H, W, 3) in [-1, 1]; scalar: float32 (H, W), depth as disparity of any
    scale, others in [0, 1] from pictures of 8 and 16 bits, of an .npy as it is.
    Raises InputError for unreadable files, non-finite values and wrong shapes.
    """
    kind, path = MODALITIES[modality].file, pathlib.Path(path)
    if path.suffix == ".npy":
        array = read_array(path).astype(np.float32)
        wanted = 2 if kind == "scalar" else 3
        limit = {"scalar": np.inf, "vector": 1.01}.get(kind, 255)
        if array.ndim != wanted or (wanted == 3 and array.shape[2] != 3) or not array.size or not np.isfinite(array).all() or np.abs(array).max() > limit:
            raise InputError(f"{path}: shape {array.shape}, largest value {np.abs(array).max(initial=0):.4g}; {modality} needs "
                             f"(H, W{', 3' if wanted == 3 else ''}) of finite values up to {limit}")
        channels = [Image.fromarray(np.ascontiguousarray(c)) for c in (array[None] if wanted == 2 else array.transpose(2, 0, 1))]
        for channel in channels:
            channel.info["flat"] = kind == "flat"
    else:
        image = read_picture(path)
        image.info["flat"] = kind == "flat"
        channels = [image]
    if kind == "scalar":
        if modality != "depth" and path.suffix != ".npy" and channels[0].info.get("scale") == "own":
            raise InputError(f"{path}: a picture of floats or of 32 bits has no fixed scale; give {modality} as 8 or 16 bits, or as .npy")
        grey = channels[0] if channels[0].mode == "F" else channels[0].convert("L")
        value = np.asarray(fit(grey), np.float32)
        if modality == "depth":
            return np.where(value > 0, 1 / np.where(value > 0, value, 1), 0) if depth_space == "depth" else value
        return value / 255 if grey.mode == "L" else value
    if channels[0].mode == "F":
        array = np.stack([np.asarray(fit(c)) for c in channels], -1)
        if path.suffix != ".npy":  # a 16-bit grey picture where colours are expected
            array = np.repeat(array * 255, 3, 2)
        if kind != "vector" or path.suffix != ".npy":
            array = array.round().clip(0, 255).astype(np.uint8)
    else:
        array = np.asarray(fit(channels[0]))
    if kind != "vector":
        return array
    vector = array.astype(np.float32) / 127.5 - 1 if array.dtype == np.uint8 else array
    return unit(vector)  # resizing shortens them


def file_pixels(path, modality, fit, depth_space="disparity"):
    """A file of one modality as the network's pixels, float32 (3, H, W). Raises InputError as read_modality, and for values out of [-1, 1]."""
    pixels = MODALITIES[modality].to_pixels(read_modality(path, modality, fit, depth_space))
    if np.abs(pixels).max() > 1.01:
        raise InputError(f"{path}: {modality} becomes pixels from {pixels.min():.3g} to {pixels.max():.3g}, they must lie in [-1, 1]; {MODALITIES[modality].meaning}")
    return pixels


def nearest_colour(image, colours):
    """uint8 (H, W, 3) -> index (H, W) of the nearest of colours (K, 3)."""
    distance = [((image.astype(np.int32) - c.astype(np.int32)) ** 2).sum(-1) for c in np.asarray(colours)]
    return np.argmin(distance, 0)


def segments(image, least=0.0005, small=32, radius=24):
    """Flat colours uint8 (H, W, 3), or labels (H, W) -> segment index (H, W).

    At most 256 distinct colours are taken as they are. Else (a decoded picture): median 5x5, then again and again the
    fullest bin of 5 bits a channel, refined to the mean of the colours within `radius`, until it holds less than `least`
    of the pixels; each pixel takes its nearest colour; components under `small` pixels take their neighbours'.
    """
    packed = image.astype(np.int64) if image.ndim == 2 else image.astype(np.int64) @ [65536, 256, 1]
    distinct, index = np.unique(packed, return_inverse=True)
    if len(distinct) <= 256 or image.ndim == 2:
        return index.reshape(image.shape[:2])
    smooth = ndimage.median_filter(image, (5, 5, 1)).reshape(-1, 3).astype(np.float32)
    left, centres = smooth, []
    while len(left):
        bins = (left.astype(np.int64) >> 3) @ [1024, 32, 1]
        counts = np.bincount(bins)
        if counts.max() < least * len(smooth):
            break
        centre = left[bins == counts.argmax()].mean(0)
        for _ in range(2):
            near = ((left - centre) ** 2).sum(1) <= radius ** 2
            centre = left[near].mean(0)
        near = (((left - centre) ** 2).sum(1) <= radius ** 2) | (bins == counts.argmax())
        centres.append(centre)
        left = left[~near]
    index = nearest_colour(smooth.reshape(image.shape), np.array(centres))
    debris = np.zeros(index.shape, bool)
    for k in range(len(centres)):
        parts, _ = ndimage.label(index == k)
        debris |= (np.bincount(parts.ravel()) < small)[parts] & (parts > 0)
    if debris.any() and not debris.all():
        index = index[tuple(ndimage.distance_transform_edt(debris, return_distances=False, return_indices=True))]
    return np.unique(index, return_inverse=True)[1].reshape(index.shape)


# ------------------------------------------------------------------------------------------------
# Sources: names, labels, classes, and load(i) -> {modality: pixels (3, S, S)}, scene or None.

class ToySource:
    def __init__(self, args):
        self.start = 0 if args.toy_start is None else args.toy_start
        if self.start < toy_scenes.HELD_OUT < self.start + args.toy:
            raise InputError(f"--toy-start {self.start} --toy {args.toy}: runs into the held-out seeds from {toy_scenes.HELD_OUT} on")
        if self.start < 0:
            raise InputError(f"--toy-start {self.start}: seeds start at 0")
        self.size, self.modalities = args.size, args.modalities or ("rgb", "depth", "normal", "seg")
        unknown = [m for m in self.modalities if m not in toy_scenes.MAPS and not MODALITIES[m].derive]
        if unknown:
            raise InputError(f"--toy with --modalities {unknown[0]}: the toy world has {', '.join(toy_scenes.MAPS)}, and what a row of MODALITIES derives from the RGB; give files with --data")
        self.names = [str(seed) for seed in range(self.start, self.start + args.toy)]
        self.classes, self.palette = toy_scenes.CLASSES, toy_scenes.PALETTE.tolist()
        self.labels = None  # known once rendered
        self.describe = dict(source="toy", seg_mode="semantic", depth_space="disparity")

    def load(self, i):
        scene = toy_scenes.render(self.start + i, self.size)
        arrays = toy_scenes.maps(scene)
        arrays.update({m: MODALITIES[m].derive(arrays["rgb"]) for m in self.modalities if MODALITIES[m].derive})
        return {m: MODALITIES[m].to_pixels(arrays[m]) for m in self.modalities}, scene


class FolderSource:
    def __init__(self, args):
        self.root, self.size, self.depth_space = args.data, args.size, args.depth_space
        found = [m for m in MODALITIES if (self.root / m).is_dir()]
        self.modalities = args.modalities or tuple(found)
        missing = [m for m in self.modalities if m not in found and not MODALITIES[m].derive]
        if "rgb" not in found or missing:
            raise InputError(f"{self.root / (missing or ['rgb'])[0]}: no such folder; --data needs <root>/rgb/<class>/<name>.png "
                             f"and one folder for each of --modalities (found: {', '.join(found) or 'none'})")
        self.files = {m: self._index(m) for m in self.modalities if m in found}
        self.names = sorted(self.files["rgb"])
        if not self.names:
            raise InputError(f"{self.root / 'rgb'}: no pictures; the layout is rgb/<class>/<name>.png")
        for m in self.files:
            odd = sorted(self.files[m].keys() ^ self.files["rgb"].keys())
            if odd:
                here, there = (m, "rgb") if odd[0] in self.files[m] else ("rgb", m)
                raise InputError(f"{self.files[here][odd[0]]}: no file with this stem in {self.root / there} "
                                 f"({len(odd)} such); every modality needs the same stems")
        folders = [pathlib.PurePosixPath(name).parent.as_posix() for name in self.names]
        self.classes = tuple(sorted(set(folders)))
        index = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([index[f] for f in folders], np.int64)
        self.palette = None
        self.describe = dict(source="folder", seg_mode=args.seg_mode, depth_space=args.depth_space)

    def _index(self, modality):
        base, files = self.root / modality, {}
        for path in sorted(base.rglob("*")):
            if path.suffix.lower() in EXTENSIONS and path.is_file():
                stem = path.relative_to(base).with_suffix("").as_posix()
                if stem in files:
                    raise InputError(f"{path}: the stem {stem} is there twice ({files[stem].name}); keep one")
                files[stem] = path
        return files

    def load(self, i):
        """Row i -> its pixels {modality: (3, S, S) in [-1, 1]}, None (a toy source has the scene). InputError for a broken file or maps of another aspect."""
        pixels, sizes = {}, {}
        for m in self.modalities:
            if m not in self.files:  # computed from the RGB
                pixels[m] = MODALITIES[m].to_pixels(MODALITIES[m].derive(MODALITIES["rgb"].from_pixels(pixels["rgb"])))
                continue

            def fit(image):
                sizes[m] = image.width / image.height
                return centre_crop(image, self.size)
            path = self.files[m][self.names[i]]
            pixels[m] = file_pixels(path, m, fit, self.depth_space)
            if abs(sizes[m] / sizes["rgb"] - 1) > 0.02:
                raise InputError(f"{path}: aspect {sizes[m]:.3f}, its RGB has {sizes['rgb']:.3f}; the maps would not align")
        return pixels, None


# ------------------------------------------------------------------------------------------------
# Alignment targets.

class Dino:
    """DINOv2-B/14 patch tokens after the final norm, 14 px per token (224 px for a 16x16 grid)."""

    id = "dinov2-vitb14"

    def __init__(self, file, grid, device):
        import timm
        overlay = dict(file=str(file)) if file else None
        if file and not pathlib.Path(file).is_file():
            raise InputError(f"--dino {file}: no such file; give vit_base_patch14_dinov2 weights or --no-dino")
        try:
            self.model = timm.create_model("vit_base_patch14_dinov2.lvd142m", pretrained=True, img_size=14 * grid,
                                           num_classes=0, pretrained_cfg_overlay=overlay).to(device).eval()
        except (OSError, RuntimeError, LookupError, ValueError, TypeError, SafetensorError, pickle.UnpicklingError) as error:
            raise InputError(f"DINOv2 weights: {type(error).__name__} for {file or 'timm/vit_base_patch14_dinov2.lvd142m'}; "
                             "pass a local file with --dino FILE, or --no-dino to train without REPA")
        self.grid, self.device = grid, device

    def __call__(self, rgb, scenes):
        """rgb (B, 3, S, S) in [-1, 1] -> (B, T, 768)."""
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = F.interpolate(((rgb.to(self.device) + 1) / 2 - mean) / std, 14 * self.grid, mode="bicubic")
        return self.model.forward_features(x)[:, 1:].float().cpu().numpy()  # without the class token


class ToyTeacher:
    id = "toy-teacher"

    def __init__(self, grid):
        self.grid = grid

    def __call__(self, rgb, scenes):
        return np.stack([toy_scenes.teacher(scene, self.grid) for scene in scenes])


class Feature:
    """One vector of a whole image for MT-Diffusion: what a timm model pools (DINOv2's class token; of CLIP the pooled token before its projection)."""

    def __init__(self, name, file, device):
        import timm
        try:
            overlay = dict(file=str(file)) if file else None
            self.model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay).to(device).eval()
        except (OSError, RuntimeError, LookupError, ValueError, TypeError, SafetensorError, pickle.UnpicklingError) as error:
            raise InputError(f"--feature {name}: {type(error).__name__} ({' '.join(str(error).split())[:100]}); check the timm name, or pass its weights with --feature-file FILE")
        self.id, self.size, self.device = name, self.model.num_features, device

    def __call__(self, rgb, scenes):
        """rgb (B, 3, S, S) in [-1, 1] -> (B, F)."""
        config = self.model.pretrained_cfg
        mean, std = (torch.tensor(config[key], device=self.device).view(3, 1, 1) for key in ("mean", "std"))
        x = F.interpolate(((rgb.to(self.device) + 1) / 2 - mean) / std, config["input_size"][1:], mode="bicubic", antialias=True)
        return self.model(x).float().cpu().numpy()


class ToyFeature:
    """The toy world's: its teacher's mean over the picture."""

    id, size = "toy-teacher", 768

    def __call__(self, rgb, scenes):
        return np.stack([toy_scenes.teacher(scene, 1)[0] for scene in scenes])


def to_int8(tokens):
    """Each token scaled so that its largest entry is 127: a cosine needs no scale."""
    return (tokens / np.maximum(np.abs(tokens).max(-1, keepdims=True), 1e-8) * 127).round().astype(np.int8)


def to_unit(vectors):
    """Vectors (B, F) as float16 of mean square 1: what MT-Diffusion's squared error is measured in."""
    return (vectors / np.maximum(np.sqrt((vectors ** 2).mean(-1, keepdims=True)), 1e-8)).astype(np.float16)


# ------------------------------------------------------------------------------------------------

def encode(vae, pixels, device):
    """Pixels (B, 3, S, S) -> float16 (B, 2, C, H, W), mean and log-std; without a VAE uint8 pixels (B, 3, S, S)."""
    if vae is None:
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    mean, logvar = vae.encode(pixels.to(device))
    return torch.stack([mean, logvar / 2], 1).half().cpu().numpy()


def latents(batch, modalities, posterior, scale, channels):
    """Cached rows -> x0 (n, M*C, H, W): posterior samples times scale; uint8 pixels as they are; zeros where absent."""
    parts = []
    for m, xi in zip(modalities, posterior.split(channels, 1)):
        if m not in batch:
            parts.append(torch.zeros_like(xi))
        elif batch[m].dtype == torch.uint8:
            parts.append(batch[m].float() / 127.5 - 1)
        else:
            mean, log_std = batch[m].float().unbind(1)
            parts.append((mean + log_std.exp() * xi) * scale)
    return torch.cat(parts, 1)


def load_block(rows, source, skip_broken):
    """The pixels of one block of rows -> [(pixels, scene)], {broken row: why}.

    A broken row keeps its place (as zeros), so that the other rows of its block are encoded as ever.
    """
    loaded, broken = [], {}
    for i in rows:
        try:
            loaded.append(source.load(i))
        except InputError as error:
            if not skip_broken:
                raise InputError(f"{error}; --skip-broken leaves such files out")
            broken[i] = str(error)
            loaded.append(({m: np.zeros((3, source.size, source.size), np.float32) for m in source.modalities}, None))
    return loaded, broken


def entries(loaded, modalities, vae, teacher, feature, device):
    """Loaded rows -> {file stem: array of the block}."""
    pixels = {m: torch.from_numpy(np.stack([p[m] for p, _ in loaded])) for m in modalities}
    out = {m: encode(vae, pixels[m], device) for m in modalities}
    if teacher is not None:
        out["dino"] = to_int8(teacher(pixels["rgb"], [scene for _, scene in loaded]))
    if feature is not None:
        out["feature"] = to_unit(feature(pixels["rgb"], [scene for _, scene in loaded]))
    if loaded[0][1] is not None:
        out["labels"] = np.array([scene.label for _, scene in loaded], np.int64)
    return out


def open_cache(out, meta, source, shapes, rank):
    """Create the cache's files, or check that those present belong to the same cache -> {stem: memmap r+}."""
    n, path = len(source.names), out / "meta.json"
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            same_meta(out, meta)
        else:
            with whole_file(out / "names.txt") as file:
                file.write("\n".join(source.names).encode() + b"\n")
            if source.labels is not None:
                with whole_file(out / "labels.npy") as file:
                    np.save(file, source.labels)
            for stem, (dtype, shape) in shapes.items():
                with whole_file(out / f"{stem}.npy") as file:  # a header, then all the space at once: a full disk shows now
                    header = io.BytesIO()
                    np.lib.format.write_array_header_1_0(header, dict(descr=np.dtype(dtype).str, fortran_order=False, shape=(n, *shape)))
                    file.write(header.getvalue())
                    length = file.tell() + n * int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
                    file.truncate(length)
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, length)
            with whole_file(path) as file:  # last: its presence says that all files are there
                file.write(json.dumps(meta, indent=1).encode())
    barrier()
    for stem, (dtype, shape) in shapes.items():
        array = open_array(out, stem, n)  # read-only first: mapping a short file for writing would fill it up with zeros
        if array.dtype != dtype or array.shape[1:] != shape:
            raise InputError(f"{out / stem}.npy: {array.dtype} {array.shape}, expected {np.dtype(dtype)} {(n, *shape)}; delete {out} and run again")
    return {stem: np.load(out / f"{stem}.npy", mmap_mode="r+") for stem in shapes}


def same_meta(folder, meta):
    """Raise InputError unless the cache in the folder has this meta.json, naming the first key that differs."""
    old = read_meta(folder)
    for key, value in meta.items():
        if old.get(key) != value:
            raise InputError(f"{folder}/meta.json: {key} is {str(old.get(key))[:80]}, this run has {str(value)[:80]}; use another --out")


def read_meta(folder):
    """meta.json of a cache. Raises InputError where there is none or it is of another format."""
    path = pathlib.Path(folder) / "meta.json"
    if not path.is_file():
        raise InputError(f"{folder}: no cache there; make one with `python prep_latents.py --toy 20000 --out {folder}` "
                         "(toy world) or `--data DIR` (your pictures)")
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:  # JSON and UTF-8
        raise InputError(f"{path}: not JSON ({error}); delete {folder} and run prep_latents.py again")
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or (lost := [key for key in META_KEYS if key not in meta]):
        found = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
        raise InputError(f"{path}: format is {found!r}, expected {FORMAT!r}" + (f" with {lost[0]}" if found == FORMAT else "")
                         + f"; delete {folder} and run prep_latents.py again")
    for key in ("count", "scale", "resolution", "latent_channels", "num_classes"):
        if not isinstance(meta[key], (int, float)) or not 0 <= meta[key] < 1e12:
            raise InputError(f"{path}: {key} is {str(meta[key])[:40]}, expected a number; delete {folder} and run prep_latents.py again")
    return meta


def open_array(folder, stem, count):
    """One array of a cache, read-only memory map with `count` rows; InputError when missing or cut short."""
    path = pathlib.Path(folder) / f"{stem}.npy"
    try:
        array = np.load(path, mmap_mode="r")
    except Exception as error:  # numpy raises many kinds for a foreign or damaged file
        raise InputError(f"{path}: missing or cut short ({error}); delete {folder} and run prep_latents.py again")
    if array.shape[:1] != (count,):
        raise InputError(f"{path}: shape {array.shape}, meta.json says {count} rows; delete {folder} and run prep_latents.py again")
    return array


def verify(out, meta, source, vae, teacher, feature, device, batch_size):
    """Re-encode up to 8 whole blocks and compare; InputError at more than one fp16 ulp (two int8 levels for dino)."""
    n = len(source.names)
    same_meta(out, meta)
    left = int((open_array(out, "done", n) == 0).sum())
    if left:
        raise InputError(f"{out}: {left} of {n} rows are not encoded yet; run the same command without --verify")
    blocks = np.unique(np.linspace(0, (n - 1) // batch_size, 8).astype(int)) * batch_size
    worst, rows = 0.0, 0
    for start in blocks:
        block = range(start, min(start + batch_size, n))
        keep = open_array(out, "done", n)[block.start:block.stop] == 1
        loaded, _ = load_block(block, source, skip_broken=True)
        for stem, fresh in entries(loaded, source.modalities, vae, teacher, feature, device).items():
            stored = open_array(out, stem, n)[block.start:block.stop][keep]
            fresh = fresh[keep]
            tolerance = np.spacing(np.maximum(np.abs(stored), np.abs(fresh))) if stored.dtype == np.float16 else (2 if stem == "dino" else 0)
            gap = np.abs(stored.astype(np.float32) - fresh.astype(np.float32))
            worst = max(worst, float(gap.max(initial=0)))
            if not (gap <= tolerance).all():  # NaN counts as different
                row = block.start + int(np.flatnonzero(keep)[np.argwhere(~(gap <= tolerance))[0, 0]])
                raise InputError(f"{out / stem}.npy: row {row} ({source.names[row]}) differs by {gap.max():.4g} from a fresh encoding; "
                                 "the cache is damaged or of other pictures, make it again")
        rows += int(keep.sum())
    print(f"{out}: {rows} of {n} rows re-encoded, largest difference {worst:.2g}")


def main():
    """Encode what is missing of the cache, blocks shared out over the processes; or --verify. A killed run continues."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--toy", type=int, metavar="N", help="N toy scenes")
    what.add_argument("--data", type=pathlib.Path, help="folder tree <root>/<modality>/<class>/<name>.png")
    parser.add_argument("--toy-start", type=int, metavar="SEED", help="first seed (0); held-out scenes start at 2147483648")
    parser.add_argument("--out", type=pathlib.Path, default=DEFAULT_CACHE)
    parser.add_argument("--modalities", nargs="+", choices=list(MODALITIES), help="default: all that are there")
    parser.add_argument("--size", type=int, help="pixels, square; 256, toy 64")
    parser.add_argument("--vae", help="sd-mse (default for --data), sd-ema, toy (default for --toy), a file, or none for pixels")
    parser.add_argument("--dino", type=pathlib.Path, metavar="FILE", help="local DINOv2-B/14 weights instead of the hub's")
    parser.add_argument("--no-dino", action="store_true", help="no alignment targets: training runs without REPA")
    parser.add_argument("--feature", metavar="NAME", help="also a vector of each image for MT-Diffusion, of a timm model such as vit_large_patch14_clip_224.openai; with --toy: toy-teacher")
    parser.add_argument("--feature-file", type=pathlib.Path, metavar="FILE", help="local weights of --feature")
    parser.add_argument("--depth-space", choices=("disparity", "depth"), default="disparity", help="what the depth files hold")
    parser.add_argument("--seg-mode", choices=("semantic", "instance"), default="instance", help="what the segmentation colours mean")
    parser.add_argument("--batch-size", type=int, default=32, help="rows encoded together; part of the cache's identity")
    parser.add_argument("--skip-broken", action="store_true", help="leave broken files out and list them in skipped.txt")
    parser.add_argument("--verify", action="store_true", help="re-encode a sample of a finished cache and compare")
    args = parser.parse_args()
    args.size = (64 if args.toy else 256) if args.size is None else args.size
    if (args.toy is not None and not 1 <= args.toy <= 10 ** 7) or args.batch_size < 1 or args.size < 1:
        raise InputError(f"--toy {args.toy} --batch-size {args.batch_size} --size {args.size}: each must be at least 1, --toy at most ten million")
    if args.modalities:
        args.modalities = tuple(m for m in MODALITIES if m in args.modalities)  # the registry's order
        if "rgb" not in args.modalities:
            raise InputError(f"--modalities {' '.join(args.modalities)}: rgb must be among them")
    if args.dino and (args.toy or args.no_dino):
        raise InputError(f"--dino {args.dino}: not with --no-dino, nor with --toy, which brings its own alignment targets")
    if args.feature and (args.toy is not None) != (args.feature == ToyFeature.id):
        raise InputError(f"--feature {args.feature}: the toy world brings toy-teacher, and it alone; pictures need the name of a timm model")
    if args.feature_file and not args.feature_file.is_file():
        raise InputError(f"--feature-file {args.feature_file}: no such file")
    rank, world, device = setup()
    source = ToySource(args) if args.toy else FolderSource(args)
    vae_name = args.vae or ("toy" if args.toy else "sd-mse")
    vae = None if vae_name == "none" else load_vae(vae_name).to(device)
    factor = 1 if vae is None else vae.factor
    if args.size % (2 * factor):
        raise InputError(f"--size {args.size}: must be a multiple of {2 * factor} (VAE factor {factor}, patches of 2)")
    side = args.size // factor
    teacher = None if args.no_dino else ToyTeacher(side // 2) if args.toy else Dino(args.dino, side // 2, device)
    feature = None if not args.feature else ToyFeature() if args.toy else Feature(args.feature, args.feature_file, device)
    meta = dict(format=FORMAT, modalities=list(source.modalities), vae=vae_name, vae_sha256=sha256(vae.path) if vae else None,
                scale=vae.scale if vae else 1.0, latent_channels=vae.latent_channels if vae else 3, latent_size=[side, side],
                resolution=args.size, count=len(source.names), num_classes=len(source.classes), class_names=list(source.classes),
                palette=source.palette, batch_size=args.batch_size, grid=[side // 2, side // 2], teacher=teacher.id if teacher else None,
                feature=feature.id if feature else None, feature_size=feature.size if feature else None,
                names_sha256=hashlib.sha256("\n".join(source.names).encode()).hexdigest(), **source.describe)
    with torch.inference_mode():
        if args.verify:
            return verify(args.out, meta, source, vae, teacher, feature, device, args.batch_size)
        fill(args, meta, source, vae, teacher, feature, rank, world, device)


def fill(args, meta, source, vae, teacher, feature, rank, world, device):
    """Encode the blocks that are not done yet; this process takes every world-th of them."""
    n, B, side = len(source.names), args.batch_size, meta["latent_size"][0]
    shapes = {m: (np.float16, (2, meta["latent_channels"], side, side)) if vae else (np.uint8, (3, side, side)) for m in source.modalities}
    if teacher is not None:
        shapes["dino"] = (np.int8, (meta["grid"][0] * meta["grid"][1], 768))
    if feature is not None:
        shapes["feature"] = (np.float16, (feature.size,))
    if source.labels is None:
        shapes["labels"] = (np.int64, ())
    cache = open_cache(args.out, meta, source, {**shapes, "done": (np.uint8, ())}, rank)
    done = cache["done"]
    blocks = [range(s, min(s + B, n)) for s in range(0, n, B)]
    finished = (1, 2) if args.skip_broken else (1,)  # rows once skipped (2) are tried again: they may have been repaired
    todo = [b for b in blocks[rank::world] if not np.isin(done[b.start:b.stop], finished).all()]
    pending, flushed = [], time.monotonic()

    def flush():
        for array in cache.values():
            array.flush()  # the data first, then the mark
        for block, broken in pending:
            done[block.start:block.stop] = [2 if i in broken else 1 for i in block]
        done.flush()
        pending.clear()

    with concurrent.futures.ThreadPoolExecutor(2) as pool, tqdm(total=n, initial=n - sum(map(len, todo)) if world == 1 else 0,
                                                                desc="encode", disable=rank > 0) as bar:
        read = lambda block: pool.submit(load_block, block, source, args.skip_broken)
        ahead = [read(block) for block in todo[:2]]
        for k, block in enumerate(todo):
            loaded, broken = ahead.pop(0).result()
            ahead += [read(todo[k + 2])] if k + 2 < len(todo) else []
            for stem, values in entries(loaded, source.modalities, vae, teacher, feature, device).items():
                cache[stem][block.start:block.stop] = values
            for i, message in broken.items():
                with open(args.out / "skipped.txt", "a") as file:
                    file.write(f"{source.names[i]}\t{message}\n")
            pending.append((block, broken))
            if time.monotonic() - flushed > 5 or k == len(todo) - 1:
                flush()
                flushed = time.monotonic()
            bar.update(len(block) * world)
    barrier()
    if rank == 0:
        skipped = int((np.load(args.out / "done.npy") == 2).sum())
        print(f"{args.out}: {n - skipped} rows of {', '.join(source.modalities)}"
              + (f", {skipped} broken left out, see {args.out / 'skipped.txt'}" if skipped else "")
              + (f", REPA targets {teacher.id}" if teacher else ", no REPA targets"))


if __name__ == "__main__":
    run(main)
