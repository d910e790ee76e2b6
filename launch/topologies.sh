#!/usr/bin/env bash
# Compiles the ImageNet step for whole TPU machines and writes docs/topologies.md; hours on two cores.
# Needs no TPU, but libtpu: pip install -e '.[tpu]'. Give machines to compile for these alone.
set -euo pipefail
cd "$(dirname "$0")/.."

reports=docs/results/topologies.json
if [ $# -eq 0 ]; then set -- v3:2x2 v4:2x2x4 v5e:4x4 v5e:16x16 v6e:2x4 v5p:2x4x4; fi
for topology in "$@"; do
  batch=256 sharded=-1
  # Groups of 4 rows on each of 256 devices; 1,152, the width of XL, is no multiple of 256.
  if [ "$topology" = v5e:16x16 ]; then batch=1024 sharded=128; fi
  for size in b xl; do
    for fsdp in 1 "$sharded"; do
      if [ "$fsdp" = -1 ]; then data=1; else data=-1; fi
      python -m shortcut_jax.main --config="configs/imagenet.py:$size" --dry_run \
        --topology="$topology" --report="$reports" --config.batch_size="$batch" \
        --config.mesh.data="$data" --config.mesh.fsdp="$fsdp"
    done
  done
done
python -m shortcut_jax.planning.topology_table "$reports" > docs/topologies.md
