"""The public names: there whatever has been imported, and they take models and data in every form."""
from __future__ import annotations

import importlib

import pytest
import torch
from helpers import tiny_net, toy_data
from torch import nn

import robustify
from robustify import api, pixels
from robustify.data import from_tensors
from robustify.errors import UserError

X, Y = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 10


def test_labels_that_count_from_one_are_told_from_other_classes():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for data in ((X, Y + 1), from_tensors((X, Y + 1), test=(X, Y + 1))):
        with pytest.raises(UserError, match="the labels are 1 to 10, those of 10 classes are 0 to 9"):
            robustify.evaluate(net, data, attacks=["clean"])
    with pytest.raises(UserError, match="10 classes, the data has a label 11"):
        robustify.evaluate(net, (X, Y + 2), attacks=["clean"])


def test_mistakes_in_attacks_are_told_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(api, "load", lambda *_: pytest.fail("it loads the model"))
    with pytest.raises(UserError, match="Did you mean steps"):
        robustify.evaluate("digits", "digits", attacks=["pgd:step=3"])


def test_public_names_stay_callable_after_their_modules_are_imported():
    for module in ("export", "evaluation", "pipeline", "api"):
        importlib.import_module(f"robustify.{module}")
    for name in robustify.__all__:
        assert callable(getattr(robustify, name)), name
        assert name in dir(robustify)
    with pytest.raises(AttributeError, match="hardenn"):
        robustify.hardenn  # noqa: B018


def test_evaluate_takes_any_network_and_any_data():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    pair = robustify.evaluate(net, (X, Y), attacks=["fgsm"], threat="L2:0.5")
    dataset = robustify.evaluate(net, torch.utils.data.TensorDataset(X, Y), attacks=["fgsm"], threat="L2:0.5")
    wrapped = robustify.evaluate(pixels.PixelModel(net), (X.numpy(), Y.numpy()), attacks=["fgsm"], threat="L2:0.5")
    assert pair.digest() == dataset.digest() == wrapped.digest()
    assert pair.model_id == "Sequential"
    moved = robustify.evaluate(net, (X, Y), attacks=["clean"], mean=(0.5,), std=(0.5,))
    by_hand = (net((X - 0.5) / 0.5).argmax(1) == Y).sum()
    assert moved.rows[0].correct == by_hand


def test_evaluate_takes_a_checkpoint_and_a_name():
    checkpoint = robustify.load("timm:robustify_digits_cnn", pretrained=False)
    told = []
    report = robustify.evaluate(checkpoint, "digits", attacks=["clean"], n=30, split="val", listener=told.append)
    assert (report.rows[0].n, report.split) == (30, "val")
    assert report.data.startswith("digits (")
    assert told


def test_held_out_test_images_are_called_so_by_every_report():
    """As by those of a run, with which they may then be compared; the name finds them again."""
    data = from_tensors((X, Y))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    report = robustify.evaluate(net, data, attacks=["clean"])
    assert report.split == data.test_name == "held-out"
    assert api.split_named(data, report.split) is data.test
    assert robustify.evaluate(net, data, attacks=["clean"], split="held-out").split == "held-out"
    assert robustify.evaluate(net, data, attacks=["clean"], split="val").split == "val"


def test_default_attacks_are_those_that_know_the_norm():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    both = robustify.evaluate(net, (X, Y), threat=["L1:1", "Linf:0.1"])
    assert {row.attack for row in both.rows} == {"clean", "fgsm", "pgd"}
    assert "w-pgd" in {row.attack for row in robustify.evaluate(net, (X, Y)).rows}


def test_what_does_not_fit_is_refused():
    with pytest.raises(robustify.UserError, match="does not take images of shape"):
        robustify.evaluate(nn.Sequential(nn.Flatten(), nn.Linear(99, 10)), (X, Y), attacks=["clean"])
    with pytest.raises(robustify.UserError, match="unknown split"):
        robustify.evaluate("digits", "digits", split="dev", attacks=["clean"])


def test_classes_must_agree():
    checkpoint = robustify.load("timm:robustify_digits_cnn", pretrained=False, num_classes=3)
    with pytest.raises(robustify.UserError, match="has 3 classes"):
        robustify.evaluate(checkpoint, "digits", attacks=["clean"])


def test_export_of_a_checkpoint_reads_back(tmp_path):
    checkpoint = robustify.load("timm:robustify_digits_cnn", pretrained=False)
    folder = robustify.export(checkpoint, tmp_path / "model")
    again = robustify.load(folder)
    assert torch.equal(again.model(X), checkpoint.model(X))


def test_a_surrogate_of_other_classes_is_refused():
    with pytest.raises(UserError, match="the surrogate Sequential has 3 classes, the model 4"):
        robustify.evaluate(tiny_net(), toy_data(8), attacks=["fgsm"], surrogate=tiny_net(classes=3))


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda out: robustify.evaluate(tiny_net(), toy_data(8), n=9), "n=8"),
        (lambda out: robustify.evaluate(tiny_net(classes=3), toy_data(8)), "num_classes=N"),
        (lambda out: robustify.load("timm:darknet17"), "pretrained=False"),
        (lambda out: robustify.harden(tiny_net(), toy_data(40), verify=False, batch_size=99), "batch_size=14 in"),
        (lambda out: robustify.export(robustify.load("digits"), out), "force=True"),
    ],
)
def test_a_mistake_in_python_is_told_with_pythons_arguments(call, argument, tmp_path):
    """Whatever flag of the command line is named, the argument stands beside it."""
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError) as refused:
        call(tmp_path)
    assert argument in str(refused.value)
