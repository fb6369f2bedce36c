#!/bin/bash
# CloudMask on Pearl (STFC), two DGX-2 with 16 V100 each, Slurm. From the repository's folder:
#   sbatch target/pearl.sh                                   one DGX-2, 16 V100
#   sbatch --gres=gpu:4 --cpus-per-task=24 target/pearl.sh   four V100
#   sbatch --nodes=2 target/pearl.sh                         both, 32 V100
# Arguments after the script's name go to the program; CLOUDMASK_CONFIG selects another config.yaml.
# Decoded scenes on the node's own disk: target/pearl.sh --set 'cache_dir=/raid/$USER/cloudmask'
#SBATCH --job-name=cloudmask
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --partition=pearl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --gres=gpu:16
#SBATCH --time=2:00:00
set -e
# Once, with a conda of your own: conda env create -f environment.yml; conda activate cloudmask;
# pip install "tensorflow[and-cuda]". It includes CUDA: load no modules for it.
eval "$(conda shell.bash hook)"
conda activate cloudmask
source target/requeue.bash    # at the time limit: save a checkpoint, requeue
# When a rank fails, the others have 90 s to report why before Slurm kills them.
requeue_unless_done srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait=90 \
    python slstr_cloud.py ${CLOUDMASK_CONFIG:+--config "$CLOUDMASK_CONFIG"} "$@"
