"""weights.py: our checkpoints, released ones, and export; transfer.py: --init."""
import argparse
import copy
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save

import runs
import transfer
import trees
import weights
from distributed import InputError, sha256
from model import build_model
from small import SMALL
from weights import DEMO, load_checkpoint, load_model


def draw(model, std=0.04, seed=0):
    """Every parameter but the positions from N(0, std): as initialised the network outputs exactly 0."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed":
                p.copy_(torch.randn(p.shape, generator=g) * std)
    return model


def ours(path, **options):
    """A checkpoint of this project with drawn weights."""
    model = draw(build_model(**{"name": SMALL, "num_classes": 12, "latent_size": 16, **options}))
    meta = dict(vae="sd-mse", vae_sha256=None, scale=weights.SD_SCALE, latent_channels=4,
                latent_size=[16, 16], resolution=128, palette=None, depth_space="disparity",
                seg_mode="instance", class_names=[f"c{i}" for i in range(model.num_classes)])
    config = dict(model=model.config, meta=meta, train={})
    torch.save(dict(ema=model.state_dict(), step=7, config=config, format=weights.FORMAT), path)
    return model, meta


def official(path, **more):
    """The same weights as MMGen's code would have saved them, with its argparse.Namespace and optimiser."""
    ours_too = path.with_suffix(".ours")  # another file: a mapped one must not be written over
    model, _ = ours(ours_too)
    out = weights.to_official(load_checkpoint(ours_too), path)
    torch.save({**out, "args": argparse.Namespace(**out["args"]), "opt": {"state": {}}, **more}, path)
    return model


def inputs(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    M, (H, W) = len(model.modalities), model.latent_size
    x, t = torch.randn(2, M * 4, H, W, generator=g), torch.rand(2, M, generator=g)
    return x, t, torch.tensor([1, 12]), torch.rand(2, M, generator=g) < 0.3


@torch.inference_mode()
def same(a, b, **k):
    return torch.equal(a(*inputs(a, **k))[0], b(*inputs(a, **k))[0])


def test_a_released_file_is_recognised_and_runs(tmp_path):
    model = official(tmp_path / "0600000.pt", steps=600000)
    loaded = load_model(tmp_path / "0600000.pt")
    assert same(model, loaded.model) and loaded.step == 600000
    assert loaded.meta["vae"] == "sd-mse" and loaded.model.modalities == weights.RELEASED
    raw = torch.load(tmp_path / "0600000.pt", weights_only=False)["ema"]
    block = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    head = ("linear", "adaLN_modulation.1")
    named = {"pos_embed", "x_embedder.proj", "y_embedder.embedding_table",
             "taskcond_embedder.embedding_table",
             *(f"t_embedder.{part}.{i}" for part in ("mlp", "mlp_fused") for i in (0, 2)),
             *(f"projectors.0.{i}" for i in (0, 2, 4)),
             *(f"lis_final_layer.{m}.{layer}" for m in range(4) for layer in head),
             *(f"blocks.{i}.{layer}" for i in range(2) for layer in block)}
    assert {key.removesuffix(".weight").removesuffix(".bias") for key in raw} == named  # as released
    assert torch.equal(raw["lis_final_layer.2.linear.weight"], -model.heads[2].linear.weight)
    assert "taskcond_embedder.embedding_table.weight" in raw


def test_export_and_reload_is_the_identity(tmp_path, command):
    model, _ = ours(tmp_path / "a.pt")
    command("weights", "--ckpt", tmp_path / "a.pt", "--export-official", tmp_path / "b.pt")
    state = load_checkpoint(tmp_path / "b.pt")
    assert state["origin"] == "MMGen" and state["ema"].keys() == model.state_dict().keys()
    assert all(torch.equal(state["ema"][k], v) for k, v in model.state_dict().items())
    assert state["step"] == 7
    ours(tmp_path / "c.pt", modalities=("rgb", "depth"))
    with pytest.raises(InputError, match="MMGen's format takes"):
        command("weights", "--ckpt", tmp_path / "c.pt", "--export-official", tmp_path / "d.pt")
    assert not (tmp_path / "d.pt").exists()


def siblings(kind, model):
    """The RGB part of our weights in REPA's or SiT's format."""
    shared = ("pos_embed", "x_embedder.proj.bias", "t_embedder.mlp.0.weight")
    state = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("blocks.") or k in shared}
    state["x_embedder.proj.weight"] = model.x_embedder.proj.weight.detach()[:, :4].clone()
    state["y_embedder.embedding_table.weight"] = model.y_embedder.weight.detach().clone()
    state["t_embedder.mlp.2.weight"] = torch.randn(192, 192)
    head = {k: v.clone() for k, v in model.heads[0].state_dict().items()}
    if kind == "REPA":
        state.update({f"final_layer.{k}": -v if k.startswith("linear") else v for k, v in head.items()})
        state.update({f"projectors.0.{k}": v.clone() for k, v in model.projector.state_dict().items()})
        return dict(ema=state, model=state, opt={}, args=argparse.Namespace(encoder_depth=4), steps=4)
    for k, v in head.items():
        if k.startswith("linear"):  # learned sigma: (p, q, 2C)
            v = torch.cat([v.unflatten(0, (4, 4)), torch.randn(4, 4, *v.shape[1:])], 1).flatten(0, 1)
        state[f"final_layer.{k}"] = v
    return state


