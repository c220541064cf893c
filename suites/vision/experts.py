"""The base and the experts of the domain experiment, trained once and kept.

``python -m suites.vision.experts --data fashion-mnist --net resnet20 --delta 0.1 --seed 0`` trains a short shared base
and ten experts from it, each on its own class-skewed shard, and prints their accuracy on the target's test images.
Each is a folder of the cache with ``model.safetensors``, ``net.json`` and ``card.json``, there when whole: a run that
was stopped goes on with the next one. The same setting, versions and thread count give the same weights on the same
machine.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from consilience.errors import ConsilienceError, InputError
from consilience.progress import Progress, ProgressOption, open_progress
from suites.packages import locked
from suites.vision import CACHE, data, domains, nets
from suites.vision.domains import Domains, Sizes
from suites.vision.images import DataSet, Images
from suites.vision.training import Schedule, accuracy, schedule_for, train

#: Change when the meaning of a setting or the training itself changes.
VERSION = 1
CARD = "card.json"


@dataclass(frozen=True)
class Setting:
    """One domain experiment: everything its weights depend on, but the versions of libraries and the machine.

    ``experiment`` is ``skewed`` (Dirichlet shards) or ``halves`` (classes 0-4 and 5-9); ``width`` and ``patch`` are
    the network's own where they are None; ``target`` is the concentration of the target's classes, None for all
    classes as they come; ``epochs`` None gives the schedule of the network.
    """

    data: str = "fashion-mnist"
    net: str = "resnet20"
    delta: float = 0.1
    seed: int = 0
    experts: int = 10
    experiment: str = "skewed"
    target: float | None = None
    width: float | None = None
    patch: int | None = None
    base_epochs: int | None = None
    expert_epochs: int | None = None
    sizes: Sizes = field(default_factory=Sizes)


def folder_name(setting: Setting, spec: nets.NetSpec) -> str:
    """Return the folder of a setting: its main choices, to read, and a hash of all that the weights depend on."""
    schedules = [asdict(_schedule(setting, spec, base=base)) for base in (True, False)]
    facts = json.dumps([VERSION, asdict(setting), asdict(spec), schedules], sort_keys=True)
    digest = hashlib.blake2b(facts.encode(), digest_size=4).hexdigest()
    kind = f"delta{setting.delta:g}" if setting.experiment == "skewed" else setting.experiment
    return f"{setting.data}-{setting.net}-{kind}-seed{setting.seed}-{digest}"


def _schedule(setting: Setting, spec: nets.NetSpec, *, base: bool) -> Schedule:
    return schedule_for(spec.kind, base=base, epochs=setting.base_epochs if base else setting.expert_epochs)


@dataclass(frozen=True)
class Target:
    """The target's images, normalised for the network (float32 [n, C, H, W]), and labels (int64 [n])."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Experiment:
    """A base, its experts and their target, ready to be mixed; ``cards`` say how each was trained."""

    setting: Setting
    spec: nets.NetSpec
    base: nets.StateDict
    experts: dict[str, nets.StateDict]
    shard_sizes: dict[str, int]
    target: Target
    cards: dict[str, dict[str, Any]]

    def network(self, state: nets.StateDict | None = None) -> nn.Module:
        """Return a network with the base's weights, or ``state``'s, in evaluation mode."""
        net = nets.build(self.spec, self.setting.seed)
        net.load_state_dict(self.base if state is None else state)
        return net.eval()


def plan(setting: Setting, images: DataSet) -> Domains:
    """Return who sees which images.

    Raises:
        InputError: the data set is too small for the sizes, or the setting names no experiment.
    """
    labels = (images.train.labels.numpy(), images.test.labels.numpy())
    if setting.experiment == "skewed":
        return domains.skewed(
            *labels,
            setting.sizes,
            experts=setting.experts,
            delta=setting.delta,
            seed=setting.seed,
            target=setting.target,
        )
    if setting.experiment == "halves":
        return domains.halves(*labels, setting.sizes, seed=setting.seed)
    raise InputError(f"experiment={setting.experiment}: there are skewed and halves")


def experiment(
    setting: Setting,
    *,
    images: DataSet | None = None,
    cache: Path | None = None,
    folder: Path | None = None,
    progress: ProgressOption = False,
) -> Experiment:
    """Return the experiment of a setting, training what is not in the cache.

    Args:
        setting: what to train.
        images: the data set itself, where it is not one of ``data.LOADERS``.
        cache: the cache to use instead of the suite's own.
        folder: the user's folder of the data set.
        progress: True for a bar (or lines) on standard error, a function called with (steps done, steps in all) of each
            network, or a ``Progress``.

    Raises:
        InputError: the setting is wrong, or a kept network is damaged.
        MachineError: the data set cannot be fetched, or the cache cannot be written.
    """
    images = data.load(setting.data, folder) if images is None else images
    who = plan(setting, images)
    spec = nets.spec_for(setting.net, images, width=setting.width, patch=setting.patch)
    place = (cache or CACHE) / "experts" / folder_name(setting, spec)
    with locked(place.parent / f".{place.name}.lock"), open_progress(progress) as shown:
        trainer = _Trainer(setting, images, who, spec, place)
        base = trainer.network("base", who.pretraining, None, shown)
        names = [f"expert-{k}" for k in range(len(who.experts))]
        found = {name: trainer.network(name, rows, base, shown) for name, rows in zip(names, who.experts, strict=True)}
    return Experiment(
        setting,
        spec,
        base,
        found,
        dict(zip(names, who.shard_sizes, strict=True)),
        _target(images, who, spec),
        {name: json.loads((place / name / CARD).read_text("utf-8")) for name in ("base", *names)},
    )


