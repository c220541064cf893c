"""The synthetic checkpoints are valid Hugging Face folders, the same on every run, and shaped as promised."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import oracle, synthetic
from benchmarks.synthetic import EXPERTS, SIZES, Size

TINY = SIZES["tiny"]
SPARSE = Size("sparse", 64, 176, layers=3, heads=4, kv_heads=4, vocab=9000, shards="layer", written=1 / 8, linked=True)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_bytes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    first = synthetic.generate(TINY, tmp_path / "first", threads=1)
    second = synthetic.generate(TINY, tmp_path / "second", threads=3)
    other = synthetic.generate(TINY, tmp_path / "other", seed=1)
    assert digests(first.folder) == digests(second.folder)
    weights = "base/model.safetensors"
    assert digests(first.folder)[weights] != digests(other.folder)[weights]


def test_safetensors_reads_what_was_promised(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    made = synthetic.generate(TINY, tmp_path / "set")
    for folder in (made.base, *made.experts.values()):
        with safetensors.safe_open(folder / "model.safetensors", framework="np") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            assert found == TINY.tensors()
            assert {file.get_slice(name).get_dtype() for name in found} == {"BF16"}


@pytest.mark.parametrize("size", [TINY, SPARSE], ids=lambda size: size.name)
def test_transformers_loads_it(tmp_path: Path, size: Size) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    made = synthetic.generate(size, tmp_path / "set")
    for folder in (made.base, made.experts["c"]):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="bfloat16", output_loading_info=True
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == size.tensors()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer("w0 w1")["input_ids"] == [3, 4]


def test_deltas_are_small_and_independent(tmp_path: Path) -> None:
    made = synthetic.generate(TINY, tmp_path / "set")
    base = oracle.read(made.base)["model.embed_tokens.weight"]
    deltas = {name: oracle.read(made.experts[name])["model.embed_tokens.weight"] - base for name in EXPERTS}
    assert base.std() == pytest.approx(synthetic.WEIGHT_STD, rel=0.02)
    for name, scale in zip(EXPERTS, synthetic.DELTA_SCALES, strict=True):
        # Rounding to bf16 adds a little to the smallest.
        assert deltas[name].std() == pytest.approx(scale * synthetic.WEIGHT_STD, rel=0.05)
    assert abs(np.corrcoef(deltas["a"].ravel(), deltas["b"].ravel())[0, 1]) < 0.02


def test_norm_weights_are_around_one(tmp_path: Path) -> None:
    made = synthetic.generate(TINY, tmp_path / "set")
    assert oracle.read(made.base)["model.norm.weight"].mean() == pytest.approx(1.0, abs=0.02)


def test_rounding_is_to_nearest_even() -> None:
    # 1 + 2^-8 lies halfway between 1 and 1 + 2^-7; 1 + 3 * 2^-8 halfway between 1 + 2^-7 and 1 + 2^-6.
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 0.0], np.float32)
    expected = [1.0, 1 + 2**-6, -1.0, 1 + 2**-7, 0.0]
    assert synthetic.from_bf16(synthetic.round_to_bf16(values)).tolist() == expected
    assert oracle.to_bf16(values.astype(np.float64)).tolist() == expected


def test_a_sparse_set_shares_files_and_leaves_holes(tmp_path: Path) -> None:
    made = synthetic.generate(SPARSE, tmp_path / "set")
    shards = synthetic.weight_files(made.experts["c"])
    assert [path.name for path in shards][::4] == [
        "model-00001-of-00006.safetensors",
        "model-00005-of-00006.safetensors",
    ]
    owners = [next(name for name in ("a", "b") if (made.experts[name] / path.name).samefile(path)) for path in shards]
    assert owners == ["a", "b", "a", "b", "a", "b"]
    # 9000 x 64 elements are a full chunk and a piece of the next: an eighth of each is written, the rest reads as zero.
    table = oracle.read(made.base)["model.embed_tokens.weight"].ravel()
    eighth = synthetic.CHUNK // 8
    assert np.count_nonzero(table[:eighth]) > 0.99 * eighth
    assert not np.any(table[eighth : synthetic.CHUNK])
    assert np.count_nonzero(table[synthetic.CHUNK :]) > 0.99 * (table.size - synthetic.CHUNK)


def test_sizes_are_as_published() -> None:
    counts = {name: (size.parameters(), len(size.tensors())) for name, size in SIZES.items()}
    assert counts["0.5b"] == (pytest.approx(0.494e9, rel=1e-3), 345)
    assert counts["1.5b"] == (pytest.approx(1.484e9, rel=1e-3), 273)
    assert counts["7b"] == (6_738_415_616, 291)  # Llama-7B's own
    assert counts["tiny"][0] == pytest.approx(0.5e6, rel=0.01)
    assert counts["many"][1] == 20_001


def test_a_half_made_set_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(TINY, name="small", layers=1)
    monkeypatch.setitem(SIZES, "small", small)
    first = synthetic.ensure("small", tmp_path)
    before = digests(first.folder)
    (first.folder / "complete.json").unlink()
    (first.base / "model.safetensors").write_bytes(b"half")
    assert digests(synthetic.ensure("small", tmp_path).folder) == before
    changed = (first.base / "model.safetensors").stat().st_mtime_ns
    synthetic.ensure("small", tmp_path)
    assert (first.base / "model.safetensors").stat().st_mtime_ns == changed


def test_a_full_disk_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="a set needs"):
        synthetic.require_free(tmp_path, 10**18, "a set")