@pytest.mark.parametrize("kind", ("REPA", "SiT"))
def test_rgb_models_generate_with_their_own_time_layers(kind, tmp_path):
    """REPA embeds the noise level, SiT the time itself."""
    options = dict(modalities=["rgb"], num_classes=12, latent_size=16, task_embedding=False)
    source = draw(build_model(SMALL, fused_time=False, **options))
    file = siblings(kind, source)
    state = file["ema"] if kind == "REPA" else file
    state.update({name: p for name, p in source.state_dict().items() if name.startswith("t_embedder.")})
    torch.save(file, tmp_path / "s.pt")
    loaded = load_model(tmp_path / "s.pt")
    x, t, y, given = inputs(source)
    theirs = source(x, t if kind == "REPA" else 1 - t, y, given)[0]  # at 1 - t it embeds t
    ours = loaded.model(x, t, y, given)[0]
    assert loaded.model.modalities == ("rgb",) and not loaded.model.config["fused_time"]
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("kind", ("REPA", "SiT"))
def test_init_from_rgb_models(kind, tmp_path):
    source, meta = ours(tmp_path / "a.pt")
    torch.save(siblings(kind, source), tmp_path / "s.pt")
    target = build_model(SMALL, num_classes=12, latent_size=16)
    checkpoint = load_checkpoint(tmp_path / "s.pt")
    table, _ = transfer.init_from(target, meta, checkpoint, "s.pt")
    assert checkpoint["origin"] == kind and f"({kind}" in table
    mine, theirs = target.state_dict(), source.state_dict()
    taken = ["heads.0.linear.weight", "heads.0.linear.bias", "blocks.1.attn.qkv.weight", "y_embedder.weight"]
    for key in taken + ["projector.2.weight"] * (kind == "REPA"):
        assert torch.equal(mine[key], theirs[key]), key
    patches = mine["x_embedder.proj.weight"]
    assert torch.equal(patches[:, :4], theirs["x_embedder.proj.weight"][:, :4]) and not patches[:, 4:].any()
    assert not mine["heads.1.linear.weight"].any() and "heads.1" in table.split("new")[1]


def test_an_export_keeps_ages_and_says_whose_maps_are_shown_otherwise(tmp_path, command):
    ours(tmp_path / "a.pt")
    checkpoint = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({**checkpoint, "ages": {"pos_embed": 4}}, tmp_path / "a.pt")
    for name in ("b.pt", "b.safetensors"):
        command("weights", "--ckpt", tmp_path / "a.pt", "--export", tmp_path / name)
        assert load_checkpoint(tmp_path / name)["ages"] == {"pos_embed": 4}
    out = command("weights", "--ckpt", tmp_path / "a.pt", "--export-official", tmp_path / "c.pt")
    assert "warning: its maps were shown by {}" in out
    meta = load_checkpoint(tmp_path / "c.pt")["config"]["meta"]
    checkpoint["config"]["meta"]["shown"] = meta["shown"]
    torch.save(checkpoint, tmp_path / "a.pt")
    out = command("weights", "--ckpt", tmp_path / "a.pt", "--export-official", tmp_path / "c.pt")
    assert "warning" not in out


