"""The model card: a README.md for the Hugging Face hub, made of a run's facts. Every figure on it is a report's."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from robustify import files
from robustify.errors import UserError
from robustify.report import Headline, Report, Row, paired_difference, percent, percent_interval, plain
from robustify.sources.checkpoint import Checkpoint
from robustify.threat import ThreatModel

BEGIN, END = "<!-- robustify:begin -->", "<!-- robustify:end -->"
YOURS = "<!-- Text outside the two robustify markers is yours: it stays when this card is made anew. -->"

# data sets by the hub's names, and the license identifiers that the hub accepts and timm or RobustBench use
HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "imagenet": "ILSVRC/imagenet-1k", "mnist": "ylecun/mnist",
}  # fmt: skip
HUB_LICENSES = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "openrail", "unlicense", "other",
}  # fmt: skip
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")  # OWNER/NAME; other sources' names have a colon, no slash, or several

PAPERS = {
    "2306.09844": ("bai2023wasserstein", "Bai, Xingjian and He, Guangyi and Jiang, Yifan and Obloj, Jan",
                   "Wasserstein distributional robustness of neural networks", 2023),
    "2502.09352": ("bai2025wasserstein", "Bai, Xingjian and He, Guangyi and Jiang, Yifan and Obloj, Jan",
                   "Wasserstein distributional adversarial training for deep neural networks", 2025),
    "1901.08573": ("zhang2019theoretically",
                   "Zhang, Hongyang and Yu, Yaodong and Jiao, Jiantao and Xing, Eric and El Ghaoui, Laurent and Jordan, Michael",
                   "Theoretically principled trade-off between robustness and accuracy", 2019),
    "1706.06083": ("madry2018towards",
                   "Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, Adrian",
                   "Towards deep learning models resistant to adversarial attacks", 2017),
    "2001.03994": ("wong2020fast", "Wong, Eric and Rice, Leslie and Kolter, J. Zico",
                   "Fast is better than free: revisiting adversarial training", 2020),
}  # fmt: skip
METHOD_PAPERS = {
    "wasserstein": ["2502.09352", "2306.09844", "1901.08573"], "trades": ["1901.08573"], "pgd-at": ["1706.06083"],
    "fast-at": ["2001.03994"],
}  # fmt: skip


def write_card(folder: str | Path, **facts: Any) -> Path:
    """Write README.md into an exported folder and return its path; what a person wrote there stays. facts: see render."""
    path = Path(folder) / "README.md"
    text = render(name=facts.pop("name", Path(folder).resolve().name), **facts)
    if path.exists():
        text = update(path.read_text(encoding="utf8"), text)
    files.write_text(path, text)
    return path


def render(
    *,
    name: str,
    checkpoint: Checkpoint,
    recipe: Mapping[str, Any],
    digest: str,
    command: str,
    before: Report,
    after: Report,
    class_names: Sequence[str] = (),
    seconds: float | None = None,
) -> str:
    """Return the card's text: YAML front matter, and the section between the two markers.

    name: of the exported folder. checkpoint: the base. recipe, digest: as resolved. seconds: spent in training, if known.
    """
    text = resources.files("robustify.model_cards").joinpath("template.md").read_text(encoding="utf8")
    body = Template(text).substitute(
        name=name,
        summary=_summary(name, checkpoint, recipe, before, after),
        table=_table(before, after),
        table_note=_table_note(before, after),
        headlines="\n".join(_headline(after.headline(threat)) for threat in after.threats),
        attacks=_attacks(after),
        threats="\n".join(f"- {_describe(ThreatModel.parse(t))}" for t in _threats(recipe, after)),
        data=f"{after.data}, {after.split} split",
        claims=_claims(after),
        usage=_usage(name, checkpoint),
        made=_made(recipe, command, class_names),
        digest=digest,
        recipe=_private(yaml.safe_dump(plain(recipe), sort_keys=False)).rstrip(),
        cost=_cost(after, before, seconds),
        license=_license(checkpoint),
        citations=_citations(recipe, checkpoint),
    )
    return f"---\n{_front_matter(name, checkpoint, recipe, after)}\n---\n\n{body.rstrip()}\n\n{YOURS}\n"


def update(existing: str, new: str) -> str:
    """Return `existing` with its generated section and front matter as in `new`; everything that a person wrote stays.

    Keys of the front matter that only `existing` has stay, and so do its own tags and data sets. A text without markers
    gets the new section at its end. Raises UserError when one of the two markers is missing or they are out of order.
    """
    old_head, old_body = _split(existing)
    new_head, new_body = _split(new)
    merged = {**old_head, **new_head}
    for key in ("tags", "datasets"):
        kept = [item for item in _as_list(old_head.get(key)) if item not in _as_list(new_head.get(key))]
        if kept:
            merged[key] = [*_as_list(new_head.get(key)), *kept]
    section = new_body[new_body.index(BEGIN) : new_body.index(END) + len(END)]
    marks = old_body.count(BEGIN), old_body.count(END)
    if marks == (0, 0):
        body = f"{old_body.rstrip()}\n\n{section}\n"
    elif marks != (1, 1) or old_body.index(BEGIN) > old_body.index(END):
        raise UserError("the card's two robustify markers are not both there, once and in order", f"{BEGIN} ... {END}")
    else:
        body = old_body[: old_body.index(BEGIN)] + section + old_body[old_body.index(END) + len(END) :]
    return f"---\n{_yaml(merged)}---\n{body}"


def _split(text: str) -> tuple[dict[str, Any], str]:
    """The front matter and the rest, which begins after its closing line."""
    found = re.match(r"---\r?\n(.*?)^---[ \t]*\r?\n", text, re.DOTALL | re.MULTILINE)
    if not found:
        return {}, "\n" + text
    try:
        head = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise UserError(f"the card's front matter is not valid YAML: {error}", "mend it, or move the card away") from None
    return head, text[found.end() :]


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def _front_matter(name: str, checkpoint: Checkpoint, recipe: Mapping[str, Any], after: Report) -> str:
    """What the hub reads. What is not known is left out: no license and no base model are guessed."""
    method, data = recipe["method"]["name"], _dataset(after)
    license_ = (checkpoint.license or "").lower()
    known = {"license": license_} if license_ in HUB_LICENSES else {"license": "other", "license_name": license_}
    base = {"base_model": checkpoint.base_id, "base_model_relation": "finetune"} if _is_hub_id(checkpoint.base_id) else {}
    card = ModelCardData(
        library_name="pytorch" if checkpoint.arch == "custom" else "timm",
        pipeline_tag="image-classification",
        **(known if license_ else {}),
        **base,
        datasets=[HUB_DATASETS[data]] if data in HUB_DATASETS else None,
        metrics=["accuracy"],
        tags=["image-classification", "adversarial-robustness", "robustify", method],
        model_name=name,
        eval_results=_results(after),
    )
    return card.to_yaml().strip()


def _results(after: Report) -> list[EvalResult]:
    """One result per row, then one per headline: accuracies as shares, to four digits like the card's per cents."""
    data = _dataset(after)

    def result(label: str, row: Row | Headline, settings: dict[str, Any]) -> EvalResult:
        return EvalResult(
            task_type="image-classification", task_name="Image Classification",
            dataset_type=HUB_DATASETS.get(data, data), dataset_name=data, dataset_split=after.split,
            metric_type="accuracy", metric_value=round(row.accuracy, 4), metric_name=label,
            metric_args=plain({**settings, "n": row.n}),
        )  # fmt: skip

    rows = [
        result(f"{_attack(row)} accuracy{_radius(row.threat)}", row, {"attack": row.attack, "threat": row.threat, **row.settings})
        for row in after.rows
    ]
    heads = [after.headline(threat) for threat in after.threats]
    worst = [
        result(f"Worst-case accuracy{_radius(h.threat)}", h, {"attacks": h.attacks, "threat": h.threat})
        for h in heads if len(h.attacks) > 1
    ]  # fmt: skip
    return rows + worst


