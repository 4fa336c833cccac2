"""Evaluations resume with the same report, refuse what does not fit, and their stored images can be checked again."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_net, toy_data
from torch import nn

from robustify import distributional, environment, evaluation, flips, pieces, pointwise
from robustify.attacks import AttackSpec
from robustify.data import from_tensors
from robustify.errors import UserError
from robustify.evaluation import counted, evaluate
from robustify.flips import Flips
from robustify.knapsack import worst_accuracy
from robustify.recheck import recheck
from robustify.report import Report, load_pair, save_pair
from robustify.threat import ThreatModel, per_image

ATTACKS = ["fgsm", "pgd:steps=3,restarts=2", "autoattack:steps=2,queries=4,targets=2", "w-pgd:steps=3"]
ATTACKS += ["knapsack:steps=4,targets=2,restarts=1"]
THREAT = ThreatModel.parse("Linf:2/255")
BATCH = 16


@pytest.fixture
def model() -> nn.Module:
    net = tiny_net()
    with torch.no_grad():
        net.eval()[6].bias.sub_(net(toy_data(60)[0]).mean(0))
        net[6].weight.mul_(8)
    return net


@pytest.fixture
def split(model):
    x, _ = toy_data(60)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::7] = (y[::7] + 1) % 4
    return from_tensors((x, y), (x, y), (x, y)).test


def measured(model, split, **more) -> Report:
    return evaluate(model, split, ATTACKS, THREAT, **{"batch_size": BATCH, "seed": 2, **more})


def same(one: Report, other: Report) -> bool:
    return (
        one.digest() == other.digest()
        and one.notes == other.notes
        and one.checks == other.checks
        and all(np.array_equal(value, other.arrays()[key]) for key, value in one.arrays().items())
    )


def test_an_image_counts_only_when_it_is_right_clean_and_perturbed(model, split):
    report = measured(model, split)
    clean = report.verdicts["clean"]
    assert 0 < report.rows[0].correct < len(clean)
    for row in report.rows[1:-1]:
        assert not (report.verdicts[row.key] & ~clean).any()
    assert report.rows[-1].key not in report.verdicts  # a knapsack mixes: it has no verdict per image
    assert 0 < report.rows[2].correct < report.rows[0].correct
    assert {row.kind for row in report.rows} == {"clean", "pointwise", "distributional"}


def test_pointwise_attacks_never_see_what_is_wrong_when_clean(model, split):
    report = evaluate(model, split, ["fgsm"], THREAT, batch_size=BATCH)
    share = round(report.rows[0].accuracy, 3)
    assert report.rows[1].passes == {"forward": pytest.approx(2 * share, abs=2e-3), "backward": share}


def test_passes_are_those_that_went_through_the_model(model, split):
    with counted(model) as passes:
        report = evaluate(model, split, ["pgd:steps=3"], THREAT, batch_size=BATCH)
    told = sum(row.passes["forward"] for row in report.rows) * len(split)
    assert passes.forward == pytest.approx(told, abs=0.1)


def test_distances_are_the_sizes_of_what_fooled(model, split):
    report = measured(model, split)
    for row in report.rows:
        if row.kind != "pointwise":
            assert (row.key in report.distances) == (row.attack == "knapsack")
            continue
        size, held = report.distances[row.key], report.verdicts[row.key]
        assert (np.isinf(size) == held).all()
        assert (size[~report.verdicts["clean"]] == 0).all()
        assert (size[~held] <= THREAT.eps * 1.0001).all()


def killed_every_other_time(attack, calls):
    def killed(*arguments):
        calls.append("killed" if len(calls) % 2 else "attacked")
        if calls[-1] == "killed":
            raise KeyboardInterrupt
        return attack(*arguments)

    return killed


def test_the_batches_may_be_attacked_in_any_number_of_runs(model, split, tmp_path, monkeypatch):
    """Killed after each batch anew, it ends with the same report as when nothing happened."""
    whole = measured(model, split, check=True, resume_folder=tmp_path / "whole")
    assert same(whole, measured(model, split, check=True))
    calls = []
    for module, name in ((pointwise, "_attack"), (distributional, "_search_batch")):
        monkeypatch.setattr(module, name, killed_every_other_time(getattr(module, name), calls))
    folder = tmp_path / "report.json.partial"
    for _ in range(100):
        try:
            resumed = measured(model, split, check=True, resume_folder=folder)
            break
        except KeyboardInterrupt:
            assert folder.is_dir()
    assert calls.count("killed") >= 5
    assert same(whole, resumed)
    with counted(model) as passes:
        again = measured(model, split, resume_folder=folder)
    assert passes.forward == len(split) + 7 * len(split)  # the clean pass and pyautoattack's checks
    assert again.digest() == whole.digest()
    pieces.finish(folder)
    assert not folder.exists()


def test_resuming_with_anything_else_is_refused(model, split, tmp_path):
    folder = tmp_path / "partial"
    measured(model, split, resume_folder=folder)
    for name, value in [("seed", 3), ("batch_size", 8), ("keep_adversarials", True), ("fast_search", True), ("n", 50)]:
        with pytest.raises(UserError, match=f"another .*{name}.*{value} here"):
            measured(model, split, resume_folder=folder, **{name: value})
    with pytest.raises(UserError, match="another attacks"):
        evaluate(model, split, ["fgsm"], THREAT, batch_size=BATCH, seed=2, resume_folder=folder)
    other = from_tensors(*[(1 - split.images, split.labels)] * 3).test
    with pytest.raises(UserError, match="another data"):
        measured(model, other, resume_folder=folder)
    with torch.no_grad():
        next(model.parameters())[0] += 1e-6
    with pytest.raises(UserError, match="another model") as refused:
        measured(model, split, resume_folder=folder)
    assert "pip install" not in refused.value.hint
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not the folder of an evaluation"):
        measured(model, split, resume_folder=strange)
    assert (strange / "thesis.tex").exists()


def test_one_search_serves_every_radius_and_leaves_no_more_than_w_pgd(model, split):
    threats = [ThreatModel.parse(f"W2-Linf:{k}/255") for k in (1, 2, 4)]
    attacks = ["knapsack:steps=4,targets=1,restarts=1", "w-pgd:steps=30"]
    told = []
    report = evaluate(
        model, split, attacks, threats, batch_size=BATCH, tell=lambda stage, *done: told.append((stage, *done))
    )
    rows = {row.key: row for row in report.rows}
    bought = [row for row in report.rows if row.attack == "knapsack"]
    assert report.rows[-3:] == tuple(bought)  # it comes last, to buy what w-pgd flipped as well
    assert 5 < bought[0].passes["backward"] <= 11
    assert all(row.passes == {"forward": 0, "backward": 0} for row in bought[1:])
    for row, threat in zip(bought, threats, strict=True):
        d = report.distances[row.key]
        assert row.correct == len(d) * worst_accuracy(d, threat.eps, 2)
        assert 0 <= row.accuracy <= rows[f"w-pgd {threat.spec}"].accuracy + 1e-4
        assert report.headline(threat.spec).accuracy == row.accuracy
        alone = evaluate(model, split, attacks[:1], threat, batch_size=BATCH)
        assert row.accuracy <= alone.rows[1].accuracy
    steps = [(done, total) for stage, done, total in told if stage == "knapsack Linf"]
    assert steps == sorted(steps)
    assert steps[-1][1] * 0.8 <= steps[-1][0] <= steps[-1][1]


@pytest.fixture
def half_blind(monkeypatch):
    """A search that finds no flip of every other image, so that the knapsack buys those of other attacks."""

    def search(model, x, y, *, norm, **settings):
        found = flip_batch(model, x, y, norm=norm, **settings)
        lost = (torch.arange(len(x)) % 2 == 0) & (found.distances > 0)
        return Flips(found.distances.masked_fill(lost, torch.inf), torch.where(per_image(lost, x), x, found.images), norm)

    flip_batch = flips.flip_batch
    monkeypatch.setattr(flips, "flip_batch", search)


def kept_evaluation(model, split, tmp_path, **more) -> tuple[Report, Path]:
    folder, kept = tmp_path / "partial", tmp_path / "report.adversarials"
    report = measured(model, split, resume_folder=folder, keep_adversarials=True, **more)
    pieces.finish(folder, kept)
    return report, kept


def test_stored_images_give_every_verdict_again(model, split, tmp_path, half_blind):
    """Clean, pointwise and distributional; the knapsack's flips too, whoever found them."""
    report, kept = kept_evaluation(model, split, tmp_path, n=50, surrogate=("other", tiny_net(seed=1)))
    assert not (tmp_path / "partial").exists()
    assert recheck(model, split, report, kept) == {row.key: 0 for row in report.rows}
    bought = report.distances[report.rows[-1].key]
    assert any((bought[piece["rows"]] < piece["distance"].astype(np.float32)).any() for piece in searches(kept))
    for number in (2, -2):
        key = report.rows[number].key
        assert recheck(model, split, forged(report, key), kept)[key] == 50
    with torch.no_grad():
        next(model.parameters())[0] += 0.1
    with pytest.raises(UserError, match="another model") as refused:
        recheck(model, split, report, kept)
    assert refused.value.hint == "give the model and the data that it is of"
    with pytest.raises(UserError, match="no evaluation was stored"):
        recheck(model, split, report, tmp_path / "nothing")


