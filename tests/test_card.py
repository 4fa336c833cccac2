"""Model cards: every figure is a report's, the hub can read them, and what a person wrote stays."""
from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard

from robustify import api, card, citations
from robustify.card import render
from robustify.card_update import BEGIN, END, update
from robustify.citations import METHOD_PAPERS, entries_by_key
from robustify.errors import UserError
from robustify.export import export
from robustify.front_matter import attack_name, eval_results
from robustify.intervals import paired_difference, percent, percent_interval
from robustify.model_folder import write_card
from robustify.pixels import PixelModel
from robustify.report import Headline, Report, Row, load_pair, save_pair
from robustify.sources.checkpoint import Checkpoint
from robustify.threat import ThreatModel

LINF, W2 = "Linf:8/255", "W2-Linf:8/255"
RECIPE = {
    "model": {"source": "resnet10t.c3_in1k"},
    "data": {"name": "cifar10", "root": str(Path.home() / "pictures")},
    "threat": W2,
    "method": {"name": "wasserstein", "beta": 6.0},
}


def report(seed: int, share: float, **more) -> Report:
    held = {key: np.random.default_rng(seed + i).random(173) < share / (i + 1) for i, key in enumerate("cpqw")}
    keys = ["clean", f"pgd {LINF}", f"apgd-ce {LINF}", f"w-pgd {W2}"]
    verdicts = dict(zip(keys, held.values(), strict=True))

    def row(key: str, kind="pointwise", **settings) -> Row:
        attack, _, threat = key.partition(" ")
        right = int(verdicts[key].sum())
        return Row(attack, threat or None, 173, right, settings, {"forward": 21, "backward": 20}, 1.25, kind)

    rows = [
        row(keys[0], "clean"),
        row(keys[1], steps=20, restarts=2),
        row(keys[2], steps=100),
        row(keys[3], "distributional", steps=30),
    ]
    environment = {"device": "a processor", "threads": 2, "torch": "2.4", "robustify": "0.1"}
    facts = {"environment": environment, "seed": 1, **more}
    return Report("m", "cifar10 (0123456789ab)", "test", rows, verdicts, **facts)


BEFORE, AFTER = report(10, 0.9), report(20, 0.7)


def config(**more) -> dict:
    facts = {"base_model": "timm/resnet10t.c3_in1k", "license": "apache-2.0", "dataset": "imagenet", **more}
    passes = {"forward": 13, "backward to the image": 11, "backward to the weights": 2}
    training = {"seconds": 61.2, "steps": 400, "batch_size": 128, "epochs": 5, "best_epoch": 3, "passes_per_image": passes}
    return {
        "architecture": facts.get("arch", "resnet10t"), "num_classes": 10, "label_names": facts.get("label_names", []),
        "pretrained_cfg": {"input_size": [3, 32, 32], "license": facts["license"]},
        "robustness": {"base_model": facts["base_model"], "dataset": facts["dataset"], "recipe": "abc123",
                       "training": {**training, **facts.get("training", {})}},
    }  # fmt: skip


def made(**more) -> str:
    facts = {
        "name": "resnet10t-robust", "config": config(), "recipe": RECIPE,
        "command": "robustify finetune cifar10-wasserstein -o resnet10t-robust", "before": BEFORE, "after": AFTER,
    }  # fmt: skip
    return render(**{**facts, **more})


