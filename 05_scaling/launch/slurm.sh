#!/bin/bash
# Trains on 2 machines of 8 GPUs each under Slurm, and goes on by itself after each time limit.
#
#   sbatch 05_scaling/launch/slurm.sh
#   STORE=s3://bucket/run1 TOKENS=s3://bucket/tokens PRESET=gpt2-124m sbatch 05_scaling/launch/slurm.sh
#
# To change: --nodes and --gpus-per-node, --time (any: a job that runs into it saves and is queued
# again), --partition and --account where yours asks for them. Needed on every machine: this
# checkout in the same place with its .venv (make setup), and credentials for S3
# (aws configure, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment of sbatch).
# STORE may also be a directory on a disk that all machines share.
#
#SBATCH --job-name=llm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# To this script alone, 120 s before the limit: time for a checkpoint of the slowest store.
#SBATCH --signal=B:TERM@120

set -euo pipefail

PRESET=${PRESET:-1b-24gb}
TOKENS=${TOKENS:-s3://my-bucket/tokens}
STORE=${STORE:-s3://my-bucket/${PRESET}}
PARALLEL=${PARALLEL:-fsdp}
ROOT=${ROOT:-$SLURM_SUBMIT_DIR}
cd "$ROOT"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export OMP_NUM_THREADS=8
# torchrun passes SIGTERM on to the ranks and kills them after 30 s unless told otherwise: an upload
# may take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110

stopped=
# shellcheck disable=SC2329 # the trap calls it
pass_on() {
  stopped=1
  # All steps of the job, not this script. A SIGTERM to srun itself would kill the ranks at once.
  scancel --signal=TERM "$SLURM_JOB_ID"
}
trap pass_on TERM

# One torchrun on each machine; they find each other at the first. The id differs after a requeue,
# so that nothing of the run before is met there.
srun --kill-on-bad-exit=1 .venv/bin/python -m torch.distributed.run \
  --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_PER_NODE##*:}" \
  --rdzv_backend c10d --rdzv_endpoint "$first:29500" \
  --rdzv_id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  05_scaling/run.py train --preset "$PRESET" --tokens "$TOKENS" --store "$STORE" \
  --parallel "$PARALLEL" &
ranks=$!

# A trapped signal ends the first wait early, the loop waits for what the ranks still save.
code=0
wait "$ranks" || code=$?
while kill -0 "$ranks" 2>/dev/null; do
  code=0
  wait "$ranks" || code=$?
done

if [ -n "$stopped" ]; then
  scontrol requeue "$SLURM_JOB_ID" # a job that meets its limit is not requeued by --requeue alone
  exit 0
fi
exit "$code"
