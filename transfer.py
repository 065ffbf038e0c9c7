"""--init: weights that a model takes over from a checkpoint of another run, matched by modality and class."""
import re

import torch
import torch.nn.functional as F

from distributed import InputError, check
from model import build_model
from trees import classes_of

WRAPPER = "backbone."  # what MT-Diffusion's checkpoints put before the network's weights


@torch.no_grad()
def init_from(model, meta, checkpoint, path, method="mmgen", names=None):
    """--init: copy what fits of a checkpoint's EMA into the model, modalities and classes matched by name
    -> a table of what became of each weight, and {name: the file's} of those that were taken as they are.

    Where a modality is new, the columns through which it enters start at zero, so that the others keep
    their meaning (but in a sequence, where it has tokens of its own); a class that the file does not know
    starts as its null class; positions are interpolated to another grid. method is the model's: of a
    checkpoint of another one the heads are left out, what they predict is something else. names: the
    modalities' names in the file and in the model, where they are matched by other ones. Raises InputError
    when the latents or the blocks are of another kind or nothing fits.
    """
    theirs = checkpoint["config"]
    _check_kind(theirs, model.config, meta, path)
    old, new = names or (theirs["model"]["modalities"], list(model.modalities))
    state, fate, used, rows = _unwrapped(checkpoint["ema"]), {}, {}, None
    foreign = theirs["train"].get("method", "mmgen") != method
    joined, lists = parts_of(model.config) if old != new else ({}, ())
    for key, target in model.state_dict().items():
        source = _source(key, lists, old, new)
        vectors = key == "y_embedder.weight" and theirs["model"].get("features")  # a layer, not a table
        if source not in state or vectors or (foreign and key.startswith("heads.")):
            fate[key] = "new"
            continue
        value = state[source].to(target.dtype)
        if key == "y_embedder.weight":
            rows = class_rows(theirs["meta"]["class_names"], meta["class_names"], len(value) - 1)
            fate[key] = _copy_classes(value, target, rows)
        elif key == "pos_embed" and value.shape != target.shape:
            fate[key] = _copy_positions(value, target, theirs["model"], model.grid)
        elif key in joined:
            fate[key] = _copy_parts(value, target, joined[key], old, new)
        elif value.shape == target.shape:
            target.copy_(value)
            fate[key] = "taken"
        else:
            fate[key] = "new"
        if fate[key] != "new":
            used[key] = source
    check("taken" in fate.values(), f"--init {path}: none of its {len(state)} weights fits; check --model")
    fate.update({f"{key} (file)": "left out" for key in state if key not in used.values()})
    title = f"--init {path} ({checkpoint.get('origin', 'ours')}, step {checkpoint['step']})"
    taken = {key: source for key, source in used.items() if fate[key] == "taken"}
    return "\n".join([title, *_fate_lines(fate), *_notes(theirs, model.config, meta, rows)]), taken


def _kinds(theirs, config, key):
    """What a file's network and a model are built of."""
    usual = {"blocks": "sit", "fusion": "linear"}[key]
    return theirs["model"].get(key, usual), config.get(key, usual)


def _check_kind(theirs, config, meta, path):
    """Raise InputError where a file's weights or latents mean something else than the model's."""
    for key in ("vae_sha256", "scale", "latent_channels"):
        check(theirs["meta"][key] in (meta[key], None), f"--init {path}: its {key} is {theirs['meta'][key]}, "
              f"the cache's is {meta[key]}; the latents would not mean the same")
    size = theirs["model"]["name"]
    check(size == config["name"], f"--init {path}: is of size {size}; pass --model {size}")
    was, now = _kinds(theirs, config, "blocks")
    check(was == now, f"--init {path}: its blocks are {was}, which compute something else than {now} ones of "
          f"the same names; pass --blocks {was}")


def _notes(theirs, config, meta, rows):
    """What the table of fates does not say; rows: as of class_rows, None without a table."""
    if rows is not None:
        nameless = not theirs["meta"]["class_names"] and None not in rows
        how = ", by their order: the file has no names" if nameless else ""
        yield f"  class rows: {len(rows) - rows.count(None)} of {len(rows)} known{how}"
    was, now = theirs["meta"].get("shown", {}), meta.get("shown", {})
    maps = len(theirs["model"]["modalities"]) > 1 and len(config["modalities"]) > 1
    if maps and was != now:
        yield f"  its maps were shown by {was}, the cache's are by {now}"
    was, now = _kinds(theirs, config, "fusion")
    if was != now:
        yield f"  its fusion is {was}, the model's {now}: the blocks read other tokens than they did"


def renamed(checkpoint, renames, mine, path):
    """A file's modalities by the names of --rename, ["theirs=ours", ...]; mine: the model's. Raises
    InputError for those that there are not.
    """
    modalities, ours = checkpoint["config"]["model"]["modalities"], {}
    for text in renames:
        old, _, new = text.partition("=")
        ours[old] = new
        check(old in modalities and new, f"--rename {text}: the form is THEIRS=OURS, and {path} has "
              f"{', '.join(modalities)}")
        check(new in mine, f"--rename {text}: the model has {', '.join(mine)}")
    names = [ours.get(m, m) for m in modalities]
    check(not renames or len(set(names)) == len(names), f"--rename: two modalities of {path} would be called "
          f"{max(names, key=names.count)}")
    return names


