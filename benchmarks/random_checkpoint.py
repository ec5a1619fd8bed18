"""Writes a Hugging Face directory with random weights of a given shape.

The defaults are the shape of E1-Math-7B (15.2 GB in bfloat16); about 1 GB is

    python benchmarks/random_checkpoint.py DST --hidden-size 1024 \
        --intermediate-size 5504 --num-layers 24 --num-heads 16 --num-kv-heads 4 \
        --head-dim 64 --vocab-size 32000
"""

import argparse
import functools
import json
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from e1jax.checkpoint.huggingface import write_hf_weights
from e1jax.checkpoint.lazy import Index, LazyArray, chunks_of
from e1jax.checkpoint.params import named_shapes
from e1jax.config.model import ModelConfig
from e1jax.tokenizer import write_byte_tokenizer

E1_MATH_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_layers": 28,
    "num_heads": 28,
    "num_kv_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random Qwen2 checkpoint.")
    parser.add_argument("dst", metavar="DST", type=Path, help="directory to write")
    for name, default in E1_MATH_7B.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=default, help=f"default {default}")
    parser.add_argument("--tied", action="store_true", help="no lm_head of its own")
    parser.add_argument("--dtype", default="bfloat16", help="default bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    args = parser.parse_args()
    config = ModelConfig(
        **{name: getattr(args, name) for name in E1_MATH_7B},
        rope_theta=10000.0,
        tie_word_embeddings=args.tied,
    )
    dtype = jnp.dtype(args.dtype)

    def read(name: str, part: Index) -> np.ndarray:
        # A generator per part, so that the numbers do not depend on the threads.
        starts = [span.start for span in part]
        rng = np.random.default_rng([args.seed, zlib.crc32(name.encode()), *starts])
        shape = [span.stop - span.start for span in part]
        middle = np.float32(name.endswith("scale"))
        values = rng.standard_normal(shape, np.float32)
        return (middle + np.float32(0.02) * values).astype(dtype)

    arrays = {
        name: LazyArray(
            shape, dtype, chunks_of(shape, dtype), functools.partial(read, name)
        )
        for name, shape in named_shapes(config).items()
    }
    write_byte_tokenizer(args.dst)
    (args.dst / "config.json").write_text(json.dumps(config.to_hf(args.dtype)))
    write_hf_weights(args.dst, config, dtype, arrays)


if __name__ == "__main__":
    main()
