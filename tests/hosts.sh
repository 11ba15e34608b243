#!/usr/bin/env bash
# Two hosts, as network namespaces of this machine: train across them with each MPI, then pull the cable.
#   bash tests/hosts.sh [VENV...]
#   bash tests/hosts.sh --links RANKS RATES [VENV]: with RANKS a host (1 or 2) and a link of each of the RATES ("100mbit
#   1gbit none"), hold the plan against all layouts (tests/tools/layouts.py); under the MPICH wheel, nothing else running.
#   bash tests/hosts.sh --collectives [VENV]: with 2 ranks a host and a link of 1 Gbit/s, hold the two-level allreduce of
#   16 MiB against the library's own, with windows and without; under the MPICH wheel, nothing else running.
# Every VENV has an MPI wheel with its launcher. Skipped, with the reason, without root, ip or namespaces.
set -eu
root=$(realpath "$(dirname "$0")/..")
if [ -z "${MPILLM_HOSTS:-}" ]; then
    skip() { echo "tests/hosts: skipped: $1"; exit 0; }
    [ "$(id -u)" = 0 ] || skip "it needs root, to make network namespaces"
    command -v ip >/dev/null || skip "it needs ip (iproute2), which is not here"
    unshare --mount --net --uts --pid --fork true 2>/dev/null || skip "namespaces cannot be made here"
    MPILLM_HOSTS=1 exec unshare --mount --net --uts --pid --fork --kill-child bash "$0" "${@:-$root/.venv-test-mpich}"
fi
links='' collectives=''
[ "$1" != --links ] || { links=$3 ranks=$2; set -- "${4:-$root/.venv-test-mpich}"; }
[ "$1" != --collectives ] || { collectives=1; set -- "${2:-$root/.venv-test-mpich}"; }

mount --make-rprivate / && mount -t proc proc /proc && mount -t sysfs sysfs /sys && mount -t tmpfs tmpfs /run
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
printf '127.0.0.1 localhost\n10.77.0.1 box\n10.77.0.11 h1\n10.77.0.12 h2\n' >hosts
mount --bind hosts /etc/hosts
mkdir /run/netns
hostname box
ip link set lo up
ip link add br0 type bridge && ip addr add 10.77.0.1/24 dev br0 && ip link set br0 up
for i in 1 2; do
    ip netns add h$i && ip link add v$i type veth peer name eth0 netns h$i
    ip link set v$i master br0 up
    ip -n h$i addr add 10.77.0.1$i/24 dev eth0 && ip -n h$i link set eth0 up && ip -n h$i link set lo up
done
cat >on-host <<'S'
#!/bin/bash
# In place of ssh: leave out its options, go to the host, run the command there.
while [ "${1#-}" != "$1" ]; do shift; done
host=$1 && shift
exec ip netns exec "$host" unshare --uts bash -c 'hostname "$0"; eval "$*"' "$host" "$@"
S
chmod +x on-host
unset PRTE_MCA_rmaps_default_mapping_policy OMPI_MCA_rmaps_base_oversubscribe # which would put both ranks on one host
export PYTHONPATH=$root OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
failures=0
verdict() { if "${@:2}"; then echo "ok    $1"; else echo "FAILS $1"; failures=$((failures + 1)); fi; }

hydra=(-launcher ssh -launcher-exec "$folder/on-host" -iface br0 -genv UCX_TLS tcp,self -genv UCX_NET_DEVICES eth0)

shape() { # RATE: what the link lets through
    for i in 1 2; do
        ip netns exec h$i tc qdisc del dev eth0 root 2>/dev/null || true
        [ "$1" = none ] || ip netns exec h$i tc qdisc add dev eth0 root tbf rate "$1" burst 64kb latency 200ms
    done
}

two_level_wins() { # VENV WINDOWS
    "$1/bin/mpiexec" "${hydra[@]}" -genv MPILLM_SHARED_WINDOWS "$2" -hosts h1:2,h2:2 -n 4 "$1/bin/python" -m mpillm \
        bench collectives --ops allreduce --sizes 16777216 --machine two_level.json --json rows.json || return
    "$1/bin/python" - <<'P'
import json
found = {row["algorithm"]: row["median_s"] for row in json.load(open("rows.json"))["rows"] if row["nodes"] == 2}
raise SystemExit(not found["two_level"] < found["mpi"])
P
}

if [ -n "$collectives" ]; then
    shape 1gbit
    "$1/bin/python" - <<'P'
