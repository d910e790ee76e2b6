"""Writes shardings.txt: how sharding.RULES split every parameter of DiT-B/2 and DiT-XL/2.

python -m tests.golden.make_shardings

Blocks are alike, so one stands for all of them. Nothing is compiled and no device is needed.
"""

import functools
from pathlib import Path

import jax
from jax.sharding import AbstractMesh

from configs import imagenet
from shortcut_jax import config as config_lib
from shortcut_jax import layers, state
from shortcut_jax.parallel import sharding

FSDP = (8, 64, 256)
LATENTS, NUM_CLASSES = (32, 32, 4), 1000


def specs(shapes, fsdp: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> shape and how it is split."""
    placed = sharding.shard_tree(shapes, AbstractMesh((1, fsdp), sharding.AXES))
    named = jax.tree_util.tree_leaves_with_path(shapes)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            leaf.shape,
            ", ".join(axis or "-" for axis in s.spec) or "replicated",
        )
        for (path, leaf), s in zip(named, jax.tree.leaves(placed), strict=True)
    }


def table() -> str:
    """The text of the file."""
    lines = []
    for size in ("b", "xl"):
        config = imagenet.get_config(size)
        config.model.scan_layers = False
        objective = config_lib.build_objective(config, NUM_CLASSES)
        network = state.build_network(config, objective, LATENTS)
        unrolled = jax.eval_shape(functools.partial(state.init_params, network, LATENTS, seed=0))
        scanned = jax.eval_shape(layers.stack, unrolled)
        for layout, shapes in (("unrolled", unrolled), ("scanned", scanned)):
            lines.append(f"DiT-{size.upper()}/2, {layout}")
            by_size = [specs(shapes, fsdp) for fsdp in FSDP]
            others = tuple(f"{layers.PREFIX}{i}/" for i in range(1, network.depth))
            for name, (shape, _) in by_size[0].items():
                found = {fsdp: s[name][1] for fsdp, s in zip(FSDP, by_size, strict=True)}
                if name.startswith(others):
                    twin = f"{layers.PREFIX}0/{name.partition('/')[2]}"
                    assert all(s[name] == s[twin] for s in by_size), name
                    continue
                if len(set(found.values())) == 1:
                    how = found[FSDP[0]]
                else:
                    how = "; ".join(f"fsdp={n}: {split}" for n, split in found.items())
                lines.append(f"  {name:<28} {'x'.join(map(str, shape)):<16} {how}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "shardings.txt").write_text(table())
