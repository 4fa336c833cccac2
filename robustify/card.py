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

from robustify.citations import citations, published_row
from robustify.compare import compare
from robustify.errors import UserError
from robustify.front_matter import WRITTEN, attack_name, dataset_name, front_matter
from robustify.intervals import percent, percent_interval
from robustify.methods import METHODS
from robustify.report import Headline, Report, Row, plain
from robustify.threat import ThreatModel

BEGIN, END = "<!-- robustify:begin -->", "<!-- robustify:end -->"
YOURS = "<!-- Text outside the two robustify markers is yours: it stays when this card is made anew. -->"
HIDDEN = ("stages", "left")  # of a cascade: they are in the report
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
    method = str(recipe["method"]["name"])
    headlines = [after.headline(threat) for threat in after.threats]
    threats = dict.fromkeys([ThreatModel.parse(recipe["threat"]).spec, *after.threats])
    body = _filled(
        "template.md",
        name=name,
        summary=_summary(name, config, recipe, before, after),
        table=_table(before, after, headlines),
        figures="\n\n".join(f"![{caption}]({file})" for file, caption in (figures or {}).items()),
        notes=" ".join([*after.notes, *(f"Before hardening: {n}" for n in before.notes if n not in after.notes)]),
        headlines="\n".join(_headline(found) for found in headlines),
        attacks=_attacks(after),
        seed=after.seed,
        report=after.digest(),
        half=_half(half),
        threats="\n".join(f"- {_in_words(ThreatModel.parse(threat))}" for threat in threats),
        data=f"{dataset_name(after)}, {after.split} split",
        usage=_usage(name, path or name, hub, config),
        method=method,
        threat=_shown(recipe["threat"]),
        command=without_home(command) or "(not recorded)",
        classes=_classes(config),
        digest=config["robustness"].get("recipe"),
        recipe=without_home(yaml.safe_dump(plain(recipe), sort_keys=False)).rstrip(),
        cost=_cost(before, after, config["robustness"].get("training")),
        license=_license(config),
        citations=citations(config, method, after),
    )
    body = re.sub(r"\s*\n\n\n+", "\n\n", body).rstrip()  # where a fact is absent
    return f"---\n{front_matter(name, config, method, after, half[1] if half else after)}\n---\n\n{body}\n\n{YOURS}\n"


def update(existing: str, new: str) -> str:
    """Return `existing` with its generated section and front matter as in `new`; everything that a person wrote stays.

    Of the front matter that is the keys that robustify never writes, and tags but for the methods': what an older model's
    card says of its license, base and data is not true of another. A text without markers gets the new section at its
    end. Raises UserError when one of the two markers is missing or they are out of order.
    """
    old_head, old_body = _split(existing)
    new_head, new_body = _split(new)
    head = {**{key: value for key, value in old_head.items() if key not in WRITTEN}, **new_head}
    if isinstance(old_head.get("tags"), list):
        head["tags"] = list(dict.fromkeys([*new_head["tags"], *(tag for tag in old_head["tags"] if tag not in METHODS)]))
    section = new_body[new_body.index(BEGIN) : new_body.index(END) + len(END)]
    marks = old_body.count(BEGIN), old_body.count(END)
    if marks == (0, 0):
        body = f"{old_body.rstrip()}\n\n{section}\n"
    elif marks == (1, 1) and old_body.index(BEGIN) < old_body.index(END):
        body = old_body[: old_body.index(BEGIN)] + section + old_body[old_body.index(END) + len(END) :]
    else:
        raise UserError("the card's two robustify markers must be there once each, in order", f"{BEGIN} ... {END}")
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n{body}"


def has_own_text(text: str) -> bool:
    """Return whether a person wrote something into the card, outside the generated section."""
    _, body = _split(text)
    return bool(re.sub(f"{BEGIN}.*{END}", "", body, flags=re.DOTALL).replace(YOURS, "").strip())


def _split(text: str) -> tuple[dict[str, Any], str]:
    """The front matter, and the text that follows its closing line."""
    found = re.match(r"---\s*\n(.*?)^---\s*\n", text, re.DOTALL | re.MULTILINE)
    if not found:
        return {}, "\n" + text
    try:
        head = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise UserError(f"the card's front matter is not valid YAML: {error}", "mend it, or move the card") from None
    return head, "\n" + text[found.end() :].lstrip("\n")


def _filled(template: str, **values: Any) -> str:
    text = resources.files("robustify.model_cards").joinpath(template).read_text(encoding="utf8")
    return Template(text).substitute(values)


def _summary(name: str, config: Mapping[str, Any], recipe: Mapping[str, Any], before: Report, after: Report) -> str:
    method, threat, base = recipe["method"]["name"], _shown(recipe["threat"]), config["robustness"]["base_model"]
    sentences = [
        f"{name} is an image classifier: `{base}`, fine-tuned on {dataset_name(after)} by robustify with "
        f"the method {method}, "
        + ("which gives no robustness." if method == "standard" else f"against adversarial perturbations ({threat}).")
    ]
    if after.clean:
        was = f" (before: {percent(before.clean.accuracy)})" if before.clean else ""
        share = f"{percent(after.clean.accuracy)}{was} of {after.clean.n}"
        sentences.append(f"It classifies {share} images of the {after.split} split correctly.")
    for threat in after.threats:
        was = f" (before: {percent(before.headline(threat).accuracy)})" if threat in before.threats else ""
        found = after.headline(threat)
        sentences.append(f"Under {_shown(threat)} it still gets {percent(found.accuracy)}{was} of {found.n} right.")
    return " ".join(sentences)