def test_a_modality_of_the_file_goes_on_under_another_name(tmp_path):
    """seg -> canny fine-tunes the head and the columns that there are; without --rename they are new."""
    source, meta = ours(tmp_path / "a.pt")
    names = transfer.renamed(load_checkpoint(tmp_path / "a.pt"), ["seg=canny"], ["rgb", "canny"], "a.pt")
    for old, kept in ((names, True), (None, False)):
        model = build_model(SMALL, ["rgb", "depth", "normal", "canny"], 12, 4, 16)
        both = old and (old, list(model.modalities))
        table, taken = transfer.init_from(model, meta, load_checkpoint(tmp_path / "a.pt"), "a.pt", names=both)
        head = torch.equal(model.heads[3].linear.weight, source.heads[3].linear.weight)
        columns = model.x_embedder.proj.weight[:, 12:]
        same_columns = torch.equal(columns, source.x_embedder.proj.weight[:, 12:])
        assert (head, same_columns, "heads.3.linear.weight" in taken) == (kept,) * 3
        assert kept or (not columns.any() and "heads.3" in table.split("new")[1])
    for wrong, said in (("edges=canny", "a.pt has rgb, depth"), ("seg", "the form is THEIRS=OURS"),
                        ("seg=cany", "the model has rgb, depth"),
                        ("seg=depth", "two modalities of a.pt would be called depth")):
        with pytest.raises(InputError, match=said):
            transfer.renamed(load_checkpoint(tmp_path / "a.pt"), [wrong], ["rgb", "depth"], "a.pt")


def test_init_matches_modalities_by_name(tmp_path):
    """From (rgb, depth, normal, seg) to (rgb, normal): the normals' head and columns come along."""
    source, meta = ours(tmp_path / "a.pt")
    model = build_model(SMALL, ["rgb", "normal"], 12, 4, 16)
    transfer.init_from(model, meta, load_checkpoint(tmp_path / "a.pt"), "a.pt")
    mine, theirs = model.state_dict(), source.state_dict()
    assert torch.equal(mine["heads.1.linear.weight"], theirs["heads.2.linear.weight"])
    assert torch.equal(mine["x_embedder.proj.weight"][:, 4:], theirs["x_embedder.proj.weight"][:, 8:12])
    assert torch.equal(mine["task_embedder.weight"], theirs["task_embedder.weight"][[0, 1, 3]])
    with pytest.raises(InputError, match="scale is"):
        transfer.init_from(model, {**meta, "scale": 2.0}, load_checkpoint(tmp_path / "a.pt"), "a.pt")


def test_init_does_not_take_what_computes_something_else(tmp_path):
    """Modern blocks have the names and shapes of SiT's, a layer of vectors may have a class table's."""
    source, meta = ours(tmp_path / "a.pt", name=SMALL, blocks="modern")
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    model = build_model(SMALL, ["rgb", "normal"], 12, 4, 16)
    with pytest.raises(InputError, match="its blocks are modern.*pass --blocks modern"):
        transfer.init_from(model, meta, checkpoint, "a.pt")
    ours(tmp_path / "b.pt", name=SMALL, fusion="mlp")
    table, _ = transfer.init_from(model, meta, load_checkpoint(tmp_path / "b.pt"), "b.pt")
    assert "its fusion is mlp, the model's linear" in table
    ours(tmp_path / "c.pt", name=SMALL)
    checkpoint = load_checkpoint(tmp_path / "c.pt")
    checkpoint["config"]["model"]["features"] = 9
    before = model.y_embedder.weight.clone()
    table, taken = transfer.init_from(model, meta, checkpoint, "c.pt")
    assert torch.equal(model.y_embedder.weight, before) and "y_embedder" in table.split("new")[1]


