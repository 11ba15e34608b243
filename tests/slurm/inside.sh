#!/usr/bin/env bash
# Inside the overlay: start Slurm, submit the templates, look at what they did. Called by run.sh, never by itself.
set -eu
root=$1 venv=$2
shift 2
hostname box
ip link set lo up
ip link add br0 type bridge && ip addr add 10.77.0.1/24 dev br0 && ip link set br0 up
printf '127.0.0.1 localhost\n10.77.0.1 box n1 n2\n' >/etc/hosts
mkdir -p /run/munge /run/slurm /var/spool/slurmctld /var/log/slurm /etc/slurm /var/log/munge /var/lib/munge
dd if=/dev/urandom bs=1 count=1024 of=/etc/munge/munge.key 2>/dev/null
chown -R munge: /etc/munge /run/munge /var/log/munge /var/lib/munge
chmod 400 /etc/munge/munge.key && chmod 755 /run/munge
chown -R slurm: /run/slurm /var/spool/slurmctld /var/log/slurm
runuser -u munge -- /usr/sbin/munged
cat >/etc/slurm/slurm.conf <<'C'
ClusterName=box
SlurmctldHost=box
SlurmUser=slurm
AuthType=auth/munge
MpiDefault=pmi2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,requeue_delay=1
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=/var/log/slurm/jobcomp.txt
JobRequeue=1
ReturnToService=2
KillWait=5
StateSaveLocation=/var/spool/slurmctld
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdSpoolDir=/var/spool/slurmd.%n
SlurmdPidFile=/run/slurm/slurmd.%n.pid
SlurmdLogFile=/var/log/slurm/slurmd.%n.log
PropagateResourceLimits=NONE
GresTypes=gpu
NodeName=n1 NodeHostname=box NodeAddr=10.77.0.1 Port=17001 CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:4
NodeName=n2 NodeHostname=box NodeAddr=10.77.0.1 Port=17002 CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:4
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=60 State=UP
C
touch /run/gpu{0..3}
echo 'Name=gpu File=/run/gpu[0-3]' >/etc/slurm/gres.conf
mkdir -p /var/spool/slurmd.n1 /var/spool/slurmd.n2
slurmctld -c -i
for _ in $(seq 60); do scontrol ping 2>/dev/null | grep -q "is UP" && break; sleep 0.5; done
slurmd -N n1
slurmd -N n2
for _ in $(seq 120); do [ "$(sinfo --noheader --Node --states=idle --format %N 2>/dev/null | wc -l)" = 2 ] && break; sleep 0.5; done
sinfo -N || { tail -n 30 /var/log/slurm/*.log; exit 1; }

job=$(mktemp -d) && cd "$job"
export PYTHONPATH=$root VENV=$venv MPILLM_SLURM=$root/slurm MPIR_CVAR_POLLS_BEFORE_YIELD=100
export UCX_TLS=tcp,self,sysv,posix # with all transports a rank's address may be longer than a line of Slurm's pmi2
# Which files are held out follows from their names: named from here they are the same in every clone.
(cd "$root" && exec "$venv/bin/python" -m mpillm data mpillm/*.py -o "$job/tokens.h5" --validation-fraction 0.2 >/dev/null)
cp "$root/tests/cluster.toml" train.toml
failures=0
verdict() { # NAME COMMAND...: whether the command succeeds
    if "${@:2}"; then echo "ok    $1"; else echo "FAILS $1"; failures=$((failures + 1)); fi
}
state() { scontrol show job "$1" 2>/dev/null | sed -n 's/.*JobState=\([A-Z]*\).*/\1/p' | head -n 1; }
waits() { [ "$(squeue --noheader --jobs "$1" --format %t 2>/dev/null)" = PD ]; }
at_once() { # JOB: Slurm lets a requeued job wait two minutes; not so here, but until the steps of its last start are gone
    if waits "$1" && scontrol show job "$1" | grep -q "Restarts=[1-9]"; then
        sleep 10
        scontrol update "JobId=$1" StartTime=now
    fi
}
until_done() { # JOB SECONDS: whether the job completes
    for _ in $(seq "$2"); do
        at_once "$1"
        case $(state "$1") in COMPLETED) return 0 ;; FAILED | CANCELLED | TIMEOUT | NODE_FAIL) return 1 ;; esac
        sleep 1
    done
    return 1
}
steps_of() { if [ -f "$1/metrics.jsonl" ]; then wc -l <"$1/metrics.jsonl"; else echo 0; fi; }
until_steps() { for _ in $(seq 1200); do [ "$(steps_of "$1")" -ge "$2" ] && return 0; sleep 0.1; done; return 1; }
same_weights() { # RUN RUN: whether the last checkpoints hold the same bits
    "$venv/bin/python" - "$1" "$2" <<'P'
import sys
import numpy as np
from mpillm.checkpoint.reading import Checkpoint
one, other = map(Checkpoint, sys.argv[1:])
same = all(np.array_equal(one.read(name, kind), other.read(name, kind))
           for kind in one.tensors for name in one.names(kind))
raise SystemExit(not (same and one.step == other.step))
P
}
submit() { # RUN TEMPLATE OPTIONS...: print the job's number
    RUN_DIR=$job/$1 sbatch --parsable --export=ALL --nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --time=00:20:00 "${@:3}" \
        "$root/slurm/$2"
}
log() { echo "mpillm-${1/_/-}.out"; } # JOB, or JOB_ELEMENT of an array
until_start() { # JOB N RUN: whether the job starts for the N-th time again and trains a while
    for _ in $(seq 120); do
        at_once "$1"
        grep -q "start $2" "$(log "$1")" 2>/dev/null && break
        sleep 0.5
    done
    until_steps "$3" $(($(steps_of "$3") + 60))
}
signal() { # JOB SCANCEL-OPTIONS...: send it; whether the job is soon back in the queue
    for _ in $(seq 20); do scancel "${@:2}" "$1" && break; sleep 0.5; done
    for _ in $(seq 60); do waits "$1" && return; sleep 0.5; done
    return 1
}
usr1=(--signal=USR1 --batch)
interrupt() { # JOB N RUN SCANCEL-OPTIONS...: once start N has trained a while; whether it stops, as never before but N times
    until_start "${@:1:3}" && signal "$1" "${@:4}" && [ "$(grep -c "stopped by" "$(log "$1")")" = $(($2 + 1)) ]
}
unbroken() { # RUN TEMPLATE OPTIONS...: train what others are compared with, unless that is done
    [ -d "$1" ] || verdict "an unbroken run of $2 ends" until_done "$(submit "$@")" 300
}
as_whole() { # RUN WHOLE: whether its weights are those of an unbroken run
    verdict "with the weights of an unbroken run, bit for bit" same_weights "$1" "$2"
}

