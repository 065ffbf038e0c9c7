"""Measure an MT-Diffusion checkpoint on held-out toy scenes: restoration, label or feature vector, as its setting is.

    python tests/measure_mt.py --ckpt runs/masked --num 128 --steps 50 --json results/mt_masked.json

masked    PSNR inside of m random squares, pooled over the pixels of all scenes: restored, left grey, and by SDEdit
label     top-1 and top-5 of the head
feature   mean cosine of the head's vector to the true one, beside the training set's mean vector
Translation is measured by eval_depth.py.
"""
import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import sample  # noqa: E402
import toy_scenes  # noqa: E402
from distributed import InputError, run, setup  # noqa: E402
from measure_demo import report  # noqa: E402
from model import MODALITIES  # noqa: E402


def call(module, *argv):
    sys.argv = [module.__name__, *map(str, argv)]
    module.main()


def restoration(args, scenes, work):
    result = {}
    pictures = sorted((scenes / "rgb").rglob("*.png"))
    read = lambda path: np.asarray(Image.open(path).convert("RGB")).astype(float)
    for m in (5, 10, 15, 20):
        errors, exact = {}, True
        for name, more in (("restored", ()), ("sdedit", ("--sdedit", args.sdedit))):
            out = work / f"{name}{m}"
            call(sample, "--task", "restore", "--patches", m, "--image", scenes, "--ckpt", args.ckpt, "--steps", args.steps, "--seed", args.seed,
                 "--batch-size", 64, "--out", out, *more)
            for path in pictures:
                stem = path.relative_to(scenes / "rgb").with_suffix("").as_posix().replace("/", "_")
                truth, masked, filled = read(path), read(out / "masked_rgb" / f"{stem}.png"), read(out / "rgb" / f"{stem}.png")
                hidden = (masked != truth).any(-1)
                exact &= bool((filled[~hidden] == truth[~hidden]).all())
                errors.setdefault(name, []).append((filled - truth)[hidden].ravel())
                if name == "restored":
                    errors.setdefault("left grey", []).append((masked - truth)[hidden].ravel())
        psnr = {name: float(10 * np.log10(255 ** 2 / np.mean(np.concatenate(e) ** 2))) for name, e in errors.items()}
        result[f"m = {m}"] = {"hidden": sum(map(len, errors["restored"])) / 3 / len(pictures) / 64 ** 2, **psnr, "other pixels exact": exact}
    return result


def features(args, model, device):
    """Cosines over held-out scenes; the mean vector is of 2,000 training scenes."""
    vae, unit = sample.checked_vae(None, model.meta).to(device), lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)
    truth = unit(np.stack([toy_scenes.teacher(toy_scenes.render(toy_scenes.HELD_OUT + i), 1)[0] for i in range(args.num)]))
    mean = unit(np.mean(unit(np.stack([toy_scenes.teacher(toy_scenes.render(i), 1)[0] for i in range(2000)])), 0))
    found = []
    for i in range(0, args.num, 64):
        index = range(i, min(i + 64, args.num))
        pixels = torch.from_numpy(np.stack([MODALITIES["rgb"].to_pixels(toy_scenes.render(toy_scenes.HELD_OUT + j).rgb) for j in index]))
        noise = sample.Noise(args.seed, index, device)
        found.append(model.recognise(sample.encode_pixels(vae, pixels.to(device), noise, model.latent_channels), noise).cpu().numpy())
    return {"cosine": float((unit(np.concatenate(found)) * truth).sum(-1).mean()), "mean vector": float((truth @ mean).mean())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--num", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sdedit", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    _, _, device = setup()
    model = sample.open_model(sample.locate(args.ckpt), device)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        if model.pair in ("masked", "label"):
            call(toy_scenes, "--num", args.num, "--out", work / "scenes")
        if model.pair == "masked":
            result = restoration(args, work / "scenes", work)
        elif model.pair == "label":
            call(sample, "--task", "classify", "--data", work / "scenes", "--ckpt", args.ckpt, "--seed", args.seed, "--out", work / "out")
            found = json.loads((work / "out/meta.json").read_text())
            result = {key: found["scores"][key] for key in ("top1", "top5")}
        elif model.pair == "feature":
            result = features(args, model, device)
        else:
            raise InputError(f"--ckpt {args.ckpt}: translation is measured by eval_depth.py")
    recipe = dict(checkpoint_sha256=sample.sha256(sample.locate(args.ckpt)), step=model.step, setting=model.pair, train=sample.load_checkpoint(args.ckpt)["config"]["train"],
                  held_out=args.num, steps=args.steps, sdedit=args.sdedit, seed=args.seed, torch=torch.__version__, device=device.type)
    report(result, recipe, args.json)


if __name__ == "__main__":
    run(main)