def test_ages_follow_a_weight_to_its_new_name():
    checkpoint = {"step": 5000, "ages": {"pos_embed": 600_000, "backbone.heads.2.linear.bias": 7}}
    taken = {"backbone.pos_embed": "pos_embed", "heads.1.linear.bias": "heads.2.linear.bias", "new": "new"}
    assert transfer.ages_of(checkpoint, taken) == {
        "backbone.pos_embed": 605_000, "heads.1.linear.bias": 5007, "new": 5000}


def test_init_takes_middle_heads_by_name_or_leaves_them_new(tmp_path):
    for middle in (True, False):
        source, meta = ours(tmp_path / "a.pt", name=SMALL, middle_heads=middle)
        model = build_model(SMALL, ["rgb", "normal"], 12, 4, 16, middle_heads=True)
        table, taken = transfer.init_from(model, meta, load_checkpoint(tmp_path / "a.pt"), "a.pt")
        mine = model.middle_heads[1].linear.weight
        assert ("middle_heads.1.linear.weight" in taken) == middle
        if middle:
            assert torch.equal(mine, source.middle_heads[2].linear.weight)
            assert "middle_heads.3" in table.split("left out")[1]
        else:
            assert not mine.any() and "middle_heads.1" in table.split("new")[1]


def test_the_released_format_has_no_place_for_other_blocks_or_middle_heads(tmp_path, command):
    model, _ = ours(tmp_path / "a.pt", name=SMALL, middle_heads=True, projector_kind="conv")
    command("weights", "--ckpt", tmp_path / "a.pt", "--export-official", tmp_path / "b.pt")
    state = load_checkpoint(tmp_path / "b.pt")["ema"]
    left = model.state_dict().keys() - state.keys()
    assert {key.split(".")[0] for key in left} == {"middle_heads", "projector"} and len(left) == 18
    assert same(model, load_model(tmp_path / "b.pt").model)
    ours(tmp_path / "c.pt", name=SMALL, blocks="modern")
    with pytest.raises(InputError, match="c.pt: has the blocks modern; MMGen's format knows SiT's alone"):
        command("weights", "--ckpt", tmp_path / "c.pt", "--export-official", tmp_path / "d.pt")


def test_init_with_other_classes_and_resolution(tmp_path):
    source, meta = ours(tmp_path / "a.pt")
    model = build_model(SMALL, num_classes=3, latent_size=24)
    meta = {**meta, "class_names": ["c5", "cat", "c0"], "latent_size": [24, 24]}
    table, _ = transfer.init_from(model, meta, load_checkpoint(tmp_path / "a.pt"), "a.pt")
    y = source.y_embedder.weight
    assert torch.equal(model.y_embedder.weight, y[[5, 12, 0, 12]])  # an unknown class is the null class
    assert "inflated    2  pos_embed, y_embedder" in table and "class rows: 2 of 3 known" in table
    assert model.pos_embed.shape == (1, 144, 48)
    assert (model.pos_embed.amax() - source.pos_embed.amax()).abs() < 0.2


@pytest.mark.parametrize("shape", ((48, 32, 2, 2), (24, 12, 2, 2), (48, 12, 4, 4), (48, 2), (48, 13, 2, 2)))
def test_a_weight_without_the_blocks_of_its_modalities_stays_new(shape, tmp_path):
    _, meta = ours(tmp_path / "a.pt", modalities=["rgb", "depth", "normal"])
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    checkpoint["ema"]["x_embedder.proj.weight"] = torch.ones(shape)
    model = build_model(SMALL, num_classes=12, latent_size=16)
    before = model.x_embedder.proj.weight.clone()
    _, taken = transfer.init_from(model, meta, checkpoint, "a.pt")
    assert torch.equal(model.x_embedder.proj.weight, before) and "x_embedder.proj.weight" not in taken


