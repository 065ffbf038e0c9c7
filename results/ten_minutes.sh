#!/bin/sh
# From nothing in ten minutes on two CPU cores: render and encode, train, evaluate, draw.
set -e
cd "$(dirname "$0")/.."
begin=$(date +%s)
lap() { echo "$1: $(($(date +%s) - begin)) s since the start"; }
python prep_latents.py --toy 5000 --out data/ten --no-dino --batch-size 64
lap "rendered and encoded"
python train.py --data data/ten --run runs/ten --mix photo --steps 1800 --model T/2 --equal-weights --repa-weight 0 --lr 1e-3 --batch-size 32 --compile
lap trained
python eval_depth.py --toy 128 --ckpt runs/ten --sampler euler --steps 2 --batch-size 64 --precision bf16 --json results/ten_minutes.json
lap evaluated
python sample.py --task generate --num 8 --cfg 2 --ckpt runs/ten --fast --out samples/ten
echo "{\"seconds\": $(($(date +%s) - begin)), \"cores\": $(nproc)}" > results/ten_minutes_clock.json
lap drawn
