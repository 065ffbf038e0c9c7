"""Write the README's tables, and demo/study.png, from the JSON in this folder; --check only compares the tables.

    python results/tables.py
"""
import json
import pathlib
import re
import sys

from PIL import Image, ImageDraw, ImageFont

HERE = pathlib.Path(__file__).resolve().parent
README = HERE.parent / "README.md"


def read(name):
    return json.loads((HERE / f"{name}.json").read_text())


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value, form, unit=""):
    return "" if value is None else f"{value:{form}}{unit}"


KEYS = (("abs_rel", ".3f"), ("normal_mean", ".1f"), ("miou", ".3f"))  # of understanding


def ablations():
    """results/ablations.json: {name: {flags, understand: eval_depth.py's JSON}}."""
    rows = [[name, f"`{run['flags']}`" if run["flags"] else "", *(number(run["understand"][key], form) for key, form in KEYS)]
            for name, run in read("ablations").items()]
    first = read("ablations")["mmgen"]["understand"]
    rows += [[name, "", *(number(first[part][key], form) for key, form in KEYS)]
             for name, part in (("the training set's mean map", "mean_map"), ("the autoencoder", "ceiling"))]
    return table(["", "flags", "AbsRel", "normals (degrees)", "mIoU"], rows)


STUDIED = {  # column: how it is read from a run's JSON, its form, whether more is better
    "AbsRel": (lambda u, g: u.get("abs_rel"), ".3f", False),
    "normals (degrees)": (lambda u, g: u.get("normal_mean"), ".1f", False),
    "mIoU": (lambda u, g: u.get("miou"), ".3f", True),
    "class": (lambda u, g: g and g["class_in_segmentation"], ".2f", True),
    "latent FD": (lambda u, g: g and g["latent_fd"], ".2f", False),
    "joint: AbsRel": (lambda u, g: g and g["rgb_understood_against_generated"]["abs_rel"], ".3f", False),
    "joint: mIoU": (lambda u, g: g and g["rgb_understood_against_generated"]["miou"], ".3f", True),
    "depth given: AbsRel": (lambda u, g: g and g["given_map_recovered"]["depth"]["abs_rel"], ".3f", False),
    "normals given": (lambda u, g: g and g["given_map_recovered"]["normal"]["normal_mean"], ".1f", False),
    "seg. given: mIoU": (lambda u, g: g and g["given_map_recovered"]["seg"]["miou"], ".3f", True),
}


def studied():
    """results/study/<row>_<seed>_{understand,generate}.json -> {row: {column: values of its seeds}}, rows as results/run_study.sh has them."""
    order = re.findall(r"^ +row ([\w$-]+) ", (HERE / "run_study.sh").read_text(), re.M)
    found = {}
    for path in sorted((HERE / "study").glob("*_understand.json")):
        name, seed = path.stem.split("_")[:2]
        generated = HERE / "study" / f"{name}_{seed}_generate.json"
        runs = json.loads(path.read_text()), json.loads(generated.read_text()) if generated.exists() else None
        row = found.setdefault("rgb-to-$m" if name.startswith("rgb-to-") else name, {})
        for column, (get, _, _) in STUDIED.items():
            value = get(*runs)
            row.setdefault(column, []).extend([] if value is None else [value])
    place = {name: i for i, name in enumerate(order)}
    return {name.replace("rgb-to-$m", "one task each"): found[name] for name in sorted(found, key=place.get)}


def study():
    """Mean over the seeds, and half of the range between the lowest and the highest (of one seed the value alone)."""
    def cell(values, form):
        return f"{sum(values) / len(values):{form}}" + (f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else "") if values else ""
    rows = [[name, str(max(map(len, row.values()))), *(cell(row[column], form) for column, (_, form, _) in STUDIED.items())] for name, row in studied().items()]
    known, real = read("study/mmgen_0_understand"), read("study/mmgen_0_generate")["latent_fd_of_as_many_scenes"]
    for name, part in (("the training set's mean map", "mean_map"), ("the autoencoder; real scenes", "ceiling")):
        cells = dict(zip(STUDIED, (number(known[part][key], form) for key, form in KEYS))) | ({"latent FD": f"{real:.2f}"} if part == "ceiling" else {})
        rows.append([name, "", *(cells.get(column, "") for column in STUDIED)])
    return table(["", "seeds", *STUDIED], rows)