from dataclasses import replace
from mpillm.machine import PRESETS
table = (("allreduce", "*", "*", None, "two_level"),)
replace(next(iter(PRESETS.values())), num_ranks=4, table=table).save("two_level.json")
P
    verdict "two_level is faster than the library's allreduce of 16 MiB" two_level_wins "$1" 1
    verdict "also with windows switched off" two_level_wins "$1" 0
    exit "$((failures > 0))"
fi

if [ -n "$links" ]; then
    for rate in $links; do
        shape "$rate"
        verdict "the plan for a link of $rate" "$1/bin/mpiexec" "${hydra[@]}" -hosts "h1:$ranks,h2:$ranks" \
            -n $((2 * ranks)) "$1/bin/python" "$root/tests/tools/layouts.py" link "$folder/choices"
    done
    [[ $links != *" "* ]] || verdict "changes with the link" [ "$(sort -u choices | wc -l)" -gt 1 ]
    exit "$((failures > 0))"
fi

noted() { # NAME COMMAND...: run what all else needs; if it fails, say what it printed, and leave with its code
    "${@:2}" >"$1.out" 2>&1 || { local code=$?; tail -n 15 "$1.out"; echo "tests/hosts: $1 failed ($code)"; exit "$code"; }
}

noted tokens "$1/bin/python" -m mpillm data "$root"/mpillm/*.py -o tokens.h5 --validation-fraction 0.2
training=("$root/tests/cluster.toml" --data.path "$folder/tokens.h5" --layout.data 2
    --train.steps 40 --train.numerics exact --train.exact_blocks 4)

across() { # VENV RUN OPTION...: train on a rank a host
    local venv=$1 name=$2
    set -- "$venv/bin/python" -m mpillm train "${training[@]}" --train.run_dir "$folder/$name" "${@:3}"
    if [ -x "$venv/bin/mpiexec.hydra" ]; then
        set -- "${hydra[@]}" -hosts h1:1,h2:1 -n 2 "$@"
    else
        set -- --prtemca plm ssh --prtemca plm_ssh_agent "$folder/on-host" --mca btl tcp,self \
            --mca btl_tcp_if_include 10.77.0.0/24 --prtemca prte_if_include 10.77.0.0/24 -H h1:1,h2:1 -np 2 \
            -x PYTHONPATH -x OMP_NUM_THREADS "$@"
    fi
    timeout --kill-after=5 90 "$venv/bin/mpiexec" "$@" >"$name.out" 2>&1
}

same_weights() { # VENV RUN RUN
    "$1/bin/python" - "$2" "$3" <<'P'
import sys
import numpy as np
from mpillm.checkpoint.reading import Checkpoint
one, other = map(Checkpoint, sys.argv[1:])
raise SystemExit(not all(np.array_equal(one.read(name), other.read(name)) for name in one.names()))
P
}

pull_the_cable() { # VENV RUN: whether all ranks end by themselves once the hosts have lost each other
    across "$1" "$2" --train.steps 1000000 --train.hang_limit_s 15 --train.numerics fast &
    local job=$!
    for _ in $(seq 400); do
        [ "$(cat "$2/metrics.jsonl" 2>/dev/null | wc -l)" -lt 20 ] || break
        sleep 0.1
    done
    ip -n h2 link set eth0 down
    local start=$SECONDS
    while pgrep -f "^$1/bin/python.*$2" >/dev/null && [ $((SECONDS - start)) -lt 40 ]; do sleep 0.5; done
    echo "      no rank is left $((SECONDS - start)) s after the cable was pulled"
    ip -n h2 link set eth0 up # a launcher may wait for a host that is lost for good
    pkill -f "^$1/bin/mpiexec" || true
    wait "$job" || true
    [ $((SECONDS - start)) -lt 40 ] && grep -q "no progress on" "$2.out"
}

noted one "$1/bin/mpiexec" -n 2 "$1/bin/python" -m mpillm train "${training[@]}" --train.run_dir one
for venv in "$@"; do
    name=$(basename "$venv")
    verdict "$name trains across two hosts" across "$venv" "two-$name"
    verdict "with the weights of one host, bit for bit" same_weights "$venv" one "two-$name"
    verdict "and ends when the cable is pulled" pull_the_cable "$venv" "cable-$name"
done
[ "$failures" = 0 ] || tail -n 15 ./*.out
echo "tests/hosts: $failures failures"
exit "$((failures > 0))"
