#!/bin/sh
# Real frames: two rooms with depth and normals, driving scenes with labels, and all in one model.
#     REAL=DIR sh studies/run_real.sh        # DIR holds kitchen, livingroom, camvid and taesd
# Each run is scored as soon as it is trained; finished ones are not repeated, several copies of this script
# share them out. The figures land in results/real/.
set -e
cd "$(dirname "$0")/.."
DATA=${DATA:-data/real} RUNS=${RUNS:-runs/real} OUT=${OUT:-results/real} STEPS=${STEPS:-2000}
SEEDS=${SEEDS:-0 1 2}
COMMON="--recipe better --model T/2 --batch-size 16 --precision fp32 ${COMPILE---compile} --repa-weight 0 \
    --lr 1e-3 --decay-from $((STEPS * 3 / 5)) --decay-to $STEPS --ckpt-every 100000 --preview-every 100000"
SCORE="--sampler euler --steps 2 --batch-size 16"
mkdir -p "$DATA" "$RUNS" "$OUT"

rooms() {  # tree, frames of the kitchen, of the living room, every
    python import_frames.py --format generic --color "$REAL/kitchen/color" --depth "$REAL/kitchen/depth" \
        --depth-unit 0.001 --focal 156.3 --scene kitchen --frames "$2" --every "$4" --out "$DATA/$1"
    python import_frames.py --format generic --color "$REAL/livingroom/color" \
        --depth "$REAL/livingroom/depth" --depth-unit 0.001 --focal 140.3 --scene livingroom \
        --frames "$3" --every "$4" --out "$DATA/$1"
}

prepare() {  # cache, tree, flags
    cache=$1 tree=$2
    shift 2
    [ -f "$DATA/$cache/finished" ] || python prep_latents.py --data "$DATA/$tree" --vae "$REAL/taesd" \
        --size 128 --no-dino --no-class --out "$DATA/$cache" "$@"
    touch "$DATA/$cache/finished"
}

(
    flock 9
    rooms rooms-train 0:799 0:169 1
    rooms rooms-test 800:999 170:210 4
    for split in train val test; do
        python import_frames.py --format camvid --root "$REAL/camvid/$split" --scene "$split" \
            --out "$DATA/camvid-$split"
    done
    prepare rooms rooms-train
    prepare rooms-log rooms-train --depth-target log
    prepare rooms-quantile rooms-train --depth-norm quantile
    prepare camvid camvid-train
) 9> "$DATA/lock"
