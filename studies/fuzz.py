"""Fuzzing, not a test: broken, odd and random inputs to every command. None may end in a traceback, a hang
or a half-written file, nor change a file that it was given.

    python studies/fuzz.py --num 1000 --json results/fuzz.json

Each case runs a command, or some one after the other, in processes of their own: each must exit with 0, or
with 2 and one line that names what is wrong. What it leaves under final names must be readable, what was
there before must be as it was. A case is made from (seed, number) alone: `--only 417` repeats that one and
prints it.
"""
import collections
import contextlib
import hashlib
import io
import json
import os
import pathlib
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import unicodedata
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from record import ROOT, call, command_line, write_json
from safetensors.torch import save_file

import eval_depth
import eval_fid
import import_frames
import mesh
import mt_diffusion
import mt_sample
import prep_latents
import pseudo_label
import sample
import toy_scenes
import toy_vae
import train
import weights
from distributed import check, command_parser, run
from modalities import FACTS_FORMAT, MODALITIES

VALUES = ("", "0", "-1", "1", "2", "nan", "inf", "-inf", "1e308", "0.5", "x", "ü", "..", "/dev/null", "None",
          "rgb", "2147483648", "99999999999999999999", "1,1", "a b", "--")
JSON_VALUES = (None, -1, 0, 1, 7, 1e30, "x", "", [], {}, [1, 2], ["rgb"], ["rgb", "x"], True, "../../x",
               [[0, 0, 0]], "toy", "none", float("nan"))
