# ---- what follows is the same in every job; what varies stands above ----
say() { printf '%(%F %T)T job %s, start %s: %s\n' -1 "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" "$*"; }

# SLURM signals every process of the batch step: helpers must outlive that. From $CODE, as Python looks where it stands first.
helper() { (trap '' TERM USR1; cd "$CODE" && exec "${PYTHON[@]}" -m "$@"); }

end_step() { # of this job, not the job itself; and srun, should it wait for what is gone
    say "$1: ending the step"
    local id
    for id in $(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i); do
        case ${id##*.} in *[!0-9]*) ;; *) scancel "$id" ;; esac
    done
    sleep 20
    kill -KILL "$step" 2>/dev/null
}

wait_for_step() { # into $code. A trap ends a wait early; of a step that has ended, bash remembers how.
    while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done
    wait "$step"
    code=$?
}

queue_again() {
    # Leaving with whatever exit code inside a preemption's grace time would end the job for good, so this is done at once.
    local try
    for try in 1 2 3; do
        if scontrol requeue "$SLURM_JOB_ID"; then
            trap - TERM
            sleep 600 & # SLURM ends this script
            wait
            exit 1
        fi
        sleep 5
    done
    say "SLURM does not queue this job again: submit by hand"
    exit 1
}
