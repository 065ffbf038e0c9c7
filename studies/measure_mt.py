"""Measure an MT-Diffusion checkpoint on held-out toy scenes, as its setting is.

    python studies/measure_mt.py --ckpt runs/masked --num 128 --steps 50 --json masked.json

rgb seg   what mt_sample.py --task evaluate says
masked    PSNR inside of m random squares, pooled over the pixels of all scenes: restored, left grey, and by
          SDEdit; of what was drawn outside of them, before it is replaced by the photo
label     top-1 and top-5 of the head
feature   mean cosine of the head's vector to the true one, beside the training set's mean vector
--generate N, of images with a masked one or a label: also the latent Frechet distance of N, drawn in --create
steps, to --scenes scenes, as measure_demo.py has it; of labels the classes in turn, told, and drawn with the
image, if it was trained to.
"""
import json
import pathlib
import tempfile
from typing import NamedTuple

import numpy as np
import torch
from measure_demo import held_out, latent_moments, scene_pixels
from record import call, named, report

import mt_model
import mt_sample
import toy_scenes
from distributed import command_parser, run, setup
from eval_fid import frechet
from evaluation import GUESSED
from images import unit
from modalities import read_rgb
from trees import flat_name, stem_of
from samplers import Noise
from vae import encoder_of
from weights import load_model

SQUARES = 5, 10, 15, 20


def pixels_of(path):
    return np.asarray(read_rgb(path)).astype(float)


def psnr(errors):
    """Arrays of errors in 8-bit levels -> dB over all of them."""
    return float(10 * np.log10(255 ** 2 / np.mean(np.concatenate(errors) ** 2)))


class Restored(NamedTuple):
    """Over the pictures of a folder of restorations."""
    filled: list   # errors under the mask, one array a picture
    grey: list     # the same of the masked pictures
    kept: list     # errors of the other pixels


def compare(scenes, out):
    """The scenes' RGB against what was restored into a folder -> Restored."""
    filled, grey, kept = [], [], []
    for path in sorted((scenes / "rgb").rglob("*.png")):
        name = flat_name(stem_of(path, scenes / "rgb")) + ".png"
        truth, masked = pixels_of(path), pixels_of(out / "masked_rgb" / name)
        restored = pixels_of(out / "rgb" / name)
        hidden = (masked != truth).any(-1)
        kept.append((restored - truth)[~hidden].ravel())
        filled.append((restored - truth)[hidden].ravel())
        grey.append((masked - truth)[hidden].ravel())
    return Restored(filled, grey, kept)


def restoration(args, scenes, work):
    """{"m = 5": {hidden: share of the pixels, PSNR of each way, inside and outside}, ...}"""
    result = {}
    for m in SQUARES:
        flags = ["--task", "restore", "--patches", m, "--image", scenes, "--ckpt", args.ckpt,
                 "--steps", args.steps, "--seed", args.seed, "--batch-size", 64]
        call(mt_sample, *flags, "--out", work / f"restored{m}", "--whole-image")
        call(mt_sample, *flags, "--out", work / f"sdedit{m}", "--sdedit", args.sdedit)
        restored, sdedit = compare(scenes, work / f"restored{m}"), compare(scenes, work / f"sdedit{m}")
        hidden = sum(map(len, restored.filled)) / 3 / len(restored.filled) / 64 ** 2
        result[f"m = {m}"] = {"hidden": hidden, "restored": psnr(restored.filled),
                              "left grey": psnr(restored.grey), "sdedit": psnr(sdedit.filled),
                              "outside": psnr(restored.kept), "sdedit outside": psnr(sdedit.kept)}
    return result


def classification(args, scenes, work):
    """Top-1 and top-5."""
    call(mt_sample, "--task", "classify", "--image", scenes, "--ckpt", args.ckpt, "--seed", args.seed,
         "--out", work / "out")
    found = json.loads((work / "out" / "meta.json").read_text())["scores"]
    return {key: found[key] for key in ("top1", "top5")}


