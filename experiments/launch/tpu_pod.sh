#!/usr/bin/env bash
# Trains on every host of a Cloud TPU slice that is up. Arguments are further flags of the trainer:
#
#     PROJECT=... ZONE=... TPU=... CONFIG=... WORKDIR=... \
#         experiments/launch/tpu_pod.sh --config.model.width=1024
set -euo pipefail
: "${PROJECT:?set the Google Cloud project}"
: "${ZONE:?set the zone of the TPU, such as us-east5-b}"
: "${TPU:?set the name of the TPU VM}"
: "${CONFIG:?set the configuration file, such as configs/tiny.py}"
: "${WORKDIR:?set a folder on a file system that all hosts mount at the same path}"

code=$(mktemp)
trap 'rm -f "$code"' EXIT
git -C "$(dirname "$0")/../.." archive --format=tar.gz --output="$code" HEAD

on_all_hosts=(--project="$PROJECT" --zone="$ZONE" --worker=all)
printf -v train '%q ' \
  .venv/bin/python -m experiments.train --config="$CONFIG" --workdir="$WORKDIR" "$@"

gcloud compute tpus tpu-vm scp "$code" "$TPU:mup_jax.tar.gz" "${on_all_hosts[@]}"
gcloud compute tpus tpu-vm ssh "$TPU" "${on_all_hosts[@]}" --command="
  set -e
  mkdir -p mup_jax && cd mup_jax && tar -xzf ../mup_jax.tar.gz
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --allow-existing --python 3.12
  python3 -m uv pip install --quiet -c constraints.txt -e '.[train]' 'jax[tpu]'
  exec $train"
