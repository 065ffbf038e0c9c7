"""Folder trees of pictures: what lies in them, by which names it belongs together, and what it holds.

    <root>/{rgb,depth,normal,seg}/<class>/<name>.png
    <root>/tree.json    what can be read in two ways: {"format", "depth_space", "depth_unit", "depth_void",
                        "seg_mode", "palette", "void", "upright", "focal", "focal_width", "classes"}, each of
                        which may be missing; Facts of modalities.py says what they mean
"""
import collections
import difflib
import functools
import hashlib
import json
import os
import pathlib
import re
import unicodedata

import numpy as np
from PIL import Image

from distributed import check, reading, say
from modalities import FACTS_FORMAT, MODALITIES, Facts, is_array

ALIASES = {"mask": "seg"}  # the released data's name
LONGEST = 240              # bytes of a file's name before its ending; file systems take 255 in all
UNREADABLE = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow knows them, and needs another program


# ------------------------------------------------------------------------------------------------
# Names.

@functools.cache
def endings():
    """The endings of the formats that Pillow reads."""
    Image.init()
    known = Image.registered_extensions().items()
    readable = {end for end, name in known if name in Image.OPEN and name not in UNREADABLE}
    return frozenset((*readable, ".mpo"))  # several JPEGs in one file


def stem_of(path, base):
    """The name by which files of several modalities belong together: below base, without a picture's
    ending; accents in one spelling.
    """
    return bare_name(path.relative_to(base))


def bare_name(name):
    """A path without a picture's ending, as a text; accents in one spelling."""
    if is_array(name) or name.suffix.lower() in endings():
        name = name.with_suffix("")
    return unicodedata.normalize("NFC", name.as_posix())


def flat_name(stem):
    """A stem as the name of one file: "_" for "/", short enough for a file system."""
    name = stem.replace("/", "_")
    raw = os.fsencode(name)
    if len(raw) <= LONGEST:
        return name
    digest = hashlib.sha256(raw).hexdigest()[:8]
    return f"{raw[:LONGEST - 9].decode(errors='ignore')}-{digest}"


def natural(name):
    """The key that sorts 2 before 10."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


# ------------------------------------------------------------------------------------------------
# Files.

def find_pictures(folder, arrays=False):
    """The pictures below a folder, with arrays also .npy files, sorted; links are followed, names that
    begin with a dot left out. Prints what was left out; raises InputError where there is none.
    """
    folder = pathlib.Path(folder)
    check(folder.is_dir(), f"{folder}: no such folder")
    found, left = [], collections.Counter()
    for path, why in walk(folder):
        ending = path.suffix.lower()
        if why is None and ending not in endings() and not (arrays and ending == ".npy"):
            why = f"of no picture's ending ({ending or 'none'})"
        if why is None:
            found.append(path)
        else:
            left[why] += 1
    told = ", ".join(f"{count} {why}" for why, count in left.items())
    check(found, f"{folder}: no pictures in this folder{' (left out: ' + told + ')' if told else ''}")
    if told:
        say(f"{folder}: left out {told}")
    return sorted(found)


def walk(folder):
    """Yield (path, None) of the files below a folder; (path, why) of what is left out: what is hidden, leads
    nowhere or round.
    """
    above = {}  # {a folder: where it and those that lead to it really lie}
    for place, folders, files in os.walk(folder, followlinks=True):
        place = pathlib.Path(place)
        real = place.resolve()
        above[place] = {real, *real.parents} | above.get(place.parent, set())
        for name in list(folders):
            circular = (place / name).is_symlink() and (place / name).resolve() in above[place]
            if name.startswith((".", "@eaDir")) or circular:  # @eaDir: a network drive's thumbnails
                folders.remove(name)
                yield place / name, "circular" if circular else "hidden"
        for name in files:
            why = "hidden" if name.startswith(".") else None
            if why is None and not (place / name).is_file():
                why = "that lead nowhere"
            yield place / name, why


def pictures_by_stem(folder):
    """{stem: path} of the pictures and arrays below a folder, sorted; an array counts before its picture.

    Raises InputError where a stem is there twice.
    """
    files = {}
    for path in find_pictures(folder, arrays=True):
        stem = stem_of(path, folder)
        other = files.get(stem, path)
        same_kind = other is not path and is_array(other) == is_array(path)
        names = " and ".join(ascii(each.name) for each in (other, path))  # accents may be spelt in two ways
        check(not same_kind, f"{path}: the stem {stem} is there twice ({names}); keep one")
        if stem not in files or is_array(path):
            files[stem] = path
    return files


def folders_of(root):
    """{modality: its folder} of a tree, in the registry's order; prints which others there are."""
    root, found, odd = pathlib.Path(root), {}, []
    check(root.is_dir(), f"{root}: no such folder")
    for path in sorted(root.iterdir()):
        if path.name in MODALITIES and path.is_dir():
            found[path.name] = path
        elif path.is_dir() and not path.name.startswith("."):
            odd.append(path)
    for path in odd if found else ():
        meant = ALIASES.get(path.name)
        if meant and meant not in found:
            found[meant] = path
            say(f"{path}: is read as {meant}")
        else:
            say(f"{path}: {left_out(path.name)}")
    return {m: found[m] for m in MODALITIES if m in found}


