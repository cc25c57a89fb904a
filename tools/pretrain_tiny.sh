#!/usr/bin/env bash
# Makes spatialvlm/testing/assets/pretrained_qwen3vl.safetensors: a small Qwen3-VL that sees rendered rooms, so that the
# demo starts like a user, from a pretrained model. About an hour on two CPU cores; needed only when the tokenizer,
# the renderer or the model change. Rooms are of the training grammar; no relation, distance, count or order is asked.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=cpu
DATA=data/pretrain
RUNS=runs/pretrain
rooms() { python tools/render_rooms.py --preset small --split train --frames 8 --size 128 --workers 2 --out "$DATA/rooms/$1" --num "$2" --seed "$3"; }
ask() { # OUT ROOMS SEED TASKS: short questions that name objects by colour and kind
    printf 'wording: {paraphrases: 1, hints: false, colours: true, marks: 0.0}\ntasks: {%s}\n' "$4" > "$DATA/$1.yaml"
    python tools/synthesize.py --workers 2 --scenes "$DATA/rooms/$2" --out "$DATA/qa/$1" --tasks "$DATA/$1.yaml" --seed "$3"
}
train() { accelerate launch --config_file configs/accelerate/cpu2_ddp.yaml recipes/stage1.py "configs/tiny/pretrain$1_qwen3vl.yaml" "run.dir=$RUNS/$1" "${@:2}"; }

rooms first 400 0
rooms many 2000 77
ask first first 0 'cell_map: {count: 8, variants: [colour]}'
ask mixed many 1 'cell_map: {count: 8, variants: [colour]}, locate_cell: {count: 48, variants: [letter]}, object_colour: {count: 16, forms: [OE]}'
ask colours many 1 'cell_map: {count: 8, variants: [colour]}'
ask labels many 1 'cell_map: {count: 8, variants: [label]}'
ask colour_cells many 1 'cell_map: {count: 8, variants: [colour_cells]}'
ask label_cells many 1 'cell_map: {count: 8, variants: [label_cells]}'
ask single many 1 'locate_cell: {count: 48, variants: [letter]}, object_colour: {count: 16, forms: [OE]}'
python tools/make_tiny.py $DATA/models --size demo --family qwen3vl --seed 0

train 1 model.init_from=$DATA/models/tiny_qwen3vl
train 2 model.init_from=$RUNS/1/final
python tools/export.py $RUNS/2/checkpoints/step-00001907 $RUNS/2/model
train 3 model.init_from=$RUNS/2/model
python - "$RUNS/3/final" <<'PYTHON'
import sys
from pathlib import Path

from spatialvlm.testing.checkpoints import ship_pretrained

print(ship_pretrained(Path(sys.argv[1])))
PYTHON
