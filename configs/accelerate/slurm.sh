#!/bin/bash
# CPC v2 on two machines of eight GPUs under SLURM: sbatch configs/accelerate/slurm.sh [overrides]
# With other machines: sbatch --nodes=4 --gpus-per-node=4 ... A queue that pre-empts or times out asks two minutes before;
# the run saves, leaves, and, queued again under the same name, goes on. Tried without GPUs, docs/clusters.md.
#SBATCH --job-name=cpc
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # which srun no longer takes over from sbatch by itself
export RUN_DIR=${RUN_DIR:-runs/$SLURM_JOB_NAME} MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export GPUS=${SLURM_GPUS_ON_NODE:-1}  # as many processes a machine; one where there are none
export OVERRIDES="${*:-experiment=imagenet_cpc_v2 data.root=/data/imagenet}"
srun bash -c 'exec accelerate launch --config_file configs/accelerate/two_nodes.yaml \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * GPUS)) \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN" \
    tools/pretrain_cpc.py $OVERRIDES run_dir="$RUN_DIR" resume=auto'
