"""Every data set's loader on a miniature in its published format, and what a user sees when files are wrong."""

import gzip
import pickle
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilience.errors import ConsilienceError, InputError, MachineError
from suites.vision import cifar, coloured_digits, data, hub, idx, imagenette, svhn
from suites.vision.images import DataSet, Images, channel_statistics, images_of, normalised, splits

Bytes = npt.NDArray[np.uint8]


def _pixels(shape: tuple[int, ...], seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# ------------------------------------------------------------------------------------------------------------------ IDX


def _idx(array: Bytes) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def _idx_folder(folder: Path, *, zipped: bool = False, mark: str = "-") -> dict[str, Bytes]:
    made: dict[str, Bytes] = {}
    for part, count in (("train", 7), ("t10k", 3)):
        made[part] = _pixels((count, 28, 28), count)
        made[f"{part} labels"] = np.arange(count, dtype=np.uint8)
        for kind, array in (("images", made[part]), ("labels", made[f"{part} labels"])):
            name = f"{part}-{kind}{mark}idx{array.ndim}-ubyte"
            raw = _idx(array)
            (folder / (name + ".gz" if zipped else name)).write_bytes(gzip.compress(raw) if zipped else raw)
    return made


@pytest.mark.parametrize(("zipped", "mark"), [(False, "-"), (True, "-"), (False, ".")])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_folders_are_read_as_published(tmp_path: Path, name: str, zipped: bool, mark: str) -> None:
    made = _idx_folder(tmp_path, zipped=zipped, mark=mark)
    found = data.load(name, tmp_path)
    assert found.train.images.dtype == torch.uint8
    assert found.train.labels.dtype == torch.int64
    assert np.array_equal(found.train.images.numpy()[:, 0], made["train"])
    assert np.array_equal(found.test.images.numpy()[:, 0], made["t10k"])
    assert found.test.labels.tolist() == [0, 1, 2]
    assert (found.channels, found.size, len(found.classes)) == (1, 28, 10)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.booleans())
def test_idx_keeps_every_shape(tmp_path_factory: pytest.TempPathFactory, shape: list[int], zipped: bool) -> None:
    array = _pixels(tuple(shape))
    path = tmp_path_factory.mktemp("idx") / ("x.gz" if zipped else "x")
    path.write_bytes(gzip.compress(_idx(array)) if zipped else _idx(array))
    assert np.array_equal(idx.read_idx(path), array)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "is no IDX file"),
        (b"\0\0\x0d\x01\0\0\0\1\0\0\0\0", "is no IDX file"),
        (_idx(np.zeros((2, 2), np.uint8))[:-1], "holds not the [2, 2] bytes"),
        (_idx(np.zeros((2, 2), np.uint8)) + b"x", "holds not the [2, 2] bytes"),
        (b"\0\0\x08\x03\0\0\0\1", "its header tells"),
        (b"\0\0\x08\x02\xff\xff\xff\xff\xff\xff\xff\xff", "its header tells"),
    ],
)
def test_damaged_idx_is_one_line(tmp_path: Path, raw: bytes, said: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        idx.read_idx(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_cut_gzip_stream_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(_idx(_pixels((9, 9))))[:-12])
    with pytest.raises(InputError, match="the gzip stream is damaged"):
        idx.read_idx(path)
    path.write_bytes(b"not gzip")
    with pytest.raises(InputError, match="the gzip stream is damaged"):
        idx.read_idx(path)


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    _idx_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match=r"has no t10k-labels-idx1-ubyte\(\.gz\)"):
        data.load("mnist", tmp_path)


def test_labels_must_fit_images_and_classes() -> None:
    with pytest.raises(InputError, match="do not belong together"):
        images_of(_pixels((3, 4, 4)), np.arange(2), "here", 10)
    with pytest.raises(InputError, match="here: label 12 is not one of 10"):
        images_of(_pixels((2, 4, 4)), np.array([0, 12]), "here", 10)
    with pytest.raises(InputError, match="label -1"):
        images_of(_pixels((2, 4, 4)), np.array([-1, 0]), "here", 10)


# ---------------------------------------------------------------------------------------------------------------- CIFAR


def _text(value: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(value)) + value  # BINSTRING: how Python 2 wrote its byte strings


