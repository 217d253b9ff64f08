#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A LoRA of DeepSeek-R1 on 32 chips of TPU v5p on GKE: xpk makes the cluster and the JobSet.
# What has to be there first, and when to run which step: docs/tpu_pods.md.
#
#   PROJECT=... ZONE=... BUCKET=... IMAGE=... bash launch/gke_xpk.sh STEP
set -euo pipefail

: "${PROJECT:?the project}" "${ZONE:?a zone with TPU v5p}"
: "${BUCKET:?the bucket that holds DeepSeek-R1/ and train.jsonl, and where the run goes}"
: "${IMAGE:?where the image goes, such as us-east5-docker.pkg.dev/PROJECT/dsjax/dsjax:1}"
CLUSTER=${CLUSTER:-dsjax}
TYPE=${TYPE:-v5p-64}    # counts cores: 32 chips, 8 hosts
TIER=${TIER:---spot}    # or --on-demand, or --reservation=NAME

place=(--cluster "$CLUSTER" --project="$PROJECT" --zone="$ZONE")

case "${1:-}" in
  create)
    xpk cluster create "${place[@]}" --tpu-type="$TYPE" --num-slices=1 "$TIER"
    ;;
  image)
    docker build --file launch/Dockerfile --build-arg EXTRAS=tpu,gcs --tag "$IMAGE" .
    docker push "$IMAGE"
    ;;
  start) # the same command starts, continues after a stop, and finishes what is missing
    # In a file, since anybody on this machine can read the words of a command.
    env=$(mktemp)
    trap 'rm "$env"' EXIT
    echo "${HF_TOKEN:+HF_TOKEN=$HF_TOKEN}" >"$env"
    # xpk restarts what ended by a signal (128 + 15 too) or lost its machine, and not what was
    # refused (2). `exec`, so that the signal that it passes on reaches Python and not a shell.
    xpk workload create "${place[@]}" --workload dsjax-r1 --tpu-type="$TYPE" --num-slices=1 \
      --docker-image="$IMAGE" --env-file="$env" --max-restarts=50 \
      --termination-grace-period-seconds=600 \
      --command="exec python -m dsjax.train --config configs/deepseek_r1_lora.yaml model.path=gs://$BUCKET/DeepSeek-R1 data.train=gs://$BUCKET/train.jsonl output_dir=gs://$BUCKET/runs/r1"
    ;;
  list)
    xpk workload list "${place[@]}"
    ;;
  stop) # saves first
    xpk workload delete "${place[@]}" --workload dsjax-r1
    ;;
  delete) # the bucket stays
    xpk cluster delete "${place[@]}"
    ;;
  *)
    echo "steps: create image start list stop delete" >&2
    exit 2
    ;;
esac
