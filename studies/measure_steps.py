"""Quality against the number of network evaluations (NFE), for every sampler: understanding and generation on
the toy world.

    python studies/measure_steps.py --understood results/demo_understand.json --json results/few_steps.json \\
        --precision bf16 --batch-size 64

Understanding: RGB given, no class, --num held-out scenes, by eval_depth.py. Generation: --generate category
samples at --guidance, and RGB for the given depth of the same scenes, understood in --steps steps of
--sampler, as measure_demo.py does. Settings that the JSON has are not measured again.
"""
import json
import pathlib
import tempfile

from measure_demo import KEYS, Measure, arguments, held_out
from record import call, write_json

import eval_depth
from distributed import check, run, setup

SETTINGS = {  # at about 1, 2, 4, 10, 25 and 250 evaluations
    "euler": (1, 2, 4, 10, 25, 250),
    "heun": (1, 2, 5, 12, 125),
    "ab2": (1, 7, 22),
    "ab4": (4, 16, 241),
    "sde": (4, 10, 25, 250),
}


def understanding(args, checkpoint, sampling):
    """eval_depth.py's scores of KEYS."""
    with tempfile.TemporaryDirectory() as folder:
        found = pathlib.Path(folder, "scores.json")
        flags = ["--toy", args.num, "--ckpt", checkpoint, "--sampler", sampling.sampler,
                 "--steps", sampling.steps, "--precision", sampling.precision, "--seed", args.seed,
                 "--given-time", sampling.given_time, "--middle-scale", sampling.middle_scale,
                 "--batch-size", args.batch_size, "--out", folder, "--json", found]
        call(eval_depth, *flags, *(["--vae", args.vae] if args.vae else []))
        scores = json.loads(found.read_text())
    return {key: scores[key] for key in KEYS.values()}


def main():
    args = arguments(__doc__)
    check(args.json, "--json FILE is needed: it keeps what is measured")
    _, _, device = setup()
    measure = Measure(args, device)
    recipe, found = json.loads(json.dumps(measure.recipe(args))), {}
    if args.json.is_file():
        found = json.loads(args.json.read_text())
    if found.get("recipe") != recipe:
        found = {"recipe": recipe}
    scenes = held_out(0, args.num)
    settings = [(sampler, steps) for sampler, counts in SETTINGS.items() for steps in counts]
    for sampler, steps in settings:
        name = f"{sampler} {steps}"
        if name in found:
            continue
        creating = measure.sampling._replace(sampler=sampler, steps=steps, cfg=1.0)
        guided = creating._replace(cfg=args.guidance)
        found[name] = dict(
            evaluations=creating.evaluations(),
            understand=understanding(args, measure.loaded.path, creating),
            generate=measure.generation(guided, args.generate),
            depth_given=measure.recovery(creating, scenes, ["depth"])["depth"])
        write_json(args.json, found)


if __name__ == "__main__":
    run(main)