def searches(kept: Path) -> list[pieces.Arrays]:
    return [piece for piece in pieces.pieces_of(kept, {}) if str(piece["row"]).startswith("flips")]


def rewrite(path: Path, **changes) -> None:
    """Change arrays of a stored piece, each by its function."""
    with np.load(path) as arrays:
        piece = dict(arrays)
    np.savez_compressed(path, **{**piece, **{name: change(piece[name]) for name, change in changes.items()}})


def forged(report: Report, key: str) -> Report:
    """The report with all verdicts of a row turned round."""
    verdicts = {**report.verdicts, key: ~report.verdicts[key]}
    rows = [
        dataclasses.replace(row, correct=int(verdicts[key].sum())) if row.key == key else row for row in report.rows
    ]
    return dataclasses.replace(report, rows=rows, verdicts=verdicts)


def test_only_the_images_of_this_report_are_checked(model, split, tmp_path):
    report, kept = kept_evaluation(model, split, tmp_path)
    for other in (
        measured(model, split, seed=3, keep_adversarials=True, resume_folder=tmp_path / "a"),
        evaluate(model, split, ["fgsm"], THREAT, batch_size=BATCH, seed=2),
        dataclasses.replace(report, facts={}),
    ):
        with pytest.raises(UserError, match="are not those of the report"):
            recheck(model, split, other, kept)


