#!/usr/bin/env bash
# Train in the quickstart's environment with one rank a core: two ranks share the model as a pipeline, further pairs
# take further data.
#   bash examples/train.sh CONFIG [--section.key VALUE ...]
set -euo pipefail
bin=$(realpath "$(dirname "$0")/../.venv-quickstart/bin")
mpirun=$bin/mpirun
[ -e "$mpirun" ] || mpirun=mpirun

# The examples' models are too small for more than eight ranks.
ranks=$("$bin/python" -c 'import os; print(min(8, len(os.sched_getaffinity(0))))')
pipeline=1
if [ "$ranks" -gt 1 ]; then
    pipeline=2
    ranks=$((ranks / 2 * 2))
fi
command=("$mpirun" -n $ranks "$bin/python" -m mpillm train "$@" --layout.pipeline $pipeline)
echo "${command[*]}"
exec "${command[@]}"
