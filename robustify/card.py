"""The model card's text, made of a run's facts. Every accuracy is a report's; the prose is in model_cards/."""
from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import yaml

from robustify.card_update import YOURS
from robustify.citations import citations, published_row
from robustify.compare import compare
from robustify.errors import UserError
from robustify.front_matter import Origin, attack_name, dataset_name, front_matter
from robustify.intervals import percent, percent_interval
from robustify.methods import METHODS
from robustify.report import Headline, Report, Row, plain
from robustify.threat import ThreatModel

SIZES = {"Linf": "largest change of any channel", "L2": "Euclidean length", "L1": "sum of absolute changes"}


def render(
    *,
    name: str,
    config: Mapping[str, Any],
    recipe: Mapping[str, Any],
    command: str,
    before: Report,
    after: Report,
    half: tuple[Report, Report] | None = None,
    figures: Mapping[str, str] | None = None,
    path: str | None = None,
    hub: str | None = None,
) -> str:
    """Return the card's text: YAML front matter, and the section between the two markers.

    name: of the model. config: its config.json. recipe: resolved, with `method.name` and `threat`. command: what was
    typed. before, after: of the hardening; half: of rounding the weights. figures: captions by file.
    path: of the folder, if not the name. hub: OWNER/NAME, for the card that goes there.
    """
    method, origin = str(recipe["method"]["name"]), _origin(recipe, before, after)
    threats = dict.fromkeys([ThreatModel.parse(recipe["threat"]).spec, *after.threats])
    body = _filled(
        "template.md",
        name=name,
        summary=_summary(name, config, recipe, origin, before, after),
        table=_table(before, after),
        figures="\n\n".join(f"![{caption}]({file})" for file, caption in (figures or {}).items()),
        notes=_notes(origin, before, after),
        headlines="\n".join(_headline(found) for found in after.per_threat()),
        attacks=_attacks(after),
        seed=after.seed,
        report=after.digest(),
        half=_half(half),
        threats="\n".join(f"- {_in_words(ThreatModel.parse(threat))}" for threat in threats),
        data=f"{dataset_name(after)}, {after.split} split",
        usage=_usage(name, path or name, hub, config),
        formats=_formats(config),
        method=_method(recipe),
        command=without_home(command) or "(not recorded)",
        classes=_classes(config),
        digest=config["robustness"].get("recipe"),
        recipe=without_home(yaml.safe_dump(plain(recipe), sort_keys=False)).rstrip(),
        cost=_cost(before, after, config["robustness"].get("training")),
        license=_license(config, origin),
        citations=citations(config, method, after),
    )
    body = re.sub(r"\s*\n\n\n+", "\n\n", body).rstrip()  # where a fact is absent
    head = front_matter(name, config, method, origin, after, half[1] if half else after)
    return f"---\n{head}\n---\n\n{body}\n\n{YOURS}\n"


def _filled(template: str, **values: Any) -> str:
    text = resources.files("robustify.model_cards").joinpath(template).read_text(encoding="utf8")
    return Template(text).substitute(values)


def _origin(recipe: Mapping[str, Any], before: Report, after: Report) -> Origin:
    """What the weights are; as they were where the reports say that they are of the same model."""
    kept = bool(before.facts.get("model")) and before.facts["model"] == after.facts.get("model")
    if recipe["model"].get("pretrained", True):
        return "unchanged" if kept else "finetuned"
    return "random" if kept else "trained"


def _summary(
    name: str, config: Mapping[str, Any], recipe: Mapping[str, Any], origin: Origin, before: Report, after: Report
) -> str:
    method, data, base = recipe["method"]["name"], dataset_name(after), config["robustness"]["base_model"]
    against = f"against adversarial perturbations ({_shown(recipe['threat'])})"
    end = f", {against}." if _adversarial(recipe) else ", which gives no robustness."
    is_a = f"{name} is an image classifier"
    # of a network that a person's own code made nobody knows what its weights were
    how = "trained further" if config["architecture"] == "custom" else "fine-tuned"
    replaced = config["robustness"].get("replaced")
    newly, but = (" with a new classifier", ", but for a new, random classifier") if replaced else ("", "")
    kept_nothing = (
        f"robustify trained them on {data} with the method "
        f"{method}{f' {against}' if _adversarial(recipe) else ''}, but kept nothing of that training."
    )
    sentences = {
        "finetuned": [f"{is_a}: `{base}`{newly}, {how} on {data} by robustify with the method {method}{end}"],
        "trained": [f"{is_a}: `{base}`, trained from random weights on {data} by robustify with the method {method}{end}"],
        "unchanged": [
            f"{is_a} with the weights of `{base}` as they were{but}: {kept_nothing}"
        ],
        "random": [f"{is_a}: `{base}` with random weights: {kept_nothing}"],
    }[origin]
    old = {found.threat: found for found in before.per_threat()} if origin == "finetuned" else {}
    if after.clean:
        was = f" (before: {percent(before.clean.accuracy)})" if before.clean and origin == "finetuned" else ""
        share = f"{percent(after.clean.accuracy)}{was} of {after.clean.n}"
        sentences.append(f"It classifies {share} images of the {after.split} split correctly.")
    for found in after.per_threat():
        was = f" (before: {percent(old[found.threat].accuracy)})" if found.threat in old else ""
        right = f"{percent(found.accuracy)}{was} of {found.n} right"
        sentences.append(f"Under {_shown(found.threat)} it still gets {right}, {_attacked(found)}.")
    return " ".join(sentences)