def rows_taken(folder, old, new):
    """--init of a model of the classes `new` from a file of `old` (names or a number) -> the file's row of
    each class, the last is the null class; the table.
    """
    count = old if isinstance(old, int) else len(old)
    source, meta = ours(folder / "a.pt", num_classes=count)
    checkpoint = load_checkpoint(folder / "a.pt")
    checkpoint["config"]["meta"]["class_names"] = [] if isinstance(old, int) else list(old)
    model = build_model(SMALL, num_classes=len(new), latent_size=16)
    table, _ = transfer.init_from(model, {**meta, "class_names": list(new)}, checkpoint, "a.pt")
    same = (model.y_embedder.weight[:, None] == source.y_embedder.weight[None]).all(2)
    return [row.nonzero().item() for row in same], table


def test_init_takes_the_rows_of_the_classes_it_knows(tmp_path):
    wnids = ("n01440764", "n01443537", "n01484850")
    for old, new, rows, fate, known in (
            (wnids, wnids, [0, 1, 2, 3], "taken", "3 of 3"),
            (wnids, wnids[::-1], [2, 1, 0, 3], "inflated", "3 of 3"),
            (wnids, ("val/n01484850", "cat"), [2, 3, 3], "inflated", "1 of 2"),
            (("red cone", "red_box"), ("a/red_cone", "red box"), [0, 1, 2], "taken", "2 of 2"),
            (("a/cone", "b/cone"), ("cone", "b/cone"), [2, 1, 2], "inflated", "1 of 2"),
            (wnids, ("0", "1", "2"), [0, 1, 2, 3], "taken", "3 of 3"),  # numbers in order
            (wnids, ("0", "2", "1"), [3, 3, 3, 3], "inflated", "0 of 3"),
            (wnids, ("0", "1"), [3, 3, 3], "inflated", "0 of 2"),
            (("2", "0", "1"), ("0", "1", "2"), [1, 2, 0, 3], "inflated", "3 of 3"),
            (3, ("a", "b", "c"), [0, 1, 2, 3], "taken", "3 of 3"),  # a file without names
            (3, ("a", "b"), [3, 3, 3], "inflated", "0 of 2"),
            (wnids, (), [3], "inflated", "0 of 0"), (3, (), [3], "inflated", "0 of 0")):  # into no classes
        names, null = ([], old) if isinstance(old, int) else (old, len(old))
        found = [null if row is None else row for row in transfer.class_rows(names, new, null)]
        assert [*found, null] == rows, (old, new)
        if known == "1 of 2" or old == new or not new:
            found, table = rows_taken(tmp_path, old, new)
            assert found == rows and f"class rows: {known} known" in table, (old, new, table)
            assert "y_embedder" in table.split(fate)[1].split("\n")[0], (old, new, table)


def test_classes_of_folders():
    """By the whole folder, else by a last part that is unique among the folders and among the classes."""
    def found(folders, names):
        return list(trees.classes_of(folders, names).values())

    wnids = ["n01440764", "n02123045"]
    assert found(["n02123045", "train/n01440764", "n09", ".", ""], wnids) == [1, 0, None, None, None]
    assert found(["train/n02123045", "val/n02123045", "n01440764"], wnids) == [None, None, 0]
    assert found(["n02123045", "val/n02123045"], wnids) == [1, None]
    assert found(["red/cone", "cone", "box"], ["blue/cone", "red/cone", "red/box"]) == [1, None, 2]
    assert found(["cone"], ["blue/cone", "red/cone"]) == [None]
    assert found(["red cone", "red_cone", "x/red box"], ["red_cone", "red box"]) == [0, 0, 1]
    assert found(["caf\u00e9", "caf\udce9"], ["cafe\u0301"]) == [0, None]  # NFC and NFD, old latin-1 bytes
    assert trees.classes_of(["a", "a"], []) == {"a": None}


def test_released_weights_have_imagenets_classes(tmp_path):
    ours(tmp_path / "a.pt", num_classes=1000)
    torch.save(weights.to_official(load_checkpoint(tmp_path / "a.pt"), "a.pt"), tmp_path / "b.pt")
    names = load_checkpoint(tmp_path / "b.pt")["config"]["meta"]["class_names"]
    assert (len(names), names[0], names[281]) == (1000, "n01440764", "n02123045")
    official(tmp_path / "c.pt")  # of 12 classes
    assert load_checkpoint(tmp_path / "c.pt")["config"]["meta"]["class_names"] == []


