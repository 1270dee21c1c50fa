#!/bin/bash
# Trains on several hosts of a Slurm cluster, and continues after a host is lost, a preemption or the time limit.
#
# Start:   sbatch launch/slurm.sh --config=configs/llava_vr_qwen2_0_5b.py:phase1 --workdir=/shared/runs/phase1
# Change:  the lines #SBATCH: the number of hosts, their GPUs (one task for each), the partition and the time; below them
#          how the environment is entered, and how often the job may be queued again.
#
# The folder of the run, the data and the environment must be on storage that all hosts see. Slurm sends SIGTERM to the
# tasks five minutes before the time limit, at which the run saves and ends with exit code 75. The job is queued again
# after 75 and after a death by a signal (128 and above); any other exit code has to be mended first. When a host goes
# down, Slurm itself queues the job again (--requeue).
#SBATCH --job-name=vr-jax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=vr-jax-%j.log
set -u
MAX_REQUEUES="${MAX_REQUEUES:-100}"

# source /shared/env/bin/activate

# The other tasks end by themselves within a minute when one is lost, and say which. So they are not killed at once.
srun --kill-on-bad-exit=0 --wait=120 vr-jax train --distributed "$@"
code=$?

if [ "$code" -eq 75 ] || [ "$code" -gt 128 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_REQUEUES" ]; then
        echo "slurm.sh: exit code $code; the job was queued again $MAX_REQUEUES times already, so it ends"
        exit "$code"
    fi
    echo "slurm.sh: exit code $code; the job is queued again and continues from its newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    exit "$code"
fi
echo "slurm.sh: exit code $code"
exit "$code"
