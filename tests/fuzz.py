"""Fuzzing, not a test: broken, odd and random inputs to every command. None may end in a traceback, a hang or a half-written file.

    python tests/fuzz.py --num 1000 --json results/fuzz.json

Each case runs a command in a process of its own: it must exit with 0, or with 2 and one line that names what is wrong. What it
leaves under final names must be readable. A case is made from (seed, number) alone: `--only 417` repeats that one and prints it.
"""
import argparse
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

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import eval_depth  # noqa: E402
import eval_fid  # noqa: E402
import model  # noqa: E402
import prep_latents  # noqa: E402
import pseudo_label  # noqa: E402
import sample  # noqa: E402
import toy_scenes  # noqa: E402
import train  # noqa: E402
import vae  # noqa: E402
from distributed import InputError, run, whole_file  # noqa: E402

VALUES = ("", "0", "-1", "1", "2", "nan", "inf", "-inf", "1e308", "0.5", "x", "ü", "..", "/dev/null", "None", "rgb", "2147483648", "99999999999999999999", "1,1", "a b", "--")
SHAPES = ((64, 64), (1, 1), (1, 300), (300, 1), (65, 63), (7, 500), (640, 480))


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


def picture(dice, path):
    """A picture of an odd kind under path; its ending need not be true."""
    shape = dice.choice(SHAPES)
    mode = dice.choice(("RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "I;16", "I", "F"))
    noise = np.random.default_rng(dice.randrange(2 ** 32))
    if mode in ("I;16", "I", "F"):
        array = noise.integers(0, 60000, shape[::-1]) if dice.random() < 0.7 else np.full(shape[::-1], dice.choice((0, 65535)))
        image = Image.fromarray(array.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    else:
        image = Image.fromarray(noise.integers(0, 256, (*shape[::-1], 3), np.uint8) if dice.random() < 0.7 else np.full((*shape[::-1], 3), dice.randrange(256), np.uint8)).convert(mode)
    out, kind = io.BytesIO(), dice.choice(("PNG", "PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"))
    try:
        image.save(out, kind)
    except (OSError, KeyError, ValueError):
        out = io.BytesIO()
        image.convert("RGB").save(out, "PNG")
    data = out.getvalue()
    chance = dice.random()
    if chance < 0.35:
        data = damage(dice, data)
    elif chance < 0.45:  # a header of 60,000 x 60,000 pixels
        data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 60000, 60000, 8, 2, 0, 0, 0) + b"\0\0\0\0" + data[33:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def array(dice, path):
    """A .npy file of an odd shape or type, or a damaged one."""
    noise = np.random.default_rng(dice.randrange(2 ** 32))
    shape = dice.choice(((64, 64), (64, 64, 3), (3, 64, 64), (0,), (), (1, 1), (64,), (2, 64, 64, 3)))
    values = noise.standard_normal(shape).astype(dice.choice((np.float32, np.float64, np.float16, np.int64, np.uint8, bool, complex)))
    if values.dtype.kind == "f" and dice.random() < 0.3:
        values = np.full(shape, dice.choice((np.nan, np.inf, -np.inf, 0, -1)), values.dtype)
    out = io.BytesIO()
    np.save(out, np.array([print, {}], object) if dice.random() < 0.1 else values, allow_pickle=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(damage(dice, out.getvalue()) if dice.random() < 0.3 else out.getvalue())


def tree(dice, root, modalities=("rgb", "depth", "normal", "seg"), count=3):
    """<root>/<modality>/<class>/<name>: of a good set, with some files odd, missing or too many."""
    for i in range(count):
        scene = toy_scenes.render(toy_scenes.HELD_OUT + i)
        for m in modalities:
            path = root / m / "a" / f"{i}.png"
            chance = dice.random()
            if chance < 0.02:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if chance < 0.25:
                picture(dice, path)
            elif chance < 0.35 and m in ("depth", "normal"):
                array(dice, path.with_suffix(".npy"))
            else:
                pixels = {"rgb": scene.rgb, "depth": model._depth_picture(1 / scene.depth), "normal": model._normal_picture(scene.normal), "seg": toy_scenes.PALETTE[scene.seg]}[m]
                Image.fromarray(pixels).save(path)
    if dice.random() < 0.2:
        (root / "rgb" / "a" / dice.choice(("more.png", "empty.jpg", ".hidden.png", "0.jpg"))).write_bytes(b"")


def bent(dice, value, depth=0):
    """A JSON value with one place changed, dropped or of another type."""
    if isinstance(value, dict) and value and (depth < 2 or dice.random() < 0.5):
        key = dice.choice(sorted(value))
        if dice.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: bent(dice, value[key], depth + 1)}
    return dice.choice((None, -1, 0, 1, 7, 1e30, "x", "", [], {}, [1, 2], ["rgb"], ["rgb", "x"], True, "../../x", [[0, 0, 0]], "toy", "none", float("nan")))


def checkpoint(dice, path):
    """A damaged, bent or foreign checkpoint."""
    data, kind = (ROOT / "demo/mmgen.pt").read_bytes(), dice.randrange(5)
    if kind == 0:
        path.write_bytes(damage(dice, data))
        return
    if kind == 1:
        path.write_bytes(damage(dice, data[:200_000] if dice.random() < 0.5 else (ROOT / "demo/vae.safetensors").read_bytes()))
        return
    content = torch.load(ROOT / "demo/mmgen.pt", weights_only=True)
    if kind == 2:
        content["config"] = bent(dice, content["config"])
    elif kind == 3:
        key = dice.choice(sorted(content["ema"]))
        content["ema"][key] = dice.choice((lambda x: x[:1], lambda x: x.double(), lambda x: x * float("nan"), lambda x: x.long(), lambda x: None, lambda x: x.T if x.dim() == 2 else x[None]))(content["ema"][key])
    else:
        content = dice.choice(({}, [], content["ema"], {**content, "format": "x"}, {**content, "step": "x"}, {**content, "ema": {}}, {"ema": {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}, "args": {}}, torch.zeros(3)))
    torch.save(content, path)


def cache(dice, path, good):
    """A copy of a good cache with one thing wrong."""
    shutil.copytree(good, path)
    name = dice.choice(sorted(p.name for p in path.iterdir()))
    if name == "meta.json" or dice.random() < 0.3:
        (path / "meta.json").write_text(json.dumps(bent(dice, json.loads((path / "meta.json").read_text()))))
    elif dice.random() < 0.2:
        (path / name).unlink()
    elif dice.random() < 0.3 and name.endswith(".npy"):
        array(dice, path / name)
    else:
        (path / name).write_bytes(damage(dice, (path / name).read_bytes()))


def flags(dice, module):
    """Random flags of a command's parser, with random values."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        sys.argv = ["x", "--help"]
        (getattr(module, "arguments", None) or module.main)()
    usage = re.sub(r"\s+", " ", text.getvalue().split("\n\n")[0])
    known = re.findall(r"(--[\w-]+)(?: ([A-Z][A-Z_]*|\{[^}]*\}))?", usage)  # flag, and its value if it takes one
    out = []
    for name, value in dice.sample(known, min(len(known), dice.randrange(1, 4))):
        choices = value.strip("{}").split(",") if value.startswith("{") else VALUES
        out += [name, *([dice.choice(choices if dice.random() < 0.8 else VALUES)] if value or dice.random() < 0.1 else [])]
    return out


# ------------------------------------------------------------------------------------------------
# Cases: (module, arguments), their files made under the working folder.

QUICK = ["--sampler", "euler", "--steps", "1"]


def images_to_sample(dice, at, good):
    given = dice.choice(("rgb", "depth", "normal", "seg"))
    name = "in/p.npy" if given in ("depth", "normal") and dice.random() < 0.4 else "in/p.png"
    (array if name.endswith("npy") else picture)(dice, at / name)
    task = ["understand"] if given == "rgb" and dice.random() < 0.5 else ["condition", "--given", given]
    return sample, ["--task", *task, "--image", dice.choice(("in", name)), *QUICK, *dice.choice(([], ["--fit", "full"], ["--mesh"], ["--npz"]))]


def checkpoints_to_sample(dice, at, good):
    checkpoint(dice, at / "c.pt")
    return dice.choice(((sample, ["--task", "generate", "--num", "2", "--ckpt", "c.pt", *QUICK]), (model, ["--ckpt", "c.pt", "--export", "e.pt"]),
                        (model, ["--ckpt", "c.pt", "--export-official", "e.pt"]), (eval_depth, ["--toy", "2", "--ckpt", "c.pt", *QUICK])))


def checkpoints_to_train(dice, at, good):
    checkpoint(dice, at / "c.pt")
    return train, ["--data", str(good), "--init", "c.pt", "--model", "T/2", "--steps", "1", "--batch-size", "4"]


def caches(dice, at, good):
    cache(dice, at / "cache", good)
    return dice.choice(((train, ["--data", "cache", "--model", "T/2", "--steps", "1", "--batch-size", "4"]), (prep_latents, ["--toy", "8", "--no-dino", "--batch-size", "8", "--verify", "--out", "cache"]),
                        (prep_latents, ["--toy", "8", "--no-dino", "--batch-size", "8", "--out", "cache"])))


def trees(dice, at, good):
    tree(dice, at / "t")
    return dice.choice(((prep_latents, ["--data", "t", "--vae", "toy", "--size", "64", "--no-dino", "--out", "c", *dice.choice(([], ["--skip-broken"]))]),
                        (eval_depth, ["--data", "t", *QUICK]), (sample, ["--task", "understand", "--data", "t", *QUICK])))


def predictions(dice, at, good):
    tree(dice, at / "p", count=2)
    tree(dice, at / "g", count=2)
    return eval_depth, ["--pred", "p", "--gt", "g", *dice.choice(([], ["--seg-mode", "instance"], ["--modality", "depth"], ["--palette", "p"]))]


def sets_of_pictures(dice, at, good):
    for side in "ab":
        tree(dice, at / side, ("rgb",), count=dice.choice((1, 4)))
        if dice.random() < 0.4:
            with open(at / f"{side}.npz", "wb") as file:
                np.savez(file, **{dice.choice(("arr_0", "arr_0", "x", "mu")): np.zeros(dice.choice(((2, 64, 64, 3), (0, 64, 64, 3), (2, 3, 64, 64), (2,))), dice.choice((np.uint8, np.float32)))})
            if dice.random() < 0.5:
                (at / f"{side}.npz").write_bytes(damage(dice, (at / f"{side}.npz").read_bytes()))
    pick = lambda side: f"{side}.npz" if (at / f"{side}.npz").exists() and dice.random() < 0.7 else side
    return eval_fid, [pick("a"), *([pick("b")] if dice.random() < 0.8 else ["--save-stats", "s.npz"]), "--features", "vae", "--vae", "toy", *dice.choice(([], ["--crop", "32"]))]


def autoencoders(dice, at, good):
    data = (ROOT / "demo/vae.safetensors").read_bytes()
    if dice.random() < 0.6:
        (at / "v.safetensors").write_bytes(damage(dice, data))
    else:
        save_file({"encoder.conv_in.weight": torch.zeros(3, 3)}, at / "v.safetensors", {"config": dice.choice(("{}", "[]", "null", "x", '{"channels": [32], "layers": -1}'))})
    return dice.choice(((sample, ["--task", "generate", "--vae", "v.safetensors", *QUICK]), (prep_latents, ["--toy", "4", "--vae", "v.safetensors", "--no-dino", "--out", "c"]),
                        (vae, ["--init", "v.safetensors", "--out", "w.safetensors", "--steps", "1", "--scenes", "4", "--batch-size", "2"])))


def teachers(dice, at, good):
    for i in range(2):
        picture(dice, at / f"in/{i}.png")
    (at / "teacher.py").write_text(dice.choice(("import numpy as np\ndef f(image): return np.zeros(image.size[::-1] + (3,), np.float32) + [0, 0, 1]", "def f(image): return None",
                                                "def f(image): raise ValueError('no')", "x = 1", "def f(:")))
    return pseudo_label, ["--images", "in", "--out", "o", "--normal", "py:teacher:f"]


def random_flags(dice, at, good):
    module, argv = dice.choice(((sample, ["--task", "generate", "--num", "1", *QUICK]), (train, ["--data", str(good), "--model", "T/2", "--steps", "1", "--batch-size", "4"]),
                                (prep_latents, ["--toy", "4", "--no-dino", "--out", "c"]), (eval_depth, ["--toy", "1", *QUICK]),
                                (eval_fid, [str(ROOT / "demo/scenes"), str(ROOT / "demo/scenes"), "--features", "vae"]), (toy_scenes, ["--num", "1", "--out", "s"]),
                                (vae, ["--out", "v.safetensors", "--steps", "1", "--scenes", "4", "--batch-size", "1"]), (model, ["--ckpt", str(ROOT / "demo/mmgen.pt"), "--export", "e.pt"]),
                                (pseudo_label, ["--images", str(ROOT / "demo/scenes/rgb"), "--out", "o"])))
    return module, argv + flags(dice, module)


CASES = (images_to_sample, images_to_sample, checkpoints_to_sample, checkpoints_to_train, caches, trees, predictions, sets_of_pictures, autoencoders, teachers, random_flags, random_flags, random_flags)


# ------------------------------------------------------------------------------------------------

def child(module, argv, log):
    """In the forked process: run the command as a user would, its output in a file."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(log), "w", 1) for _ in range(2))
    sys.argv = [f"{module.__name__}.py", *argv]
    sys.path.insert(0, os.getcwd())
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    try:
        run(module.main)
        code = 0
    except SystemExit as end:  # argparse; also sys.exit("a line")
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def unreadable(folder, before):
    """Files that a command left half-written: temporaries, and outputs that cannot be read."""
    out = []
    for path in set(folder.rglob("*")) - before:
        try:
            if path.name.endswith(".tmp"):
                raise ValueError("left over")
            if path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".pt" and not path.is_symlink():
                torch.load(path, weights_only=True, mmap=True)
            elif path.suffix == ".npy" and "cache" not in path.parts and path.parent.name != "c":  # a cache says in done.npy what is there
                np.load(path)
        except Exception as error:
            out.append(f"{path.relative_to(folder)}: {error}")
    return out


def try_case(seed, number, good, limit, show=False):
    """-> kind of case, verdict ("0", "2" or what is wrong), its command and output."""
    dice = random.Random(seed * 1_000_003 + number)
    make = CASES[number % len(CASES)]
    with tempfile.TemporaryDirectory() as folder:
        folder, here = pathlib.Path(folder), os.getcwd()
        os.chdir(folder)
        try:
            module, argv = make(dice, folder, good)
            before = set(folder.rglob("*"))
            with open(folder.parent / f"{folder.name}.log", "w+") as log:
                pathlib.Path(log.name).unlink()
                pid = os.fork()
                if pid == 0:
                    child(module, argv, log.fileno())
                deadline = time.monotonic() + limit
                while (done := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
                    time.sleep(0.02)
                if done[0] == 0:
                    os.kill(pid, signal.SIGKILL)
                    done = os.waitpid(pid, 0)
                    code = "hang"
                else:
                    code = os.waitstatus_to_exitcode(done[1])
                log.seek(0)
                text = log.read()
            left = unreadable(folder, before)
        finally:
            os.chdir(here)
    errors = [line for line in text.splitlines() if "error: " in line]
    verdict = "traceback" if "Traceback" in text else f"exit code {code}" if code not in (0, 2) else "no line that says why" if code == 2 and not errors else "half-written" if left else str(code)
    if show:
        print(text)
    return make.__name__, verdict, f"{module.__name__}.py {' '.join(argv)}", text.splitlines()[-1:] + left


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", metavar="CASE", help="these cases alone, with their output")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=60, help="seconds after which a command hangs")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    recipe = dict(command=" ".join(["tests/fuzz.py", *sys.argv[1:]]), torch=torch.__version__)
    torch.set_num_threads(1)  # forked processes cannot use the threads of this one
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    json_path = args.json and args.json.resolve()
    counts, bad = collections.defaultdict(collections.Counter), []
    with tempfile.TemporaryDirectory() as folder:
        good = pathlib.Path(folder) / "good"
        if (pid := os.fork()) == 0:
            sys.argv = ["prep_latents.py", "--toy", "8", "--no-dino", "--batch-size", "8", "--out", str(good)]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                prep_latents.main()
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            raise InputError("the good cache could not be made")
        for number in args.only or range(args.first, args.first + args.num):
            kind, verdict, command, text = try_case(args.seed, number, good, args.limit, args.only is not None)
            counts[kind][verdict] += 1
            if verdict not in ("0", "2"):
                bad.append(dict(number=number, verdict=verdict, command=command, output=text))
            if verdict not in ("0", "2") or args.verbose:
                print(number, kind, verdict, command[:200], *text, flush=True)
    result = {"inputs": sum(sum(c.values()) for c in counts.values()), "refused with a line": sum(c["2"] for c in counts.values()), "accepted": sum(c["0"] for c in counts.values()),
              "failures": bad, "by kind": {kind: dict(c) for kind, c in counts.items()}, "recipe": recipe}
    print({k: v for k, v in result.items() if k != "failures"})
    if json_path:
        with whole_file(json_path) as file:
            file.write(json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    run(main)
