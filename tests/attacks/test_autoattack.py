"""The authors' attacks through robustify give pyautoattack's own verdicts, image for image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import tiny_net, toy_data
from pyautoattack import AutoAttack
from pyautoattack.square import SquareAttack
from torch import nn

from robustify.attacks import ATTACKS, AttackSpec, apgd_t, autoattack, fab_t, screen, square
from robustify.attacks.autoattack import standard
from robustify.data import from_tensors
from robustify.errors import UserError
from robustify.evaluation import counted, evaluate
from robustify.measure import check_budget
from robustify.threat import ThreatModel

THREATS = ["Linf:2/255", "L2:0.1", "L1:0.5"]  # about half of the images withstand
NAMES = ["apgd-ce", "apgd-t", "fab-t", "square"]


def trained(classes: int = 4, n: int = 48) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small network, images near its decision boundary, and labels: mostly its predictions, a few wrong ones."""
    net = tiny_net(classes).eval()
    x, y = toy_data(n, classes)
    with torch.no_grad():
        net[6].weight.mul_(8)
        net[6].bias.sub_(net(x).mean(0))
        y = net(x).argmax(1)
    y[::9] = (y[::9] + 1) % classes
    return net, x, y


def bare(model, x, y, threat: ThreatModel, *, steps, queries, targets, batch_size, attacks=None, seed=0) -> np.ndarray:
    """pyautoattack alone with the standard version's settings, its loops shortened; bool [N]: withstood."""
    adversary = AutoAttack(model, norm=threat.norm, eps=threat.eps, seed=seed, device="cpu", version="standard")
    if attacks:
        adversary.attacks_to_run = attacks
    for attack in (adversary.apgd, adversary.apgd_targeted):
        attack.n_iter = attack.n_iter_orig = steps
        attack.n_iter_2, attack.n_iter_min = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1)
        attack.size_decr = max(int(0.03 * steps), 1)
    adversary.fab.n_iter = steps
    adversary.square.n_queries = queries
    adversary.apgd_targeted.n_target_classes = min(targets, adversary.apgd_targeted.n_target_classes)
    adversary.fab.n_target_classes = targets
    x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=batch_size)
    with torch.no_grad():
        return (model(x_adv).argmax(1) == y).numpy()


def report(model, x, y, attacks, threat, **more):
    data = from_tensors((x, y), (x, y), (x, y))
    return evaluate(model, data.test, attacks, ThreatModel.parse(threat), **more)


@pytest.mark.parametrize("threat", THREATS)
def test_every_verdict_is_pyautoattacks_own(threat):
    """Of the cascade, whose survivors are cut into batches anew after each attack, and of each attack alone."""
    model, x, y = trained()
    few = {"steps": 8, "queries": 30, "targets": 3}
    ours = report(model, x, y, ["autoattack:steps=8,queries=30,targets=3"], threat, batch_size=20, seed=3)
    parsed = ThreatModel.parse(threat)
    theirs = bare(model, x, y, parsed, **few, batch_size=20, seed=3)
    found = ours.verdicts[ours.rows[1].key]
    assert np.array_equal(found, theirs)
    assert 0 < found.sum() < ours.rows[0].correct
    assert ours.rows[1].settings["left"][-1] == found.sum()
    for name in NAMES:
        settings = {key: value for key, value in few.items() if key in ATTACKS[name].run.__kwdefaults__}
        if name == "apgd-ce" and parsed.norm == "L1":
            settings["restarts"] = 5
        spec = AttackSpec(name, settings)
        alone = report(model, x, y, [str(spec)], threat, batch_size=20, seed=3)
        theirs = bare(model, x, y, parsed, **few, batch_size=20, attacks=[name], seed=3)
        assert np.array_equal(alone.verdicts[alone.rows[1].key], theirs), name


