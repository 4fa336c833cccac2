"""Each sign of gradient masking, and of a model that is not what it seems, is seen; a plain network shows none."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_net, toy_data
from torch import nn

from robustify import readings, sanity
from robustify.data import Split, from_tensors
from robustify.errors import UserError
from robustify.evaluation import evaluate
from robustify.pixels import PixelModel
from robustify.report import Report, Row
from robustify.threat import ThreatModel

THREAT = ThreatModel.parse("Linf:2/255")


@pytest.fixture
def model() -> nn.Module:
    net = tiny_net().eval()
    with torch.no_grad():
        net[6].bias.sub_(net(toy_data(64)[0]).mean(0))
        net[6].weight.mul_(8)
    return net


def labelled(model: nn.Module, images: torch.Tensor | None = None) -> Split:
    """Images with the model's own predictions as labels, but for a few."""
    x = toy_data(64)[0] if images is None else images
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::10] = (y[::10] + 1) % 4
    return from_tensors(*[(x, y)] * 3).test


def looked_at(model: nn.Module, attacks=("fgsm",), split: Split | None = None) -> Report:
    return evaluate(model, split or labelled(model), list(attacks), THREAT, batch_size=32, check=True)


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def test_a_plain_network_shows_nothing_and_its_evidence_is_kept(model):
    report = looked_at(model, ["fgsm", "pgd", "square:queries=20"])
    assert report.notes == []
    assert report.checks["accuracy_at_large_eps"] == 0
    assert report.checks["zero_gradients"] == 0
    assert report.checks["logits_change_on_repeat"] == 0
    assert report.checks["images"] == 64
    assert 15 < report.checks["backward"] <= 20
    # beside the attack: as it is, again, half of them alone, in three other readings, and after the attack
    assert 6 < report.checks["forward"] - report.checks["backward"] <= 6.5


def test_without_the_check_no_pass_is_spent_on_it(model):
    assert evaluate(model, labelled(model), ["fgsm"], THREAT).checks == {}


def test_quantised_images_have_no_gradient(model):
    class Quantised(Wrapped):
        def forward(self, x):
            return self.net(torch.round(x * 16) / 16)

    report = looked_at(Quantised(model))
    assert report.checks["zero_gradients"] == 1
    assert any("exactly zero on 100.00 %" in note for note in report.notes)
    assert any("leaves 100.00 %" in note for note in report.notes)
    assert any("did not raise the loss" in note for note in report.notes)


def test_black_box_beats_white_box_where_gradients_mislead(model):
    class Quantised(Wrapped):
        def forward(self, x):
            return self.net(torch.round(x * 255) / 255)

    report = looked_at(
        Quantised(model), ["pgd:steps=3", "square:queries=30", "autoattack:steps=2,queries=30,targets=1"]
    )
    assert any(note.startswith("Square") and "white-box attacks)" in note for note in report.notes), report.notes
    assert any(note.startswith("Square") and "(the three before it)" in note for note in report.notes), report.notes


def test_one_step_that_beats_many_is_told():
    def row(name: str, verdict: np.ndarray) -> Row:
        return Row(name, "Linf:8/255", len(verdict), int(verdict.sum()))

    weak, strong = np.array([True] * 12 + [False] * 8), np.array([True] * 10 + [False] * 4 + [True] * 6)
    rows = [row("fgsm", weak), row("pgd", strong)]
    (note,) = sanity.of_rows(rows, {rows[0].key: weak, rows[1].key: strong})
    assert "FGSM, 60.00 %" in note
    assert "fools 6 images that PGD does not" in note
    assert sanity.of_rows([row("fgsm", strong), row("pgd", weak)], {}) == []
    few = strong & (np.arange(20) != 19) & (np.arange(20) != 18)  # two images more are no sign
    assert sanity.of_rows([row("fgsm", few), row("pgd", strong)], {}) == []


def test_shares_of_a_few_images_are_no_sign(model):
    class Quantised(Wrapped):
        def forward(self, x):
            return self.net(torch.round(x * 16) / 16)

    x = toy_data(12)[0]
    report = looked_at(Quantised(model), split=labelled(model, x))
    assert report.checks["zero_gradients"] == 1  # the evidence is there
    assert not any("gradient" in note for note in report.notes)


def test_a_surrogate_that_beats_white_box_attacks_is_told(model):
    class Rounded(Wrapped):
        def forward(self, x):
            return self.net(torch.round(x * 255) / 255)

    def notes(net: nn.Module, steps: int) -> list[str]:
        report = evaluate(net, labelled(model), [f"pgd:steps={steps}"], THREAT, surrogate=("plain", copy.deepcopy(model)))
        row = next(row for row in report.rows if row.attack == "transfer")
        assert row.settings == {"surrogate": "plain", "surrogate_accuracy": pytest.approx(0.89, abs=0.01), "steps": 20}
        assert row.passes["backward"] == pytest.approx(20 * report.clean.accuracy, abs=1e-3)  # of the surrogate
        assert report.headline(THREAT.spec).correct <= row.correct
        return report.notes

    (note,) = notes(Rounded(model), 3)
    assert "Transfer from plain (itself 89.06 % on the first clean images), which sees no gradients of the model" in note
    assert notes(model, 20) == []  # from itself nothing is gained


