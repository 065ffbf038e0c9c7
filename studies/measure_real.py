"""Score a run of studies/run_real.sh on held-out frames: RGB given, beside the autoencoder and the mean map
of the training frames.

    python studies/measure_real.py --data data/real --sets kitchen livingroom --ckpt runs/real/rooms_0 \\
        --json results/real/rooms_0.json

MMGen by two Euler steps; MT-Diffusion by Algorithm 1 in 50. "frames" is the mean over all frames of the sets.
"""
import json
import pathlib
import shutil
import tempfile

from record import call, named, write_json

import eval_depth
import mt_sample
import sample
from distributed import command_parser, run
from trees import flat_name
from weights import load_checkpoint

MEANS = {"erased": "livingroom"}  # whose frames make a set's mean map, where its own never know the place
KEPT = ("abs_rel", "delta1", "normal_mean", "normal_median", "pixel_accuracy", "class_accuracy", "miou")


def kept(scores):
    return {key: scores[key] for key in KEPT if key in scores}


def score(args, name, method, folder):
    """What eval_depth.py or mt_sample.py says of one set."""
    out = folder / f"{name}.json"
    flags = ["--data", args.data / f"{name}-test", "--ckpt", args.ckpt, "--batch-size", 16, "--json", out]
    if method == "mmgen":
        mean = args.data / f"{MEANS.get(name, name)}-train"
        call(eval_depth, *flags, "--mean-of", mean, "--sampler", "euler", "--steps", 2,
             "--out", folder / "evaluation")
    else:
        call(mt_sample, "--task", "evaluate", *flags, "--steps", 50)
    found = json.loads(out.read_text())
    beside = {part: kept(found[part]) for part in ("ceiling", "mean_map", "gap") if part in found}
    return {**kept(found), **beside, "recipe": named(found["recipe"], "vae")}


def read_again(args, name, folder):
    """Pictures drawn from the depth of held-out frames, and what the reader, a run that had no part in
    them, sees in them: its scores against the depth that was given.
    """
    test, tree = args.data / f"{name}-test", folder / "tree"
    call(eval_depth, "--data", test, "--ckpt", args.reader, "--sampler", "euler", "--steps", 2,
         "--batch-size", 16, "--save-crops", folder / "truth", "--out", folder / "evaluation")
    call(sample, "--task", "condition", "--given", "depth", "--image", test / "depth", "--ckpt", args.ckpt,
         "--fast", "--out", folder / "made")
    for path in (folder / "truth/depth").rglob("*.npy"):
        place = path.relative_to(folder / "truth/depth")
        made = folder / "made/rgb" / f"{flat_name(place.with_suffix('').as_posix())}.png"
        for m, file in (("rgb", made), ("depth", path)):
            link = (tree / m / place).with_suffix(file.suffix)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    shutil.copy(folder / "truth/tree.json", tree / "tree.json")
    call(eval_depth, "--data", tree, "--ckpt", args.reader, "--modality", "depth", "--sampler", "euler",
         "--steps", 2, "--batch-size", 16, "--json", folder / "read.json", "--out", folder / "evaluation")
    found = json.loads((folder / "read.json").read_text())
    drawn = json.loads((folder / "made/meta.json").read_text())
    recipe = {key: drawn[key] for key in ("checkpoint_sha256", "sampler", "steps", "given_time", "seed")}
    return {**kept(found), "reader": named(found["recipe"], "vae"), "pictures": recipe}


def main():
    parser = command_parser(__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--sets", nargs="+", required=True, metavar="SET", help="of DATA/SET-test and -train")
    parser.add_argument("--ckpt", type=pathlib.Path, required=True)
    parser.add_argument("--reader", type=pathlib.Path, metavar="RUN", help="another seed's: reads what is "
                        "drawn from depth alone")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    args = parser.parse_args()
    file = args.ckpt / "latest.pt" if args.ckpt.is_dir() else args.ckpt
    flags = load_checkpoint(file)["config"]["train"]
    with tempfile.TemporaryDirectory() as folder:
        found = {name: score(args, name, flags["method"], pathlib.Path(folder)) for name in args.sets}
        for name in args.sets if args.reader else ():
            inner = pathlib.Path(tempfile.mkdtemp(dir=folder))
            found[name]["drawn_from_depth"] = read_again(args, name, inner)
    counts = {name: row["recipe"]["count"] for name, row in found.items()}
    first = next(iter(found.values()))
    together = {key: sum(counts[name] * row[key] for name, row in found.items()) / sum(counts.values())
                for key in kept(first) if all(key in row for row in found.values())}
    log = (args.ckpt / "log.jsonl").read_text().splitlines() if args.ckpt.is_dir() else []
    rate = [json.loads(line)["img_per_s"] for line in log if "img_per_s" in line]
    write_json(args.json, {**found, "frames": together, "train": named(flags, "data", "run"),
                           "img_per_s_beside_others": sum(rate) / len(rate) if rate else None})
    print(json.dumps({**{name: kept(row) for name, row in found.items()}, "frames": together}, indent=1))


if __name__ == "__main__":
    run(main)
