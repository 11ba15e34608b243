# The common body of the templates: they set what a site changes, source this file, and call its functions.
#
#   CONFIG    configuration of the run          VENV     environment with mpillm, on a file system that all nodes share
#   RUN_DIR   where the run is kept             THREADS  threads a rank, if not its CPUs
#   MPI_TYPE  srun's --mpi: pmi2 for MPICH, pmix for Open MPI

set -euo pipefail
: "${CONFIG:?set CONFIG to the configuration of the run}" "${VENV:?set VENV to the environment that has mpillm}"
: "${RUN_DIR:?set RUN_DIR to where the run is kept}"
MPI_TYPE=${MPI_TYPE:-pmi2}
export OMP_NUM_THREADS=${THREADS:-${SLURM_CPUS_PER_TASK:-1}} MKL_NUM_THREADS=${THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTHONUNBUFFERED=1
export PATH=$VENV/bin:$PATH

# One rank fails: all end. All write one log, with their number before each line.
ranks=(srun --mpi="$MPI_TYPE" --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --label
       python -m mpillm)

# What this job is, for the log; a launch that is not sound costs seconds instead of a night.
check_launch() {
    echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}, $(date)"
    "${ranks[@]}" doctor
}

# Train until it is done, asked to stop, or broken. USR1 comes from Slurm before the walltime (--signal=B:USR1@...) or
# from scancel --signal=USR1 --batch; srun hands it to the ranks, which save and leave with 85.
train() {
    local code=0
    "${ranks[@]}" train "$CONFIG" --train.run_dir "$RUN_DIR" --resume auto "$@" &
    local step=$!
    trap 'kill -USR1 '"$step" USR1
    trap 'kill -TERM '"$step" TERM
    while :; do
        wait "$step" && code=0 || code=$?
        kill -0 "$step" 2>/dev/null || break  # a signal ends wait; the step goes on
    done
    trap - USR1 TERM
    if [ "$code" -eq 85 ]; then
        requeue
    fi
    return "$code"
}

# Start again from the checkpoint, unless MAX_STALLS starts in a row brought no new one.
requeue() {
    local newest stalls=0 last=
    newest=$(find "$RUN_DIR/checkpoints" -maxdepth 1 -name 'step-*' -printf '%f\n' 2>/dev/null | sort | tail -n 1)
    if [ -f "$RUN_DIR/starts" ]; then
        read -r last stalls <"$RUN_DIR/starts"
    fi
    [ "${newest:=none}" = "$last" ] && stalls=$((stalls + 1)) || stalls=0
    mkdir -p "$RUN_DIR" && echo "$newest $stalls" >"$RUN_DIR/starts"
    if [ "$stalls" -ge "${MAX_STALLS:-3}" ]; then
        echo "$stalls starts in a row without a new checkpoint: not started again"
    else
        scontrol requeue "$SLURM_JOB_ID"
    fi
}
