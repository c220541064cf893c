"""Synthetic Llama checkpoints: a base and three experts in bf16, seeded, made in seconds.

    python -m benchmarks.synthetic tiny 0.5b        # makes the sets below .cache/bench/

Weights are normal with standard deviation 0.02 (norm weights: around one); expert k is the base plus noise of 1, 1.5
or 2 % of that, so that, as in real fine-tunes, a task vector is a few bf16 steps of most weights and nought for some.

**How the 7b set fits on a disk.** Four checkpoints of 13.5 GB do not. A safetensors header names its tensors, so one
file can never stand for two layers of the same model; two things are free, and both are used:

* *hard links across checkpoints*: the file of layer i has the same header in every checkpoint. Expert c owns no file:
  its files are links to expert a's and expert b's in turn (so two of the experts always agree, and the third does not);
* *holes*: of every megabyte the first eighth is written and the rest is left sparse (reads as zeros). Every engine
  block of a megabyte or more holds a mixture, and a reader moves all 54 GB through the page cache as it would for
  dense files, but the set takes about 5 GB, and the time measured is that of the program, not of the disk.

The price: seven eighths of its weights and deltas are exactly zero. The 7b set shows whether time is linear and memory
flat at that shape; the dense 0.5b and 1.5b sets are the ones whose times are compared between programs.
"""

import argparse
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "bench"
EXPERTS = ("a", "b", "c")
DELTA_SCALES = (0.010, 0.015, 0.020)
"""Standard deviation of each expert's noise, as a share of the weights' own."""
WEIGHT_STD = 0.02
CHUNK = 1 << 19
"""Elements (1 MB of bf16) drawn from one random stream; part of the format: changing it changes the values."""
FORMAT = 1
"""Raise when the bytes of a set change, so that old sets are made anew."""

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Size:
    """Shapes of one synthetic set (Llama, untied head, bf16).

    Arguments:
        name: the set's name and its folder's.
        hidden, intermediate, layers, heads, kv_heads, vocab: as in a Llama config.
        shards: "one" file, "gigabyte" (a new file every ~1 GB) or "layer" (one file per layer).
        written: the share of every chunk that is written; the rest is a hole.
        linked: whether expert c consists of hard links to a's and b's files.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    shards: str = "one"
    written: float = 1.0
    linked: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape in the order Hugging Face writes them."""
        h, i = self.hidden, self.intermediate
        kv = h // self.heads * self.kv_heads
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, h)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            shapes |= {
                prefix + "input_layernorm.weight": (h,),
                prefix + "mlp.down_proj.weight": (h, i),
                prefix + "mlp.gate_proj.weight": (i, h),
                prefix + "mlp.up_proj.weight": (i, h),
                prefix + "post_attention_layernorm.weight": (h,),
                prefix + "self_attn.k_proj.weight": (kv, h),
                prefix + "self_attn.o_proj.weight": (h, h),
                prefix + "self_attn.q_proj.weight": (h, h),
                prefix + "self_attn.v_proj.weight": (kv, h),
            }
        return shapes | {"model.norm.weight": (h,), "lm_head.weight": (self.vocab, h)}

    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(int(np.prod(shape)) for shape in self.tensors().values())

    def bytes_written(self) -> int:
        """Return about how many bytes of disk the whole set takes."""
        models = len(EXPERTS) if self.linked else 1 + len(EXPERTS)
        return int(2 * self.parameters() * self.written * models)


SIZES = {
    size.name: size
    for size in (
        Size("tiny", hidden=64, intermediate=176, layers=8, heads=4, kv_heads=2, vocab=1024),
        Size("many", hidden=8, intermediate=16, layers=2222, heads=2, kv_heads=1, vocab=64),
        Size("0.5b", hidden=1024, intermediate=2816, layers=38, heads=16, kv_heads=4, vocab=32000),
        Size("1.5b", 2048, 5632, layers=30, heads=32, kv_heads=8, vocab=32000, shards="gigabyte"),
        Size(
            "7b", 4096, 11008, layers=32, heads=32, kv_heads=32, vocab=32000, shards="layer", written=1 / 8, linked=True
        ),
    )
}


