"""The public load, evaluate and export: they take a model and data in whatever form people have them."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from robustify import data as datasets
from robustify import files, model_folder, sources
from robustify.arrays import counted_from_one, split_of
from robustify.attacks import AttackSpec
from robustify.data import Data
from robustify.distributed import World
from robustify.errors import UserError
from robustify.evaluation import conversions, rows_of
from robustify.evaluation import evaluate as measure
from robustify.events import Listener, Note, Progress
from robustify.export import buffers_not_held, round_weights
from robustify.export import export as write_model
from robustify.model_folder import CONFIG, WEIGHTS
from robustify.modes import borrowed
from robustify.pixels import PixelModel
from robustify.recipe import DEFAULT_RADIUS, EvalSettings
from robustify.report import Report, save_pair
from robustify.sources import Checkpoint
from robustify.sources.checkpoint import agreed_license
from robustify.splits import Split
from robustify.threat import ThreatModel

Model = Checkpoint | nn.Module | str | Path
Threats = str | ThreatModel | Sequence[str | ThreatModel]
SPLITS = ("test", "val", "train")
DEFAULT_ATTACKS: tuple[str, ...] = EvalSettings.model_fields["attacks"].default


def load(
    source: str | Path,
    *,
    dataset: str | None = None,
    threat: str | None = None,
    num_classes: int | None = None,
    models_dir: str | Path | None = None,
    pretrained: bool = True,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Return the Checkpoint that `source` names: `.model` maps images in [0,1] to logits. Raises UserError.

    source: a folder (timm's layout, or a run's), a RobustBench name, a timm name, `digits`; all forms are listed in
    robustify/sources. The other arguments are those of `sources.load`.
    """
    return sources.load(
        str(source),
        dataset=dataset,
        threat=threat,
        num_classes=num_classes,
        pretrained=pretrained,
        models_dir=Path(models_dir) if models_dir else None,
        allow_pickle=allow_pickle,
    )


def evaluate(
    model: Model,
    data: Any,
    *,
    attacks: Sequence[str] | None = None,
    threat: Threats = DEFAULT_RADIUS,
    n: int | None = None,
    split: str = "test",
    batch_size: int = 256,
    seed: int = 0,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    model_id: str | None = None,
    check: bool = True,
    fast_search: bool = False,
    resume_folder: str | Path | None = None,
    keep_adversarials: bool = False,
    finished: Report | None = None,
    surrogate: Model | None = None,
    world: World | None = None,
    listener: Listener | None = None,
) -> Report:
    """Measure clean accuracy and what the model holds against each attack under each threat. Returns a Report.

    model: a network whose input is [0,1], or normalised with `mean` and `std`; a Checkpoint; a source, as for `load`.
    It is evaluated on the device it is on, a source on the GPU where there is one, and comes back as it was.
    data: a Data; a pair (x, y), a Dataset or a Split, all of which is taken; a name, such as cifar10. Images are NCHW, NHWC
    or NHW, in [0,1] or uint8 (docs/data.md).
    attacks: `clean`, `pgd:steps=50,restarts=5`; by default clean, FGSM, PGD and W-PGD as far as the norms allow.
    threat: one or several, `Linf:8/255`, `W2-Linf:8/255`. n: images, drawn by the seed; None for all.
    split: test, val or train, of a Data or a name; of a name, the seed also says which images are held out for val.
    check: look for signs of gradient masking and of broken models, on 64 images; what is found is in `report.notes`.
    fast_search, resume_folder, keep_adversarials, finished: as in robustify.evaluation; the command line's
    --fast-search, --resume and --keep-adversarials. surrogate: another network of the same classes, in any form that
    `model` has; what fools it is tried on the model, a sign of gradient masking where that beats the other attacks.
    Raises UserError for what the user can mend.
    """
    threats = [ThreatModel.parse(t) for t in ([threat] if isinstance(threat, str | ThreatModel) else threat)]
    attacks = attacks if attacks is not None else _fitting(DEFAULT_ATTACKS, threats)
    rows_of(attacks, threats)  # refuses what cannot be measured before anything is loaded
    if listener is not None:
        for said in conversions(attacks, threats):
            listener(Note(said))
    pixel_model, checkpoint = _pixel_model(model, mean, std)
    images, name, classes = _images(data, split, checkpoint, seed, listener)
    split_name = data.test_name if isinstance(data, Data) and split == "test" else split
    if checkpoint and classes and classes != checkpoint.num_classes:
        message = f"{checkpoint.base_id} has {checkpoint.num_classes} classes, {name} has {classes}"
        differ = UserError(message, "take data of the same classes")
        raise counted_from_one(images.labels, checkpoint.num_classes) or differ
    _takes(pixel_model, images)
    other = _surrogate(surrogate, pixel_model, images, mean, std) if surrogate is not None else None

    def tell(stage: str, done: int, total: int) -> None:
        if listener is not None:
            listener(Progress(stage, done, total))

    return measure(
        pixel_model,
        images,
        attacks,
        threats,
        n=n,
        batch_size=batch_size,
        seed=seed,
        world=world,
        tell=tell,
        data_name=name,
        split_name=split_name,
        check=check,
        fast_search=fast_search,
        resume_folder=Path(resume_folder) if resume_folder else None,
        keep_adversarials=keep_adversarials,
        finished=finished,
        surrogate=other,
        model_id=model_id or (checkpoint.base_id if checkpoint else type(pixel_model.net).__name__),
    )


