"""Write results/README.md, and demo/study.png, from the JSON in results/ and the prose in page.md.

    python studies/tables.py             # --check only compares

A {{name}} of page.md becomes that table. Where the project's README.md has <!-- name --> ... <!-- /name -->,
what stands between them becomes the same table.
"""
import json
import re
import sys
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from record import ROOT

RESULTS, README, PAGE = ROOT / "results", ROOT / "README.md", ROOT / "studies" / "page.md"
WRITTEN = "<!-- Written by studies/tables.py from studies/page.md and results/*.json: edit those. -->\n\n"


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def without_recipe(found):
    return {name: row for name, row in found.items() if name != "recipe"}


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value, form, unit=""):
    return "" if value is None else f"{value:{form}}{unit}"


def small(value):
    """A difference, in one digit."""
    return f"{value:.0e}".replace("0e+00", "0")


KEYS = {"abs_rel": ".3f", "normal_mean": ".1f", "miou": ".3f"}  # of understanding
NAMES = ["AbsRel", "normals (degrees)", "mIoU"]


def understanding(found, forms=KEYS):
    """The cells of NAMES."""
    return [number(found.get(key), form) for key, form in forms.items()]


# ------------------------------------------------------------------------------------------------
# The toy world's demo.

def made_by(recipe):
    """A sentence with a recipe of eval_depth.py."""
    return (f"{recipe['count']} held-out scenes, no class, {recipe['sampler']}, {recipe['steps']} steps, "
            f"{recipe['precision']}, seed {recipe['seed']}, {recipe['device'].upper()}; checkpoint sha256 "
            f"{recipe['checkpoint_sha256'][:12]}. Remaining gap = (value - ceiling) / (mean map - ceiling).")


def demo_understand():
    """results/demo_understand.json: eval_depth.py --toy."""
    found, rows = read("demo_understand"), []
    names = {"abs_rel": ("depth AbsRel (disparity-aligned)", ".4f"),
             "normal_mean": ("normals, mean angle (degrees)", ".2f"),
             "miou": ("segmentation mIoU", ".3f")}
    for key, (name, form) in names.items():
        values = [part[key] for part in (found["ceiling"], found, found["mean_map"])]
        gap = number(found["gap"][key], ".3f")
        rows.append([name, *(number(value, form) for value in values), gap])
    head = ["RGB given", "VAE ceiling", "demo weights", "mean map", "remaining gap"]
    return table(head, rows) + "\n\n" + made_by(found["recipe"])


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
    return f"{clock['cores']} cores: {laps}. {made_by(found['recipe'])}\n\n" + table(["", *NAMES], rows)


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
# Ablations.

def ablations():
    """results/ablations.json: {name: {flags, understand: eval_depth.py's JSON}}."""
    runs, rows = read("ablations"), []
    for name, run in runs.items():
        flags = f"`{run['flags']}`" if run["flags"] else ""
        rows.append([name, flags, *understanding(run["understand"])])
    first = runs["mmgen"]["understand"]
    rows.append(["the training set's mean map", "", *understanding(first["mean_map"])])
    rows.append(["the autoencoder", "", *understanding(first["ceiling"])])
    return table(["", "flags", *NAMES], rows)


STUDIED = {  # column: the run's JSON and the keys of its value there, its form, whether more is better
    "AbsRel": ("understand abs_rel", ".3f", False),
    "normals (degrees)": ("understand normal_mean", ".1f", False),
    "mIoU": ("understand miou", ".3f", True),
    "class": ("generate class_from_rgb_alone", ".2f", True),
    "latent FD": ("generate latent_fd", ".2f", False),
    "joint: AbsRel": ("generate rgb_understood_against_generated abs_rel", ".3f", False),
    "depth given: AbsRel": ("generate given_map_recovered depth abs_rel", ".3f", False),
    "normals given": ("generate given_map_recovered normal normal_mean", ".1f", False),
    "seg. given: mIoU": ("generate given_map_recovered seg miou", ".3f", True),
    "depth given: latent FD": ("generate given_map_recovered depth latent_fd", ".2f", False),
}
SINGLES = {"rgb-to-$m": "one task each", "$m-to-rgb": "one condition each"}  # rows that stand for three runs


def studied():
    """results/study/<row>_<seed>_{understand,generate}.json -> {row: {column: values of its seeds}}, rows as
    run_study.sh has them.
    """
    script = (ROOT / "studies" / "run_study.sh").read_text()
    order = list(dict.fromkeys(re.findall(r"^ +row ([\w$-]+) ", script, re.M)))
    found = {}
    for path in sorted((RESULTS / "study").glob("*.json")):
        name, _, part = path.stem.split("_")
        name = re.sub("(?<=-to-)(depth|normal|seg)|(depth|normal|seg)(?=-to-)", "$m", name)
        row = found.setdefault(name, {c: [] for c in STUDIED})
        run = json.loads(path.read_text())
        for column, (keys, _, _) in STUDIED.items():
            file, *keys = keys.split()
            value = run if file == part else {}
            for key in keys:
                value = value.get(key, {})
            if value != {}:
                row[column].append(value)
    return {SINGLES.get(name, name): found[name] for name in order if name in found}


