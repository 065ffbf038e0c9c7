"""The papers in miniature: tables, figure and verdicts of run_study.sh and run_mt.sh, from their JSON."""
import json
import re
from typing import NamedTuple

from cells import RESULTS, number, read, spread, table, understanding
from PIL import Image, ImageDraw, ImageFont
from record import ROOT


class Column(NamedTuple):
    """A score of runs."""
    keys: tuple  # where it is in a run's JSON
    form: str
    more: bool = False  # is better


def column(keys, form, more=False):
    return Column(tuple(keys.split("/")), form, more)


# ------------------------------------------------------------------------------------------------
# Rows: {name: {column: the values of its seeds}}, in the order of the script.

STUDIED = {  # keys: the JSON's part first
    "AbsRel": column("understand/abs_rel", ".3f"),
    "normals (degrees)": column("understand/normal_mean", ".1f"),
    "mIoU": column("understand/miou", ".3f", True),
    "class": column("generate/class_from_rgb_alone", ".2f", True),
    "latent FD": column("generate/latent_fd", ".2f"),
    "joint: AbsRel": column("generate/rgb_understood_against_generated/abs_rel", ".3f"),
    "depth given: AbsRel": column("generate/given_map_recovered/depth/abs_rel", ".3f"),
    "normals given": column("generate/given_map_recovered/normal/normal_mean", ".1f"),
    "seg. given: mIoU": column("generate/given_map_recovered/seg/miou", ".3f", True),
    "depth given: latent FD": column("generate/given_map_recovered/depth/latent_fd", ".2f"),
}
SINGLES = {"rgb-to-$m": "one task each", "$m-to-rgb": "one condition each"}  # rows that stand for three runs
FOUR = "m = 5", "m = 10", "m = 15", "m = 20"  # squares that hide an image
MT_STUDIED = {
    "pixel accuracy": column("pixel_accuracy", ".3f", True),
    "class accuracy": column("class_accuracy", ".3f", True),
    "mIoU": column("miou", ".3f", True),
    "latent FD": column("latent_fd", ".2f"),
    "latent FD, class told": column("latent_fd_of_told_classes", ".2f"),
    **{m: column(f"{m}/restored", ".1f", True) for m in FOUR},
    "top-1": column("top1", ".3f", True),
    "top-5": column("top5", ".3f", True),
    "cosine": column("cosine", ".4f", True),
}


def script_rows(script):
    """Names of a script's rows, in its order."""
    text = (ROOT / "studies" / script).read_text()
    return list(dict.fromkeys(re.findall(r"^ *(?:row|more) ([\w$-]+) ", text, re.M)))


def value_at(found, keys):
    """The value at a path of keys in JSON, or None."""
    for key in keys:
        found = found.get(key) if found else None
    return found


def studied():
    """results/study/<row>_<seed>_{understand,generate}.json."""
    found = {}
    for path in sorted((RESULTS / "study").glob("*.json")):
        name, _, part = path.stem.split("_")
        name = re.sub("(?<=-to-)(depth|normal|seg)|(depth|normal|seg)(?=-to-)", "$m", name)
        row, run = found.setdefault(name, {c: [] for c in STUDIED}), {part: json.loads(path.read_text())}
        for title, (keys, _, _) in STUDIED.items():
            value = value_at(run, keys)
            row[title] += [] if value is None else [value]
    order = [name for name in script_rows("run_study.sh") if name in found]
    return {SINGLES.get(name, name): found[name] for name in order}


def mt_studied():
    """results/mt/<row>_<seed>.json, and what stands beside them there: of `masked` what SDEdit restores and
    what it finds, and what both make of the rest; of `feature` the training set's mean vector.
    """
    names = "sdedit", "left grey", "outside", "sdedit outside", "mean vector"
    found, beside = {}, {name: {} for name in names}
    for path in sorted((RESULTS / "mt").glob("*.json")):
        run, name = json.loads(path.read_text()), path.stem.split("_")[0]
        if name == "masked-f":  # was tuned to see nothing of X: it restores nothing
            run = {key: value for key, value in run.items() if key not in FOUR}
        for title, (keys, _, _) in MT_STUDIED.items():
            value = value_at(run, keys)
            if value is not None:
                found.setdefault(name, {c: [] for c in MT_STUDIED})[title].append(value)
        for other, row in beside.items():
            for title, place in [*((m, run.get(m, {})) for m in FOUR), ("cosine", run)]:
                row.setdefault(title, []).extend([place[other]] if other in place else [])
    rows = {name: found[name] for name in script_rows("run_mt.sh") if name in found}
    blank = {title: [] for title in MT_STUDIED}
    return {**rows, **{other: {**blank, **row} for other, row in beside.items()}}


