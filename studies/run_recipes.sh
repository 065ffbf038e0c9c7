#!/bin/sh
# The search for a recipe that learns more from a step: each candidate alone on top of Muon, at equal samples.
#     python prep_latents.py --toy 6000 --batch-size 64 --out data/study && sh studies/run_recipes.sh
# Four evaluations a run, in results/recipes/. Finished runs are not repeated; several copies of this script
# share the runs out.
set -e
cd "$(dirname "$0")/.."
DATA=${DATA:-data/study} RUNS=${RUNS:-runs/recipes} OUT=${OUT:-results/recipes} STEPS=${STEPS:-1500}
COMMON="--data $DATA --model T/2 --batch-size 16 --precision fp32 ${COMPILE---compile}"
DECAY="--decay-from $((STEPS * 4 / 5)) --decay-to $STEPS"
mkdir -p "$RUNS" "$OUT"

row() {  # name, seed, flags
    name=$1_$2 seed=$2
    shift 2
    [ ! -f "$OUT/$name.json" ] || return 0
    (
        flock -n 9 || exit 0
        python train.py $COMMON --run "$RUNS/$name" --seed "$seed" --steps "$STEPS" \
            --ckpt-every $((STEPS / 4)) --preview-every 1000000 "$@"
        python studies/measure_recipe.py --run "$RUNS/$name" --json "$OUT/$name.json"
    ) 9> "$RUNS/$name.lock"
}

PLAIN="--repa-weight 0"
MUON="$PLAIN --optimiser muon --lr 5e-4"
row control-5e-4 0 $PLAIN --lr 5e-4
row muon 0 $MUON
row muon-early 0 $MUON --times early
row muon-blocks 0 $MUON --blocks modern
row control-1e-3 0 $PLAIN --lr 1e-3
row muon-decay 0 $MUON $DECAY
row muon-middle 0 $MUON --middle-weight 0.5
row control-2e-4 0 $PLAIN --lr 2e-4
row muon-early-given 0 $MUON --times early-given
row muon-blocks-early-decay 0 $MUON --blocks modern --times early $DECAY
row muon-lognormal 0 $MUON --times lognormal
row muon-beta2 0 $MUON --beta2 0.95
row muon-repa 0 --optimiser muon --lr 5e-4
row muon-irepa 0 --optimiser muon --lr 5e-4 --projector conv
row muon-irepa-until 0 --optimiser muon --lr 5e-4 --projector conv --repa-until $((STEPS * 2 / 5))
