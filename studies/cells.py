"""What the tables of results/README.md are made of: figures in JSON, cells, rows."""
import json

from record import ROOT

RESULTS = ROOT / "results"


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


def spread(values, form):
    """The mean, and half of the range between the lowest and the highest; of one value it alone."""
    if not values:
        return ""
    mean = f"{sum(values) / len(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:{form}}"
