#!/bin/sh
# With the bundled autoencoder, from nothing in ten minutes on two CPU cores: render and encode, train,
# evaluate, draw.
set -e
cd "$(dirname "$0")/.."
OUT=${OUT:-results} RUN=${RUN:-runs/ten} DATA=${DATA:-data/ten}
SCENES=${SCENES:-5000} STEPS=${STEPS:-1100} TOY=${TOY:-128}
begin=$(date +%s)
lap() {  # what is done
    seconds=$(($(date +%s) - begin))
    laps="$laps${laps:+, }\"$1\": $seconds"
    echo "$1 after $seconds s"
}
python prep_latents.py --toy "$SCENES" --out "$DATA" --no-dino --batch-size 64
lap encoded
python train.py --data "$DATA" --run "$RUN" --mix photo --recipe better --steps "$STEPS" \
    --decay-from $((STEPS * 3 / 5)) --decay-to "$STEPS" --model T/2 --equal-weights --repa-weight 0 --lr 1e-3 \
    --batch-size 32 --precision fp32 ${COMPILE---compile}
lap trained
python eval_depth.py --toy "$TOY" --ckpt "$RUN" --sampler euler --steps 2 --batch-size 64 \
    --out "$RUN/evaluation" --json "$OUT/ten_minutes.json"
lap evaluated
python sample.py --task generate --classes balanced --num 12 --cfg 2 --fast --ckpt "$RUN" --out "$RUN/samples"
lap "12 scenes drawn"
echo "{\"laps\": {$laps}, \"cores\": $(nproc)}" > "$OUT/ten_minutes_clock.json"
