"""torch.compile takes the level norm in one graph, and the numbers stay."""

import pytest
import torch

from bnext.layers import NormSpec
from tests.cases import make_features, make_norm


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("row", [1, 5])
def test_compiled_norm_is_the_eager_one(row, training):
    torch._dynamo.reset()
    spec = NormSpec.from_table5_row(row)
    eager = make_norm(spec).train(training)
    compiled = make_norm(spec).train(training)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for norm in (eager, run):
        features = make_features(requires_grad=True)
        outputs = norm(features)
        sum(output.pow(3).sum() for output in outputs.values()).backward()
        results = [*outputs.values(), *(feature.grad for feature in features.values())]
        if norm is eager:
            expected = results
    torch.testing.assert_close(results, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(compiled.state_dict()), dict(eager.state_dict()), rtol=1e-12, atol=1e-12)
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name).grad, parameter.grad, rtol=1e-12, atol=1e-12)
