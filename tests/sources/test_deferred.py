"""First weights that wait: dropped when a file's take their place, and otherwise as if they had never waited."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from robustify import sources
from robustify.errors import UserError
from robustify.sources.deferred import deferred_init

# with networks that run themselves while they are built, that compute buffers and that keep values outside of their state
ODD = ("coat_tiny", "eva02_tiny_patch14_224", "levit_128s", "resnet10t", "maxvit_rmlp_pico_rw_256", "swin_s3_tiny_224",
       "vit_tiny_r_s16_p8_224", "nf_resnet26", "xcit_nano_12_p16_224")  # fmt: skip


def values(net: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a network holds, in its state dict or not."""
    every = dict(net.named_parameters()) | dict(net.named_buffers())
    for name, module in net.named_modules():
        every |= {f"{name}.{key}": value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
    return every


@pytest.mark.parametrize("arch", ODD)
def test_a_network_with_a_files_weights_is_the_one_built_the_long_way(arch):
    torch.manual_seed(1)
    published = timm.create_model(arch)
    torch.manual_seed(2)
    plain = timm.create_model(arch)
    plain.load_state_dict(published.state_dict())
    torch.manual_seed(2)
    with deferred_init():
        quick = timm.create_model(arch)
        quick.load_state_dict(published.state_dict())
    found = values(quick)
    assert found.keys() == values(plain).keys()
    for name, value in values(plain).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


def test_nothing_is_drawn_for_weights_that_a_file_replaces(tmp_path):
    net = timm.create_model("resnet10t", num_classes=7)
    small = sum(w.numel() for w in net.parameters() if w.numel() < 10_000)
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    drawn = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.normal_, torch.ops.aten.uniform_):
                drawn.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with Counting():
        loaded = sources.load(f"{tmp_path / 'weights.safetensors'}:arch=resnet10t")
    assert sum(drawn) <= 2 * small  # once by torch, once by timm
    state = loaded.model.net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_what_nobody_overwrites_is_drawn():
    with deferred_init():
        layer = nn.Linear(300, 200)
        timm.layers.trunc_normal_(layer.weight, mean=1.0, std=0.5)
        other = nn.Linear(300, 200)
        other.weight.data.normal_(3.0, 0.1)
    assert 0.95 < layer.weight.mean() < 1.05
    assert 0.4 < layer.weight.std() < 0.6
    assert 2.95 < other.weight.mean() < 3.05
    assert layer.weight.requires_grad


def test_what_is_read_is_drawn_first():
    with deferred_init():
        weight = nn.Parameter(torch.empty(200, 300))
        nn.init.normal_(weight, std=2.0)
        spread = weight.std()
        before = weight.detach().clone()
    assert 1.9 < spread < 2.1
    assert torch.equal(weight, before)  # and not once more at the end


def test_parts_aliases_and_new_data():
    with deferred_init():
        part, whole, moved = (nn.Linear(300, 200).weight for _ in range(3))
        kept = part.detach()
        with torch.no_grad():
            part[:100].zero_()
            whole.detach().copy_(torch.ones(200, 300))
            whole.mul_(3)
        moved.data = torch.full((200, 300), 5.0)
        torch.nn.utils.parametrizations.weight_norm(norm := nn.Linear(300, 200))
    assert not part[:100].any()
    assert 0.02 < part[100:].std() < 0.05
    assert torch.equal(kept, part)
    assert (whole == 3).all()
    assert (moved == 5).all()
    assert 0.02 < norm.weight.std() < 0.05


def test_a_file_without_all_weights_is_refused_and_a_new_classifier_is_random(tmp_path):
    net = timm.create_model("resnet10t", num_classes=20)
    save_file(net.state_dict(), tmp_path / "whole.safetensors")
    state = net.state_dict()
    del state["layer4.0.conv2.weight"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="1 tensors are missing"):
        sources.load(f"{tmp_path / 'part.safetensors'}:arch=resnet10t")
    torch.manual_seed(3)
    new = sources.load(f"{tmp_path / 'whole.safetensors'}:arch=resnet10t", num_classes=50).model.net.fc.weight
    torch.manual_seed(3)
    again = sources.load(f"{tmp_path / 'whole.safetensors'}:arch=resnet10t", num_classes=50).model.net.fc.weight
    assert torch.equal(new, again)
    assert 0.005 < new.std() < 0.06
    assert (new != 0).float().mean() > 0.99
