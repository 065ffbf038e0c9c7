"""Write results/README.md, and demo/study.png, from the JSON in results/ and the prose in page.md.

    python studies/tables.py             # --check only compares

A {{name}} of page.md becomes that table. Where the project's README.md has <!-- name --> ... <!-- /name -->,
what stands between them becomes the same table.
"""
import json
import re
import sys

from cells import NAMES, RESULTS, number, read, small, spread, table, understanding, without_recipe
from PIL import Image, ImageDraw, ImageFont
from record import ROOT
from verdicts import (claims, mt_claims, mt_generation, mt_heads_of_x, mt_restoration, mt_translation, study,
                      study_figure)

README, PAGE = ROOT / "README.md", ROOT / "studies" / "page.md"
WRITTEN = "<!-- Written by studies/tables.py from studies/page.md and results/*.json: edit those. -->\n\n"


# ------------------------------------------------------------------------------------------------
# The toy world's demo.

def made_by(recipe):
    """A sentence with a recipe of eval_depth.py."""
    return (f"{recipe['count']} held-out scenes, no class, {recipe['sampler']}, {recipe['steps']} steps, "
            f"{recipe['precision']}, seed {recipe['seed']}, {recipe['device'].upper()}.")


def demo_understand():
    """results/demo_understand.json, demo_ensemble.json: eval_depth.py --toy, with --ensemble."""
    found, several, rows = read("demo_understand"), read("demo_ensemble"), []
    names = {"abs_rel": ("depth AbsRel (disparity-aligned)", ".4f"),
             "normal_mean": ("normals, mean angle (degrees)", ".2f"),
             "miou": ("segmentation mIoU", ".3f")}
    for key, (name, form) in names.items():
        values = [part[key] for part in (found["ceiling"], found, found["mean_map"])]
        gaps = [number(run["gap"][key], ".3f") for run in (found, several)]
        rows.append([name, *(number(value, form) for value in values), gaps[0], number(several[key], form),
                     gaps[1]])
    median = f"median of {several['recipe']['ensemble']} samples"
    head = ["RGB given", "VAE ceiling", "demo weights", "mean map", "remaining gap", median, "remaining gap"]
    sha256 = found["recipe"]["checkpoint_sha256"][:12]
    return (f"{table(head, rows)}\n\n{made_by(found['recipe'])} Checkpoint sha256 {sha256}. Remaining gap = "
            "(value - ceiling) / (mean map - ceiling).")


def three(row):
    """Scores of depth, normals and segments, and their gaps."""
    gap = row["gap"]
    return (f"{row['abs_rel']:.4f} / {row['normal_mean']:.2f} / {row['miou']:.3f}, remaining gaps "
            f"{gap['abs_rel']:.3f} / {gap['normal_mean']:.3f} / {gap['miou']:.3f}")


def demo_generate():
    """results/demo_generate.json: studies/measure_demo.py."""
    found = read("demo_generate")
    given, recipe, recovered = found["given_map_recovered"], found["recipe"], {"gap": {}}
    for m, key in (("depth", "abs_rel"), ("normal", "normal_mean"), ("seg", "miou")):
        recovered[key], recovered["gap"][key] = given[m][key], given[m]["gap"][key]
    how = (f"{recipe['generated']} category samples, the classes in turn, guidance {recipe['guidance']:g}; "
           f"{recipe['held_out']} given maps; {', '.join(recipe['create'])} steps, {recipe['precision']}, "
           f"seed {recipe['seed']}; understood in {recipe['steps']} steps. Gaps as above, the mean map "
           "scored against the same maps; a generated disparity of 1 and 0 stands for 1.2 and 5.7, the mean "
           "range of the scenes.")
    rows = [
        ["the generated segmentation's main object is of the asked type",
         number(found["class_in_segmentation"], ".1%")],
        ["so is the segmentation predicted from the generated RGB alone",
         number(found["class_from_rgb_alone"], ".1%")],
        ["the generated RGB's main object has the asked hue", number(found["hue_in_rgb"], ".1%")],
        ["generated depth, normals, segmentation against those predicted from the generated RGB "
         "(AbsRel / degrees / mIoU)", three(found["rgb_understood_against_generated"])],
        ["a given depth, normal, segmentation map against that predicted from the RGB generated for it",
         three(recovered)],
        ["latent Frechet distance of the RGB to held-out scenes (of as many real scenes)",
         f"{found['latent_fd']:.2f} ({found['latent_fd_of_as_many_scenes']:.2f})"]]
    return how + "\n\n" + table(["generation", ""], rows)


