"""Measure generation on the toy world: does it obey the class, do its modalities agree, does a given map come back?

    python eval_depth.py --toy 256 --ckpt demo/mmgen.pt --sampler euler --steps 2 --json results/demo_understand.json
    python tests/measure_demo.py --sampler euler --steps 2 --understood results/demo_understand.json --json results/demo_generate.json

--sampler and --steps are those of understanding, --create those of generation. Remaining gap = (value - ceiling) /
(mean map - ceiling), with the ceiling that eval_depth.py measured and the mean map scored against the same maps; a generated
disparity of 1 and 0 is taken for NEAR and FAR. The latent Frechet distance is that of
the autoencoder's mean latents, pooled to 4x4 places, to 2,000 held-out scenes; it is not FID.
"""
import argparse
import colorsys
import functools
import json
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import toy_scenes  # noqa: E402
from distributed import run, setup, whole_file  # noqa: E402
from eval_depth import Frame, Tally, mean_map  # noqa: E402
from eval_fid import add_moments, finish_moments, frechet  # noqa: E402
from model import MODALITIES  # noqa: E402
from prep_latents import nearest_colour  # noqa: E402
from sample import DEMO, Noise, check_sampling_flags, checked_vae, decode_latents, draw_from, open_model, sampling_flags, sampling_recipe, settle_flags  # noqa: E402
from weights import locate  # noqa: E402

TYPES, HUES, PALETTE = len(toy_scenes.TYPES), len(toy_scenes.HUES), toy_scenes.PALETTE
KEYS = {"depth": "abs_rel", "normal": "normal_mean", "seg": "miou"}
NEAR, FAR = 1.2, 5.7  # of held-out scenes in the mean: the metric depths that a generated disparity of 1 and 0 is taken for


def main_object(segments):
    """The type (index into TYPES) of the largest object in a map of segment indices, -1 for none."""
    areas = [(segments == len(toy_scenes.SEGMENTS) - TYPES + k).sum() for k in range(TYPES)]
    return int(np.argmax(areas)) if max(areas) else -1


def hue_of(image, mask):
    """The nearest hue family (index into HUES) of the median colour under the mask."""
    hue = colorsys.rgb_to_hsv(*np.median(image[mask], 0) / 255)[0]
    distance = [abs((hue - sum(span) / 2 + 0.5) % 1 - 0.5) for span in toy_scenes.HUES.values()]
    return int(np.argmin(distance))


def report(result, recipe, path):
    """Print a result with its recipe and write it to path, if there is one."""
    text = json.dumps({**result, "recipe": recipe}, indent=1)
    print(text)
    if path:
        with whole_file(path) as file:
            file.write(text.encode())


