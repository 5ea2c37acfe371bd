# ---- the life of a training job ----
if [ -e "$RUN/DONE" ]; then say "nothing to do: $RUN/DONE is there"; exit 0; fi
if [ -e "$RUN/STOP" ]; then say "nothing to do: $RUN/STOP is there"; exit 0; fi

newest_start() {
    local file newest=0
    for file in "$RUN"/starts/[0-9]*.json; do [ ! -e "$file" ] || newest=${file##*/}; done
    echo "${newest%.json}"
}

asked= step=
on_signal() { # USR1: the time limit is near. TERM: preemption, or the end. Either may come twice.
    say "got $1"
    [ "$asked" = USR1 ] || asked=$1
    [ -z "${reminder:-}" ] || return 0
    (trap '' TERM USR1; remind) &
    reminder=$!
}
remind() { # Ranks that were starting up did not hear it, so it is said again; a save that takes too long is given up.
    local waited=0 pause=5
    while [ "$waited" -lt "$GIVE_UP_S" ]; do
        scancel --signal=USR1 "$SLURM_JOB_ID" || kill -USR1 "$step"
        sleep "$pause"
        waited=$((waited + pause))
        [ "$waited" -lt 15 ] || pause=15
    done
    end_step "the ranks have not saved and stopped within $GIVE_UP_S s"
}
watch() { # A killed slurmstepd is noticed by nobody; srun waits for it for ever.
    local why
    why=$(helper slurm.watch "$RUN" --after "$after" --since "$since" --ranks "$RANKS" \
        --kill-wait "$KILL_WAIT_S" --processes "$PROCESSES" --beside "$step") && end_step "$why"
}

trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM
after=$(newest_start)
printf -v since '%(%s)T' -1
say "on $SLURM_JOB_NODELIST, $RANKS ranks"
launch & step=$!
(trap '' TERM USR1; watch) & watcher=$!
wait_for_step

trap '' TERM USR1 # from here on they say nothing new, and must end none of what is called
{ kill -KILL "$watcher" ${reminder:+"$reminder"}; wait "$watcher" ${reminder:+"$reminder"}; } 2>/dev/null # bash says "Killed"
state=$(scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null)
helper slurm.verdict "$RUN" --job "$SLURM_JOB_ID" --code "$code" --after "$after" --since "$since" \
    --signal "${asked:-none}" --state "$state" --restarts "${SLURM_RESTART_COUNT:-0}" \
    --max-restarts "$MAX_RESTARTS" --max-without-progress "$MAX_WITHOUT_PROGRESS"
verdict=$?
case $verdict in
0) queue_again ;;
10) exit 0 ;;
11) exit 1 ;;
esac
say "no verdict could be had (exit code $verdict)"
if [ -e "$RUN/DONE" ]; then exit 0; fi
if [ -e "$RUN/STOP" ] || [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then exit 1; fi
queue_again
