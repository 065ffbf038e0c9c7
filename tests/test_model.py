import os
import pickle

import numpy as np
import pytest
import torch

from distributed import InputError
from model import MODALITIES, build_model, canny, load_checkpoint, load_model


def random_model(**options):
    torch.manual_seed(0)
    model = build_model("T/2", num_classes=5, latent_size=8, **options)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.04)
    return model.eval()


def inputs(n=3, channels=16, size=(8, 8), M=4):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, *size, generator=g), torch.rand(n, M, generator=g), torch.arange(n), torch.zeros(n, M, dtype=torch.bool)


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        for projector, count in ((True, 694_647_936), (False, 686_516_608)):
            assert sum(p.numel() for p in build_model("XL/2", projector=projector).parameters()) == count


def test_a_fresh_model_outputs_zero():
    model = build_model("T/2", num_classes=5, latent_size=8)
    v, z = model(*inputs())
    assert v.shape == (3, 16, 8, 8) and z.shape == (3, 16, 768) and v.abs().max() == 0


@pytest.mark.parametrize("fusion", ["linear", "mlp", "sequence"])
def test_fusions(fusion):
    model = random_model(fusion=fusion)
    v, z = model(*inputs())
    assert v.shape == (3, 16, 8, 8) and z.shape == (3, 16, 768) and v.std() > 0.01


def test_blocks_compile_whole():
    """As --compile does, without the code generator: no graph breaks, nothing changes, forward and backward."""
    results = []
    for compiled in (False, True):
        model = random_model()
        for block in model.blocks if compiled else ():
            block.compile(fullgraph=True, backend="aot_eager")
        v, z = model(*inputs())
        (v.square().mean() + z.mean()).backward()
        results.append([v, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results))


def test_task_embedding_is_row_0_or_the_sum_of_the_given_rows():
    model = random_model()
    x, t, y, given = inputs()
    table = model.task_embedder.weight
    c = {}
    model.blocks[0].register_forward_hook(lambda m, a, o: c.update(c=a[1]))
    model(x, t, y, given)
    base = c["c"] - table[0]
    given = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    model(x, t, y, given)
    expected = base + torch.stack([table[1], table[2] + table[3], table[0]])
    assert torch.allclose(c["c"], expected, atol=1e-6)


def test_every_modality_has_its_own_time():
    model = random_model()
    x, t, y, given = inputs()
    v = model(x, t, y, given)[0]
    for m in range(4):
        other = t.clone()
        other[:, m] = 1 - other[:, m]
        assert (model(x, other, y, given)[0] - v).abs().max() > 1e-4


def test_rectangular_latents_interpolate_positions():
    model = random_model()
    v, _ = model(*inputs(size=(8, 12)))
    assert v.shape == (3, 16, 8, 12) and torch.isfinite(v).all()


def test_registry_round_trips():
    import numpy as np
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((6, 6, 3)).astype(np.float32)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    disparity = rng.random((6, 6)).astype(np.float32)
    disparity = (disparity - disparity.min()) / np.ptp(disparity)
    colours = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
    for m, row in MODALITIES.items():
        array = {"scalar": disparity, "vector": normal}.get(row.file, colours)
        assert np.allclose(row.from_pixels(row.to_pixels(array)), array, atol=1e-5), m
        assert row.picture(array).dtype == np.uint8 and row.picture(array).shape == (6, 6, 3)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/mmgen_evil",)


def test_bad_checkpoints_are_refused(tmp_path, trained):
    whole = (trained / "latest.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"ema": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    for name in ("cut", "empty", "evil", "plain", "other", "missing"):
        with pytest.raises(InputError, match=f"{name}.pt"):
            load_checkpoint(tmp_path / f"{name}.pt")
    assert not os.path.exists("/tmp/mmgen_evil")
    checkpoint = load_checkpoint(trained / "latest.pt")
    checkpoint["ema"]["blocks.0.attn.qkv.weight"] = torch.zeros(3, 3)
    torch.save(checkpoint, tmp_path / "shape.pt")
    with pytest.raises(InputError, match=r"blocks.0.attn.qkv.weight is \(3, 3\)"):
        load_model(tmp_path / "shape.pt")


def test_export_keeps_the_ema(tmp_path, trained, command):
    command("model", "--ckpt", trained / "latest.pt", "--export", tmp_path / "small.pt")
    a, b = load_model(trained / "latest.pt"), load_model(tmp_path / "small.pt")
    for key, value in a.state_dict().items():
        assert torch.allclose(value, b.state_dict()[key], atol=1e-3, rtol=1e-2), key


def test_canny_finds_a_square():
    image = np.full((40, 40, 3), 60, np.uint8)
    image[10:30, 12:28] = 200
    edges = canny(image)[..., 0] == 255
    rows, columns = np.nonzero(edges)
    assert set(np.unique(rows)) <= set(range(9, 31)) and edges[20, 11:13].any() and edges[20, 27:29].any() and edges[9:11, 20].any()
    assert 60 < edges.sum() < 80 and not canny(np.full((40, 40, 3), 60, np.uint8)).any()  # one pixel wide, nothing on a flat picture
