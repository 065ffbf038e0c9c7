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

row() {  # name, seed, script, flags
    name=$1_$2 seed=$2 script=$3
    shift 3
    [ ! -f "$OUT/$name.json" ] || return 0
    (
        flock -n 9 || exit 0
        python "$script" --data "$DATA" --run "$RUNS/$name" --seed "$seed" --model T/2 --batch-size 16 \
            --steps "$STEPS" --optimiser muon --lr 1e-3 --decay-from $((STEPS * 3 / 5)) --decay-to "$STEPS" \
            --precision fp32 ${COMPILE---compile} --ckpt-every 100000 --preview-every 100000 "$@"
        python studies/measure_mt.py --ckpt "$RUNS/$name" --num "${NUM:-128}" --generate "${GENERATE:-1024}" \
            --json "$OUT/$name.json"
    ) 9> "$RUNS/$name.lock"
}

ALONE="--x-weight 0 --agg none"
for seed in $SEEDS; do
    # Table 4: all rows of `seen` and `single` see X
    row pair $seed mt_diffusion.py --pair rgb seg
    row seen $seed mt_diffusion.py --pair rgb seg --hidden 0
    row single $seed mt_diffusion.py --pair rgb seg --hidden 0 $ALONE
    # tables 1 to 3: the image and its masked part, or its class, and the single tasks
    row masked $seed mt_diffusion.py --pair masked
    row label $seed mt_diffusion.py --pair label
    row plain $seed mt_diffusion.py --pair masked-u $ALONE
    row conditional $seed mt_diffusion.py --pair label --single 1 $ALONE
done
row masked-u 0 mt_diffusion.py --pair masked-u
row label-e 0 mt_diffusion.py --pair label --head output
row label-alone 0 mt_diffusion.py --pair label --eps-weight 0 --agg none --single 0
row feature 0 mt_diffusion.py --pair feature