def _table(
    before: Report, after: Report, headlines: Sequence[Headline], names: tuple[str, str] = ("Before", "After")
) -> str:
    """Before and after: one line per row, and one per threat that several attacks share."""
    was, changes = {row.key: row for row in before.rows}, _changes(before, after)
    lines = [["Attack", "Threat", *names, "Change, in points", "n"], ["---"] * 6]
    for row in after.rows:
        change = changes.get((row.attack, row.threat), "")
        lines.append(_line(attack_name(row), row.threat, was.get(row.key), row, change))
    for found in headlines:
        if len(found.attacks) > 1:
            old = before.headline(found.threat) if found.threat in before.threats else None
            change = changes.get(("worst case", found.threat), "")
            lines.append(_line("**Worst case**", found.threat, old, found, change))
    return _rows(lines)


def _line(label: str, threat: str | None, old: Row | Headline | None, new: Row | Headline, change: str) -> list[str]:
    def cell(row: Row | Headline | None) -> str:
        return f"{percent(row.accuracy)} {percent_interval(row.interval)}" if row else "not measured"

    return [label, _shown(threat), cell(old), cell(new), change, str(new.n)]


def _changes(before: Report, after: Report) -> dict[tuple[str, str | None], str]:
    """The paired differences by attack and threat, where both reports saw the same images and an interval is known."""
    try:
        (found,) = compare([before, after])
    except UserError:
        return {}
    return {(one.attack, one.threat): one.in_points() for one in found.differences if one.interval}


def _headline(found: Headline) -> str:
    attacks = ", ".join(found.attacks)
    how = f"in the worst case over {attacks}" if len(found.attacks) > 1 else f"against {attacks}"
    interval = f"95 % interval {percent_interval(found.interval)}, n = {found.n}"
    return f"- **{_shown(found.threat)}: {percent(found.accuracy)}** {how} ({interval})."


def _attacks(after: Report) -> str:
    lines = [["Attack", "Threat", "Settings", "Forward / backward passes per image", "Seconds"], ["---"] * 5]
    for row in after.rows:
        settings = ", ".join(f"{key}={value}" for key, value in row.settings.items() if key not in HIDDEN)
        passes = " / ".join(f"{row.passes[key]:g}" for key in ("forward", "backward") if key in row.passes)
        lines.append([attack_name(row), _shown(row.threat), settings, passes, f"{row.seconds:.1f}"])
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
    table = _table(*reports, headlines=(), names=("Single precision", "Rounded"))
    return f"## Half precision\n\n{text} (reports `{reports[0].digest()}`, `{reports[1].digest()}`):\n\n{table}"


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


def _classes(config: Mapping[str, Any]) -> str:
    names = config.get("label_names") or []
    if not names:
        return f"It tells {config['num_classes']} classes apart; their names are not known."
    shown = ", ".join(names[:20]) + (", ... (all in `config.json`)" if len(names) > 20 else "")
    return f"Its {len(names)} classes, in the order of the outputs: {shown}."


def _cost(before: Report, after: Report, training: Mapping[str, Any] | None) -> str:
    """Seconds, passes, device. training: seconds, steps, batch_size and passes per image, as the pipeline writes them."""
    env = after.environment
    trained = "The training was not timed"
    if training:
        trained = f"Training took {_hours(training['seconds'])}"
        passes = ", ".join(f"{count:g} {kind}" for kind, count in training["passes_per_image"].items())
        trained += f": {training['steps']} steps of {training['batch_size']} images, and for each image {passes} passes"
    first, second = (sum(row.seconds for row in report.rows) for report in (before, after))
    place = f"{env.get('device', 'an unknown device')}, {env.get('threads', '?')} threads"
    versions = ", ".join(f"{key} {env[key]}" for key in ("robustify", "torch", "timm", "python") if key in env)
    return f"{trained}. Measuring took {_hours(first)} before and {_hours(second)} after it, on {place} ({versions})."


def _hours(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 3600:.2f} hours"


def _license(config: Mapping[str, Any]) -> str:
    origin, license = config["robustness"]["base_model"], config["pretrained_cfg"].get("license")
    link = (published_row(origin) or {}).get("link")
    base = f"The base model is `{origin}`" + (f" ({link})" if link else "")
    if license:
        return f"{base}. Its license, {license}, holds for this model too. Please cite the base model."
    return f"{base}. Its license is unknown: ask its authors before you share this model, and cite them."


def _shown(threat: str | ThreatModel | None) -> str:
    return str(ThreatModel.parse(threat)) if threat else ""


def without_home(text: str) -> str:
    """Shorten the home folder to ~: a public card need not tell who typed the command."""
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) if len(home) > 1 else text
