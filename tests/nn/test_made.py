"""MADE: masks as the peers build them, and an output that sees earlier features only."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowkernels import testing
from flowkernels.nn import MADE, MaskedLinear
from flowkernels.nn.made import input_degrees


def masks_of(made: MADE) -> list[Tensor]:
    return [layer.mask() for layer in made.layers]


def sees(made: MADE) -> Tensor:
    """(D, D) whether any parameter of output i moves with input j, by autograd, at a few points."""
    made = copy.deepcopy(made).double()
    found = torch.zeros(made.features, made.features, dtype=torch.bool)
    for seed in range(3):
        x = testing.random_tensor((made.features,), torch.float64, seed=seed, spread=2.0)
        context = None
        if made.context_features:
            context = testing.random_tensor((1, made.context_features), torch.float64, seed=9)
        jacobian = torch.autograd.functional.jacobian(lambda t, c=context: made(t[None], c)[0], x)
        found |= (jacobian != 0).any(1)
    return found


KINDS: dict[str, dict[str, Any]] = {
    "natural": {},
    "reversed": {"order": "reversed"},
    "random_order": {"order": "random"},
    "given_order": {"order": [2, 4, 0, 1, 3]},
    "random_degrees": {"degrees": "random"},
    "residual": {"residual": True},
    "residual_random": {"residual": True, "order": "random", "degrees": "random"},
    "context": {"context_features": 3},
    "context_residual": {"context_features": 3, "residual": True, "degrees": "random"},
    "three_parameters": {"params_per_feature": 3},
    "one_parameter": {"params_per_feature": 1, "activation": "silu"},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@every_kind
def test_outputs_see_earlier_features_only(options: dict[str, Any]) -> None:
    made = MADE(5, (40, 40), **{"activation": "tanh", **options})
    place = made.in_degrees
    earlier = place[None, :] < place[:, None]
    found = sees(made)
    assert not (found & ~earlier).any()
    if options.get("degrees") != "random":  # enough units of every degree: everything earlier is seen
        assert torch.equal(found, earlier)


@settings(max_examples=40)
@given(st.data())
def test_any_made_is_autoregressive(data: st.DataObject) -> None:
    features = data.draw(st.integers(1, 7))
    residual = data.draw(st.booleans())
    width = st.integers(1, 12)
    hidden = (
        data.draw(st.lists(width, max_size=3)) if not residual else [data.draw(width)] * data.draw(st.integers(1, 2))
    )
    torch.manual_seed(data.draw(st.integers(0, 99)))
    made = MADE(
        features,
        hidden,
        context_features=data.draw(st.integers(0, 2)),
        params_per_feature=data.draw(st.integers(1, 3)),
        order=data.draw(st.sampled_from(["natural", "reversed", "random"])),
        degrees=data.draw(st.sampled_from(["sequential", "random"])),
        residual=residual,
        activation="tanh",
    )
    place = made.in_degrees
    assert not (sees(made) & (place[None, :] >= place[:, None])).any()
    # The plan knows of every dependence, and of the order.
    for later, earlier in sees(made).nonzero().tolist():
        assert made.plan.step[earlier] < made.plan.step[later]


def test_sequential_degrees() -> None:
    made = MADE(4, (7, 2))
    assert made.in_degrees.tolist() == [1, 2, 3, 4]
    assert made.layers[0].out_degrees.tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert made.layers[1].out_degrees.tolist() == [1, 2]
    assert made.layers[2].out_degrees.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    # With a context a unit of degree 0 carries it to the first feature.
    assert MADE(4, (7,), context_features=1).layers[0].out_degrees.tolist() == [0, 1, 2, 3, 0, 1, 2]


def test_the_first_feature_sees_the_context() -> None:
    made = MADE(3, (9,), context_features=2, activation="tanh").double()
    x, context = testing.random_tensor((1, 3), torch.float64), testing.random_tensor((1, 2), torch.float64)
    moved = torch.autograd.functional.jacobian(lambda c: made(x, c)[0], context)
    assert (moved != 0).flatten(2).any(-1).all()


def test_input_degrees() -> None:
    assert input_degrees(3, "natural").tolist() == [1, 2, 3]
    assert input_degrees(3, "reversed").tolist() == [3, 2, 1]
    assert sorted(input_degrees(9, "random").tolist()) == list(range(1, 10))
    # Features in the order in which they are generated: 2 first, then 0, then 1.
    assert input_degrees(3, [2, 0, 1]).tolist() == [2, 3, 1]
    assert input_degrees(3, torch.tensor([2, 0, 1])).tolist() == [2, 3, 1]


def test_random_degrees_let_every_unit_see_something() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        made = MADE(6, (30, 30, 30), degrees="random")
        for mask in masks_of(made)[:-1]:
            assert mask.any(1).all()


# ---- the peers ---------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("features", [1, 2, 5, 8])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_masks_of_nflows(features: int, blocks: int) -> None:
    peer_made = pytest.importorskip("nflows.transforms.made")
    peer = peer_made.MADE(
        features, 12, num_blocks=blocks, output_multiplier=2, use_residual_blocks=False, random_mask=False
    )
    theirs = [peer.initial_layer.mask, *(block.linear.mask for block in peer.blocks), peer.final_layer.mask]
    ours = masks_of(MADE(features, (12,) * (blocks + 1)))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b.bool())


@pytest.mark.peers
@pytest.mark.parametrize("features", [1, 2, 5, 8])
def test_masks_of_residual_nflows(features: int) -> None:
    peer_made = pytest.importorskip("nflows.transforms.made")
    peer = peer_made.MADE(features, 12, num_blocks=2, output_multiplier=2, use_residual_blocks=True)
    blocks = [layer.mask for block in peer.blocks for layer in block.linear_layers]
    theirs = [peer.initial_layer.mask, *blocks, peer.final_layer.mask]
    made = MADE(features, (12, 12), residual=True)
    for a, b in zip(masks_of(made), theirs, strict=True):
        assert torch.equal(a, b.bool())
    # Same weights, same outputs.
    with torch.no_grad():
        layers = [peer.initial_layer, *(layer for block in peer.blocks for layer in block.linear_layers)]
        for ours, layer in zip(made.layers, [*layers, peer.final_layer], strict=True):
            ours.weight.copy_(layer.weight)
            ours.bias.copy_(layer.bias)
    x = testing.random_tensor((7, features))
    torch.testing.assert_close(made(x).reshape(7, -1), peer(x))


@pytest.mark.peers
@pytest.mark.parametrize("features", [2, 5])
def test_masks_of_normflows(features: int) -> None:
    peer_made = pytest.importorskip("normflows.nets.made")
    peer = peer_made.MADE(features, 12, num_blocks=2, output_multiplier=2, use_residual_blocks=False)
    theirs = [peer.initial_layer.mask, *(block.linear.mask for block in peer.blocks), peer.final_layer.mask]
    for a, b in zip(masks_of(MADE(features, (12,) * 3)), theirs, strict=True):
        assert torch.equal(a, b.bool())


# ---- the layer as a module ---------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("rows", [0, 1, 6])
def test_shapes(options: dict[str, Any], rows: int) -> None:
    made = MADE(5, (8, 8), **options)
    context = torch.zeros(rows, made.context_features) if made.context_features else None
    assert made(torch.zeros(rows, 5), context).shape == (rows, 5, made.params_per_feature)


def test_one_feature_and_no_hidden_layer(backend: str) -> None:
    for hidden in ((), (3,), (3, 4)):
        made = MADE(1, hidden)
        out = made(torch.randn(6, 1))
        assert out.shape == (6, 1, 2)
        assert torch.equal(out[0], out[5])  # nothing comes before the only feature
        assert MADE(4, hidden)(torch.randn(6, 4)).shape == (6, 4, 2)
    assert MADE(1, (4,), context_features=2)(torch.randn(6, 1), torch.randn(6, 2)).std(0).min() > 0
    assert MADE(3, (), context_features=2)(torch.zeros(6, 3), torch.randn(6, 2)).std(0).min() > 0


@every_kind
def test_state_dict_brings_order_and_degrees(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    one = MADE(5, (8, 8), **options)
    torch.manual_seed(2)
    other = MADE(5, (8, 8), **options)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.plan.step, one.plan.step)
    assert all(torch.equal(a, b) for a, b in zip(other.plan.masks, one.plan.masks, strict=True))
    x = testing.random_tensor((4, 5))
    context = testing.random_tensor((4, 3)) if one.context_features else None
    testing.assert_same_bits(one(x, context), other(x, context))


@every_kind
def test_built_on_meta_and_loaded(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    one = MADE(5, (8, 8), **options)
    torch.manual_seed(2)
    with torch.device("meta"):
        made = MADE(5, (8, 8), **options)
    own = [*made.parameters(), *made.buffers()]
    assert len(own) == len(one.state_dict())
    assert all(t.is_meta for t in own)
    x = testing.random_tensor((4, 5))
    context = testing.random_tensor((4, 3)) if one.context_features else None
    assigned = copy.deepcopy(made)
    assigned.load_state_dict(one.state_dict(), assign=True)
    made.to_empty(device="cpu").load_state_dict(one.state_dict())
    for again in (made, assigned):
        assert all(torch.equal(a, b) for a, b in zip(again.plan.masks, one.plan.masks, strict=True))
        testing.assert_same_bits(again(x, context), one(x, context))


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta")
def test_what_is_still_on_meta_keeps_its_plan() -> None:
    with torch.device("meta"):
        made = MADE(5, (8, 8))
    plan = made.plan
    made.load_state_dict(MADE(5, (8, 8), order="reversed").state_dict())
    assert made.plan is plan
    assert made.in_degrees.is_meta


@every_kind
def test_pickle_deepcopy_and_torch_save(options: dict[str, Any]) -> None:
    made = MADE(5, (8, 8), **options)
    x = testing.random_tensor((4, 5))
    context = testing.random_tensor((4, 3)) if made.context_features else None
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), torch.load(file, weights_only=False)):
        testing.assert_same_bits(again(x, context), made(x, context))


def test_weights_under_the_mask_get_no_gradient() -> None:
    made = MADE(5, (8, 8))
    made(torch.randn(6, 5)).square().sum().backward()
    for layer in made.layers:
        assert layer.weight.grad[~layer.mask()].count_nonzero() == 0
        assert layer.weight.grad.count_nonzero() > 0


def test_masked_linear_layer(backend: str) -> None:
    ins, outs = torch.tensor([1, 3, 2]), torch.tensor([2, 0, 3, 1])
    layer = MaskedLinear(ins, outs, strict=True, activation="tanh")
    x = torch.randn(2, 5, 3)
    expected = torch.tanh(x @ (layer.weight * layer.mask()).T + layer.bias)
    torch.testing.assert_close(layer(x), expected)
    without = MaskedLinear([1, 2], [2, 1], bias=False)
    assert without.bias is None
    torch.testing.assert_close(without(x[..., :2]), x[..., :2] @ (without.weight * without.mask()).T)
    ins.zero_()
    assert layer.in_degrees.tolist() == [1, 3, 2]


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"features must be an integer >= 1, got 0", lambda: MADE(0)),
        (ValueError, r"features must be an integer >= 1, got 2\.5", lambda: MADE(2.5)),
        (ValueError, r"context_features must be an integer >= 0, got -1", lambda: MADE(3, context_features=-1)),
        (ValueError, r"params_per_feature must be an integer >= 1, got 0", lambda: MADE(3, params_per_feature=0)),
        (ValueError, r"hidden_features must be positive integers, got \(8, 0\)", lambda: MADE(3, (8, 0))),
        (
            ValueError,
            r"hidden_features of a residual network must be equal and at least one, got \(8, 7\)",
            lambda: MADE(3, (8, 7), residual=True),
        ),
        (ValueError, r"hidden_features of a residual network must be .*got \(\)", lambda: MADE(3, (), residual=True)),
        (ValueError, r"activation must be one of .*got 'swish'", lambda: MADE(3, activation="swish")),
        (
            ValueError,
            r"order must be natural, reversed, random or a permutation, got 'up'",
            lambda: MADE(3, order="up"),
        ),
        (ValueError, r"order must be a permutation of 0\.\.2, got \[0, 1, 1\]", lambda: MADE(3, order=[0, 1, 1])),
        (ValueError, r"order must be a permutation of 0\.\.2, got \[1, 2, 3\]", lambda: MADE(3, order=[1, 2, 3])),
        (ValueError, r"order must be a permutation of 0\.\.2, got \[0, 1\]", lambda: MADE(3, order=[0, 1])),
        (
            ValueError,
            r"degrees must be sequential, random or a list of sequences, got 'all'",
            lambda: MADE(3, degrees="all"),
        ),
        (
            ValueError,
            r"degrees must hold a sequence for each hidden layer, got 1",
            lambda: MADE(3, (2, 2), degrees=[[1, 2]]),
        ),
        (ValueError, r"degrees\[1\] must hold 2 integers", lambda: MADE(3, (2, 2), degrees=[[1, 2], [1]])),
        (ValueError, r"degrees\[0\] must hold 2 integers, .*float", lambda: MADE(3, (2,), degrees=[[1.0, 2.0]])),
        (ValueError, r"degrees\[0\] must lie in 0\.\.2, got 1\.\.3", lambda: MADE(3, (2,), degrees=[[1, 3]])),
        (ValueError, r"degrees\[0\] must lie in 0\.\.2, got -1\.\.2", lambda: MADE(3, (2,), degrees=[[-1, 2]])),
        (ValueError, r"x must have shape \(N, 3\), got \(4, 2\)", lambda: MADE(3, (4,))(torch.zeros(4, 2))),
        (ValueError, r"context was given, but", lambda: MADE(3, (4,))(torch.zeros(4, 3), torch.zeros(4, 2))),
        (ValueError, r"context is missing: .*\(N, 2\)", lambda: MADE(3, (4,), context_features=2)(torch.zeros(4, 3))),
        (
            ValueError,
            r"context must have shape \(N, 2\), got \(4, 3\)",
            lambda: MADE(3, (4,), context_features=2)(torch.zeros(4, 3), torch.zeros(4, 3)),
        ),
    ],
)
def test_bad_input(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()
