#!/usr/bin/env bash
# Compiles the ImageNet step for whole TPU machines and writes docs/topologies.md; hours on two cores.
# Needs no TPU, but libtpu: pip install -e '.[tpu]'. Give machines to compile for these alone.
set -euo pipefail
cd "$(dirname "$0")/.."

reports=docs/results/topologies.json
if [ $# -eq 0 ]; then set -- v3:2x2 v4:2x2x4 v5e:4x4 v5e:16x16 v6e:2x4 v5p:2x4x4; fi
for topology in "$@"; do
  batch=256
  if [ "$topology" = v5e:16x16 ]; then batch=1024; fi  # groups of 4 rows on every device
  for size in b xl; do
    if [ "$size" = xl ]; then remat=dots; else remat=none; fi
    for axes in "-1 1" "1 -1"; do
      read -r data fsdp <<< "$axes"
      # Scanned, because compiling 12 or 28 blocks one by one takes many times as long.
      python -m shortcut_jax.main --config="configs/imagenet.py:$size" --dry_run \
        --topology="$topology" --report="$reports" --config.batch_size="$batch" \
        --config.model.scan_layers=True --config.model.remat="$remat" \
        --config.mesh.data="$data" --config.mesh.fsdp="$fsdp"
    done
  done
done
python -m shortcut_jax.topology_table "$reports" > docs/topologies.md
