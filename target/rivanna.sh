#!/bin/bash
# CloudMask on Rivanna (University of Virginia), Slurm. From the repository's folder, group GROUP:
#   sbatch -A GROUP target/rivanna.sh                                 one node, one A100
#   sbatch -A GROUP --gres=gpu:a100:4 target/rivanna.sh               one node, four A100
#   sbatch -A GROUP --nodes=2 --ntasks-per-node=1 target/rivanna.sh   two nodes, one A100 each
# Arguments after the script's name go to the program; CLOUDMASK_CONFIG selects another config.yaml.
# Decoded scenes on the node's own disk: target/rivanna.sh --set 'cache_dir=/tmp/$USER/cloudmask'
#SBATCH --job-name=cloudmask
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --partition=gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:a100:1
#SBATCH --mem=64G
#SBATCH --time=12:00:00
set -e
# Once: conda env create -f environment.yml; conda activate cloudmask; pip install
# "tensorflow[and-cuda]". It includes CUDA: load no modules tensorflow, cudatoolkit, cuda or cudnn.
module load miniforge
eval "$(conda shell.bash hook)"
conda activate cloudmask
source target/requeue.bash    # at the time limit: save a checkpoint, requeue
# When a rank fails, the others have 90 s to report why before Slurm kills them.
requeue_unless_done srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait=90 \
    python slstr_cloud.py ${CLOUDMASK_CONFIG:+--config "$CLOUDMASK_CONFIG"} "$@"
