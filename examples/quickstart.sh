#!/usr/bin/env bash
# From nothing to a trained model: environment, text, tokens, training, resuming, sampling, pictures.
#   bash examples/quickstart.sh [--system-mpi]
# With --system-mpi the mpirun on PATH and its library take the place of the MPICH wheel.
# Everything goes into .venv-quickstart/ and quickstart/; a run that is there already is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."
wheel=mpich==5.0.2
[ "${1:-}" != --system-mpi ] || wheel=
python=$PWD/.venv-quickstart/bin/python
out=quickstart
run=$out/run

say() { printf '\n== %s\n' "$*"; }

say "environment"
bash examples/environment.sh .venv-quickstart examples/requirements.txt $wheel

say "text: the source of Python's standard library"
"$python" examples/stdlib_text.py $out

say "tokens: a vocabulary learned from the training files alone"
"$python" -m mpillm data @$out/train.txt --validation @$out/validation.txt -o $out/tokens.h5 \
    --tokenizer bpe --vocab-size 2048

say "training: the first 100 steps"
rm -rf $run
bash examples/train.sh examples/quickstart.toml \
    --train.steps 100 --train.lr_schedule constant --train.eval_every 0

say "training: resumed from the checkpoint of step 100"
bash examples/train.sh examples/quickstart.toml

say "what the model writes"
"$python" -m mpillm generate $run --prompt "def " --tokens 200 --temperature 0.8 --seed 1

say "pictures"
"$python" -m mpillm report $run

say "how well it predicts files it has never seen"
"$python" examples/stdlib_text.py $out $run/metrics.jsonl "gzip -9, per file"

say "done in $((SECONDS / 60)) min $((SECONDS % 60)) s; $PWD/$run holds"
cat <<END
config.toml      the configuration as it ran, from examples/quickstart.toml
metrics.jsonl    loss and speed of every step
checkpoints/     weights and optimiser state, HDF5
figures/         the loss curve and the pipeline timeline, PNG
trace/           what each rank did when
END
