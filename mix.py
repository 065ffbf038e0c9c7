"""The task mix, and all that is random in a step of training (MMGen, Sec. 3.3 and 4.5).

A row's role is its index in the global batch mod 4. A step's draws are a function of (seed, step) and the
kind of device, made for the whole global batch and then sliced.
"""
import functools
import math
from typing import NamedTuple

import torch

from distributed import check, say


class Role(NamedTuple):
    given: str = "none"        # "none", "random" (one), "subset" (one to all but one) or a modality's name
    supervise: str = "all"     # "all" or "rgb"; a condition is never supervised
    drop: float = 0.0          # probability that supervision is dropped, each non-RGB modality's by itself
    clean: float = 0.99        # the condition's t is uniform in [clean, 1]
    independent: bool = False  # one t per modality instead of one for all
    no_class: float = 0.1      # probability that the class is dropped


ROLES = 4  # of a mix
LEAST_GIVEN = 0.5  # share of its cells that must be known of a map that is given
RGB_ONLY = Role(supervise="rgb")  # the others are noised and go in, without a loss
JOINT, JOINT_FULL = Role(drop=0.5), Role()
DECOUPLED, DECOUPLED_FULL = Role("random", drop=0.5), Role("random")
INDEPENDENT = Role(drop=0.5, independent=True)
FROM_RGB, FROM_DEPTH = Role("rgb", clean=1.0), Role("depth", clean=1.0)
FROM_NORMAL, FROM_SEG = Role("normal", clean=1.0), Role("seg", clean=1.0)
PHOTO = Role("rgb", no_class=0.9)  # a picture whose class nobody tells

TASK_MIX = {  # four roles each; a run knows its mix by name: change no row in use
    "mmgen": (RGB_ONLY, RGB_ONLY, JOINT, DECOUPLED),                     # Sec. 3.3 and 4.5
    "gen-only": (RGB_ONLY, RGB_ONLY, JOINT, JOINT),                      # Table 4
    "no-aug": (JOINT_FULL, JOINT_FULL, DECOUPLED_FULL, DECOUPLED_FULL),  # Table 4
    "no-drop": (RGB_ONLY, RGB_ONLY, JOINT_FULL, DECOUPLED_FULL),
    "independent-t": (RGB_ONLY, RGB_ONLY, JOINT, INDEPENDENT),           # supplement 1.5
    "rgb2x": (FROM_RGB,) * 4,                                            # released: RGB to the rest
    "depth2x": (FROM_DEPTH,) * 4,                                        # ours: a map to the rest
    "normal2x": (FROM_NORMAL,) * 4,
    "seg2x": (FROM_SEG,) * 4,
    "rgb": (JOINT_FULL,) * 4,                                            # SiT's and REPA's: of RGB alone
    "subset": (RGB_ONLY, JOINT_FULL, DECOUPLED_FULL, Role("subset")),    # ours: several given at once
    "photo": (JOINT_FULL, PHOTO, PHOTO, Role("random", no_class=0.5)),   # ours: for pictures without a class
}
TASK_MIX["joint"] = TASK_MIX["mmgen"]                                    # released for Hypersim: the same


def check_mix(mix, model, cached):
    """Raise InputError where a mix cannot be made of the modalities that a model and its cache have."""
    has, roles = set(model) & set(cached), TASK_MIX[mix]
    named = {role.given for role in roles} - {"none", "random", "subset"}
    check(mix != "rgb" or has == {"rgb"}, "--mix rgb: is of RGB alone; add --modalities rgb")
    wants = 2 if all(role.given in named for role in roles) else 1
    check({"rgb", *named} <= has and len(has) >= wants,
          f"--mix {mix}: gives {', '.join(sorted(named)) or 'none by name'}, the cache has "
          f"{', '.join(cached)} and the model {', '.join(model)}; rgb must be there, and where all rows are "
          "given the same, another one")


def tell_untrained(loaded, given):
    """Print where a checkpoint of ours has not been trained with these modalities, and they alone, given."""
    mix = loaded.train.get("mix")
    kinds = {0: ("none",), 1: ("random", "subset", *given)}.get(len(given), ("subset",))
    if mix in TASK_MIX and not any(role.given in kinds for role in TASK_MIX[mix]):
        what = f"{' and '.join(given)} alone" if given else "nothing"
        say(f"warning: {loaded.path} was trained with --mix {mix}, in which no row is given {what}: what it "
            "draws of that was not learned")


# ------------------------------------------------------------------------------------------------
# Times: uniform u in [0, 1) and the dimension of a row's latents -> t.

def uniform(u, dimension):
    return u


def early(u, dimension):
    """More rows near noise, where understanding in few steps happens; ours."""
    return u / (u + 2 * (1 - u))