stop() {
    local id
    id=$(submit stop cpu.sbatch)
    verdict "cpu.sbatch trains, is stopped by USR1, and is back in the queue" interrupt "$id" 0 stop "${usr1[@]}"
    scancel "$id"
}
signals() {
    local id
    id=$(submit signals cpu.sbatch)
    for _ in $(seq 600); do grep -q "start 0" "$(log "$id")" 2>/dev/null && break; sleep 0.1; done
    verdict "stopped while doctor looks at the launch" signal "$id" "${usr1[@]}"
    verdict "nothing to save yet" [ ! -e signals/checkpoints ]
    id=$(submit signals cpu.sbatch)
    verdict "stopped by USR1 to the ranks alone" interrupt "$id" 0 signals --signal=USR1
    verdict "stopped by TERM to the ranks alone" interrupt "$id" 1 signals --signal=TERM
    verdict "stopped by TERM to the job's shell" interrupt "$id" 2 signals --signal=TERM --batch
    verdict "goes on" until_start "$id" 3 signals
    scancel "$id"
    for _ in $(seq 30); do [ "$(state "$id")" = CANCELLED ] && break; sleep 0.5; done
    verdict "a cancelled job does not come back" [ "$(state "$id")" = CANCELLED ]
    grep "stopped by\|not put back\|srun" "$(log "$id")" | tail -n 9
}
preemptions() {
    local id n
    id=$(submit preempted cpu.sbatch)
    for n in {0..9}; do verdict "preemption $((n + 1))" interrupt "$id" "$n" preempted "${usr1[@]}"; done
    verdict "trained to the end" until_done "$id" 300
    unbroken whole cpu.sbatch
    as_whole preempted whole
}
walltime() {
    local id CONFIG=$job/long.toml
    export CONFIG
    sed 's/^steps = .*/steps = 8000/' train.toml >"$CONFIG"
    id=$(submit walltime cpu.sbatch --time=00:02:00 --signal=B:USR1@30) # Slurm may send it up to a minute earlier
    verdict "trains" until_start "$id" 0 walltime
    for _ in $(seq 150); do waits "$id" && break; sleep 1; done
    verdict "stopped before the walltime, with a checkpoint" grep -q "stopped by .* after step [1-9]" "$(log "$id")"
    verdict "requeued, trained to the end" until_done "$id" 600
    verdict "without being ended by Slurm" eval '! grep -q "DUE TO TIME LIMIT" '"$(log "$id")"
    unbroken whole-long cpu.sbatch
    as_whole walltime whole-long
    unset CONFIG
}
node() {
    local id
    id=$(submit node cpu.sbatch)
    verdict "trains" until_start "$id" 0 node
    verdict "for longer than to its first checkpoint" until_steps node 300
    scontrol update nodename=n2 state=down reason=test
    for _ in $(seq 60); do waits "$id" && break; sleep 0.5; done
    verdict "a job whose node is lost is back in the queue" waits "$id"
    scontrol update nodename=n2 state=resume || true # it may be back by itself
    verdict "trained to the end" until_done "$id" 300
    verdict "from the newest checkpoint" grep -q "going on from step [1-9]" "$(log "$id")"
    unbroken whole cpu.sbatch
    as_whole node whole
}
gpu() {
    verdict "gpu.sbatch would be started" sbatch --test-only --nodes=2 --ntasks-per-node=4 --cpus-per-task=1 "$root/slurm/gpu.sbatch"
}
plan() {
    local id plan=train.toml.2-ranks.plan.json
    id=$(submit planned plan.sbatch)
    verdict "plan.sbatch probes, plans, trains, and is stopped" interrupt "$id" 0 planned "${usr1[@]}"
    cp "$plan" first.json
    verdict "trained to the end" until_done "$id" 300
    verdict "by the plan" cmp "$plan" planned/plan.json
    verdict "which is still the first" cmp "$plan" first.json
    unbroken whole-planned plan.sbatch
    as_whole planned whole-planned
}
sweep() {
    local id n
    printf -- '--train.lr 1e-3\n--train.lr 2e-3\n' >sweep.txt
    id=$(submit sweep sweep.sbatch --array=0-1 --nodes=1 --ntasks-per-node=2)
    verdict "sweep.sbatch trains, and is stopped" interrupt "${id}_1" 0 sweep-1 "${usr1[@]}"
    for n in 0 1; do verdict "sweep.sbatch fills its array, $n" until_done "${id}_$n" 300; done
    verdict "with a rate each" grep -q "lr = 0.002" sweep-1/config.toml
    unbroken whole-sweep sweep.sbatch --array=1 --nodes=1 --ntasks-per-node=2
    as_whole sweep-1 whole-sweep-1
}

for case in "$@"; do
    echo "== $case" && "$case"
done
if [ "$failures" -gt 0 ]; then
    tail -n 30 ./*.out || true
    grep -i "job" /var/log/slurm/slurmctld.log | tail -n 30
    scontrol show job
fi
echo "tests/slurm: $failures failures"
exit "$((failures > 0))"
