"""Measure weights on the toy world's held-out scenes: understanding, generation, conditioned generation.

    python tests/measure_demo.py --ckpt demo/mmgen.pt --json results/demo.json

Every figure stands between two others: the VAE's ceiling (truth encoded and decoded) and the mean-map baseline
(the training scenes' average map). Remaining gap = (value - ceiling) / (baseline - ceiling).
"""
import argparse
import json
import pathlib
import sys

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import toy_scenes  # noqa: E402
from distributed import run, setup, whole_file  # noqa: E402
from model import MODALITIES, load_model  # noqa: E402
from sample import Noise, checked_vae, decode_latents, draw_latents, encode_pixels  # noqa: E402
from vae import sha256  # noqa: E402

TYPES, HUES = len(toy_scenes.TYPES), len(toy_scenes.HUES)


def abs_rel(disparity, depth):
    """AbsRel after the least-squares fit of s * disparity + t to 1 / depth (disparity alignment), float64."""
    p, g = disparity.ravel().astype(np.float64), depth.ravel().astype(np.float64)
    A = np.stack([p, np.ones_like(p)], 1)
    fit = A @ np.linalg.lstsq(A, 1 / g, rcond=None)[0]
    return float(np.mean(np.abs(1 / np.maximum(fit, 1e-3) - g) / g))


def angle(normal, truth):
    """Mean angle in degrees."""
    return float(np.degrees(np.arccos(np.clip((normal.astype(np.float64) * truth).sum(-1), -1, 1))).mean())


def classes_of(image):
    """Colours (H, W, 3) -> index of the nearest palette colour (H, W)."""
    return ((image[..., None, :].astype(int) - toy_scenes.PALETTE.astype(int)) ** 2).sum(-1).argmin(-1)


def mean_iou(predicted, truth):
    """mIoU from the confusion matrix summed over the set; classes absent from both are ignored."""
    K = len(toy_scenes.PALETTE)
    confusion = np.bincount(np.stack(truth).ravel() * K + np.stack(predicted).ravel(), minlength=K * K).reshape(K, K)
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    return float(np.mean(np.diag(confusion)[union > 0] / union[union > 0]))


def score(maps, scenes):
    """maps: {modality: list of arrays} -> AbsRel, degrees, mIoU against the scenes."""
    return dict(abs_rel=float(np.mean([abs_rel(p, s.depth) for p, s in zip(maps["depth"], scenes)])),
                normal_mean=float(np.mean([angle(p, s.normal) for p, s in zip(maps["normal"], scenes)])),
                miou=mean_iou([classes_of(p) for p in maps["seg"]], [s.seg.astype(int) for s in scenes]))


def mean_maps(count=2000):
    """The training scenes' average disparity, normal and most frequent segment."""
    disparity, normal, votes = 0, 0, 0
    for seed in range(count):
        scene = toy_scenes.render(seed)
        disparity = disparity + MODALITIES["depth"].from_pixels(MODALITIES["depth"].to_pixels(1 / scene.depth))
        normal, votes = normal + scene.normal, votes + np.eye(len(toy_scenes.PALETTE))[scene.seg]
    normal = normal / np.linalg.norm(normal, axis=-1, keepdims=True)
    return {"depth": disparity / count, "normal": normal, "seg": toy_scenes.PALETTE[votes.argmax(-1)]}


def main_object(segments):
    """The type (index into TYPES) of the largest object in a map of segment indices, -1 for none."""
    areas = [(segments == len(toy_scenes.SEGMENTS) - TYPES + k).sum() for k in range(TYPES)]
    return int(np.argmax(areas)) if max(areas) else -1


def hue_of(image, mask):
    """The nearest hue family (index into HUES) of the median colour under the mask."""
    import colorsys
    hue = colorsys.rgb_to_hsv(*np.median(image[mask], 0) / 255)[0]
    distance = [min(abs((hue - sum(span) / 2 + 0.5) % 1 - 0.5), 1) for span in toy_scenes.HUES.values()]
    return int(np.argmin(distance))


