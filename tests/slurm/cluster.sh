#!/usr/bin/env bash
# A real one-node SLURM on this machine's loopback, from Debian's packages: `cluster.sh start`, `cluster.sh stop`.
#
# For tests, in a container or on a machine of one's own: it runs as root, needs neither systemd nor cgroups, and writes
# /etc/slurm. An /etc/slurm/slurm.conf that is not its own is left alone, and it refuses to start.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin" DEBIAN_FRONTEND=noninteractive

marker="# written by tests/slurm/cluster.sh"
conf=/etc/slurm/slurm.conf
host=$(hostname -s)
state=/var/spool/flexlib-slurm
gpus=4 # null devices in place of GPUs, so that jobs can ask for one

stop() {
    local pid_file
    for pid_file in /run/slurm/slurmd.pid /run/slurm/slurmctld.pid /run/munge/munged.pid; do
        stop_daemon "$pid_file"
    done
    # SLURM's commands, which Snakemake asks at each start, would wait ten seconds for the cluster that is named there
    ! grep -qsF "$marker" "$conf" || rm "$conf"
}

stop_daemon() {
    local pid
    pid=$(cat "$1" 2>/dev/null) || return 0
    [ -n "$pid" ] && kill "$pid" 2>/dev/null || return 0
    for _ in $(seq 100); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$pid"
}

running() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

install_packages() {
    ! command -v slurmctld slurmd munged >/dev/null || return 0
    apt-get update -qq
    # the services of the packages need systemd, without which apt-get grumbles; the daemons are started below
    apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
}

start_munge() {
    install -d -o munge -g munge -m 0755 /run/munge
    install -d -o munge -g munge -m 0700 /etc/munge /var/lib/munge /var/log/munge
    if [ ! -s /etc/munge/munge.key ]; then
        head -c 1024 /dev/urandom >/etc/munge/munge.key
        chown munge:munge /etc/munge/munge.key
        chmod 400 /etc/munge/munge.key
    fi
    running /run/munge/munged.pid || runuser -u munge -- /usr/sbin/munged
    munge -n | unmunge >/dev/null
}

write_config() {
    local memory_mb
    memory_mb=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 - 512))
    if [ -e "$conf" ] && ! grep -qF "$marker" "$conf"; then
        echo "ERROR $conf is not from this script: this machine has a SLURM of its own" >&2
        exit 1
    fi
    grep -qw "$host" /etc/hosts || echo "127.0.0.1 $host" >>/etc/hosts
    install -d "$state" "$state/slurmd" /etc/slurm
    install -d -o slurm -g slurm "$state/slurmctld" /var/log/slurm /run/slurm
    for ((gpu = 0; gpu < gpus; gpu++)); do
        [ -e "/dev/fakegpu$gpu" ] || mknod "/dev/fakegpu$gpu" c 1 3
    done
    echo "NodeName=$host Name=gpu File=/dev/fakegpu[0-$((gpus - 1))]" >/etc/slurm/gres.conf
    # More CPUs than there are, so that jobs run side by side on any machine. OverMemoryKill: memory limits are kept by
    # polling, without cgroups. MinJobAge: finished jobs stay known to squeue and scontrol, in place of accounting.
    cat >"$conf" <<CONF
$marker
ClusterName=flexlib
SlurmctldHost=$host(127.0.0.1)
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=slurm
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$state/slurmctld
SlurmdSpoolDir=$state/slurmd
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
GresTypes=gpu
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2
MinJobAge=3600
KillWait=10
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 RealMemory=$memory_mb Gres=gpu:$gpus State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
}

show_log() {
    echo "ERROR $1 did not start; the end of its log:" >&2
    tail -n 5 "/var/log/slurm/$1.log" >&2
    exit 1
}

start() {
    install_packages
    write_config
    start_munge
    # -c forgets the jobs of an earlier start
    running /run/slurm/slurmctld.pid || slurmctld -c || show_log slurmctld
    running /run/slurm/slurmd.pid || slurmd || show_log slurmd
    for _ in $(seq 100); do
        [ "$(sinfo -h -o %T 2>/dev/null)" != idle ] || break
        sleep 0.2
    done
    srun --ntasks=1 --mem=100 --time=1 true
    sinfo
}

case "${1:-}" in
    start) start ;;
    stop) stop ;;
    *)
        echo "usage: $0 start|stop" >&2
        exit 2
        ;;
esac