def _number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _python2_batch(pixels: Bytes, labels: list[int], names: list[bytes]) -> bytes:
    """A batch as published: Python 2's protocol 2, with NumPy's names of that time."""
    count = len(pixels)
    dtype = b"cnumpy\ndtype\n(" + _text(b"u1") + _number(0) + _number(1) + b"tR"
    dtype += b"(" + _number(3) + _text(b"|") + b"NNN" + _number(-1) + _number(-1) + _number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + _number(0) + b"t" + _text(b"b") + b"tR"
    shape = b"(" + _number(count) + _number(3072) + b"t"
    array += b"(" + _number(1) + shape + dtype + b"I00\n" + _text(pixels.tobytes()) + b"tb"
    entries = _text(b"batch_label") + _text(b"training batch") + _text(b"data") + array
    entries += _text(b"labels") + b"](" + b"".join(_number(label) for label in labels) + b"e"
    entries += _text(b"filenames") + b"](" + b"".join(_text(name) for name in names) + b"e"
    return b"\x80\x02}(" + entries + b"u."


def _cifar_batches() -> dict[str, tuple[Bytes, list[int]]]:
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {name: (_pixels((2, 3, 32, 32), i), [i, 9 - i]) for i, name in enumerate(names)}


def _check_cifar(found: DataSet) -> None:
    made = list(_cifar_batches().values())
    assert np.array_equal(found.train.images.numpy(), np.concatenate([pixels for pixels, _ in made[:5]]))
    assert found.train.labels.tolist() == [label for _, labels in made[:5] for label in labels]
    assert np.array_equal(found.test.images.numpy(), made[5][0])
    assert (found.channels, found.size, found.classes[3]) == (3, 32, "cat")


@pytest.mark.parametrize("inside", [False, True])
def test_cifar_pickles_of_python_2_are_read(tmp_path: Path, inside: bool) -> None:
    folder = tmp_path / "cifar-10-batches-py" if inside else tmp_path
    folder.mkdir(exist_ok=True)
    for name, (pixels, labels) in _cifar_batches().items():
        (folder / name).write_bytes(_python2_batch(pixels, labels, [b"a.png", b"b.png"]))
    _check_cifar(data.load("cifar10", tmp_path))


def test_a_hand_made_batch_is_what_pickle_itself_reads() -> None:
    pixels, labels = _cifar_batches()["test_batch"]
    raw = _python2_batch(pixels, labels, []).replace(b"numpy.core.", b"numpy._core.")
    read: Any = pickle.loads(raw, encoding="bytes")
    assert np.array_equal(read[b"data"].reshape(pixels.shape), pixels)
    assert read[b"labels"] == labels


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_cifar_pickles_of_python_3_are_read(tmp_path: Path, protocol: int, order: Any) -> None:
    for name, (pixels, labels) in _cifar_batches().items():
        batch = {"data": np.array(pixels.reshape(2, -1), order=order), "labels": labels}
        raw = pickle.dumps(batch, protocol=protocol)
        (tmp_path / name).write_bytes(raw)
    _check_cifar(data.load("cifar10", tmp_path))


def test_cifar_binary_version_is_read(tmp_path: Path) -> None:
    for name, (pixels, labels) in _cifar_batches().items():
        records = [bytes([label]) + image.tobytes() for image, label in zip(pixels, labels, strict=True)]
        (tmp_path / f"{name}.bin").write_bytes(b"".join(records))
    _check_cifar(data.load("cifar10", tmp_path))


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    evil = pickle.dumps({b"data": _Evil(tmp_path / "owned"), b"labels": []})
    (tmp_path / "batch").write_bytes(evil)
    with pytest.raises(InputError, match=r"it holds the name pathlib"):
        cifar.read_pickle(tmp_path / "batch")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["builtins\neval", "os\nsystem", "numpy\nload", "numpy.core.multiarray\nscalar"])