def head(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


COMMITTED = Path(__file__).parents[1] / "model_cards"
FOLDERS = sorted(path.parent.name for path in COMMITTED.glob("*/config.json"))


def card_and_reports(folder: str | None) -> tuple[str, Report, Report, dict]:
    """(text, report before, report after, config) of a committed card, or of one made here."""
    if folder is None:
        return made(), BEFORE, AFTER, config()
    place = COMMITTED / folder
    return (place / "README.md").read_text(), *load_pair(place / "report.json"), json.loads((place / "config.json").read_text())


def numbers(text: str) -> list[str]:
    """What stands as a number of its own, but for digests and names in code, file names and threats."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|\(?\d+/255\)?|\d+(?:\.\d+)?(?=, for pixels)|\[0,1\]", "", text)
    return re.findall(r"(?<![\w.-])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", text)


def rows_of(text: str, heading: str) -> dict[tuple[str, str], list[str]]:
    """The table with that first column: the cells of a line by attack and threat."""
    lines = text[text.index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(line[0], line[1]): line[2:] for line in cells}


def named(row: Row | Headline) -> tuple[str, str]:
    return (attack_name(row) if isinstance(row, Row) else "**Worst case**"), card._shown(row.threat)


@pytest.mark.parametrize("folder", [None, *FOLDERS])
def test_every_number_on_the_card_is_in_the_reports(folder):
    text, before, after, written = card_and_reports(folder)
    was = {named(found): found for found in [*before.rows, *before.worst_cases()]}
    table, attacks = rows_of(text, "Attack | Threat | Before"), rows_of(text, "Attack | Threat | Settings")
    metrics = [metric for result in head(text)["model-index"][0]["results"] for metric in result["metrics"]]
    assert len(table) == len(metrics) == len(after.rows) + len(after.worst_cases())
    assert len(attacks) == len(after.rows)
    for found, metric in zip([*after.rows, *after.worst_cases()], metrics, strict=True):
        old = was[named(found)]
        assert table[named(found)][:2] == [f"{percent(one.accuracy)} {percent_interval(one.interval)}" for one in (old, found)]
        assert table[named(found)][3] == str(found.n) == str(metric["args"]["n"])
        assert table[named(found)][2].split()[0] == f"{100 * (found.accuracy - old.accuracy):+.2f}"
        held = [_held(one, source) for one, source in ((old, before), (found, after))]
        if all(verdicts is not None for verdicts in held):
            assert table[named(found)][2].endswith(" " + _points(*held))
        assert metric["value"] == round(found.correct / found.n, 4)
    for row in after.rows:
        settings, passes, seconds = attacks[named(row)]
        assert settings == row.told()
        assert passes == " / ".join(f"{row.passes[kind]:g}" for kind in ("forward", "backward") if kind in row.passes)
        assert seconds == f"{row.seconds:.1f}"
    training = written["robustness"]["training"]
    total = [sum(row.seconds for row in source.rows) for source in (before, after)]
    facts = [training["steps"], training["batch_size"], *training["passes_per_image"].values()]
    known = {"95", str(after.seed), *(f"{count:g}" for count in facts), f"{training['seconds']:.1f}"}
    known |= {str(training[key]) for key in ("epochs", "best_epoch") if key in training}
    known |= {f"{seconds:.1f}" for seconds in total} | {f"{seconds / 3600:.2f}" for seconds in total}
    known |= {str(after.environment.get("threads"))}
    for source in (before, after):
        for found in [*source.rows, *source.per_threat()]:
            known |= {str(found.n), percent(found.accuracy).split()[0], *numbers(percent_interval(found.interval))}
        known |= {number for note in source.notes for number in numbers(note)}
    known |= {number for cells in [*table.values(), *attacks.values()] for cell in cells for number in numbers(cell)}
    known |= {f"{ThreatModel.parse(threat).p:g}" for threat in after.threats if ThreatModel.parse(threat).p}
    known |= {threat.rpartition(":")[2] for threat in after.threats}
    prose = text[text.index(BEGIN) : text.index("## Use")]
    cost = re.search(r"Training took .*? before and .*? after it", text)[0]
    assert set(numbers(prose) + numbers(cost)) <= known
    assert len(numbers(prose)) > 30


def _held(found: Row | Headline, source: Report) -> np.ndarray | None:
    """bool [n]: which images are right, None where they are not independent of each other."""
    if isinstance(found, Row):
        return None if found.kind == "distributional" else source.verdicts[found.key]
    return source.held(found.threat) if found.threat in source.threats else source.held_by_all()


def _points(old, new) -> str:
    _, low, high = paired_difference(old, new)
    return f"[{100 * low:+.2f}, {100 * high:+.2f}]"


def test_every_result_of_the_model_index_is_in_the_report():
    text = made()
    parsed = ModelCard(text, ignore_metadata_errors=False)  # offline: validate() would ask the hub
    results = {result.metric_name: result for result in parsed.data.eval_results}
    assert list(results) == [
        "Clean accuracy",
        "PGD accuracy (Linf, eps=8/255)",
        "APGD-CE accuracy (Linf, eps=8/255)",
        "W-PGD accuracy (W2-Linf, delta=8/255)",
        "Worst-case accuracy (Linf, eps=8/255)",
    ]
    found = [*AFTER.rows, AFTER.headline(LINF)]
    assert [result.metric_value for result in results.values()] == [round(row.accuracy, 4) for row in found]
    pgd = results["PGD accuracy (Linf, eps=8/255)"]
    assert pgd.metric_args == {"attack": "pgd", "threat": LINF, "steps": 20, "restarts": 2, "n": 173}
    assert (pgd.dataset_type, pgd.dataset_name, pgd.dataset_split) == ("uoft-cs/cifar10", "cifar10", "test")
    assert parsed.data.model_name == "resnet10t-robust"


def test_front_matter_says_what_is_known():
    known = head(made())
    assert known["library_name"] == "timm"
    assert known["pipeline_tag"] == "image-classification"
    assert known["license"] == "apache-2.0"
    assert known["base_model"] == "timm/resnet10t.c3_in1k"
    assert known["base_model_relation"] == "finetune"
    assert known["datasets"] == ["uoft-cs/cifar10"]
    assert known["metrics"] == ["accuracy"]
    assert {"adversarial-robustness", "wasserstein"} <= set(known["tags"])


@pytest.mark.parametrize("base_id", ["robustbench:cifar10/Linf/Zhang2019Theoretically", "digits", "a/b/c", "./folder"])
def test_front_matter_guesses_nothing(base_id):
    text = made(config=config(base_model=base_id, license=None))
    assert not {"license", "base_model", "base_model_relation"} & head(text).keys()
    assert "license is unknown" in text


def test_a_license_that_the_hub_does_not_know():
    known = head(made(config=config(license="My Own 1.0")))
    assert (known["license"], known["license_name"]) == ("other", "my own 1.0")


def test_what_a_reader_needs_is_there():
    text = made(config=config(label_names=["cat", "dog"]), before=report(10, 0.9, notes=["Two classes only."]))
    for wanted in (
        "Linf 8/255", "W2-Linf 8/255", "not a certificate", "E[s^2] <= (8/255)^2", "n = 173", "cat, dog",
        "Two classes only.", "robustify finetune cifar10-wasserstein", "beta: 6.0", "`abc123`", f"`{AFTER.digest()}`",
        "61.2 s", "a processor", "arXiv:2502.09352", "arXiv:2306.09844", "steps=20, restarts=2", "21 / 20",
        "local-dir:resnet10t-robust",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "$" not in text[: text.index("bibtex")]
    assert not re.search(r" \n|\n\n\n", text)


def test_the_card_says_which_epoch_was_kept():
    assert "2 backward to the weights passes; kept: epoch 3 of 5. Measuring took" in made()
    assert "; kept: the start. Measuring" in made(config=config(training={"best_epoch": 0}))
    older = config()
    del older["robustness"]["training"]["epochs"]
    assert "; kept: epoch 3. Measuring" in made(config=older)


def test_nobody_is_named_by_their_home_folder():
    text = made(command=f"robustify finetune --data folder:{Path.home()}/pictures")
    assert str(Path.home()) not in text
    assert "folder:~/pictures" in text
    data = dataclasses.replace(AFTER, data="folder:/somewhere/private/birds (0123456789ab)", verdicts={})
    text = made(after=data)
    assert "/somewhere" not in text
    assert head(text)["model-index"][0]["results"][0]["dataset"]["name"] == "birds"


@pytest.mark.parametrize("method", ["wasserstein", "trades", "pgd-at", "fast-at", "standard"])
def test_each_card_cites_base_method_attacks_and_data(method):
    text = made(recipe={**RECIPE, "threat": W2 if method == "wasserstein" else LINF, "method": {"name": method}})
    cited = re.findall(r"^@\w+{(\w+),", text, re.MULTILINE)
    assert len(cited) == len(set(cited))
    attacks = {"madry2017towards", "croce2020reliable", "bai2023wasserstein"}
    data = {"krizhevsky2009learning", "russakovsky2015imagenet"}
    assert set(cited) == {"wightman2019pytorch", *METHOD_PAPERS.get(method, ()), *attacks, *data}


def test_a_model_of_robustbench_is_cited_with_its_paper():
    text = made(config=config(base_model="robustbench:cifar10/Linf/Zhang2019Theoretically", license=None))
    assert "@misc{zhang2019theoretically," in text
    assert "url = {https://arxiv.org/abs/1901.08573}" in text
    assert "@article{croce2020robustbench," in text


def test_all_papers_are_there():
    every = entries_by_key()
    for keys in METHOD_PAPERS.values():
        assert set(keys) <= every.keys()
    assert {*citations.ATTACK_PAPERS.values(), *citations.DATA_PAPERS.values()} <= every.keys()


def test_figures_of_other_images_are_not_subtracted():
    other = dataclasses.replace(BEFORE, seed=7)
    assert re.search(r"\[[+-]\d", made())
    assert not re.search(r"\[[+-]\d", made(before=other))
    alone = Report("m", "cifar10", "test", BEFORE.rows[:1], {})
    assert "not measured" in made(before=alone)


def test_update_keeps_what_a_person_wrote():
    mine = made().replace("license: apache-2.0", "license: apache-2.0\nlanguage: en")
    mine = mine.replace("- robustify\n", "- birds\n")
    mine = mine.replace(BEGIN, f"Before.\n\n{BEGIN}").replace("# resnet10t-robust", "# changed by hand")
    mine += "\nAfter it, $5 100 %.\n"
    newer = made(config=config(training={"seconds": 99.9}))
    text = update(mine, newer)
    assert "Before.\n\n<!--" in text
    assert text.endswith("\nAfter it, $5 100 %.\n")
    assert "99.9 s" in text
    assert "61.2 s" not in text
    assert "changed by hand" not in text
    assert head(text)["language"] == "en"
    assert {"birds", "robustify"} <= set(head(text)["tags"])
    assert update(text, newer) == text
    ModelCard(text, ignore_metadata_errors=False)


def test_update_inherits_nothing_from_another_models_card():
    older = made(recipe={**RECIPE, "threat": LINF, "method": {"name": "trades"}})
    data = dataclasses.replace(AFTER, data="folder:birds (0123456789ab)", verdicts={})
    newer = made(config=config(base_model="digits", license=None), after=data)
    text = update(older, newer)
    assert head(text) == head(newer)
    assert not {"license", "base_model", "datasets"} & head(text).keys()


def test_update_keeps_a_persons_license_and_data_of_the_same_base():
    base, unknown = "timm/resnet10t.c3_in1k", config(license=None)
    data = dataclasses.replace(AFTER, data="folder:birds (0123456789ab)", verdicts={})
    new = made(config=unknown, after=data)
    mine = new.replace("library_name: timm", "library_name: timm\nlicense: mit\ndatasets: [me/birds]")
    assert {key: head(update(mine, new, base))[key] for key in ("license", "datasets")} == {
        "license": "mit", "datasets": ["me/birds"]
    }  # fmt: skip
    assert not {"license", "datasets"} & head(update(mine, new, "another")).keys()
    assert head(update(mine, made(), base))["license"] == "apache-2.0"
    assert "datasets" not in head(update(made(), new, base))  # written by the older run, on other data


def test_two_rules_are_no_front_matter():
    text = update("---\nhello\n---\n", made())
    assert head(text) == head(made())
    assert "---\nhello\n---\n" in text


def test_update_of_cards_without_our_section():
    new = made()
    for old in ("# Mine\n", "---\nlicense: mit\nlanguage: de\n---\n# Mine\n", ""):
        text = update(old, new)
        assert text.count(BEGIN) == text.count(END) == 1
        assert ("# Mine" in text) == ("# Mine" in old)
        assert head(text).get("language") == ("de" if "de" in old else None)
        assert text.index(BEGIN) > text.find("# Mine")
    swapped = new.replace(BEGIN, "(later)").replace(END, BEGIN).replace("(later)", END)
    for broken in (new.replace(END, ""), new + BEGIN, swapped):
        with pytest.raises(UserError, match=r"mine\.md must have .* once each, in order; it has <!-- robustify:begin -->"):
            update(broken, new, name="mine.md")
    with pytest.raises(UserError, match="not valid YAML"):
        update("---\na: [\n---\n", new)


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_folder(folder: Path, **robustness) -> Checkpoint:
    """A run's folder as the pipeline leaves it, but for the card."""
    net = timm.create_model("test_efficientnet", num_classes=10)
    model = PixelModel(net, (0.5,) * 3, (0.25,) * 3).eval()
    base = Checkpoint(model, "test_efficientnet", {}, 10, (3, 32, 32), "test_efficientnet")
    export(base, base.model, folder / "model", robustness=robustness, metadata={}, verify_batch=torch.rand(2, 3, 32, 32))
    save_pair(folder / "report.json", BEFORE, AFTER)
    (folder / "recipe.yaml").write_text("# robustify finetune mine\n" + yaml.safe_dump(RECIPE))
    return base


def test_the_card_is_made_anew_from_the_files(tmp_path):
    run_folder(tmp_path / "robust")
    path = write_card(tmp_path / "robust" / "model")
    path.write_text(path.read_text() + "\nBy hand.\n")
    assert "license" not in head(path.read_text())
    again = write_card(tmp_path / "robust" / "model", license="mit").read_text()
    assert again.endswith("By hand.\n")
    assert head(again)["license"] == "mit"
    assert "robustify finetune mine" in again
    with pytest.raises(UserError, match=r"is mit, not apache-2\.0"):
        write_card(tmp_path / "robust" / "model", license="apache-2.0")
    path.write_text(again.replace(END, ""))
    with pytest.raises(UserError, match=r"model/README\.md must have .*robustify:end --> 0 times"):
        write_card(tmp_path / "robust" / "model")
    with pytest.raises(UserError, match=r"^the model's README\.md must have"):
        api.export(str(tmp_path / "robust"), tmp_path / "out")
    path.write_text(again)
    (tmp_path / "robust" / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"no recipe .*recipe\.yaml"):
        write_card(tmp_path / "robust" / "model")
    with pytest.raises(UserError, match="not the folder of a model"):
        write_card(tmp_path)


def test_the_hub_reads_the_evaluation_results(tmp_path):
    entries = eval_results(AFTER)
    assert [entry["value"] for entry in entries] == [round(row.accuracy, 4) for row in AFTER.rows]
    first, second = entries[:2]
    assert first["dataset"] == {"id": "uoft-cs/cifar10", "task_id": "clean"}
    assert second["dataset"]["task_id"] == "pgd-linf-8-255"
    low, high = AFTER.rows[1].interval
    assert second["notes"] == f"PGD accuracy (Linf, eps=8/255), n=173, 95 % interval [{low:.4f}, {high:.4f}]"
    assert eval_results(dataclasses.replace(AFTER, data="folder:birds", verdicts={})) == []
    run_folder(tmp_path / "robust")
    write_card(tmp_path / "robust" / "model")
    written = yaml.safe_load((tmp_path / "robust/model/.eval_results/robustify.yaml").read_text())
    assert written == entries
    hub = pytest.importorskip("huggingface_hub._eval_results", reason="an older huggingface_hub")
    assert next(entry.task_id for entry in hub.parse_eval_result_entries(written)) == "clean"


def test_somebodys_folder_is_no_official_data_set():
    mine = dataclasses.replace(AFTER, data="folder:mnist (0123456789ab)", verdicts={})
    text = made(after=mine, config=config(dataset="folder:mnist"))
    assert "datasets" not in head(text)
    assert head(text)["model-index"][0]["results"][0]["dataset"]["type"] == "mnist"
    assert "ylecun/mnist" not in text
    assert "lecun1998gradient" not in text
    assert eval_results(mine) == []


def test_what_the_hub_lists_is_of_the_rounded_weights(tmp_path):
    found = head(made(half=(AFTER, BEFORE)))["model-index"][0]["results"]
    assert found[0]["metrics"][0]["value"] == round(BEFORE.rows[0].accuracy, 4)
    run_folder(tmp_path / "robust", half=BEFORE.digest())
    save_pair(tmp_path / "robust" / "model" / "half.json", AFTER, BEFORE)
    write_card(tmp_path / "robust" / "model")
    listed = yaml.safe_load((tmp_path / "robust/model/.eval_results/robustify.yaml").read_text())
    assert [entry["value"] for entry in listed] == [round(row.accuracy, 4) for row in BEFORE.rows]


def test_a_folder_called_model_keeps_its_own_recipe_and_report(tmp_path):
    run_folder(tmp_path / "robust")
    write_card(tmp_path / "robust" / "model")
    (tmp_path / "recipe.yaml").write_text("# another\nmethod: {name: trades}\n")
    folder = api.export(str(tmp_path / "robust"), tmp_path / "model")
    assert "robustify finetune mine" in (folder / "README.md").read_text()
    assert "# model\n" in (folder / "README.md").read_text()
    assert "local-dir:model" in write_card(folder).read_text()


def test_half_precision_is_told_with_its_cost():
    text = made(half=(BEFORE, AFTER))
    section = text[text.index("## Half precision") : text.index("## The threat")]
    assert percent(BEFORE.rows[1].accuracy) in section
    assert percent(AFTER.rows[1].accuracy) in section
    assert _points(BEFORE.verdicts["clean"], AFTER.verdicts["clean"]) in section
    assert "Half precision" not in made()


def test_the_golden_card():
    """ROBUSTIFY_GOLDEN=1 writes it anew; a change of the card shows as a change of that file."""
    figures = {"accuracy.png": "Accuracy before and after"}
    text = made(config=config(label_names=[f"class {k}" for k in range(10)]), figures=figures, half=(BEFORE, AFTER))
    golden = Path(__file__).parent / "golden" / "card.md"
    if os.environ.get("ROBUSTIFY_GOLDEN"):
        golden.write_text(text, encoding="utf8")
    assert text == golden.read_text(encoding="utf8")


@pytest.mark.parametrize("folder", ["robust", "robust/model"])
def test_the_code_on_the_card_runs(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    base = run_folder(tmp_path / "robust")
    path = tmp_path / "robust" / "model" / "README.md"
    if folder == "robust":
        api.export("robust", "elsewhere")
        (tmp_path / "robust").rename("run")
        path = tmp_path / "elsewhere" / "README.md"
    else:
        write_card(folder)
    new, old, ours = python_blocks(path.read_text())
    blocks = [old]
    if tuple(int(part) for part in timm.__version__.split(".")[:3]) >= (1, 0, 15):
        blocks.append(new)
    blocks.append(ours)
    x = torch.rand(2, 3, 32, 32)
    for block in blocks:
        names = {}
        exec(block, names)
        pixels = names["model"] if block is ours else PixelModel(names["model"], (0.5,) * 3, (0.25,) * 3)
        with torch.no_grad():
            assert torch.equal(pixels(x), base.model(x))


def test_a_network_trained_from_random_weights_was_not_fine_tuned():
    recipe = {**RECIPE, "model": {"source": "resnet10t", "pretrained": False}, "threat": LINF, "method": {"name": "standard"}}
    text = made(recipe=recipe, before=report(10, 0.2, notes=["No better than chance."]))
    known = head(text)
    assert not {"base_model", "base_model_relation"} & known.keys()
    assert known["tags"] == ["image-classification", "robustify", "standard"]
    assert "`timm/resnet10t.c3_in1k`, trained from random weights on cifar10 by robustify" in text
    assert "trained without an adversary" in text
    assert "There is no base model" in text
    for wrong in ("fine-tuned", "(before:", "No better than chance", "cite the base model", "trained against"):
        assert wrong not in text, wrong


def test_a_run_that_kept_its_start_hardened_nothing():
    notes = ["no epoch of the training beat the start on the held-out images: these are the start's weights"]
    same = {"facts": {"model": "0123456789abcdef"}}
    text = made(before=report(20, 0.7, **same), after=report(20, 0.7, notes=notes, **same))
    known = head(text)
    assert not {"base_model", "base_model_relation"} & known.keys()
    assert known["tags"] == ["image-classification", "robustify"]
    assert "with the weights of `timm/resnet10t.c3_in1k` as they were" in text
    assert "kept nothing of that training" in text
    assert notes[0] in text
    assert "fine-tuned" not in text
    other = made(before=report(10, 0.9, **same), after=report(20, 0.7, facts={"model": "fedcba9876543210"}))
    assert "fine-tuned" in other
    assert "adversarial-robustness" not in head(update(other, text))["tags"]  # nor inherited from the card before it


def test_what_the_weights_are_is_not_overstated():
    same = {"facts": {"model": "0123456789abcdef"}}
    kept = {"before": report(20, 0.7, **same), "after": report(20, 0.7, **same)}
    random = {**RECIPE, "model": {"source": "resnet10t", "pretrained": False}}
    text = made(recipe=random, **kept)
    assert "`timm/resnet10t.c3_in1k` with random weights: robustify trained them" in text
    assert "There is no base model" in text
    assert "as they were" not in text
    assert head(text)["tags"] == ["image-classification", "robustify"]
    replaced = config()
    replaced["robustness"]["replaced"] = 1000
    assert "c3_in1k` as they were, but for a new, random classifier: " in made(config=replaced, **kept)
    assert "`timm/resnet10t.c3_in1k` with a new classifier, fine-tuned on" in made(config=replaced)
    own = made(config=config(arch="custom", base_model="MyNet", license=None))
    assert "`MyNet`, trained further on cifar10" in own
    assert "fine-tuned" not in own


def of_two_norms(seed: int) -> Report:
    held = np.random.default_rng(seed).random((3, 50)) < 0.6
    verdicts = {key: held[i] for i, key in enumerate(("clean", f"pgd {LINF}", "pgd L2:0.5"))}
    rows = [
        Row(key.split()[0], None if key == "clean" else key.split()[1], 50, int(v.sum()),
            kind="clean" if key == "clean" else "pointwise")
        for key, v in verdicts.items()
    ]  # fmt: skip
    return Report("m", "cifar10 (0123456789ab)", "test", rows, verdicts)


def test_the_worst_case_over_several_norms():
    before, after = of_two_norms(1), of_two_norms(2)
    text = made(before=before, after=after, recipe={**RECIPE, "threat": LINF, "method": {"name": "multi-norm"}})
    was, now = before.union(), after.union()
    assert was is not None
    assert now is not None
    line = f"| **Worst case** | Linf 8/255 and L2 0.5 | {percent(was.accuracy)} {percent_interval(was.interval)} |"
    assert f"{line} {percent(now.accuracy)} {percent_interval(now.interval)} |" in text
    assert _points(before.held_by_all(), after.held_by_all()) in text
    assert f"- **Linf 8/255 and L2 0.5: {percent(now.accuracy)}** against pgd" in text
    found = ModelCard(text, ignore_metadata_errors=False).data.eval_results[-1]
    assert found.metric_name == "Worst-case accuracy (Linf, eps=8/255 and L2, eps=0.5)"
    assert found.metric_value == round(now.accuracy, 4)
    assert found.metric_args == {"attacks": ["pgd"], "threat": "Linf:8/255 and L2:0.5", "n": 50}


def test_a_figure_names_its_attacks():
    rows = [row for row in AFTER.rows if row.attack in ("clean", "w-pgd")]
    text = made(after=dataclasses.replace(AFTER, rows=rows, verdicts={}))
    assert re.search(r"Under W2-Linf 8/255 it still gets [\d.]+ % .* right, against w-pgd\.", text)
    assert re.search(r"Under Linf 8/255 .* right, in the worst case over pgd, apgd-ce\.", made())


def test_code_for_other_architectures():
    ours = made(config=config(arch="robustbench_cifar10_linf_zhang2019"))
    assert "import robustify  # registers" in python_blocks(ours)[0]
    theirs = made(config=config(arch="custom", base_model="MyNet"))
    assert "timm" not in python_blocks(theirs)[0]
    assert head(theirs)["library_name"] == "pytorch"
    for block in python_blocks(ours) + python_blocks(theirs):
        compile(block, "card", "exec")


def test_other_formats_beside_the_weights_are_told():
    settings = config()
    assert "other formats" not in made(config=settings)
    settings["robustness"]["formats"] = {"onnx": {}}
    (line,) = [line for line in made(config=settings).splitlines() if "model.onnx" in line]
    assert line.startswith("- `model.onnx`, for ONNX Runtime: images in [0,1]")


def test_threats_in_words():
    specs = ("L2:0.5", "L1:12", "Winf-L2:0.5", "W3-L2:0.5")
    words = {spec: card._in_words(card.ThreatModel.parse(spec)) for spec in specs}
    assert "Euclidean length is at most 0.5" in words["L2:0.5"]
    assert "sum of absolute changes is at most 12," in words["L1:12"]
    assert "same as L2 0.5" in words["Winf-L2:0.5"]
    assert "E[s^3] <= (0.5)^3" in words["W3-L2:0.5"]
