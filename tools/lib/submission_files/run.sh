#!/usr/bin/env bash
# Repeats the runs of this submission:
#   CLOUDMASK=checkout bash run.sh [--set train_dir=... inference_dir=...]
# where checkout is the benchmark at the commit in config.yaml. The runs are written to outputs/ next
# to this file. On several nodes set START to the scheduler's command, for example START=srun.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
commit=$(sed -n 's/^  github_commit_version: //p' "$here/config.yaml" | tr -d "'")
cd "${CLOUDMASK:?set it to a checkout of the benchmark}"
found=$(git describe --always --abbrev=40 --dirty '--exclude=*')
if [ "$found" != "$commit" ]; then
    echo "Error: $CLOUDMASK should be at commit $commit without changes, found $found." >&2
    exit 2
fi
for log in "$here"/result-*.txt; do
    ${START:-} python slstr_cloud.py --config "$here/config.yaml" \
        --set run_name="$(basename "$log" .txt)" output_dir="$here/outputs" "$@"
done