def ten_minutes():
    """results/ten_minutes.json (eval_depth.py's JSON) and ten_minutes_clock.json: studies/ten_minutes.sh."""
    found, clock = read("ten_minutes"), read("ten_minutes_clock")
    laps = ", ".join(f"{what} after {seconds} s" for what, seconds in clock["laps"].items())
    rows = [["trained from nothing", *understanding(found)],
            ["the training set's mean map", *understanding(found["mean_map"])],
            ["the autoencoder", *understanding(found["ceiling"])]]
    return f"{clock['cores']} cores: {laps}. {made_by(found['recipe'])}\n\n{table(['', *NAMES], rows)}"


def few_steps():
    """results/few_steps.json: studies/measure_steps.py."""
    found = without_recipe(read("few_steps"))
    order = sorted(found, key=lambda name: found[name]["evaluations"])
    rows = []
    for name in order:
        run = found[name]
        made = run["generate"]
        joint, given = made["rgb_understood_against_generated"], run["depth_given"]
        rows.append([str(run["evaluations"]), name.replace(" ", ", "), *understanding(run["understand"]),
                     number(made["class_from_rgb_alone"], ".0%"), number(made["latent_fd"], ".2f"),
                     number(joint["abs_rel"], ".3f"), number(given["abs_rel"], ".3f")])
    real = found[order[0]]["generate"]["latent_fd_of_as_many_scenes"]
    rows.append(["", "as many real scenes", "", "", "", "", number(real, ".2f"), "", ""])
    head = ["NFE", "sampler, steps", *NAMES, "class from RGB", "latent Frechet distance",
            "generated depth against its RGB's (AbsRel)", "given depth against its RGB's (AbsRel)"]
    return table(head, rows)


def canny():
    """results/canny_*.json: eval_depth.py's JSON."""
    names = {"before": "before",
             "for_seg": "canny in the place of seg (`--modalities rgb depth normal canny`)",
             "fifth": "canny as the fifth"}
    forms, rows = {"abs_rel": ".4f", "normal_mean": ".2f", "miou": ".3f", "edge_f": ".3f"}, []
    for part, name in names.items():
        found = read(f"canny_{part}")
        steps = 0 if part == "before" else found["recipe"]["step"]
        rows.append([name, str(steps), *understanding(found, forms)])
    return table(["from the demo weights", "steps", *NAMES, "edge F"], rows)


# ------------------------------------------------------------------------------------------------
# The search for a better learner.

SCORED = {"abs_rel": ("AbsRel", ".3f"), "normal_mean": ("normals", ".1f"), "miou": ("mIoU", ".3f"),
          "latent_fd": ("latent FD", ".2f"), "class": ("class", ".2f"),
          "given_depth": ("given depth", ".3f")}  # a run's scores: (name, form)


def searched(beginning):
    """{name: its runs, one a seed} of results/recipes.json whose names begin so."""
    found = {}
    for held in read("recipes")["runs"]:
        if held["name"].startswith(beginning):
            found.setdefault(held["name"].removeprefix("long-"), []).append(held)
    return found


def last_scores(runs):
    """The cells of SCORED at the end of runs."""
    return [spread([held["evaluations"][-1][key] for held in runs], form)
            for key, (_, form) in SCORED.items()]


def scored_head(*first):
    return [*first, *(name for name, _ in SCORED.values())]


def recipes_alone():
    """The screening: one seed of each."""
    rows = [[name, *last_scores(runs)] for name, runs in (searched("control") | searched("muon")).items()]
    return table(scored_head("24,000 samples, one seed"), rows)


def recipes_together():
    rows = [[name, str(len(runs)), *last_scores(runs)] for name, runs in searched("long").items()]
    for name, runs in searched("short-").items():
        name = f"{name.removeprefix('short-')}, decayed and ended at 16,800 samples, on a CPU"
        rows.append([name, str(len(runs)), *last_scores(runs)])
    return table(scored_head("48,000 samples", "seeds"), rows)


