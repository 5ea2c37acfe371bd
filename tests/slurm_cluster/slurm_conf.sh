# Sourced by up.sh: slurm.conf on standard output. No cgroups, no accounting daemon; timers short enough for tests.
cat <<CONF
ClusterName=glam
SlurmctldHost=$controller($controller_address)
SlurmctldPort=16817
SrunPortRange=16900-17400
$bind
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired: two minutes, were it not for this.
AuthInfo=socket=$root/run/munge.socket,cred_expire=5
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool/%n
SlurmctldPidFile=$root/run/slurmctld.pid
SlurmdPidFile=$root/run/%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
# Longer than KillWait: a request to end a step that seems lost is sent again a minute later, to the next start of the job.
MessageTimeout=8
KillWait=5
UnkillableStepTimeout=30
EnforcePartLimits=ALL
MinJobAge=3600
PropagateResourceLimitsExcept=MEMLOCK
CONF
for at in "${!nodes[@]}"; do
  echo "NodeName=${nodes[at]} NodeAddr=${address[at]} Port=$((16821 + at)) CPUs=2 RealMemory=4096"
done
cat <<CONF
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 DefaultTime=30:00
PartitionName=low Nodes=ALL PriorityTier=0 DefaultTime=30:00 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=10 DefaultTime=30:00 PreemptMode=OFF
CONF