def left_out(name):
    """What is said of a folder or key of a name that is no modality."""
    close = difflib.get_close_matches(name, MODALITIES, 1)
    meant = ALIASES.get(name) or "".join(close)
    said = f"{meant} is meant?" if meant else "no modality"
    return f"left out, {said}; the modalities are {', '.join(MODALITIES)}"


def picture_folder(location, modality):
    """The folder whose pictures of a modality are meant: a tree's for it, else the folder itself; a file."""
    location = pathlib.Path(location)
    if not location.is_dir():
        return location
    inner = location / modality
    if modality not in MODALITIES:  # masks
        return inner if inner.is_dir() else location
    there = folders_of(location)
    check(modality in there or not there, f"{inner}: no such folder; there are {', '.join(there)}")
    return there.get(modality, location)


def find_files(location):
    """{stem: path} of a picture, or of all below a folder."""
    if location.is_dir():
        return pictures_by_stem(location)
    check(location.is_file(), f"{location}: no such file or folder")
    return {stem_of(location, location.parent): location}


def beside(files, modalities):
    """The other modalities' files of a tree beside {modality: file}: <root>/<given>/<rest> ->
    {modality: <root>/<modality>/<rest>.*}.
    """
    for m, path in files.items():
        parts = pathlib.Path(os.path.abspath(path)).parts
        if m not in parts:
            continue
        at = len(parts) - 1 - parts[::-1].index(m)
        root, inner = pathlib.Path(*parts[:at]), pathlib.Path(*parts[at + 1:-1])
        found, stem = {}, stem_of(path, path.parent)
        for name, other in (*ALIASES.items(), *((m, m) for m in modalities)):
            folder = root / name / inner
            if other in modalities and other not in files and folder.is_dir():
                same = [p for p in sorted(folder.iterdir()) if stem_of(p, folder) == stem and p.is_file()]
                found.update({other: same[0]} if same else {})
        return found
    return {}


# ------------------------------------------------------------------------------------------------
# Classes of folders.

def classes_of(folders, class_names):
    """The classes that pictures' relative folders name -> {folder: index of a class name, or None}.

    By the whole folder ("n01440764", "red/cone"), else by its last part ("train/n01440764") where no other
    folder and no other class ends in it. Spaces count as underscores.
    """
    names, plain = [_plain(name) for name in class_names], {folder: _plain(folder) for folder in folders}
    whole = {name: i for i, name in enumerate(names)}
    last = {_last(name): i for i, name in enumerate(names)}
    ends = collections.Counter(map(_last, names))
    folder_ends = collections.Counter(map(_last, set(plain.values())))
    found = {}
    for folder, name in plain.items():
        end = _last(name)
        alone = ends[end] == 1 and folder_ends[end] == 1
        found[folder] = whole.get(name, last[end] if alone else None)
    return found


def _plain(name):
    """A folder or class as it is compared: file systems write one name with combined accents or without."""
    return unicodedata.normalize("NFC", str(name)).replace(" ", "_").strip("/")


def _last(name):
    return name.rpartition("/")[2]


# ------------------------------------------------------------------------------------------------
# What files hold.

def roots_of(location):
    """The folders that may be the root of the tree that a file or folder lies in."""
    roots = []
    for path in (pathlib.Path(os.path.abspath(location)), pathlib.Path(os.path.realpath(location))):
        roots += [path] if path.is_dir() else []
        roots += [inner.parent for inner in (path, *path.parents) if inner.name in (*MODALITIES, *ALIASES)]
    return roots