def wrapped(state, how):
    """The names that a state dict has of a network in DDP, compiled, or with compiled blocks."""
    if how == "blocks":
        return {key.replace(".attn.", "._orig_mod.attn."): value for key, value in state.items()}
    return {how + key: value for key, value in state.items()}


@pytest.mark.parametrize("how", ("module._orig_mod.", "_orig_mod.module.", "blocks"))
def test_the_names_that_wrappers_give_are_taken_off(how, tmp_path):
    model = official(tmp_path / "a.pt")
    released = torch.load(tmp_path / "a.pt", weights_only=False)
    torch.save({**released, "ema": wrapped(released["ema"], how)}, tmp_path / "b.pt")
    assert same(model, load_model(tmp_path / "b.pt").model)
    own = torch.load(tmp_path / "a.ours", weights_only=True)
    states = {part: wrapped(own["ema"], how) for part in ("ema", "model")}
    assert states["ema"].keys() != own["ema"].keys()
    torch.save({**own, **states}, tmp_path / "c.pt")
    for part in states:
        assert same(model, load_model(tmp_path / "c.pt", weights=part).model)


def test_torchs_older_format_is_read_and_its_pickled_objects_are_not(tmp_path):
    model = official(tmp_path / "a.pt")
    for name in ("a.pt", "a.ours"):
        content = torch.load(tmp_path / name, weights_only=False)
        torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        assert same(model, load_model(tmp_path / "old.pt").model)
    data = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:len(data) // 2])
    evil = {**content, "at": Evil(tmp_path / "owned")}
    torch.save(evil, tmp_path / "evil.pt", _use_new_zipfile_serialization=False)
    for name, words in (("cut", "cut short|refused"), ("evil", "refused, it holds pickled")):
        with pytest.raises(InputError, match=f"{name}.pt: .*({words})"):
            load_checkpoint(tmp_path / f"{name}.pt")
    assert not (tmp_path / "owned").exists()


def test_a_text_stands_for_the_link_to_the_latest_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, run in enumerate(("linked", "named", "lost", "odd")):
        (tmp_path / "runs" / run / "ckpt").mkdir(parents=True)
        ours(tmp_path / "runs" / run / "ckpt/1.pt")
        os.utime(tmp_path / "runs" / run / "ckpt/1.pt", (i, i))
    (tmp_path / "runs/linked/latest.pt").symlink_to("ckpt/1.pt")
    (tmp_path / "runs/named/latest.pt").write_text("ckpt/1.pt\n")
    (tmp_path / "runs/lost/latest.pt").write_text("ckpt/2.pt")
    assert str(weights.newest_checkpoint()) == "runs/named/latest.pt"
    with pytest.raises(InputError, match="none is of mt-diffusion; train one, or pass --ckpt"):
        weights.newest_checkpoint("mt-diffusion")
    checkpoint = torch.load("runs/linked/ckpt/1.pt", weights_only=True)
    checkpoint["config"]["train"]["method"] = "mt-diffusion"
    torch.save(checkpoint, "runs/linked/ckpt/1.pt")  # the newest now, of the other method
    assert str(weights.newest_checkpoint()) == "runs/named/latest.pt"
    assert str(weights.newest_checkpoint("mt-diffusion")) == "runs/linked/latest.pt"
    for path in ("runs/named", "runs/named/latest.pt"):
        assert weights.locate(path) == tmp_path / "runs/named/ckpt/1.pt"
        assert load_checkpoint(path)["step"] == 7
    with pytest.raises(InputError, match="lost/ckpt/2.pt: no such checkpoint"):
        load_checkpoint("runs/lost")
    for text in ("", "../linked/ckpt/1.pt", str(tmp_path / "runs/named/ckpt/1.pt"), "ckpt/1.pt\nckpt/2.pt",
                 "ckpt/\0.pt"):
        (tmp_path / "runs/odd/latest.pt").write_text(text)
        with pytest.raises(InputError, match="odd/latest.pt: names '.*expected a file of its folder"):
            load_checkpoint("runs/odd")
        assert str(weights.newest_checkpoint()) == "runs/named/latest.pt"


