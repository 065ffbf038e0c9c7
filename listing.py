"""Samples and the files of each: of a folder tree, or of an index, which may name files of any place.

An index holds a JSON object a line, {"rgb": PATH, "depth": PATH, "class": NAME, "name": NAME}, with a path
for each modality, relative to the index's folder. The class may be missing or null: no class. The name, too:
it is the RGB's path then. The released code's metadata (path_rgb, path_mask, path_rel_rgb, cat, idx_cat) is
such an index.
"""
import collections
import json
import os
import pathlib
import unicodedata
from typing import NamedTuple

from distributed import InputError, check, reading, say
from modalities import MODALITIES
from trees import ALIASES, bare_name, folders_of, left_out, natural, pictures_by_stem, tree_json_of

LONGEST_LINE = 2 ** 16  # bytes of a line
MOST = 10 ** 7     # lines
THEIRS = {**ALIASES, "path_rgb": "rgb", "path_depth": "depth", "path_normal": "normal", "path_mask": "seg",
          "cat": "class"}  # the released code's keys: ours
KEYS = (*MODALITIES, "class", "name", "idx_cat", "path_rel_rgb")
NO_CLASS = 1000    # the released code's idx_cat of what has no class


class Listing(NamedTuple):
    """Samples and the files of each."""
    root: pathlib.Path  # the tree, or the index
    modalities: tuple   # those without files are derived from the RGB
    names: list         # of the samples
    files: dict         # {modality: {name: path}}
    labels: list        # the class of each, None for none
    classes: list       # in order
    walked: list        # the folders that were searched
    lines: list = None  # the line of each in an index

    def where(self, i):
        """What an error of sample i begins with."""
        return f"{self.root}: line {self.lines[i]}: " if self.lines else ""

    def folders(self):
        """The folders whose pictures are read."""
        return [*self.walked, *{path.parent for files in self.files.values() for path in files.values()}]


def list_samples(root, modalities=()):
    """The samples of a tree, or of an index, a file -> Listing; modalities: () for all that are there.

    Raises InputError for what is no index, where a modality is missing that its row of MODALITIES does not
    derive, and where samples do not have the same ones.
    """
    root = pathlib.Path(root)
    check(root.exists(), f"{root}: no such folder, and no such index")
    return _of_index(root, modalities) if root.is_file() else _of_tree(root, modalities)


def _of_tree(root, modalities):
    found = folders_of(root)
    modalities = modalities or tuple(found)
    for m in ("rgb", *modalities):
        check(m in found or (m != "rgb" and MODALITIES[m].derive), f"{root / m}: no such folder; --data "
              "needs <root>/rgb/<class>/<name>.png and one folder for each of --modalities (found: "
              f"{', '.join(found) or 'none'})")
    files = {m: pictures_by_stem(found[m]) for m in modalities if m in found}
    for m in files:
        odd = sorted(files[m].keys() ^ files["rgb"].keys())
        if odd:
            here, there = (m, "rgb") if odd[0] in files[m] else ("rgb", m)
            raise InputError(f"{files[here][odd[0]]}: no file with this stem in {found[there]} "
                             f"({len(odd)} such); every modality needs the same stems")
    names = sorted(files["rgb"])
    labels = [pathlib.PurePosixPath(name).parent.as_posix() for name in names]
    classes = sorted(set(labels), key=natural)
    return Listing(root, modalities, names, files, labels, classes, [found[m] for m in files])


# ------------------------------------------------------------------------------------------------
# An index.

class Line(NamedTuple):
    """A line of an index."""
    at: int       # its number
    name: str     # of its sample
    files: dict   # {modality: path}
    label: str    # its class, None for none
    number: int   # idx_cat, the place of its class; None: nobody says
    others: list  # keys that mean nothing here


def _of_index(path, modalities):
    lines = read_index(path)
    others = collections.Counter(key for line in lines for key in line.others)
    for key, count in others.most_common(10):
        say(f"{path}: the key {key[:60]!r} of {count} lines is {left_out(key)}")
    _check_lines(path, lines, modalities or MODALITIES)
    found = tuple(m for m in MODALITIES if m in lines[0].files)
    modalities = modalities or found
    for m in ("rgb", *modalities):
        check(m in found or (m != "rgb" and MODALITIES[m].derive), f"{path}: line {lines[0].at}: has no {m}, "
              f"it has {', '.join(found) or 'no modality'}")
    files = {m: {line.name: line.files[m] for line in lines} for m in modalities if m in found}
    labels = [line.label for line in lines]
    return Listing(path, modalities, list(files["rgb"]), files, labels, _in_order(path, lines), [],
                   [line.at for line in lines])


