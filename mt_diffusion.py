"""MT-Diffusion (Chen et al., ICLR 2024) on MMGen's backbone: images and a second modality X in one
diffusion chain.

    python mt_diffusion.py --pair rgb seg --data data/toy --model T/2     # rgb -> seg, and both from noise
    python mt_diffusion.py --pair masked ...                              # or masked-u, label, feature
    python mt_diffusion.py --preset masked --data data/imagenet-64        # the paper's hyper-parameters
    python mt_sample.py --task translate --image photo.jpg --ckpt runs/mt

One loss trains the chain's noise and X (Eq. 6) of the network in mt_model.py. Training is train.py's loop,
with its flags, checkpoints and processes.
"""
import sys

import torch

import runs
import train
from dataset import cells_in
from distributed import autocast, check, check_ranges, run, with_row
from mix import LEAST_GIVEN
from model import training_flops
from mt_model import (FAMILIES, METHOD, OPTIONS, PATCH, PATCHES, SETTINGS, Chain, T, TranslationPredictor,
                      build, draw_images, mean_square, per_row, visible)
from transfer import WRAPPER, class_rows, init_from
from vae import latents
from weights import blocks_of

# App. E: what --preset stands for. The betas are in SETTINGS, the squares beside it. The patches are ours,
# for pixels.
PRESETS = {
    "translation": "--pair rgb seg --lr 1e-4 --batch-size 32",                                   # E.1
    "masked": "--pair masked --patch-size 4 --lr 7e-5 --batch-size 80 --steps 1000000",          # E.2, 64 px
    "masked-128": "--pair masked --patch-size 8 --lr 7e-5 --batch-size 80",                      # E.2, 128 px
    "label": "--pair label --patch-size 4 --lr 7e-5 --batch-size 75 --steps 1000000",            # E.3, 64 px
    "feature": "--pair feature --lr 1e-5 --batch-size 2048",                                     # E.4
}