def test_stored_images_must_keep_their_budget_and_be_there(model, split, tmp_path):
    report, kept = kept_evaluation(model, split, tmp_path)

    rewrite(next(kept.glob("flips*.npz")), x_adv=lambda x_adv: 0.5 * x_adv)
    assert recheck(model, split, report, kept)[report.rows[-1].key] > 0
    next(kept.glob("fgsm*.npz")).unlink()
    assert recheck(model, split, report, kept)[report.rows[1].key] > 0
    rewrite(next(kept.glob("w-pgd*.npz")), x_adv=lambda x_adv: 1 - x_adv)
    with pytest.raises(UserError, match=r"w-pgd.*budget"):
        recheck(model, split, report, kept)


def test_a_published_number_is_checked_too(model, split, tmp_path):
    """What a knapsack's distances buy, how far pointwise flips went, and the budget of the row, not of the piece."""
    report, kept = kept_evaluation(model, split, tmp_path)
    knapsack, pgd = report.rows[-1], report.rows[2]
    rows = [*report.rows[:-1], dataclasses.replace(knapsack, correct=knapsack.n)]
    assert recheck(model, split, dataclasses.replace(report, rows=rows), kept)[knapsack.key] == knapsack.n
    nearer = {**report.distances, pgd.key: report.distances[pgd.key] / 2}
    moved = int((np.isfinite(report.distances[pgd.key]) & (report.distances[pgd.key] > 0)).sum())
    assert moved > 0
    assert recheck(model, split, dataclasses.replace(report, distances=nearer), kept)[pgd.key] == moved
    rewrite(next(kept.glob("pgd*.npz")), x_adv=lambda x_adv: 1 - x_adv, threat=lambda threat: np.array("Linf:1"))
    with pytest.raises(UserError, match=r"pgd.*budget"):
        recheck(model, split, report, kept)


