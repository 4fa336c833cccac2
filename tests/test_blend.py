from __future__ import annotations

import pytest
import torch
from helpers import tiny_net, toy_data

from robustify.blend import Point, between, choose, curve, price
from robustify.data import from_tensors
from robustify.errors import UserError
from robustify.pixels import PixelModel
from robustify.threat import ThreatModel


def test_the_line_is_straight_and_keeps_types():
    a, b = tiny_net(seed=0).state_dict(), tiny_net(seed=1).state_dict()
    middle = between(a, b, 0.25)
    for name, value in middle.items():
        assert value.dtype == a[name].dtype
        if value.is_floating_point():
            assert torch.allclose(value, 0.75 * a[name] + 0.25 * b[name], atol=1e-7)
    assert all(torch.equal(between(a, b, 0.0)[name], a[name]) for name in a)
    assert all(torch.equal(between(a, b, 1.0)[name], b[name]) for name in b)


def test_other_networks_are_refused():
    a = tiny_net().state_dict()
    with pytest.raises(UserError, match=r"differ in 1 of \d+ tensors, such as extra"):
        between(a, {**a, "extra": torch.zeros(1)}, 0.5)


@pytest.mark.parametrize("threat", ["Linf:8/255", "W2-Linf:8/255"])
def test_a_curve_begins_and_ends_at_the_two_networks(threat):
    x, y = toy_data(40)
    data = from_tensors((x, y), (x, y), (x, y))
    one, other = tiny_net(seed=0).eval(), tiny_net(seed=1).eval()
    model = PixelModel(tiny_net(seed=2))
    points = curve(model, one.state_dict(), other.state_dict(), data.val, ThreatModel.parse(threat), points=3)
    assert [point.alpha for point in points] == [0.0, 0.5, 1.0]
    with torch.no_grad():
        for point, net in ((points[0], one), (points[2], other)):
            assert point.clean == pytest.approx(float((net(x).argmax(1) == y).double().mean()))
            assert point.robust <= point.clean
        assert torch.equal(model.eval()(x), other(x))


def test_the_choice_keeps_the_clean_accuracy_asked_for():
    points = [Point(0.0, 0.90, 0.10), Point(0.5, 0.88, 0.30), Point(1.0, 0.80, 0.35), Point(0.75, 0.85, 0.30)]
    assert choose(points, 2.0).alpha == 0.5
    assert choose(points, 1.9).alpha == 0.0
    assert choose(points, 5.0).alpha == 0.5  # of equals the nearer
    assert choose(points).alpha == 1.0
    assert choose(points, 0).alpha == 0.0


def test_the_price_of_robustness_is_that_of_the_cheapest_point_more_robust():
    start, end = Point(0.0, 0.90, 0.50), Point(1.0, 0.80, 0.70)
    assert price([end, Point(0.5, 0.86, 0.60), Point(0.2, 0.89, 0.50), start]) == 4.0
    assert price([start, Point(0.5, 0.8583, 0.51), end]) == 4.2
    assert price([start, Point(0.5, 0.88, 0.40)]) is None