def ages_of(checkpoint, taken):
    """{name: steps that the average of a weight has behind it} of the weights taken from a checkpoint, {name:
    the file's, without a wrapper's}.
    """
    older = {key.removeprefix(WRAPPER): age for key, age in checkpoint.get("ages", {}).items()}
    return {name: checkpoint["step"] + older.get(source, 0) for name, source in taken.items()}


# ------------------------------------------------------------------------------------------------
# Names.

def _unwrapped(state):
    """The network's weights in a state dict, without what a wrapper puts before their names."""
    inner = {key.removeprefix(WRAPPER): value for key, value in state.items() if key.startswith(WRAPPER)}
    return inner or state


def _source(key, lists, old, new):
    """The file's name of a weight, None for that of a modality which the file does not have; lists: as of
    parts_of.
    """
    inside = next((name for name in lists if key.startswith(f"{name}.")), None)
    if inside is None:
        return key
    index, *after = key.removeprefix(f"{inside}.").split(".")
    modality = new[int(index)]
    return ".".join([inside, str(old.index(modality)), *after]) if modality in old else None


def class_rows(old, new, count):
    """The row in a file's table of `count` classes for each new class, None for one that it does not know.

    old, new: the names of the classes in the file, [] where it has none, and in the model.
    """
    order, known = list(range(count)), classes_of(new, old)
    rows = [known[name] for name in new]
    numbered = list(new) == list(map(str, order))  # folders named by the class's number
    unknown = rows.count(None) == count
    same = list(new) == list(old) or (unknown and (numbered or not old))
    return order if same and len(new) == count else rows


# ------------------------------------------------------------------------------------------------
# Parts of a weight.

def parts_of(config):
    """What belongs to each modality in the network of a configuration, by comparison with that of one
    modality more -> {weight that depends on their number: (the dimension along which it has a block for each,
    what lies before the blocks), None where it has no such blocks}, names of the lists with an entry for
    each. Raises InputError where that cannot be seen.
    """
    count = len(config["modalities"])
    try:
        with torch.device("meta"):
            mine, more = (build_model(**{**config, "modalities": list(map(str, range(n)))}).state_dict()
                          for n in (count, count + 1))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--init: the network cannot be built with {count + 1} modalities ({reason}), so "
                         "that it is not seen which weights belong to which; keep to the file's") from error
    lists = sorted({_list_of(name, count, mine) for name in more.keys() ^ mine.keys()})
    nested = [name for name in lists for outer in lists if name.startswith(f"{outer}.")]
    check(not nested, f"--init: {', '.join(nested)}: a list of modalities within one, whose entries are not "
          "told apart")
    joined = {name: _blocks(name, value.shape, more[name].shape, count)
              for name, value in mine.items() if value.shape != more[name].shape}
    return joined, lists


def _blocks(name, shape, larger, count):
    """(dimension, what lies before the blocks) of a weight's shapes for `count` modalities and one more, or
    None.
    """
    first = int(name == "task_embedder.weight")  # its row 0 belongs to no modality
    grown = [i for i, (a, b) in enumerate(zip(shape, larger)) if a != b]
    block = larger[grown[0]] - shape[grown[0]]
    return (grown[0], first) if len(grown) == 1 and shape[grown[0]] - first == count * block else None


def _list_of(name, count, held):
    """The list whose entry `count` a weight is of: those of the names `held` have none. InputError: none."""
    words = name.split(".")
    for i, word in enumerate(words):
        entry = words[:i + 1]
        if word == str(count) and not any(key.split(".")[:i + 1] == entry for key in held):
            return ".".join(words[:i])
    raise InputError(f"--init: {name} is not there with any number of modalities, and no entry {count} of a "
                     "list; nobody can tell whose it is")


def _copy_classes(value, target, rows):
    """Rows of the class table (K + 1, D), the last one, the null class, for None."""
    null = len(value) - 1
    target.copy_(value[[null if row is None else row for row in (*rows, null)]])
    return "taken" if rows == list(range(null)) else "inflated"


def _copy_positions(value, target, config, grid):
    """The position table (1, T, D), interpolated to another grid."""
    patch = config.get("patch_size", 2)
    table = value.unflatten(1, [side // patch for side in config["latent_size"]]).permute(0, 3, 1, 2)
    target.copy_(F.interpolate(table, grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2))
    return "inflated"


def _copy_parts(value, target, blocks, old, new):
    """A tensor with a block for each modality, blocks as of parts_of: a new one's columns start at zero, so
    that what the others say keeps its meaning; its rows stay as they are.
    """
    if blocks is None or value.ndim != target.ndim:
        return "new"
    along, first = blocks
    was, now = list(value.shape), list(target.shape)  # of a block
    was[along], now[along] = (was[along] - first) / len(old), (now[along] - first) / len(new)
    if was != now:
        return "new"
    if along == 1:
        target.zero_()
    else:
        target[:first] = value[:first]
    theirs = value.narrow(along, first, value.shape[along] - first).chunk(len(old), along)
    mine = target.narrow(along, first, target.shape[along] - first).chunk(len(new), along)
    for part, modality in zip(mine, new):
        if modality in old:
            part.copy_(theirs[old.index(modality)])
    return "inflated"


def _fate_lines(fate):
    """{weight: what became of it} -> a line for each fate: how many, and of which modules."""
    for what in ("taken", "inflated", "new", "left out"):
        names = [key for key, value in fate.items() if value == what]
        modules = (re.match(r"(?:middle_)?heads\.\d+|[a-z_]+", name).group() for name in names)
        yield f"  {what:9s}{len(names):4d}  {', '.join(dict.fromkeys(modules))}"