def _summary(name: str, checkpoint: Checkpoint, recipe: Mapping[str, Any], before: Report, after: Report) -> str:
    trained = _shown(recipe["threat"])
    text = (
        f"{name} is an image classifier: `{checkpoint.base_id}`, fine-tuned by robustify with the method "
        f"{recipe['method']['name']} so that it withstands adversarial perturbations ({trained}) on {_dataset(after)}."
    )
    for threat in after.threats:
        found = after.headline(threat)
        was = f" (before: {percent(before.headline(threat).accuracy)})" if threat in before.threats else ""
        text += f" Under {_shown(threat)} it classifies {percent(found.accuracy)}{was} of {found.n} {after.split} images correctly."
    if after.clean:
        was = f" (before: {percent(before.clean.accuracy)})" if before.clean else ""
        text += f" Without a perturbation it classifies {percent(after.clean.accuracy)}{was} correctly."
    return text


def _table(before: Report, after: Report) -> str:
    """Before and after, one line per row and one in bold per threat that several attacks share."""
    lines = ["| Attack | Threat | Before | After | Change, points | n |", "|---|---|---|---|---|---|"]
    was = {row.key: row for row in before.rows}
    for row in after.rows:
        change = _change(before.verdicts.get(row.key), after.verdicts.get(row.key), before, after)
        lines.append(_line(_attack(row), row.threat, was.get(row.key), row, change))
    for threat in after.threats:
        found = after.headline(threat)
        if len(found.attacks) > 1:
            old = before.headline(threat) if threat in before.threats else None
            change = _change(before.held(threat), after.held(threat), before, after)
            lines.append(_line("**Worst case**", threat, old, found, change))
    return "\n".join(lines)


