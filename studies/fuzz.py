"""Fuzzing, not a test: broken, odd and random inputs to every command. None may end in a traceback, a hang
or a half-written file.

    python studies/fuzz.py --num 1000 --json results/fuzz.json

Each case runs a command in a process of its own: it must exit with 0, or with 2 and one line that names what
is wrong. What it leaves under final names must be readable. A case is made from (seed, number) alone:
`--only 417` repeats that one and prints it.
"""
import collections
import contextlib
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
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from record import ROOT, call, command_line, write_json
from safetensors.torch import save_file

import eval_depth
import eval_fid
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
from modalities import MODALITIES

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
# Cases: (module, arguments), their files made under the working folder.

QUICK = ["--sampler", "euler", "--steps", "1"]
TINY = ["--model", "T/2", "--steps", "1", "--batch-size", "4"]
TOY_8 = ["--toy", "8", "--no-dino", "--batch-size", "8"]


def images_to_sample(dice, at, good):
    given = dice.choice(toy_scenes.MAPS)
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


def trees(dice, at, good):
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
        (pseudo_label, ["--images", f"{scenes}/rgb", "--out", "o"])))
    return module, argv + flags(dice, module)


CASES = (images_to_sample, images_to_sample, checkpoints_to_sample, checkpoints_to_train, caches, trees,
         predictions, sets_of_pictures, autoencoders, teachers, random_flags, random_flags, random_flags)


# ------------------------------------------------------------------------------------------------
# Trying a case.

def child(module, argv, log):
    """In the forked process: run the command as a user would, its output in a file."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(log), "w", 1) for _ in range(2))
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
    """What a command left half-written: temporaries, and outputs that cannot be read."""
    out = []
    for path in set(folder.rglob("*")) - before:
        try:
            open_whole(path)
        except Exception as error:
            out.append(f"{path.relative_to(folder)}: {error}")
    return out


def judge(code, text, left):
    """-> "0" (accepted), "2" (refused with a line), or what is wrong."""
    if "Traceback" in text:
        return "traceback"
    if code not in (0, 2):
        return f"exit code {code}"
    if code == 2 and "error: " not in text:
        return "no line that says why"
    return "half-written" if left else str(code)


class Case(NamedTuple):
    number: int
    kind: str
    verdict: str   # of judge
    command: str
    output: list   # its last line, and what it left half-written


def try_case(seed, number, good, limit, show=False):
    """Make a case and run it -> Case."""
    dice = random.Random(seed * 1_000_003 + number)
    make, here = CASES[number % len(CASES)], os.getcwd()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        folder = pathlib.Path(folder)
        os.chdir(folder)
        try:
            module, argv = make(dice, folder, good)
            before = set(folder.rglob("*"))
            pid = os.fork()
            if pid == 0:
                child(module, argv, log.fileno())
            code = wait_for(pid, limit)
            log.seek(0)
            text, left = log.read(), unreadable(folder, before)
        finally:
            os.chdir(here)
    if show:
        print(text)
    command = f"{module.__name__}.py {' '.join(argv)}"
    return Case(number, make.__name__, judge(code, text, left), command, text.splitlines()[-1:] + left)


def make_good(folder):
    """A good cache, made in a process of its own: what forks later must not have run torch's threads."""
    pid = os.fork()
    if pid == 0:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            call(prep_latents, *TOY_8, "--out", folder)
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
