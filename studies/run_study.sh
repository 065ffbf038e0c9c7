#!/bin/sh
# The miniature study: every row with three seeds at equal steps, measured as soon as it is trained.
#     python prep_latents.py --toy 6000 --batch-size 64 --out data/study && sh studies/run_study.sh
# Finished runs are not repeated; several copies of this script share the runs out. The figures land in
# results/study/.
set -e
cd "$(dirname "$0")/.."
DATA=${DATA:-data/study} RUNS=${RUNS:-runs/study} OUT=${OUT:-results/study} STEPS=${STEPS:-2500}
TOY=${TOY:-128} GIVEN=${GIVEN:-64} GENERATE=${GENERATE:-192} SEEDS=${SEEDS:-0 1 2}
# REPA doubles the cost of T/2: a row of its own.
COMMON="--data $DATA --model T/2 --batch-size 16 --lr 5e-4 ${COMPILE---compile} --repa-weight 0"
UNDERSTAND="--sampler euler --steps 2 --batch-size 64 --precision bf16"
mkdir -p "$RUNS" "$OUT"

measure() {  # name, flags: RGB given; then, where all four are generated, category samples and each given
    run=$RUNS/$1
    python eval_depth.py --toy "$TOY" --ckpt "$run" $UNDERSTAND --out "$run/evaluation" \
        --json "$run/understand.json" $2
    [ -n "$2" ] || python studies/measure_demo.py --ckpt "$run" $UNDERSTAND --create euler 25 --guidance 1 \
        --reader demo/mmgen.pt --num "$GIVEN" --generate "$GENERATE" \
        --understood "$run/understand.json" --json "$run/generate.json"
    for part in generate understand; do  # the last one says that the run is done
        [ ! -f "$run/$part.json" ] || mv "$run/$part.json" "$OUT/$1_$part.json"
    done
}

row() {  # name, seed, steps, modality (of single tasks) or "", flags
    name=$1_$2 seed=$2 steps=$3 modality=$4
    shift 4
    [ ! -f "$OUT/${name}_understand.json" ] || return 0
    (
        flock -n 9 || exit 0
        python train.py $COMMON --run "$RUNS/$name" --seed "$seed" --steps "$steps" "$@"
        measure "$name" "${modality:+--modality $modality}"
    ) 9> "$RUNS/$name.lock"
}

for seed in $SEEDS; do  # the paper's Table 4; one model for all against one for each at equal compute
    row mmgen $seed $STEPS ""
    row gen-only $seed $STEPS "" --mix gen-only
    row no-aug $seed $STEPS "" --mix no-aug
    row no-task-embedding $seed $STEPS "" --no-task-embedding
    row all-from-rgb $seed $STEPS "depth normal seg" --mix rgb2x
    for m in depth normal seg; do
        row rgb-to-$m $seed $((STEPS / 3)) $m --modalities rgb $m --mix rgb2x
    done
done
for seed in $SEEDS; do
    row no-drop $seed $STEPS "" --mix no-drop
    row independent-t $seed $STEPS "" --mix independent-t
    row equal-weights $seed $STEPS "" --equal-weights
    row fusion-mlp $seed $STEPS "" --fusion mlp
    row with-repa $seed $STEPS "" --repa-weight 0.5
    row fusion-sequence $seed $STEPS "" --fusion sequence
done
