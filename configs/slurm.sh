#!/bin/bash
# Two nodes of eight GPUs under SLURM: sbatch configs/slurm.sh --config configs/stage1.yaml --set data.corpus=[corpus]
# SLURM sends SIGTERM two minutes before the limit; the run saves and ends with exit code 0. Submit the same line again with --resume.
#SBATCH --job-name=samed3d
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=samed3d_%j.log
set -euo pipefail
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d \
    --rdzv_endpoint "$head_node:29500" train.py "$@"
