"""Measure generation on the toy world: does it obey the class, do its modalities agree, does a given map come
back?

    python eval_depth.py --toy 256 --ckpt demo/mmgen.pt --sampler euler --steps 2 \\
        --json results/demo_understand.json
    python studies/measure_demo.py --sampler euler --steps 2 --understood results/demo_understand.json \\
        --json results/demo_generate.json

--sampler and --steps are those of understanding, --create those of generation. Remaining gap = (value -
ceiling) / (mean map - ceiling), with the ceiling that eval_depth.py measured and the mean map scored against
the same maps; a generated disparity of 1 and 0 is taken for NEAR and FAR. The latent Frechet distance is that
of the autoencoder's mean latents, pooled to 4x4 places, to --scenes held-out scenes; it is not FID. Of a
model that lacks modalities, what it has is measured; --tasks says which.
"""
import functools
import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from record import report
from tqdm import tqdm

import samplers
import toy_scenes
from distributed import command_parser, run, setup
from evaluation import Ceiling, mean_of, toy_training
from eval_fid import add_moments, finish_moments, frechet
from images import nearest_colour
from metrics import Rules, metrics_of, results
from modalities import MODALITIES
from toy_scenes import hue_of, main_object
from vae import encoder_of
from weights import DEMO, load_model

TYPES, HUES, PALETTE = len(toy_scenes.TYPES), len(toy_scenes.HUES), toy_scenes.PALETTE
FIRST = len(toy_scenes.SEGMENTS) - TYPES  # the segment of the first type
KEYS = {"depth": "abs_rel", "normal": "normal_mean", "seg": "miou"}
NEAR, FAR = 1.2, 5.7  # of held-out scenes in the mean: the depths that a disparity of 1 and 0 is taken for


def held_out(first, count):
    """Scenes that no training has seen."""
    return [toy_scenes.render(toy_scenes.HELD_OUT + first + i) for i in range(count)]


def scene_pixels(modality, scenes):
    """A modality of scenes as the network's pixels (n, 3, S, S)."""
    row = MODALITIES[modality]
    return torch.from_numpy(np.stack([row.to_pixels(toy_scenes.maps(scene)[modality]) for scene in scenes]))


def truth_of(modality, scene):
    """A map as eval_depth.py's metrics take it: depth in units."""
    return scene.depth if modality == "depth" else toy_scenes.maps(scene)[modality]


def scores(predicted, truth):
    """{modality: maps} against {modality: maps} -> {score of KEYS: value}."""
    metrics = metrics_of(truth, Rules(palette=PALETTE))
    for m, metric in metrics.items():
        for i, (map_, true) in enumerate(zip(predicted[m], truth[m])):
            metric.add(i, str(i), true, map_)
    found = results(metrics)
    return {KEYS[m]: found[KEYS[m]] for m in truth}


def share(hits):
    return float(np.mean(hits))


@torch.inference_mode()
def latent_moments(encoder, rgb, device):
    """Mean and covariance of the mean latents of pixels (n, 3, S, S), pooled to 4x4 places."""
    sums = None
    for part in rgb.split(64):
        mean, _ = encoder.vae.encode(part.to(device))
        x = F.adaptive_avg_pool2d(mean, 4).flatten(1).cpu()
        if sums is None:
            sums = torch.zeros(1 + x.shape[1], x.shape[1], dtype=torch.float64)
        add_moments(sums, x)
    return finish_moments(sums, len(rgb))


