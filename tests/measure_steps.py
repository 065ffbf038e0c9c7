"""Quality against the number of network evaluations (NFE), for every sampler: understanding and generation on the toy world.

    python tests/measure_steps.py --understood results/demo_understand.json --json results/few_steps.json --precision bf16 --batch-size 64

Understanding: RGB given, no class, --num held-out scenes, by eval_depth.py. Generation: --generate category samples at
--guidance, and RGB for the given depth of the same scenes, understood in --steps steps of --sampler, as tests/measure_demo.py does. Settings that the JSON has are not measured again.
"""
import json
import pathlib
import sys
import tempfile
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

import eval_depth  # noqa: E402
import toy_scenes  # noqa: E402
from distributed import InputError, run, setup, whole_file  # noqa: E402
from measure_demo import KEYS, Measure, arguments, creating  # noqa: E402
from sample import evaluations, sampling_recipe  # noqa: E402

SETTINGS = {  # at about 1, 2, 4, 10, 25 and 250 evaluations
    "euler": (1, 2, 4, 10, 25, 250),
    "heun": (1, 2, 5, 12, 125),
    "ab2": (1, 7, 22),
    "ab4": (4, 16, 241),
    "sde": (4, 10, 25, 250),
}


def understanding(args, checkpoint, sampler, steps, folder):
    """eval_depth.py's scores of KEYS."""
    flags = dict(toy=args.num, ckpt=checkpoint, vae=args.vae, sampler=sampler, steps=steps, precision=args.precision, seed=args.seed, batch_size=args.batch_size, out=folder, json=f"{folder}/x.json")
    argv = [text for name, value in flags.items() if value is not None for text in (f"--{name.replace('_', '-')}", str(value))]
    with mock.patch.object(sys, "argv", ["eval_depth.py", *argv]):
        eval_depth.main()
    found = json.loads(pathlib.Path(folder, "x.json").read_text())
    return {key: found[key] for key in KEYS.values()}


def main():
    args = arguments(__doc__)
    if not args.json:
        raise InputError("--json FILE is needed: it keeps what is measured")
    _, _, device = setup()
    measure = Measure(args, device)
    recipe = dict(**sampling_recipe(args, measure.checkpoint, measure.model), guidance=args.guidance, held_out=args.num, generated=args.generate, torch=torch.__version__, device=device.type)
    scenes = [toy_scenes.render(toy_scenes.HELD_OUT + i) for i in range(args.num)]
    found = json.loads(args.json.read_text()) if args.json.is_file() else {}
    found = found if found.get("recipe") == json.loads(json.dumps(recipe)) else {"recipe": recipe}
    for sampler, steps in ((sampler, steps) for sampler, all_steps in SETTINGS.items() for steps in all_steps):
        if f"{sampler} {steps}" in found:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found[f"{sampler} {steps}"] = dict(evaluations=evaluations(sampler, steps), understand=understanding(args, measure.checkpoint, sampler, steps, folder),
                                               generate=measure.generation(creating(args, sampler, steps, args.guidance), args.generate),
                                               depth_given=measure.recovery(creating(args, sampler, steps), scenes, ["depth"])["depth"])
        with whole_file(args.json) as file:
            file.write(json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    run(main)