@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.parametrize("name", [*NAMES, "autoattack", "screen"])
def test_an_attack_keeps_its_budget_and_gives_the_model_and_the_random_numbers_back(name, threat, capsys):
    model, x, y = trained(n=16)
    model.train()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    short = {"steps": 4, "queries": 10, "targets": 2}
    settings = {key: value for key, value in short.items() if key in ATTACKS[name].run.__kwdefaults__}
    parsed = ThreatModel.parse(threat)
    before = x.clone()
    x_adv = ATTACKS[name].run(model, x, y, threat=parsed, seed=1, **settings)
    again = ATTACKS[name].run(model, x, y, threat=parsed, seed=1, **settings)
    assert torch.equal(x_adv, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    check_budget(x, x_adv, parsed)
    assert all(module.training for module in model.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert capsys.readouterr().out == ""


def test_the_function_equals_the_evaluation_on_one_batch():
    model, x, y = trained(n=24)
    threat = ThreatModel.parse("Linf:8/255")
    x_adv = autoattack(model, x, y, threat=threat, steps=6, queries=20)
    held = report(model, x, y, ["autoattack:steps=6,queries=20"], threat).verdicts["autoattack Linf:8/255"]
    assert np.array_equal((model(x_adv).argmax(1) == y).numpy(), held)


@pytest.mark.parametrize("classes", [2, 3, 4, 6])
def test_fewer_than_ten_classes_are_handled_and_said(classes):
    model, x, y = trained(classes, n=12)
    found = report(model, x, y, ["autoattack:steps=3,queries=5"], "Linf:8/255")
    row = found.rows[1]
    names = [stage.partition(":")[0] for stage in row.settings["stages"]]
    assert names == [name for name in NAMES if classes >= 4 or name != "apgd-t"]
    said = "without apgd-t" if classes < 4 else f"all {classes - 1} other classes"
    assert said in row.settings["version"]
    assert any(said in note for note in found.notes)
    if classes < 4:
        with pytest.raises(UserError, match="at least 4 classes"):
            apgd_t(model, x, y, threat=ThreatModel.parse("Linf:8/255"))


def test_only_the_authors_settings_are_called_standard():
    linf, l1 = ThreatModel.parse("Linf:8/255"), ThreatModel.parse("L1:12")
    assert standard(linf, 10).label == "standard"
    ours = [str(stage) for stage in standard(linf, 1000).stages]
    assert ours[:2] == ["apgd-ce:steps=100,restarts=1", "apgd-t:steps=100,targets=9"]
    assert ours[2:] == ["fab-t:steps=100,targets=9", "square:queries=5000"]
    ours = [str(stage) for stage in standard(l1, 10).stages][:2]
    assert ours == ["apgd-ce:steps=100,restarts=5", "apgd-t:steps=100,targets=5"]
    assert standard(linf, 10, steps=99).label.startswith("not standard")
    assert standard(linf, 3, queries=9).label.startswith("not standard")


def test_pyautoattacks_warnings_reach_the_report():
    model, x, y = trained(n=12)
    steep = nn.Sequential(model, nn.Hardtanh(-1e-9, 1e-9)).eval()  # flat almost everywhere
    with torch.no_grad():
        y = steep(x).argmax(1)
    notes = report(steep, x, y, ["autoattack:steps=2,queries=5"], "Linf:8/255").notes
    assert any("zero gradient" in note for note in notes), notes
    notes = report(nn.Sequential(model, nn.Softmax(1)), x, y, ["apgd-ce:steps=2"], "Linf:8/255").notes
    assert any("pyautoattack warned" in note and "probability distribution" in note for note in notes), notes
    assert any("probabilities, not logits" in note for note in notes), notes

    class Noisy(nn.Module):
        def forward(self, z):
            return nn.functional.dropout(model(z), 0.5, training=True)

    notes = report(Noisy(), x, y, ["apgd-ce:steps=2"], "Linf:8/255").notes
    assert any("randomized" in note for note in notes), notes


def test_a_model_in_double_precision_can_be_attacked():
    model, x, y = trained(n=8)
    x_adv = fab_t(model.double(), x.double(), y, threat=ThreatModel.parse("Linf:8/255"), steps=3)
    assert x_adv.dtype == torch.float64


def test_the_authors_attacks_only_ask_for_input_gradients():
    model, x, y = trained(n=6)
    with counted(model) as passes:
        square(model, x, y, threat=ThreatModel.parse("Linf:1/255"), queries=4)
    assert passes.backward == 0


def test_the_screen_is_called_an_upper_bound():
    model, x, y = trained(n=16)
    found = report(model, x, y, ["screen"], "Linf:2/255")
    assert "upper bound" in found.rows[1].settings["version"]
    assert any("upper bound" in note and "not AutoAttack" in note for note in found.notes)
    x_adv = screen(model, x, y, threat=ThreatModel.parse("Linf:2/255"))
    assert int((model(x_adv).argmax(1) == y).sum()) == found.rows[1].correct


@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "threat"), [("resnet2b2_adv8", "Linf:8/255"), ("resnet2b2_adv8", "L2:0.4"), ("cnn_a_adv2", "L1:6")]
)
def test_a_real_network_gets_pyautoattacks_verdicts(assets, name, threat):
    model, (x, y) = assets.model(name), assets.images()
    x, y = x[:20], y[:20]
    ours = report(model, x, y, ["autoattack:steps=10,queries=100", "screen"], threat, batch_size=20)
    theirs = bare(model, x, y, ThreatModel.parse(threat), steps=10, queries=100, targets=9, batch_size=20)
    assert np.array_equal(ours.verdicts[ours.rows[1].key], theirs)


