# Sourced by the Slurm scripts: `requeue_unless_done COMMAND...` runs a job step. When the time
# limit nears (#SBATCH --signal=B:USR1@300), the run is told to save a checkpoint and to end, which
# it does with 143; the job is then queued again, and the program finds its run and goes on with it.
requeue_unless_done() {
    local near_limit= status=0
    trap 'near_limit=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1    # to the step's processes
    "$@" &
    wait $! || status=$?
    if [ -n "$near_limit" ]; then    # which broke the wait
        status=0
        wait $! || status=$?
        [ "$status" -ne 143 ] || scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
