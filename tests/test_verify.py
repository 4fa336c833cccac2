"""The clean-accuracy gate, a pure function of numbers."""
from __future__ import annotations

import pytest

from robustify.errors import UserError
from robustify.sources.checkpoint import Checkpoint
from robustify.verify import verify


def checkpoint(published="84.92", classes=10, dataset="cifar10", pretrained=True) -> Checkpoint:
    return Checkpoint(
        model=None, arch="a", arch_args={}, num_classes=classes, input_size=(3, 32, 32), base_id="the-model",  # type: ignore
        published=published and {"clean_acc": published}, dataset=dataset, pretrained=pretrained,
    )


@pytest.mark.parametrize(("accuracy", "n"), [(0.8492, 10_000), (0.85, 100), (0.835, 10_000), (0.76, 100), (0.9, 1000)])
def test_own_data_accepted(accuracy, n):
    said = verify(accuracy, n, checkpoint(), "cifar10", 10)
    assert "published 84.92%" in said
    assert f"{n} examples of cifar10" in said
    assert "\n" not in said


@pytest.mark.parametrize(("accuracy", "n"), [(0.82, 10_000), (0.74, 100), (0.2, 50)])
def test_own_data_refused(accuracy, n):
    with pytest.raises(UserError, match=r"the-model is published with 84.92%") as error:
        verify(accuracy, n, checkpoint(), "cifar10", 10)
    assert "normalisation" in error.value.hint
    assert "--no-verify" in error.value.hint


def test_other_data_with_as_many_classes():
    assert "on cifar10" in verify(0.65, 1000, checkpoint(), "my-pictures", 10)
    with pytest.raises(UserError, match="far below"):
        verify(0.5, 1000, checkpoint(), "my-pictures", 10)
    with pytest.raises(UserError, match="no better than chance"):
        verify(0.11, 1000, checkpoint("30.00"), "my-pictures", 10)


def test_without_a_published_figure():
    assert "no published figure" in verify(0.6, 500, checkpoint(None), "digits", 10)
    with pytest.raises(UserError, match=r"no better than chance \(10.00%\)"):
        verify(0.12, 500, checkpoint(None), "digits", 10)


def test_new_classifiers_are_not_judged():
    assert "the classifier is new" in verify(0.1, 500, checkpoint(pretrained=False), "cifar10", 10)
    assert "the classifier is new" in verify(0.2, 500, checkpoint(), "flowers", 5)
