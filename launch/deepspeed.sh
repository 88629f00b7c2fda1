#!/usr/bin/env bash
# DeepSpeed's own launcher: over ssh to the machines of a hostfile, or on this one without.
# Example: HOSTFILE=launch/hostfile.example launch/deepspeed.sh configs/pretrain.yaml
# Without GPUs: DS_ACCELERATOR=cpu PROCESSES=2 launch/deepspeed.sh configs/tiny.yaml
set -euo pipefail
arguments=()
if [ -n "${HOSTFILE:-}" ]; then arguments+=(--hostfile "$HOSTFILE"); fi
if [ -n "${PROCESSES:-}" ]; then arguments+=(--num_accelerators "$PROCESSES"); fi
exec deepspeed "${arguments[@]}" --module moe.launch.train "$@"