def spreads(row, columns, titles):
    return [spread(row[title], columns[title].form) for title in titles]


def seeds(row):
    return str(max(map(len, row.values())))


# ------------------------------------------------------------------------------------------------
# Tables.

def study():
    rows = [[name, seeds(row), *spreads(row, STUDIED, STUDIED)] for name, row in studied().items()]
    known = read("study/mmgen_0_understand")
    real = read("study/mmgen_0_generate")["latent_fd_of_as_many_scenes"]
    blank = [""] * (len(STUDIED) - 5)
    rows.append(["the training set's mean map", "", *understanding(known["mean_map"]), "", "", *blank])
    ceiling = understanding(known["ceiling"])
    rows.append(["the autoencoder; real scenes", "", *ceiling, "", f"{real:.2f}", *blank])
    return table(["", "seeds", *STUDIED], rows)


def mt_table(titles):
    """The rows that have one of the columns."""
    return [[name, seeds(row), *spreads(row, MT_STUDIED, titles)] for name, row in mt_studied().items()
            if any(row[title] for title in titles)]


def mt_translation():
    """Table 4 of MT-Diffusion."""
    titles = ["pixel accuracy", "class accuracy", "mIoU"]
    rows = mt_table(titles)
    known = {"the training set's mean map": read("study/mmgen_0_understand")["mean_map"],
             "the autoencoder": read("mt/pair_0")["ceiling"]}
    for name, part in known.items():
        rows.append([name, "", *(number(part[MT_STUDIED[title].keys[0]], ".3f") for title in titles)])
    return table(["", "seeds", *titles], rows)


def mt_generation():
    """Tables 2 and 3 of MT-Diffusion."""
    titles = ["latent FD", "latent FD, class told"]
    return table(["", "seeds", *titles], mt_table(titles))


def mt_restoration():
    """Table 1 of MT-Diffusion."""
    hidden = read("mt/masked_0")
    rows = [["hidden", "", *(number(hidden[m]["hidden"], ".0%") for m in FOUR)], *mt_table(FOUR)]
    return table(["", "seeds", *FOUR], rows)


def mt_heads_of_x():
    """The heads of label and feature."""
    titles = ["top-1", "top-5", "cosine"]
    return table(["", "seeds", *titles], mt_table(titles))


# ------------------------------------------------------------------------------------------------
# Verdicts.

class Claim(NamedTuple):
    """What a paper says, as two rows of a script of which the first is ahead in some columns."""
    said: str
    ahead: str
    behind: str
    columns: tuple
    equal: bool = False  # all that is said is that it is not behind

    def verdict(self, by, seeds):
        """by: so many spreads it is ahead; two are two standard errors of three seeds each, and of no fewer:
        of two each they come by chance at one in five.
        """
        if seeds < 3:
            return ("not measured", "of one seed", "of two seeds")[seeds]
        if by <= -2:
            return "does not"
        return "holds" if by >= 2 else "not shown behind" if self.equal else "cannot be told"


DRAWN = "latent FD", "class"
MAPS_SEEN = "AbsRel", "normals (degrees)", "mIoU"
MAPS_GIVEN = "depth given: AbsRel", "normals given", "seg. given: mIoU"
CLAIMS = [
    Claim("Table 4: the full model generates better than generation alone", "mmgen", "gen-only",
          DRAWN),
    Claim("Table 4: than without augmentation", "mmgen", "no-aug", DRAWN),
    Claim("Table 4: than without the task embedding", "mmgen", "no-task-embedding", DRAWN),
    Claim("Table 4's order: generation alone before no augmentation", "gen-only", "no-aug", DRAWN),
    Claim("Table 4, column Vis: conditioned rows make it understand", "mmgen", "gen-only", MAPS_SEEN),
    Claim("Table 4, column CondGen: and obey", "mmgen", "gen-only", MAPS_GIVEN),
    Claim("Table 1, at equal steps: RGB alone is ahead (REPA 7.9, MMGen 9.8)", "rgb-only", "mmgen",
          DRAWN),
    Claim("Table 2: one model obeys maps as well as one for each", "mmgen", "one condition each",
          (*MAPS_GIVEN, "depth given: latent FD"), True),
    Claim("Table 3: one model of all tasks sees as well as one for each map", "mmgen", "one task each",
          MAPS_SEEN, True),
    Claim("one model that is only given the RGB sees as well as one for each map", "all-from-rgb",
          "one task each", MAPS_SEEN, True),
    Claim("supplement 1.5: one time for all rather than one each", "mmgen", "independent-t",
          ("latent FD", *MAPS_SEEN)),
    Claim("Sec. 3.3: REPA helps", "with-repa", "mmgen", ("latent FD", *MAPS_SEEN)),
]
SEGMENTS = "pixel accuracy", "class accuracy", "mIoU"
MT_CLAIMS = [
    Claim("Table 4: translation is better learned with the image's generation than alone", "pair", "single",
          SEGMENTS),
    Claim("Table 4, all rows seeing X", "seen", "single", SEGMENTS),
    Claim("Table 1: it restores better than SDEdit (there LPIPS, here PSNR)", "masked", "sdedit", FOUR),
    Claim("Sec. 4.1: it keeps what is not hidden, SDEdit does not", "outside", "sdedit outside", FOUR),
    Claim("Table 1: SDEdit is worse than leaving the squares grey (likewise)", "left grey", "sdedit", FOUR),
    Claim("Table 2: masked images make generation better (-X)", "masked", "plain", ("latent FD",)),
    Claim("Sec. 4.1: so does -U (in Table 2 its FID is 26.00, without masked images 23.22)", "masked-u",
          "plain", ("latent FD",)),
    Claim("Table 2: -X before -U", "masked", "masked-u", ("latent FD",)),
    Claim("Table 2: drawing the label too costs a little (-M)", "plain", "label-m", ("latent FD",)),
    Claim("Table 2: with single-task rows it is ahead of the single task (-M*)", "label", "conditional",
          ("latent FD, class told",)),
    Claim("Table 2: the head at the end before the head at the middle (-E*, -M*)", "label-e", "label",
          ("latent FD, class told",)),
    Claim("Table 3: fine-tuned on images alone it is ahead of the single task continued", "masked-f",
          "plain-f", ("latent FD",)),
    Claim("Fig. 6: the head knows more than a classifier trained alone", "label-e", "label-alone",
          ("top-1",)),
]