def export(
    model: Checkpoint | str | Path,
    folder: str | Path,
    *,
    formats: Sequence[str] = (),
    half: bool = False,
    data: Any = None,
    n: int = 1000,
    license: str | None = None,
    models_dir: str | Path | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    beside: Callable[[Checkpoint], Mapping[str, str]] | None = None,
    listener: Listener | None = None,
) -> Path:
    """Write a model into a new folder in timm's layout, read it back and compare; return the folder's absolute path.

    model: a Checkpoint, or a source as for `load`. Of a run or a model folder the class names, the facts about its
    hardening, its recipe, report and card (README.md) go along.
    formats: onnx, pt2: written too, compared with the model on images of `data`, else on random ones.
    half: round the weights to half precision; what that costs in accuracy is measured on `n` test images of `data`, clean
    and under PGD-20 of the model's threat, and written to half.json and the card. data: as for `evaluate`.
    beside: gives more text files by name, made of the model that is exported; asked before anything is written.
    license: of the base model where it is not known. Raises UserError when the model does not survive, when `folder`
    holds something and `force` is false, when half precision has no data, when the files of a model's folder are of
    several models, and when the disk is full.
    """
    if isinstance(model, Checkpoint):
        checkpoint, origin = model, None
    else:
        checkpoint = load(model, models_dir=models_dir, allow_pickle=allow_pickle)
        origin = model_folder.made(model) or model_folder.find(model) or sources.embedded().get(str(model))
    config: dict[str, Any] = {}
    head: dict[str, str] = {}
    kept: dict[str, Path] = {}
    if origin is not None:
        kept = model_folder.belongings(origin)
        config = json.loads((origin / CONFIG).read_text(encoding="utf8"))
        if (origin / WEIGHTS).is_file():
            with safe_open(origin / WEIGHTS, "pt") as opened:  # pyright: ignore[reportGeneralTypeIssues]
                head = opened.metadata() or {}
        model_folder.check_same(origin, config)
    agreed = agreed_license(checkpoint.license, license, checkpoint.base_id)
    checkpoint = dataclasses.replace(checkpoint, license=agreed)
    target = files.new_folder(folder, force)
    texts = beside(checkpoint) if beside else {}
    images = torch.rand(4, *checkpoint.input_size, generator=torch.Generator().manual_seed(0))
    rounding: tuple[Report, Report] | None = None
    if half and data is None:
        hint = "name them: --data cifar10, or --data folder:PATH (data=... in Python)"
        raise UserError("what half precision costs is measured on images, and none are known", hint)
    if data is not None:
        split, _, _ = _images(data, "test", checkpoint, 0, listener)
        images, _ = split.batch(range(min(64, len(split))))
        if half:
            rounding = _measure_rounding(checkpoint, data, min(n, len(split)), listener)

    robustness = model_folder.robustness_of(config)
    if rounded := (rounding[1].digest() if rounding else model_folder.digest_of(kept.get(model_folder.HALF))):
        robustness["half"] = rounded

    def finish(stage: Path) -> None:
        for name, path in kept.items():
            (stage / name).parent.mkdir(exist_ok=True)
            files.write_bytes(stage / name, path.read_bytes())
        if rounding is not None:
            save_pair(stage / model_folder.HALF, *rounding)
        if (stage / model_folder.RECIPE).is_file() and (stage / model_folder.REPORT).is_file():
            model_folder.write_card(stage, place=target)
        for name, text in texts.items():
            files.write_text(stage / name, text)

    if listener is not None and (missing := buffers_not_held(checkpoint, checkpoint.model)) is not None:
        listener(Note(missing))
    return write_model(
        checkpoint,
        checkpoint.model,
        folder,
        verify_batch=images,
        metadata=head,
        formats=formats,
        half=half,
        force=force,
        class_names=config.get("label_names") or (),
        robustness=robustness,
        finish=finish,
    )


