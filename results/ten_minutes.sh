#!/bin/sh
# With the bundled autoencoder, from nothing in ten minutes on two CPU cores: render and encode, train, evaluate, draw.
set -e
cd "$(dirname "$0")/.."
begin=$(date +%s)
lap() {  # what is done
    laps="$laps${laps:+, }\"$1\": $(($(date +%s) - begin))"
    echo "$1 after $(($(date +%s) - begin)) s"
}
python prep_latents.py --toy 5000 --out data/ten --no-dino --batch-size 64
lap encoded
python train.py --data data/ten --run runs/ten --mix photo --steps 2100 --model T/2 --equal-weights --repa-weight 0 --lr 1e-3 --batch-size 32 --compile
lap trained
python eval_depth.py --toy 128 --ckpt runs/ten --sampler euler --steps 2 --batch-size 64 --out runs/ten/evaluation --json results/ten_minutes.json
lap evaluated
python sample.py --task generate --classes balanced --num 12 --cfg 2 --fast --ckpt runs/ten --out runs/ten/samples
lap "12 scenes drawn"
echo "{\"laps\": {$laps}, \"cores\": $(nproc)}" > results/ten_minutes_clock.json
