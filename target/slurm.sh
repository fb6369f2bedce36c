#!/bin/bash
# CloudMask on any Slurm cluster. Set the variables below here or in the environment, then start this
# script from the repository's folder. It submits itself; arguments go to the program,
# whose options `python slstr_cloud.py --help` shows:
#   target/slurm.sh --config config.yaml
#   CLOUDMASK_ACCOUNT=group CLOUDMASK_GPUS=a100:4 CLOUDMASK_NODES=2 target/slurm.sh --set epochs=100
# With SBATCH_WAIT=1 it waits for the end of the job, for tools/repeat.py and tools/scaling.py. With
# sbatch -A group --nodes=2 --gres=gpu:4 target/slurm.sh the options of sbatch count instead.
#SBATCH --job-name=cloudmask
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --ntasks-per-node=1

# The job; an empty value means the default of the cluster
account=${CLOUDMASK_ACCOUNT-}            # who pays
partition=${CLOUDMASK_PARTITION-}
nodes=${CLOUDMASK_NODES-1}
gpus=${CLOUDMASK_GPUS-1}                 # per node, with a type if needed: a100:4; empty: none
cpus=${CLOUDMASK_CPUS-8}                 # per node
memory=${CLOUDMASK_MEMORY-64G}           # per node
time_limit=${CLOUDMASK_TIME-12:00:00}
# Where the packages are: the first of these three that is not empty
container=${CLOUDMASK_CONTAINER-}        # cloudmask.sif, made from target/cloudmask.def
conda_environment=${CLOUDMASK_CONDA-}    # made by: conda env create -f environment.yml
venv=${CLOUDMASK_VENV-.venv}             # made by `make demo`
modules=${CLOUDMASK_MODULES-}            # to load before, for example: apptainer, miniforge

set -e
if [ -z "$SLURM_JOB_ID" ] && [[ $1 = -h || $1 = --help ]]; then
    sed '1d; /^set -e/,$d' "$0"    # comments and variables above
    exit
fi
if [ -z "$SLURM_JOB_ID" ]; then
    exec sbatch ${account:+--account="$account"} ${partition:+--partition="$partition"} \
        ${nodes:+--nodes="$nodes"} ${gpus:+--gres="gpu:$gpus"} ${cpus:+--cpus-per-task="$cpus"} \
        ${memory:+--mem="$memory"} ${time_limit:+--time="$time_limit"} "$0" "$@"
fi
for module in $modules; do module load "$module"; done
python=(python)
# On NVIDIA GPUs, once: pip install "tensorflow[and-cuda]". It includes CUDA: load no module for it.
if [ -n "$container" ]; then
    # Folders outside of home and the current one, such as those of scenes: export APPTAINER_BIND
    python=(apptainer exec ${gpus:+--nv} "$container" python)
elif [ -n "$conda_environment" ]; then
    eval "$(conda shell.bash hook)"
    conda activate "$conda_environment"
else
    # shellcheck source=/dev/null
    source "$venv/bin/activate"
fi
source target/requeue.bash    # at the time limit: save a checkpoint, requeue
# When a rank fails, the others have 90 s to report why before Slurm kills them.
requeue_unless_done srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --wait=90 \
    "${python[@]}" slstr_cloud.py ${CLOUDMASK_CONFIG:+--config "$CLOUDMASK_CONFIG"} "$@"