class Measure:
    """What is measured of one checkpoint, which `sampling` lets understand. Pixels are (n, M, 3, S, S) in
    [-1, 1].
    """

    def __init__(self, args, device):
        self.sampling, self.device = samplers.from_flags(args), device
        self.seed, self.batch_size, self.scenes = args.seed, args.batch_size, args.scenes
        self.loaded = self.reader = self.open(args.ckpt or DEMO / "mmgen.pt", args.compile)
        if args.reader:
            self.reader = self.open(args.reader, args.compile)
        self.encoder = encoder_of(self.loaded.meta, device, args.vae)
        self.ceiling = json.loads(args.understood.read_text())["ceiling"] if args.understood else None

    def open(self, path, compile):
        loaded = load_model(path, self.device)
        samplers.check_model(loaded, self.sampling)
        samplers.make_fast(loaded.model, self.sampling.precision, compile)
        return loaded

    @property
    def classes(self):
        return self.loaded.model.num_classes

    def draw(self, sampling, labels, given=None, loaded=None, wanted=None):
        """Samples of classes, given pixels of some modalities {modality: (n, 3, S, S)}: of all modalities, or
        of those at the wanted places.
        """
        model, out = (loaded or self.loaded).model, []
        for i in tqdm(range(0, len(labels), self.batch_size), leave=False):
            rows = slice(i, i + self.batch_size)
            y = torch.tensor(labels[rows], device=self.device)
            noise = samplers.Noise(self.seed, range(i, i + len(y)), self.device)
            held = {m: self.encoder.encode(pixels[rows], noise) for m, pixels in (given or {}).items()}
            x = samplers.sample_latents(model, y, held, noise, sampling)
            out.append(samplers.decode(self.encoder, x, wanted, sampling.precision).cpu())
        return torch.cat(out)

    def understand(self, rgb, loaded=None):
        """All modalities of pixels (n, 3, S, S), by the reader or another model."""
        loaded, sampling = loaded or self.reader, self.sampling
        if loaded.model.middle_heads is None:
            sampling = sampling._replace(middle_scale=1.0)
        return self.draw(sampling, [loaded.model.num_classes] * len(rgb), {"rgb": rgb}, loaded)

    @property
    def modalities(self):
        return self.loaded.model.modalities

    def maps(self, pixels, modality, loaded=None):
        at = (loaded or self.loaded).model.modalities.index(modality)
        return [MODALITIES[modality].from_pixels(sample[at].numpy()) for sample in pixels]

    def segments(self, pixels, loaded=None):
        return [nearest_colour(image, PALETTE) for image in self.maps(pixels, "seg", loaded)]

    def agreement(self, predicted, truth):
        """Scores of predicted maps {modality: maps} against true ones, of KEYS, the mean map's against the
        same, and the remaining gaps.
        """
        values = scores(predicted, truth)
        guess = scores({m: [self.guess[m]] * len(maps) for m, maps in truth.items()}, truth)
        gap = {key: (value - self.ceiling[key]) / (guess[key] - self.ceiling[key])
               for key, value in values.items()}
        return {**values, "mean_map": guess, "gap": gap}

    @functools.cached_property
    def guess(self):
        """The training scenes' mean maps."""
        source, metrics = toy_training(), metrics_of(KEYS, Rules(palette=PALETTE))
        source.modalities = list(KEYS)
        return mean_of(source, Ceiling(self.encoder, self.loaded.meta["resolution"], metrics), PALETTE)

    def moments(self, rgb):
        return latent_moments(self.encoder, rgb, self.device)

    @functools.cached_property
    def reference(self):
        """Moments of held-out scenes."""
        return self.moments(scene_pixels("rgb", held_out(10_000, self.scenes)))

    def distance(self, rgb):
        return frechet(*self.moments(rgb), *self.reference)

    def generation(self, sampling, count):
        """count category samples, the classes in turn: class, hue, agreement of the modalities, Frechet
        distance.
        """
        labels = [i % self.classes for i in range(count)]
        asked = [label // HUES for label in labels]
        generated = self.draw(sampling, labels)
        again = self.understand(generated[:, 0])
        seen = self.segments(again, self.reader)
        found = {"class_from_rgb_alone": share([main_object(s) == a for s, a in zip(seen, asked)])}
        own = seen
        if "seg" in self.modalities:
            own = self.segments(generated)
            found["class_in_segmentation"] = share([main_object(s) == a for s, a in zip(own, asked)])
        hues = [hue_of(image, segments == FIRST + max(main_object(segments), 0))
                for image, segments in zip(self.maps(generated, "rgb"), own)]
        found["hue_in_rgb"] = share([hue == label % HUES for hue, label in zip(hues, labels)])
        both = [m for m in KEYS if m in self.modalities]
        made = {m: self.maps(generated, m) for m in both}
        if "depth" in made:
            made["depth"] = [1 / (1 / FAR + (1 / NEAR - 1 / FAR) * d.clip(0, 1)) for d in made["depth"]]
        if made:
            read = {m: self.maps(again, m, self.reader) for m in both}
            found["rgb_understood_against_generated"] = self.agreement(read, made)
        real = scene_pixels("rgb", held_out(20_000, count))
        return {**found, "latent_fd": self.distance(generated[:, 0]),
                "latent_fd_of_as_many_scenes": self.distance(real)}

    def recovery(self, sampling, scenes, modalities=tuple(KEYS)):
        """RGB generated from each given map that the model has, understood again, against that map; its
        Frechet distance.
        """
        out, labels = {}, [self.classes] * len(scenes)
        for m in [m for m in modalities if m in self.modalities]:
            conditioned = self.draw(sampling, labels, {m: scene_pixels(m, scenes)})
            read = self.maps(self.understand(conditioned[:, 0]), m, self.reader)
            out[m] = self.agreement({m: read}, {m: [truth_of(m, scene) for scene in scenes]})
            out[m]["latent_fd"] = self.distance(conditioned[:, 0])
        return out

    def recipe(self, args):
        """What was measured, and how."""
        reader = str(args.reader) if args.reader else None
        return dict(**self.sampling.recipe(self.loaded, self.encoder, self.seed),
                    reader=reader, guidance=args.guidance, held_out=args.num, generated=args.generate,
                    scenes=args.scenes, torch=torch.__version__, device=self.device.type)


def arguments(doc):
    """The flags of the toy measurements."""
    parser = command_parser(doc)
    add = parser.add_argument
    add("--num", type=int, default=256, help="held-out scenes for conditioned generation")
    add("--generate", type=int, default=200, help="category samples")
    add("--scenes", type=int, default=4096, help="held-out scenes of the Frechet distance")
    add("--tasks", nargs="+", choices=("generation", "given"), default=("generation", "given"),
        help="what is measured")
    add("--create", nargs=2, default=("euler", "50"), metavar=("SAMPLER", "STEPS"))
    add("--guidance", type=float, default=2.0, help="of category generation")
    add("--understood", type=pathlib.Path, required=True,
        help="the JSON of eval_depth.py --toy: the autoencoder's ceiling")
    add("--reader", help="checkpoint that understands the generated RGB; default: the same")
    add("--json", type=pathlib.Path)
    samplers.add_flags(parser)
    return parser.parse_args()


def main():
    args = arguments(__doc__)
    _, _, device = setup()
    measure = Measure(args, device)
    sampler, steps = args.create
    creating = measure.sampling._replace(sampler=sampler, steps=int(steps), cfg=1.0)
    result = {}
    if "generation" in args.tasks:
        result = measure.generation(creating._replace(cfg=args.guidance), args.generate)
    if "given" in args.tasks:
        result["given_map_recovered"] = measure.recovery(creating, held_out(0, args.num))
    report(result, {**measure.recipe(args), "create": list(args.create)}, args.json)


if __name__ == "__main__":
    run(main)
