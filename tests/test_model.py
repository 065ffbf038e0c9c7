"""model.py: the network."""
import json
import re

import pytest
import torch
from conftest import ROOT

from model import build_model, sincos_positions


def random_model(**options):
    torch.manual_seed(0)
    model = build_model("T/2", num_classes=5, latent_size=8, **options)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.04)
    return model.eval()


def inputs(n=3, channels=16, size=(8, 8), M=4):
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(n, channels, *size, generator=g), torch.rand(n, M, generator=g)
    return x, t, torch.arange(n), torch.zeros(n, M, dtype=torch.bool)


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        for projector, count in ((True, 694_647_936), (False, 686_516_608)):
            assert sum(p.numel() for p in build_model("XL/2", projector=projector).parameters()) == count


def test_a_fresh_model_outputs_zero():
    model = build_model("T/2", num_classes=5, latent_size=8)
    v, z = model(*inputs())
    assert v.shape == (3, 16, 8, 8) and z.shape == (3, 16, 768) and v.abs().max() == 0


def test_initial_weights_are_distributed_as_the_released_codes():
    """Standard deviation and largest size of each weight of a fresh B/2 of theirs, as recorded: 0 where it
    starts at zero; a uniform weight ends at 1.73 deviations, a normal one far beyond.
    """
    recorded = json.loads((ROOT / "tests/released_init.json").read_text())
    weights = build_model("B/2").state_dict()
    kinds = {re.sub(r"(blocks|heads)\.\d+\.", r"\1.", name) for name in weights}
    assert kinds == {re.sub(r"(blocks|heads)\.\d+\.", r"\1.", name) for name in recorded}
    for name, (deviation, largest) in recorded.items():
        weight = weights[name]
        assert weight.std(unbiased=False).item() == pytest.approx(deviation, rel=0.04), name
        assert (weight.abs().max() < 2 * weight.std()) == (largest < 2 * deviation), name


def test_a_time_mlp_that_is_not_fused_embeds_to_the_width():
    model = random_model(modalities=["rgb"], fused_time=False, task_embedding=False)
    names = {name: tuple(p.shape) for name, p in model.t_embedder.named_parameters()}
    assert names["mlp.2.weight"] == (192, 192) and not any("fused" in name for name in names)
    x, t, y, given = inputs(channels=4, M=1)
    assert (model(x, t, y, given)[0] - model(x, 1 - t, y, given)[0]).abs().max() > 1e-4


@pytest.mark.parametrize("fusion", ["linear", "mlp", "sequence"])
def test_fusions(fusion):
    model = random_model(fusion=fusion)
    v, z = model(*inputs())
    assert v.shape == (3, 16, 8, 8) and z.shape == (3, 16, 768) and v.std() > 0.01


def test_blocks_compile_whole():
    """As --compile does, without the code generator: no graph breaks, nothing changes, both ways."""
    results = []
    for compiled in (False, True):
        model = random_model()
        for block in model.blocks if compiled else ():
            block.compile(fullgraph=True, backend="aot_eager")
        v, z = model(*inputs())
        (v.square().mean() + z.mean()).backward()
        results.append([v, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results))


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


def test_positions_are_dits():
    """The first half of a row is for the column, the second for the row, each a sine and a cosine part."""
    table = sincos_positions(16, 3, 5).reshape(3, 5, 16)
    omega = 1 / 10000 ** (torch.arange(4, dtype=torch.float64) / 4)
    column = torch.cat([(4 * omega).sin(), (4 * omega).cos()])
    row = torch.cat([(2 * omega).sin(), (2 * omega).cos()])
    assert torch.allclose(table[2, 4], torch.cat([column, row])) and table.dtype == torch.float64


def test_what_cannot_be_built_is_refused():
    with pytest.raises(KeyError):
        build_model("M/2")
    with pytest.raises(KeyError):
        build_model("T/2", fusion="sum")
    with pytest.raises(ValueError, match="latent size 7x8"):
        build_model("T/2", latent_size=(7, 8))
