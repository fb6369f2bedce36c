#!/usr/bin/env bash
# Install packages into a virtual environment, which is made if there is none, and say every five
# seconds how far it is: pip alone is silent for up to a minute.
#
# Usage: target/install.bash PYTHON ENVIRONMENT REQUIREMENTS
set -euo pipefail
python=$1 environment=$2 requirements=$3

test -x "$environment/bin/python" || "$python" -m venv "$environment"
echo "Installing the packages of $requirements into $environment, TensorFlow among them: about"
echo "2.5 GB on the disk; one or two minutes with a fast network. Later runs skip this."
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements" &
pip=$!
trap 'kill "$pip" 2> /dev/null || true' EXIT
for ((seconds = 1; ; seconds++)); do
    sleep 1
    kill -0 "$pip" 2> /dev/null || break
    if ((seconds % 5 == 0)); then
        echo "  $seconds s: $(du -sh "$environment" | cut -f1) installed"
    fi
done
wait "$pip"