def _line(label: str, threat: str | None, old: Row | Headline | None, new: Row | Headline, change: str) -> str:
    def cell(row: Row | Headline | None) -> str:
        return f"{percent(row.accuracy)} {percent_interval(row.interval)}" if row else "not measured"

    return f"| {label} | {_shown(threat)} | {cell(old)} | {cell(new)} | {change} | {new.n} |"


def _change(old: Any, new: Any, before: Report, after: Report) -> str:
    """The paired difference, where both reports saw the same images."""
    same = (before.data, before.split, before.seed) == (after.data, after.split, after.seed)
    if old is None or new is None or len(old) != len(new) or not same:
        return ""
    difference, low, high = paired_difference(old, new)
    return f"{100 * difference:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def _table_note(before: Report, after: Report) -> str:
    text = "In brackets: 95 % intervals, Wilson's for accuracies; changes are paired, image by image."
    if any(h.n != row.n for row in after.rows for h in map(after.headline, after.threats)):
        text += " The worst case is over the images that all attacks saw."
    if before.notes or after.notes:
        text += " " + " ".join(dict.fromkeys([*before.notes, *after.notes]))
    return text


def _headline(found: Headline) -> str:
    how = f"in the worst case over {', '.join(found.attacks)}" if len(found.attacks) > 1 else f"against {found.attacks[0]}"
    interval = f"95 % interval {percent_interval(found.interval)}, n = {found.n}"
    return f"- **{_shown(found.threat)}: {percent(found.accuracy)}** {how} ({interval})."


def _attacks(after: Report) -> str:
    lines = ["| Attack | Threat | Settings | Forward / backward passes per image | Seconds |", "|---|---|---|---|---|"]
    for row in after.rows:
        settings = ", ".join(f"{key}={value}" for key, value in row.settings.items())
        passes = " / ".join(f"{row.passes[key]:g}" for key in ("forward", "backward") if key in row.passes)
        lines.append(f"| {_attack(row)} | {_shown(row.threat)} | {settings} | {passes} | {row.seconds:.1f} |")
    return "\n".join(lines) + f"\n\nSeed {after.seed}, report digest `{after.digest()}`, single precision."


def _threats(recipe: Mapping[str, Any], after: Report) -> list[str]:
    return list(dict.fromkeys([ThreatModel.parse(recipe["threat"]).spec, *after.threats]))


def _describe(threat: ThreatModel) -> str:
    """The threat in words, for a reader who does not know the notation."""
    radius = threat.spec.rsplit(":", 1)[1]
    size = {"Linf": "largest change of a pixel's channel", "L2": "Euclidean length", "L1": "sum of absolute changes"}[threat.norm]
    if threat.p is None:
        return f"**{threat}**: the adversary may change each image; the {size} is at most {radius}, pixels in [0,1]."
    share = "the largest change of any image" if threat.p == float("inf") else f"the mean of its {threat.p:g}th power"
    if threat.p == 2:
        share = "the root of the mean of its square"
    elif threat.p != float("inf"):
        share += f", to the power 1/{threat.p:g},"
    return (
        f"**{threat}**: the adversary may move the distribution of the images within a Wasserstein ball (order {threat.p:g}, "
        f"ground norm {threat.norm}). One budget is shared: single images may change by more, so long as, of the {size} of an "
        f"image, {share} over all images is at most {radius}, pixels in [0,1]."
    )


def _claims(after: Report) -> str:
    if not any(row.kind == "distributional" for row in after.rows):
        return "- Distributional (Wasserstein) adversaries were not measured."
    return (
        "- The W- attacks share one budget over the images measured. They are estimates: as attacks they bound the worst case\n"
        "  from above, their budget is that of the sample and not of the true distribution, and their images are not\n"
        "  independent, so their intervals are approximate."
    )


