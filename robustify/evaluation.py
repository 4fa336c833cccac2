"""evaluate: what a model holds against, per example, in full precision, over any number of processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from robustify import sanity
from robustify.attacks import AttackSpec
from robustify.attacks.autoattack import check as authors_check
from robustify.attacks.cascade import AUTHORS, Cascade, Stage
from robustify.attacks.transfer import transfer
from robustify.data import Split
from robustify.distributed import World
from robustify.distributional import Search, bought, moved_together, search, search_name
from robustify.environment import PACKAGES, environment
from robustify.errors import UserError
from robustify.images import Size
from robustify.measure import Clean, Passes, Run, Tell, counted, measure_clean, withstands
from robustify.modes import Shadow, full_precision
from robustify.pieces import Pieces, same_facts
from robustify.pixels import PixelModel
from robustify.pointwise import heard, pointwise
from robustify.report import Report
from robustify.splits import resized
from robustify.threat import Norm, ThreatModel

__all__ = ["conversions", "counted", "evaluate", "rows_of", "sample"]


def sample(n_available: int, n: int | None, seed: int) -> list[int]:
    """Indices of the images to evaluate: n of them drawn by the seed, in ascending order; all of them with n None.

    Raises UserError when there are fewer than n.
    """
    if n is None or n == n_available:
        return list(range(n_available))
    if n > n_available:
        hint = f"take --n {n_available} (n={n_available} in Python)"
        raise UserError(f"asked for {n} images, the split has {n_available}", hint)
    return sorted(np.random.default_rng(seed).permutation(n_available)[:n].tolist())


@full_precision()
def evaluate(
    model: nn.Module,
    split: Split,
    attacks: Sequence[str],
    threats: ThreatModel | Sequence[ThreatModel],
    *,
    n: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    world: World | None = None,
    tell: Tell | None = None,
    model_id: str = "model",
    data_name: str = "data",
    split_name: str = "test",
    workers: int = 0,
    check: bool = False,
    fast_search: bool = False,
    resume_folder: Path | None = None,
    keep_adversarials: bool = False,
    finished: Report | None = None,
    surrogate: tuple[str, nn.Module] | None = None,
) -> Report:
    """Measure clean accuracy and each attack under each threat, on the same images. Returns a Report with verdicts.

    model: [0,1] images to logits, in full precision; borrowed, so it comes back as it was. attacks: `clean` or
    `name:setting=value,...`. An image counts as robust when it is classified correctly both clean and perturbed, by a
    forward pass of its own after the attack; the perturbation is checked against the threat's budget first. Pointwise
    attacks see only images that are right when clean. The batches are fixed by the verdicts before, so nothing depends
    on the number of processes.

    check: look for signs of gradient masking with a few more passes (robustify.sanity); the cheapest
    always are. fast_search: pointwise attacks climb a bfloat16 copy of the model, every verdict stays the model's own:
    sound, and faster where the device has bfloat16, but not verdict for verdict what the full search finds; the report
    says so. resume_folder: finished batches are stored there, and those found there are not attacked again;
    `pieces.finish` ends it once the report is saved. keep_adversarials: the batches hold the adversarial images, for
    `recheck`. finished: a report that is returned as it is, if it is of this very evaluation. surrogate: name and network
    of the same classes; PGD on it is one more attack on the model, and a sign of masking where it beats the others.

    Raises UserError for bad attacks, n, or images, when the model changes under evaluation, and when resume_folder or
    `finished` was begun with another model, data or settings, resume_folder also with other versions or on another device.
    """
    for name, value, least in (("n", n, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, not {value}")
    world = world or World()
    several = [threats] if isinstance(threats, ThreatModel) else list(threats)
    plan = rows_of(attacks, several, split.shape[1:])
    if keep_adversarials and resume_folder is None:
        raise ValueError("keep_adversarials needs a resume_folder")
    run = Run(
        model,
        split,
        sample(len(split), n, seed),
        batch_size,
        seed,
        world,
        tell or (lambda stage, done, total: None),
        Shadow(model if isinstance(model, PixelModel) else PixelModel(model)).model if fast_search else model,
        workers,
        keep=keep_adversarials,
    )
    before = sanity.fingerprint(model)
    clean = measure_clean(run)
    facts = {
        "model": model_digest(model),
        "data": clean.data,
        "n": len(run.chosen),
        "seed": seed,
        "batch_size": batch_size,
        "threats": [threat.spec for threat in several],
        "attacks": [f"{spec} {threat.spec}" for _, spec, threat in plan],
        "fast_search": fast_search,
        "keep_adversarials": keep_adversarials,
        "surrogate": model_digest(surrogate[1]) if surrogate else None,
    }
    if finished is not None:
        hint = "--force replaces the report, -o names another (leave out finished= in Python)"
        same_facts(finished.facts, facts, "the report", hint)
        return finished
    notes = _model_notes(run, clean)
    checks: dict[str, float | int] = {}
    if check:
        (found,) = run.gather_texts([_look_at(run)] if world.is_main else [])
        checks, more = json.loads(found)
        notes += more
    here = environment(str(run.device))
    if resume_folder is not None:  # a report is of one stack: another version or processor rounds otherwise
        device = " and ".join(sorted(set(run.gather_texts([here["device"]]))))
        stack = {**{name: here[name] for name in PACKAGES}, "device": device}
        run.pieces = Pieces(Path(resume_folder), {**facts, **stack}, world)
    rows, verdicts = [clean.row], {clean.row.key: clean.right}
    distances: dict[str, np.ndarray] = {}
    nearest: dict[Norm, np.ndarray] = {}  # by which any attack so far flipped each image

    def flipped(norm: Norm, size: np.ndarray) -> None:
        nearest[norm] = np.minimum(nearest.get(norm, size), size)

    if any(stage.run in AUTHORS for _, spec, threat in plan for stage in spec.cascade(threat, clean.classes).stages):
        notes += sanity.of_warnings(run.gather_texts(_authors_warnings(run) if world.is_main else []), "pyautoattack")
    if surrogate is not None:
        stage = Stage("transfer", transfer(surrogate[1]), {"steps": 20}, (surrogate[1],))
        settings = {"surrogate": surrogate[0], "surrogate_accuracy": _accuracy(run, surrogate[1]), **stage.settings}
        for threat in dict.fromkeys(threat.pointwise() for threat in several):
            row, held, size = pointwise(run, "transfer", Cascade("", (stage,)), settings, threat, clean)
            rows.append(row)
            verdicts[row.key], distances[row.key] = held, size
            flipped(threat.norm, size)
    searches: dict[str, Search] = {}
    for name, spec, threat in plan:
        if spec.name == "knapsack":
            key = search_name(spec, threat.norm)
            if key not in searches:
                searches[key] = search(run, spec, threat.norm, clean.right, clean.classes)
            known = nearest.get(threat.norm, searches[key].distances)
            row, distances[f"{name} {threat.spec}"] = bought(name, spec, threat, searches[key], known)
            searches[key] = Search(searches[key].distances, Passes(), 0.0)  # it is paid for
        elif spec.info.distributional:
            row, verdicts[f"{name} {threat.spec}"], size = moved_together(run, name, spec, threat, clean.right)
            flipped(threat.norm, size)
        else:
            cascade = spec.cascade(threat, clean.classes)
            row, held, size = pointwise(run, name, cascade, spec.settings, threat, clean)
            verdicts[row.key], distances[row.key] = held, size
            flipped(threat.norm, size)
            notes += sanity.of_warnings(run.gather_texts(run.warned), row.key)
            run.warned.clear()
            label = row.settings.get("version", "standard")
            notes += [f"{row.key}: {label}."] if label != "standard" else []
        rows.append(row)
    sanity.unchanged(before, sanity.fingerprint(model))
    if fast_search:
        notes.append("Pointwise attacks searched in bfloat16; every verdict is in full precision.")
    notes += sanity.of_rows(rows, verdicts)
    return Report(
        model_id,
        data_name,
        split_name,
        rows,
        verdicts,
        here,
        seed,
        notes=list(dict.fromkeys(notes)),
        distances=distances,
        checks=checks,
        facts=facts,
    )


def rows_of(
    attacks: Sequence[str], threats: Sequence[ThreatModel], size: Size | None = None
) -> list[tuple[str, AttackSpec, ThreatModel]]:
    """(the row's name, attack, threat) of every row; an attack's second settings are part of its name.

    Knapsacks come last: they buy what the others flipped, too. Raises UserError for attacks that are none, and for threats
    and images, of (height, width), that an attack does not know: it costs nothing, so it can be asked before anything is
    loaded.
    """
    specs = {str(spec): spec for spec in (AttackSpec.parse(name) for name in attacks if name != "clean")}
    wanted = dict.fromkeys((text, spec.under(threat)) for text, spec in specs.items() for threat in threats)
    taken: set[tuple[str, ThreatModel]] = set()
    plan = []
    for text, threat in wanted:
        specs[text].check(threat, size)
        name = text if (specs[text].name, threat) in taken else specs[text].name
        taken.add((name, threat))
        plan.append((name, specs[text], threat))
    return sorted(plan, key=lambda row: row[1].name == "knapsack")


def conversions(attacks: Sequence[str], threats: Sequence[ThreatModel]) -> list[str]:
    """Say which attacks measure another threat than one that was asked for, `AttackSpec.under`."""
    said: dict[tuple[ThreatModel, ThreatModel], list[str]] = {}
    for spec in (AttackSpec.parse(name) for name in attacks if name != "clean"):
        for asked in threats:
            if (measured := spec.under(asked)) not in threats:
                said.setdefault((asked, measured), []).append(spec.name)
    return [
        f"{', '.join(dict.fromkeys(names))}: measured under {measured}, not {asked}, for "
        + (
            "the budget is shared over all images"
            if measured.distributional
            else "each image moves on its own, within the ball of that radius"
        )
        for (asked, measured), names in said.items()
    ]


def model_digest(model: nn.Module) -> str:
    """Return a digest of the model's structure, weights and buffers."""
    return sanity.digest(json.dumps([str(model), sorted(sanity.fingerprint(model).items())]).encode())


def _model_notes(run: Run, clean: Clean) -> list[str]:
    notes = sanity.of_clean(clean.row, clean.classes)
    if other := resized(run.split):
        notes.append(f"The images are {other}: the perturbations are measured in the resized ones.")
    if clean.probabilities:
        notes.append(
            "The model returns probabilities, not logits: cross entropy and DLR on them have weak gradients, so "
            "attacks look weaker than they are. Evaluate the model without its softmax."
        )
    return notes


def _accuracy(run: Run, model: nn.Module) -> float:
    """Accuracy of another model on the first of the images."""
    ((x, y),) = run.read([np.arange(min(len(run.chosen), sanity.IMAGES))])
    return float(withstands(model, x, y).double().mean())


def _look_at(run: Run) -> str:
    """What the checks of the model find, as JSON: [evidence, notes]."""
    ((x, y),) = run.read([np.arange(min(len(run.chosen), sanity.IMAGES))])
    with counted(run.model) as passes:
        found = sanity.of_model(run.model, x, y)
    found.evidence.update(passes.per_image(len(x)))
    return json.dumps([found.evidence, found.notes])


def _authors_warnings(run: Run) -> list[str]:
    ((x, y),) = run.read([np.arange(min(len(run.chosen), sanity.IMAGES))])
    with heard() as texts:
        authors_check(run.model, x, y)
    return texts
