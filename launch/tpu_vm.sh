#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A LoRA of DeepSeek-R1 on 32 chips of TPU v5p: a queued resource, one process on each of its hosts.
# What has to be there first, and when to run which step: docs/tpu_pods.md.
#
#   PROJECT=... ZONE=... BUCKET=... NFS=ADDRESS:/runs bash launch/tpu_vm.sh STEP
set -euo pipefail

: "${PROJECT:?the project}" "${ZONE:?a zone with TPU v5p}"
: "${BUCKET:?the bucket that holds DeepSeek-R1/}" "${NFS:?the file server, such as 10.0.0.2:/runs}"
NAME=${NAME:-dsjax-r1}
TYPE=${TYPE:-v5p-64}    # counts cores: 32 chips, 8 hosts
TIER=${TIER---spot}     # --reserved for a reservation; empty for on-demand

place=(--project="$PROJECT" --zone="$ZONE")

on_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker="$1" --command="$2"
}

case "${1:-}" in
  create)
    gcloud compute tpus queued-resources create "$NAME" "${place[@]}" --node-id="$NAME" \
      --accelerator-type="$TYPE" --runtime-version=v2-alpha-tpuv5 \
      --scopes=https://www.googleapis.com/auth/cloud-platform ${TIER:+"$TIER"}
    ;;
  state) # goes on with `setup` when it says ACTIVE
    gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)'
    ;;
  setup)
    archive=$(mktemp --suffix=.tar.gz)
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME":dsjax.tar.gz "${place[@]}" --worker=all
    rm "$archive"
    on_hosts all "set -e
      sudo apt-get install -y nfs-common
      sudo mkdir -p /mnt/runs
      mountpoint -q /mnt/runs || sudo mount $NFS /mnt/runs
      sudo chmod 777 /mnt/runs
      mkdir -p dsjax && tar -xzf dsjax.tar.gz -C dsjax
      curl -LsSf https://astral.sh/uv/install.sh | sh
      ~/.local/bin/uv venv --clear --python 3.12 ~/env
      ~/.local/bin/uv pip install --python ~/env/bin/python './dsjax[tpu,gcs]'"
    ;;
  start) # the same command starts, continues after a stop, and finishes what is missing
    # A service: systemd sends it SIGTERM when the machine is told to stop, and waits.
    on_hosts all "sudo systemd-run --unit=dsjax --collect --uid=\$USER \
      --working-directory=\$HOME/dsjax --property=TimeoutStopSec=600 \
      --property=LimitMEMLOCK=infinity --property=LimitNOFILE=65536 \
      \$HOME/env/bin/python -m dsjax.train --config configs/deepseek_r1_lora.yaml \
      model.path=gs://$BUCKET/DeepSeek-R1 data.train=/mnt/runs/train.jsonl output_dir=/mnt/runs/r1"
    ;;
  log)
    on_hosts 0 "sudo journalctl --unit=dsjax --lines=100 --follow --output=cat"
    ;;
  errors) # the last words of every host
    on_hosts all "sudo journalctl --unit=dsjax --lines=20 --output=cat"
    ;;
  tensorboard) # then open http://localhost:6006
    gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=0 \
      --command="~/env/bin/tensorboard --logdir /mnt/runs/r1/tensorboard" -- -L 6006:localhost:6006
    ;;
  stop) # saves first
    on_hosts all "sudo systemctl stop dsjax"
    ;;
  fetch)
    gcloud compute tpus tpu-vm scp --recurse "$NAME":/mnt/runs/r1/export ./r1-adapter \
      "${place[@]}" --worker=0
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
    ;;
  *)
    echo "steps: create state setup start log errors tensorboard stop fetch delete" >&2
    exit 2
    ;;
esac
