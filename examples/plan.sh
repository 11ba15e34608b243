#!/usr/bin/env bash
# Probe, plan, run, compare: the quickstart's model on this machine, in the quickstart's environment and with its tokens.
#   bash examples/plan.sh [RANKS]
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/.venv-quickstart/bin ranks=${1:-2} out=quickstart
mpirun=$bin/mpirun
[ -e "$mpirun" ] || mpirun=mpirun
mpillm=("$bin/python" -m mpillm)
run=(examples/quickstart.toml --train.run_dir $out/planned --train.steps 30 --train.eval_every 0
     --layout.pipeline auto --layout.tensor auto --layout.schedule auto)

"$mpirun" -n "$ranks" "${mpillm[@]}" probe -o $out/machine.json
"${mpillm[@]}" plan "${run[@]}" --machine $out/machine.json --ranks "$ranks" -o $out/plan.json --explain
rm -rf $out/planned
"$mpirun" -n "$ranks" "${mpillm[@]}" train "${run[@]}" --plan $out/plan.json
"${mpillm[@]}" report $out/planned