def test_dropout_left_on_is_told(model):
    class Noisy(Wrapped):
        def forward(self, x):
            return F.dropout(self.net(x), 0.1, training=True)

    notes = looked_at(Noisy(model), split=labelled(model)).notes
    assert any("draws random numbers even in eval mode" in note and "not valid" in note for note in notes)


def test_batch_statistics_in_eval_mode_are_told(model):
    model[1] = nn.BatchNorm2d(8, track_running_stats=False)
    notes = looked_at(model.eval()).notes
    assert any("the other images of its batch" in note for note in notes)


def test_a_model_that_changes_is_refused(model):
    class Counting(Wrapped):
        def __init__(self, net):
            super().__init__(net)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            return self.net(x)

    with pytest.raises(UserError, match="changed while it was evaluated: seen"):
        looked_at(Counting(model))

    class Running(Wrapped):
        def forward(self, x):
            bn = self.net[1]
            F.batch_norm(self.net[0](x), bn.running_mean, bn.running_var, training=True)
            return self.net(x)

    with pytest.raises(UserError, match=r"running_mean, .*running_var"):
        looked_at(Running(model))


def test_probabilities_for_logits_are_told(model):
    notes = looked_at(nn.Sequential(model, nn.Softmax(1))).notes
    assert any("returns probabilities, not logits" in note for note in notes)


def test_a_model_that_expects_normalised_images_is_told(model):
    x = toy_data(64)[0]
    deviation, mean = torch.std_mean(x, (0, 2, 3))
    right = PixelModel(model, mean.tolist(), deviation.tolist())
    with torch.no_grad():
        model[6].bias.sub_(right(x).mean(0))  # else it calls nearly all of them the same
    split = labelled(right, x)
    notes = looked_at(model, split=split).notes
    assert any("(these images' own) the accuracy would be" in note for note in notes), notes
    assert not any("normalisation" in note for note in looked_at(right, split=split).notes)
    wrong = looked_at(PixelModel(model, (0.5,), (3.0,)), split=split).notes
    assert any("the model expects that" in note for note in wrong)


class Answers(nn.Module):
    """Answers `plain` on images in [0,1] and `normalised` on others, whatever the images show."""

    def __init__(self, plain: torch.Tensor, normalised: torch.Tensor) -> None:
        super().__init__()
        self.plain, self.normalised = plain, normalised

    def forward(self, x):
        return F.one_hot(self.normalised if float(x.min()) < 0 else self.plain, 10)[: len(x)].float()


@pytest.mark.parametrize(
    ("right", "other", "told"),
    [
        (7, 15, False),  # so much better are two guesses, each right on a tenth of 64 images, now and then
        (7, 40, True),
        (50, 55, False),
        (50, 63, True),
    ],
)
def test_normalised_images_are_only_suggested_where_chance_does_not_explain_it(right, other, told):
    y = torch.arange(64) % 10
    first, last = (torch.where(hits, y, (y + 1) % 10) for hits in (torch.arange(64) < right, torch.arange(64) >= 64 - other))
    found = sanity.Findings()
    x = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    sanity._is_read_well(Answers(first, last), x, y, first == y, found)
    assert found.evidence["accuracy_in_another_reading"] == other / 64
    assert bool(found.notes) == told


def test_one_answer_for_all_images_is_no_sign_of_normalisation():
    """Images in the order of their classes: a network that always says the first class is right on all of them."""
    always = torch.zeros(64, dtype=torch.long)
    x = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for y in (always, torch.arange(64) // 40):
        found = sanity.Findings()
        sanity._is_read_well(Answers(always + 5, always), x, y, always == 5, found)
        assert found.notes == []


def test_an_accuracy_like_chance_is_told():
    assert sanity.of_clean(Row("clean", None, 100, 12, kind="clean"), 10)
    assert not sanity.of_clean(Row("clean", None, 100, 40, kind="clean"), 10)


def test_warnings_of_one_kind_are_one_note():
    texts = ["there are tensor(3) points with zero gradient!", "there are 4 points with zero gradient!", "other"]
    assert sanity.of_warnings(texts, "x") == [
        "x warned 2 times: there are 3 points with zero gradient!",
        "x warned: other",
    ]


@pytest.mark.assets
@pytest.mark.parametrize("name", ["resnet2b2_adv8", "resnet2b_adv2", "cnn_a_adv2", "mnist_trades"])
def test_real_networks_show_nothing(assets, name):
    x, y = assets.images("mnist" if name.startswith("mnist") else "cifar10")
    report = looked_at(assets.model(name), ["fgsm", "pgd:steps=10"], from_tensors(*[(x[:64], y[:64])] * 3).test)
    assert report.notes == [], report.notes


def test_other_readings_on_a_gpu(model):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x, y = (part.to("cuda") for part in toy_data(64))
    model = PixelModel(model, (0.5,), (0.25,)).to("cuda").eval()
    best, _ = readings.others(model, x, y, model(x).argmax(1) == y)
    assert best is not None