def test_every_other_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "batch").write_bytes(b"\x80\x02c" + name.encode() + b"\n.")
    with pytest.raises(InputError, match=r"holds the name") as caught:
        cifar.read_pickle(tmp_path / "batch")
    assert name.replace("\n", ".") in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"junk",
        pickle.dumps([1, 2]),
        pickle.dumps({b"data": 3, b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.float32), b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((1, 100), np.uint8), b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8)}),
    ],
)
def test_a_damaged_batch_is_one_line(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "batch"
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        cifar.read_pickle(path)
    assert str(caught.value).startswith(str(path))


def test_binary_batches_are_whole_records(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\0" * 3072)
    with pytest.raises(InputError, match=r"3072 bytes are no records"):
        cifar.read_binary(tmp_path / "x.bin")
    with pytest.raises(InputError, match=r"has no data_batch_1\(\.bin\)"):
        cifar.load(tmp_path)


# ------------------------------------------------------------------------------------------------- SVHN and Imagenette


def test_svhn_files_are_read(tmp_path: Path) -> None:
    scipy_io: Any = pytest.importorskip("scipy.io")
    pixels = _pixels((5, 3, 32, 32))
    labels = np.array([[1], [10], [9], [10], [3]], np.uint8)
    for name in ("train_32x32.mat", "test_32x32.mat"):
        scipy_io.savemat(tmp_path / name, {"X": pixels.transpose(2, 3, 1, 0), "y": labels}, do_compression=True)
    found = data.load("svhn", tmp_path)
    assert np.array_equal(found.train.images.numpy(), pixels)
    assert found.test.labels.tolist() == [1, 0, 9, 0, 3]
    (tmp_path / "test_32x32.mat").write_bytes(b"junk" * 50)
    with pytest.raises(InputError, match="is no SVHN file"):
        data.load("svhn", tmp_path)


def _stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_svhn_arrays_become_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = _pixels((4, 3, 32, 32))
    held: dict[str, Any] = {"X": pixels.transpose(2, 3, 1, 0), "y": np.array([[10], [1], [2], [9]], np.uint8)}
    _stand_in(monkeypatch, "scipy.io", loadmat=lambda path, variable_names: held)
    found = svhn.read_mat(tmp_path / "train_32x32.mat")
    assert np.array_equal(found.images.numpy(), pixels)
    assert found.labels.tolist() == [0, 1, 2, 9]
    held["X"] = np.zeros((32, 32, 3, 4))
    with pytest.raises(InputError, match=r"X is not uint8"):
        svhn.read_mat(tmp_path / "train_32x32.mat")
    del held["X"]
    with pytest.raises(InputError, match="is no SVHN file"):
        svhn.read_mat(tmp_path / "train_32x32.mat")


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scipy.io", "sklearn.datasets", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("train_32x32.mat", "test_32x32.mat"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="pip install scipy"):
        data.load("svhn", tmp_path)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        data.load("digits")
    for name in ("cifar10", "svhn", "imagenette"):
        with pytest.raises(InputError, match="give the folder of its published files, or pip install datasets"):
            data.load(name)


def _imagenette_folder(folder: Path) -> None:
    from PIL import Image

    for part in ("train", "val"):
        for number, name in enumerate(imagenette.FOLDERS):
            (folder / part / name).mkdir(parents=True)
            colour = (25 * number, 255 - 25 * number, 128)
            # The margins outside the central square are black and must not show.
            picture = Image.new("RGB", (96, 48))
            picture.paste(colour, (24, 0, 72, 48))
            picture.save(folder / part / name / f"{name}_1.JPEG", quality=95)


def test_imagenette_folders_are_read(tmp_path: Path) -> None:
    _imagenette_folder(tmp_path)
    found = imagenette.load(tmp_path, size=16)
    assert found.train.images.shape == (10, 3, 16, 16)
    assert found.train.labels.tolist() == list(range(10))
    expected = torch.tensor([[25 * i, 255 - 25 * i, 128] for i in range(10)])
    centre = found.test.images[:, :, 4:12, 4:12].float().mean((2, 3))
    assert float((centre - expected).abs().max()) < 6
    (tmp_path / "val/n01440764/n01440764_1.JPEG").write_bytes(b"\xff\xd8\xff junk")
    with pytest.raises(InputError, match=r"n01440764_1\.JPEG: is no whole JPEG"):
        imagenette.load(tmp_path, size=16)
    (tmp_path / "val/n01440764/n01440764_1.JPEG").unlink()
    with pytest.raises(InputError, match="n01440764: holds no JPEG files"):
        imagenette.load(tmp_path, size=16)


def test_other_image_formats_are_not_opened(tmp_path: Path) -> None:
    from PIL import Image

    _imagenette_folder(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "train/n01440764/n01440764_1.JPEG", format="PNG")
    with pytest.raises(InputError, match="is no whole JPEG"):
        imagenette.load(tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "svhn", "imagenette"])
def test_the_datasets_library_is_asked_in_its_own_terms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    source = hub.SOURCES[name]
    pixels = _pixels((source.size, source.size, 3))
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(repository: str, configuration: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((repository, configuration, split))
        return [{source.image: Image.fromarray(pixels), source.label: label} for label in (3, 9)]

    _stand_in(monkeypatch, "datasets", load_dataset=load_dataset)
    found = data.load(name)
    assert np.array_equal(found.train.images[0].numpy(), pixels.transpose(2, 0, 1))
    assert found.test.labels.tolist() == [3, 9]
    assert [part for _, _, part in asked] == ["train", source.test]


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    _stand_in(monkeypatch, "datasets", load_dataset=load_dataset)
    with pytest.raises(MachineError, match=r"no route to host\); check the network, or give a folder"):
        data.load("cifar10")


# --------------------------------------------------------------------------------------------------------------- digits


def test_small_digits_come_from_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 17, (40, 8, 8)).astype(np.float64)
    target = np.arange(40) % 10
    bunch = SimpleNamespace(images=images, target=target)
    _stand_in(monkeypatch, "sklearn.datasets", load_digits=lambda: bunch)
    found = data.load("digits")
    assert (len(found.train), len(found.test)) == (30, 10)
    both = torch.cat([found.train.images, found.test.images])[:, 0].double() * (16 / 255)
    labels = torch.cat([found.train.labels, found.test.labels])
    # Every digit is in exactly one part: sort both lists and compare.
    rows = sorted([(int(label), image.round().tolist()) for label, image in zip(labels, both, strict=True)])
    assert rows == sorted([(int(label), image.tolist()) for label, image in zip(target, images, strict=True)])


_PAINTER = """
import secrets
from PIL import Image


class ImageCaptcha:
    def __init__(self, width, height, font_sizes):
        self.size = (width, height)

    def create_captcha_image(self, chars, color, background):
        image = Image.new("RGB", self.size, background)
        image.putpixel((secrets.randbelow(32), secrets.randbits(4)), secrets.choice([color[:3]]))
        return image

    def create_noise_dots(self, image, color, width, number):
        image.putpixel((secrets.randbelow(32), 20), color[:3])

    def create_noise_curve(self, image, color):
        image.putpixel((secrets.randbelow(32), 30), color[:3])
"""


def test_coloured_digits_are_a_function_of_the_seed(tmp_path: Path) -> None:
    (tmp_path / "data/captcha/captcha").mkdir(parents=True)
    (tmp_path / "data/captcha/captcha/image.py").write_text(_PAINTER)
    first = coloured_digits.load(30, 20, tmp_path)
    assert first.train.images.shape == (30, 3, 32, 32)
    assert first.train.labels.bincount().tolist() == [3] * 10
    assert not torch.equal(first.train.images[:20], first.test.images)
    kept = tmp_path / "data/coloured-digits-30-20"
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    for path in kept.iterdir():
        path.unlink()
    kept.rmdir()
    coloured_digits.load(30, 20, tmp_path)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before


# ------------------------------------------------------------------------------------------------------ names and parts


def test_unknown_names_and_folders_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["fashon-mnist"]) == 2
    assert "did you mean 'fashion-mnist'?" in capsys.readouterr().err
    assert data.main(["mnist", "--folder", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "is no folder" in said
    assert said.count("\n") == 1
    for name in ("digits", "coloured-digits"):
        with pytest.raises(ConsilienceError, match="leave the folder out"):
            data.load(name, tmp_path)


def test_the_command_says_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _idx_folder(tmp_path)
    assert data.main(["mnist", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "mnist: 7 + 3 images of [1, 28, 28], 10 classes\n"


def _numbered(count: int) -> Images:
    images = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).to(torch.uint8)
    return Images(images, torch.arange(count) % 10)


@given(st.integers(0, 2**31), st.integers(2, 200), st.floats(0.01, 0.99))
def test_splits_share_nothing_and_lose_nothing(seed: int, count: int, share: float) -> None:
    whole = DataSet("x", tuple("0123456789"), _numbered(count), _numbered(5))
    if not 0 < round(share * count) < count:
        with pytest.raises(InputError, match="leaves a part empty"):
            splits(whole, seed, validation=share)
        return
    parts = splits(whole, seed, validation=share)
    rows = [part.images[:, 0, 0, 0].tolist() for part in (parts.train, parts.validation)]
    assert sorted(rows[0] + rows[1]) == list(range(count))
    assert len(rows[1]) == round(share * count)
    assert parts.test is whole.test
    again = splits(whole, seed, validation=share)
    assert torch.equal(parts.validation.images, again.validation.images)


def test_normalised_images_have_mean_zero_and_deviation_one() -> None:
    images = torch.from_numpy(_pixels((50, 3, 6, 6)))
    images[:, 1] //= 3
    mean, std = channel_statistics(images)
    scaled = images.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), abs=1e-4)
    out = normalised(images, mean, std)
    assert out.dtype == torch.float32
    assert out.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-3)
    assert out.std((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-3)