def spread(values, form):
    """The mean, and half of the range between the lowest and the highest; of one value it alone."""
    if not values:
        return ""
    mean = f"{sum(values) / len(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:{form}}"


def study():
    rows = []
    for name, row in studied().items():
        cells = [spread(row[column], form) for column, (_, form, _) in STUDIED.items()]
        rows.append([name, str(max(map(len, row.values()))), *cells])
    known = read("study/mmgen_0_understand")
    real = read("study/mmgen_0_generate")["latent_fd_of_as_many_scenes"]
    blank = [""] * (len(STUDIED) - 5)
    rows.append(["the training set's mean map", "", *understanding(known["mean_map"]), "", "", *blank])
    ceiling = understanding(known["ceiling"])
    rows.append(["the autoencoder; real scenes", "", *ceiling, "", f"{real:.2f}", *blank])
    return table(["", "seeds", *STUDIED], rows)


class Claim(NamedTuple):
    """What a paper says, as two rows of run_study.sh of which the first is ahead in columns of STUDIED."""
    said: str
    ahead: str
    behind: str
    columns: tuple
    equal: bool = False  # all that is said is that it is not behind

    def verdict(self, by):
        """by: so many spreads it is ahead."""
        if by is None:
            return "of one seed"
        if by <= -1:
            return "does not"
        return "holds" if by >= 1 or self.equal else "cannot be told"


MAPS_SEEN = "AbsRel", "normals (degrees)", "mIoU"
MAPS_GIVEN = "depth given: AbsRel", "normals given", "seg. given: mIoU"
CLAIMS = [
    Claim("Table 4: the full model generates better than generation alone", "mmgen", "gen-only",
          ("latent FD",)),
    Claim("Table 4: than without augmentation", "mmgen", "no-aug", ("latent FD",)),
    Claim("Table 4: than without the task embedding", "mmgen", "no-task-embedding", ("latent FD",)),
    Claim("Table 4's order: generation alone before no augmentation", "gen-only", "no-aug", ("latent FD",)),
    Claim("Sec. 3.3: conditioned rows make it understand", "mmgen", "gen-only", MAPS_SEEN),
    Claim("Sec. 3.3: and obey", "mmgen", "gen-only", MAPS_GIVEN),
    Claim("Table 1: RGB drawn with its maps is no worse than RGB alone", "mmgen", "rgb-only",
          ("latent FD", "class"), True),
    Claim("Table 2: one model obeys maps as well as one for each", "mmgen", "one condition each",
          (*MAPS_GIVEN, "depth given: latent FD"), True),
    Claim("Table 3: one model for all maps sees as well as one for each", "all-from-rgb", "one task each",
          MAPS_SEEN, True),
    Claim("supplement 1.5: one time for all rather than one each", "mmgen", "independent-t",
          ("latent FD", *MAPS_SEEN)),
    Claim("Sec. 3.3: REPA helps", "with-repa", "mmgen", ("latent FD", *MAPS_SEEN)),
]


def ahead_by(claim, column, rows):
    """By how many spreads the first row of a claim is ahead: the difference of the means over the larger
    half of a range; of a row of one seed the other row's. None where both have one seed, or one has none.
    """
    first, second = rows[claim.ahead][column], rows[claim.behind][column]
    if not first or not second or len(first) == len(second) == 1:
        return None
    gap = sum(second) / len(second) - sum(first) / len(first)
    gap = -gap if STUDIED[column][2] else gap
    return gap / max((max(values) - min(values)) / 2 for values in (first, second))


def claims():
    """What the paper claims, what the study sees."""
    rows, lines = studied(), []
    for claim in CLAIMS:
        if not {claim.ahead, claim.behind} <= rows.keys():
            continue
        for i, column in enumerate(claim.columns):
            by = ahead_by(claim, column, rows)
            values = [spread(rows[name][column], STUDIED[column][1]) for name in (claim.ahead, claim.behind)]
            lines.append(["" if i else claim.said, column, *values, number(by, "+.1f"), claim.verdict(by)])
    return table(["claim", "in", "first", "second", "ahead by so many spreads", "verdict"], lines)


