#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A LoRA of DeepSeek-V2 on two hosts of 8 GPUs by Open MPI, one process a host; docs/cuda_clusters.md.
#
#   HOSTS=node1,node2 MODEL=... DATA=... RUN=... bash launch/openmpi.sh
set -euo pipefail

: "${HOSTS:?names of the hosts, the first is where they meet}"
: "${MODEL:?the checkpoint}" "${DATA:?the rows}" "${RUN:?the output directory, of all hosts, or a URL}"
COORDINATOR="${HOSTS%%,*}:8476"
export COORDINATOR MODEL DATA RUN

count=$(tr ',' '\n' <<<"$HOSTS" | wc -l)

# --bind-to none: else each process has one core for all its threads.
mpirun -np "$count" --host "$HOSTS" --map-by ppr:1:node --bind-to none \
  -x COORDINATOR -x MODEL -x DATA -x RUN ${HF_TOKEN:+-x HF_TOKEN} bash -c '
  exec .venv/bin/python -m dsjax.train --config configs/deepseek_v2_lora.yaml \
    --coordinator "$COORDINATOR" --processes "$OMPI_COMM_WORLD_SIZE" \
    --process "$OMPI_COMM_WORLD_RANK" \
    model.path=$MODEL data.train=$DATA output_dir=$RUN training.gradient_accumulation_steps=2'