def shifted(u, dimension):
    """Towards noise, the more the larger the latents are: not of 4,096 numbers (Esser et al., 2024; RAE)."""
    return u / (u + math.sqrt(dimension / 4096) * (1 - u))


def lognormal(u, dimension):
    """Logit-normal (0, 1), the middle more often (Esser et al., 2024)."""
    return torch.special.ndtri(u).sigmoid()


TIMES = {  # of rows without a condition, of rows with one
    "uniform": (uniform, uniform),
    "early": (early, early),
    "early-given": (uniform, early),
    "shifted": (shifted, shifted),
    "lognormal": (lognormal, lognormal),
}


# ------------------------------------------------------------------------------------------------

class Draws(NamedTuple):
    """Everything random of one step, for the whole global batch of N rows."""
    t: torch.Tensor           # (N, M) time, 0 noise, 1 data
    given: torch.Tensor       # (N, M) bool
    supervised: torch.Tensor  # (N, M) bool
    null: torch.Tensor        # (N,) bool: the class is dropped
    posterior: torch.Tensor   # (N, M*C, H, W) normal
    noise: torch.Tensor       # (N, M*C, H, W) normal


@functools.lru_cache(1)
def mix_columns(mix, modalities, rows, device):
    """The roles of so many rows as {what: (rows, 1)}, built once, so that a step copies nothing to the
    device. modalities is a tuple.
    """
    roles = [TASK_MIX[mix][i % ROLES] for i in range(rows)]
    fields = dict(
        fixed=[modalities.index(role.given) if role.given in modalities else -1 for role in roles],
        random=[role.given == "random" for role in roles],
        subset=[role.given == "subset" for role in roles],
        rgb_only=[role.supervise == "rgb" for role in roles],
        independent=[role.independent for role in roles],
        drop=[role.drop for role in roles],
        clean=[role.clean for role in roles],
        no_class=[role.no_class for role in roles],
    )
    return {name: torch.tensor(values, device=device)[:, None] for name, values in fields.items()}


def draws_of(seed, step, mix, modalities, known, shape, times="uniform"):
    """The Draws of a step, on the device of known. shape is (N, M*C, H, W); known (N, M), the share of known
    cells of each row and modality, 0 where a row has none of it; times is a row of TIMES.

    A modality that a row does not have is noise, t = 0, and neither given nor supervised. One of which less
    than LEAST_GIVEN is known is not given. A condition that is missing, or that leaves nothing to supervise,
    makes the row a joint one.
    """
    N, M, device = shape[0], len(modalities), known.device
    has, givable = known > 0, known >= LEAST_GIVEN  # (N, M)
    k = givable.sum(1, keepdim=True)                # (N, 1)
    role = mix_columns(mix, tuple(modalities), N, device)
    g = torch.Generator(device).manual_seed((seed * 0x9E3779B1 + step) % 2 ** 32)  # a CPU's reads 32 bits

    def rand(*size):  # new draws at the end: older runs go on with theirs
        return torch.rand(size, generator=g, device=device)

    t_shared, t_each, u_clean, u_drop, u_class = rand(N, 1), rand(N, M), rand(N, 1), rand(N, M), rand(N)
    chosen = torch.minimum((rand(N, 1) * k).long(), k - 1)  # (N, 1), of the k that may be given
    posterior = torch.randn(shape, generator=g, device=device)
    noise = torch.randn(shape, generator=g, device=device)
    order = torch.where(givable, rand(N, M), 2.0)  # the others last
    rank = order.argsort(1).argsort(1)             # (N, M), of each in a random order
    size = 1 + torch.minimum((rand(N, 1) * (k - 1)).long(), (k - 2).clamp(min=0))  # (N, 1): 1 to k - 1

    index = torch.arange(M, device=device)
    given = index == role["fixed"]
    given = given | (role["random"] & (givable.cumsum(1) - 1 == chosen))
    given = given | (role["subset"] & (rank < size))
    given = given & givable
    given = given & (has & ~given).any(1, keepdim=True)
    free, conditioned = TIMES[times]
    u, dimension = torch.where(role["independent"], t_each, t_shared), math.prod(shape[1:])
    t = torch.where(given.any(1, keepdim=True), conditioned(u, dimension), free(u, dimension))
    t = torch.where(given, role["clean"] + (1 - role["clean"]) * u_clean, t)
    t = torch.where(has, t, 0.0)
    is_rgb = index == 0  # the first of the registry, and always there
    kept = (u_drop >= role["drop"]) | is_rgb
    supervised = ~given & kept & has & (~role["rgb_only"] | is_rgb)
    return Draws(t, given, supervised, u_class < role["no_class"][:, 0], posterior, noise)
