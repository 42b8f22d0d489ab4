"""torch.compile: one graph for images of any size, and the numbers stay."""

import pytest
import torch

from tests.cases import Case, pick_cases

EXACT = {"rtol": 1e-11, "atol": 1e-11}
TRAINING = pick_cases(
    "plain",
    "ghost2",
    "renorm",
    "train_by_population",
    "domains-one",
    "domains-mixed",
    "levels-row1",
    "levels-row5",
)
TRAINING += [pytest.param(*case.values, id=case.id, marks=pytest.mark.slow) for case in pick_cases("pairs")]
EVALUATION = pick_cases("plain", "domains-mixed", "levels-row2")


def grow(x, step):
    """A larger image in every step; never a single position, at which statistics have to be looked at."""
    return x.repeat(1, 1, step + 1, step + 2)


def run_steps(case, norm, owner):
    """`norm` may be compiled; `owner` is the module whose state it uses."""
    results = []
    for step in range(2):
        inputs = {name: grow(x, step).requires_grad_() for name, x in case.inputs(step).items()}
        outputs = case.call(norm, inputs)
        owner.zero_grad()
        sum(output.pow(3).sum() for output in outputs.values()).backward()
        gradients = [x.grad for x in inputs.values()] + [p.grad for p in case.used_parameters(owner)]
        results.append((list(outputs.values()), gradients))
    return results, dict(owner.state_dict())


def check(case: Case, training):
    torch._dynamo.reset()
    eager, owner = case.build().train(training), case.build().train(training)
    compiled = torch.compile(owner, dynamic=True, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run_steps(case, compiled, owner), run_steps(case, eager, eager), **EXACT)


@pytest.mark.parametrize("case", TRAINING)
def test_training_in_one_graph(case):
    check(case, training=True)


@pytest.mark.parametrize("case", EVALUATION)
def test_evaluation_in_one_graph(case):
    check(case, training=False)


@pytest.mark.parametrize("case", pick_cases("levels-row1", "levels-row5"))
def test_a_fixed_size_in_one_graph(case):
    torch._dynamo.reset()
    eager, owner = case.build().train(), case.build().train()
    compiled = torch.compile(owner, fullgraph=True, backend="aot_eager")
    outputs, expected = case.call(compiled, case.inputs()), case.call(eager, case.inputs())
    torch.testing.assert_close(outputs, expected, **EXACT)
