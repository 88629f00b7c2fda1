#!/usr/bin/env bash
# One machine, one process per GPU, under torchrun.
# Example: PROCESSES=8 launch/one_node.sh configs/pretrain.yaml train.steps=1000
set -euo pipefail
PROCESSES=${PROCESSES:-$(nvidia-smi -L 2>/dev/null | wc -l)}
if [ "$PROCESSES" -eq 0 ]; then PROCESSES=1; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / PROCESSES > 0 ? $(nproc) / PROCESSES : 1))}
exec python -m torch.distributed.run --standalone --nproc_per_node "$PROCESSES" -m moe.launch.train "$@"
