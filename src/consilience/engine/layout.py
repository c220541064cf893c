"""Where every output byte goes, known before any is computed."""

from collections.abc import Sequence
from dataclasses import dataclass

from consilience.checkpoints.dtypes import DType
from consilience.checkpoints.modules import MODULE_FILE, module_of
from consilience.checkpoints.safetensors_file import encode_header


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file of the output: its name, the bytes before its data, and its size."""

    name: str
    header: bytes
    size: int

    @property
    def beginning(self) -> str:
        """What the names of its tensors begin with in the plan: the module's folder, or nothing."""
        folder, slash, _ = self.name.rpartition("/")
        return folder + slash


@dataclass(frozen=True)
class Layout:
    """The output's files, and for each tensor its file number and absolute offset there."""

    files: tuple[OutputFile, ...]
    places: dict[str, tuple[int, int]]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def _shards(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Cut positions 0..n-1 into runs of at most ``limit`` bytes (a larger tensor has a shard of its own)."""
    shards: list[list[int]] = [[]]
    filled = 0
    for position, size in enumerate(sizes):
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(position)
        filled += size
    return shards


def plan_layout(
    tensors: Sequence[tuple[str, DType, tuple[int, ...], int]],
    shard_size: int,
    metadata: dict[str, str],
    single: str = "model.safetensors",
    modules: Sequence[str] = (),
) -> Layout:
    """Lay ``(name, dtype, shape, bytes)`` out in files of at most ``shard_size`` bytes of data, in the given order.

    Within a file wider element types come first, so that every tensor is aligned to its element size. The tensors of a
    module in a subfolder have a file of their own there.
    """
    main = [tensor for tensor in tensors if module_of(tensor[0], modules) is None]
    shards = [[main[i] for i in shard] for shard in _shards([size for *_, size in main], shard_size)] if main else []
    stem = single.removesuffix(".safetensors")
    shard_names = [f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    contents = dict(zip(shard_names if len(shards) > 1 else [single], shards, strict=False))
    for module in modules:
        contents[f"{module}/{MODULE_FILE}"] = [t for t in tensors if module_of(t[0], modules) == module]
    files: list[OutputFile] = []
    places: dict[str, tuple[int, int]] = {}
    for number, (file, content) in enumerate(contents.items()):
        ordered = sorted(content, key=lambda t: -t[1].bits)
        beginning = OutputFile(file, b"", 0).beginning
        named = ((name.removeprefix(beginning), dtype, shape) for name, dtype, shape, _ in ordered)
        header, offsets = encode_header(named, metadata)
        places |= {name: (number, offset) for (name, *_), offset in zip(ordered, offsets, strict=True)}
        files.append(OutputFile(file, header, len(header) + sum(size for *_, size in ordered)))
    return Layout(tuple(files), places)