SHAPES = ((64, 64), (1, 1), (1, 300), (300, 1), (65, 63), (7, 500), (640, 480))
MODES = ("RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "I;16", "I", "F")
DEEP = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
FORMATS = ("PNG", "PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
TYPES = (np.float32, np.float64, np.float16, np.int64, np.uint8, bool, complex)


# ------------------------------------------------------------------------------------------------
# Inputs.

def damage(dice, data):
    """Bytes cut short, with bits flipped, with a piece repeated, or none."""
    data = bytearray(data)
    kind = dice.randrange(5)
    if kind == 0:
        return bytes(data[:dice.randrange(len(data) + 1)])
    if kind == 1:
        for _ in range(dice.choice((1, 3, 30, 1000))):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif kind == 2:
        for _ in range(dice.choice((1, 5))):  # near the head, where the structure is
            data[dice.randrange(min(len(data), 400))] = dice.randrange(256)
    elif kind == 3:
        at = dice.randrange(len(data))
        data[at:at] = data[:dice.randrange(5000)]
    else:
        return dice.choice((b"", b"\0" * 5000, b"not what you think", pickle.dumps(print)))
    return bytes(data)


def odd_image(dice):
    """A PIL image of an odd mode and shape: noise, or all of one value."""
    width, height = dice.choice(SHAPES)
    mode = dice.choice(MODES)
    noise, noisy = np.random.default_rng(dice.randrange(2 ** 32)), dice.random() < 0.7
    if mode in DEEP:
        flat = np.full((height, width), dice.choice((0, 65535)))
        values = noise.integers(0, 60000, (height, width)) if noisy else flat
        return Image.fromarray(values.astype(DEEP[mode]))
    flat = np.full((height, width, 3), dice.randrange(256), np.uint8)
    values = noise.integers(0, 256, (height, width, 3), np.uint8) if noisy else flat
    return Image.fromarray(values).convert(mode)


def picture(dice, path):
    """A picture of an odd kind under path; its ending need not be true."""
    image, out = odd_image(dice), io.BytesIO()
    try:
        image.save(out, dice.choice(FORMATS))
    except (OSError, KeyError, ValueError):
        out = io.BytesIO()
        image.convert("RGB").save(out, "PNG")
    data = out.getvalue()
    chance = dice.random()
    if chance < 0.35:
        data = damage(dice, data)
    elif chance < 0.45:  # a header of 60,000 x 60,000 pixels
        header = struct.pack(">I4sIIBBBBB", 13, b"IHDR", 60000, 60000, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + header + b"\0\0\0\0" + data[33:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def array(dice, path):
    """A .npy file of an odd shape or type, or a damaged one."""
    noise = np.random.default_rng(dice.randrange(2 ** 32))
    shape = dice.choice(((64, 64), (64, 64, 3), (3, 64, 64), (0,), (), (1, 1), (64,), (2, 64, 64, 3)))
    values = noise.standard_normal(shape).astype(dice.choice(TYPES))
    if values.dtype.kind == "f" and dice.random() < 0.3:
        values = np.full(shape, dice.choice((np.nan, np.inf, -np.inf, 0, -1)), values.dtype)
    if dice.random() < 0.1:
        values = np.array([print, {}], object)
    out = io.BytesIO()
    np.save(out, values, allow_pickle=True)
    data = out.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(damage(dice, data) if dice.random() < 0.3 else data)


def tree(dice, root, modalities=toy_scenes.MAPS, count=3):
    """<root>/<modality>/<class>/<name>: of a good set, with some files odd, missing or too many."""
    for i in range(count):
        maps = toy_scenes.maps(toy_scenes.render(toy_scenes.HELD_OUT + i))
        for m in modalities:
            row, path = MODALITIES[m], root / m / "a" / f"{i}.png"
            chance = dice.random()
            if chance < 0.02:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if chance < 0.25:
                picture(dice, path)
            elif chance < 0.35 and row.floats:
                array(dice, path.with_suffix(".npy"))
            else:
                Image.fromarray(row.picture(row.from_pixels(row.to_pixels(maps[m])))).save(path)
    if dice.random() < 0.2:
        name = dice.choice(("more.png", "empty.jpg", ".hidden.png", "0.jpg"))
        (root / "rgb" / "a" / name).write_bytes(b"")


def bent(dice, value, depth=0):
    """A JSON value with one place changed, dropped or of another type."""
    if isinstance(value, dict) and value and (depth < 2 or dice.random() < 0.5):
        key = dice.choice(sorted(value))
        if dice.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: bent(dice, value[key], depth + 1)}
    return dice.choice(JSON_VALUES)


def bent_tensor(dice, x):
    """A tensor of another shape or type, with NaN, or none at all."""
    turned = x.T if x.dim() == 2 else x[None]
    return dice.choice((x[:1], x.double(), x * float("nan"), x.long(), None, turned))


def foreign(content):
    """What a file may hold in the place of a checkpoint."""
    released = {"ema": {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}, "args": {}}
    return ({}, [], content["ema"], {**content, "format": "x"}, {**content, "step": "x"},
            {**content, "ema": {}}, released, torch.zeros(3))


def checkpoint(dice, path):
    """A damaged, bent or foreign checkpoint."""
    data, kind = (ROOT / "demo/mmgen.pt").read_bytes(), dice.randrange(5)
    if kind < 2:
        if kind == 1:
            short = dice.random() < 0.5
            data = data[:200_000] if short else (ROOT / "demo/vae.safetensors").read_bytes()
        path.write_bytes(damage(dice, data))
        return
    content = torch.load(ROOT / "demo/mmgen.pt", weights_only=True)
    if kind == 2:
        content["config"] = bent(dice, content["config"])
    elif kind == 3:
        key = dice.choice(sorted(content["ema"]))
        content["ema"][key] = bent_tensor(dice, content["ema"][key])
    else:
        content = dice.choice(foreign(content))
    torch.save(content, path)


def cache(dice, path, good):
    """A copy of a good cache with one thing wrong."""
    shutil.copytree(good, path)
    name, meta = dice.choice(sorted(p.name for p in path.iterdir())), path / "meta.json"
    if name == "meta.json" or dice.random() < 0.3:
        meta.write_text(json.dumps(bent(dice, json.loads(meta.read_text()))))
    elif dice.random() < 0.2:
        (path / name).unlink()
    elif dice.random() < 0.3 and name.endswith(".npy"):
        array(dice, path / name)
    else:
        (path / name).write_bytes(damage(dice, (path / name).read_bytes()))


# ------------------------------------------------------------------------------------------------
# Strangers' inputs: whole files, as other programs write them.

NAMES = ("x.png", "frame.0001.png", "X.PNG", "x.Jpeg", "n" * 247 + ".png", os.fsdecode(b"caf\xe9.png"),
         "caf\u00e9.png", "cafe\u0301.png", "._x.png", ".ipynb_checkpoints/x.png", "two/levels/x.png",
         "-x.tiff", "a b.webp", "x.png.txt", "x.png.png", "line\nbreak.png", "x.bmp")
PLACES = ("a", "a", "red_cone", "n01440764", "a/b", "", os.fsdecode(b"caf\xe9"), "caf\u00e9")


def keep(path, held, **options):
    """Save an array or a PIL image; floats as TIFF or .npy, as the name says; a format that cannot hold it
    gives way to PNG or TIFF.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(held, np.ndarray):
        try:
            held = Image.fromarray(held)
        except TypeError:
            path = path.with_suffix(".npy")
    if path.suffix == ".npy":
        with open(path, "wb") as file:
            return np.save(file, np.asarray(held))
    out, ending = io.BytesIO(), path.suffix.lower()
    try:
        held.save(out, Image.registered_extensions().get(ending, "PNG"), **options)
    except (OSError, TypeError, ValueError, SyntaxError):  # the last of a broken orientation tag
        out = io.BytesIO()
        held.save(out, "TIFF" if held.mode in "FI" else "PNG")
    path.write_bytes(out.getvalue())


def with_hole(array, value):
    """An array whose pixels of a rectangle are of this value."""
    array = array.copy()
    array[8:30, 10:40] = value
    return array


def photo(dice, rgb):
    """RGB as strangers keep it -> image or array, options of its saving."""
    image, kind = Image.fromarray(rgb), dice.randrange(8)
    opaque = np.full(rgb.shape[:2], 255, np.uint8)
    clear = Image.fromarray(with_hole(opaque, dice.choice((0, 1, 128))))
    if kind == 0:
        image.putalpha(clear)
    elif kind == 1:
        options = {"transparency": dice.choice((0, 3, bytes(16)))}
        return image.quantize(dice.choice((2, 16, 256))), options
    elif kind == 2:
        image = image.convert("L")
        image.putalpha(clear)
    elif kind == 3:
        return rgb[..., 0].astype(np.uint16) * dice.choice((1, 257)), {}
    elif kind == 4:
        return rgb[..., 0].astype(np.float32) / dice.choice((1, 255)), {}
    elif kind == 5:
        image = image.convert("1")
    elif kind == 6:
        exif = Image.Exif()
        exif[0x0112] = dice.randrange(1, 10)
        tags = exif.tobytes()
        return image, {"exif": damage(dice, tags) if dice.random() < 0.3 else tags}
    return image, {}


def depth(dice, disparity):
    """Disparity as strangers keep it, or depth -> array."""
    metres, kind, float_type = 1 / disparity, dice.randrange(10), dice.choice((np.float32, np.float64))
    if kind == 0:
        return with_hole((metres * 1000).astype(np.uint16), dice.choice((0, 65535)))
    if kind == 1:
        return with_hole(metres.astype(np.float32), dice.choice((np.nan, np.inf, -np.inf, 0, -1)))
    if kind == 2:
        return np.full(metres.shape, dice.choice((0, 65535)), np.uint16)
    if kind == 3:
        return np.full(metres.shape, dice.choice((np.nan, np.inf, 0)), float_type)
    if kind == 4:  # a colour map
        x = (disparity - disparity.min()) / np.ptp(disparity)
        return (np.stack([x, 1 - abs(2 * x - 1), 1 - x], -1) * 255).astype(np.uint8)
    if kind == 5:
        return (disparity / disparity.max() * 255).astype(np.uint8)
    if kind == 6:
        return with_hole(metres * 1000, 0).astype(dice.choice((np.int16, np.int32, np.int64)))
    if kind == 7:
        return metres.astype(np.float16)[..., None]
    return disparity.astype(float_type)


def normal(dice, vectors):
    """Normals as strangers keep them -> array."""
    picture, kind = MODALITIES["normal"].picture(vectors), dice.randrange(9)
    if kind == 0:
        return with_hole(vectors, dice.choice((0, np.nan, 1e-6)))
    if kind == 1:
        return np.zeros_like(vectors)
    if kind == 2:
        return vectors * 0.5 + 0.5
    if kind == 3:
        return (vectors * 127).astype(dice.choice((np.int8, np.int16, np.int64)))
    if kind == 4:
        return vectors.transpose(2, 0, 1)
    if kind == 5:
        return np.dstack([picture, np.full(picture.shape[:2], dice.choice((0, 255)), np.uint8)])
    return with_hole(picture, dice.choice((0, 127, 128))) if kind == 6 else picture


def seg(dice, colours):
    """Segments as strangers keep them -> array or image."""
    labels, kind = labels_of(colours), dice.randrange(9)
    if kind == 0:
        return with_hole(labels, 255)
    if kind == 1:
        return np.full_like(labels, 255)
    if kind == 2:
        return ((labels == 2) * 255).astype(dice.choice((np.uint8, np.uint16)))
    if kind == 3:
        return labels.astype(np.uint16) * dice.choice((1, 1000))
    if kind == 4:
        image = Image.fromarray(labels)
        image.putpalette(toy_scenes.PALETTE[::dice.choice((1, -1))].tobytes())
        return image
    if kind == 5:
        return np.dstack([colours, with_hole(np.full_like(labels, 255), 0)])
    if kind == 6:
        return labels.astype(dice.choice((np.int64, np.float32, bool)))
    return labels if kind == 7 else colours


def labels_of(colours):
    """Palette colours (H, W, 3) of the toy world -> labels uint8 (H, W)."""
    return (colours[:, :, None] == toy_scenes.PALETTE).all(-1).argmax(-1).astype(np.uint8)


STRANGE = {"depth": depth, "normal": normal, "seg": seg}


def strange_map(dice, path, modality, array):
    """A map in a file: in half of the cases as strangers keep it."""
    row, options = MODALITIES[modality], {}
    held = row.picture(row.from_pixels(row.to_pixels(array)))
    if dice.random() < 0.5:
        if modality == "rgb":
            held, options = photo(dice, array)
        else:
            held = STRANGE[modality](dice, array)
    keep(path, held, **options)


def strange_tree(dice, root, modalities=toy_scenes.MAPS, count=2):
    """<root>/<modality>/<class>/<name> with names, links, endings and maps as strangers have them."""
    spelled = dice.random() < 0.1  # accents in another form in each modality
    alias = dice.choice(("seg", "seg", "mask"))
    place, odd = dice.choice(PLACES), dice.random() < 0.6
    for i in range(count):
        maps = toy_scenes.maps(toy_scenes.render(toy_scenes.HELD_OUT + i))
        name = dice.choice(NAMES) if odd else f"{i}.png"
        for m in modalities:
            form = dice.choice(("NFC", "NFD")) if spelled else "NFC"
            folder = root / (alias if m == "seg" else m) / place
            strange_map(dice, folder / unicodedata.normalize(form, name), m, maps[m])
    if dice.random() < 0.3:
        keep(root / dice.choice(("masks", "normals", "depth16", "rgb/.hidden", "x", "mask")) / "0.png",
             np.zeros((8, 8), np.uint8))
    if dice.random() < 0.4:
        tree_json(dice, root / "tree.json")
    if dice.random() < 0.4:
        links(dice, root, modalities)


def links(dice, root, modalities):
    """Links in each modality's folder of a tree: to folders, in a circle, to nowhere, to a file."""
    kind, elsewhere = dice.randrange(7), root.parent / "elsewhere"
    for m in modalities:
        folder = root / m
        if not folder.is_dir():
            continue
        if kind == 0:  # the folder itself is one
            elsewhere.mkdir(exist_ok=True)
            shutil.move(folder, elsewhere / m)
            folder.symlink_to(elsewhere / m)
        elif kind == 1:
            (folder / "circle").symlink_to(dice.choice((folder, root, root.parent)))
        elif kind == 2:
            (folder / "nowhere").symlink_to(root / "not there")
            (folder / "lost.png").symlink_to("lost.png")
        elif kind == 3:
            keep(elsewhere / m / "b/9.png", np.full((64, 64, 3), 90, np.uint8))
            (folder / "linked").symlink_to(elsewhere / m)
        elif kind == 4:  # each leads into the other
            for one, other in ("pq", "qp"):
                (folder / one).mkdir()
                (folder / one / other).symlink_to(folder / other)
        elif kind == 5:  # the ways double at each step
            for one, other in ("pq", "qp"):
                (folder / one).mkdir()
                for name in ("1", "2"):
                    (folder / one / name).symlink_to(folder / other)
        else:
            first = next((path for path in sorted(folder.rglob("*")) if path.is_file()), None)
            if first:
                (folder / "same.png").symlink_to(first)


def tree_json(dice, path):
    """A tree.json: good, contradictory, bent or damaged."""
    held = {"depth_space": dice.choice(("depth", "disparity")), "depth_unit": dice.choice((0.001, 1)),
            "seg_mode": dice.choice(("semantic", "instance")), "void": dice.choice((255, 0)),
            "palette": toy_scenes.PALETTE.tolist(), "upright": dice.random() < 0.5, "focal": 1.2}
    held = {"format": FACTS_FORMAT, **{key: held[key] for key in dice.sample(sorted(held), 3)}}
    chance = dice.random()
    if chance < 0.3:
        held = bent(dice, held)
    data = json.dumps(held).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(damage(dice, data) if chance > 0.9 else data)


def palette(dice, path):
    """A file of colours: a list, under its key, too short, bent or damaged -> the flag."""
    colours = toy_scenes.PALETTE.tolist()
    held = dice.choice((colours[:2], colours[::-1], {"palette": None}, {}, [[0, 0, 300]], [[0.5, 0, 0]],
                        bent(dice, {"palette": colours}), [colours]))
    if dice.random() < 0.5:
        held = dice.choice((colours, {"palette": colours}))
    data = json.dumps(held).encode()
    path.write_bytes(damage(dice, data) if dice.random() < 0.1 else data)
    return ["--palette", path.name]


def plain_tree(at, root, count=2):
    """A good tree of toy scenes: <root>/<modality>/red_cone/<number>.png, normals also as .npy."""
    for i in range(count):
        maps = toy_scenes.maps(toy_scenes.render(toy_scenes.HELD_OUT + i))
        for m, array in maps.items():
            row = MODALITIES[m]
            held = row.from_pixels(row.to_pixels(array))
            keep(at / root / m / f"red_cone/{i}.png", row.picture(held))
            if m == "normal":
                keep(at / root / m / f"red_cone/{i}.npy", held.astype(np.float32))


def flags(dice, module):
    """Random flags of a command's parser, with random values."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        call(module, "--help")
    usage = re.sub(r"\s+", " ", text.getvalue().split("\n\n")[0])
    known = re.findall(r"(--[\w-]+)(?: ([A-Z][A-Z_]*|\{[^}]*\}))?", usage)  # flag, its value if it takes one
    out = []
    for name, value in dice.sample(known, min(len(known), dice.randrange(1, 4))):
        choices = value.strip("{}").split(",") if value.startswith("{") else VALUES
        out.append(name)
        if value or dice.random() < 0.1:
            out.append(dice.choice(choices if dice.random() < 0.8 else VALUES))
    return out


# ------------------------------------------------------------------------------------------------
# Cases: (module, arguments), or a list of such that run one after the other; their files are made under the
# working folder.

QUICK = ["--sampler", "euler", "--steps", "1"]
TINY = ["--model", "T/2", "--steps", "1", "--batch-size", "4"]
TOY_8 = ["--toy", "8", "--no-dino", "--batch-size", "8"]


def images_to_sample(dice, at, good):
    given = dice.choice(list(toy_scenes.MAPS))
    name = "in/p.npy" if given in ("depth", "normal") and dice.random() < 0.4 else "in/p.png"
    make = array if name.endswith("npy") else picture
    make(dice, at / name)
    task = ["condition", "--given", given]
    if given == "rgb" and dice.random() < 0.5:
        task = ["understand"]
    more = dice.choice(([], ["--fit", "full"], ["--mesh"], ["--npz"]))
    return sample, ["--task", *task, "--image", dice.choice(("in", name)), *QUICK, *more]


def checkpoints_to_sample(dice, at, good):
    checkpoint(dice, at / "c.pt")
    return dice.choice((
        (sample, ["--task", "generate", "--num", "2", "--ckpt", "c.pt", *QUICK]),
        (mt_sample, ["--task", "generate", "--num", "2", "--ckpt", "c.pt", "--steps", "1"]),
        (weights, ["--ckpt", "c.pt", "--export", "e.pt"]),
        (weights, ["--ckpt", "c.pt", "--export-official", "e.pt"]),
        (eval_depth, ["--toy", "2", "--ckpt", "c.pt", *QUICK])))


def checkpoints_to_train(dice, at, good):
    checkpoint(dice, at / "c.pt")
    return dice.choice((
        (train, ["--data", str(good), "--init", "c.pt", *TINY]),
        (mt_diffusion, ["--pair", "rgb", "seg", "--data", str(good), "--init", "c.pt", *TINY])))


def caches(dice, at, good):
    cache(dice, at / "cache", good)
    return dice.choice((
        (train, ["--data", "cache", *TINY]),
        (prep_latents, [*TOY_8, "--verify", "--out", "cache"]),
        (prep_latents, [*TOY_8, "--out", "cache"])))


def damaged_trees(dice, at, good):
    tree(dice, at / "t")
    prep = ["--data", "t", "--vae", "toy", "--size", "64", "--no-dino", "--out", "c"]
    return dice.choice((
        (prep_latents, [*prep, *dice.choice(([], ["--skip-broken"]))]),
        (eval_depth, ["--data", "t", *QUICK]),
        (sample, ["--task", "understand", "--image", "t", *QUICK])))


def predictions(dice, at, good):
    tree(dice, at / "p", count=2)
    tree(dice, at / "g", count=2)
    more = dice.choice(([], ["--seg-mode", "instance"], ["--modality", "depth"], ["--palette", "p"]))
    return eval_depth, ["--pred", "p", "--gt", "g", *more]


def picture_archive(dice, path):
    """An .npz file as of samples or statistics, in most cases not."""
    name = dice.choice(("arr_0", "arr_0", "x", "mu"))
    shape = dice.choice(((2, 64, 64, 3), (0, 64, 64, 3), (2, 3, 64, 64), (2,)))
    with open(path, "wb") as file:
        np.savez(file, **{name: np.zeros(shape, dice.choice((np.uint8, np.float32)))})
    if dice.random() < 0.5:
        path.write_bytes(damage(dice, path.read_bytes()))


def sets_of_pictures(dice, at, good):
    names = {}
    for side in "ab":
        tree(dice, at / side, ("rgb",), count=dice.choice((1, 4)))
        names[side] = side
        if dice.random() < 0.4:
            picture_archive(dice, at / f"{side}.npz")
            names[side] = f"{side}.npz" if dice.random() < 0.7 else side
    other = [names["b"]] if dice.random() < 0.8 else ["--save-stats", "s.npz"]
    metric = dice.choice(("latent-fd", "latent-fd", "psnr"))
    crop = dice.choice(([], ["--crop", "32"]))
    return eval_fid, [names["a"], *other, "--metrics", metric, "--vae", "toy", *crop]


def autoencoders(dice, at, good):
    path = at / "v.safetensors"
    if dice.random() < 0.6:
        path.write_bytes(damage(dice, (ROOT / "demo/vae.safetensors").read_bytes()))
    else:
        config = dice.choice(("{}", "[]", "null", "x", '{"channels": [32], "layers": -1}'))
        save_file({"encoder.conv_in.weight": torch.zeros(3, 3)}, path, {"config": config})
    tiny = ["--steps", "1", "--scenes", "4", "--batch-size", "2"]
    return dice.choice((
        (sample, ["--task", "generate", "--vae", path.name, *QUICK]),
        (prep_latents, ["--toy", "4", "--vae", path.name, "--no-dino", "--out", "c"]),
        (toy_vae, ["--init", path.name, "--out", "w.safetensors", *tiny])))


TEACHERS = (
    "import numpy as np\ndef f(image): return np.zeros(image.size[::-1] + (3,), np.float32) + [0, 0, 1]",
    "def f(image): return None",
    "def f(image): raise ValueError('no')",
    "x = 1",
    "def f(:",
)


def teachers(dice, at, good):
    for i in range(2):
        picture(dice, at / f"in/{i}.png")
    (at / "teacher.py").write_text(dice.choice(TEACHERS))
    return pseudo_label, ["--images", "in", "--out", "o", "--normal", "py:teacher:f"]


def random_flags(dice, at, good):
    demo, scenes = str(ROOT / "demo/mmgen.pt"), str(ROOT / "demo/scenes")
    rgb, normal = (f"{scenes}/{m}/2147483649.png" for m in ("rgb", "normal"))
    module, argv = dice.choice((
        (sample, ["--task", "generate", "--num", "1", *QUICK]),
        (mt_sample, ["--task", "generate", "--num", "1", "--steps", "1"]),
        (train, ["--data", str(good), *TINY]),
        (mt_diffusion, ["--pair", "rgb", "seg", "--data", str(good), *TINY]),
        (prep_latents, ["--toy", "4", "--no-dino", "--out", "c"]),
        (eval_depth, ["--toy", "1", *QUICK]),
        (eval_fid, [scenes, scenes, "--metrics", "latent-fd"]),
        (toy_scenes, ["--num", "1", "--out", "s"]),
        (toy_vae, ["--out", "v.safetensors", "--steps", "1", "--scenes", "4", "--batch-size", "1"]),
        (weights, ["--ckpt", demo, "--export", "e.pt"]),
        (mesh, ["--normal", normal, "--rgb", rgb, "--out", "m.ply"]),
        (pseudo_label, ["--images", f"{scenes}/rgb", "--out", "o"]),
        (import_frames, ["--color", f"{scenes}/rgb", "--depth", f"{scenes}/depth", "--out", "o"])))
    return module, argv + flags(dice, module)


GOOD_TEACHER = """
import numpy as np
def depth(image): return np.asarray(image.convert("L"), float)
def normal(image): return np.zeros(image.size[::-1] + (3,), np.float32) + [0, 0, 1]
def seg(image): return np.asarray(image.convert("L")) // 64
"""


def taught(at, *modalities):
    """The flags of good teachers."""
    (at / "good_teacher.py").write_text(GOOD_TEACHER)
    return [word for m in modalities for word in (f"--{m}", f"py:good_teacher:{m}")]


def strangers(dice, at, good):
    strange_tree(dice, at / "t")
    space = dice.choice(([], [], ["--depth-space", "depth"], ["--depth-space", "disparity"]))
    colours = dice.choice(([], [], palette(dice, at / "p.json")))
    mode = dice.choice(([], ["--seg-mode", "semantic"]))
    prep = ["--data", "t", "--vae", "none", "--size", "64", "--no-dino", "--out", "c"]
    given = dice.choice((["rgb"], ["depth"], ["depth", "normal"], ["seg"], ["rgb", "seg"]))
    skip, pair = dice.choice(([], ["--skip-broken"])), str(good.parent / "pair/latest.pt")
    shown = dice.choice(([], ["--views", "3"], ["--depth-norm", "quantile"], ["--depth-target", "log"]))
    return dice.choice((
        (prep_latents, [*prep, *space, *colours, *mode, *skip, *shown]),
        (prep_latents, [*prep, *space, *colours, *mode, *shown]),
        (eval_depth, ["--data", "t", "--save-maps", *space, *colours, *mode, *QUICK]),
        (sample, ["--task", "condition", "--given", *given, "--image", "t", *space, *QUICK]),
        (sample, ["--task", "understand", "--image", dice.choice(("t", "t/rgb")), *QUICK]),
        (mt_sample, ["--task", "translate", "--image", "t", "--ckpt", pair, "--steps", "1"]),
        (pseudo_label, ["--images", "t/rgb", "--out", dice.choice("to"), *taught(at, "normal"), *skip]),
        (eval_fid, ["t/rgb", "t/rgb", "--metrics", dice.choice(("psnr", "latent-fd"))])))


LAYOUTS = {  # how data sets with truth lie
    "generic": {"rgb": "color/{}.png", "depth": "depth/{}.png", "seg": "label/{}.png"},
    "scannet": {"rgb": "scene/color/{}.jpg", "depth": "scene/depth/{}.png"},
    "7scenes": {"rgb": "seq/frame-{:06d}.color.png", "depth": "seq/frame-{:06d}.depth.png"},
    "tum": {"rgb": "rgb/{}.000000.png", "depth": "depth/{}.010000.png"},
    "nyu": {"rgb": "{}_rgb.png", "depth": "{}_depth.png"},
    "hypersim": {"rgb": "images/scene_cam_00_final_preview/frame.{:04d}.tonemap.jpg",
                 "depth": "images/scene_cam_00_geometry_hdf5/frame.{:04d}.depth_meters.npy",
                 "normal": "images/scene_cam_00_geometry_hdf5/frame.{:04d}.normal_cam.npy"},
    "camvid": {"rgb": "train/{}.png", "seg": "trainannot/{}.png"},
    "cityscapes": {"rgb": "leftImg8bit/train/a/{}_leftImg8bit.png",
                   "depth": "disparity/train/a/{}_disparity.png",
                   "seg": "gtFine/train/a/{}_gtFine_labelIds.png"},
}


def frame_file(dice, path, modality, scene):
    """A map of a scene as a data set has it; one in two damaged, cut, empty or of another type."""
    held = {"rgb": scene.rgb, "depth": (scene.depth * 1000).astype(np.uint16),
            "normal": scene.normal.astype(np.float32),
            "seg": labels_of(toy_scenes.maps(scene)["seg"])}[modality]
    kind = dice.randrange(12)
    if kind == 0:
        return (array if path.suffix == ".npy" else picture)(dice, path)
    if kind == 1:
        held = held[:dice.choice((1, 32))]
    elif kind == 2:
        held = np.zeros_like(held)
    elif kind == 3:
        held = held.astype(dice.choice((np.uint8, np.uint16, np.float32)))
    elif kind == 4:
        held = held[..., None].repeat(3, -1) if held.ndim == 2 else held[..., 0]
    elif kind == 5:
        held = np.full_like(held, 255)
    keep(path, held)


def frames(dice, at, good):
    """A data set with truth, imported, and in half of the cases encoded."""
    name = dice.choice(sorted(LAYOUTS))
    for i in range(3):
        scene = toy_scenes.render(toy_scenes.HELD_OUT + i)
        for m, place in LAYOUTS[name].items():
            if dice.random() < 0.95:
                frame_file(dice, at / "d" / place.format(i), m, scene)
    where = ["--root", "d"]
    if name == "generic":
        where = ["--color", "d/color", "--depth", "d/depth", *dice.choice(([], ["--label", "d/label"]))]
    more = dice.choice(([], ["--frames", "0:1"], ["--every", "2"], ["--no-normals"], ["--scene", "s"],
                        ["--focal", dice.choice(("70", *VALUES))], ["--scene-is-class"],
                        ["--depth-unit", dice.choice(("0.001", *VALUES))]))
    out = dice.choice(("o", "o", "o", "o", "d", "d/depth"))
    imported = import_frames, ["--format", name, *where, *more, "--out", out]
    encoded = prep_latents, ["--data", "o", "--vae", "none", "--size", "64", "--no-dino", "--out", "c",
                             "--views", dice.choice("123"), *dice.choice(([], ["--depth-norm", "quantile"]))]
    return imported if dice.random() < 0.5 else [imported, encoded]


def mixtures(dice, at, good):
    """Two caches in one run: the same, of other classes or modalities, or a damaged one."""
    if dice.random() < 0.4:
        cache(dice, at / "cache", good)
    else:
        shutil.copytree(good, at / "cache")
        meta = json.loads((good / "meta.json").read_text())
        other = dice.choice((meta, bent(dice, meta), {**meta, "class_names": meta["class_names"][::-1]},
                             {**meta, "modalities": ["rgb", "depth"]}, {**meta, "resolution": 128}))
        (at / "cache/meta.json").write_text(json.dumps(other))
    weighted = dice.choice(([], ["--weights", "1", "3"], ["--weights", dice.choice(VALUES), "1"]))
    module, pair = dice.choice(((train, []), (mt_diffusion, ["--pair", "rgb", "seg"])))
    return module, [*pair, "--data", str(good), "cache", *weighted, *TINY]


def comparisons(dice, at, good):
    """Predictions and truth as strangers have them."""
    modality, single = dice.choice(("depth", "normal", "seg")), dice.random() < 0.2
    for side in "pg":
        if dice.random() < 0.3:
            strange_tree(dice, at / side, (modality,))
        for i in range(2):
            array = toy_scenes.maps(toy_scenes.render(toy_scenes.HELD_OUT + i))[modality]
            strange_map(dice, at / side / ("" if single else modality) / f"{i}.png", modality, array)
    if dice.random() < 0.5:
        tree_json(dice, at / dice.choice("pg") / "tree.json")
    more = dice.choice(([], ["--alignment", "depth"], ["--depth-space", "disparity"], ["--axes", "marigold"],
                        ["--seg-mode", "instance"], palette(dice, at / "p.json")))
    return eval_depth, ["--pred", "p", "--gt", "g", "--modality", modality, "--save-maps", *more]


def meshes(dice, at, good):
    """Normals, picture and mask as strangers have them."""
    maps = toy_scenes.maps(toy_scenes.render(toy_scenes.HELD_OUT))
    strange_map(dice, at / "normal.png", "normal", maps["normal"])
    file = "normal.npy" if (at / "normal.npy").exists() else "normal.png"
    held, options = photo(dice, maps["rgb"])
    keep(at / "rgb.tiff", held, **options)
    masks = labels_of(maps["seg"]) == 2, maps["seg"], photo(dice, maps["rgb"])[0]
    keep(at / "mask.png", dice.choice(masks))
    mask = dice.choice(([], ["--mask", "mask.png"]))
    focal = dice.choice(([], ["--focal", dice.choice(("1.2", *VALUES))], ["--border", dice.choice(VALUES)]))
    out = dice.choice(("m.ply", "rgb.ply", "normal.ply", "m", "m.png", "new/m.ply", "rgb.tiff", "."))
    return mesh, ["--normal", file, "--rgb", "rgb.tiff", *mask, *focal, "--out", out]


def places(dice, at, root):
    """A folder to write that equals, contains or lies in a given one, or a link to such."""
    place = dice.choice((".", root, root, f"{root}/rgb", f"{root}/rgb/red_cone", f"{root}/depth",
                         f"{root}/rgb/new", f"{root}/new"))
    if dice.random() < 0.2 and place != "." and "new" not in place:
        (at / "link").symlink_to(place)
        return "link"
    return place


def files(dice, at, *named):
    """A given file, by its name or by a link to it, symbolic or hard."""
    name = dice.choice(named)
    chance = dice.random()
    if chance < 0.2:
        (at / "same").symlink_to(name)
    elif chance < 0.3:
        os.link((at / name).resolve(), at / "same")
    return "same" if chance < 0.3 else name


def outputs_that_are_inputs(dice, at, good):
    for root in "tg":
        plain_tree(at, root)
    place, picture = places(dice, at, "t"), "t/rgb/red_cone/0.png"
    one = files(dice, at, picture, "t/depth/red_cone/1.png", "t/normal/red_cone/0.npy")
    location, more = dice.choice(("t", "t/rgb", picture)), dice.choice(([], ["--overwrite"]))
    teachers, skip = taught(at, "depth", "seg"), dice.choice(([], ["--skip-broken"]))
    pair = ["--ckpt", str(good.parent / "pair/latest.pt"), "--steps", "1"]
    small = ["--vae", "none", "--size", "64", "--no-dino"]
    return dice.choice((
        (sample, ["--task", "understand", "--image", location, "--out", place, *QUICK, *more]),
        (sample, ["--task", "condition", "--given", "depth", "--image", "t", "--out", place, *QUICK, *more]),
        (mt_sample, ["--task", "translate", "--image", "t/seg", *pair, "--out", place, *more]),
        (prep_latents, ["--data", "t", *small, "--out", place]),
        (prep_latents, ["--data", "t", "--modalities", "rgb", *small, "--out", place]),
        (eval_depth, ["--data", "t", "--save-maps", *QUICK, "--out", place]),
        (eval_depth, ["--data", "t", *QUICK, "--json", one]),
        (eval_depth, ["--pred", "t", "--gt", "g", "--modality", "normal", "--save-maps", "--out", place]),
        (eval_depth, ["--pred", "t", "--gt", "g", "--modality", "normal", "--json", one]),
        (eval_fid, ["t/rgb", "g/rgb", "--metrics", "latent-fd", "--json", picture]),
        (eval_fid, ["t/rgb", "--metrics", "latent-fd", "--save-stats", picture]),
        (toy_scenes, ["--num", "2", "--out", "t"]),
        (pseudo_label, ["--images", location, "--out", place, *teachers, *skip]),
        (pseudo_label, ["--images", "t/depth", "--out", "t", *teachers, *skip])))


def files_that_are_inputs(dice, at, good):
    """Files to write that are files that are read."""
    plain_tree(at, "t")
    checkpoint = torch.load(ROOT / "demo/mmgen.pt", weights_only=True)
    torch.save({**checkpoint, "opt": {}}, at / "c.pt")  # an export is another file
    shutil.copy(ROOT / "demo/vae.safetensors", at / "v.safetensors")
    (at / "run/ckpt").mkdir(parents=True)
    shutil.copy(at / "c.pt", at / "run/ckpt/0000001.pt")
    (at / "run/latest.pt").symlink_to("ckpt/0000001.pt")
    (at / "p.json").write_text(json.dumps(toy_scenes.PALETTE.tolist()))
    tiny, vae = ["--steps", "1", "--scenes", "4", "--batch-size", "2"], "v.safetensors"
    ours = files(dice, at, "run/latest.pt", "run/ckpt/0000001.pt")
    scannet(at / "scans")
    surface = ["--normal", "t/normal/red_cone/0.npy", "--rgb", "t/rgb/red_cone/0.png"]
    out = dice.choice((surface[1], surface[3], "t/rgb/red_cone/0.ply", "t/mine.ply"))
    (at / "t/mine.png").write_bytes(b"mine")  # where the views of t/mine.ply would be
    return dice.choice((
        (mesh, [*surface, "--out", out]),
        (mesh, [*surface, "--out", out]),
        (weights, ["--ckpt", "c.pt", "--export", "c.pt"]),
        (weights, ["--ckpt", "run", "--export", ours]),
        (toy_vae, ["--init", vae, "--out", vae, *tiny]),
        (eval_depth, ["--toy", "2", "--ckpt", "run", *QUICK, "--json", ours]),
        (eval_depth, ["--data", "t", "--palette", "p.json", *QUICK, "--json", "p.json"]),
        (eval_depth, ["--data", "t", *QUICK, "--json", "t/tree.json"]),
        (eval_depth, ["--scannet", "scans", "--list", "evaluation/frames.txt", "--num", "1", *QUICK]),
        (eval_depth, ["--toy", "2", "--vae", vae, *QUICK, "--json", vae]),
        (eval_fid, ["t/rgb", "t/rgb", "--metrics", "latent-fd", "--vae", vae, "--json", vae]),
        (train, ["--data", str(good), "--init", "run/latest.pt", "--run", "run", *TINY]),
        (train, ["--data", str(good), "--init", "run/ckpt/0000001.pt", "--run", "run/ckpt", *TINY])))


def scannet(root):
    """Two frames as ScanNet exports them, and a list of them where an evaluation writes its own."""
    for i in range(2):
        scene = toy_scenes.render(toy_scenes.HELD_OUT + i)
        keep(root / f"scene/color/{i}.jpg", scene.rgb)
        keep(root / f"scene/depth/{i}.png", (scene.depth * 1000).astype(np.uint16))
    listed = root.parent / "evaluation/frames.txt"
    listed.parent.mkdir(exist_ok=True)
    listed.write_text("".join(f"scene/color/{i}.jpg scene/depth/{i}.png\n" for i in range(2)))


FOREIGN = ("meta.json", "grid.png", "rgb/000000.png", "rgb/red_cone_0.png", "depth/000000.npy",
           "per_image.csv", "frames.txt", "maps.json", "skipped.txt", "names.txt", "labels.npy", "rgb.npy",
           "tree.json", "log.jsonl", "args.json", "latest.pt", "previews/0000001.png", "samples.npz",
           "mesh/000000.ply", "error_depth/2147483648.png", "rgb/red_cone/0.png", "depth/red_cone/0.png",
           "rgb/red_cone/2147483648.png", "ckpt/0000001.pt")
CONTENTS = (b"mine", b"", b"{}", b"[]", b'{"complete": true}', b'{"step": 1}\n', b'{"loss": 1}\n',
            b'{"stems": []}')


def foreign_meta(dice):
    """A meta.json of samples that names files of others, or a bent one."""
    stem = dice.choice(("000000", "../../precious", "../../t/rgb/red_cone/0", "/dev/null", 7, None))
    entry = {"stem": stem, "index": 0, "class_id": 1, "given": {}, "sha256": {}}
    meta = {"complete": True, "task": "generate", "samples": [entry], "extras": {},
            "endings": {"rgb": [".png"]}}
    chance = dice.random()
    if chance < 0.3:
        meta["samples"] = [bent(dice, entry)]
    elif chance < 0.6:
        meta[dice.choice(sorted(meta))] = dice.choice(JSON_VALUES)
    return json.dumps(meta).encode()


def writing(dice, at, good):
    """A good command that writes into the folder o."""
    plain_tree(at, "t")
    pair, often = str(good.parent / "pair/latest.pt"), ["--log-every", "1", "--preview-every", "1"]
    small = ["--vae", "none", "--size", "64", "--no-dino"]
    module, argv = dice.choice((
        (sample, ["--task", "generate", "--num", "2", *dice.choice(([], ["--npz"])), *QUICK]),
        (sample, ["--task", "understand", "--image", "t", *QUICK]),
        (sample, ["--task", "condition", "--given", "depth", "--image", "t", "--mesh", *QUICK]),
        (mt_sample, ["--task", "generate", "--num", "1", "--ckpt", pair, "--steps", "1"]),
        (prep_latents, ["--toy", "4", "--no-dino"]),
        (prep_latents, ["--data", "t", *small, *dice.choice(([], ["--skip-broken"]))]),
        (eval_depth, ["--toy", "2", "--save-maps", *QUICK]),
        (eval_depth, ["--data", "t", *QUICK]),
        (toy_scenes, ["--num", "1"]),
        (train, ["--data", str(good), *often, *TINY]),
        (pseudo_label, ["--images", "t/rgb", *taught(at, "depth", "normal")])))
    return module, [*argv, "--run" if module is train else "--out", "o"]


def foreign_outputs(dice, at, good):
    """A folder to write that holds files of others."""
    module, argv = writing(dice, at, good)
    (at / "precious.png").write_bytes(b"mine")
    for name in dice.sample(FOREIGN, dice.choice((1, 2, 8))):
        path = at / "o" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        strange = name == "meta.json" and dice.random() < 0.7
        path.write_bytes(foreign_meta(dice) if strange else dice.choice(CONTENTS))
    if module in (sample, mt_sample) and dice.random() < 0.5:
        argv = [*argv, "--overwrite"]
    return module, argv


def once_more(dice, at, good):
    """A command twice; or another recipe into the same folder, with or without --overwrite."""
    module, argv = writing(dice, at, good)
    other = {sample: ["--steps", "2"], mt_sample: ["--seed", "1"], prep_latents: ["--batch-size", "2"],
             eval_depth: ["--seed", "1"], toy_scenes: ["--start", "3"], train: ["--seed", "1"],
             pseudo_label: ["--depth-space", "depth"]}
    second = argv if dice.random() < 0.4 else argv + other[module]
    if module in (sample, mt_sample) and dice.random() < 0.5:
        second = [*second, "--overwrite"]
    return [(module, argv), (module, second)]


CASES = (images_to_sample, checkpoints_to_sample, checkpoints_to_train, caches, damaged_trees, predictions,
         sets_of_pictures, autoencoders, teachers, random_flags, random_flags, strangers, strangers, frames,
         frames, mixtures, comparisons, meshes, outputs_that_are_inputs, files_that_are_inputs,
         foreign_outputs, once_more)


# ------------------------------------------------------------------------------------------------
# Trying a case.

def child(module, argv, log):
    """In the forked process: run the command as a user would, its output in a file."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(log), "w", 1, errors="backslashreplace") for _ in range(2))
    sys.argv = [f"{module.__name__}.py", *argv]
    sys.path.insert(0, os.getcwd())
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    code = 1
    try:
        run(module.main)
        code = 0
    except SystemExit as end:  # argparse; also sys.exit("a line")
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        else:
            code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for(pid, limit):
    """The exit code of a forked process, "hang" of one that had to be killed."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hang"


def open_whole(path):
    """Raise where a file was left half-written."""
    if path.name.endswith(".tmp"):
        raise ValueError("left over")
    in_cache = "cache" in path.parts or path.parent.name == "c"  # it says in done.npy what is there
    if path.suffix == ".png":
        Image.open(path).load()
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".pt" and not path.is_symlink():
        torch.load(path, weights_only=True, mmap=True)
    elif path.suffix == ".npy" and not in_cache:
        np.load(path)


def unreadable(folder, before):
    """What a command left half-written: temporaries, locks, and outputs that cannot be read."""
    out = []
    for path in walk(folder) - before.keys():
        if path.name == ".writer":
            out.append(f"{path.relative_to(folder)}: the lock is left")
        try:
            open_whole(path)
        except Exception as error:
            out.append(f"{path.relative_to(folder)}: {error}")
    return out


def walk(folder):
    """The files and links below a folder, links not followed."""
    found = set()
    for place, folders, names in os.walk(folder):
        linked = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found |= {pathlib.Path(place, name) for name in (*names, *linked)}
    return found


def content(path):
    """What a file holds, or where a link leads."""
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(*places):
    """{file: content} below the folders."""
    return {path: content(path) for place in places for path in walk(place)}


def changed(before, own):
    """What of the given files is no more as it was; own: a folder of earlier outputs, None for none."""
    out = []
    for path, held in before.items():
        if own and own in path.parents:
            continue
        try:
            now = content(path)
        except OSError:
            now = "gone"
        if now != held:
            out.append(f"{path.name}: {'deleted' if now == 'gone' else 'changed'}, and was given")
    return out


def judge(code, text, left, harmed):
    """-> "0" (accepted), "2" (refused with a line), or what is wrong."""
    if "Traceback" in text:
        return "traceback"
    if harmed:
        return "given files changed"
    if code not in (0, 2):
        return f"exit code {code}"
    if code == 2 and "error: " not in text.rstrip().split("\n")[-1]:
        return "no line that says why"
    return "half-written" if left else str(code)


class Case(NamedTuple):
    number: int
    kind: str
    verdict: str   # of judge
    command: str
    output: list   # its last line, what it left half-written, what it changed


def attempt(module, argv, log, limit):
    """Run a command in a process of its own -> its exit code."""
    pid = os.fork()
    if pid == 0:
        child(module, argv, log.fileno())
    return wait_for(pid, limit)


def try_case(seed, number, good, limit, show=False):
    """Make a case and run it -> Case."""
    dice = random.Random(seed * 1_000_003 + number)
    make, here = CASES[number % len(CASES)], os.getcwd()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", errors="replace") as log:
        at = pathlib.Path(folder).resolve() / "inner/work"  # "..", too, is this case's
        at.mkdir(parents=True)
        os.chdir(at)
        try:
            made = make(dice, at, good)
            commands = made if isinstance(made, list) else [made]
            before, codes = contents(folder, good.parent, ROOT / "demo"), []
            for module, argv in commands:
                codes.append(attempt(module, argv, log, limit))
            log.seek(0)
            text, left = log.read(), unreadable(folder, before)
            own = at / "cache" if "cache" in argv and "--out" in argv else None
            harmed = changed(before, own)
        finally:
            os.chdir(here)
    if show:
        print(text)
    verdict = judge(codes[-1], text, left, harmed)
    if codes[0] == 0 and codes[-1] != 0 and commands[0] == commands[-1]:
        verdict = "refuses what it has begun itself"
    told = " && ".join(f"{module.__name__}.py {' '.join(argv)}" for module, argv in commands)
    return Case(number, make.__name__, verdict, told, text.splitlines()[-1:] + left + harmed)


def make_good(folder):
    """A good cache, and beside it a run of RGB and segments, made in a process of its own: what forks later
    must not have run torch's threads.
    """
    pair = ["--pair", "rgb", "seg", "--data", folder, "--run", folder.parent / "pair", *TINY]
    pid = os.fork()
    if pid == 0:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            call(prep_latents, *TOY_8, "--out", folder)
            call(mt_diffusion, *pair)
        os._exit(0)
    check(os.waitpid(pid, 0)[1] == 0, "the good cache could not be made")


def main():
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--num", type=int, default=1000)
    add("--first", type=int, default=0)
    add("--only", type=int, nargs="+", metavar="CASE", help="these cases alone, with their output")
    add("--seed", type=int, default=0)
    add("--limit", type=float, default=60, help="seconds after which a command hangs")
    add("--verbose", action="store_true", help="print every case")
    add("--json", type=pathlib.Path)
    args = parser.parse_args()
    recipe = dict(command=command_line(), torch=torch.__version__)
    torch.set_num_threads(1)  # forked processes cannot use the threads of this one
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    counts, bad = collections.defaultdict(collections.Counter), []
    with tempfile.TemporaryDirectory() as folder:
        good = pathlib.Path(folder) / "good"
        make_good(good)
        for number in args.only or range(args.first, args.first + args.num):
            case = try_case(args.seed, number, good, args.limit, args.only is not None)
            counts[case.kind][case.verdict] += 1
            fine = case.verdict in ("0", "2")
            if not fine:
                bad.append(case)
            if not fine or args.verbose:
                print(number, case.kind, case.verdict, case.command[:200], *case.output, flush=True)
    total = sum(counts.values(), collections.Counter())
    result = {"inputs": total.total(), "refused with a line": total["2"], "accepted": total["0"],
              "by kind": {kind: dict(found) for kind, found in counts.items()}}
    print(result)
    failures = [{key: value for key, value in case._asdict().items() if key != "kind"} for case in bad]
    if args.json:
        write_json(args.json, {**result, "failures": failures, "recipe": recipe})


if __name__ == "__main__":
    run(main)
