#!/usr/bin/env bash
# Make a virtual environment with mpillm in it; one whose requirements have not changed is used again.
#   bash examples/environment.sh DIR REQUIREMENTS [MPI]
# MPI is the wheel that brings mpiexec, such as mpich==5.0.2; without it mpi4py takes the system's MPI.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
directory=$1 requirements=$2 mpi=${3:-}

python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "environment.sh: mpillm needs Python 3.10 or newer, python3 here is $(python3 --version)" >&2
    exit 1
}
wanted=$(python3 --version; echo "$here $mpi"; cat "$here/../setup.py" "$here/requirements.txt" "$requirements")
if [ -e "$directory" ] && [ ! -e "$directory/pyvenv.cfg" ]; then
    echo "environment.sh: $directory exists and is no virtual environment: name another directory" >&2
    exit 1
fi
[ "$wanted" != "$(cat "$directory/made-from" 2>/dev/null)" ] || exit 0

echo "environment.sh: installing into $directory"
python3 -m venv --clear "$directory"
install=("$directory/bin/python" -m pip install -qq --disable-pip-version-check)
"${install[@]}" "$(grep '^torch==' "$here/requirements.txt")"
"${install[@]}" -r "$requirements" ${mpi:+"$mpi"}
"${install[@]}" --no-deps --no-build-isolation --editable "$here/.."
echo "$wanted" > "$directory/made-from"
