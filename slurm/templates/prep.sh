# ---- the life of a `glam prep` job: it may be ended at any moment, and goes on from what is done ----
asked= step=
on_signal() { # USR1: the time limit is near. TERM: preemption, or the end.
    say "got $1"
    [ "$asked" = USR1 ] || asked=$1
    [ -z "${ending:-}" ] || return 0
    (trap '' TERM USR1; end_step "asked to stop") &
    ending=$!
}
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM
say "on $SLURM_JOB_NODELIST, $RANKS ranks"
launch & step=$!
wait_for_step

trap '' TERM USR1
[ -z "${ending:-}" ] || { kill -KILL "$ending"; wait "$ending"; } 2>/dev/null # bash says "Killed"
state=$(scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null)
if [ "$code" = 0 ]; then say "done"; exit 0; fi
case $asked:$state in
USR1:* | *PreemptTime=[0-9]*) say "queued again, to go on"; queue_again ;;
TERM:*JobState=RUNNING*) say "queued again, to go on"; queue_again ;;
TERM:*) say "SLURM itself ends this job; it queues it again after a preemption or a lost node"; exit 1 ;;
esac
say "failed (exit code $code)"
exit 1
