# Sourced by the Slurm scripts: `requeue_unless_done COMMAND...` runs a job step. Shortly before the
# time limit (#SBATCH --signal=B:USR1@300) the run receives SIGTERM, saves a checkpoint and exits with
# 143; the job is then requeued, and the program finds its run and continues it.
requeue_unless_done() {
    # The number of one task of a job array is also that of the whole array.
    local near_limit='' status=0 job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    trap 'near_limit=yes; scancel --signal=TERM "$job"' USR1    # to the step's processes
    "$@" &
    wait $! || status=$?
    if [ -n "$near_limit" ]; then    # it has interrupted the wait
        status=0
        wait $! || status=$?
        [ "$status" -ne 143 ] || scontrol requeue "$job"
    fi
    return "$status"
}