class Objective:
    """Eq. 6: the noise's mean square, plus x_weight times X's error; for the contract see train.MMGen."""

    method, group = METHOD, 1
    shaping = ("model", "fusion", "pair", "agg", "head", "patch_size", "preset")  # its flags are compared
    options = OPTIONS

    @staticmethod
    def add_flags(parser):
        """Its own flags; a share or a probability that is not given is its setting's."""
        parser.set_defaults(run="runs/mt")
        parser.add_argument("--preset", choices=list(PRESETS), help="the paper's flags, before your own")
        parser.add_argument("--pair", nargs="+", required=True, metavar="X",
                            help="SOURCE TARGET modalities, or masked, masked-u, label, feature")
        parser.add_argument("--agg", default="vp_ramp", choices=list(FAMILIES), help="the weights w")
        parser.add_argument("--patch-size", type=int, default=2, help="4 for pixels (a cache of --vae none)")
        parser.add_argument("--head", default="middle", choices=("middle", "output"), help="label: -M or -E")
        parser.add_argument("--x-weight", type=float, default=0.1, help="lambda of Eq. 6; 0: single task")
        parser.add_argument("--eps-weight", type=float, default=1.0, help="0 trains the head of X alone")
        parser.add_argument("--hidden", type=float, help="share of rows whose X is not seen (the setting's)")
        parser.add_argument("--full-mask", type=float,
                            help="masked: share of rows that see the whole mask (0.1); 1: generation alone")
        parser.add_argument("--single", type=float, help="label, feature: share of plain DDPM given X (0.3)")

    def __init__(self, args, cache, device):
        self.args, self.cache, self.meta, self.device = args, cache, cache.meta, device
        self.kind, names = self._read_pair(args.pair)
        self._check(args)
        meta, pixels = cache.meta, cache.meta["vae"] == "none"
        self.model = build(
            args.model, self.kind, names, meta["num_classes"], meta["latent_channels"], meta["latent_size"],
            agg=args.agg, head=args.head, features=meta["feature_size"] if self.kind == "feature" else None,
            bound=1.0 if pixels else 8.0, patch_size=args.patch_size, fusion=args.fusion,
            blocks=blocks_of(runs.latest(args.run) or args.init))
        self.backbone = self.model.backbone
        self.modalities = list(dict.fromkeys(names))
        self.reads = [*self.modalities, *{"label": ["labels"], "feature": ["feature"]}.get(self.kind, []),
                      *(stem for m in self.modalities if (stem := f"{m}_known") in cache.stems)]
        shares = {key: getattr(args, key) for key in ("hidden", "full_mask", "single")}
        chosen = {key: share for key, share in shares.items() if share is not None}
        self.setting = self.model.setting._replace(**chosen)
        self.settings = self.setting._asdict()
        self.conditions = self.modalities[1:]
        self.predicts = self.modalities[:1] if self.conditions == ["rgb"] else []
        self.terms = ("loss_eps", "loss_x", "energy")  # energy: E(X)'s mean square, 0 at first
        self.weights = torch.tensor([args.eps_weight, args.x_weight, 0.0], device=device)

    def weights_at(self, step):
        return self.weights

    def _read_pair(self, pair):
        """--pair -> a row of SETTINGS, the modalities of the backbone: target first."""
        has = self.cache.modalities
        said = (f"--pair {' '.join(pair)}: give two modalities of the cache ({', '.join(has)}), "
                f"SOURCE TARGET, or one of {', '.join(list(SETTINGS)[1:])}")
        if len(pair) == 1 and pair[0] != "pair":
            check(pair[0] in SETTINGS and "rgb" in has, said)
            return pair[0], ["rgb", "rgb"] if pair[0].startswith("masked") else ["rgb"]
        check(len(pair) == 2 and pair[0] != pair[1] and set(pair) <= set(has), said)
        return "pair", pair[::-1]

    def _check(self, args):
        kind, side = self.kind, min(self.meta["latent_size"])
        check(args.eps_weight or (args.x_weight and args.single != 1), f"--eps-weight 0 --x-weight "
              f"{args.x_weight:g} --single {args.single}: nothing would be trained")
        check(args.head == "middle" or kind == "label", f"--head {args.head}: belongs to --pair label")
        check(args.single is None or kind in ("label", "feature"), "--single: of --pair label and feature")
        check(args.hidden is None or kind in ("pair", "masked"), "--hidden: of two modalities and masked")
        check(args.full_mask is None or kind == "masked", "--full-mask: of --pair masked")
        recognises = not args.eps_weight and kind in ("label", "feature")
        check(not recognises or args.agg == "none", f"--eps-weight 0 --agg {args.agg}: the head of X would "
              "read X out of z, where no image that is to be recognised has it; add --agg none")
        check(kind != "label" or self.cache.labels.max() < self.meta["num_classes"],
              f"--pair label: {self.cache.folder} has rows without a class")
        check(kind != "feature" or "feature" in self.cache.stems, f"--pair feature: {self.cache.folder} has "
              "no feature vectors; make it with prep_latents.py --feature NAME")
        check(1 <= args.patch_size <= side and side % args.patch_size == 0,
              f"--patch-size {args.patch_size}: must tile latents of {side}x{side}")
        check_ranges(args, **dict.fromkeys(("hidden", "full_mask", "single"), (0, 1)), x_weight=(0, 1000),
                     eps_weight=(0, 1000))

    def summary(self):
        flops = training_flops(self.backbone.config)
        return (f"MT-Diffusion {' '.join(self.args.pair)} ({self.args.agg}); {flops / 1e9:.1f} GFLOPs a "
                "sample and step in the backbone")

    def initialise(self, checkpoint, path):
        """--init: the backbone from any checkpoint, the heads from one of this method -> the table of
        what became of the weights, {weight taken as it is: the file's name of it}.

        Modalities are matched by name with one of MMGen, by their role (target, source) with one of this
        method; classes by name.
        """
        theirs, ema, of_x = checkpoint["config"], checkpoint["ema"], {}
        old, new = theirs["model"]["modalities"], list(self.backbone.modalities)
        if theirs["train"].get("method") == self.method:
            of_x = self._heads(theirs, ema)
            names = [f"place {i}" for i in range(len(old))], [f"place {i}" for i in range(len(new))]
        else:  # a masked image enters beside the image, as a modality of its own
            names = old, [*new[:1], "X"] if self.kind.startswith("masked") else new
        if self.kind == "feature":  # a layer in the place of the classes' table: by size or not at all
            ema = {key: value for key, value in ema.items() if not key.endswith("y_embedder.weight")}
        table, taken = init_from(self.backbone, self.meta, {**checkpoint, "ema": ema}, path, self.method,
                                 names)
        self.model.load_state_dict(of_x, strict=False)
        left = {key for key in self.model.state_dict() if not key.startswith(WRAPPER)} - of_x.keys()
        for said, keys in (("of X", of_x), ("of X, new", left)):
            table += f"\n  {said}: {', '.join(sorted(keys))}" if keys else ""
        taken = {f"{WRAPPER}{name}": source for name, source in taken.items()}
        return table, taken | {key: key.removeprefix(WRAPPER) for key in of_x}

    def _heads(self, theirs, ema):
        """The weights of X, {name: tensor}, of an EMA of this method that mean the same here: classes are
        matched by name, vectors have to be of the same teacher.
        """
        mine, same = self.model.state_dict(), {}
        if self.kind == "feature" and theirs["meta"].get("feature") != self.meta["feature"]:
            return {}
        for key, value in ema.items():
            a_row_a_class = self.kind == "label" and key.startswith(("head.", "classifier.linear."))
            if a_row_a_class:
                rows = class_rows(theirs["meta"]["class_names"], self.meta["class_names"], len(value))
                if None in rows:
                    continue
                value = value[rows]
            vectors = self.kind == "feature" and key == f"{WRAPPER}y_embedder.weight"
            own = vectors or not key.startswith(WRAPPER)
            if own and key in mine and mine[key].shape == value.shape:
                same[key] = value
        return same

    def prepare(self, step, batch, part):
        """A step's draws for the whole global batch, those of this process (slice part) beside its data.

        -> tensors for loss, rows that count per term (3,).
        """
        N, C, size = self.args.batch_size, self.meta["latent_channels"], self.meta["latent_size"]
        g = torch.Generator(self.device).manual_seed((self.args.seed * 0x9E3779B1 + step) % 2 ** 32)
        sides = torch.tensor(size, device=self.device)

        def rand(*shape):
            return torch.rand(shape, generator=g, device=self.device)

        k, count = (rand(N) * T).long(), (rand(N) * (PATCHES + 1)).long()
        hidden, single = rand(N) < self.setting.hidden, rand(N) < self.setting.single
        full = rand(N) < self.setting.full_mask
        corners = (rand(N, PATCHES, 2) * sides).long()
        posterior = torch.randn((N, C * len(self.modalities), *size), generator=g, device=self.device)
        noise = torch.randn((N, C, *size), generator=g, device=self.device)
        known = batch["known"]                                                          # (N, 1 or 2)
        here = known[:, 0] > 0                                                          # (N,) the target is
        shown = here & (known[:, -1] >= LEAST_GIVEN)                                    # (N,) X may be
        seen = (single | ~hidden) & shown                                               # (N,) X is shown
        alone = single | ~shown                    # (N,) plain DDPM: z carries no E(X), and X has no loss
        everyone = torch.full((), N, device=self.device)
        counts = torch.stack([here.sum(), (~alone).sum(), everyone])
        normals = posterior[part].split(C, 1)
        z0, *others = (latents(batch[m], normals[i], self.meta) for i, m in enumerate(self.modalities))
        if self.kind == "pair":
            x = others[0]
        elif self.model.images:
            patch = max(1, round(PATCH * size[0] / self.meta["resolution"]))
            mask = visible(corners[part], count[part], size, patch)                     # (n, 1, H, W)
            x = z0 * torch.where(full[part, None, None, None], 0.0, mask)
        else:
            x = batch["labels"] if self.kind == "label" else batch["feature"].float()
        rows = dict(z0=z0, x=x, k=k[part], noise=noise[part], seen=seen[part], alone=alone[part],
                    here=here[part])
        cells = cells_in(batch, self.modalities, self.meta)                                # (n, 1 or 2, H, W)
        if cells is not None:
            rows |= {"cells": cells[:, 0], "x_cells": cells[:, -1]}
        return rows, counts

    def loss(self, network, rows):
        z0, x, k, noise = rows["z0"], rows["x"], rows["k"], rows["noise"]
        seen, alone, schedule = rows["seen"], rows["alone"], self.model.schedule
        with autocast(self.device, self.args.precision):  # left before the next: it keeps casts
            e = torch.where(per_row(alone, z0), 0.0, self.model.encode(x))               # (n, C, H, W)
        z = schedule.q_sample(z0, [e], k, noise)                                        # (n, C, H, W)
        with autocast(self.device, self.args.precision):
            eps, predicted = network(self.model.look(schedule, z, e, k, seen), k, x, seen)
        error = torch.where(rows["here"], mean_square(eps.float() - noise, rows.get("cells")), 0.0).sum()
        about = self.model.x_error(predicted, x, rows.get("x_cells"))                   # (n,)
        about = torch.where(alone, 0.0, about).sum()
        return torch.stack([error, about, e.square().flatten(1).mean(1).sum()])

    def draw(self, network, y, given, noise):
        return draw_images(network, y, noise, Chain(steps=25), next(iter(given.values()), None))

    def predictor(self, network, encoder, metrics):
        return TranslationPredictor(network, self.meta["resolution"], encoder, Chain(steps=25), metrics)


def main():
    """Train; the flags of a --preset are put before those of the command."""
    sys.argv[1:] = with_row(sys.argv[1:], "--preset", PRESETS)
    train.command(Objective, __doc__)


if __name__ == "__main__":
    run(main)
