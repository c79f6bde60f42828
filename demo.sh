#!/usr/bin/env bash
# From captioned pictures to new pictures, on two CPU cores or a GPU: every line is a command you can type.
#
#   ./demo.sh             with scenes drawn here                          -> runs/demo/report.html
#   ./demo.sh DATA        with your own pictures: a folder of images with a .txt beside each,
#                         or WebDataset tars                              -> runs/own/report.html
#
# Started again it goes on where it stopped. `rm -r runs/demo` starts afresh.
set -euo pipefail
DATA=${1:+$(realpath -- "$1")}
cd "$(dirname "$0")"
export PATH="$PWD/.venv/bin:$PATH"

OUT=runs/demo DVAE=dvae_demo DALLE=dalle_demo TAKE=
if [ -n "$DATA" ]; then
    OUT=runs/own DVAE=dvae_own DALLE=dalle_own
    # nothing of yours is left out that can be read: no filter of the paper, any size
    TAKE="--min-words 0 --any-language --keep-boilerplate --max-aspect 0 --upscale"
fi
mkdir -p "$OUT"

# one rank a GPU (1, 2, 4, 8 or 16, which share the batch of 16), or two ranks that share the cores;
# bfloat16 where the hardware multiplies it
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
RANKS=$((GPUS > 0 ? 1 : 0))
while [ $((RANKS * 2)) -le "$GPUS" ] && [ "$RANKS" != 0 ] && [ "$RANKS" -lt 16 ]; do RANKS=$((RANKS * 2)); done
CONFIG=ds_configs/zero3_bf16.json
if [ "$RANKS" = 0 ]; then
    RANKS=2
    export DS_ACCELERATOR=cpu
    grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo || CONFIG=ds_configs/zero3_cpu.json
fi

# run a stage and note its seconds for the report, which adds up those of several starts
stage() {
    local name=$1 start=$SECONDS
    shift
    echo "--- $name: $*" >&2
    "$@"
    echo "$name $((SECONDS - start))" >>"$OUT/seconds.txt"
}
train() { # the deepspeed launcher, on a port that is free
    local port
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} deepspeed --num_accelerators "$RANKS" --master_port "$port" \
        --log_level error --module "$@" --deepspeed_config "$CONFIG"
}

# 1. captioned pictures
if [ -z "$DATA" ]; then
    DATA=$OUT/scenes
    stage scenes python -m data_prep.scenes --count 6000 --out "$DATA" --image-size 64 --two-objects 0.1
    stage scenes python -m data_prep.scenes --count 256 --out "$OUT/held_out" --image-size 64 --hold-out
fi

# 2. checked, counted, packed into Arrow shards
# shellcheck disable=SC2086
stage ingest python -m data_prep.ingest "$DATA" --out "$OUT/pairs" --preset "$DVAE" --val-fraction 0.05 $TAKE

# 3. captions -> byte pairs
stage tokenizer python -m data_prep.train_tokenizer --data "$OUT/pairs" --out "$OUT/tokenizer" --preset "$DALLE"

# 4. stage 1: pictures -> a grid of codes
stage train_dvae train pipeline.train_dvae --preset "$DVAE" --data "$OUT/pairs" --out "$OUT/dvae"

# 5. the frozen dVAE turns all pictures into token shards
stage encode python -m data_prep.encode --data "$OUT/pairs" --dvae "$OUT/dvae" --out "$OUT/tokens"

# 6. stage 2: the transformer, its parameters sharded by ZeRO-3
stage train_dalle train pipeline.train_dalle --preset "$DALLE" --data "$OUT/tokens" \
    --tokenizer "$OUT/tokenizer" --dvae "$OUT/dvae" --out "$OUT/dalle"

# 7. the model that ranks pictures, and new pictures
if [ "$OUT" = runs/demo ]; then
    stage train_clip train pipeline.train_clip --preset clip_demo --data "$OUT/pairs" \
        --tokenizer "$OUT/tokenizer" --out "$OUT/clip"
    # 128 and more captions of (colour, shape) pairs that no training picture shows, and as many seen ones
    awk 1 "$OUT"/held_out/*/*.txt >"$OUT/held_out.txt"
    awk 'NR <= 256' "$OUT"/scenes/*/*.txt >"$OUT/seen.txt"
    LISTS="held_out seen"
else
    python - "$OUT/pairs" >"$OUT/seen.txt" <<'PYTHON'
import sys
from pipeline.data.shards import ShardReader
pairs = ShardReader(sys.argv[1])
for i in range(0, len(pairs), max(1, len(pairs) // 48)):
    sys.stdout.write(pairs[i]["caption"] + "\n")
PYTHON
    LISTS=seen
fi
SAMPLES=() CLIP=()
draw() { # a set of samples by its name, list of captions and settings
    local name=$1 list=$2
    shift 2
    stage "sample $name" python -m pipeline.sample --model "$OUT/dalle" --dvae "$OUT/dvae" \
        --captions "$OUT/$list.txt" --seed 0 --out "$OUT/samples/$name" "$@"
    SAMPLES+=("$name=$OUT/samples/$name")
}
for list in $LISTS; do draw "$list" "$list"; done
if [ "$OUT" = runs/demo ]; then
    # moved further to the caption; the best of eight, as CLIP sees it
    draw held_out_guided held_out --guidance 1.5
    draw held_out_best_of_8 held_out --count 8 --rerank 1 --clip "$OUT/clip"
    CLIP=(--clip "$OUT/clip")
fi

# 8. one page about it all, and what others should know of the model
python -m pipeline.report --dvae "$OUT/dvae" --dalle "$OUT/dalle" --pairs "$OUT/pairs" "${CLIP[@]}" \
    --samples "${SAMPLES[@]}" --seconds "$OUT/seconds.txt" --out "$OUT"
python -m pipeline.card --dvae "$OUT/dvae" --dalle "$OUT/dalle" --pairs "$OUT/pairs" --tokens "$OUT/tokens" \
    "${CLIP[@]}" --report "$OUT/report.json" --out "$OUT/MODEL_CARD.md"
echo "open $OUT/report.html" >&2
