import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import toy_scenes
import toy_vae
import vae
from distributed import InputError
from modalities import MODALITIES


def test_sd_configuration_has_the_released_size_and_names():
    with torch.device("meta"):
        model = vae.AutoencoderKL(**vae.SD_CONFIG)
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert len(shapes) == 248
    for name, shape in {"encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
                        "encoder.down_blocks.2.downsamplers.0.conv.weight": (512, 512, 3, 3),
                        "decoder.up_blocks.0.upsamplers.0.conv.bias": (512,),
                        "decoder.up_blocks.3.resnets.2.conv2.weight": (128, 128, 3, 3),
                        "encoder.mid_block.attentions.0.to_out.0.weight": (512, 512),
                        "decoder.mid_block.attentions.0.group_norm.bias": (512,),
                        "quant_conv.weight": (8, 8, 1, 1),
                        "post_quant_conv.weight": (4, 4, 1, 1)}.items():
        assert shapes[name] == shape


def test_older_attention_names_load(tmp_path, monkeypatch):
    """The released files name the attention query, key, value, proj_attn and carry no configuration."""
    small = dict(channels=(8, 16), layers=1, groups=4, latent_channels=4, scale=0.18215)
    monkeypatch.setattr(vae, "SD_CONFIG", small)
    model = vae.AutoencoderKL(**small)
    renamed = {}
    for key, value in model.state_dict().items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f".{new}." in key:
                key = key.replace(new, old)
                value = value[..., None, None] if value.dim() == 2 else value
        renamed[key] = value.contiguous()
    save_file(renamed, tmp_path / "old.safetensors")
    loaded = vae.load_vae(tmp_path / "old.safetensors")
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(loaded.encode(x)[0], model.encode(x)[0], atol=1e-5)
    assert loaded.scale == 0.18215


SMALL = dict(channels=(8, 16), layers=1, groups=4, latent_channels=4, scale=0.18215)


def foreign(folder, config=None, prefix=""):
    """A file without our metadata in a folder, a diffusers' config.json beside it -> its path."""
    torch.manual_seed(0)
    state = vae.AutoencoderKL(**SMALL).state_dict()
    folder.mkdir(exist_ok=True)
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({prefix + key: value for key, value in state.items()}, path)
    (folder / "config.json").unlink(missing_ok=True)
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text)
    return path