def _usage(name: str, checkpoint: Checkpoint) -> str:
    if checkpoint.arch == "custom":
        return (
            "The files hold the weights of a class of its author's. Its input is normalised by `mean` and `std` of `config.json`.\n\n"
            f"```python\nimport safetensors.torch\n\nnet = YourNetwork()\n"
            f'net.load_state_dict(safetensors.torch.load_file("{name}/model.safetensors"))\nnet.eval()\n```'
        )
    ours = checkpoint.arch.startswith(("robustbench_", "robustify_"))
    first = "import robustify  # registers the architecture with timm\nimport timm\n" if ours else "import timm\n"
    given = "".join(f", {key}={value!r}" for key, value in checkpoint.arch_args.items())
    return f"""With timm alone (1.0.15 or newer; on the hub, `hf-hub:OWNER/{name}`). The input is normalised as its configuration says:

```python
{first}
model = timm.create_model("local-dir:{name}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)  # a PIL image -> the model's input
```

With an older timm: `timm.create_model("{checkpoint.arch}", num_classes={checkpoint.num_classes}{given}, checkpoint_path="{name}/model.safetensors")`.

With robustify, which takes images in [0,1] and normalises by itself, as attacks need it:

```python
import robustify

model = robustify.load("{name}").model  # float images in [0,1], [N, {", ".join(map(str, checkpoint.input_size))}], to logits
```"""


def _made(recipe: Mapping[str, Any], command: str, class_names: Sequence[str]) -> str:
    parts = [f"Method: {recipe['method']['name']}, trained against {_shown(recipe['threat'])}."]
    if command:
        parts.append(f"```sh\n{_private(command)}\n```")
    if class_names:
        shown = ", ".join(class_names[:20]) + (", ..." if len(class_names) > 20 else "")
        parts.append(f"Classes, in the order of the outputs ({len(class_names)}): {shown}.")
    return "\n\n".join(parts)


def _cost(after: Report, before: Report, seconds: float | None) -> str:
    env = after.environment
    place = env.get("device", "an unknown device") + (f", {env['threads']} threads" if "threads" in env else "")
    training = f"Training took {seconds:.1f} s" if seconds is not None else "The training's time is not known"
    spent = [sum(row.seconds for row in report.rows) for report in (before, after)]
    versions = ", ".join(f"{key} {env[key]}" for key in ("robustify", "torch", "timm", "python") if key in env)
    return f"{training}; measuring took {spent[0]:.1f} s before and {spent[1]:.1f} s after. On {place}; {versions}."


def _license(checkpoint: Checkpoint) -> str:
    base = f"The base model is `{checkpoint.base_id}`"
    link = (checkpoint.published or {}).get("link")
    where = f" ({link})" if link else ""
    if checkpoint.license:
        return f"{base}{where}; its license, {checkpoint.license}, holds for this model too. Please cite the base model as well."
    return f"{base}{where}; its license is unknown, so ask its authors before you share this. Please cite the base model as well."


def _citations(recipe: Mapping[str, Any], checkpoint: Checkpoint) -> str:
    ids = METHOD_PAPERS.get(recipe["method"]["name"], [])
    if not ids:
        return ""
    return "```bibtex\n" + "\n".join(_bibtex(arxiv) for arxiv in ids) + "\n```"


def _bibtex(arxiv: str) -> str:
    key, authors, title, year = PAPERS[arxiv]
    return (
        f"@article{{{key},\n  author = {{{authors}}},\n  title = {{{title}}},\n"
        f"  journal = {{arXiv preprint arXiv:{arxiv}}},\n  year = {{{year}}}\n}}"
    )


def _attack(row: Row) -> str:
    """`PGD`, or `PGD (steps=50)` for a row that names its settings to tell it from another."""
    name, _, settings = row.attack.partition(":")
    shown = {"clean": "Clean", "autoattack": "AutoAttack"}.get(name, name.upper())
    return f"{shown} ({settings})" if settings else shown


def _radius(threat: str | None) -> str:
    """` (Linf, eps=8/255)`, as leaderboards write it."""
    if threat is None:
        return ""
    norm, _, radius = threat.rpartition(":")
    return f" ({norm}, {'delta' if norm.startswith('W') else 'eps'}={radius})"


def _shown(threat: str | ThreatModel | None) -> str:
    return str(ThreatModel.parse(threat)) if threat else ""


def _dataset(report: Report) -> str:
    """The data set's name without its digest, and without the folders of the one who ran it."""
    kind, _, path = report.data.split(" (")[0].partition(":")
    return Path(path).name if path else kind


def _is_hub_id(base_id: str) -> bool:
    return bool(HUB_ID.match(base_id)) and not base_id.startswith(".")


def _private(text: str) -> str:
    """Shorten the home folder to ~: a public card need not tell who ran the command."""
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?=/|\s|$)", "~", text) if len(home) > 1 else text