def test_images_that_cannot_be_read_are_named(model, split, tmp_path):
    """Cut off, of older code, not kept, or of a report without distances."""
    report, kept = kept_evaluation(model, split, tmp_path)
    with pytest.raises(UserError, match=f"no distances of {report.rows[1].key}"):
        recheck(model, split, dataclasses.replace(report, distances={}), kept)
    path = next(kept.glob("pgd*.npz"))
    whole = path.read_bytes()
    for name in ("norm", "x_adv"):
        with np.load(path) as arrays:
            np.savez_compressed(path, **{key: value for key, value in arrays.items() if key != name})
        with pytest.raises(UserError, match=f"{name}.* cannot be read|cannot be read.*{name}") as refused:
            recheck(model, split, report, kept)
        assert refused.value.hint == "evaluate again and keep them"
        path.write_bytes(whole)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"pgd.*npz cannot be read") as refused:
        recheck(model, split, report, kept)
    assert "evaluate again" in refused.value.hint
    path.write_bytes(whole)
    alone = evaluate(model, split, ATTACKS[-1:], THREAT, batch_size=BATCH, keep_adversarials=True, resume_folder=tmp_path / "a")
    for path in (tmp_path / "a").glob("*.npz"):
        path.unlink()
    assert recheck(model, split, alone, tmp_path / "a")[alone.rows[-1].key] > 0


def test_another_threat_is_another_evaluation(model, split, tmp_path):
    """Also where only a surrogate's transfer is under a threat."""
    surrogate = ("other", tiny_net(seed=1))
    report = evaluate(model, split, ["clean"], THREAT, surrogate=surrogate)
    with pytest.raises(UserError, match="another threats"):
        evaluate(model, split, ["clean"], ThreatModel.parse("Linf:4/255"), surrogate=surrogate, finished=report)


def test_a_surrogates_flips_are_bought_and_its_passes_counted(model, split, half_blind):
    """Its images are flips like any other's."""
    attacks, threat = ["knapsack:steps=4,targets=1,restarts=1"], ThreatModel.parse("W2-Linf:6/255")
    alone = evaluate(model, split, attacks, threat, batch_size=BATCH)
    helped = evaluate(model, split, attacks, threat, batch_size=BATCH, surrogate=("twin", copy.deepcopy(model)))
    row = next(row for row in helped.rows if row.attack == "transfer")
    transferred = helped.distances[row.key]
    bought, before = (report.distances[report.rows[-1].key] for report in (helped, alone))
    assert (bought == np.minimum(transferred, before)).all()
    assert (bought < before).any()
    share = alone.rows[0].accuracy
    assert row.passes == {"forward": pytest.approx(21 * share, abs=1e-3), "backward": pytest.approx(20 * share, abs=1e-3)}