def ahead_by(claim, title, rows, columns):
    """By how many spreads the first row of a claim is ahead: the difference of the means over the larger
    half of a range; and the fewer seeds of both rows, of less than two of which there is no spread, but None.
    """
    first, second = rows[claim.ahead][title], rows[claim.behind][title]
    seeds = min(len(first), len(second))
    if seeds < 2:
        return None, seeds
    gap = sum(second) / len(second) - sum(first) / len(first)
    gap = -gap if columns[title].more else gap
    spread = max((max(values) - min(values)) / 2 for values in (first, second))
    return gap / max(spread, 1e-12), seeds


def verdicts(said, rows, columns):
    lines = []
    for claim in said:
        if not {claim.ahead, claim.behind} <= rows.keys():
            continue
        names = claim.ahead, claim.behind
        for i, title in enumerate(claim.columns):
            by, seeds = ahead_by(claim, title, rows, columns)
            values = [spread(rows[name][title], columns[title].form) for name in names]
            against = "" if i else f"`{names[0]}` against `{names[1]}`"
            told = number(by if seeds >= 3 else None, "+.1f")
            lines.append(["" if i else claim.said, against, title, *values, told, claim.verdict(by, seeds)])
    return table(["claim", "rows", "in", "first", "second", "ahead by so many spreads", "verdict"], lines)


def claims():
    """What MMGen's paper claims, what the study sees."""
    return verdicts(CLAIMS, studied(), STUDIED)


def mt_claims():
    """What MT-Diffusion's paper claims."""
    return verdicts(MT_CLAIMS, mt_studied(), MT_STUDIED)


# ------------------------------------------------------------------------------------------------
# The figure.

class Panel:
    """One column of the study's figure; to the right is better."""

    width = 150

    def __init__(self, x, y, title, values):
        self.x, self.y, self.title = x, y, title
        _, self.form, self.more = STUDIED[title]
        self.low, self.high = min(values), max(values)

    def at(self, value):
        """The place of a value."""
        share = (value - self.low if self.more else self.high - value) / max(self.high - self.low, 1e-12)
        return self.x + self.width * (0.1 + 0.8 * share)

    def head(self, pen, font):
        pen.text((self.x + self.width / 2, self.y + 14), self.title, fill="black", font=font, anchor="mm")
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
    for j, title in enumerate(STUDIED):
        values = [value for row in rows.values() for value in row[title]] or [0.0]
        panel = Panel(left + Panel.width * (j % across), band * (j // across), title, values)
        panel.head(pen, little)
        full, first = rows.get("mmgen", {}).get(title), panel.y + top
        if full:
            x = panel.at(sum(full) / len(full))
            pen.line([(x, first), (x, first + inside)], fill="lightgrey", width=2)
        for i, (name, row) in enumerate(rows.items()):
            y = first + height * (i + 0.5)
            if j % across == 0:
                pen.text((8, y), name, fill="black", font=font, anchor="lm")
            panel.row(pen, y, row[title])
    sheet.save(path)