def _notes(origin: Origin, before: Report, after: Report) -> str:
    """What the reports remark; what they remark on random weights says nothing."""
    earlier = [note for note in before.notes if note not in after.notes] if origin != "trained" else []
    return " ".join([*after.notes, *(f"Before hardening: {note}" for note in earlier)])


def _table(before: Report, after: Report, names: tuple[str, str] = ("Before", "After")) -> str:
    """Before and after: one line per row, one per threat that several attacks share, one for several norms."""
    was, changes = {row.key: row for row in before.rows}, _changes(before, after)
    lines = [["Attack", "Threat", *names, "Change, in points", "n"], ["---"] * 6]
    for row in after.rows:
        change = changes.get((row.attack, row.threat), "")
        lines.append(_line(attack_name(row), row.threat, was.get(row.key), row, change))
    worst = {found.threat: found for found in before.per_threat()}
    for found in after.worst_cases():
        change = changes.get(("worst case", found.threat), "")
        lines.append(_line("**Worst case**", found.threat, worst.get(found.threat), found, change))
    return _rows(lines)


def _line(label: str, threat: str | None, old: Row | Headline | None, new: Row | Headline, change: str) -> list[str]:
    def cell(row: Row | Headline | None) -> str:
        return f"{percent(row.accuracy)} {percent_interval(row.interval)}" if row else "not measured"

    return [label, _shown(threat), cell(old), cell(new), change, str(new.n)]


def _changes(before: Report, after: Report) -> dict[tuple[str, str | None], str]:
    """The paired differences by attack and threat, where both reports saw the same images."""
    try:
        (found,) = compare([before, after])
    except UserError:
        return {}
    return {(one.attack, one.threat): one.in_points() for one in found.differences}


def _headline(found: Headline) -> str:
    interval = f"95 % interval {percent_interval(found.interval)}, n = {found.n}"
    return f"- **{_shown(found.threat)}: {percent(found.accuracy)}** {_attacked(found)} ({interval})."


def _attacked(found: Headline) -> str:
    attacks = ", ".join(found.attacks)
    return f"in the worst case over {attacks}" if len(found.attacks) > 1 else f"against {attacks}"


def _attacks(after: Report) -> str:
    lines = [["Attack", "Threat", "Settings", "Forward / backward passes per image", "Seconds"], ["---"] * 5]
    for row in after.rows:
        passes = " / ".join(f"{row.passes[key]:g}" for key in ("forward", "backward") if key in row.passes)
        lines.append([attack_name(row), _shown(row.threat), row.told(), passes, f"{row.seconds:.1f}"])
    return _rows(lines)


