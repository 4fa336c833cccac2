"""W-PGD against vectors computed with the published code, where that code is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assets_folder

from robustify.attacks import w_pgd
from robustify.gradients import gradient_norms
from robustify.sensitivity import conjugate, upsilon
from robustify.threat import ThreatModel

VECTORS = "vectors/wpgd_sri_resnet2b2_sadv8.npz"


def cases() -> list[tuple]:
    folder = assets_folder()
    file = folder.parent / "reference" / VECTORS if folder else Path("missing")
    return list(enumerate(np.load(file)["cases"])) if file.exists() else [(0, None)]


@pytest.mark.assets
@pytest.mark.parametrize(("index", "case"), cases())
def test_w_pgd_equals_the_published_code(assets, index, case):
    if case is None:
        pytest.skip("no reference vectors beside the assets")
    z = np.load(assets_folder().parent / "reference" / VECTORS)
    x, y = torch.tensor(z["x"]).float().permute(0, 3, 1, 2) / 255, torch.tensor(z["y"])
    model = assets.model("resnet2b2_adv8")
    q, s, delta, loss, steps, ratio, their_upsilon, accuracy, _ = case
    q = float(q)
    p = torch.inf if q == 1 else conjugate(q)  # conjugation is its own inverse
    threat = ThreatModel("Linf" if s == "1" else "L2", float(delta), p)
    assert upsilon(gradient_norms(model, [(x, y)], loss.lower(), threat.norm), q).value == pytest.approx(
        float(their_upsilon), rel=1e-5
    )
    x_adv = w_pgd(model, x, y, threat=threat, loss=loss.lower(), steps=int(steps), step_ratio=float(ratio))
    if f"x_adv_{index}" in z:
        assert np.abs(z[f"x_adv_{index}"] - x_adv[:16].numpy()).max() < 1e-5
    # many sign steps amplify rounding: one image of 64 may fall on the other side
    assert float((model(x_adv).argmax(1) == y).double().mean()) == pytest.approx(float(accuracy), abs=1.01 / 64)
