#!/usr/bin/env bash
# Trains on GPU nodes under Slurm. The arguments go to orpo_jax.train; sbatch's own stand before the script:
#
#     sbatch --nodes=4 tools/slurm_gpu.sh --config configs/NAME.py --config.output_dir=/shared/runs/NAME
#
# From the project's folder, with the environment that has orpo_jax active (sbatch passes it on).
# output_dir, or checkpoint.folder, must be one that all nodes see.

#SBATCH --job-name=orpo_jax
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
# One process per GPU, which is how JAX takes a Slurm job: process SLURM_PROCID of SLURM_NTASKS, with the GPU of number
# SLURM_LOCALID alone (jax/_src/clusters). So each must see all GPUs of its node: --gpus-per-node, not --gpus-per-task,
# which hides all but one. For nodes of another size change both numbers. One process per node works too, with
# --ntasks-per-node=1 and the GPUs that it is to take in the environment: JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7.
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# Two minutes before the time is up, SIGTERM to the processes (with "B:" it would go to this script alone): they save
# and exit with code 75.
#SBATCH --signal=TERM@120
#SBATCH --requeue

# --kill-on-bad-exit=0: the first process that has saved and exits with 75 must not end those that still save.
# --cpus-per-task again, because srun does not inherit it (since Slurm 22.05).
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" python -m orpo_jax.train "$@"
code=$? # the highest of all processes'

# Only a run that saved is queued again, never one that failed; the same command goes on from the newest checkpoint.
if [ "$code" -eq 75 ]; then
  echo "saved and stopped; job $SLURM_JOB_ID is queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