class Evil:
    """Where this is read as a pickle, it writes a file at `place`."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.system, (f"touch {self.place}",)


def test_bad_checkpoints_are_refused(tmp_path):
    ours(tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"ema": Evil(tmp_path / "owned")}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    for name in ("cut", "empty", "evil", "plain", "other", "missing"):
        with pytest.raises(InputError, match=f"{name}.pt"):
            load_checkpoint(tmp_path / f"{name}.pt")
    assert not (tmp_path / "owned").exists()
    checkpoint = load_checkpoint(tmp_path / "whole.pt")
    checkpoint["ema"]["blocks.0.attn.qkv.weight"] = torch.zeros(3, 3)
    torch.save(checkpoint, tmp_path / "shape.pt")
    with pytest.raises(InputError, match=r"blocks.0.attn.qkv.weight is \(3, 3\)"):
        load_model(tmp_path / "shape.pt")


def test_export_keeps_the_ema(tmp_path, command):
    """Of a run's folder: the EMA, not the model, rounded to bf16, without projector and optimiser."""
    model, meta = ours(tmp_path / "a.pt")
    ema = draw(copy.deepcopy(model), seed=1)
    config = dict(model=model.config, meta=meta, train={})
    runs.save_checkpoint(tmp_path / "run", model, ema, torch.optim.AdamW(model.parameters()), 3, config, {})
    command("weights", "--ckpt", tmp_path / "run", "--export", tmp_path / "small.pt")
    small = load_model(tmp_path / "small.pt")
    assert small.step == 3 and load_checkpoint(tmp_path / "small.pt").keys() == {"ema", "step", "config",
                                                                                "format"}
    found = small.model.state_dict()
    assert found.keys() == weights.without_projector(ema.state_dict()).keys()
    for key, value in load_model(tmp_path / "run").model.state_dict().items():
        assert torch.equal(value, ema.state_dict()[key]), key
        assert torch.allclose(value, found[key], atol=1e-3, rtol=1e-2), key


def test_export_without_middle_heads(tmp_path, command):
    ours(tmp_path / "a.pt", middle_heads=True)
    for name, flags in (("whole", ()), ("less", ("--no-middle-heads",))):
        command("weights", "--ckpt", tmp_path / "a.pt", "--export", tmp_path / f"{name}.pt", *flags)
    whole, less = (load_model(tmp_path / f"{name}.pt").model for name in ("whole", "less"))
    assert whole.middle_heads is not None and less.middle_heads is None
    assert same(whole, less)


