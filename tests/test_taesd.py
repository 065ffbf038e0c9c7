"""TAESD against a computation of its own, its files, and where it may stand in for another autoencoder."""
import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import dataset
import vae
from conftest import ROOT
from distributed import InputError
from modalities import MODALITIES
from test_weights import official
from toy_scenes import render

CPU = torch.device("cpu")
PLACES = [folder / "shared" / "real" for folder in ROOT.parents]  # not part of the repository
REAL = next((place for place in PLACES if place.is_dir()), PLACES[0])
ENCODER, DECODER = "taesd_encoder.safetensors", "taesd_decoder.safetensors"
SMALL_SD = dict(channels=(8, 8, 8, 8), layers=1, groups=4, latent_channels=4, scale=0.18215)


def state_of(joints, resamplers, blocks):
    """Weights as released: {index: (out, in)} with a bias, without one, and blocks of three convolutions."""
    drawn = {}
    for i, (outer, inner) in joints.items():
        drawn |= {f"{i}.weight": torch.randn(outer, inner, 3, 3) / (9 * inner) ** 0.5,
                  f"{i}.bias": torch.randn(outer) / 10}
    for i in resamplers:
        drawn[f"{i}.weight"] = torch.randn(64, 64, 3, 3) / 24
    for i in blocks:
        for j in (0, 2, 4):
            drawn |= {f"{i}.conv.{j}.weight": torch.randn(64, 64, 3, 3) / 48,
                      f"{i}.conv.{j}.bias": torch.randn(64) / 10}
    return {key: value.bfloat16() for key, value in drawn.items()}


def write(folder, seed=0):
    """A folder with TAESD's two files, of drawn weights -> itself."""
    torch.manual_seed(seed)
    folder.mkdir()
    save_file(state_of({0: (64, 3), 14: (4, 64)}, (2, 6, 10), (1, 3, 4, 5, 7, 8, 9, 11, 12, 13)),
              folder / ENCODER)
    save_file(state_of({1: (64, 4), 19: (3, 64)}, (7, 12, 17), (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)),
              folder / DECODER)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("taesd") / "weights")


def layers(file, x, count):
    """The layers 0 to count - 1 of a file; without a bias they halve (encoder) or double (decoder) first."""
    s, doubles = {key: value.float() for key, value in load_file(file).items()}, file.name == DECODER
    for i in range(count):
        if f"{i}.conv.0.weight" in s:
            h = x
            for j in (0, 2, 4):
                h = F.conv2d(h.relu() if j else h, s[f"{i}.conv.{j}.weight"], s[f"{i}.conv.{j}.bias"],
                             padding=1)
            x = (h + x).relu()
        elif f"{i}.bias" in s:
            x = F.conv2d(x, s[f"{i}.weight"], s[f"{i}.bias"], padding=1)
            x = x.relu() if doubles and i == 1 else x
        elif f"{i}.weight" in s and doubles:
            x = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), s[f"{i}.weight"], padding=1)
        elif f"{i}.weight" in s:
            x = F.conv2d(x, s[f"{i}.weight"], stride=2, padding=1)
    return x


