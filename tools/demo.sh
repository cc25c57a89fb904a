#!/usr/bin/env bash
# Rooms -> stage 1 (SSR-2D) -> stage 2 (SSR-3D) -> held-out evaluation -> one page, on two CPU cores.
# Every step skips what is already there, so an interrupted demo continues.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=cpu
DATA=data/demo
RUNS=runs/demo
TRAIN_ROOMS="${TRAIN_ROOMS:-400}"
VAL_ROOMS="${VAL_ROOMS:-60}"
step() { printf '\n\033[1m[%s] %4d s  %s\033[0m\n' "demo" "$SECONDS" "$1"; }
launch() { accelerate launch --config_file configs/accelerate/cpu2_ddp.yaml "$@"; }

step "Rendering rooms"
python tools/render_rooms.py --preset small --split train --num "$TRAIN_ROOMS" --frames 8 --size 128 --seed 0 --workers 2 --out $DATA/rooms/train
python tools/render_rooms.py --preset small --split val --num "$VAL_ROOMS" --frames 8 --size 128 --seed 0 --workers 2 --out $DATA/rooms/val

step "Asking questions with answers from the exact geometry"
python tools/synthesize.py --tasks configs/synthesis/demo.yaml --scenes $DATA/rooms/train --out $DATA/qa/train --workers 2 --seed 0
python tools/synthesize.py --tasks configs/synthesis/demo.yaml --scenes $DATA/rooms/val --out $DATA/qa/val --workers 2 --seed 0
python tools/verify_qa.py $DATA/qa/val --scenes $DATA/rooms/val

step "General data for the 1:1 mixture, a small pretrained model, a random geometry encoder"
python tools/make_general.py --out $DATA/general --num 6000 --split train --size 128 --seed 0
python tools/make_tiny.py $DATA/models --size demo --seed 0 --pretrained  # all three families; the demo trains Qwen3-VL

step "Stage 1: SSR-2D, spatial and general data 1:1"
launch recipes/stage1.py configs/tiny/stage1_qwen3vl.yaml run.dir=$RUNS/stage1

step "Stage 2: SSR-3D, geometry branch on"
launch recipes/stage2.py configs/tiny/stage2_qwen3vl.yaml run.dir=$RUNS/stage2 model.init_from=$RUNS/stage1/final

step "Evaluation on held-out rooms"
launch recipes/evaluate.py configs/eval/demo.yaml run.dir=$RUNS/eval_stage1 model.init_from=$RUNS/stage1/final
launch recipes/evaluate.py configs/eval/demo.yaml run.dir=$RUNS/eval_stage2 model.init_from=$RUNS/stage2/final
launch recipes/evaluate.py configs/eval/demo.yaml run.dir=$RUNS/eval_blind model.init_from=$RUNS/stage2/final evaluation.media=drop

step "Report"
python -m spatialvlm.evaluation report --runs $RUNS/eval_stage1 $RUNS/eval_stage2 $RUNS/eval_blind --training $RUNS/stage1 $RUNS/stage2 --out $RUNS/report.html
step "Done: open $RUNS/report.html"