def read_index(path):
    """The lines of an index, blank ones left out -> [Line]. Raises InputError for what is none."""
    lines, at = [], 0
    with reading(path, "give a file of JSON lines"), open(path, "rb") as file:
        while raw := file.readline(LONGEST_LINE + 1):
            at += 1
            check(len(raw) <= LONGEST_LINE and at <= MOST, f"{path}: line {at}: is over {LONGEST_LINE} "
                  f"bytes or after {MOST} others; an index has a JSON object for each sample")
            if raw.strip():
                lines.append(_line(path, at, raw))
    check(lines, f"{path}: holds no sample; an index has a JSON object for each")
    return lines


def _line(path, at, raw):
    """A line's bytes -> Line."""
    where, told, others = f"{path}: line {at}", {}, []
    with reading(where, "give a JSON object, {\"rgb\": PATH, \"depth\": PATH, \"class\": NAME}"):
        held = json.loads(raw)
        check(isinstance(held, dict), f"{where}: holds a {type(held).__name__}, expected an object")
        os.fsencode("".join(value for value in held.values() if isinstance(value, str)))  # else of no file
    for key, value in held.items():
        ours = THEIRS.get(key, key)
        check(ours not in told, f"{where}: says {ours} twice, as {key}, too; keep one")
        if ours not in KEYS:
            others.append(key)
        elif value is not None:
            told[ours] = value
    number = told.pop("idx_cat", None)
    check(number is None or (type(number) is int and 0 <= number < 2 ** 31),
          f"{where}: idx_cat is {str(number)[:60]}, expected a whole number")
    nobody = any(THEIRS.get(key, key) == "class" and value is None for key, value in held.items())
    if type(told.get("class", None if nobody else number)) is int:
        told["class"] = str(told.get("class", number))
    for key, value in told.items():
        good = isinstance(value, str) and value.strip() and not set(value) & set("\n\r\0")
        check(good, f"{where}: {key} is {str(value)[:60]!r}, expected a text of one line")
    files = {m: path.parent / told[m] for m in MODALITIES if m in told}
    label = told.get("class") if number != NO_CLASS else None
    return Line(at, _name(told, path), files, label and unicodedata.normalize("NFC", label), number, others)


def _name(told, path):
    """The name of a line's sample; told {our key: text}, path: the index's."""
    if "name" in told:
        return unicodedata.normalize("NFC", told["name"])
    place = told.get("path_rel_rgb") or told.get("rgb", ".")
    place, base = pathlib.Path(os.path.normpath(place)), pathlib.Path(os.path.abspath(path.parent))
    return bare_name(place.relative_to(base) if place.is_relative_to(base) else place)


def _check_lines(path, lines, modalities):
    """Raise InputError where two lines have the same name, or not the same of the modalities."""
    first, wanted, named = lines[0], set(modalities), {}
    for line in lines:
        for m in sorted(wanted & (line.files.keys() ^ first.files.keys())):
            has, lacks = (line, first) if m in line.files else (first, line)
            raise InputError(f"{path}: line {lacks.at}: has no {m}, line {has.at} has; give it, or "
                             "take others with --modalities")
        other = named.setdefault(line.name, line)
        check(other is line, f"{path}: line {line.at}: is of the name {line.name}, as line {other.at}; give "
              "each a \"name\" of its own")


def _in_order(path, lines):
    """The classes of an index: as idx_cat numbers them, where it does, others behind, 2 before 10."""
    numbers, classes = {}, {}
    for line in lines:
        if line.label is None or line.number is None:
            continue
        for other in (numbers.setdefault(line.label, line), classes.setdefault(line.number, line)):
            same = (other.label, other.number) == (line.label, line.number)
            check(same, f"{path}: line {line.at}: class {line.label} is number {line.number}, in line "
                  f"{other.at} {other.label} is {other.number}; give each class one number")

    def place(name):
        return numbers[name].number if name in numbers else 2 ** 31, natural(name)
    return sorted({line.label for line in lines} - {None}, key=place)


def place_of_facts(listing):
    """Where it is said what a listing's files hold: its tree, the index's folder or, without a tree.json
    there, the tree that its maps lie in.

    Raises InputError where they lie in several.
    """
    if listing.lines is None:
        return listing.root
    folder = listing.root.parent
    if (folder / "tree.json").is_file():
        return folder
    maps = [files for m, files in listing.files.items() if m != "rgb"]
    inner = {path.parent for files in maps for path in files.values()}
    places = {tree_json_of(folder): folder for folder in inner}
    several = " and ".join(sorted(str(tree or "none") for tree in places)[:2])
    check(len(places) <= 1, f"{listing.root}: its files lie in trees of different tree.json ({several}); "
          f"say what they hold in {folder / 'tree.json'}")
    return next(iter(places.values()), folder)