@torch.inference_mode()
def check_against_layers(folder, pixels):
    """-> the round trip's pixels."""
    encoder = vae.load_encoder(folder, CPU)
    z = layers(folder / ENCODER, (pixels + 1) / 2, 15)
    y = (layers(folder / DECODER, 3 * torch.tanh(z / 3), 20) * 2 - 1).clamp(-1, 1)
    assert z.std() > 0.01 and y.std() > 0.01
    assert z.shape[1:] == (4, pixels.shape[2] // 8, pixels.shape[3] // 8)
    assert (encoder.encode(pixels) - z).abs().max() < 1e-5 * max(1, z.abs().max())
    assert (encoder.decode(z) - y).abs().max() < 1e-5
    assert (encoder.round_trip(pixels) - y).abs().max() < 1e-4
    assert (encoder.decode(z, "bf16") - y).abs().mean() < 0.02
    return y


def scene_pixels():
    return torch.from_numpy(MODALITIES["rgb"].to_pixels(render(0).rgb))[None]


def test_drawn_weights_give_what_their_layers_say(folder):
    check_against_layers(folder, scene_pixels()[..., :48])


@pytest.mark.skipif(not (REAL / "taesd").is_dir(), reason="the published weights are not here")
def test_the_published_weights_reconstruct_a_photo():
    photo = MODALITIES["rgb"].open(REAL / "livingroom/color/00000.jpg").values
    pixels = torch.from_numpy(MODALITIES["rgb"].to_pixels(np.asarray(photo)))[None, ..., :128, :128]
    y = check_against_layers(REAL / "taesd", pixels)
    error = ((y - pixels) / 2).square().mean()
    assert -10 * error.log10() > 22  # taken for pixels in [-1, 1] it is below 20
    assert 0.4 < vae.load_encoder(REAL / "taesd", CPU).encode(pixels).std() < 1.2


def test_there_is_no_posterior(folder):
    """A cache's draw is the mean, and encoding takes nothing from the noise of a sample."""
    encoder, pixels = vae.load_encoder(str(folder), CPU), scene_pixels()
    assert (encoder.name, encoder.factor, encoder.channels, encoder.scale) == (str(folder), 8, 4, 1.0)
    stored, mean = encoder.store(pixels), encoder.encode(pixels)
    assert stored.dtype == np.float16 and stored.shape == (1, 2, 4, 8, 8) and (stored[:, 1] == -15).all()
    drawn = vae.latents(torch.from_numpy(stored), torch.randn(1, 4, 8, 8), dict(scale=1.0))
    assert (drawn - torch.from_numpy(stored[:, 0]).float()).abs().max() < 2e-6
    assert torch.equal(encoder.encode(pixels, lambda shape: pytest.fail("noise was drawn")), mean)
    assert np.array_equal(stored[:, 0], mean.half().numpy())
    each = [hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in (ENCODER, DECODER)]
    assert encoder.sha256 == hashlib.sha256("".join(each).encode()).hexdigest()


def test_odd_files_are_named(tmp_path, monkeypatch):
    def refuses(message):
        with pytest.raises(InputError, match=message) as refused:
            vae.load_encoder(odd, CPU)
        assert "\n" not in str(refused.value)

    odd = write(tmp_path / "odd")
    whole = (odd / ENCODER).read_bytes()
    (odd / ENCODER).write_bytes(whole[:-1000])
    refuses(f"{ENCODER}: not readable .*; download {ENCODER} of madebyollin/taesd again")
    (odd / ENCODER).write_bytes((odd / DECODER).read_bytes())
    refuses(f"{ENCODER}: is TAESD's decoder, expected its encoder; exchange")
    (odd / ENCODER).write_bytes(whole)
    state = load_file(odd / DECODER)
    save_file({**state, "1.weight": torch.zeros(64, 16, 3, 3)}, odd / DECODER)
    refuses(rf"{DECODER}: shape of 1.weight is \[64, 16, 3, 3\], expected \[64, 4, 3, 3\]")
    save_file({**state, "20.weight": torch.zeros(1)}, odd / DECODER)
    refuses(rf"{DECODER}: shape of 20.weight is \[1\], expected none")
    del state["19.bias"]
    save_file(state, odd / DECODER)
    refuses(rf"{DECODER}: shape of 19.bias is none, expected \[3\]")
    (odd / DECODER).unlink()
    refuses(f"has no {DECODER}; a folder must hold TAESD's {ENCODER} and {DECODER}")

    def unreachable(*place):
        raise ConnectionError("no network")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(InputError, match="--vae taesd: .*no network.*madebyollin/taesd.*--vae FOLDER"):
        vae.load_encoder("taesd", CPU)


# ------------------------------------------------------------------------------------------------
# In another's place.

def sd_file(path, seed=0):
    """A small autoencoder in the format of SD's file -> path."""
    torch.manual_seed(seed)
    path.parent.mkdir(exist_ok=True)
    save_file(vae.AutoencoderKL(**SMALL_SD).state_dict(), path)
    return path


def meta_of(encoder, **more):
    return dict(vae=encoder.name, vae_sha256=encoder.sha256, scale=encoder.scale, **more)


def test_encoders_of_one_space_stand_in_for_each_other(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vae, "SD_CONFIG", SMALL_SD)
    a, b = (vae.load_encoder(sd_file(tmp_path / f"{seed}.safetensors", seed), CPU) for seed in (1, 2))
    tiny, toy = vae.load_encoder(folder, CPU), vae.load_encoder("toy", CPU)
    assert a.space == b.space == tiny.space == "sd"
    assert len({"sd", toy.space, vae.load_encoder("none", CPU).space}) == 3
    z = torch.randn(1, 4, 4, 4)
    released = dict(vae="sd-mse", vae_sha256=None, scale=0.18215)
    of_file, of_tiny = meta_of(a, space="sd"), meta_of(tiny, space="sd")
    older = {**meta_of(a), "vae": "sd-ema"}  # of a cache that does not say its space
    for meta, name in ((released, folder), (of_file, folder), (older, folder), (of_file, b.name),
                       (of_tiny, a.name), ({**meta_of(tiny), "vae": "taesd"}, b.name)):
        capsys.readouterr()
        encoder, own = vae.encoder_of(meta, CPU, name), vae.load_encoder(name, CPU)
        said = capsys.readouterr().out
        assert said.startswith(f"decoded by {name} in the place of {meta['vae']}, ")
        assert said.count("\n") == 1
        scale = 1.0 if own.name == str(folder) else 0.18215
        with torch.inference_mode():
            assert torch.allclose(encoder.decode(z), own.vae.decode(z / scale).clamp(-1, 1), atol=1e-6)
        assert vae.signature_of(encoder, meta) == dict(vae=str(name), vae_sha256=own.sha256)
    for meta, name in ((of_file, a.name), (released, a.name), (of_tiny, folder), (of_tiny, None)):
        encoder = vae.encoder_of(meta, CPU, name)
        assert vae.signature_of(encoder, meta) == dict(vae=meta["vae"], vae_sha256=meta["vae_sha256"])
    assert capsys.readouterr().out == ""


def test_encoders_of_other_spaces_do_not(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "SD_CONFIG", SMALL_SD)
    path = sd_file(tmp_path / "xl/other.safetensors")
    (tmp_path / "xl/config.json").write_text(json.dumps({"scaling_factor": 0.13025}))
    other, toy = vae.load_encoder(path, CPU), vae.load_encoder("toy", CPU)
    tiny, file = vae.load_encoder(folder, CPU), sd_file(tmp_path / "a.safetensors", 1)
    of_sd = meta_of(vae.load_encoder(file, CPU), space="sd")
    for meta, name in ((meta_of(other, space=other.space), folder), (of_sd, path), (of_sd, "toy"),
                       (of_sd, "none"), (meta_of(toy), folder), (meta_of(other), file),
                       (meta_of(vae.Pixels()), folder)):
        with pytest.raises(InputError, match="not the VAE of the training cache"):
            vae.encoder_of(meta, CPU, name)
    moved = {**meta_of(tiny, space="sd"), "vae": str(file)}  # nobody asked for what now lies there
    with pytest.raises(InputError, match="not the VAE of the training cache"):
        vae.encoder_of(moved, CPU)


def test_a_cache_keeps_to_one_autoencoder(folder, tmp_path, monkeypatch, command):
    monkeypatch.setattr(vae, "SD_CONFIG", SMALL_SD)
    flags = ("--toy", 2, "--size", 32, "--no-dino", "--out", tmp_path / "cache")
    with pytest.raises(InputError, match="--size 24: must be a multiple of 16"):
        command("prep_latents", *flags, "--vae", folder, "--size", 24)
    command("prep_latents", *flags, "--vae", folder)
    file = tmp_path / "cache/meta.json"
    meta, encoder = json.loads(file.read_text()), vae.load_encoder(folder, CPU)
    assert meta["space"] == "sd" and meta["scale"] == 1 and meta["latent_size"] == [4, 4]
    assert meta["vae_sha256"] == encoder.sha256
    pixels = torch.from_numpy(MODALITIES["rgb"].to_pixels(render(1, 32).rgb))[None]
    assert np.abs(dataset.Cache(tmp_path / "cache").array("rgb")[1, 0] - encoder.encode(pixels)[0].numpy()
                  ).max() < 1e-2
    for name in (write(tmp_path / "another", 1), sd_file(tmp_path / "sd.safetensors")):
        with pytest.raises(InputError, match="meta.json: vae is .*; use another --out"):
            command("prep_latents", *flags, "--vae", name)
    del meta["space"]
    file.write_text(json.dumps(meta))  # an older cache
    assert "2 of 2 rows re-encoded" in command("prep_latents", *flags, "--vae", folder, "--verify")


def test_a_released_checkpoint_is_sampled_with_it(folder, tmp_path, command):
    official(tmp_path / "0600000.pt")
    flags = ("--task", "generate", "--ckpt", tmp_path / "0600000.pt", "--class-id", 3, "--num", 1,
             "--sampler", "euler", "--steps", 1, "--out", tmp_path / "out", "--vae")
    out = command("sample", *flags, folder)
    assert f"decoded by {folder} in the place of sd-mse" in out
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["complete"] and meta["vae"] == str(folder)
    assert meta["vae_sha256"] == vae.load_encoder(folder, CPU).sha256
    (picture,) = (tmp_path / "out/rgb").glob("*.png")
    assert MODALITIES["rgb"].open(picture).size == (128, 128)
    with pytest.raises(InputError, match="holds samples of another command .vae"):
        command("sample", *flags, write(tmp_path / "another", 1))