def tree_json_of(location):
    """The tree.json of the tree that a file or folder lies in, or None."""
    return next((root / "tree.json" for root in roots_of(location) if (root / "tree.json").is_file()), None)


def sample_meta(folder):
    """The meta.json of a folder that sample.py made; {} of any other."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return meta if "checkpoint_sha256" in meta else {}
    except (OSError, ValueError, TypeError):
        return {}


def facts_of(location, depth_space=None, palette=None):
    """What the files at a location hold: Facts of its tree.json, of a model's log depth those of the samples'
    meta.json; what flags say goes before it.

    palette: uint8 (K, 3). Raises InputError for a tree.json that cannot be read.
    """
    path, facts = tree_json_of(location), Facts()
    if path is not None:
        facts = read_facts(path)
    for root in roots_of(location) if path is None else ():
        if sample_meta(root).get("depth_target") == "log":
            facts = Facts(depth_space="log", said=f"by {root / 'meta.json'}")
    if depth_space is not None:
        facts = facts._replace(depth_space=depth_space, said="by --depth-space")
    return facts if palette is None else facts._replace(palette=palette)


def recorded(facts):
    """How given files are read, for a recipe."""
    said = {m: facts[m]._asdict() for m in facts if m != "rgb"}
    for told in said.values():
        for key in ("said", "focal", "focal_width", "classes"):  # not of how a file is read
            told.pop(key)
        told["palette"] = None if told["palette"] is None else told["palette"].tolist()
    return said


def read_facts(path):
    """A tree.json -> Facts. Raises InputError for anything else."""
    with reading(path, "give {\"format\": \"" + FACTS_FORMAT + "\", \"depth_space\": ...}, or take it away"):
        held = json.loads(path.read_text())
        check(isinstance(held, dict) and held.get("format") == FACTS_FORMAT,
              f"{path}: format is not {FACTS_FORMAT!r}; it says nothing of the tree's files, take it away")
    keys = [key for key in Facts._fields if key != "said"]
    for key in held:
        check(key in ("format", *keys), f"{path}: has a key {key!r}; the keys are {', '.join(keys)}")
    told = {key: value for key, value in held.items() if key in keys and value is not None}
    wanted = {"depth_space": ("disparity", "depth"), "seg_mode": ("semantic", "instance"),
              "upright": (True, False), "classes": ("none",)}
    for key, allowed in wanted.items():
        check(told.get(key, allowed[0]) in allowed, f"{path}: {key} is {told.get(key)!r}, must be one of "
              f"{', '.join(map(str, allowed))}")
    for key, kinds, least in (("depth_unit", (int, float), 1e-12), ("depth_void", (int, float), -1e12),
                              ("void", (int,), -1), ("focal", (int, float), 1e-12),
                              ("focal_width", (int,), 1)):
        number = told.get(key, 1)
        check(type(number) in kinds and least <= number < 1e12, f"{path}: {key} is {number!r}, must be a "
              f"{'whole ' if float not in kinds else ''}number from {least:g} on")
    if "palette" in told:
        told["palette"] = as_palette(told["palette"], path)
    said = {"said": f"by {path}"} if "depth_space" in told else {}
    return Facts(**told, **said)


def as_palette(found, path):
    """A list of colours -> uint8 (K, 3). Raises InputError, naming the path, for anything else."""
    with reading(path, "give a JSON list of colours [r, g, b]"):
        colours = np.array(found)
    shaped = colours.ndim == 2 and colours.shape[1] == 3 and 1 <= len(colours) <= 255
    check(shaped and colours.dtype.kind in "iu" and colours.min() >= 0 and colours.max() <= 255,
          f"{path}: not a list of up to 255 colours [r, g, b] from 0 to 255")
    return colours.astype(np.uint8)


def read_palette(path):
    """Colours uint8 (K, 3) of a JSON list, or under the key "palette"; None where that is null, as instance
    segmentation's is.
    """
    with reading(path, "give a JSON list of colours [r, g, b]"):
        found = json.loads(path.read_text())
        found = found["palette"] if isinstance(found, dict) else found
    return None if found is None else as_palette(found, path)
