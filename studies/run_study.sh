#!/bin/sh
# The papers in miniature: every row at equal steps, measured as soon as it is trained.
#     python prep_latents.py --toy 6000 --batch-size 64 --out data/study && sh studies/run_study.sh
# Finished runs are not repeated; several copies of this script share the runs out. The figures land in
# results/study/.
set -e
cd "$(dirname "$0")/.."
DATA=${DATA:-data/study} RUNS=${RUNS:-runs/study} OUT=${OUT:-results/study} STEPS=${STEPS:-1500}
TOY=${TOY:-256} GIVEN=${GIVEN:-256} GENERATE=${GENERATE:-1024} SEEDS=${SEEDS:-0 1 2}
# REPA doubles the cost of T/2: a row of its own.
COMMON="--data $DATA --model T/2 --batch-size 16 --recipe better --lr 1e-3 --precision fp32 --repa-weight 0
    ${COMPILE---compile} --ckpt-every 100000 --preview-every 100000"
FEW="--sampler euler --steps 2 --batch-size 64"
mkdir -p "$RUNS" "$OUT"

understand() {  # run, flags: RGB given, no class
    python eval_depth.py --toy "$TOY" --ckpt "$1" $FEW --out "$1/evaluation" --json "$1/understand.json" $2
}

draw() {  # run, tasks: category samples without guidance, as in the paper's Table 4; RGB of a given map
    python studies/measure_demo.py --ckpt "$1" $FEW --create ab2 7 --guidance 1 --tasks $2 \
        --reader demo/mmgen.pt --num "$GIVEN" --generate "$GENERATE" \
        --understood results/demo_understand.json --json "$1/generate.json"
}

row() {  # name, seed, steps, what is measured ("all", or a function and its argument), flags
    name=$1_$2 seed=$2 steps=$3 what=$4
    shift 4
    for found in "$OUT/${name}"_*.json; do
        [ ! -f "$found" ] || return 0
    done
    (
        flock -n 9 || exit 0
        run=$RUNS/$name
        python train.py $COMMON --run "$run" --seed "$seed" --steps "$steps" --decay-from $((steps * 3 / 5)) \
            --decay-to "$steps" "$@"
        if [ "$what" = all ]; then
            understand "$run" ""
            draw "$run" "generation given"
        else
            ${what%% *} "$run" "${what#* }"
        fi
        for part in generate understand; do
            [ ! -f "$run/$part.json" ] || mv "$run/$part.json" "$OUT/${name}_$part.json"
        done
    ) 9> "$RUNS/$name.lock"
}

for seed in $SEEDS; do  # Table 4; then tables 1 to 3: one for all against one each, of equal steps together
    row mmgen $seed $STEPS all
    row gen-only $seed $STEPS all --mix gen-only --no-task-embedding  # it would know the vector of no condition
    row no-aug $seed $STEPS all --mix no-aug
    row no-task-embedding $seed $STEPS all --no-task-embedding
    row rgb-only $seed $STEPS "draw generation" --modalities rgb --mix rgb
    for m in depth normal seg; do
        row $m-to-rgb $seed $((STEPS / 3)) "draw given" --modalities rgb $m --mix ${m}2x
    done
    row all-from-rgb $seed $STEPS "understand --modality depth normal seg" --mix rgb2x
    for m in depth normal seg; do
        row rgb-to-$m $seed $((STEPS / 3)) "understand --modality $m" --modalities rgb $m --mix rgb2x
    done
done
row no-drop 0 $STEPS all --mix no-drop
row independent-t 0 $STEPS all --mix independent-t --no-task-embedding
row equal-weights 0 $STEPS all --equal-weights
row fusion-mlp 0 $STEPS all --fusion mlp
row with-repa 0 $STEPS all --repa-weight 0.5
row fusion-sequence 0 $STEPS all --fusion sequence
