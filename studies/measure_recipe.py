"""Score every checkpoint of a run on the toy world: what a recipe has learnt after how many samples.

    python studies/measure_recipe.py --run runs/recipes/muon_0 --json muon_0.json

RGB given, two Euler steps, no class: AbsRel, normals, mIoU on --num held-out scenes. Drawn without guidance,
each class in turn, ab2 of 7 steps: latent Frechet distance of --generate samples to 2,048 held-out scenes,
and the share that shows its class. Depth given, four Euler steps: the AbsRel of that depth against what the
bundled weights read in the RGB that is drawn. A model with middle heads is at last scored at the scales of
internal guidance, too.
"""
import json
import pathlib

import numpy as np
import torch
from measure_demo import KEYS, Measure, held_out, scene_pixels, scores, truth_of
from record import write_json

import samplers
from distributed import command_parser, run, setup
from evaluation import seen_class
from weights import DEMO, load_model

SCALES = 1.2, 1.4, 2.0
SCENES = 2048  # of the Frechet distance


def score(measure, scenes, count):
    """{score: value} of the checkpoint that the measure holds."""
    sampling = measure.sampling._replace
    seen = measure.understand(scene_pixels("rgb", scenes), measure.loaded)
    truth = {m: [truth_of(m, scene) for scene in scenes] for m in KEYS}
    found = scores({m: measure.maps(seen, m) for m in KEYS}, truth)
    labels = [i % measure.classes for i in range(count)]
    at = [measure.loaded.model.modalities.index(m) for m in ("rgb", "seg")]
    drawn = measure.draw(sampling(sampler="ab2", steps=7), labels, wanted=at)
    found["latent_fd"] = measure.distance(drawn[:, 0])
    hits = [seen_class(*sample.numpy()) == label for sample, label in zip(drawn, labels)]
    found["class"] = float(np.mean(hits))
    given = {"depth": scene_pixels("depth", scenes)}
    made = measure.draw(sampling(steps=4), [measure.classes] * len(scenes), given, wanted=at[:1])
    read = measure.maps(measure.understand(made[:, 0]), "depth", measure.reader)
    found["given_depth"] = scores({"depth": read}, {"depth": truth["depth"]})["abs_rel"]
    return found


def main():
    parser = command_parser(__doc__)
    parser.add_argument("--run", type=pathlib.Path, required=True)
    parser.add_argument("--num", type=int, default=128, help="held-out scenes")
    parser.add_argument("--generate", type=int, default=512, help="drawn scenes")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    samplers.add_flags(parser)
    parser.set_defaults(sampler="euler", steps=2, batch_size=64)
    args = parser.parse_args()
    args.reader, args.understood, args.scenes = DEMO / "mmgen.pt", None, SCENES
    _, _, device = setup()
    files = sorted((args.run / "ckpt").glob("*.pt"))
    args.ckpt = files[0]
    measure, scenes, evaluations = Measure(args, device), held_out(0, args.num), []
    for file in files:
        measure.loaded = load_model(file, device)
        step, batch = measure.loaded.step, measure.loaded.train["batch_size"]
        evaluations.append({"step": step, "samples": step * batch, **score(measure, scenes, args.generate)})
        print(json.dumps(evaluations[-1]), flush=True)
    scales = {}
    if measure.loaded.model.middle_heads is not None:
        for scale in SCALES:
            measure.sampling = measure.sampling._replace(middle_scale=scale)
            scales[scale] = score(measure, scenes, args.generate)
    log = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines()]
    rates = [entry["img_per_s"] for entry in log if "img_per_s" in entry]
    recipe = dict(flags=measure.loaded.train, img_per_s_beside_others=float(np.median(rates)),
                  held_out=args.num, generated=args.generate, scenes=SCENES, seed=args.seed,
                  precision=args.precision, reader_sha256=measure.reader.sha256, torch=torch.__version__,
                  device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    write_json(args.json, {"evaluations": evaluations, "middle_scales": scales, "recipe": recipe})


if __name__ == "__main__":
    run(main)
