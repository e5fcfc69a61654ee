"""Plans: when each unit becomes final, and which networks are refused."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from random_plans import bound, grouped_plan, inputs_of, made_plan, masks_of, named_plans, plans
from torch import Tensor

from flowkernels import Plan, available_backends, testing, use_backend
from flowkernels.ops import maf_inverse

PLANS = named_plans()


def reachable(plan: Plan) -> list[Tensor]:
    """For every layer (units, features): which features reach a unit, one path at a time."""
    found = []
    sets: list[list[set[int]]] = [[{i} for i in range(plan.features)]]
    for layer, mask in enumerate(plan.masks):
        now: list[set[int]] = []
        for row in mask.tolist():
            seen: set[int] = set()
            for column, there in enumerate(row):
                if there:
                    seen |= sets[-1][column]
            now.append(seen)
        if layer < len(plan.residual) and plan.residual[layer] is not None:
            now = [a | b for a, b in zip(now, sets[plan.residual[layer] + 1], strict=True)]
        sets.append(now)
        found.append(torch.tensor([[i in s for i in range(plan.features)] for s in now]).reshape(len(now), -1))
    return found


def check_times(plan: Plan) -> None:
    """Every unit's time is the step after the last feature that it sees, and a feature's step is as early as can be."""
    reach = reachable(plan)
    per = len(plan.parameters)
    for times, sees in zip(plan.times, reach[:-1], strict=True):
        expected = [max((int(plan.step[i]) + 1 for i in row.nonzero()), default=0) for row in sees]
        assert times.tolist() == expected
    rows = (
        reach[-1].reshape(plan.features, per, -1)
        if plan.layout == "interleaved"
        else (reach[-1].reshape(per, plan.features, -1).transpose(0, 1))
    )
    needs = rows.any(1)
    for feature in range(plan.features):
        before = [int(plan.step[i]) + 1 for i in needs[feature].nonzero()]
        assert int(plan.step[feature]) == max(before, default=0)
    assert plan.steps == int(plan.step.max()) + 1


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_times(plan: Plan) -> None:
    check_times(plan)


@given(plans(most_features=10, most_units=12))
def test_times_of_any_plan(plan: Plan) -> None:
    check_times(plan)


def test_orders_give_their_steps() -> None:
    assert made_plan(5, (8, 8)).step.tolist() == [0, 1, 2, 3, 4]
    assert made_plan(5, (8, 8), order="reversed").step.tolist() == [4, 3, 2, 1, 0]
    # The features in the order in which they are generated.
    assert made_plan(5, (8, 8), order=[3, 0, 4, 1, 2]).step.tolist() == [1, 3, 4, 0, 2]
    assert sorted(made_plan(6, (8,), order="random").step.tolist()) == list(range(6))


def test_times_are_the_degrees_of_a_wide_network() -> None:
    plan = made_plan(4, (6, 6))
    assert [t.tolist() for t in plan.times] == [[1, 2, 3, 1, 2, 3]] * 2
    assert plan.steps == 4


def test_a_narrow_network_needs_fewer_steps() -> None:
    # One unit of degree 1: every feature after the first sees x_1 only.
    plan = made_plan(4, (1,))
    assert plan.step.tolist() == [0, 1, 1, 1]
    # Units of degree 2 and 3 in the second layer that only unit 1 of the first feeds are final at time 1.
    plan = made_plan(4, (1, 3))
    assert plan.times[1].tolist() == [1, 1, 1]


def test_several_features_in_one_step() -> None:
    plan = grouped_plan([1, 1, 2, 0, 2, 1], [[0, 1, 1, 0, 2], [1, 0, 1]])
    assert plan.steps == 3
    assert plan.step.tolist() == [1, 1, 2, 0, 2, 1]
    assert grouped_plan([0, 0, 0], [[0, 0]]).steps == 1


def test_units_that_see_nothing_are_final_at_once() -> None:
    plan = made_plan(3, (4,), degrees=[[0, 0, 1, 2]])
    assert plan.times[0].tolist() == [0, 0, 1, 2]


def test_no_hidden_layers_and_one_feature() -> None:
    plan = made_plan(3, ())
    assert plan.times == []
    assert plan.step.tolist() == [0, 1, 2]
    for single in (made_plan(1, (4, 3)), made_plan(1, ())):
        assert single.steps == 1
        assert single.features == 1


def test_a_residual_connection_counts() -> None:
    # Layer 2's own weights see nothing, what it gets comes through the connection from layer 0.
    first = torch.tensor([[1, 0], [0, 0]])
    nothing = torch.zeros(2, 2)
    out = torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1]])
    plan = Plan([first, nothing, nothing, out], residual=[None, None, 0])
    assert plan.times[2].tolist() == [1, 0]
    assert plan.step.tolist() == [0, 1]
    plan = Plan([first, nothing, nothing, out])
    assert plan.step.tolist() == [0, 0]


def test_context_has_no_time() -> None:
    with_context, without = made_plan(4, (6, 6), context_features=2), made_plan(4, (6, 6))
    assert with_context.step.tolist() == without.step.tolist()
    assert with_context.context_width == 6
    assert without.context_width == 0


# ---- networks that are refused -----------------------------------------------------------------


def direct(needs: list[list[int]]) -> list[Tensor]:
    """One layer whose output i depends on the inputs where row i has ones."""
    return [torch.tensor(needs).repeat_interleave(2, 0)]


@pytest.mark.parametrize(
    ("message", "masks"),
    [
        ("output 1 depends on input 1$", direct([[0, 0], [1, 1]])),
        (
            r"output (0 depends on input 1, and output 1 on input 0|1 depends on input 0, and output 0 on input 1)",
            direct([[0, 1, 0], [1, 0, 0], [1, 1, 0]]),
        ),
        # 0 <- 1 <- 2 <- 0, and 3, which is on no cycle itself, waits for 0.
        (
            r"output (0 depends on input 1|1 depends on input 2|2 depends on input 0), and output",
            direct([[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]]),
        ),
        # The output mask of a MADE must be strict.
        ("output 0 depends on input 0$", [torch.ones(4, 3).tril(), torch.ones(6, 4).tril()]),
    ],
    ids=["itself", "two", "three", "not_strict"],
)
def test_networks_that_are_not_autoregressive(message: str, masks: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"masks are not autoregressive: " + message):
        Plan(masks)


@pytest.mark.parametrize("length", [2, 3, 5, 8])
def test_the_named_pair_lies_on_a_cycle(length: int) -> None:
    features = 10
    order = torch.randperm(features, generator=torch.Generator().manual_seed(length)).tolist()
    needs = torch.zeros(features, features)
    for here, after in zip(order[1:], order[:-1], strict=True):
        needs[here, after] = 1
    needs[order[0], order[length - 1]] = 1
    with pytest.raises(ValueError, match="not autoregressive") as caught:
        Plan([needs.repeat_interleave(2, 0)])
    words = str(caught.value).replace(",", " ").split()
    output, inp = int(words[words.index("output") + 1]), int(words[words.index("input") + 1])
    assert needs[output, inp] == 1
    assert output in order[:length]
    assert inp in order[:length]


def test_a_cycle_through_a_residual_connection() -> None:
    first, zero = torch.tensor([[0, 1], [0, 0]]), torch.zeros(2, 2)
    out = torch.tensor([[1, 0], [1, 0], [0, 0], [0, 0]])
    Plan([first, zero, zero, out])
    Plan([first, zero, zero, out], residual=[None, None, 0])
    with pytest.raises(ValueError, match="output 1 depends on input 1"):
        Plan([first, zero, zero, out.flip(0)], residual=[None, None, 0])


MASKS = masks_of([torch.tensor([1, 2]), torch.tensor([1, 1, 1])])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"masks must hold at least the output layer's mask, got none", lambda: Plan([])),
        (ValueError, r"masks\[0\] must have 2 dimensions \(out, in\), got 1", lambda: Plan([torch.ones(3)])),
        (
            ValueError,
            r"masks\[1\] must have 3 columns, the rows of masks\[0\], got 4",
            lambda: Plan([MASKS[0], torch.ones(4, 4)]),
        ),
        (
            ValueError,
            r"masks\[0\] must have at least one column, the features, got 0",
            lambda: Plan([torch.ones(2, 0)]),
        ),
        (
            ValueError,
            r"masks\[1\] must have 4 rows \(2 parameters of 2 features\), got 2",
            lambda: Plan([MASKS[0], MASKS[1][:2]]),
        ),
        (ValueError, r"masks\[1\] must have 6 rows \(3 parameters", lambda: Plan(MASKS, parameters=("a", "b", "c"))),
        (ValueError, r"layout must be interleaved or blocked, got 'rows'", lambda: Plan(MASKS, layout="rows")),
        (
            ValueError,
            r"activation must name 1 activations, one per hidden layer, got 2",
            lambda: Plan(MASKS, activation=("relu", "relu")),
        ),
        (
            ValueError,
            r"activation must be one of identity, relu, .*got 'swish'",
            lambda: Plan(MASKS, activation="swish"),
        ),
        (
            ValueError,
            r"residual must have 1 entries, one per hidden layer, got 2",
            lambda: Plan(MASKS, residual=[None, 0]),
        ),
        (ValueError, r"residual\[0\] must name an earlier hidden layer, got 0", lambda: Plan(MASKS, residual=[0])),
        (ValueError, r"residual\[0\] must name an earlier hidden layer, got -1", lambda: Plan(MASKS, residual=[-1])),
        (
            ValueError,
            r"residual\[1\] adds layer 0 of width 3 to one of width 2",
            lambda: Plan([MASKS[0], torch.zeros(2, 3), torch.zeros(4, 2)], residual=[None, 0]),
        ),
        (
            ValueError,
            r"residual\[2\]: layer 0 is already added",
            lambda: Plan([MASKS[0], *[torch.zeros(3, 3)] * 2, MASKS[1]], residual=[None, 0, 0]),
        ),
        (ValueError, r"context must name layers 0 to 1, got 2", lambda: Plan(MASKS, context=(2,))),
        (ValueError, r"context must name layers 0 to 1, got -1", lambda: Plan(MASKS, context=(-1,))),
        (ValueError, r"context names layer 0 twice", lambda: Plan(MASKS, context=(0, 0))),
        (TypeError, r"masks\[0\] must be a torch\.Tensor, got list", lambda: Plan([[[1.0]]])),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- plans as objects --------------------------------------------------------------------------


def test_masks_of_any_dtype_are_read_by_what_is_not_zero() -> None:
    for dtype in (torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool):
        plan = Plan([(m * 3).to(dtype) for m in MASKS])
        assert all(torch.equal(a, b) for a, b in zip(plan.masks, MASKS, strict=True))
    assert torch.equal(Plan([-0.5 * m.float() for m in MASKS]).masks[0], MASKS[0])


def test_masks_are_copied() -> None:
    masks = [m.clone() for m in MASKS]
    plan = Plan(masks)
    masks[0].zero_()
    assert plan.masks[0].any()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_pickle_and_deepcopy(plan: Plan) -> None:
    given_inputs = inputs_of(plan, 3)
    x, context, *parameters = given_inputs
    expected = maf_inverse(x, plan, parameters, context=context)
    saved = io.BytesIO()
    torch.save(plan, saved)
    saved.seek(0)
    for again in (
        pickle.loads(pickle.dumps(plan)),
        copy.deepcopy(plan),
        copy.copy(plan),
        torch.load(saved, weights_only=False),
    ):
        assert again is not plan
        assert again.steps == plan.steps
        assert torch.equal(again.step, plan.step)
        assert repr(again) == repr(plan)
        testing.assert_same_bits(maf_inverse(x, again, parameters, context=context), expected)


def test_a_pickled_plan_carries_no_weights() -> None:
    plan = made_plan(5, (300, 300))
    before = len(pickle.dumps(plan))
    x, context, *parameters = inputs_of(plan, 2)
    maf_inverse(x, plan, parameters, context=context)
    assert len(pickle.dumps(plan)) == before


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_between_permutations(plan: Plan, inverse: bool, backend: str) -> None:
    """A plan on an order does what permuting before it and back after it does."""
    if backend not in available_backends():
        pytest.skip("needs the compiled library")
    order = torch.randperm(plan.features, generator=torch.Generator().manual_seed(1))
    leaves = [None if t is None else t.requires_grad_() for t in inputs_of(plan, 20)]
    x, *others = leaves
    assert x is not None
    wanted = [t for t in leaves if t is not None]

    def with_gradients(y: Tensor, logdet: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(y.square().sum() + logdet.sum(), wanted, allow_unused=True)
        return [y, logdet, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True))]

    with use_backend(backend):
        y, logdet = bound(plan, inverse=inverse)(x[:, order], *others)
        expected = with_gradients(y[:, order.argsort()], logdet)
        placed = plan.on(order)
        for again in (placed, pickle.loads(pickle.dumps(placed)), copy.deepcopy(placed)):
            torch.testing.assert_close(with_gradients(*bound(again, inverse=inverse)(x, *others)), expected)


def test_repr_tells_the_sizes() -> None:
    assert repr(made_plan(4, (6, 5))) == "Plan(features=4, hidden=(6, 5), steps=4)"