def test_the_scaling_factor_of_a_config_beside_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vae, "SD_CONFIG", SMALL)
    kind = {"_class_name": "AutoencoderKL"}
    for config, scale in ((None, 0.18215), (kind, 0.18215), ({**kind, "scaling_factor": 0.18215}, 0.18215),
                          ({**kind, "scaling_factor": 0.13025, "shift_factor": None}, 0.13025),
                          ({"scaling_factor": 2, "shift_factor": 0}, 2)):
        path = foreign(tmp_path, config)
        assert vae.load_vae(path).scale == scale
        out = capsys.readouterr().out
        assert out == (f"{path}: scaling factor {scale}, of its config.json\n" if scale != 0.18215 else "")
    assert vae.load_encoder(path, torch.device("cpu")).scale == 2
    for config, message in (({**kind, "shift_factor": 0.1159}, "shift_factor is 0.1159"),
                            ({"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny'"),
                            ({"scaling_factor": "x"}, "scaling_factor is 'x', expected a number above 0"),
                            ({"scaling_factor": float("nan")}, "scaling_factor is nan"),
                            ("{", "not readable"), ("[1]", "not readable")):
        with pytest.raises(InputError, match=f"config.json: {message}"):
            vae.load_vae(foreign(tmp_path, config))


def test_wrapped_names_load(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "SD_CONFIG", SMALL)
    plain = vae.load_vae(foreign(tmp_path)).state_dict()
    for prefix in ("module.", "_orig_mod."):
        again = vae.load_vae(foreign(tmp_path, prefix=prefix)).state_dict()
        assert all(torch.equal(plain[key], again[key]) for key in plain)


def test_a_known_autoencoder_has_the_caches_scale_and_an_unknown_one_must(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "SD_CONFIG", SMALL)
    device = torch.device("cpu")
    path = foreign(tmp_path, {"scaling_factor": 0.13025})
    made = vae.load_encoder(path, device)
    known = dict(vae=str(path), vae_sha256=made.sha256, scale=made.scale)
    moved = foreign(tmp_path / "moved")  # the same file, without its config.json
    encoder, x = vae.encoder_of(known, device, moved), torch.randn(1, 3, 16, 16)
    assert encoder.scale == 0.13025 and torch.equal(encoder.encode(x), made.encode(x))
    assert torch.equal(encoder.decode(made.encode(x)), made.decode(made.encode(x)))
    released = dict(vae="sd-mse", vae_sha256=None, scale=0.18215)
    assert vae.encoder_of(released, device, moved).scale == 0.18215
    with pytest.raises(InputError, match="scaling factor is 0.13025, the model was trained with 0.18215"):
        vae.encoder_of(released, device, path)
    with pytest.raises(InputError, match="scale of the training cache: x, expected a number"):
        vae.encoder_of({**known, "scale": "x"}, device)
    pixels = dict(vae="none", vae_sha256=None, scale=1.0)
    assert vae.encoder_of(pixels, device).scale == 1


def test_weights_do_not_follow_their_file(tmp_path):
    """In fp32, too, where they need no conversion: what is mapped changes with the file."""
    state = {key: value.float() for key, value in load_file(vae.find_vae("toy")).items()}
    config = {"config": json.dumps(vae.load_vae("toy").config)}
    save_file(state, tmp_path / "v.safetensors", config)
    loaded = vae.load_vae(tmp_path / "v.safetensors")
    with open(tmp_path / "v.safetensors", "r+b") as file:
        file.write(bytes((tmp_path / "v.safetensors").stat().st_size))
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_the_bundled_vae_reconstructs_every_modality():
    model = vae.load_vae("toy")
    scenes = [toy_scenes.maps(toy_scenes.render(toy_scenes.HELD_OUT + 1000 + i)) for i in range(24)]
    for m in ("rgb", "depth", "normal", "seg"):
        pixels = torch.from_numpy(np.stack([MODALITIES[m].to_pixels(s[m]) for s in scenes]))
        assert toy_vae.psnr(model, pixels) >= 30, m


def test_the_training_writes_a_file_that_loads(command, monkeypatch, tmp_path):
    """Two steps of everything, then two of the decoder alone, which keep the encoder and its scale."""
    monkeypatch.setattr(toy_vae, "JUDGED", 2)
    flags = ("--steps", 2, "--scenes", 4, "--batch-size", 2)
    assert "scale" in command("toy_vae", "--out", tmp_path / "a.safetensors", *flags)
    command("toy_vae", "--init", tmp_path / "a.safetensors", "--out", tmp_path / "b.safetensors", *flags)
    a, b = (vae.load_vae(tmp_path / f"{name}.safetensors") for name in "ab")
    before, after = a.state_dict(), b.state_dict()
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert a.scale == b.scale != 1 and changed == {"decoder", "post_quant_conv"}


def test_encoders_store_what_latents_reads():
    """The rows of a cache, drawn with noise, are what the encoder says at once; pixels stay as they are."""
    pixels = torch.from_numpy(MODALITIES["rgb"].to_pixels(toy_scenes.render(0).rgb))[None]
    for name, size in (("toy", 16), ("none", 64)):
        encoder = vae.load_encoder(name, torch.device("cpu"))
        noise = torch.randn(1, encoder.channels, size, size)
        meta = dict(scale=encoder.scale)
        latents = vae.latents(torch.from_numpy(encoder.store(pixels)), noise, meta)
        assert torch.allclose(latents, encoder.encode(pixels, lambda shape, x=noise: x), atol=1e-2), name
        assert encoder.decode(latents).shape == pixels.shape


def test_bad_flags_are_refused(command, tmp_path):
    for flags in (("--scenes", -1), ("--steps", 0), ("--lr", "nan")):
        with pytest.raises(InputError, match=flags[0]):
            command("toy_vae", "--out", tmp_path / "v.safetensors", *flags)


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"no such thing")
    with pytest.raises(InputError, match="bad.safetensors"):
        vae.load_vae(tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match="no such file"):
        vae.load_vae(tmp_path / "missing.safetensors")
    state = load_file(vae.BUNDLED)
    save_file(state, tmp_path / "wrong.safetensors")  # without its configuration it is taken for the SD VAE
    with pytest.raises(InputError, match="not an SD or toy VAE"):
        vae.load_vae(tmp_path / "wrong.safetensors")
