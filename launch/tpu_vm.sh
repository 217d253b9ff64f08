#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A LoRA of DeepSeek-R1 on 32 chips of TPU v5p: a queued resource, one process on each of its hosts.
# What has to be there first, and when to run which step: docs/tpu_pods.md.
#
#   PROJECT=... ZONE=... BUCKET=... bash launch/tpu_vm.sh STEP
set -euo pipefail

: "${PROJECT:?the project}" "${ZONE:?a zone with TPU v5p}"
: "${BUCKET:?the bucket that holds DeepSeek-R1/ and train.jsonl, and where the run goes}"
NAME=${NAME:-dsjax-r1}
TYPE=${TYPE:-v5p-64}    # counts cores: 32 chips, 8 hosts
TIER=${TIER---spot}     # --reserved for a reservation; empty for on-demand

place=(--project="$PROJECT" --zone="$ZONE")

on_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker="$1" --command="$2"
}

state() { # nothing where there is no queued resource of this name
  gcloud compute tpus queued-resources list "${place[@]}" --filter="name~/$NAME\$" \
    --format='value(state.state)'
}

is_gone() { # what was taken away, or not granted, never becomes active again
  case "$(state)" in
    FAILED | SUSPENDING | SUSPENDED) true ;;
    *) false ;;
  esac
}

case "${1:-}" in
  up) # all it takes to train, as far as it is missing; after a pre-emption the same again
    if is_gone; then bash "$0" delete; fi
    if [ -z "$(state)" ]; then bash "$0" create; fi
    until [ "$(state)" = ACTIVE ]; do
      if is_gone; then
        echo "the slice was not granted, or taken away again; run the same command once more" >&2
        exit 1
      fi
      sleep 30
    done
    bash "$0" setup
    bash "$0" start
    ;;
  create)
    gcloud compute tpus queued-resources create "$NAME" "${place[@]}" --node-id="$NAME" \
      --accelerator-type="$TYPE" --runtime-version=v2-alpha-tpuv5 \
      --scopes=https://www.googleapis.com/auth/cloud-platform ${TIER:+"$TIER"}
    ;;
  state) # goes on with `setup` when it says ACTIVE
    state
    ;;
  setup) # not where it trains: that would take its environment away
    files=$(mktemp -d)
    trap 'rm -r "$files"' EXIT
    git archive --format=tar.gz --output="$files/dsjax.tar.gz" HEAD
    # In a file, since anybody on a machine can read the words of a command.
    (umask 077 && echo "${HF_TOKEN:+HF_TOKEN=$HF_TOKEN}" >"$files/dsjax.env")
    gcloud compute tpus tpu-vm scp "$files/dsjax.tar.gz" "$files/dsjax.env" "$NAME": \
      "${place[@]}" --worker=all
    on_hosts all "set -e
      chmod 600 dsjax.env
      if systemctl is-active --quiet dsjax; then exit; fi
      mkdir -p dsjax && tar -xzf dsjax.tar.gz -C dsjax
      curl -LsSf https://astral.sh/uv/install.sh | sh
      ~/.local/bin/uv venv --clear --python 3.12 ~/env
      ~/.local/bin/uv pip install --python ~/env/bin/python './dsjax[tpu,gcs]'"
    ;;
  start) # the same command starts, continues after a stop, and finishes what is missing
    # A service: systemd sends it SIGTERM when the machine is told to stop, and waits.
    on_hosts all "systemctl is-active --quiet dsjax || sudo systemd-run --unit=dsjax --collect \
      --uid=\$USER --working-directory=\$HOME/dsjax --property=TimeoutStopSec=600 \
      --property=LimitMEMLOCK=infinity --property=LimitNOFILE=65536 \
      --property=EnvironmentFile=\$HOME/dsjax.env \
      \$HOME/env/bin/python -m dsjax.train --config configs/deepseek_r1_lora.yaml \
      model.path=gs://$BUCKET/DeepSeek-R1 data.train=gs://$BUCKET/train.jsonl \
      output_dir=gs://$BUCKET/runs/r1"
    ;;
  log)
    on_hosts 0 "sudo journalctl --unit=dsjax --lines=100 --follow --output=cat"
    ;;
  errors) # the last words of every host
    on_hosts all "sudo journalctl --unit=dsjax --lines=20 --output=cat"
    ;;
  stop) # saves first
    on_hosts all "sudo systemctl stop dsjax"
    ;;
  fetch)
    mkdir -p r1-adapter
    gcloud storage rsync --recursive "gs://$BUCKET/runs/r1/export" r1-adapter
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
    ;;
  *)
    echo "steps: up create state setup start log errors stop fetch delete" >&2
    exit 2
    ;;
esac