class Sampler:
    """Draws in batches with fixed options; maps come back as the registry's arrays."""

    def __init__(self, model, vae, device, args):
        self.model, self.vae, self.device, self.args = model, vae, device, args
        self.C = model.latent_channels

    def __call__(self, labels, given=None, pixels=None, **options):
        """labels (n,); given modality's pixels (n, 3, S, S) -> decoded pixels (n, M, 3, S, S)."""
        out, modalities = [], self.model.modalities
        for i in tqdm(range(0, len(labels), 64), leave=False):
            y = torch.tensor(labels[i:i + 64], device=self.device)
            noise = Noise(self.args.seed, range(i, i + len(y)), self.device)
            held = torch.zeros(len(y), len(modalities), self.C, *self.model.latent_size, device=self.device)
            if given:
                held[:, modalities.index(given)] = encode_pixels(self.vae, pixels[i:i + 64].to(self.device), noise, self.C)
            mask = torch.tensor([m == given for m in modalities])
            x = draw_latents(self.model, y, held.flatten(1, 2), mask, noise, precision=self.args.precision, **options)
            out.append(decode_latents(self.vae, x, self.C).cpu())
        return torch.cat(out)

    def maps(self, pixels):
        return {m: [MODALITIES[m].from_pixels(p[i].numpy()) for p in pixels] for i, m in enumerate(self.model.modalities)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=pathlib.Path, default=pathlib.Path("demo/mmgen.pt"))
    parser.add_argument("--num", type=int, default=256, help="held-out scenes")
    parser.add_argument("--generate", type=int, default=200, help="category samples")
    parser.add_argument("--understand", nargs=2, default=("euler", "4"), metavar=("SAMPLER", "STEPS"))
    parser.add_argument("--create", nargs=2, default=("euler", "50"), metavar=("SAMPLER", "STEPS"))
    parser.add_argument("--cfg", type=float, default=2.0, help="guidance of category generation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    _, _, device = setup()
    model = load_model(args.ckpt, device=device)
    vae = checked_vae(None, model.meta).to(device)
    draw = Sampler(model, vae, device, args)
    null = model.num_classes
    fast = dict(sampler=args.understand[0], steps=int(args.understand[1]))
    slow = dict(sampler=args.create[0], steps=int(args.create[1]))

    scenes = [toy_scenes.render(toy_scenes.HELD_OUT + i) for i in range(args.num)]
    truth = {m: torch.from_numpy(np.stack([MODALITIES[m].to_pixels(toy_scenes.maps(s)[m]) for s in scenes])) for m in model.modalities}
    with torch.inference_mode():
        rebuilt = torch.stack([torch.cat([vae.decode(vae.encode(x.to(device))[0]).clamp(-1, 1).cpu() for x in truth[m].split(64)])
                               for m in model.modalities], 1)
    ceiling = score(draw.maps(rebuilt), scenes)
    baseline = score({m: [a] * args.num for m, a in mean_maps().items()}, scenes)
    gap = lambda value, key: (value - ceiling[key]) / (baseline[key] - ceiling[key])

    understood = score(draw.maps(draw([null] * args.num, "rgb", truth["rgb"], **fast)), scenes)
    result = {"ceiling": ceiling, "mean_map": baseline, "understand": understood,
              "understand_gap": {k: gap(v, k) for k, v in understood.items()}}

    labels = [i % null for i in range(args.generate)]
    asked = np.array([label // HUES for label in labels])
    generated = draw(labels, cfg=args.cfg, **slow)
    own = draw.maps(generated)
    again = draw.maps(draw([null] * args.generate, "rgb", generated[:, 0], **fast))
    segments = [classes_of(image) for image in own["seg"]]
    result["class_in_segmentation"] = float(np.mean([main_object(s) == a for s, a in zip(segments, asked)]))
    result["class_from_rgb_alone"] = float(np.mean([main_object(classes_of(s)) == a for s, a in zip(again["seg"], asked)]))
    masks = [s == len(toy_scenes.SEGMENTS) - TYPES + max(main_object(s), 0) for s in segments]
    result["hue_in_rgb"] = float(np.mean([mask.any() and hue_of(image, mask) == label % HUES
                                          for image, mask, label in zip(own["rgb"], masks, labels)]))

    conditioned = draw([null] * args.num, "depth", truth["depth"], **slow)
    back = draw.maps(draw([null] * args.num, "rgb", conditioned[:, 0], **fast))["depth"]
    value = float(np.mean([abs_rel(p, s.depth) for p, s in zip(back, scenes)]))
    result["depth_given_returned"] = dict(abs_rel=value, gap=gap(value, "abs_rel"))

    recipe = dict(checkpoint=str(args.ckpt), checkpoint_sha256=sha256(args.ckpt), step=model.step, vae_sha256=model.meta["vae_sha256"],
                  held_out=args.num, generated=args.generate, understand=list(args.understand), create=list(args.create), cfg=args.cfg,
                  seed=args.seed, precision=args.precision, torch=torch.__version__, device=str(device))
    text = json.dumps({**result, "recipe": recipe}, indent=1)
    print(text)
    if args.json:
        with whole_file(args.json) as file:
            file.write(text.encode())


if __name__ == "__main__":
    run(main)
