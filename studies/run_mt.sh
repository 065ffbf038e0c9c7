#!/bin/sh
# MT-Diffusion's tables in miniature, every row at equal steps.
#     python prep_latents.py --toy 6000 --batch-size 64 --no-dino --feature toy-teacher --out data/mt
#     sh studies/run_mt.sh
# Finished runs are not repeated; several copies of this script share the runs out. The figures land in
# results/mt/.
set -e
cd "$(dirname "$0")/.."
DATA=${DATA:-data/mt} RUNS=${RUNS:-runs/mt-study} OUT=${OUT:-results/mt} STEPS=${STEPS:-1500} SEEDS=${SEEDS:-0 1 2}
mkdir -p "$RUNS" "$OUT"

row() {  # name, seed, steps, flags
    name=$1_$2 seed=$2 steps=$3
    shift 3
    [ ! -f "$OUT/$name.json" ] || return 0
    (
        flock -n 9 || exit 0
        python mt_diffusion.py --data "$DATA" --run "$RUNS/$name" --seed "$seed" --model T/2 --batch-size 16 \
            --steps "$steps" --optimiser muon --lr 1e-3 --decay-from $((steps * 3 / 5)) --decay-to "$steps" \
            --precision fp32 ${COMPILE---compile} --ckpt-every 100000 --preview-every 100000 "$@"
        python studies/measure_mt.py --ckpt "$RUNS/$name" --num "${NUM:-128}" --generate "${GENERATE:-1024}" \
            --json "$OUT/$name.json"
    ) 9> "$RUNS/$name.lock"
}

more() {  # name, seed, the run that it goes on from, flags: a third of the steps
    name=$1 seed=$2 from=$RUNS/$3_$2
    shift 3
    [ -f "$OUT/${from##*/}.json" ] && [ -f "$from/latest.pt" ] || return 0  # not trained to its end
    row "$name" "$seed" $((STEPS / 3)) --init "$from" "$@"
}

ALONE="--x-weight 0 --agg none"
for seed in $SEEDS; do
    # Table 4: all rows of `seen` and `single` see X
    row pair $seed $STEPS --pair rgb seg
    row seen $seed $STEPS --pair rgb seg --hidden 0
    row single $seed $STEPS --pair rgb seg --hidden 0 $ALONE
    # tables 1 to 3: the image and its masked part, or its class, and the single tasks
    row masked $seed $STEPS --pair masked
    row label $seed $STEPS --pair label
    row plain $seed $STEPS --pair masked-u $ALONE
    row conditional $seed $STEPS --pair label --single 1 $ALONE
    row masked-u $seed $STEPS --pair masked-u
    row label-m $seed $STEPS --pair label --single 0
    row label-e $seed $STEPS --pair label --head output
    row label-alone $seed $STEPS --pair label --head output --eps-weight 0 --agg none --single 0
    row feature $seed $STEPS --pair feature
    # Table 3's fine-tuned row, and the single task continued alike
    more masked-f $seed masked --pair masked --full-mask 1 --hidden 0 --x-weight 0
    more plain-f $seed plain --pair masked-u $ALONE
done