def recipes_reach():
    """What the best recipe needs of the control's samples and time."""
    found, rows = read("recipes"), []
    for name, part in (("samples", "samples_to_control"), ("time", "time_to_control")):
        rows.append([name, *(number(found[part][key], ".2f") or "never" for key in SCORED)])
    return table(scored_head(f"{found['best']} to the last scores of {found['control']}"), rows)


def recipes_scales():
    """Scores by the scale of internal guidance, of runs with middle heads."""
    rows = []
    for name, runs in (searched("long-all") | searched("muon-middle")).items():
        rows.append([name, "1", *last_scores(runs)])
        for scale in runs[0]["middle_scales"]:
            values = [{"evaluations": [held["middle_scales"][scale]]} for held in runs]
            rows.append([name, scale, *last_scores(values)])
    return table(scored_head("", "scale"), rows)


def recipes_cost():
    """results/recipes_steps.json: studies/bench.py --what recipes."""
    rows = [[name, number(row["s"], ".3f"), number(row["ratio"], ".2f", " x")]
            for name, row in without_recipe(read("recipes_steps")).items()]
    return table(["optimiser, blocks", "seconds a step", "over the first"], rows)


DRAWN = {"control-1e-3": "dimgrey", "less-muon": "darkorange", "all": "seagreen",
         "best": "steelblue"}  # lines of the figure


