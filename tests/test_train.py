from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import tiny_net, toy_data
from safetensors.torch import load_file
from torch import nn

from robustify import layers
from robustify.data import from_tensors, subset
from robustify.distributed import make_accelerator
from robustify.errors import UserError
from robustify.evaluation import counted
from robustify.events import Collapsed, EpochEnd, Note, StepEnd
from robustify.methods import FastAt, FreeAt, Gaat, Mart, MultiNorm, PgdAt, Standard, Trades, Wasserstein
from robustify.methods.remedies import has_fallen, is_blind, next_remedy, remedied
from robustify.pixels import PixelModel
from robustify.probe import Accuracies, accuracies
from robustify.recipe import TrainSettings
from robustify.sensitivity import UpsilonTracker
from robustify.step import prepare, set_train_mode, take_step
from robustify.threat import ThreatModel
from robustify.train import follow, train


def data(n=96):
    return from_tensors(toy_data(n), toy_data(64, seed=1), toy_data(64, seed=2))


def setup_for(method, threat="Linf:8/255", net=None, **settings):
    model = PixelModel(net or tiny_net())
    s = TrainSettings(**{"epochs": 2, "batch_size": 32, "lr": 0.05, "probe_images": 32, "init": "reinit", **settings})
    layers.select(model.net, s.layers, ["6"])
    return prepare(model, method, ThreatModel.parse(threat), s, make_accelerator(s.precision), "none", 96)


def run(setup, folder, **more):
    events = []
    outcome = follow(train(setup, data(), folder, **more), events.append)
    return outcome, events


@pytest.mark.parametrize(
    ("method", "threat"),
    [
        (Wasserstein(steps=2), "W2-Linf:8/255"),
        (Trades(steps=2), "L2:0.5"),
        (PgdAt(steps=2), "L1:2"),
        (Mart(steps=2), "Linf:8/255"),
        (FastAt(), "L2:0.5"),
        (FastAt(grad_align=0.2), "Linf:8/255"),
        (FreeAt(replays=1), "Linf:8/255"),
        (Gaat(), "Linf:8/255"),
        (MultiNorm(steps=2), "Linf:8/255"),
        (Gaat(gradient="exact"), "L2:0.5"),
        (Standard(), "Linf:8/255"),
    ],
    ids=lambda v: getattr(v, "name", v),
)
def test_every_method_learns(method, threat, tmp_path):
    setup = setup_for(method, threat, epochs=6, collapse_drop=1.0)
    outcome, events = run(setup, tmp_path)
    epochs = [e for e in events if isinstance(e, EpochEnd)]
    assert len(epochs) == 7
    assert epochs[-1].losses["total"] < epochs[1].losses["total"]
    assert outcome.steps == 18 == sum(isinstance(e, StepEnd) for e in events)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lr" in line] == list(range(1, 19))
    if method.distributional:
        assert {"upsilon", "upsilon_se", "mean_cost", "zero_share", "largest_delta"} <= set(epochs[-1].extra)


def test_the_same_seed_gives_the_same_weights_and_another_one_does_not(tmp_path):
    weights = []
    for i, seed in enumerate((0, 0, 1)):
        setup = setup_for(Wasserstein(steps=2), "W2-Linf:8/255", seed=seed)
        (tmp_path / str(i)).mkdir()
        run(setup, tmp_path / str(i))
        weights.append(setup.model.net[0].weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("rule", ["epoch", "every", "ema", "window", "importance"])
def test_a_stopped_run_continues_bit_for_bit(rule, tmp_path):
    method = Wasserstein(steps=2, adversary={"name": "budget", "upsilon": rule, "every": 2, "images": 48})
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    kwargs = {"ema": 0.9, "checkpoint_steps": 2, "momentum": 0.9}
    whole = setup_for(method, "W2-Linf:8/255", **kwargs)
    run(whole, tmp_path / "a")
    stopped = train(setup_for(method, "W2-Linf:8/255", **kwargs), data(), tmp_path / "b")
    for event in stopped:
        if isinstance(event, StepEnd) and event.step == 3:  # one step past a checkpoint in mid-epoch
            break
    stopped.close()
    (checkpoint,) = (tmp_path / "b" / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000002.pt"
    continued = setup_for(method, "W2-Linf:8/255", **kwargs)
    run(continued, tmp_path / "b", resume=checkpoint)
    for a, b in zip(whole.model.state_dict().values(), continued.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    drop = {"seconds", "rate"}
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k not in drop}
            for line in (tmp_path / name / "metrics.jsonl").open()
        ]
        for name in ("a", "b")
    ]
    assert lines[0] == lines[1]