@dataclass(frozen=True)
class SyntheticSet:
    """Where a set lies: the base's folder and the experts', by name."""

    size: Size
    folder: Path

    @property
    def base(self) -> Path:
        """The base's folder."""
        return self.folder / "base"

    @property
    def experts(self) -> dict[str, Path]:
        """The experts' folders by name."""
        return {name: self.folder / name for name in EXPERTS}


@dataclass(frozen=True)
class _Shard:
    """One file: its name, its tensors with their place in the model, and the bytes before the data."""

    file: str
    tensors: tuple[tuple[int, str, tuple[int, ...]], ...]

    def header(self) -> bytes:
        """Return the length and the JSON header, padded so that the data start at a multiple of eight."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for _, name, shape in self.tensors:
            end = offset + 2 * int(np.prod(shape))
            entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def data_bytes(self) -> int:
        """Return the length of the data."""
        return sum(2 * int(np.prod(shape)) for _, _, shape in self.tensors)


def _shards(size: Size) -> list[_Shard]:
    """Split a model's tensors over files."""
    groups: list[list[tuple[int, str, tuple[int, ...]]]] = [[]]
    filled, owner = 0, None
    for index, (name, shape) in enumerate(size.tensors().items()):
        count = 2 * int(np.prod(shape))
        layer = name.split(".")[2] if ".layers." in name else name.split(".")[0]
        full = (size.shards == "gigabyte" and filled + count > 10**9) or (size.shards == "layer" and layer != owner)
        if full and groups[-1]:
            groups.append([])
            filled = 0
        groups[-1].append((index, name, shape))
        filled, owner = filled + count, layer
    if len(groups) == 1:
        return [_Shard("model.safetensors", tuple(groups[0]))]
    return [
        _Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    ]


def round_to_bf16(values: Floats) -> Halves:
    """Return the bits of ``values`` (finite) rounded to bfloat16, ties to even."""
    bits = values.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    return rounded.astype(np.uint16)


def from_bf16(halves: Halves) -> Floats:
    """Return bfloat16 bits as float32 values."""
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


_scratch = threading.local()


def _normal(seed: tuple[int, ...], count: int) -> Floats:
    """Draw ``count`` normal values from the stream named by ``seed`` into this thread's own buffer."""
    buffer: Floats | None = getattr(_scratch, "buffer", None)
    if buffer is None:
        buffer = _scratch.buffer = np.empty(CHUNK, np.float32)
    out = buffer[:count]
    np.random.Generator(np.random.SFC64(list(seed))).standard_normal(dtype=np.float32, out=out)
    return out


def _chunk_values(seed: int, tensor: int, chunk: int, count: int, *, norm: bool) -> Iterator[Halves]:
    """Yield the base's values of one chunk, then each expert's: streams are keyed by position, so thread-proof."""
    values = _normal((seed, tensor, chunk, 0), count)
    values *= WEIGHT_STD
    if norm:
        values += 1.0
    base = round_to_bf16(values)
    yield base
    exact = from_bf16(base)
    for number, scale in enumerate(DELTA_SCALES, 1):
        values = _normal((seed, tensor, chunk, number), count)
        values *= scale * WEIGHT_STD
        values += exact
        yield round_to_bf16(values)


def _write_shard(size: Size, seed: int, shard: _Shard, folders: list[Path], pool: ThreadPoolExecutor) -> None:
    """Write one shard of every model in ``folders`` (the base first), chunk by chunk."""
    header = shard.header()
    files = [os.open(folder / shard.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) for folder in folders]
    try:
        for file in files:
            os.pwrite(file, header, 0)
            os.ftruncate(file, len(header) + shard.data_bytes())

        def fill(job: tuple[int, int, int, int, bool]) -> None:
            tensor, chunk, count, offset, norm = job
            for file, values in zip(files, _chunk_values(seed, tensor, chunk, count, norm=norm), strict=False):
                os.pwrite(file, values.data, offset)

        for _ in pool.map(fill, _chunk_jobs(size, shard, len(header))):
            pass
    finally:
        for file in files:
            os.close(file)