def test_export_as_safetensors(tmp_path, command):
    """The same tensors and settings as torch's file has, whatever the name; sampled, and exported again."""
    command("weights", "--ckpt", DEMO / "mmgen.pt", "--export", tmp_path / "a.safetensors")
    a, b = load_checkpoint(tmp_path / "a.safetensors"), load_checkpoint(DEMO / "mmgen.pt")
    assert a.keys() == b.keys() and a["ema"].keys() == b["ema"].keys()
    for key, value in b["ema"].items():
        assert a["ema"][key].dtype == value.dtype and torch.equal(a["ema"][key], value), key
    assert {**a, "ema": 0} == {**b, "ema": 0}
    os.rename(tmp_path / "a.safetensors", tmp_path / "b.ckpt")
    command("weights", "--ckpt", tmp_path / "b.ckpt", "--export", tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "b.ckpt").read_bytes()
    pictures = []
    for name, file in (("b", tmp_path / "b.ckpt"), ("pt", DEMO / "mmgen.pt")):
        command("sample", "--task", "understand", "--ckpt", file, "--sampler", "euler", "--steps", 1, "--out",
                tmp_path / name)
        pictures.append([path.read_bytes() for path in sorted((tmp_path / name / "seg").iterdir())])
    assert pictures[0] == pictures[1] and len(pictures[0]) == 4
    meta = json.loads((tmp_path / "b/meta.json").read_text())
    assert meta["checkpoint_sha256"] == sha256(tmp_path / "b.ckpt")
    with pytest.raises(InputError, match="o.safetensors: MMGen's own code reads torch's files alone"):
        command("weights", "--ckpt", tmp_path / "b.ckpt", "--export-official", tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


def test_bad_safetensors_are_refused(tmp_path):
    model, meta = ours(tmp_path / "a.pt")
    ema = {"w": torch.zeros(4)}
    whole = weights.to_safetensors(model.state_dict(), format=weights.FORMAT, step=3, config={})
    told = {"config": {"model": model.config, "meta": meta, "train": {}}, "format": weights.FORMAT}
    for name, data, words in (
            ("cut", whole[:len(whole) // 2], "not readable .*it may be cut short"),
            ("long", (10 ** 15).to_bytes(8, "little") + whole[8:], "not readable"),
            ("head", whole[:8] + b"{" + b"x" * 200, "not readable"),
            ("plain", save(ema), "format is None; expected a checkpoint"),
            ("text", save(ema, {"checkpoint": "{"}), "not readable"),
            ("deep", save(ema, {"checkpoint": "[" * 100_000}), "not readable"),
            ("list", save(ema, {"checkpoint": "[1]"}), "in its metadata is no JSON object"),
            ("config", whole, "config model is missing or wrong"),
            ("step", weights.to_safetensors(ema, **told, step="3"), "step is missing or wrong"),
            ("model", weights.to_safetensors(ema, **told, step=3, model=[1]), "model is missing or wrong"),
            ("none", weights.to_safetensors({}, **told, step=3), "ema is missing or wrong")):
        (tmp_path / f"{name}.safetensors").write_bytes(data)
        with pytest.raises(InputError, match=f"{name}.safetensors: .*{words}"):
            load_checkpoint(tmp_path / f"{name}.safetensors")
    (tmp_path / "keys.safetensors").write_bytes(weights.to_safetensors(ema, **told, step=3))
    with pytest.raises(InputError, match="keys.safetensors: the weight .* is missing"):
        load_model(tmp_path / "keys.safetensors")


def test_a_pickle_in_checkpoint_form_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (eval, (f"open({str(tmp_path / 'owned')!r}, 'w')",))
    contents = {"dict.pt": {"ema": {"a": torch.zeros(1)}, "args": Evil(), "steps": 1},
                "ns.pt": {"args": argparse.Namespace(x=Evil())}}
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(InputError, match="refused"):
            load_checkpoint(tmp_path / name)
    with open(tmp_path / "plain.pt", "wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(InputError):
        load_checkpoint(tmp_path / "plain.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content, words", (
    ({"ema": {"w": torch.zeros(1)}}, "expected a checkpoint"), ([1], "holds a list"),
    ({"ema": 3}, "expected a checkpoint")))
def test_foreign_files_are_named(content, words, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=words) as error:
        load_checkpoint(tmp_path / "x.pt")
    assert "x.pt" in str(error.value)


def test_init_of_another_size_says_so(tmp_path):
    _, meta = ours(tmp_path / "a.pt")
    model = build_model("S/2", num_classes=3, latent_size=16)
    with pytest.raises(InputError, match=f"pass --model {SMALL}"):
        other = {**meta, "class_names": list("abc")}
        transfer.init_from(model, other, load_checkpoint(tmp_path / "a.pt"), "a.pt")
    with pytest.raises(InputError, match="the form is hf:OWNER/REPOSITORY/FILE"):
        load_checkpoint("hf:foo")


def test_a_hub_name_that_cannot_be_had(monkeypatch):
    import huggingface_hub

    def unreachable(*args):
        raise OSError("offline")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(InputError, match="download 0600000.pt from jiepengwang/MMGen"):
        load_checkpoint("hf:jiepengwang/MMGen/0600000.pt")


def test_loading_maps_the_file(monkeypatch):
    """What is not asked for, most of all the optimiser's state, stays on the disk."""
    maps, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **more: maps.append(more.get("mmap")) or load(*a, **more))
    load_model(DEMO / "mmgen.pt")
    assert maps == [True]
