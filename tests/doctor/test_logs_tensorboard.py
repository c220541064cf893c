import importlib
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from consilience.doctor.evidence.logs.tensorboard import read_events
from consilience.errors import InputError

_PROTO = "tensorboard.compat.proto"
Event = importlib.import_module(f"{_PROTO}.event_pb2").Event
Summary = importlib.import_module(f"{_PROTO}.summary_pb2").Summary
TensorProto = importlib.import_module(f"{_PROTO}.tensor_pb2").TensorProto


def write(path: Path, events: list[Any]) -> Path:
    with open(path, "wb") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())
        file.flush()
    return path


def scalar(step: int, **values: float) -> Any:
    entries = [Summary.Value(tag=f"train/{tag}", simple_value=value) for tag, value in values.items()]
    return Event(wall_time=1.5, step=step, summary=Summary(value=entries))


def pairs(reading: Any, name: str) -> list[tuple[float, float]]:
    series = reading.curve.series[name]
    return list(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def test_scalars_are_read_as_tensorboard_wrote_them(tmp_path: Path) -> None:
    events = [
        Event(wall_time=1.0, file_version="brain.Event:2"),
        scalar(10, loss=2.0, learning_rate=0.5, grad_norm=3.0, epoch=0.1),
        Event(step=15, summary=Summary(value=[Summary.Value(tag="picture", image=Summary.Image(height=2))])),
        scalar(20, loss=1.5, learning_rate=0.25),
        Event(step=20, summary=Summary(value=[Summary.Value(tag="eval/loss", simple_value=9.0)])),
    ]
    found = read_events(write(tmp_path / "events.out.tfevents.1", events))
    assert pairs(found, "loss") == [(10, 2.0), (20, 1.5)]
    assert pairs(found, "learning_rate") == [(10, 0.5), (20, 0.25)]
    assert pairs(found, "grad_norm") == [(10, 3.0)]


def test_a_real_writers_file_is_read(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(1, 6):
            writer.add_scalar("train/loss", 1 / step, step)
    (path,) = tmp_path.iterdir()
    series = read_events(path).curve.series["loss"]
    assert series.steps.tolist() == [1, 2, 3, 4, 5]
    assert series.values.tolist() == pytest.approx([1 / step for step in range(1, 6)])


@pytest.mark.parametrize(
    "tensor",
    [
        TensorProto(dtype="DT_FLOAT", float_val=[0.5]),
        TensorProto(dtype="DT_FLOAT", tensor_content=struct.pack("<f", 0.5)),
        TensorProto(dtype="DT_DOUBLE", double_val=[0.5]),
    ],
)
def test_scalars_kept_as_tensors_are_read(tmp_path: Path, tensor: Any) -> None:
    event = Event(step=3, summary=Summary(value=[Summary.Value(tag="lr", tensor=tensor)]))
    assert pairs(read_events(write(tmp_path / "events.tfevents", [event])), "learning_rate") == [(3, 0.5)]


def test_other_tensors_are_no_scalars(tmp_path: Path) -> None:
    tensor = TensorProto(dtype="DT_FLOAT", float_val=[0.5, 1.0])
    event = Event(step=3, summary=Summary(value=[Summary.Value(tag="lr", tensor=tensor)]))
    assert not read_events(write(tmp_path / "events.tfevents", [event])).curve.series


def test_the_files_of_a_resumed_run_are_one_log(tmp_path: Path) -> None:
    first = write(tmp_path / "events.tfevents.1", [scalar(step, loss=float(step)) for step in (1, 2, 3)])
    again = write(tmp_path / "events.tfevents.2", [scalar(step, loss=10.0 * step) for step in (3, 4)])
    assert pairs(read_events(first, again), "loss") == [(1, 1), (2, 2), (3, 30), (4, 40)]


def test_what_is_cut_off_at_the_end_is_left_out_at_every_byte(tmp_path: Path) -> None:
    whole = write(tmp_path / "events.tfevents", [scalar(1, loss=2.0), scalar(2, loss=1.0)])
    data = whole.read_bytes()
    for end in range(0, len(data), 5):
        whole.write_bytes(data[:end])
        series = read_events(whole).curve.series.get("loss")
        assert (0 if series is None else len(series)) == end // (len(data) // 2)


def test_values_without_a_number_are_skipped_and_counted(tmp_path: Path) -> None:
    events = [scalar(1, loss=float("nan")), scalar(2, loss=float("inf")), scalar(-3, loss=1.0), scalar(4, loss=1.0)]
    found = read_events(write(tmp_path / "events.tfevents", events))
    assert pairs(found, "loss") == [(4, 1.0)]
    assert found.curve.skipped == 3


def test_a_damaged_length_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "events.tfevents", [scalar(1, loss=2.0), scalar(2, loss=1.0)])
    data = bytearray(path.read_bytes())
    data[len(data) // 2 + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged record"):
        read_events(path)
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match="no event file of TensorBoard"):
        read_events(path)


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_any_record_is_an_event_or_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("log") / "events.tfevents"
    with open(path, "wb") as file:
        RecordWriter(file).write(data)
        file.flush()
    message = ""
    try:
        read_events(path)
    except InputError as error:
        message = str(error)
    assert "\n" not in message
