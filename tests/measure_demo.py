"""Measure generation on the toy world: does it obey the class, do its modalities agree, does a given map come back?

    python eval_depth.py --toy 256 --ckpt demo/mmgen.pt --sampler euler --steps 2 --json results/demo_understand.json
    python tests/measure_demo.py --sampler euler --steps 2 --understood results/demo_understand.json --json results/demo_generate.json

--sampler and --steps are those of understanding, --create those of generation. Remaining gap = (value - ceiling) /
(mean map - ceiling), with the ceiling and the baseline that eval_depth.py measured.
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
from eval_depth import align, depth_scores  # noqa: E402
from model import MODALITIES  # noqa: E402
from prep_latents import nearest_colour  # noqa: E402
from sample import DEMO, Noise, check_sampling_flags, checked_vae, decode_latents, draw_from, open_model, sampling_flags, sampling_recipe  # noqa: E402

TYPES, HUES = len(toy_scenes.TYPES), len(toy_scenes.HUES)


def main_object(segments):
    """The type (index into TYPES) of the largest object in a map of segment indices, -1 for none."""
    areas = [(segments == len(toy_scenes.SEGMENTS) - TYPES + k).sum() for k in range(TYPES)]
    return int(np.argmax(areas)) if max(areas) else -1


def hue_of(image, mask):
    """The nearest hue family (index into HUES) of the median colour under the mask."""
    import colorsys
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=256, help="held-out scenes for conditioned generation")
    parser.add_argument("--generate", type=int, default=200, help="category samples")
    parser.add_argument("--create", nargs=2, default=("euler", "50"), metavar=("SAMPLER", "STEPS"))
    parser.add_argument("--guidance", type=float, default=2.0, help="of category generation")
    parser.add_argument("--understood", type=pathlib.Path, required=True, help="the JSON of eval_depth.py --toy: ceiling and mean map")
    parser.add_argument("--json", type=pathlib.Path)
    sampling_flags(parser)
    args = parser.parse_args()
    check_sampling_flags(args)
    _, _, device = setup()
    checkpoint = args.ckpt or DEMO / "mmgen.pt"
    model = open_model(checkpoint, device)
    vae = checked_vae(args.vae, model.meta).to(device)
    fast = argparse.Namespace(**vars(args))  # understanding, with the flags' sampler and steps
    slow = argparse.Namespace(**{**vars(args), "sampler": args.create[0], "steps": int(args.create[1])})
    null, S = model.num_classes, toy_scenes

    def draw(options, labels, pixels=None):
        """-> decoded pixels (n, M, 3, S, S)."""
        out = []
        for i in tqdm(range(0, len(labels), args.batch_size), leave=False):
            y = torch.tensor(labels[i:i + args.batch_size], device=device)
            given = {m: p[i:i + args.batch_size] for m, p in (pixels or {}).items()}
            x = draw_from(options, model, vae, y, given, Noise(args.seed, range(i, i + len(y)), device))
            out.append(decode_latents(vae, x, model.latent_channels).cpu())
        return torch.cat(out)

    def maps(pixels, modality):
        return [MODALITIES[modality].from_pixels(p[model.modalities.index(modality)].numpy()) for p in pixels]

    labels = [i % null for i in range(args.generate)]
    asked = np.array([label // HUES for label in labels])
    generated = draw(argparse.Namespace(**{**vars(slow), "cfg": args.guidance}), labels)
    again = draw(fast, [null] * args.generate, {"rgb": generated[:, 0]})
    own, seen = ([nearest_colour(image, S.PALETTE) for image in maps(p, "seg")] for p in (generated, again))
    masks = [s == len(S.SEGMENTS) - TYPES + max(main_object(s), 0) for s in own]
    share = lambda hits: float(np.mean(hits))
    result = {"class_in_segmentation": share([main_object(s) == a for s, a in zip(own, asked)]),
              "class_from_rgb_alone": share([main_object(s) == a for s, a in zip(seen, asked)]),
              "hue_in_rgb": share([mask.any() and hue_of(image, mask) == label % HUES for image, mask, label in zip(maps(generated, "rgb"), masks, labels)])}

    known = json.loads(args.understood.read_text())
    gap = lambda value, key: (value - known["ceiling"][key]) / (known["mean_map"][key] - known["ceiling"][key])

    def agreement(predicted, truth):
        """AbsRel of disparity maps against depth maps."""
        everywhere = np.ones(truth[0].shape, bool)
        value = float(np.mean([depth_scores(align(p, d, everywhere, "disparity"), d, everywhere)["abs_rel"] for p, d in zip(predicted, truth)]))
        return {"abs_rel": value, "gap": gap(value, "abs_rel")}

    scenes = [S.render(S.HELD_OUT + i) for i in range(args.num)]
    depth = torch.from_numpy(np.stack([MODALITIES["depth"].to_pixels(1 / s.depth) for s in scenes]))
    conditioned = draw(slow, [null] * args.num, {"depth": depth})
    back = draw(fast, [null] * args.num, {"rgb": conditioned[:, 0]})
    result["depth_given_returned"] = agreement(maps(back, "depth"), [s.depth for s in scenes])

    recipe = dict(**sampling_recipe(fast, checkpoint, model), create=list(args.create), guidance=args.guidance, held_out=args.num, generated=args.generate,
                  torch=torch.__version__, device=device.type)
    report(result, recipe, args.json)


if __name__ == "__main__":
    run(main)