def recipes_figure(path, size=(300, 220), across=3):
    """Scores against samples, the mean over the seeds, a panel a score."""
    font, runs, (width, height) = ImageFont.load_default(15), searched("long"), size
    sheet = Image.new("RGB", (width * across + 20, 2 * height + 30), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (key, (title, form)) in enumerate(SCORED.items()):
        lines = {}
        for name in DRAWN:
            seeds = [[entry[key] for entry in held["evaluations"]] for held in runs[name]]
            lines[name] = [sum(values) / len(values) for values in zip(*seeds)]
        samples = [entry["samples"] for entry in runs["best"][0]["evaluations"]]
        values = [value for line in lines.values() for value in line]
        low, high = min(values), max(values)
        x, y = 20 + width * (place % across), 10 + height * (place // across)
        left, right, top, bottom = x + 44, x + width - 14, y + 24, y + height - 24
        pen.text(((left + right) / 2, y + 8), title, fill="black", font=font, anchor="mm")
        pen.rectangle([left, top, right, bottom], outline="lightgrey")
        for value, at in ((high, top), (low, bottom)):
            pen.text((left - 4, at), f"{value:{form}}", fill="grey", font=font, anchor="rm")
        for sample in (samples[0], samples[-1]):
            at = left + (right - left) * sample / samples[-1]
            pen.text((at, bottom + 12), f"{sample // 1000}k", fill="grey", font=font, anchor="mm")
        for name, line in lines.items():
            points = [(left + (right - left) * sample / samples[-1],
                       bottom - (bottom - top) * (value - low) / (high - low))
                      for sample, value in zip(samples, line)]
            pen.line(points, fill=DRAWN[name], width=2)
    for i, (name, colour) in enumerate(DRAWN.items()):
        x = 64 + 190 * i
        pen.line([(x, 2 * height + 18), (x + 24, 2 * height + 18)], fill=colour, width=3)
        pen.text((x + 30, 2 * height + 18), name, fill="black", font=font, anchor="lm")
    sheet.save(path)


# ------------------------------------------------------------------------------------------------
# Real frames.

REAL = {"abs_rel": ("AbsRel", ".3f"), "normal_mean": ("normals", ".1f"),
        "pixel_accuracy": ("pixel accuracy", ".3f"), "class_accuracy": ("class accuracy", ".3f"),
        "miou": ("mIoU", ".3f")}  # scores: (name, form)


def sets_of(found):
    """{set of frames: scores} of studies/measure_real.py's JSON."""
    beside = "train", "frames", "img_per_s_beside_others"
    return {name: row for name, row in found.items() if name not in beside}


def real_frames():
    """results/real/<run>_<seed>.json: studies/measure_real.py."""
    rows, beside = [], {}
    for path in sorted((RESULTS / "real").glob("*.json")):
        found = json.loads(path.read_text())
        steps = f"{found['train']['steps']:,}"
        if path.stem.startswith("drawn"):
            continue
        for name, row in sets_of(found).items():
            cells = [number(row.get(key), form) for key, (_, form) in REAL.items()]
            rows.append([path.stem, steps, name, *cells])
            for part in ("mean_map", "ceiling"):
                if part in row:
                    beside[part, name] = [number(row[part].get(key), form) for key, (_, form) in REAL.items()]
    names = {"mean_map": "the training frames' mean map", "ceiling": "the autoencoder"}
    rows += [[names[part], "", name, *cells] for (part, name), cells in sorted(beside.items())[::-1]]
    return table(["run", "steps", "held-out frames of", *(name for name, _ in REAL.values())], rows)


def real_drawn():
    """results/real/drawn_<seed>.json: studies/measure_real.py --reader."""
    rows = []
    for path in sorted((RESULTS / "real").glob("drawn_*.json")):
        reader = json.loads((RESULTS / "real" / f"rooms_{int(path.stem[-1]) + 1}.json").read_text())
        for name, row in sets_of(json.loads(path.read_text())).items():
            values = row["drawn_from_depth"], reader[name], row["mean_map"]
            rows.append([name, *(number(value["abs_rel"], ".3f") for value in values)])
    return table(["AbsRel", "drawn from its depth", "the frames themselves", "mean map"], rows)


# ------------------------------------------------------------------------------------------------
# Speed.

def speed_gpu():
    """results/bench_train_xl2_*_h200.json: studies/bench.py --what train with --peer, on a GPU."""
    rows = []
    for batch in (32, 64, 128, 256):
        found = read(f"bench_train_xl2_{batch}_h200")
        eager, fast, peer = (found[name] for name in ("ours, bf16", "ours, compiled, bf16", "peer, fp16"))
        rates = [number(row["img_per_s"], ".0f") for row in (eager, fast, peer)]
        memory = [number(row["peak_GB"], ".0f", " GB") for row in (fast, peer)]
        rows.append([str(batch), *rates, number(eager["ratio"], ".2f", " x"),
                     number(fast["ratio"], ".2f", " x"), number(fast["matmul_share"], ".0%"), *memory])
    head = ["batch", "eager, img/s", "compiled", "the authors', fp16", "eager over it", "compiled over it",
            "compiled, share of a matmul", "peak memory", "the authors'"]
    return table(head, rows)


def sampling_gpu():
    """results/bench_sample_{sde,ab4}_h200.json."""
    sde, ab4 = read("bench_sample_sde_h200"), read("bench_sample_ab4_h200")
    rows = [["here, bf16, compiled, batches of 64: sde, 250 steps", f"{sde['ours, bf16']['img_per_s']:.2f}",
             f"{sde['ours, bf16']['ratio']:.2f} x"],
            ["the authors', TF32, batches of 32: the same", f"{sde['peer, fp32']['img_per_s']:.2f}", ""],
            ["here: ab4, 7 steps of 16 evaluations", f"{ab4['ours, bf16']['img_per_s']:.1f}",
             f"{ab4['ours, bf16']['img_per_s'] / sde['peer, fp32']['img_per_s']:.1f} x"]]
    return table(["XL/2, no guidance, four modalities decoded", "img/s", "over the authors'"], rows)


def speed():
    """results/bench_{train,sample}[_t2]_cpu.json: studies/bench.py with --peer."""
    rows = []
    for size, part in (("S/2", ""), ("T/2", "_t2")):
        train, sample = read(f"bench_train{part}_cpu"), read(f"bench_sample{part}_cpu")
        for name, row in without_recipe(train).items():
            if name == "memory":
                continue
            drawn = sample.get(name, {})
            rows.append([size, name.replace("ours", "here").replace("peer", "the authors' code"),
                         number(row["img_per_s"], ".1f"), number(row.get("ratio"), ".2f", " x"),
                         number(row.get("ratio_at_equal_precision"), ".2f", " x"),
                         number(drawn.get("img_per_s"), ".2f"), number(drawn.get("ratio"), ".2f", " x")])
    head = ["", "", "training, img/s", "over the authors' fp32", "over the authors' at equal precision",
            "sampling, img/s", "over the authors' fp32"]
    return table(head, rows)


def data_speed():
    """results/bench_load_cpu.json and bench_prep_cpu.json."""
    load, prep = read("bench_load_cpu"), read("bench_prep_cpu")["prep"]
    rates = [load[name]["samples_per_s"] for name in ("with DINO", "without")]
    rows = [[*(number(rate, ",.0f", " samples/s") for rate in rates),
             number(prep["img_per_s"], ".0f", " scenes/s"), number(prep["encoder_share"], ".0%")]]
    head = ["loader, warm, with DINO", "without", "`prep_latents.py`, toy scenes", "its time in the encoder"]
    return table(head, rows)


def speed_parts():
    """results/bench_parts_cpu.json: studies/bench.py --what parts."""
    rows = []
    for name, row in without_recipe(read("bench_parts_cpu")).items():
        time = number(row["ms"], ",.0f" if row["ms"] > 100 else ".1f")
        rows.append([name, time, number(row["ratio"], ".2f", " x")])
    return table(["each alone, over the plain version", "ms", "speed-up"], rows)


def loss_curves():
    """results/loss_curves.json: studies/bench.py --what curves."""
    found = read("loss_curves")
    steps, rows = list(found["plain, seed 0"]), []
    for kind in ("plain", "fast"):
        seeds = [found[f"{kind}, seed {i}"] for i in range(3)]
        rows.append([kind, *(number(sum(seed[step] for seed in seeds) / 3, ".3f") for step in steps)])
    gaps = [[name, number(value, ".2%")] for name, value in found["distance"].items()]
    curves = table(["loss, mean of three seeds", *steps], rows)
    return curves + "\n\n" + table(["distance of two curves, share of the loss", ""], gaps)


def fusion():
    """results/fusion_*.json: studies/bench.py --what fusion."""
    rows = []
    for name, key, unit in (("xl2", "gflops", "GFLOPs"), ("s2", "ms_per_sample", "ms"),
                            ("t2", "ms_per_sample", "ms")):
        run = read(f"fusion_{name}")
        recipe, last = run["recipe"], run["sequence"]
        size = f"{recipe['latent_size']}x{recipe['latent_size']}"
        cells = [number(run[part][key], ".1f") for part in ("rgb only", "linear", "mlp")]
        rows.append([f"{recipe['model']}, {size} latents, {unit}", *cells,
                     f"{last[key]:.1f} ({last[key + '_ratio']:.2f} x)"])
    return table(["per sample", "RGB alone", "fused, linear", "fused, MLP", "sequence"], rows)


# ------------------------------------------------------------------------------------------------
# Equality and robustness.

def released():
    """results/equal_{s2,xl2}.json: studies/bench.py --what equal."""
    rows = []
    for size, name in (("S/2", "s2"), ("XL/2", "xl2")):
        run = read(f"equal_{name}")
        paths = [f"{row['difference']:.1e}" for key, row in run.items() if key.startswith("trajectory")]
        velocities = run["velocities"]
        rows.append([size, f"{small(velocities['difference'])} ({velocities['std']:.2f})", ", ".join(paths)])
    head = ["size", "velocities, largest difference (output std)",
            "trajectories: category, RGB, depth, normal, seg given"]
    return table(head, rows)


def gap(pair):
    """The largest difference of two numbers, or of two lists of them."""
    a, b = (value if isinstance(value, list) else [value] for value in pair)
    return max(abs(x - y) for x, y in zip(a, b))


def evaluators():
    """results/evaluators.json: written by the tests that compare with other packages, where these are
    installed.
    """
    found = read("evaluators")

    def of(beginning):
        return found[next(key for key in found if key.startswith(beginning))]

    inception = "torch-fidelity pool_3, logits, Mixed_6d.branch1x1 at {} px"
    pools = [value for px in (64, 256) for value in of(inception.format(px))]
    marigold = [of(f"Marigold, 200 random maps with holes, {space}") for space in ("disparity", "depth")]
    largest = [small(max(run[key] for run in marigold)) for key in ("abs_rel", "rmse", "delta1")]
    (difference, size), distance = of("pytorch-fid pool_3"), of("pytorch-fid Frechet")
    shares, kid = of("torch-fidelity precision"), of("torch-fidelity KID")
    rows = [
        ["torch-fidelity 0.4.0, Inception pool_3, logits, sFID's features",
         "random weights, uint8 noise at 64 and 256 px", small(max(pools))],
        ["pytorch-fid 0.3.0, pool_3 (`--preprocess pytorch_fid`)", "random weights",
         f"{difference:.0e} of {size:.1f}"],
        ["pytorch-fid 0.3.0, Frechet distance", "500 x 100 features",
         f"{small(gap(distance))} of {distance[0]:.1f}"],
        ["torch-fidelity 0.4.0, precision, recall, KID", "1200 and 1100 features of 64",
         f"{small(gap(shares))} (its shares are fp32), {small(gap(kid))}"],
        ["lpips 0.1.4, VGG", "random trunk, released heads", small(gap(of("lpips VGG")))],
        ["scikit-learn 1.9, adjusted Rand index", "random labels", small(gap(of("scikit-learn adjusted")))],
        ["Marigold's metric code: AbsRel, RMSE, delta1, both alignments", "200 random maps with holes",
         ", ".join(largest) + " (its delta is fp32)"]]
    return table(["measured against", "on", "difference"], rows)


def robustness():
    """results/fuzz.json, fuzz_again.json (its failures after mending, --only) and soak.json."""
    fuzz, soak = read("fuzz"), read("soak")
    broken = [case["verdict"] for case in fuzz["failures"]]
    halves = broken.count("half-written")
    fuzzed = (f"{fuzz['refused with a line']} refused with a line, {fuzz['accepted']} accepted, "
              f"{len(broken) - halves} tracebacks, hangs or given files changed, {halves} half-written files")
    if broken:
        again = read("fuzz_again")
        fuzzed += (f"; the {again['inputs']} again, mended: {again['refused with a line']} refused with a "
                   f"line, {again['accepted']} accepted, {len(again['failures'])} failures")
    soaked = (f"{soak['steps_done_again']} steps done again, {soak['rounds_that_differ']} rounds differ from "
              f"runs that nobody killed, {soak['stray_files']} stray files")
    what = "damaged and odd pictures, caches, checkpoints, folders, flags, outputs, one each"
    kills = f"{soak['kills_training']} + {soak['kills_sampling']} kills"
    rows = [[f"`studies/fuzz.py`: {what}", f"{fuzz['inputs']:,}", fuzzed],
            ["`studies/soak.py`: train, kill, resume, sample, kill, continue",
             f"{soak['minutes']:.0f} minutes, {soak['rounds']} rounds, {kills}", soaked]]
    return table(["", "tried", "outcome"], rows)


# ------------------------------------------------------------------------------------------------
# MT-Diffusion.
def mt_overhead():
    """results/mt_heads.json: studies/bench.py --what heads."""
    rows = [[name, number(row["ms_per_sample"], ".1f"), number(row["ratio"], ".3f")]
            for name, row in without_recipe(read("mt_heads")).items()]
    return table(["time of a training step over the single task's", "ms a sample", "ratio"], rows)


# ------------------------------------------------------------------------------------------------

TABLES = {make.__name__: make for make in (
    demo_understand, demo_generate, ten_minutes, few_steps, canny, study, claims,
    recipes_alone, recipes_together, recipes_reach, recipes_scales, recipes_cost, real_frames, real_drawn,
    speed_gpu, sampling_gpu, speed, data_speed, speed_parts, loss_curves, fusion, released, evaluators,
    robustness, mt_translation, mt_generation, mt_restoration, mt_heads_of_x, mt_claims, mt_overhead)}


def page():
    """results/README.md."""
    return WRITTEN + re.sub(r"\{\{(\w+)\}\}", lambda found: TABLES[found[1]](), PAGE.read_text())


def filled(text):
    """A page with the tables between its markers."""
    def make(found):
        begin, name, end = found.groups()
        return f"{begin}\n{TABLES[name]()}\n{end}"
    return re.sub(r"(<!-- (\w+) -->)\n.*?(<!-- /\2 -->)", make, text, flags=re.S)


def main():
    pages = {RESULTS / "README.md": page(), README: filled(README.read_text())}
    if "--check" in sys.argv:
        stale = [path.relative_to(ROOT).as_posix() for path, text in pages.items()
                 if not path.exists() or path.read_text() != text]
        if stale:
            sys.exit(f"{', '.join(stale)}: not what results/*.json say; run python studies/tables.py")
        return
    for path, text in pages.items():
        path.write_text(text)
    study_figure(ROOT / "demo" / "study.png")
    recipes_figure(ROOT / "demo" / "recipes.png")


if __name__ == "__main__":
    main()
