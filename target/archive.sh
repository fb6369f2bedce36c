#!/bin/bash
# Masks an archive by a Slurm job array of N tasks; submit it from the repository's folder:
#   sbatch -A GROUP --array=0-9 --gres=gpu:1 target/archive.sh MODEL SCENES N [OUTPUT]
# SCENES is a folder, or a text file with one path per line. The same command again continues tasks
# that were stopped, and masks scenes that are new. Another MODEL, SCENES or N needs another OUTPUT.
#SBATCH --job-name=archive
#SBATCH --output=%x-%A_%a.out
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
set -e
if [ $# -lt 3 ]; then
    sed '1d; /^set -e/,$d' "$0" >&2    # the comment above
    exit 2
fi
model=$1 scenes=$2 n=$3 output=${4-outputs/archive}
venv=${CLOUDMASK_VENV-.venv}    # empty: python is on the PATH; or CLOUDMASK_CONDA, an environment
if [ -n "$CLOUDMASK_CONDA" ]; then
    eval "$(conda shell.bash hook)"
    conda activate "$CLOUDMASK_CONDA"
elif [ -n "$venv" ]; then
    # shellcheck source=/dev/null
    source "$venv/bin/activate"
fi
name=shard-$SLURM_ARRAY_TASK_ID
settings=("model_file=$model" "inference_dir=$scenes" "shard=$SLURM_ARRAY_TASK_ID/$n")
if [ -d "$output/$name" ]; then
    exec python slstr_cloud.py --resume "$output/$name" --set "${settings[@]}"
fi
exec python slstr_cloud.py --mode inference --set "${settings[@]}" \
    "output_dir=$output" "run_name=$name" on_bad_scene=skip
