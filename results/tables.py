"""Write the README's tables from the JSON in this folder, between their markers; --check only compares.

    python results/tables.py
"""
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
README = HERE.parent / "README.md"


def read(name):
    return json.loads((HERE / f"{name}.json").read_text())


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value, form, unit=""):
    return "" if value is None else f"{value:{form}}{unit}"


def ablations():
    """results/ablations.json: {name: {flags, understand: eval_depth.py's JSON}}."""
    rows = [[name, f"`{run['flags']}`" if run["flags"] else "", *(number(run["understand"][key], form) for key, form in (("abs_rel", ".3f"), ("normal_mean", ".1f"), ("miou", ".3f")))]
            for name, run in read("ablations").items()]
    first = read("ablations")["mmgen"]["understand"]
    rows += [[name, "", *(number(first[part][key], form) for key, form in (("abs_rel", ".3f"), ("normal_mean", ".1f"), ("miou", ".3f")))]
             for name, part in (("the training set's mean map", "mean_map"), ("the autoencoder", "ceiling"))]
    return table(["", "flags", "AbsRel", "normals (degrees)", "mIoU"], rows)


def mt_translation():
    """results/mt_translation.json: {name: {flags, evaluations, result: eval_depth.py's JSON}}."""
    runs = read("mt_translation")
    rows = [[name, f"`{run['flags']}`", str(run["result"]["recipe"]["evaluations"]), *(number(run["result"][key], ".3f") for key in ("pixel_accuracy", "class_accuracy", "miou"))]
            for name, run in runs.items()]
    first = next(iter(runs.values()))["result"]
    rows += [[name, "", "", *(number(first[part][key], ".3f") for key in ("pixel_accuracy", "class_accuracy", "miou"))] for name, part in (("mean map", "mean_map"), ("autoencoder", "ceiling"))]
    return table(["", "flags", "evaluations", "pixel accuracy", "class accuracy", "mIoU"], rows)


def mt_restoration():
    result = read("mt_masked")
    rows = [[m, number(row["hidden"], ".0%"), *(number(row[key], ".1f") for key in ("left grey", "sdedit", "restored"))] for m, row in result.items() if m.startswith("m = ")]
    return table(["", "hidden", "left grey", f"SDEdit, {result['recipe']['sdedit']} of the steps", "MT-Diffusion"], rows)


def mt_heads_of_x():
    """results/mt_label.json: {name: tests/measure_mt.py's JSON}; results/mt_feature.json."""
    labels, vector = read("mt_label"), read("mt_feature")
    rows = [[name, number(row["top1"], ".1%"), number(row["top5"], ".1%"), ""] for name, row in labels.items()]
    rows += [["feature: the head's vector", "", "", number(vector["cosine"], ".4f")], ["feature: the training set's mean vector", "", "", number(vector["mean vector"], ".4f")]]
    return table(["the head of X on held-out scenes", "top-1", "top-5", "cosine to the true vector"], rows)


def mt_overhead():
    """results/mt_heads.json: tests/bench.py --what heads."""
    result = read("mt_heads")
    return table(["time of a training step over the single task's", "ms a sample", "ratio"],
                 [[name, number(row["ms_per_sample"], ".1f"), number(row["ratio"], ".3f")] for name, row in result.items() if name != "recipe"])


def speed():
    """results/bench_train_cpu.json and bench_sample_cpu.json: tests/bench.py with --peer."""
    train, sample = read("bench_train_cpu"), read("bench_sample_cpu")
    names = {"ours, fp32": "here, fp32", "ours, bf16": "here, bf16", "peer, fp32": "the authors' code, fp32"}
    return table(["S/2, 16x16 latents, 2 CPU cores", "training, img/s", "over the authors'", "sampling, img/s", "over the authors'"],
                 [[names[row], number(train[row]["img_per_s"], ".1f"), number(train[row].get("ratio to peer, fp32"), ".2f", " x"), number(sample[row]["img_per_s"], ".2f"),
                   number(sample[row].get("ratio"), ".2f", " x")] for row in names])


def data_speed():
    """results/bench_load_cpu.json and bench_prep_cpu.json."""
    load, prep = read("bench_load_cpu"), read("bench_prep_cpu")["prep"]
    return table(["loader, warm, with DINO", "without", "`prep_latents.py`, toy scenes", "its time in the encoder"],
                 [[number(load["with DINO"]["samples_per_s"], ",.0f", " samples/s"), number(load["without"]["samples_per_s"], ",.0f", " samples/s"),
                   number(prep["img_per_s"], ".0f", " scenes/s"), number(prep["encoder_share"], ".0%")]])


TABLES = {f.__name__: f for f in (speed, data_speed, ablations, mt_translation, mt_restoration, mt_heads_of_x, mt_overhead)}


def main():
    text = old = README.read_text()
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, rest = text.split(begin)
        text = before + begin + make() + end + rest.split(end, 1)[1]
    if "--check" in sys.argv:
        sys.exit(0 if text == old else "README.md is not what results/*.json say; run python results/tables.py")
    README.write_text(text)


if __name__ == "__main__":
    main()