@pytest.mark.assets
def test_the_standard_version_on_a_real_network(assets):
    model, (x, y) = assets.model("resnet2b2_adv4"), assets.images()
    x, y = x[:3], y[:3]
    threat = ThreatModel.parse("Linf:4/255")
    ours = report(model, x, y, ["autoattack"], threat)
    adversary = AutoAttack(model, norm="Linf", eps=threat.eps, seed=0, device="cpu", version="standard")
    x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=256)
    assert ours.rows[1].settings["version"] == "standard"
    assert np.array_equal(ours.verdicts[ours.rows[1].key], (model(x_adv).argmax(1) == y).numpy())


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_square_is_refused_exactly_where_its_authors_code_fails(norm):
    """Every side up to 30 and narrow, low and wide images, against pyautoattack's own code."""
    threat = ThreatModel.parse(f"{norm}:1")

    class Stubborn(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x.flatten(1).mean(1) + 100, x.flatten(1).mean(1)], 1)

    def fails(size):
        x, y = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0)), torch.zeros(1, dtype=torch.long)
        attack = SquareAttack(Stubborn(), norm=norm, n_queries=3, eps=1.0, p_init=0.8, seed=0, resc_schedule=False)
        try:
            attack.perturb(x, y)
        except (RuntimeError, ZeroDivisionError):
            return True
        return False

    def refused(size):
        try:
            AttackSpec.parse("autoattack").check(threat, size)
        except UserError:
            return True
        return False

    sizes = [(side, side) for side in range(1, 31)] + [(h, w) for h in (4, 9, 12, 24, 28) for w in (1, 2, 3, 4, 11, 13, 32)]
    assert [size for size in sizes if refused(size)] == [size for size in sizes if fails(size)]
    assert [side for side in range(5, 513) if refused((side, side))] == [12, 14, 18, 19, 24]
    AttackSpec.parse("square").check(ThreatModel.parse("Linf:8/255"), (12, 12))


def test_images_that_square_cannot_take_are_refused_before_a_pass_is_spent():
    x = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(432, 10))
    y = net(x).argmax(1)
    with counted(net) as passes, pytest.raises(UserError, match="in L2 on images of 12x12"):
        report(net, x, y, ["autoattack"], "L2:0.5")
    assert passes.forward == 0
    with pytest.raises(UserError, match="in L2 on images of 12x12"):
        square(net, x, y, threat=ThreatModel.parse("L2:1e-6"), queries=50)
