#!/usr/bin/env bash
# The quickstart's text with a larger model, until it beats xz -9 on the held-out files: first given each file by
# itself, then all of them joined. Prints bits per byte against minutes after every round; takes hours.
#   bash examples/stdlib_long.sh [--section.key VALUE ...]
# Can be stopped and started again. Each round doubles the number of steps, which lifts the learning rate half way
# up its cosine and brings it down again. The arguments change the configuration.
set -euo pipefail
cd "$(dirname "$0")/.."
out=quickstart
run=$out/long
[ -e $out/tokens.h5 ] || { echo "stdlib_long.sh: no $out/tokens.h5: run examples/quickstart.sh first" >&2; exit 1; }

is_below() {  # is_below COMPRESSOR: compare the run so far
    [ -e $run/metrics.jsonl ] || return 1
    local code=0
    .venv-quickstart/bin/python examples/stdlib_text.py $out $run/metrics.jsonl "$1" || code=$?
    case $code in 0) return 0 ;; 3) return 1 ;; *) exit $code ;; esac
}

steps=1000
for target in "xz -9, per file" "xz -9, joined"; do
    until is_below "$target"; do
        printf '\n== not yet below %s: training to step %d\n' "$target" $steps
        bash examples/train.sh examples/quickstart.toml --train.run_dir $run --train.steps $steps \
            --train.trace false --train.eval_every 500 --train.checkpoint_every 500 \
            --model.hidden_size 256 --model.ffn_size 688 --model.num_layers 8 --model.num_heads 8 \
            --train.seq_len 512 --train.lr 1.5e-3 "$@"
        steps=$((steps * 2))
    done
    printf '\n== below %s\n' "$target"
done
