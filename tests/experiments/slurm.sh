#!/usr/bin/env bash
# A whole SLURM on this machine: slurm.sh start DIR [TASKS], slurm.sh stop DIR. Controller and node daemon talk over
# loopback and keep all they write in DIR; clients need SLURM_CONF=DIR/slurm.conf. Run as root; installs Debian's
# slurm-wlm where it is missing.
set -euo pipefail
dir=$2
export SLURM_CONF=$dir/slurm.conf

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

case $1 in
start)
  if ! command -v slurmctld slurmd sbatch munged > /dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge > /dev/null
  fi
  host=$(hostname -s)
  mkdir -p "$dir/state" "$dir/spool"
  chmod 755 "$dir"
  dd if=/dev/urandom of="$dir/munge.key" bs=128 count=1 status=none
  chmod 400 "$dir/munge.key"
  munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
    --seed-file="$dir/munge.seed" --log-file="$dir/munged.log"
  cat > "$SLURM_CONF" << CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=10
CredType=cred/munge
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=1
ReturnToService=2
KillWait=2
MinJobAge=30
NodeName=$host NodeAddr=127.0.0.1 CPUs=${3:-2} State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
  slurmctld
  slurmd
  for _ in $(seq 60); do
    [ "$(sinfo --noheader --format=%t 2> /dev/null)" = idle ] && exit 0
    sleep 0.5
  done
  tail -n 5 "$dir/slurmctld.log" "$dir/slurmd.log" >&2
  exit 1
  ;;
stop)
  scancel --full --user="$(id -un)" 2> /dev/null || true
  for name in slurmd slurmctld munged; do
    [ -f "$dir/$name.pid" ] && kill "$(cat "$dir/$name.pid")" 2> /dev/null || true
  done
  ;;
esac