def _target(images: DataSet, who: Domains, spec: nets.NetSpec) -> Target:
    parts = (images.train.take(who.train), images.train.take(who.validation), images.test.take(who.test))
    return Target(*((spec.inputs(part.images), part.labels) for part in parts))


class _Trainer:
    """Trains the networks of one setting, or takes them from their place."""

    def __init__(self, setting: Setting, images: DataSet, who: Domains, spec: nets.NetSpec, place: Path) -> None:
        self.setting, self.images, self.who, self.spec, self.place = setting, images, who, spec, place
        test = images.test.take(who.test)
        self.test = (spec.inputs(test.images), test.labels)

    def network(
        self, name: str, rows: domains.Rows, start: nets.StateDict | None, progress: Progress
    ) -> nets.StateDict:
        """Return the weights of one network, trained on ``rows`` from ``start``, if it is not kept already."""
        folder = self.place / name
        if not (folder / CARD).is_file():
            self._train(folder, rows, start, progress)
        return nets.read_state(folder)

    def _train(self, folder: Path, rows: domains.Rows, start: nets.StateDict | None, progress: Progress) -> None:
        number = -1 if start is None else int(folder.name.removeprefix("expert-"))
        own = self.images.train.take(rows)
        net = nets.build(self.spec, self.setting.seed)
        if start is not None:
            net.load_state_dict(start)
        schedule = _schedule(self.setting, self.spec, base=start is None)
        before = time.monotonic()
        losses = train(
            net,
            self.spec.inputs(own.images),
            own.labels,
            schedule,
            seed=[self.setting.seed, number + 1],
            progress=progress,
            title=f"training {folder.name}",
        )
        seconds = time.monotonic() - before
        score = accuracy(net, *self.test)
        card = self._card(own, schedule, losses, seconds, score, rows)
        self.place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=self.place) as work:
            made = Path(work) / folder.name
            nets.save_net(made, self.spec, net.state_dict())
            (made / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
            if folder.exists():  # without its card it was left by somebody who deleted files by hand
                shutil.rmtree(folder)
            made.rename(folder)

    def _card(
        self, own: Images, schedule: Schedule, losses: list[float], seconds: float, score: float, rows: domains.Rows
    ) -> dict[str, Any]:
        labels = self.images.train.labels.numpy()
        return {
            "setting": asdict(self.setting),
            "images": len(own),
            "images_by_class": dict(
                zip(self.images.classes, domains.class_counts(labels, rows, len(self.images.classes)), strict=True)
            ),
            "schedule": asdict(schedule),
            "steps": len(losses),
            "final_train_loss": round(float(np.mean(losses[-10:])), 5) if losses else None,
            "target_test_images": len(self.test[1]),
            "target_test_accuracy": round(score, 5),
            "seconds": round(seconds, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__.split("+")[0],
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``python -m suites.vision.experts``."""
    parser = argparse.ArgumentParser(description="Train the base and the experts of one domain experiment.")
    default = Setting()
    parser.add_argument("--data", default=default.data)
    parser.add_argument("--folder", type=Path, help="the data set's published files")
    parser.add_argument("--net", default=default.net)
    parser.add_argument("--delta", type=float, default=default.delta)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--experts", type=int, default=default.experts)
    parser.add_argument("--experiment", default=default.experiment, choices=("skewed", "halves"))
    parser.add_argument("--target", type=float, help="concentration of the target's classes; default: as they come")
    parser.add_argument("--width", type=float)
    parser.add_argument("--patch", type=int)
    parser.add_argument("--base-epochs", type=int)
    parser.add_argument("--expert-epochs", type=int)
    parser.add_argument("--threads", type=int, default=1)
    options = vars(parser.parse_args(arguments))
    folder = options.pop("folder")
    torch.set_num_threads(options.pop("threads"))
    try:
        made = experiment(Setting(**options), folder=folder, progress=True)
    except ConsilienceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    for name, card in made.cards.items():
        facts = f"{card['images']:6d} images  {card['steps']:4d} steps  {card['seconds']:6.1f} s"
        print(f"{name:10s} {facts}  accuracy on the target's test images {card['target_test_accuracy']:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
