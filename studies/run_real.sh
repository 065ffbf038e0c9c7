#!/bin/sh
# Real frames: two rooms with depth and normals, driving scenes with labels, each in a model of its own and
# all three in one.
#     REAL=DIR sh studies/run_real.sh        # DIR has kitchen, livingroom, camvid and taesd
# Finished runs are not repeated; several copies of this script share them out. Scores land in results/real/.
set -e
cd "$(dirname "$0")/.."
DATA=${DATA:-data/real} RUNS=${RUNS:-runs/real} OUT=${OUT:-results/real}
SEEDS=${SEEDS:-0}
mkdir -p "$DATA" "$RUNS" "$OUT"

room() {  # name, focal length, frames of training, of the test
    held="--format generic --color $REAL/$1/color --depth $REAL/$1/depth --depth-unit 0.001 --focal $2"
    python import_frames.py $held --scene "$1" --frames "$3" --out "$DATA/$1-train"
    python import_frames.py $held --scene "$1" --frames "$4" --every 4 --out "$DATA/$1-test"
}

encode() {  # cache, tree, flags
    cache=$1 tree=$2
    shift 2
    python prep_latents.py --data "$DATA/$tree" --vae "$REAL/taesd" --size 128 --no-dino \
        --out "$DATA/$cache" "$@"
}

(
    flock 9
    [ ! -f "$DATA/ready" ] || exit 0
    room kitchen 156.3 0:799 800:999
    room livingroom 140.3 0:169 170:210
    for split in train test; do
        python import_frames.py --format camvid --root "$REAL/camvid/$split" --scene "$split" \
            --out "$DATA/camvid-$split"
    done
    encode c-kitchen kitchen-train --views 4  # once, they are learned by heart
    encode c-livingroom livingroom-train --views 8
    encode c-camvid camvid-train --views 8
    encode c-kitchen-views-quantile kitchen-train --views 4 --depth-norm quantile
    encode c-livingroom-views-quantile livingroom-train --views 8 --depth-norm quantile
    for set in kitchen livingroom camvid; do
        encode "c-$set-once" "$set-train"
    done
    python studies/erase.py --data "$DATA/livingroom-train" --columns 0:64 --out "$DATA/erased-train"
    python studies/erase.py --data "$DATA/livingroom-test" --columns 64:171 --out "$DATA/erased-test"
    encode c-erased erased-train
    encode c-kitchen-log kitchen-train --depth-target log
    encode c-kitchen-quantile kitchen-train --depth-norm quantile
    touch "$DATA/ready"
) 9> "$DATA/lock"

row() {  # script, name, seed, steps, sets to score on, flags
    script=$1 name=$2_$3 seed=$3 steps=$4 sets=$5
    shift 5
    [ ! -f "$OUT/$name.json" ] || return 0
    (
        flock -n 9 || exit 0
        python "$script" --run "$RUNS/$name" --seed "$seed" --steps "$steps" --model T/2 --batch-size 16 \
            --precision fp32 ${COMPILE---compile} --lr 1e-3 --decay-from $((steps * 3 / 5)) \
            --decay-to "$steps" --ckpt-every 100000 --preview-every 100000 "$@"
        python studies/measure_real.py --data "$DATA" --sets $sets --ckpt "$RUNS/$name" \
            --json "$OUT/$name.json"
    ) 9> "$RUNS/$name.lock"
}

ROOMS="$DATA/c-kitchen $DATA/c-livingroom" CAMVID=$DATA/c-camvid KITCHEN=$DATA/c-kitchen
ONCE="$DATA/c-kitchen-once $DATA/c-livingroom-once"
BETTER="--recipe better --repa-weight 0 --mix photo --equal-weights"
PAIR="--pair rgb seg --optimiser muon"
SINGLE="$PAIR --x-weight 0 --agg none --hidden 0"
for seed in $SEEDS; do
    row train.py rooms $seed 2000 "kitchen livingroom" $BETTER --data $ROOMS
    row train.py camvid $seed 1500 camvid $BETTER --data "$CAMVID"
    row train.py all $seed 3500 "kitchen livingroom camvid" $BETTER --data $ROOMS "$CAMVID" \
        --weights 0.4 0.171 0.429
    row mt_diffusion.py mt-camvid $seed 1200 camvid $PAIR --data "$CAMVID"
    row mt_diffusion.py mt-single $seed 1200 camvid $SINGLE --data "$CAMVID"
done
for seed in 0; do  # what led there
    row train.py rooms-long $seed 4000 "kitchen livingroom" $BETTER --data $ROOMS
    row train.py camvid-long $seed 3000 camvid $BETTER --data "$CAMVID"
    row train.py rooms-quantile $seed 2000 "kitchen livingroom" $BETTER \
        --data "$KITCHEN-views-quantile" "$DATA/c-livingroom-views-quantile"
    row train.py rooms-once $seed 2000 "kitchen livingroom" $BETTER --data $ONCE
    row train.py camvid-once $seed 1500 camvid $BETTER --data "$CAMVID-once"
    row train.py all-once $seed 3500 "kitchen livingroom camvid" $BETTER --data $ONCE "$CAMVID-once" \
        --weights 0.471 0.1 0.429
    row mt_diffusion.py mt-camvid-once $seed 1200 camvid $PAIR --data "$CAMVID-once"
    row mt_diffusion.py mt-single-once $seed 1200 camvid $SINGLE --data "$CAMVID-once"
    row train.py kitchen $seed 700 kitchen $BETTER --data "$KITCHEN-once"
    row train.py kitchen-log $seed 700 kitchen $BETTER --data "$KITCHEN-log"
    row train.py kitchen-quantile $seed 700 kitchen $BETTER --data "$KITCHEN-quantile"
    row train.py living $seed 500 "livingroom erased" $BETTER --data "$DATA/c-livingroom-once"
    row train.py erased $seed 500 "livingroom erased" $BETTER --data "$DATA/c-erased"
done
for seed in $SEEDS; do  # pictures drawn from depth, read by the next seed
    reader=$RUNS/rooms_$((seed + 1))
    [ -e "$reader/latest.pt" ] && [ ! -f "$OUT/drawn_$seed.json" ] || continue
    python studies/measure_real.py --data "$DATA" --sets kitchen livingroom --ckpt "$RUNS/rooms_$seed" \
        --reader "$reader" --json "$OUT/drawn_$seed.json"
done
