"""What linears receive is summed over every token they see, and weighs the columns of a weight's error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qat_kernels import fake_quant, quantize
from qatcli.grid import approximation_error, initial_grid
from qatcli.moments import input_moments, weight_errors
from qatcli.packed import QuantizedLinear

KIND = {"bits": 2, "group_size": 8}


class Routed(nn.Module):
    """Two linears of which the second sees only the tokens of even position, as an expert sees those routed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Linear(16, 16)
        self.some = nn.Linear(16, 4)
        self.none = nn.Linear(16, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.some(self.all(hidden)[:, ::2])


@torch.no_grad()
def test_moments_are_means_over_the_tokens_a_linear_sees() -> None:
    block = Routed()
    batches = torch.randn(2, 7, 16), torch.randn(3, 5, 16)
    with input_moments(block, "model.layers.4") as moments:
        for batch in batches:
            block(batch)
    block(torch.randn(1, 9, 16))  # nobody watches any more
    seen = torch.cat([batch.reshape(-1, 16) for batch in batches])
    routed = torch.cat([block.all(batch)[:, ::2].reshape(-1, 16) for batch in batches])
    assert set(moments) == {"model.layers.4.all", "model.layers.4.some"}
    torch.testing.assert_close(moments["model.layers.4.all"], seen.square().mean(0))
    torch.testing.assert_close(moments["model.layers.4.some"], routed.square().mean(0))


def test_a_failed_pass_leaves_no_hooks() -> None:
    block = Routed()
    with pytest.raises(RuntimeError), input_moments(block, "b"):
        block(torch.randn(1, 2, 15))
    assert not block.all._forward_pre_hooks


@torch.no_grad()
def test_errors_are_against_the_weights_of_the_block() -> None:
    block, moment = Routed(), torch.rand(16)
    quantized, expected = {}, {}
    for name, weighted in (("all", moment), ("some", None)):
        weight = block.get_submodule(name).weight
        scale, zero_point = initial_grid(weight, **KIND, zero_points="any", method="minmax")
        codes = quantize(weight, scale, zero_point, **KIND)
        quantized[f"b.{name}"] = QuantizedLinear(codes, scale, zero_point.to(torch.uint8), **KIND)
        rounded = fake_quant(weight, scale, zero_point, **KIND)
        expected[f"b.{name}"] = approximation_error(weight, rounded, moment=weighted)
    found = weight_errors(block, "b", quantized, {"b.all": moment})
    assert found == pytest.approx(expected, rel=1e-4)
    assert all(0.001 < error < 1 for error in found.values())
    block.all.weight.mul_(2)
    assert weight_errors(block, "b", quantized, {"b.all": moment})["b.all"] > 2 * found["b.all"]
