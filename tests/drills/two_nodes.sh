#!/usr/bin/env bash
# Run examples/hostfile and examples/train.slurm on one machine. Two network namespaces with their own host names and a
# virtual cable between them stand for two machines with a shared file system; each runs one rank on the CPU. The curves
# must equal that of one machine to 1e-5. This shows that the examples start, stop and resume as written. It measures no
# network, and uses no GPU.
#
#     apt-get install openssh-server pdsh iproute2 slurm-wlm
#     tests/drills/two_nodes.sh hostfile     # deepspeed --hostfile, through pdsh and an sshd in each namespace
#     tests/drills/two_nodes.sh torchrun     # torchrun --nnodes 2, started in each namespace
#     tests/drills/two_nodes.sh slurm        # sbatch, slurmctld and two slurmd; a signal interrupts the run once
#
# Run as root, in the checkout, with the virtual environment active. It removes everything at the end, except the runs in
# runs/two_nodes.
set -euo pipefail
how=${1:?hostfile, torchrun or slurm}
cd "$(dirname "$0")/../.."
work=$PWD/runs/two_nodes
rm -rf "$work"
mkdir -p "$work"
daemons=()

clean() {
    [ ${#daemons[@]} = 0 ] || kill "${daemons[@]}" 2> /dev/null || true
    for node in node1 node2; do
        ip netns pids $node 2> /dev/null | xargs -r kill -9 || true
        ip netns del $node 2> /dev/null || true
        rm -rf /etc/netns/$node
    done
}
trap clean EXIT
clean

on() {  # on NODE COMMAND…: in its network, under its host name, with its own /etc/hosts, /etc/ssh, /etc/slurm
    local node=$1
    shift
    nsenter --net=/run/netns/"$node" unshare --mount --uts bash -euc '
        hostname "$0"
        for file in /etc/netns/"$0"/*; do mount --bind "$file" "/etc/${file##*/}"; done
        exec "$@"' "$node" "$@"
}

lay_cable() {
    for node in node1 node2; do
        mkdir -p /etc/netns/$node
        printf '127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n' > /etc/netns/$node/hosts
        ip netns add $node
        ip -n $node link set lo up
    done
    ip link add eth0 netns node1 type veth peer name eth0 netns node2
    for number in 1 2; do
        ip -n node$number addr add 10.77.0.$number/24 dev eth0
        ip -n node$number link set eth0 up
    done
}

start_sshd() {
    ssh-keygen -q -t ed25519 -N '' -f "$work/key"
    for node in node1 node2; do
        mkdir -p /etc/netns/$node/ssh
        cp "$work/key" /etc/netns/$node/ssh/host_key
        printf '%s\n' 'HostKey /etc/ssh/host_key' "AuthorizedKeysFile $work/key.pub" 'StrictModes no' 'UsePAM no' \
            'PidFile none' > /etc/netns/$node/ssh/sshd_config
        printf '%s\n' "IdentityFile $work/key" 'StrictHostKeyChecking no' 'UserKnownHostsFile /dev/null' \
            'LogLevel ERROR' > /etc/netns/$node/ssh/ssh_config
        mkdir -p /run/sshd
        on $node /usr/sbin/sshd -D -e 2> "$work/sshd-$node.log" &
        daemons+=($!)
    done
}

start_slurm() {
    mkdir -p "$work/slurm/ctld" /run/munge
    [ -S /run/munge/munge.socket.2 ] || { chown munge: /run/munge; runuser -u munge -- munged -F & daemons+=($!); }
    for node in node1 node2; do
        mkdir -p /etc/netns/$node/slurm "$work/slurm/$node"
        cat > /etc/netns/$node/slurm/slurm.conf << EOF
ClusterName=two
SlurmctldHost=node1
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
AuthInfo=cred_expire=5
ReturnToService=2
KillWait=30
SlurmctldPidFile=$work/slurm/ctld.pid
SlurmdPidFile=$work/slurm/%n.pid
SlurmdSpoolDir=$work/slurm/%n
StateSaveLocation=$work/slurm/ctld
SlurmctldLogFile=$work/slurm/ctld.log
SlurmdLogFile=$work/slurm/%n.log
NodeName=node1,node2 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
EOF
    done
    on node1 slurmctld -D > "$work/slurm/ctld.out" 2>&1 &
    daemons+=($!)
    for node in node1 node2; do
        on $node slurmd -D > "$work/slurm/$node.out" 2>&1 &
        daemons+=($!)
    done
    for _ in $(seq 60); do
        on node1 sinfo -h -o %T 2> /dev/null | grep -qx idle && return
        read -rt 1 <> <(:) || true
    done
    cat "$work"/slurm/*.log >&2
    exit 1
}

settings=(train.steps=60 train.save_every=60 train.val_every=60 align.strategy=random train.precision=fp32 flow.steps=1)
train=(agrepa_fast/train.py --ds_config zero2.json --preset "$work/shards/preset.yaml")
export PYTHONPATH=$PWD OMP_NUM_THREADS=1 DS_ENV_FILE=examples/deepspeed_env GLOO_SOCKET_IFNAME=eth0

same_curve() {
    python - "$work/one" "$1" << 'EOF'
import sys
from pathlib import Path
from tests.drills.harness import TOLERANCE, curve_difference, last_step
one, two = map(Path, sys.argv[1:])
worst = curve_difference(one, two)
print(f"{last_step(two)} steps: the largest difference of a loss or gradient norm from one machine is {worst:.1e}")
sys.exit(not worst <= TOLERANCE)
EOF
}

python -c "from pathlib import Path; from tests.testing import write_small_shards; write_small_shards(Path('$work/shards'))"
GLOO_SOCKET_IFNAME=lo python "${train[@]}" "run.dir=$work/one" "${settings[@]}"
lay_cable
case $how in
    hostfile)
        start_sshd
        on node1 deepspeed --hostfile examples/hostfile "${train[@]}" "run.dir=$work/two" "${settings[@]}"
        same_curve "$work/two"
        ;;
    torchrun)
        for rank in 1 0; do
            on node$((rank + 1)) torchrun --nnodes 2 --node-rank $rank --nproc-per-node 1 --master-addr node1 \
                --master-port 29500 "${train[@]}" "run.dir=$work/two" "${settings[@]}" &
        done
        wait -n
        wait -n
        same_curve "$work/two"
        ;;
    slurm)
        start_slurm
        job=$(on node1 sbatch --parsable --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1 --output="$work/slurm.log" \
            examples/train.slurm "${train[@]:1}" "${settings[@]}")
        run=runs/slurm-$job
        rm -rf "$run"
        # what --signal does before the time limit: USR1 to the tasks, not to the batch script
        until [ "$(cat "$run/metrics.jsonl" 2> /dev/null | wc -l)" -ge 10 ]; do read -rt 0.1 <> <(:) || true; done
        on node1 scancel --signal=USR1 "$job"
        while on node1 squeue -h -j "$job" -o '%T, restarted %r' 2> /dev/null | grep . ; do read -rt 5 <> <(:) || true; done
        tail -n 30 "$work/slurm.log"
        same_curve "$run"
        ;;
    *)
        echo "hostfile, torchrun or slurm, not $how" >&2
        exit 2
        ;;
esac