def features(args, loaded, device):
    """Cosines over held-out scenes; the mean vector is of training scenes."""
    encoder, scenes = encoder_of(loaded.meta, device), held_out(0, args.num)

    def vectors(scenes):
        return unit(np.stack([toy_scenes.teacher(scene, 1)[0] for scene in scenes]))

    truth, mean = vectors(scenes), unit(vectors([toy_scenes.render(i) for i in range(GUESSED)]).mean(0))
    found = []
    for start in range(0, args.num, 64):
        part = scenes[start:start + 64]
        noise = Noise(args.seed, range(start, start + len(part)), device)
        z = encoder.encode(scene_pixels("rgb", part).to(device), noise)
        found.append(loaded.model.recognise(z, noise).cpu().numpy())
    return {"cosine": float((unit(np.concatenate(found)) * truth).sum(-1).mean()),
            "mean vector": float((truth @ mean).mean())}


def translation(args, work):
    """Scores of held-out scenes."""
    call(mt_sample, "--task", "evaluate", "--toy", args.num, "--ckpt", args.ckpt, "--steps", args.steps,
         "--seed", args.seed, "--batch-size", 64, "--json", work / "scores.json")
    return json.loads((work / "scores.json").read_text())


def ways_to_draw(loaded):
    """{name: flags}: what the model was trained for; of a pair the RGB is X, the mean of what it may be."""
    train = loaded.train
    if loaded.model.pair in ("pair", "feature") or not train["eps_weight"]:
        return {}
    told = {"latent_fd_of_told_classes": ["--classes", "balanced"]} if train["single"] else {}
    return told if train["single"] == 1 else {"latent_fd": [], **told}


def generation(args, loaded, work, device):
    """{how: latent Frechet distance} of drawn images."""
    encoder, found = encoder_of(loaded.meta, device), {}
    reference = latent_moments(encoder, scene_pixels("rgb", held_out(10_000, args.scenes)), device)
    for name, flags in ways_to_draw(loaded).items():
        call(mt_sample, "--task", "generate", "--num", args.generate, "--ckpt", args.ckpt, "--steps",
             args.create, "--seed", args.seed, "--batch-size", 64, *flags, "--out", work / name)
        images = [pixels_of(path) for path in sorted((work / name / "rgb").glob("*.png"))]
        rgb = torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2) / 127.5 - 1
        found[name] = frechet(*latent_moments(encoder, rgb, device), *reference)
    return found


def main():
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--ckpt", required=True)
    add("--num", type=int, default=128)
    add("--steps", type=int, default=50)
    add("--create", type=int, default=25, help="steps of drawn images")
    add("--sdedit", type=float, default=0.5)
    add("--generate", type=int, default=0, metavar="N")
    add("--scenes", type=int, default=4096, help="of the Frechet distance")
    add("--seed", type=int, default=0)
    add("--json", type=pathlib.Path)
    args = parser.parse_args()
    _, _, device = setup()
    loaded = load_model(args.ckpt, device, method=mt_model.METHOD, build=mt_model.build)
    pair = loaded.model.pair
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        scenes = work / "scenes"
        if pair in ("masked", "label"):
            call(toy_scenes, "--num", args.num, "--out", scenes)
        if pair == "masked":
            result = restoration(args, scenes, work)
        elif pair == "label":
            result = {} if not loaded.train["x_weight"] else classification(args, scenes, work)
        elif pair == "feature":
            result = features(args, loaded, device)
        else:
            result = {} if pair == "masked-u" else translation(args, work)
        if args.generate:
            result |= generation(args, loaded, work, device)
    recipe = dict(checkpoint_sha256=loaded.sha256, step=loaded.step, setting=pair,
                  train=named(loaded.train, "data", "run", "init"),
                  held_out=args.num, generated=args.generate, scenes=args.scenes,
                  steps=args.steps, create=args.create, sdedit=args.sdedit, seed=args.seed,
                  torch=torch.__version__, device=device.type)
    report(result, recipe, args.json)


if __name__ == "__main__":
    run(main)
