#!/bin/bash
# A job of many nodes under SLURM, from the repository's folder, which all nodes share:
#
#     mkdir -p out && sbatch --nodes 4 docs/slurm.sh --model sdxl --data liuhuohuo2/pick-a-pic-v2 \
#                      --out out/sdxl
#
# Before its time is up the job saves, goes back to the queue, and resumes when its turn comes.
#SBATCH --job-name=inpo
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=out/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# 300 s before the end this shell gets SIGTERM: time for a micro-step and a checkpoint.
#SBATCH --signal=B:TERM@300

# srun starts the ranks itself, one a GPU. DeepSpeed's launcher is left out: it would kill each rank
# 30 s after the signal, which a step of SDXL may outlast.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one node have two ports
export MASTER_ADDR MASTER_PORT
# export NCCL_SOCKET_IFNAME=ib0     # where nodes have several networks
# source .venv/bin/activate

asked=
trap 'asked=yes; kill -TERM "$ranks"' TERM # srun passes it on to every rank
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python -u train_inpo.py "$@"' rank "$@" &
ranks=$!
wait "$ranks"
code=$?
if [ -n "$asked" ]; then # the trap ended the first wait; the ranks are still saving
    wait "$ranks"
    code=$?
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