def study_figure(path, across=5):
    """A dot a seed, a tick at the mean, a line at MMGen's mean; to the right is better. Two bands of `across` panels."""
    font, small, rows = ImageFont.load_default(15), ImageFont.load_default(13), studied()
    left, width, height, top = 150, 150, 22, 46
    band = top + height * len(rows) + 14
    sheet = Image.new("RGB", (left + width * across + 10, band * -(-len(STUDIED) // across)), "white")
    pen = ImageDraw.Draw(sheet)
    for j, (column, (_, form, more)) in enumerate(STUDIED.items()):
        x0, y0 = left + width * (j % across), band * (j // across)
        values = [v for row in rows.values() for v in row[column]] or [0.0]
        low, high = min(values), max(values)
        at = lambda v: x0 + width * (0.1 + 0.8 * ((v - low) if more else (high - v)) / max(high - low, 1e-12))
        pen.text((x0 + width / 2, y0 + 14), column, fill="black", font=small, anchor="mm")
        for v, anchor in ((low, "lm" if more else "rm"), (high, "rm" if more else "lm")):
            pen.text((x0 + width * (0.06 if anchor == "lm" else 0.94), y0 + 32), f"{v:{form}}", fill="grey", font=small, anchor=anchor)
        full = rows.get("mmgen", {}).get(column)
        if full:
            pen.line([(at(sum(full) / len(full)), y0 + top), (at(sum(full) / len(full)), y0 + top + height * len(rows))], fill="lightgrey", width=2)
        for i, (name, row) in enumerate(rows.items()):
            y = y0 + top + height * (i + 0.5)
            if j % across == 0:
                pen.text((8, y), name, fill="black", font=font, anchor="lm")
            for v in row[column]:
                pen.ellipse([at(v) - 3, y - 3, at(v) + 3, y + 3], outline="steelblue", width=2)
            if row[column]:
                x = at(sum(row[column]) / len(row[column]))
                pen.line([(x, y - 8), (x, y + 8)], fill="black", width=2)
    sheet.save(path)


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
    """results/bench_{train,sample}[_t2]_cpu.json: tests/bench.py with --peer."""
    rows = []
    for size, part in (("S/2", ""), ("T/2", "_t2")):
        train, sample = read(f"bench_train{part}_cpu"), read(f"bench_sample{part}_cpu")
        rows += [[size, row.replace("ours", "here").replace("peer", "the authors' code"), number(train[row]["img_per_s"], ".1f"), *(number(train[row].get(key), ".2f", " x") for key in ("ratio", "ratio_at_equal_precision")),
                  *(number(sample.get(row, {}).get(key), form, unit) for key, form, unit in (("img_per_s", ".2f", ""), ("ratio", ".2f", " x")))] for row in train if row not in ("memory", "recipe")]
    return table(["", "", "training, img/s", "over the authors' fp32", "over the authors' at equal precision", "sampling, img/s", "over the authors' fp32"], rows)


def speed_parts():
    """results/bench_parts_cpu.json: tests/bench.py --what parts."""
    return table(["each alone, over the plain version", "ms", "speed-up"],
                 [[name, number(row["ms"], ",.0f" if row["ms"] > 100 else ".1f"), number(row["ratio"], ".2f", " x")] for name, row in read("bench_parts_cpu").items() if name != "recipe"])


def loss_curves():
    """results/loss_curves.json: tests/bench.py --what curves."""
    found = read("loss_curves")
    steps = list(found["plain, seed 0"])
    mean = lambda kind, step: sum(found[f"{kind}, seed {i}"][step] for i in range(3)) / 3
    rows = [[kind, *(number(mean(kind, step), ".3f") for step in steps)] for kind in ("plain", "fast")]
    return table(["loss, mean of three seeds", *steps], rows) + "\n\n" + \
        table(["distance of two curves, share of the loss", ""], [[name, number(x, ".2%")] for name, x in found["distance"].items()])


def few_steps():
    """results/few_steps.json: tests/measure_steps.py."""
    rows = sorted(((row["evaluations"], name, row) for name, row in read("few_steps").items() if name != "recipe"), key=lambda row: row[:1])
    shown = [[str(n), name.replace(" ", ", "), *(number(row["understand"][key], form) for key, form in KEYS), number(row["generate"]["class_from_rgb_alone"], ".0%"),
              number(row["generate"]["latent_fd"], ".2f"), number(row["generate"]["rgb_understood_against_generated"]["abs_rel"], ".3f"),
              number(row["depth_given"]["abs_rel"], ".3f")] for n, name, row in rows]
    floor = rows[0][2]["generate"]["latent_fd_of_as_many_scenes"]
    shown.append(["", "as many real scenes", "", "", "", "", number(floor, ".2f"), "", ""])
    return table(["NFE", "sampler, steps", "AbsRel", "normals (degrees)", "mIoU", "class from RGB", "latent Frechet distance", "generated depth against its RGB's (AbsRel)", "given depth against its RGB's (AbsRel)"], shown)


def made_by(recipe):
    """A sentence with a recipe of eval_depth.py."""
    return f"{recipe['count']} held-out scenes, no class, {recipe['sampler']}, {recipe['steps']} steps, {recipe['precision']}, seed {recipe['seed']}, {recipe['device'].upper()}; " \
        f"checkpoint sha256 {recipe['checkpoint_sha256'][:12]}. Remaining gap = (value - ceiling) / (mean map - ceiling)."


def demo_understand():
    """results/demo_understand.json: eval_depth.py --toy."""
    found = read("demo_understand")
    names = {"abs_rel": "depth AbsRel (disparity-aligned)", "normal_mean": "normals, mean angle (degrees)", "miou": "segmentation mIoU"}
    return table(["RGB given", "VAE ceiling", "demo weights", "mean map", "remaining gap"],
                 [[name, *(number(part[key], form) for part in (found["ceiling"], found, found["mean_map"])), number(found["gap"][key], ".3f")]
                  for (key, name), form in zip(names.items(), (".4f", ".2f", ".3f"))]) + "\n\n" + made_by(found["recipe"])


def ten_minutes():
    """results/ten_minutes.json (eval_depth.py's JSON) and ten_minutes_clock.json, by results/ten_minutes.sh."""
    found, clock = read("ten_minutes"), read("ten_minutes_clock")
    rows = [[name, *(number(found[part][key] if part else found[key], form) for key, form in KEYS)]
            for name, part in (("trained from nothing", None), ("the training set's mean map", "mean_map"), ("the autoencoder", "ceiling"))]
    laps = ", ".join(f"{what} after {seconds} s" for what, seconds in clock["laps"].items())
    return f"{clock['cores']} cores: {laps}. {made_by(found['recipe'])}\n\n" + table(["", "AbsRel", "normals (degrees)", "mIoU"], rows)


def demo_generate():
    """results/demo_generate.json: tests/measure_demo.py."""
    found = read("demo_generate")
    joint, given = found["rgb_understood_against_generated"], found["given_map_recovered"]
    three = lambda row: f"{row['abs_rel']:.4f} / {row['normal_mean']:.2f} / {row['miou']:.3f}, remaining gaps {row['gap']['abs_rel']:.3f} / {row['gap']['normal_mean']:.3f} / {row['gap']['miou']:.3f}"
    recovered = {key: given[m][key] for m, key in (("depth", "abs_rel"), ("normal", "normal_mean"), ("seg", "miou"))}
    recovered["gap"] = {key: given[m]["gap"][key] for m, key in (("depth", "abs_rel"), ("normal", "normal_mean"), ("seg", "miou"))}
    recipe = found["recipe"]
    return f"{recipe['generated']} category samples, the classes in turn, guidance {recipe['guidance']:g}; {recipe['held_out']} given maps; " \
        f"{', '.join(recipe['create'])} steps, {recipe['precision']}, seed {recipe['seed']}; understood in {recipe['steps']} steps. " \
        "Gaps as above, the mean map scored against the same maps; a generated disparity of 1 and 0 stands for 1.2 and 5.7, the mean range of the scenes.\n\n" + table(["generation", ""], [
        ["the generated segmentation's main object is of the asked type", number(found["class_in_segmentation"], ".1%")],
        ["so is the segmentation predicted from the generated RGB alone", number(found["class_from_rgb_alone"], ".1%")],
        ["the generated RGB's main object has the asked hue", number(found["hue_in_rgb"], ".1%")],
        ["generated depth, normals, segmentation against those predicted from the generated RGB (AbsRel / degrees / mIoU)", three(joint)],
        ["a given depth, normal, segmentation map against that predicted from the RGB generated for it", three(recovered)],
        ["latent Frechet distance of the RGB to held-out scenes (of as many real scenes)", f"{found['latent_fd']:.2f} ({found['latent_fd_of_as_many_scenes']:.2f})"]])


def data_speed():
    """results/bench_load_cpu.json and bench_prep_cpu.json."""
    load, prep = read("bench_load_cpu"), read("bench_prep_cpu")["prep"]
    return table(["loader, warm, with DINO", "without", "`prep_latents.py`, toy scenes", "its time in the encoder"],
                 [[number(load["with DINO"]["samples_per_s"], ",.0f", " samples/s"), number(load["without"]["samples_per_s"], ",.0f", " samples/s"),
                   number(prep["img_per_s"], ".0f", " scenes/s"), number(prep["encoder_share"], ".0%")]])


def released():
    """results/equal_{s2,xl2}.json: tests/bench.py --what equal."""
    rows = []
    for size, name in (("S/2", "s2"), ("XL/2", "xl2")):
        run = read(f"equal_{name}")
        paths = [f"{row['difference']:.1e}" for key, row in run.items() if key.startswith("trajectory")]
        rows.append([size, f"{run['velocities']['difference']:.0e} ({run['velocities']['std']:.2f})".replace("0e+00", "0"), ", ".join(paths)])
    return table(["size", "velocities, largest difference (output std)", "trajectories: category, RGB, depth, normal, seg given"], rows)


def canny():
    """results/canny_*.json: eval_depth.py's JSON."""
    names = (("before", "before"), ("canny in the place of seg (`--modalities rgb depth normal canny`)", "for_seg"), ("canny as the fifth", "fifth"))
    rows = [[name, "0" if part == "before" else str(read(f"canny_{part}")["recipe"]["step"]), *(number(read(f"canny_{part}").get(key), form) for key, form in (("abs_rel", ".4f"), ("normal_mean", ".2f"), ("miou", ".3f"), ("edge_f", ".3f")))]
            for name, part in names]
    return table(["from the demo weights", "steps", "AbsRel", "normals (degrees)", "mIoU", "edge F"], rows)


def fusion():
    """results/fusion_*.json: tests/bench.py --what fusion."""
    rows = []
    for name, key, unit, form in (("xl2", "gflops", "GFLOPs", ".1f"), ("s2", "ms_per_sample", "ms", ".1f"), ("t2", "ms_per_sample", "ms", ".1f")):
        run = read(f"fusion_{name}")
        recipe = run["recipe"]
        rows.append([f"{recipe['model']}, {recipe['latent_size']}x{recipe['latent_size']} latents, {unit}", *(number(run[part][key], form) for part in ("rgb only", "linear", "mlp")),
                     f"{run['sequence'][key]:{form}} ({run['sequence'][key + '_ratio']:.2f} x)"])
    return table(["per sample", "RGB alone", "fused, linear", "fused, MLP", "sequence"], rows)


def evaluators():
    """results/evaluators.json: written by the tests that compare with other packages, where these are installed."""
    found = read("evaluators")
    of = lambda key: found[next(k for k in found if k.startswith(key))]
    gap = lambda pair: max(abs(a - b) for a, b in zip(*(x if isinstance(x, list) else [x] for x in pair)))
    size = lambda value: f"{value:.0e}".replace("0e+00", "0")
    pools = [x for px in (64, 256) for x in of(f"torch-fidelity pool_3, logits, Mixed_6d.branch1x1 at {px} px")]
    marigold = {key: max(of(f"Marigold, 200 random maps with holes, {space}")[key] for space in ("disparity", "depth")) for key in ("abs_rel", "rmse", "delta1")}
    rows = [["torch-fidelity 0.4.0, Inception pool_3, logits, sFID's features", "random weights, uint8 noise at 64 and 256 px", size(max(pools))],
            ["pytorch-fid 0.3.0, pool_3 (`--preprocess pytorch_fid`)", "random weights", "{:.0e} of {:.1f}".format(*of("pytorch-fid pool_3"))],
            ["pytorch-fid 0.3.0, Frechet distance", "500 x 100 features", f"{size(gap(of('pytorch-fid Frechet')))} of {of('pytorch-fid Frechet')[0]:.1f}"],
            ["torch-fidelity 0.4.0, precision, recall, KID", "1200 and 1100 features of 64", f"{size(gap(of('torch-fidelity precision')))} (its shares are fp32), {size(gap(of('torch-fidelity KID')))}"],
            ["lpips 0.1.4, VGG", "random trunk, released heads", size(gap(of("lpips VGG")))],
            ["scikit-learn 1.9, adjusted Rand index", "random labels", size(gap(of("scikit-learn adjusted")))],
            ["Marigold's metric code: AbsRel, RMSE, delta1, both alignments", "200 random maps with holes", ", ".join(size(v) for v in marigold.values()) + " (its delta is fp32)"]]
    return table(["measured against", "on", "difference"], rows)


def robustness():
    """results/fuzz.json, fuzz_again.json (its failures after mending, --only) and soak.json: tests/fuzz.py and tests/soak.py."""
    fuzz, again, soak = read("fuzz"), read("fuzz_again"), read("soak")
    broken = [case["verdict"] for case in fuzz["failures"]]
    return table(["", "tried", "outcome"], [
        ["`tests/fuzz.py`: damaged and odd pictures, caches, checkpoints, folders, flags, one each", f"{fuzz['inputs']:,}",
         f"{fuzz['refused with a line']} refused with a line, {fuzz['accepted']} accepted, {len(broken)} tracebacks or hangs, {broken.count('half-written')} half-written files; "
         f"the {again['inputs']} again, mended: {again['refused with a line']} refused with a line, {again['accepted']} accepted, {len(again['failures'])} failures"],
        ["`tests/soak.py`: train, kill, resume, sample, kill, continue", f"{soak['minutes']:.0f} minutes, {soak['rounds']} rounds, {soak['kills_training']} + {soak['kills_sampling']} kills",
         f"{soak['steps_done_again']} steps done again, {soak['rounds_that_differ']} rounds differ from runs that nobody killed, {soak['stray_files']} stray files"]])


TABLES = {f.__name__: f for f in (demo_understand, demo_generate, ten_minutes, speed, speed_parts, loss_curves, robustness, few_steps, data_speed, study, ablations, released, canny, fusion, evaluators, mt_translation, mt_restoration, mt_heads_of_x, mt_overhead)}


def main():
    text = old = README.read_text()
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, rest = text.split(begin)
        text = before + begin + make() + end + rest.split(end, 1)[1]
    if "--check" in sys.argv:
        sys.exit(0 if text == old else "README.md is not what results/*.json say; run python results/tables.py")
    README.write_text(text)
    study_figure(HERE.parent / "demo" / "study.png")


if __name__ == "__main__":
    main()