def _rows(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _in_words(threat: ThreatModel) -> str:
    """The threat for a reader who does not know the notation."""
    size, radius = SIZES[threat.norm], threat.spec.rsplit(":", 1)[1]
    if threat.p is None:
        return f"**{threat}**: each image may change; the {size} is at most {radius}, for pixels in [0,1]."
    if math.isinf(threat.p):
        return f"**{threat}**: the largest Wasserstein order, so the same as {threat.pointwise()} for every image."
    mean = f"E[s^{threat.p:g}] <= ({radius})^{threat.p:g}, where s is an image's {size}"
    return (
        f"**{threat}**: the distribution of the images may move within a Wasserstein ball (order {threat.p:g}, ground "
        f"norm {threat.norm}). The images share one budget, so some may change by more: {mean}, for pixels in [0,1]."
    )


def _half(reports: tuple[Report, Report] | None) -> str:
    if reports is None:
        return ""
    text = "The weights in this folder were rounded to half precision after the measurements above. What that changed"
    table = _table(*reports, names=("Single precision", "Rounded"))
    return f"## Half precision\n\n{text} (reports `{reports[0].digest()}`, `{reports[1].digest()}`):\n\n{table}"


def _adversarial(recipe: Mapping[str, Any]) -> bool:
    return METHODS[str(recipe["method"]["name"])].adversarial


def _method(recipe: Mapping[str, Any]) -> str:
    how = f"trained against {_shown(recipe['threat'])}" if _adversarial(recipe) else "trained without an adversary"
    return f"Method {recipe['method']['name']}, {how}."


def _usage(name: str, path: str, hub: str | None, config: Mapping[str, Any]) -> str:
    arch = config["architecture"]
    weights = f'huggingface_hub.hf_hub_download("{hub}", "model.safetensors")' if hub else f'"{path}/model.safetensors"'
    if arch == "custom":
        return _filled("use_custom.md", weights=weights).rstrip()
    ours = arch.startswith(("robustbench_", "robustify_"))
    arguments = {"num_classes": config["num_classes"], **config.get("model_args", {})}
    imports = ["import huggingface_hub"] * bool(hub)
    imports += ["import robustify  # registers the architecture with timm"] * ours
    return _filled(
        "use_timm.md",
        alone="" if ours else " alone",
        hub="" if hub else f"; on the hub, `hf-hub:OWNER/{name}`",
        location=f"hf-hub:{hub}" if hub else f"local-dir:{path}",
        source=f"hf-hub:{hub}" if hub else path,
        weights=weights,
        arch=arch,
        first="\n".join([*imports, "import timm", ""]),
        arguments=", ".join(f"{key}={value!r}" for key, value in arguments.items()),
        shape=", ".join(map(str, config["pretrained_cfg"]["input_size"])),
    ).rstrip()


def _formats(config: Mapping[str, Any]) -> str:
    readers = {"onnx": "ONNX Runtime", "pt2": "`torch.export.load`"}
    lines = [
        f"- `model.{name}`, for {readers[name]}: images in [0,1], float32 [N, C, H, W] of any N, to logits; it normalises "
        "them itself. By how much its logits differ is in `config.json`."
        for name in config["robustness"].get("formats", {})
    ]
    return "\n".join(["The same network in other formats:\n", *lines]) if lines else ""


def _classes(config: Mapping[str, Any]) -> str:
    names = config.get("label_names") or []
    if not names:
        return f"It tells {config['num_classes']} classes apart; their names are not known."
    shown = ", ".join(names[:20]) + (", ... (all in `config.json`)" if len(names) > 20 else "")
    return f"Its {len(names)} classes, in the order of the outputs: {shown}."


def _cost(before: Report, after: Report, training: Mapping[str, Any] | None) -> str:
    """Seconds, passes, epoch, device. training: what the pipeline writes of it into config.json."""
    env = after.environment
    trained = "The training was not timed"
    if training:
        trained = f"Training took {_hours(training['seconds'])}"
        passes = ", ".join(f"{count:g} {kind}" for kind, count in training["passes_per_image"].items())
        trained += f": {training['steps']} steps of {training['batch_size']} images, and for each image {passes} passes; "
        trained += _kept(training)
    first, second = (sum(row.seconds for row in report.rows) for report in (before, after))
    place = f"{env.get('device', 'an unknown device')}, {env.get('threads', '?')} threads"
    versions = ", ".join(f"{key} {env[key]}" for key in ("robustify", "torch", "timm", "python") if key in env)
    return f"{trained}. Measuring took {_hours(first)} before and {_hours(second)} after it, on {place} ({versions})."


def _kept(training: Mapping[str, Any]) -> str:
    epochs = f" of {training['epochs']}" if "epochs" in training else ""  # which an older run did not write down
    return f"kept: epoch {training['best_epoch']}{epochs}" if training["best_epoch"] else "kept: the start"


def _hours(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 3600:.2f} hours"


def _license(config: Mapping[str, Any], origin: Origin) -> str:
    base_id, license = config["robustness"]["base_model"], config["pretrained_cfg"].get("license")
    if origin in ("trained", "random"):
        stated = f"Its license is {license}." if license else "No license is stated: ask its maker before you share it."
        return f"There is no base model: `{base_id}` names the architecture. {stated}"
    link = (published_row(base_id) or {}).get("link")
    base = f"The base model is `{base_id}`" + (f" ({link})" if link else "")
    if license:
        return f"{base}. Its license, {license}, holds for this model too. Please cite the base model."
    return f"{base}. Its license is unknown: ask its authors before you share this model, and cite them."


def _shown(threat: str | None) -> str:
    """The threat for people; of several norms all."""
    return " and ".join(str(ThreatModel.parse(spec)) for spec in threat.split(" and ")) if threat else ""


def without_home(text: str) -> str:
    """Shorten the home folder to ~: a public card need not tell who typed the command."""
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) if len(home) > 1 else text
