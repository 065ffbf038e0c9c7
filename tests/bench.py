"""Benchmarks, not tests: what things cost on this machine, without data.

    python tests/bench.py --what fusion --model XL/2 --latent-size 32 --flops      # FLOPs alone, no memory needed
    python tests/bench.py --what fusion --model S/2 --latent-size 16 --batch-size 16 --json fusion.json
    python tests/bench.py --what evaluate --json evaluate.json                     # FID, precision and recall of 50,000 features
"""
import argparse
import json
import pathlib
import resource
import statistics
import sys
import time

import torch
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import eval_fid  # noqa: E402
from distributed import run, setup, whole_file  # noqa: E402
from model import FUSIONS, build_model, training_flops  # noqa: E402


def inputs(model, batch_size, device):
    M, C, (H, W) = len(model.modalities), model.latent_channels, model.latent_size
    given = torch.zeros(batch_size, M, dtype=torch.bool, device=device)
    return (torch.randn(batch_size, M * C, H, W, device=device), torch.rand(batch_size, M, device=device),
            torch.zeros(batch_size, dtype=torch.long, device=device), given)


def step(model, batch, precision, device):
    """One forward and backward pass, finished on the device."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        v, z = model(*batch)
    (v.float().square().mean() + z.float().mean()).backward()
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()


def fusion(args, device):
    """The cost of four modalities, fused or as a sequence, beside RGB alone: FLOPs, and time by turns in one run."""
    rows = {"rgb only": dict(modalities=("rgb",)), **{name: dict(fusion=name) for name in FUSIONS}}
    common = dict(name=args.model, latent_size=args.latent_size)
    result = {name: {"gflops": training_flops(**common, **options) / 1e9} for name, options in rows.items()}
    if not args.flops:
        models = {name: build_model(**common, **options).to(device).train() for name, options in rows.items()}
        batches, times = {name: inputs(model, args.batch_size, device) for name, model in models.items()}, {name: [] for name in rows}
        for round in range(args.rounds + 1):  # the first warms up
            for name, model in models.items():
                start = time.perf_counter()
                step(model, batches[name], args.precision, device)
                times[name] += [time.perf_counter() - start] if round else []
        for name in rows:
            result[name]["ms_per_sample"] = 1e3 * statistics.median(times[name]) / args.batch_size
    for row in result.values():
        row.update({f"{key}_ratio": row[key] / result["linear"][key] for key in ("gflops", "ms_per_sample") if key in row})
    return result


def evaluate(args, device):
    """eval_fid.py's arithmetic on 50,000 synthetic features of 2048 against 10,000."""
    samples, reference = (torch.randn(n, 2048, generator=torch.Generator().manual_seed(n)).abs_().to(device) for n in (50_000, 10_000))

    def moments(features):
        sums = torch.zeros(2049, 2048, dtype=torch.float64, device=device)
        for part in features.split(64):
            eval_fid.add_moments(sums, part)
        return eval_fid.finish_moments(sums, len(features))

    clock = [time.perf_counter()]
    both = [*moments(samples), *moments(reference)]
    clock.append(time.perf_counter())
    eval_fid.frechet(*(m.cpu() for m in both))
    clock.append(time.perf_counter())
    eval_fid.precision_recall(samples, reference)
    clock.append(time.perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform != "darwin" else 1e9)
    return {"seconds": dict(zip(("moments", "frechet", "precision_recall"), (b - a for a, b in zip(clock, clock[1:])))) | {"all": clock[-1] - clock[0]},
            "memory": {"peak_GB": peak}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("fusion", "evaluate"), required=True)
    parser.add_argument("--model", default="S/2")
    parser.add_argument("--latent-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--flops", action="store_true", help="count only")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    _, _, device = setup()
    result = {"fusion": fusion, "evaluate": evaluate}[args.what](args, device)
    for name, row in result.items():
        print(f"{name:10s}" + "".join(f"  {key} {value:.4g}" for key, value in row.items()))
    if args.json:
        recipe = dict(model=args.model, latent_size=args.latent_size, batch_size=args.batch_size, rounds=args.rounds, precision=args.precision,
                      threads=torch.get_num_threads(), torch=torch.__version__, device=str(device))
        with whole_file(args.json) as file:
            file.write(json.dumps({**result, "recipe": recipe}, indent=1).encode())


if __name__ == "__main__":
    run(main)
