# The common body of the templates: they set what a site changes, source this file, and call its functions.
#
#   VENV      environment with mpillm, on a file system that all nodes share     THREADS  threads a rank, if not its CPUs
#   MPI_TYPE  srun's --mpi: pmi2 for MPICH, pmix for Open MPI
#   CONFIG    configuration of a run            RUN_DIR  where it is kept
#   RESULTS   in place of these two: the file that a batch makes

set -euo pipefail
: "${VENV:?set VENV to the environment that has mpillm}"
state=${RUN_DIR:-${RESULTS:?set RUN_DIR to where the run is kept, or RESULTS to the file to make}.parts}  # what a start goes on from
MPI_TYPE=${MPI_TYPE:-pmi2}
export OMP_NUM_THREADS=${THREADS:-${SLURM_CPUS_PER_TASK:-1}} MKL_NUM_THREADS=${THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTHONUNBUFFERED=1
export PATH=$VENV/bin:$PATH

# One rank fails: all end. All write one log, with their number before each line.
ranks=(srun --mpi="$MPI_TYPE" --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --label
       python -m mpillm)

# A request to stop may come at any time: USR1 from Slurm before the walltime (--signal=B:USR1@..., in the templates as many
# seconds as mpillm.guard.stop.MARGIN_S) or from scancel, TERM when Slurm ends the job. It is noted, and what runs now hears of it
# as USR1: of TERM Slurm tells the ranks itself, and srun would kill them.
is_to_stop=
trap 'is_to_stop=1; [ -z "${!:-}" ] || kill -USR1 "$!" 2>/dev/null || true' USR1 TERM

# Run one command of the job; if it was asked to stop, put the job back into the queue and leave with 85.
stage() {
    local code=0
    if [ -z "$is_to_stop" ]; then
        "$@" &
        while kill -0 "$!" 2>/dev/null; do wait "$!" || true; done  # a signal ends wait; the command goes on
        wait "$!" && return || code=$?
    fi
    case $code in
        85 | 138) ;;                                            # 138: it died of USR1 before it could note it
        0 | 129 | 1[3-9]?) [ -n "$is_to_stop" ] || return "$code" ;;  # 0: not begun; else killed after the request
        *) return "$code" ;;
    esac
    requeue
    exit 85
}

# What this job is, for the log; a launch that is not sound costs seconds instead of a night.
check_launch() {
    echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}, $(date)"
    stage "${ranks[@]}" doctor
}

# Train until it is done, asked to stop, or broken.
train() {
    stage "${ranks[@]}" train "$CONFIG" --train.run_dir "$RUN_DIR" --resume auto "$@"
}

# Work on a file of lines until all are done, asked to stop, or broken.
batch() {
    stage "${ranks[@]}" "$@" -o "$RESULTS"
}

# How far the job is, in a word: the newest checkpoint; of a batch the number of results, which begin with that of their line.
progress() {
    if [ -n "${RUN_DIR:-}" ]; then
        find "$state/checkpoints" -maxdepth 1 -name 'step-????????' -printf '%f\n' 2>/dev/null | sort | tail -n 1
    else
        cat "$state"/*-* 2>/dev/null | grep -c '^[1-9]'
    fi
}

# Start again from what there is, unless MAX_STALLS starts in a row brought nothing new.
requeue() {
    local now stalls=0 last=none job=$SLURM_JOB_ID
    # The last element of an array has the number of the whole array, and would put back all.
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    now=$(progress) || true
    read -r last stalls 2>/dev/null <"$state/starts" || true
    [ "${now:=none}" = "$last" ] && stalls=$((stalls + 1)) || stalls=0
    mkdir -p "$state" && echo "$now $stalls" >"$state/starts"
    if [ "$stalls" -ge "${MAX_STALLS:-3}" ]; then
        echo "$stalls starts in a row without a new checkpoint or result: not started again"
    elif [ "$(squeue --noheader --jobs "$job" --format %t)" = R ]; then
        scontrol requeue "$job" || echo "not put back into the queue"
    else  # Slurm ends it: a preempted job comes back by itself, a cancelled one must not
        echo "not put back into the queue: Slurm has ended it"
    fi
}