class Measure:
    """What is measured of one checkpoint. Pixels are (n, M, 3, S, S) in [-1, 1]."""

    def __init__(self, args, device):
        self.args, self.device, self.checkpoint = args, device, locate(args.ckpt or DEMO / "mmgen.pt")
        self.model = open_model(self.checkpoint, device, args.precision, args.compile)
        settle_flags(args, self.model)
        self.vae = checked_vae(args.vae, self.model.meta).to(device)
        self.reader = open_model(locate(args.reader), device, args.precision, args.compile) if args.reader else self.model
        self.known = json.loads(args.understood.read_text())

    def draw(self, options, labels, given=None, model=None):
        """Samples of classes, given pixels of some modalities {modality: (n, 3, S, S)}; options: the sampling flags."""
        model = model or self.model
        out = []
        for i in tqdm(range(0, len(labels), options.batch_size), leave=False):
            y = torch.tensor(labels[i:i + options.batch_size], device=self.device)
            part = {m: p[i:i + options.batch_size] for m, p in (given or {}).items()}
            x = draw_from(options, model, self.vae, y, part, Noise(options.seed, range(i, i + len(y)), self.device))
            out.append(decode_latents(self.vae, x, model.latent_channels, options.precision).cpu())
        return torch.cat(out)

    def understand(self, rgb):
        return self.draw(self.args, [self.reader.num_classes] * len(rgb), {"rgb": rgb}, self.reader)

    def maps(self, pixels, modality):
        return [MODALITIES[modality].from_pixels(p[self.model.modalities.index(modality)].numpy()) for p in pixels]

    def agreement(self, predicted, truth):
        """Scores of predicted maps {modality: maps} against true ones, of KEYS, the mean map's against the same, and the remaining gaps."""
        scoring = argparse.Namespace(depth_range=(1e-3, 10.0), alignment="disparity", seg_mode="semantic", eps=None)

        def score(predicted):
            tally = Tally(scoring, PALETTE)
            for i in range(len(next(iter(truth.values())))):
                tally.add(i, Frame(str(i), None, None, {m: maps[i] for m, maps in truth.items()}, None), {m: maps[i] for m, maps in predicted.items()})
            return {KEYS[m]: tally.result()[KEYS[m]] for m in truth}
        values, guess = score(predicted), score({m: [mean_map()[m]] * len(maps) for m, maps in truth.items()})
        gap = lambda k: (values[k] - self.known["ceiling"][k]) / (guess[k] - self.known["ceiling"][k])
        return {**values, "mean_map": guess, "gap": {k: gap(k) for k in values}}

    def moments(self, rgb):
        """Mean and covariance of the mean latents of pixels (n, 3, S, S), pooled to 4x4 places."""
        sums = None
        with torch.inference_mode():
            for part in rgb.split(64):
                x = F.adaptive_avg_pool2d(self.vae.encode(part.to(self.device))[0], 4).flatten(1).cpu()
                sums = torch.zeros(1 + x.shape[1], x.shape[1], dtype=torch.float64) if sums is None else sums
                add_moments(sums, x)
        return finish_moments(sums, len(rgb))

    @functools.cached_property
    def reference(self):
        """Moments of 2,000 held-out scenes."""
        return self.moments(scene_pixels("rgb", [toy_scenes.render(toy_scenes.HELD_OUT + 10_000 + i) for i in range(2000)]))

    def generation(self, options, count):
        """count category samples, the classes in turn: class, hue, agreement of the modalities, Frechet distance."""
        labels = [i % self.model.num_classes for i in range(count)]
        asked = np.array([label // HUES for label in labels])
        generated = self.draw(options, labels)
        again = self.understand(generated[:, 0])
        own, seen = ([nearest_colour(image, PALETTE) for image in self.maps(p, "seg")] for p in (generated, again))
        masks = [s == len(toy_scenes.SEGMENTS) - TYPES + max(main_object(s), 0) for s in own]
        share = lambda hits: float(np.mean(hits))
        both = [{m: self.maps(p, m) for m in KEYS} for p in (again, generated)]
        both[1]["depth"] = [1 / (1 / FAR + (1 / NEAR - 1 / FAR) * d.clip(0, 1)) for d in both[1]["depth"]]
        real = scene_pixels("rgb", [toy_scenes.render(toy_scenes.HELD_OUT + 20_000 + i) for i in range(count)])
        distance = lambda rgb: frechet(*self.moments(rgb), *self.reference)
        return {"class_in_segmentation": share([main_object(s) == a for s, a in zip(own, asked)]),
                "class_from_rgb_alone": share([main_object(s) == a for s, a in zip(seen, asked)]),
                "hue_in_rgb": share([mask.any() and hue_of(image, mask) == label % HUES for image, mask, label in zip(self.maps(generated, "rgb"), masks, labels)]),
                "rgb_understood_against_generated": self.agreement(*both),
                "latent_fd": distance(generated[:, 0]), "latent_fd_of_as_many_scenes": distance(real)}

    def recovery(self, options, scenes, modalities=tuple(KEYS)):
        """RGB generated from each given map, understood again, against that map."""
        out = {}
        for m in modalities:
            conditioned = self.draw(options, [self.model.num_classes] * len(scenes), {m: scene_pixels(m, scenes)})
            out[m] = self.agreement({m: self.maps(self.understand(conditioned[:, 0]), m)},
                                    {m: [s.depth if m == "depth" else s.normal if m == "normal" else PALETTE[s.seg] for s in scenes]})
        return out


def scene_pixels(modality, scenes):
    """A modality of scenes as the network's pixels (n, 3, S, S)."""
    array = lambda s: {"rgb": s.rgb, "depth": 1 / s.depth, "normal": s.normal, "seg": PALETTE[s.seg]}[modality]
    return torch.from_numpy(np.stack([MODALITIES[modality].to_pixels(array(s)) for s in scenes]))


def arguments(doc):
    """The flags of the toy measurements -> understanding's options and generation's."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=256, help="held-out scenes for conditioned generation")
    parser.add_argument("--generate", type=int, default=200, help="category samples")
    parser.add_argument("--create", nargs=2, default=("euler", "50"), metavar=("SAMPLER", "STEPS"))
    parser.add_argument("--guidance", type=float, default=2.0, help="of category generation")
    parser.add_argument("--understood", type=pathlib.Path, required=True, help="the JSON of eval_depth.py --toy: ceiling and mean map")
    parser.add_argument("--reader", help="checkpoint that understands the generated RGB; default: the same")
    parser.add_argument("--json", type=pathlib.Path)
    sampling_flags(parser)
    args = parser.parse_args()
    check_sampling_flags(args)
    return args


def creating(args, sampler, steps, cfg=1.0):
    return argparse.Namespace(**{**vars(args), "sampler": sampler, "steps": int(steps), "cfg": cfg})


def main():
    args = arguments(__doc__)
    _, _, device = setup()
    measure = Measure(args, device)
    result = {**measure.generation(creating(args, *args.create, args.guidance), args.generate),
              "given_map_recovered": measure.recovery(creating(args, *args.create), [toy_scenes.render(toy_scenes.HELD_OUT + i) for i in range(args.num)])}
    recipe = dict(**sampling_recipe(args, measure.checkpoint, measure.model), create=list(args.create), reader=args.reader and str(args.reader), guidance=args.guidance, held_out=args.num, generated=args.generate,
                  torch=torch.__version__, device=device.type)
    report(result, recipe, args.json)


if __name__ == "__main__":
    run(main)