def _chunk_jobs(size: Size, shard: _Shard, offset: int) -> Iterator[tuple[int, int, int, int, bool]]:
    """Yield (tensor, chunk, elements to write, byte offset, is a norm) for one shard."""
    limit = max(1, int(CHUNK * size.written))
    for tensor, name, shape in shard.tensors:
        total = int(np.prod(shape))
        for chunk in range(-(-total // CHUNK)):
            start = chunk * CHUNK
            yield tensor, chunk, min(total - start, limit), offset + 2 * start, name.endswith("norm.weight")
        offset += 2 * total


def _write_side_files(size: Size, shards: list[_Shard], folder: Path) -> None:
    """Write the config, a small word-level tokenizer and, for several shards, the index."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": size.hidden // size.heads,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initializer_range": WEIGHT_STD,
        "intermediate_size": size.intermediate,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": size.vocab,
    }
    special = ("<unk>", "<s>", "</s>")
    vocabulary = {token: i for i, token in enumerate((*special, *(f"w{i}" for i in range(size.vocab - len(special)))))}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, token in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 2048,
    }
    written: dict[str, object] = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
    }
    if len(shards) > 1:
        written["model.safetensors.index.json"] = {
            "metadata": {"total_size": sum(shard.data_bytes() for shard in shards)},
            "weight_map": {name: shard.file for shard in shards for _, name, _ in shard.tensors},
        }
    for file, value in written.items():
        (folder / file).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def generate(
    size: Size,
    folder: Path,
    *,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SyntheticSet:
    """Write a base and its three experts below ``folder`` (emptied first) and return where they lie.

    The bytes depend on the size and the seed alone: every chunk has its own random stream.

    Arguments:
        size: the shapes.
        folder: becomes the parent of ``base``, ``a``, ``b`` and ``c``.
        seed: names the random streams.
        threads: workers; all cores by default. Each holds a few megabytes.
        progress: called after every shard with (shards done, shards in all).
    """
    if folder.exists():
        shutil.rmtree(folder)
    made = SyntheticSet(size, folder)
    folders = [made.base, *made.experts.values()]
    shards = _shards(size)
    for model in folders:
        model.mkdir(parents=True)
        _write_side_files(size, shards, model)
    own = folders[:-1] if size.linked else folders
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for number, shard in enumerate(shards):
            _write_shard(size, seed, shard, own, pool)
            if size.linked:
                os.link(folders[1 + number % 2] / shard.file, folders[-1] / shard.file)
            if progress is not None:
                progress(number + 1, len(shards))
    stamp = {"format": FORMAT, "seed": seed, "size": asdict(size)}
    (folder / "complete.json").write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    return made


def ensure(
    name: str,
    cache: Path = CACHE,
    *,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SyntheticSet:
    """Return the set called ``name``, making it when it is absent, half made or of another format.

    Raises:
        KeyError: no such size.
        OSError: the disk is too full for it (said before anything is written).
    """
    size = SIZES[name]
    folder = cache / name
    stamp = folder / "complete.json"
    wanted = {"format": FORMAT, "seed": seed, "size": asdict(size)}
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return SyntheticSet(size, folder)
    if folder.exists():
        shutil.rmtree(folder)
    cache.mkdir(parents=True, exist_ok=True)
    require_free(cache, size.bytes_written() + (1 << 30), f"the {name} set")
    made = generate(size, folder, seed=seed, threads=threads, progress=progress)
    # Gigabytes of dirty pages would otherwise be written back during the first measurements.
    os.sync()
    return made


def require_free(folder: Path, needed: int, what: str) -> None:
    """Raise OSError unless the file system of ``folder`` has ``needed`` bytes free for ``what``."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{what} needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")


def weight_files(folder: Path) -> list[Path]:
    """Return a checkpoint's safetensors files in order."""
    return sorted(folder.glob("*.safetensors"))


def main() -> None:
    """Make the sets named on the command line."""
    parser = argparse.ArgumentParser(description="Make synthetic Llama checkpoints: a base and three experts.")
    parser.add_argument("sizes", nargs="+", choices=sorted(SIZES))
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    for name in options.sizes:
        start = time.perf_counter()
        made = ensure(name, options.cache, threads=options.threads)
        files = itertools.chain.from_iterable(weight_files(model) for model in (made.base, *made.experts.values()))
        inodes = {(stat := file.stat()).st_ino: 512 * stat.st_blocks for file in files}
        print(
            f"{name}: {made.size.parameters() / 1e9:.3f} B parameters, {len(made.size.tensors())} tensors, "
            f"{sum(inodes.values()) / 1e9:.2f} GB on disk, {time.perf_counter() - start:.1f} s -> {made.folder}"
        )


if __name__ == "__main__":
    main()