def test_an_evaluation_does_not_go_on_with_other_versions_or_another_device(model, split, tmp_path, monkeypatch):
    """A report is of one stack: other versions, another processor round otherwise."""
    measured(model, split, resume_folder=tmp_path / "partial")
    real = environment.environment()
    assert {"torch", "pyautoattack", "robustify"} <= real.keys()
    for name, hint in (("torch", "pip install 'torch=="), ("pyautoattack", "pip install"), ("device", "rm -r")):
        monkeypatch.setattr(evaluation, "environment", lambda device, name=name: {**real, name: "another"})
        with pytest.raises(UserError, match=f"another {name} .*{name}: .* there, another here") as refused:
            measured(model, split, resume_folder=tmp_path / "partial")
        assert hint in refused.value.hint
        assert "rm -r" in refused.value.hint
    installs = [("unknown", "2.1", ""), ("2.1+cu121", "2.1", ""), ("2.1+cu121", "2.0", "pip install 'torch==2.1'")]
    for known, here, install in installs:
        folder = tmp_path / f"{known} {here}"
        monkeypatch.setattr(evaluation, "environment", lambda device, known=known: {**real, "torch": known})
        measured(model, split, resume_folder=folder)
        monkeypatch.setattr(evaluation, "environment", lambda device, here=here: {**real, "torch": here})
        with pytest.raises(UserError, match="another torch") as refused:
            measured(model, split, resume_folder=folder)
        assert install in refused.value.hint
        assert ("pip install" in refused.value.hint) == bool(install)
    finished = measured(model, split)
    monkeypatch.setattr(evaluation, "environment", lambda device: {**real, "torch": "1.0"})
    assert measured(model, split, finished=finished) is finished  # whole, and it says of which versions it is


def test_what_is_per_example_survives_the_disk(model, split, tmp_path):
    report = measured(model, split, check=True)
    report.save(tmp_path / "report.json")
    assert same(report, Report.load(tmp_path / "report.json"))
    save_pair(tmp_path / "pair.json", report, report)
    assert all(same(report, part) for part in load_pair(tmp_path / "pair.json"))


def test_a_report_knows_its_images(model, split):
    one, again = (evaluate(model, split, [], THREAT, n=50, seed=seed) for seed in (0, 0))
    assert one.data_digest == again.data_digest
    other = from_tensors(*[(split.images, split.labels.roll(1))] * 3).test
    changed = [evaluate(model, split, [], THREAT, n=50, seed=1), evaluate(model, other, [], THREAT, n=50)]
    assert one.data_digest not in {report.data_digest for report in changed}


def test_the_same_attack_with_other_settings_has_a_row_of_its_own(model, split):
    report = evaluate(model, split, ["pgd:steps=1", "pgd:steps=3", "pgd:steps=3"], THREAT, batch_size=BATCH)
    assert [row.attack for row in report.rows] == ["clean", "pgd", str(AttackSpec.parse("pgd:steps=3"))]


def test_a_fast_search_has_exact_verdicts_and_says_so(model, split):
    report = evaluate(model, split, ["pgd:steps=3"], THREAT, batch_size=BATCH, fast_search=True)
    assert report.rows[1].settings["search"] == "bf16"
    assert any("bfloat16" in note for note in report.notes)
    assert next(model.parameters()).dtype == torch.float32
    slow = evaluate(model, split, ["pgd:steps=3"], THREAT, batch_size=BATCH)
    assert abs(report.rows[1].correct - slow.rows[1].correct) <= 4
    assert report.rows[1].passes["backward"] == slow.rows[1].passes["backward"]


def test_bad_input_is_refused(model, split):
    with pytest.raises(UserError, match="asked for 61 images"):
        evaluate(model, split, ["fgsm"], THREAT, n=61)
    for name, value in (("n", 0), ("n", -5), ("batch_size", 0), ("seed", -1)):
        with pytest.raises(UserError, match=f"{name} must be at least .*, not {value}"):
            evaluate(model, split, ["fgsm"], THREAT, **{name: value})
    with pytest.raises(UserError, match="the model has 4 classes"):
        evaluate(model, from_tensors(*[toy_data(30, 5)] * 3).test, ["fgsm"], THREAT)
    with pytest.raises(UserError, match="unknown attack"):
        evaluate(model, split, ["autoatack"], THREAT)
    with pytest.raises(UserError, match="not one row of logits"):
        evaluate(model[:5], split, ["fgsm"], THREAT)
