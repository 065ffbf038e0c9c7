#!/bin/sh
# The search for a recipe that learns more from a step, at equal samples: screening, each candidate alone on
# top of Muon; then the control, the best together and the best less each part, with three seeds.
#     python prep_latents.py --toy 6000 --batch-size 64 --out data/study && sh studies/run_recipes.sh
# Each run is scored at its checkpoints; studies/collect_recipes.py puts the scores together. Finished runs are
# not repeated; several copies of this script share the runs out.
set -e
cd "$(dirname "$0")/.."
DATA=${DATA:-data/study} RUNS=${RUNS:-runs/recipes} OUT=${OUT:-runs/recipes/scores}
SHORT=${SHORT:-1500} LONG=${LONG:-3000}
COMMON="--data $DATA --model T/2 --batch-size 16 --precision fp32 ${COMPILE---compile}"
mkdir -p "$RUNS" "$OUT"

row() {  # name, seed, steps, evaluations, flags
    name=$1_$2 seed=$2 steps=$3 every=$(($3 / $4))
    shift 4
    [ ! -f "$OUT/$name.json" ] || return 0
    (
        flock -n 9 || exit 0
        python train.py $COMMON --run "$RUNS/$name" --seed "$seed" --steps "$steps" \
            --ckpt-every "$every" --preview-every 1000000 "$@"
        python studies/measure_recipe.py --run "$RUNS/$name" --json "$OUT/$name.json"
        rm -r "$RUNS/$name/ckpt" "$RUNS/$name/latest.pt"
    ) 9> "$RUNS/$name.lock"
}

long() {  # name, seed, flags
    name=$1 seed=$2
    shift 2
    row "long-$name" "$seed" "$LONG" 8 --repa-weight 0 --lr 5e-4 "$@"
}

muon() {  # name, flags
    name=$1
    shift
    row "$name" 0 "$SHORT" 4 --optimiser muon --lr 5e-4 "$@"
}

MUON="--optimiser muon" BLOCKS="--blocks modern" EARLY="--times early" MIDDLE="--middle-weight 0.5"
PLAIN="--repa-weight 0" DECAY="--decay-from $((LONG * 3 / 5)) --decay-to $LONG"

# Screening.
SOON="--decay-from $((SHORT * 3 / 5)) --decay-to $SHORT"
for rate in 5e-4 1e-3 2e-4; do
    row control-$rate 0 "$SHORT" 4 $PLAIN --lr $rate
done
muon muon $PLAIN
muon muon-early $PLAIN $EARLY
muon muon-early-given $PLAIN --times early-given
muon muon-lognormal $PLAIN --times lognormal
muon muon-blocks $PLAIN $BLOCKS
muon muon-middle $PLAIN $MIDDLE
muon muon-decay $PLAIN $SOON
muon muon-beta2 $PLAIN --beta2 0.95
muon muon-0.01 $PLAIN --muon-lr 0.01
muon muon-0.04 $PLAIN --muon-lr 0.04
muon muon-lr-1e-3 $PLAIN --lr 1e-3
muon muon-repa
muon muon-repa-until --repa-until $((SHORT * 2 / 5))
muon muon-irepa --projector conv
muon muon-irepa-until --projector conv --repa-until $((SHORT * 2 / 5))

# All that helped together, each part left out, the control; the best is what is left with the control's rate.
EARLIER=$((LONG * 7 / 20)) # 0.35 of the control's samples
for seed in 0 1 2; do
    long control-5e-4 $seed
    long control-1e-3 $seed --lr 1e-3
    long all $seed $MUON $BLOCKS $EARLY $MIDDLE $DECAY
    long less-muon $seed $BLOCKS $EARLY $MIDDLE $DECAY
    long less-blocks $seed $MUON $EARLY $MIDDLE $DECAY
    long less-early $seed $MUON $BLOCKS $MIDDLE $DECAY
    long less-middle $seed $MUON $BLOCKS $EARLY $DECAY
    long less-decay $seed $MUON $BLOCKS $EARLY $MIDDLE
    long all-1e-3 $seed $MUON $BLOCKS $EARLY $MIDDLE $DECAY --lr 1e-3
    long best $seed $MUON $BLOCKS $EARLY $DECAY --lr 1e-3
    row short-best $seed $EARLIER 2 $PLAIN $MUON $BLOCKS $EARLY --lr 1e-3 \
        --decay-from $((EARLIER * 3 / 5)) --decay-to $EARLIER
done
long control-2e-4 0 --lr 2e-4

# With alignment targets on both sides.
row long-control-repa 0 "$LONG" 8 --lr 1e-3
row long-best-irepa 0 "$LONG" 8 $MUON $BLOCKS $EARLY $DECAY --lr 1e-3 --projector conv