def test_accumulation_is_the_same_step_with_frozen_statistics(tmp_path):
    weights = []
    for parts in (1, 4):
        net = tiny_net().double()
        net[3].p = 0.0
        setup = setup_for(Standard(), net=net, accumulate=parts, batchnorm="frozen")
        set_train_mode(setup)
        x, y = toy_data(32)
        chunk = 32 // parts
        take_step(setup, iter([(x[i : i + chunk].double(), y[i : i + chunk]) for i in range(0, 32, chunk)]), 0)
        weights.append(net[0].weight.detach().clone())
    assert torch.allclose(weights[0], weights[1], rtol=1e-12, atol=1e-14)


def test_last_layer_training_leaves_everything_else_alone(tmp_path):
    net = tiny_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    run(setup_for(Trades(steps=2), net=net, layers="last"), tmp_path)
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"6.weight", "6.bias"}


def test_not_a_number_stops_at_once_with_the_facts(tmp_path):
    setup = setup_for(Standard(), lr=50.0, epochs=1)

    class Exploding(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.calls = net, 0

        def forward(self, x):
            self.calls += self.training
            return self.net(x) * (math.nan if self.calls > 2 else 1.0)

    setup.model.net = Exploding(setup.model.net)
    with pytest.raises(UserError) as error:
        run(setup, tmp_path)
    for said in ("not a number at step 3", "learning rate", "largest weight", "--set train.lr="):
        assert said in str(error.value)


def test_collapse_is_named_and_rolled_back(tmp_path, monkeypatch):
    from robustify import train as loop

    collapsing(monkeypatch, iter([0.1, 0.5, 0.55, 0.2, 0.6]))  # the first is the start's
    kept = {}
    plain = loop._save_best

    def spy(setup, folder):
        kept["weight"] = setup.model.net[0].weight.detach().clone()
        plain(setup, folder)

    monkeypatch.setattr(loop, "_save_best", spy)
    setup = setup_for(FastAt(), epochs=5, init="loaded", on_collapse="stop")
    outcome, events = run(setup, tmp_path)
    (collapse,) = [e for e in events if isinstance(e, Collapsed)]
    assert (collapse.epoch, collapse.best_epoch, outcome.best_epoch, outcome.collapsed) == (3, 2, 2, True)
    assert torch.equal(setup.model.net[0].weight, kept["weight"])


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_measured():
    from robustify.pipeline import harden

    said = []
    with pytest.raises(UserError, match="larger than the 96 training images"):
        harden(tiny_net(), data(), batch_size=128, verify=False, listener=said.append)
    assert said == []


@pytest.mark.parametrize(
    "method",
    [Trades(steps=3), PgdAt(steps=3), FastAt(), FastAt(grad_align=1), Wasserstein(steps=3), Mart(steps=3), Gaat(), FreeAt()],
    ids=lambda m: m.name,
)
def test_a_step_spends_the_passes_it_says_and_no_weight_gradient_in_the_attack(method):
    threat = "W2-Linf:8/255" if method.distributional else "Linf:8/255"
    setup = setup_for(method, threat)
    if isinstance(setup.tracker, UpsilonTracker):
        setup.tracker.measure(torch.ones(96), 96)
    set_train_mode(setup)
    x, y = toy_data(32)
    layer, spent = setup.model.net[0], {False: 0, True: 0}  # images sent backward, by whether the weights were to learn

    def watch(module, _, out):
        learns = module.weight.requires_grad
        if out.requires_grad:
            out.register_hook(lambda g: spent.update({learns: spent[learns] + len(g)}))

    layer.register_forward_hook(watch)
    with counted(setup.model) as passes:
        take_step(setup, iter([(x, y)]), 0)
    forward = method.passes(0, 0)
    assert passes.forward / 32 == pytest.approx(forward, abs=1e-9)
    image, weights = (method.passes(*kind) - forward for kind in ((1, 0), (0, 1)))
    if not getattr(method, "second_derivatives", False):  # a hook does not see all of a backward pass differentiated again
        assert {kind: n / 32 for kind, n in spent.items()} == pytest.approx({False: image, True: weights})


@pytest.mark.parametrize(
    ("method", "settings", "exchanges"),
    [(Trades(steps=1), {}, 1), (Trades(steps=1), {"awp": 0.005, "accumulate": 2}, 2), (Gaat(), {"accumulate": 2}, 2)],
)
def test_every_exchange_of_gradients_is_counted(method, settings, exchanges):
    setup = setup_for(method, **settings)
    set_train_mode(setup)
    parts = settings.get("accumulate", 1)
    take_step(setup, iter([toy_data(32 // parts)] * parts), 0)
    assert setup.exchanges == exchanges


@pytest.mark.parametrize("batchnorm", ["train", "sync"])
def test_third_derivatives_of_batch_norm_in_training_are_refused_before_anything_is_measured(batchnorm):
    from robustify.pipeline import harden

    said = []
    method = {"name": "gaat", "gradient": "exact", "order": 2}
    with pytest.raises(UserError, match=r"train\.batchnorm=frozen"):
        harden(tiny_net(), data(), method=method, batch_size=32, batchnorm=batchnorm, verify=False, listener=said.append)
    assert said == []


def test_third_derivatives_are_taken_with_frozen_statistics():
    setup = setup_for(Gaat(gradient="exact", order=2), batchnorm="frozen")
    set_train_mode(setup)
    losses, _ = take_step(setup, iter([toy_data(32)]), 0)
    assert math.isfinite(losses["total"])


def test_free_at_takes_every_batch_several_times_and_continues_bit_for_bit(tmp_path):
    """Three batches an epoch, replayed twice: the noise is part of what a checkpoint holds."""
    seen = []

    class Recorder(FreeAt):
        def step(self, passes, x, y, threat, draws, tracker):
            seen.append(x)
            return super().step(passes, x, y, threat, draws, tracker)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = setup_for(Recorder(replays=2), checkpoint_steps=1)
    outcome, _ = run(whole, tmp_path / "a")
    assert outcome.steps == 12 == len(seen)
    for first, second, third in zip(seen[::2], seen[1::2], seen[2::2], strict=False):
        assert torch.equal(first, second)
        assert not torch.equal(second, third)
    stopped = train(setup_for(FreeAt(replays=2), checkpoint_steps=1), data(), tmp_path / "b")
    for event in stopped:
        if isinstance(event, StepEnd) and event.step == 4:  # the checkpoint lies between the two replays of a batch
            break
    stopped.close()
    (checkpoint,) = (tmp_path / "b" / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000003.pt"
    continued = setup_for(FreeAt(replays=2), checkpoint_steps=1)
    run(continued, tmp_path / "b", resume=checkpoint)
    for a, b in zip(whole.model.state_dict().values(), continued.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_bf16_searches_on_a_shadow_and_its_gradient_is_that_of_full_precision():
    """Cosine of the parameter gradient of a bf16 step to that of the fp32 step, the same images and noise."""
    found = {}
    for precision in ("no", "bf16"):
        net = tiny_net(seed=3)
        net[3].p = 0.0
        setup = setup_for(Trades(steps=5), net=net, precision=precision, lr=1e-9)
        set_train_mode(setup)
        setup.optimizer.zero_grad = lambda *_, **__: None  # keep the gradients to look at
        take_step(setup, iter([toy_data(32)]), 0)
        found[precision] = torch.cat([w.grad.float().flatten() for w in setup.model.parameters()])
        assert (setup.shadow is not None) == (precision == "bf16")
        assert next(setup.model.parameters()).dtype == torch.float32
    cosine = nn.functional.cosine_similarity(found["no"], found["bf16"], dim=0)
    assert cosine > 0.99


def test_the_average_of_weights_is_what_is_kept(tmp_path):
    setup = setup_for(Standard(), ema=0.5, epochs=1)
    run(setup, tmp_path)
    assert torch.equal(setup.model.net[6].weight, setup.ema.module.net[6].weight)


def test_fp16_without_a_gpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="bf16"):
        make_accelerator("fp16")


def test_a_start_that_no_epoch_beats_is_kept_and_said(tmp_path, monkeypatch):
    from robustify import train as loop

    scores = iter([0.5, 0.0, 0.3])  # a dip in the first epoch is no collapse yet
    monkeypatch.setattr(loop, "accuracies", lambda *_: Accuracies(0.9, next(scores), "probe", 4))
    setup = setup_for(FastAt(), epochs=2, lr=1.0, init="loaded")
    start = setup.model.net[0].weight.detach().clone()
    outcome, events = run(setup, tmp_path)
    assert not [e for e in events if isinstance(e, Collapsed)]
    assert (outcome.best_epoch, outcome.best, outcome.steps) == (0, 0.5, 6)
    assert torch.equal(setup.model.net[0].weight, start)
    assert "no epoch was better" in str(events[-1])


@pytest.mark.parametrize("init", ["loaded", "reinit"])
def test_a_network_that_knows_one_class_only_is_not_the_best(tmp_path, monkeypatch, init):
    """It withstands every attack on the images of that class, and would win against a start that is not robust."""
    from robustify import train as loop

    found = iter([(0.9, 0.0, "probe", 4), (0.3, 0.3, "probe", 1), (0.8, 0.1, "probe", 4)])
    monkeypatch.setattr(loop, "accuracies", lambda *_: Accuracies(*next(found)))
    outcome, events = run(setup_for(PgdAt(steps=1), init=init), tmp_path)
    assert [e.best for e in events if isinstance(e, EpochEnd)] == [False, init == "reinit", True]
    assert (outcome.best_epoch, outcome.best) == (2, 0.1)
    assert any("epoch 1 is right on images of one class only" in str(e) for e in events) == (init == "loaded")


def test_of_how_many_classes_the_right_images_are(tmp_path):
    setup = setup_for(PgdAt(steps=1))
    x, _ = toy_data(64)
    setup.model.eval()
    with torch.no_grad():
        setup.model.net[6].bias.sub_(setup.model(x).mean(0))  # else it calls nearly all of them the same
        said = setup.model(x).argmax(1)
    held = from_tensors((x, said), (x, said), (x, said)).val
    assert accuracies(setup, held, 16).classes == len(said.unique())
    with torch.no_grad():
        setup.model.net[6].bias[1] += 100
    found = accuracies(setup, held, 16)
    assert (found.classes, found.constant, found.score(PgdAt())) == (1, True, 0.0)
    assert found.robust == found.clean == float((said == 1).double().mean())


def test_a_start_whose_weights_were_drawn_anew_is_no_candidate(tmp_path, monkeypatch):
    from robustify import train as loop

    scores = iter([0.3, 0.2, 0.25])
    monkeypatch.setattr(loop, "accuracies", lambda *_: Accuracies(0.9, next(scores), "probe", 4))
    outcome, _ = run(setup_for(FastAt(), init="reinit"), tmp_path)
    assert outcome.best_epoch == 2


@pytest.mark.parametrize(
    ("score", "best", "n", "fell"),
    [
        (0.29, 0.5, 512, True),  # by more than 0.2
        (0.31, 0.5, 512, False),
        (0.04, 0.10, 512, True),  # to less than half of a low best
        (0.06, 0.10, 512, False),
        (0.02, 0.06, 64, False),  # more than half, but within three standard errors (9 points) of so few images
        (0.0, 0.0, 512, False),
        (0.6, 0.5, 512, False),
    ],
)
def test_what_counts_as_a_fall(score, best, n, fell):
    assert has_fallen(score, best, 0.2, n) == fell


@pytest.mark.parametrize(
    ("method", "wanted", "ladder"),
    [
        (FastAt(), None, ["n-fgsm", "pgd-2", "stop"]),
        (FastAt(), "smaller-alpha", ["smaller-alpha", "n-fgsm", "pgd-2", "stop"]),
        (FastAt(noise="n-fgsm"), None, ["pgd-2", "stop"]),
        (FastAt(), "stop", ["stop"]),
        (Gaat(), None, ["pgd-2", "stop"]),
        (FreeAt(), None, ["stop"]),
        (PgdAt(), "pgd-2", ["stop"]),
    ],
)
def test_remedies_come_in_turn(method, wanted, ladder):
    taken = []
    while not taken or taken[-1] != "stop":
        taken.append(next_remedy(method, wanted, taken))
    assert taken == ladder


def test_what_the_remedies_make_of_a_method():
    assert remedied(FastAt(), ["smaller-alpha"]) == FastAt(alpha=0.625)
    assert remedied(FastAt(grad_align=1.0), ["smaller-alpha", "n-fgsm"]) == FastAt(noise="n-fgsm", grad_align=1.0)
    assert remedied(Gaat(), ["pgd-2"]) == PgdAt(steps=2, step_ratio=1)
    assert remedied(FastAt(), []) == FastAt()


def collapsing(monkeypatch, scores, aligned=None):
    """The probe finds these scores; the gradients are aligned as given, or the less the lower the score."""
    from robustify import train as loop

    last = [0.0]

    def probe(*_):
        last[0] = next(scores)
        return Accuracies(0.9, last[0], "probe", 4)

    monkeypatch.setattr(loop, "accuracies", probe)
    monkeypatch.setattr(loop, "alignment", lambda *_: last[0] if aligned is None else aligned)


def test_after_a_collapse_training_goes_on_from_the_best_weights_with_the_remedy(tmp_path, monkeypatch):
    """Roll-back, remedy and a second, stronger remedy; a run killed after the first one continues bit for bit."""
    scores = [0.1, 0.5, 0.2, 0.5, 0.1, 0.5, 0.6]
    kwargs = {"epochs": 6, "momentum": 0.9, "ema": 0.9}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    collapsing(monkeypatch, iter(scores))
    whole = setup_for(FastAt(), **kwargs)
    outcome, events = run(whole, tmp_path / "a")
    collapses = [(e.epoch, e.best_epoch, e.overfitted, e.remedy) for e in events if isinstance(e, Collapsed)]
    assert collapses == [(2, 1, True, "n-fgsm"), (4, 1, True, "pgd-2")]
    assert (outcome.remedies, outcome.collapsed, outcome.best_epoch) == (("n-fgsm", "pgd-2"), False, 6)
    assert whole.method == PgdAt(steps=2, step_ratio=1)
    collapsing(monkeypatch, iter(scores))
    stopped = train(setup_for(FastAt(), **kwargs), data(), tmp_path / "b")
    kept = None
    for event in stopped:
        if isinstance(event, EpochEnd) and event.epoch == 1:
            kept = (tmp_path / "b" / "best.safetensors").read_bytes()
        if isinstance(event, StepEnd) and event.step == 7:
            break
    stopped.close()
    assert (tmp_path / "b" / "best.safetensors").read_bytes() == kept
    (checkpoint,) = (tmp_path / "b" / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000006.pt"  # the end of the second epoch, rolled back
    collapsing(monkeypatch, iter(scores[3:]))
    continued = setup_for(FastAt(), **kwargs)
    again, _ = run(continued, tmp_path / "b", resume=checkpoint)
    assert again.remedies == outcome.remedies
    for a, b in zip(whole.model.state_dict().values(), continued.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", [FastAt(), PgdAt(steps=1)])
def test_a_dip_is_not_a_collapse_until_it_stays(method, tmp_path, monkeypatch):
    """The gradients stay aligned: no overfitting, so the next epoch decides."""
    collapsing(monkeypatch, iter([0.1, 0.6, 0.3, 0.5, 0.3, 0.2, 0.6]), aligned=0.9)
    _, events = run(setup_for(method, epochs=6), tmp_path)
    remedy = "n-fgsm" if method.name == "fast-at" else "stop"
    assert [(e.epoch, e.overfitted, e.remedy) for e in events if isinstance(e, Collapsed)] == [(5, False, remedy)]


def test_an_attack_is_blind_when_the_alignment_has_halved():
    assert [is_blind(a, 0.8) for a in (0.39, 0.41, None)] == [True, False, False]
    assert not is_blind(0.1, 0.0)  # no epoch to compare with


def test_a_collapsed_epoch_is_not_kept_even_where_the_last_one_is(tmp_path, monkeypatch):
    collapsing(monkeypatch, iter([0.1, 0.5, 0.45, 0.1, 0.0, 0.5]))
    outcome, events = run(setup_for(FastAt(), epochs=4, keep="last"), tmp_path)
    collapses = [(e.epoch, e.best_epoch) for e in events if isinstance(e, Collapsed)]
    assert collapses == [(3, 2), (4, 2)]
    assert (outcome.best, outcome.best_epoch) == (0.45, 2)


def test_a_last_epoch_that_dips_is_not_kept_and_that_is_said(tmp_path, monkeypatch):
    collapsing(monkeypatch, iter([0.1, 0.6, 0.7, 0.3]), aligned=0.9)
    outcome, events = run(setup_for(FastAt(), epochs=3, keep="last"), tmp_path)
    assert (outcome.best_epoch, outcome.collapsed) == (2, False)
    assert "the weights of epoch 2 are kept" in [e.text for e in events if isinstance(e, Note)][-1]


def test_rolled_back_weights_are_the_best_ones_and_the_momentum_is_gone(tmp_path, monkeypatch):
    collapsing(monkeypatch, iter([0.1, 0.5, 0.2]))
    setup = setup_for(FastAt(), epochs=2, momentum=0.9)
    run(setup, tmp_path)
    assert not setup.optimizer.optimizer.state
    assert torch.equal(setup.model.net[0].weight, load_file(str(tmp_path / "best.safetensors"))["0.weight"])


@pytest.mark.parametrize("schedule", ["accelat", "plateau", "one-cycle"])
def test_a_run_with_a_schedule_that_follows_the_score_continues_bit_for_bit(schedule, tmp_path, monkeypatch):
    scores = [0.4] * 20
    kwargs = {"epochs": 10, "schedule": schedule, "accelat": {"window": 2, "cooldown": 1}}
    rates = []
    for name, stop_at in (("a", None), ("b", 17)):
        (tmp_path / name).mkdir()
        collapsing(monkeypatch, iter(scores))
        events = train(setup_for(FastAt(), **kwargs), data(), tmp_path / name)
        for event in events:
            if isinstance(event, StepEnd) and event.step == stop_at:
                break
        events.close()
    (checkpoint,) = (tmp_path / "b" / "checkpoints").iterdir()
    collapsing(monkeypatch, iter(scores))
    run(setup_for(FastAt(), **kwargs), tmp_path / "b", resume=checkpoint)
    for name in ("a", "b"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        rates.append([line["lr"] for line in lines if "lr" in line])
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    assert len(rates[0]) == 30


def test_without_held_out_images_nothing_is_measured():
    from dataclasses import replace

    from robustify.pipeline import harden

    whole, said = data(), []
    empty = replace(whole, val=subset(whole.val, []))
    with pytest.raises(UserError, match=r"(?s)schedule accelat follows.*data\.val_fraction"):
        harden(tiny_net(), empty, method="fast-at", schedule="accelat", batch_size=32, verify=False, listener=said.append)
    assert said == []


def test_the_alignment_of_gradients_is_logged_for_one_step_methods_only(tmp_path):
    for method, logged in ((FastAt(), True), (PgdAt(steps=1), False)):
        (tmp_path / method.name).mkdir()
        _, events = run(setup_for(method, epochs=1), tmp_path / method.name)
        assert ("gradient_alignment" in events[-1].extra) == logged
