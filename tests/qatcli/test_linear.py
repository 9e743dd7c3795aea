"""The two linears: what trains is what is exported, and packed codes compute what the dense weight computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_kernels import tuning
from qatcli.linear import FEW_ROWS, FakeQuantLinear, PackedLinear, replace_modules
from qatcli.packed import QuantizedLinear, module_quant, pack_linear

ROWS, COLUMNS = 33, 96  # an odd number of rows: the last word of zero points is not full


def fake_quant_linear(bits: int, group_size: int, *, bias: bool = False) -> FakeQuantLinear:
    """With zero points off the integers and outside the grid, and weights beyond it, as training leaves them."""
    groups = 1 if group_size < 0 else COLUMNS // group_size
    return FakeQuantLinear(
        torch.randn(ROWS, COLUMNS),
        torch.randn(ROWS) if bias else None,
        torch.rand(ROWS, groups) * 0.4 + 0.1,
        (torch.rand(ROWS, groups) * 1.6 - 0.3) * (2**bits - 1),
        bits=bits,
        group_size=group_size,
    )


def quantized_linear(bits: int, group_size: int, *, bias: bool = False) -> QuantizedLinear:
    groups = 1 if group_size < 0 else COLUMNS // group_size
    return QuantizedLinear(
        torch.randint(0, 2**bits, (ROWS, COLUMNS), dtype=torch.uint8),
        torch.rand(ROWS, groups) * 0.1 + 0.01,
        torch.randint(0, 2**bits, (ROWS, groups), dtype=torch.uint8),
        bits,
        group_size,
        torch.randn(ROWS) if bias else None,
    )


def dense(linear: QuantizedLinear) -> Tensor:
    """(codes - zero_point) * scale, in fp64."""
    size = COLUMNS if linear.group_size < 0 else linear.group_size
    zero_point, scale = (t.double().repeat_interleave(size, dim=1) for t in (linear.zero_point, linear.scale))
    return (linear.codes.double() - zero_point) * scale


def packed_linear(linear: QuantizedLinear) -> PackedLinear:
    module = PackedLinear(
        module_quant(linear), bias=linear.bias is not None, scale_dtype=torch.float32, dtype=torch.float32
    )
    tensors = pack_linear("x", linear)
    module.load_state_dict({name.removeprefix("x."): tensor for name, tensor in tensors.items()})
    return module


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_export_is_the_weight_that_forward_used(bits: int, group_size: int) -> None:
    linear = fake_quant_linear(bits, group_size)
    with torch.no_grad():
        used = linear(torch.eye(COLUMNS)).T
    exported = linear.export()
    assert exported.codes.dtype == exported.zero_point.dtype == torch.uint8
    assert int(exported.codes.max()) == int(exported.zero_point.max()) == 2**bits - 1
    assert torch.equal(exported.dequantize(), used)
    torch.testing.assert_close(used.double(), dense(exported), rtol=1e-6, atol=1e-7)


def test_export_clamps_scales_as_forward_does() -> None:
    linear = fake_quant_linear(2, 32)
    linear.scale.data[0, 0], linear.scale.data[1, 0] = -1.0, 0.0
    with torch.no_grad():
        used = linear(torch.eye(COLUMNS)).T
    assert torch.equal(linear.export().dequantize(), used)
    assert float(linear.export().scale.min()) > 0


def test_fake_quantization_trains_weight_scale_and_zero_point_but_no_bias() -> None:
    linear = fake_quant_linear(2, 32, bias=True)
    linear(torch.randn(5, COLUMNS)).square().sum().backward()
    for name in ("weight", "scale", "zero_point"):
        gradient = getattr(linear, name).grad
        assert bool(torch.isfinite(gradient).all() & (gradient != 0).any()), name
    assert linear.bias is not None
    assert linear.bias.grad is None
    assert torch.equal(linear.export().bias, linear.bias)


def test_fake_quantization_computes_in_the_dtype_of_autocast() -> None:
    linear, x = fake_quant_linear(4, 32, bias=True), torch.randn(5, COLUMNS)
    with torch.autocast("cpu", torch.bfloat16):
        output = linear(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), linear(x), rtol=0.05, atol=0.5)
    output.float().sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "bias"), [(32, False), (96, True), (-1, True)])
def test_packed_linear_is_a_linear_with_the_dense_weight(bits: int, group_size: int, bias: bool) -> None:
    quantized = quantized_linear(bits, group_size, bias=bias)
    x = torch.randn(2, 3, COLUMNS)
    expected = F.linear(x.double(), dense(quantized), None if quantized.bias is None else quantized.bias.double())
    output = packed_linear(quantized)(x)
    assert output.shape == (2, 3, ROWS)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-4 * float(expected.abs().max()))


def test_packed_linear_under_autocast_multiplies_in_bf16() -> None:
    quantized = quantized_linear(4, 32, bias=True)
    x = torch.randn(7, COLUMNS)
    module = packed_linear(quantized)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
        assert quantized.bias is not None
        expected = F.linear(x, dense(quantized).float(), quantized.bias)  # autocast rounds its operands to bf16
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected.float(), rtol=0.02, atol=0.02 * float(expected.abs().max()))
    assert not torch.equal(output.float(), module(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_only_the_scale_of_a_packed_linear_trains(autocast: bool) -> None:
    quantized = quantized_linear(3, 32, bias=True)
    module = packed_linear(quantized)
    assert [name for name, p in module.named_parameters() if p.requires_grad] == []
    module.weight_scale.requires_grad_(True)
    x = torch.randn(11, COLUMNS, requires_grad=True)
    upstream = torch.randn(11, ROWS)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        module(x).backward(upstream.to(torch.bfloat16 if autocast else torch.float32))

    d_weight = upstream.double().T @ x.detach().double()
    steps = quantized.codes.double() - quantized.zero_point.double().repeat_interleave(32, dim=1)
    d_scale = (d_weight * steps).reshape(ROWS, -1, 32).sum(-1)
    assert module.weight_scale.grad is not None
    assert x.grad is not None
    error = (module.weight_scale.grad.double() - d_scale).norm() / d_scale.norm()
    assert float(error) < (0.02 if autocast else 1e-5)
    d_x = upstream.double() @ dense(quantized)
    assert float((x.grad.double() - d_x).norm() / d_x.norm()) < (0.02 if autocast else 1e-5)
    assert module.bias is not None
    assert module.bias.grad is None


def test_zero_points_follow_the_weights_that_are_loaded() -> None:
    """A model is built, perhaps run, and only then loaded: nothing of before may be kept."""
    first, second = quantized_linear(2, 32), quantized_linear(2, 32)
    module = packed_linear(first)
    module(torch.randn(1, COLUMNS))
    tensors = pack_linear("x", second)
    module.load_state_dict({name.removeprefix("x."): tensor for name, tensor in tensors.items()})
    assert torch.equal(module.zero_point, second.zero_point)


def test_a_scale_trains_after_inference_mode() -> None:
    """What was unpacked for the first call is used by every later one."""
    module, x = packed_linear(quantized_linear(3, 32)), torch.randn(11, COLUMNS)
    with torch.inference_mode():
        expected = module(x)
    module.weight_scale.requires_grad_(True)
    output = module(x)
    output.sum().backward()
    assert torch.equal(output, expected)
    assert module.weight_scale.grad is not None


def test_codes_are_prepared_for_decoding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("QAT_KERNELS", "triton")
    first, second = quantized_linear(3, 32), quantized_linear(3, 32)
    module, x = packed_linear(first), torch.randn(2, COLUMNS)
    module(x)
    assert module._prepared is None, "training reads the packed codes"
    with torch.no_grad():
        module(torch.randn(FEW_ROWS + 1, COLUMNS))
        assert module._prepared is None, "many rows do, too"
        torch.testing.assert_close(module(x), F.linear(x, dense(first).float()), rtol=1e-4, atol=1e-4)
        assert module._prepared is not None
        assert "_prepared" not in module.state_dict()
        tensors = pack_linear("x", second)
        module.load_state_dict({name.removeprefix("x."): tensor for name, tensor in tensors.items()})
        torch.testing.assert_close(module(x), F.linear(x, dense(second).float()), rtol=1e-4, atol=1e-4)


def test_codes_are_prepared_for_as_many_rows_as_a_kernel_takes() -> None:
    """On no GPU with settings of its own more: a second copy of the codes that nothing reads is not made."""
    tables = [tuning.load(path) for path in tuning.CONFIGS.glob("*.json")]
    assert max(table.routes["quantized_matmul"]["gemv"] for table in tables) == FEW_ROWS


def test_replace_modules_keeps_the_rest() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    kept = model[0]
    seen: list[str] = []

    def identity(name: str, module: nn.Module) -> nn.Module:
        assert isinstance(module, nn.Linear)
        seen.append(name)
        return nn.Identity()

    replace_modules(model, ["1.0"], identity)
    assert seen == ["1.0"]
    assert model[0] is kept
    assert [type(module) for module in model[1]] == [nn.Identity, nn.ReLU]
