#!/usr/bin/env bash
# Inside the overlay: start Slurm, submit the templates, look at what they did. Called by run.sh, never by itself.
set -eu
root=$1 venv=$2 short=${3:-}
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
NodeName=n1 NodeHostname=box NodeAddr=10.77.0.1 Port=17001 CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000
NodeName=n2 NodeHostname=box NodeAddr=10.77.0.1 Port=17002 CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=60 State=UP
C
mkdir -p /var/spool/slurmd.n1 /var/spool/slurmd.n2
slurmctld -c -i && sleep 1 && slurmd -N n1 && slurmd -N n2 && sleep 3
sinfo -N

job=$(mktemp -d) && cd "$job"
export PYTHONPATH=$root VENV=$venv MPILLM_SLURM=$root/slurm MPIR_CVAR_POLLS_BEFORE_YIELD=100
"$venv/bin/python" -m mpillm data "$root"/mpillm/*.py -o tokens.h5 --validation-fraction 0.2 >/dev/null
cat >train.toml <<C
[model]
hidden_size = 32
ffn_size = 64
num_layers = 4
num_heads = 4
max_seq_len = 32
[data]
path = "$job/tokens.h5"
[train]
steps = 2000
seq_len = 32
global_batch = 8
microbatch = 2
eval_every = 0
checkpoint_every = 0
C
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
until_steps() { for _ in $(seq 300); do [ "$(steps_of "$1")" -ge "$2" ] && return 0; sleep 0.1; done; return 1; }
same_weights() { # RUN RUN: whether the last checkpoints hold the same bits
    "$venv/bin/python" - "$1" "$2" <<'P'
import sys
import numpy as np
from mpillm.train.checkpoint import Checkpoint
one, other = map(Checkpoint, sys.argv[1:])
same = all(np.array_equal(one.read(name, kind), other.read(name, kind))
           for kind in one.tensors for name in one.names(kind))
raise SystemExit(not (same and one.step == other.step))
P
}
submit() { # RUN TEMPLATE OPTIONS...: print the job's number
    RUN_DIR=$job/$1 sbatch --parsable --export=ALL --nodes=2 --ntasks-per-node=1 --time=00:10:00 "${@:3}" "$root/slurm/$2"
}

whole=$(submit whole cpu.sbatch)
verdict "cpu.sbatch trains to the end" until_done "$whole" 150
parts=$(submit parts cpu.sbatch)
interrupt() { # START: send USR1 once that start has trained a while
    for _ in $(seq 60); do
        at_once "$parts"
        grep -q "start $1" "mpillm-$parts.out" 2>/dev/null && break
        sleep 0.5
    done
    until_steps parts $(($(steps_of parts) + 100)) || true
    for _ in $(seq 20); do scancel --signal=USR1 --batch "$parts" && break; sleep 0.5; done
}
interrupt 0
for _ in $(seq 60); do waits "$parts" && break; sleep 0.5; done
verdict "stopped by USR1, with a checkpoint" grep -q "stopped by SIGUSR1" "mpillm-$parts.out"
verdict "and back in the queue" waits "$parts"
if [ -z "$short" ]; then
    interrupt 1
    verdict "stopped twice, requeued, trained to the end" until_done "$parts" 240
    verdict "with the weights of the unbroken run, bit for bit" same_weights whole parts
    verdict "Slurm counts two restarts" grep -q "start 2" "mpillm-$parts.out"
    planned=$(submit planned plan.sbatch)
    verdict "plan.sbatch probes, plans and trains" until_done "$planned" 180
    verdict "by the plan" grep -q "what limits it" "mpillm-$planned.out"
    printf -- '--train.lr 1e-3\n--train.lr 2e-3\n' >sweep.txt
    sweep=$(RUN_DIR=$job/sweep sbatch --parsable --export=ALL --array=0-1 --ntasks-per-node=1 --time=00:10:00 "$root/slurm/sweep.sbatch")
    verdict "sweep.sbatch fills its array, 0" until_done "${sweep}_0" 150
    verdict "sweep.sbatch fills its array, 1" until_done "${sweep}_1" 150
    verdict "with a rate each" grep -q "lr = 0.002" sweep-1/config.toml
fi
if [ "$failures" -gt 0 ]; then
    tail -n 30 ./*.out
    grep -i "job" /var/log/slurm/slurmctld.log | tail -n 30
    scontrol show job
fi
echo "tests/slurm: $failures failures"
exit "$((failures > 0))"