class Panel:
    """One column of the study's figure; to the right is better."""

    width = 150

    def __init__(self, x, y, column, values):
        self.x, self.y, self.column = x, y, column
        _, self.form, self.more = STUDIED[column]
        self.low, self.high = min(values), max(values)

    def at(self, value):
        """The place of a value."""
        share = (value - self.low if self.more else self.high - value) / max(self.high - self.low, 1e-12)
        return self.x + self.width * (0.1 + 0.8 * share)

    def head(self, pen, font):
        pen.text((self.x + self.width / 2, self.y + 14), self.column, fill="black", font=font, anchor="mm")
        left, right = (self.low, self.high) if self.more else (self.high, self.low)
        for value, place, anchor in ((left, 0.06, "lm"), (right, 0.94, "rm")):
            pen.text((self.x + self.width * place, self.y + 32), f"{value:{self.form}}", fill="grey",
                     font=font, anchor=anchor)

    def row(self, pen, y, values):
        for value in values:
            pen.ellipse([self.at(value) - 3, y - 3, self.at(value) + 3, y + 3], outline="steelblue", width=2)
        if values:
            x = self.at(sum(values) / len(values))
            pen.line([(x, y - 8), (x, y + 8)], fill="black", width=2)


def study_figure(path, across=5):
    """A dot a seed, a tick at the mean, a line at MMGen's mean. Two bands of `across` panels."""
    font, little, rows = ImageFont.load_default(15), ImageFont.load_default(13), studied()
    left, height, top = 150, 22, 46
    inside = height * len(rows)
    band = top + inside + 14
    size = left + Panel.width * across + 10, band * -(-len(STUDIED) // across)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for j, column in enumerate(STUDIED):
        values = [value for row in rows.values() for value in row[column]] or [0.0]
        panel = Panel(left + Panel.width * (j % across), band * (j // across), column, values)
        panel.head(pen, little)
        full, first = rows.get("mmgen", {}).get(column), panel.y + top
        if full:
            x = panel.at(sum(full) / len(full))
            pen.line([(x, first), (x, first + inside)], fill="lightgrey", width=2)
        for i, (name, row) in enumerate(rows.items()):
            y = first + height * (i + 0.5)
            if j % across == 0:
                pen.text((8, y), name, fill="black", font=font, anchor="lm")
            panel.row(pen, y, row[column])
    sheet.save(path)


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

def mt_translation():
    """results/mt_translation.json: {name: {flags, evaluations, result: eval_depth.py's JSON}}."""
    runs, rows = read("mt_translation"), []
    forms = dict.fromkeys(("pixel_accuracy", "class_accuracy", "miou"), ".3f")
    for name, run in runs.items():
        result = run["result"]
        command = f"train.py {run['flags']}".replace("train.py --method mt-diffusion", "mt_diffusion.py")
        evaluations = str(result["recipe"]["evaluations"])
        rows.append([name, f"`{command}`", evaluations, *understanding(result, forms)])
    known = next(run["result"] for run in runs.values() if "mean_map" in run["result"])
    rows.append(["mean map", "", "", *understanding(known["mean_map"], forms)])
    rows.append(["autoencoder", "", "", *understanding(known["ceiling"], forms)])
    return table(["", "command", "evaluations", "pixel accuracy", "class accuracy", "mIoU"], rows)


def mt_restoration():
    """results/mt_masked.json: studies/measure_mt.py."""
    found, rows = read("mt_masked"), []
    for m, row in without_recipe(found).items():
        cells = [number(row[key], ".1f") for key in ("left grey", "sdedit", "restored")]
        rows.append([m, number(row["hidden"], ".0%"), *cells])
    sdedit = f"SDEdit, {found['recipe']['sdedit']} of the steps"
    return table(["", "hidden", "left grey", sdedit, "MT-Diffusion"], rows)


def mt_heads_of_x():
    """results/mt_label.json: {name: studies/measure_mt.py's JSON}; results/mt_feature.json."""
    labels, vector = read("mt_label"), read("mt_feature")
    rows = [[name, number(row["top1"], ".1%"), number(row["top5"], ".1%"), ""]
            for name, row in labels.items()]
    rows.append(["feature: the head's vector", "", "", number(vector["cosine"], ".4f")])
    rows.append(["feature: the training set's mean vector", "", "", number(vector["mean vector"], ".4f")])
    return table(["the head of X on held-out scenes", "top-1", "top-5", "cosine to the true vector"], rows)


def mt_overhead():
    """results/mt_heads.json: studies/bench.py --what heads."""
    rows = [[name, number(row["ms_per_sample"], ".1f"), number(row["ratio"], ".3f")]
            for name, row in without_recipe(read("mt_heads")).items()]
    return table(["time of a training step over the single task's", "ms a sample", "ratio"], rows)


# ------------------------------------------------------------------------------------------------

TABLES = {make.__name__: make for make in (
    demo_understand, demo_generate, ten_minutes, few_steps, canny, ablations, study, claims,
    recipes_alone, recipes_together, recipes_reach, recipes_scales, recipes_cost, real_frames, real_drawn,
    speed_gpu, sampling_gpu, speed, data_speed, speed_parts, loss_curves, fusion, released, evaluators,
    robustness, mt_translation, mt_restoration, mt_heads_of_x, mt_overhead)}


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