def _measure_rounding(checkpoint: Checkpoint, data: Any, n: int, listener: Listener | None) -> tuple[Report, Report]:
    """Reports of the model and of the one with rounded weights, on the same images."""
    known = checkpoint.threat or ""  # RobustBench's names no radius
    threat = ThreatModel.parse(known if ":" in known else DEFAULT_RADIUS)
    rounded = copy.deepcopy(checkpoint.model)
    round_weights(rounded)
    name = checkpoint.base_id

    def reported(model: nn.Module, model_id: str) -> Report:
        attacks, against = ("clean", "pgd"), threat.pointwise()
        return evaluate(model, data, attacks=attacks, threat=against, n=n, model_id=model_id, check=False, listener=listener)

    return reported(checkpoint.model, name), reported(rounded, f"{name}, rounded")


def split_named(data: Data, name: str) -> Split:
    """Return one of the data's splits, the test images also by what reports call them. Raises UserError for other names."""
    if name == data.test_name:
        return data.test
    if name not in SPLITS:
        raise UserError(f"unknown split {name!r}", f"splits: {', '.join(SPLITS)}")
    return getattr(data, name)


def _pixel_model(model: Model, mean: Sequence[float], std: Sequence[float]) -> tuple[PixelModel, Checkpoint | None]:
    if isinstance(model, nn.Module):
        return (model if isinstance(model, PixelModel) else PixelModel(model, mean, std)), None
    if isinstance(model, Checkpoint):
        return model.model, model
    checkpoint = load(model)
    if torch.cuda.is_available():
        checkpoint.model.to("cuda")
    return checkpoint.model, checkpoint


def _images(
    data: Any, split: str, checkpoint: Checkpoint | None, seed: int, listener: Listener | None
) -> tuple[Split, str, int | None]:
    """Return (the images, the data's name, its number of classes where known)."""
    size = checkpoint.input_size if checkpoint else None
    if isinstance(data, str | Path):

        def progress(done: int, total: int) -> None:
            if listener is not None:
                listener(Progress("reading the data", done, total))

        data = datasets.load(str(data), seed=seed, input_size=size, progress=progress)
    if isinstance(data, Data):
        return split_named(data, split), f"{data.name} ({data.digest})", data.num_classes
    images = split_of(data, "the data", size)
    return images, f"tensors ({datasets.digest(images)})", None


def _surrogate(
    surrogate: Model, model: PixelModel, images: Split, mean: Sequence[float], std: Sequence[float]
) -> tuple[str, PixelModel]:
    """Return the surrogate's name and network, on the model's device. Raises UserError when it has other classes."""
    other, checkpoint = _pixel_model(surrogate, mean, std)
    name = checkpoint.base_id if checkpoint else type(other.net).__name__
    other.to(next((w.device for w in model.parameters()), torch.device("cpu")))
    classes, own = _takes(other, images), _takes(model, images)
    if classes != own:
        message = f"the surrogate {name} has {classes} classes, the model {own}"
        raise UserError(message, "take a network of the same classes")
    return name, other


def _takes(model: PixelModel, images: Split) -> int:
    """Return the number of classes. Raises UserError unless the model takes images of this shape."""
    x, _ = images.batch([0])
    device = next((w.device for w in model.parameters()), torch.device("cpu"))
    try:
        with borrowed(model), torch.no_grad():
            return model(x.to(device)).shape[-1]
    except RuntimeError as error:
        raise UserError(f"the model does not take images of shape {tuple(x.shape[1:])}: {error}") from None


def _fitting(attacks: Sequence[str], threats: Sequence[ThreatModel]) -> list[str]:
    """Those of the attacks that know the norms of all threats."""
    infos = {name: AttackSpec.parse(name).info for name in attacks if name != "clean"}
    return [name for name in attacks if name == "clean" or all(t.norm in infos[name].norms for t in threats)]
