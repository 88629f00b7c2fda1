#!/usr/bin/env bash
# Several machines under torchrun; run it on every one of them, with the same arguments.
# Example, on each of 4 nodes: NODES=4 HEAD=node0:29500 launch/many_nodes.sh configs/pretrain.yaml
# MAX_RESTARTS=3 starts all ranks again after one was lost; MIN_NODES=2 also goes on with fewer machines. Add --resume then.
set -euo pipefail
NODES=${NODES:?set NODES to the number of machines}
HEAD=${HEAD:?set HEAD to host:port of one of the machines, the same on all}
PROCESSES=${PROCESSES:-$(nvidia-smi -L 2>/dev/null | wc -l)}
if [ "$PROCESSES" -eq 0 ]; then PROCESSES=1; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / PROCESSES > 0 ? $(nproc) / PROCESSES : 1))}
exec python -m torch.distributed.run --nnodes "${MIN_NODES:-$NODES}:$NODES" --nproc_per_node "$PROCESSES" \
  --max_restarts "${MAX_RESTARTS:-0}" --rdzv_backend c10d --rdzv_endpoint "$HEAD" --rdzv_id "${RUN_ID:-moe}" \
  -m moe.launch.train "$@"
