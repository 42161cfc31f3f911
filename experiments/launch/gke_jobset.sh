#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster (the current context of kubectl) with JobSet installed:
#
#     NAME=... IMAGE=... CONFIG=... CLAIM=... TPU_TYPE=tpu-v6e-slice TPU_TOPOLOGY=4x4 HOSTS=4 \
#         CHIPS_PER_HOST=4 experiments/launch/gke_jobset.sh
set -euo pipefail
: "${NAME:?set the name of the run}"
: "${IMAGE:?set the image built from experiments/launch/Dockerfile}"
: "${CONFIG:?set the configuration file, such as configs/tiny.py}"
: "${CLAIM:?set the name of a ReadWriteMany PersistentVolumeClaim for the workdir}"
: "${TPU_TYPE:?set the label gke-tpu-accelerator of the nodes, such as tpu-v6e-slice}"
: "${TPU_TOPOLOGY:?set the label gke-tpu-topology of the nodes, such as 4x4}"
: "${HOSTS:?set the number of nodes of the slice}"
: "${CHIPS_PER_HOST:?set the number of chips of a node}"
export NAME IMAGE CONFIG CLAIM TPU_TYPE TPU_TOPOLOGY HOSTS CHIPS_PER_HOST

envsubst < "$(dirname "$0")/gke_jobset.yaml" | kubectl apply -f -
