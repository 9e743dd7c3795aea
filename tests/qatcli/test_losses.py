"""Token losses against their definition, token by token, and their gradients against autograd's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from qatcli.losses import (
    ROWS,
    SparseTarget,
    downstream_error,
    relative_error,
    squared_error,
    token_loss,
)


def log_softmax(logits: list[float]) -> list[float]:
    total = math.log(math.fsum(math.exp(value) for value in logits))
    return [value - total for value in logits]


def whole(teacher: Tensor) -> SparseTarget:
    """All tokens of a teacher's distributions [B, T, V], in another order."""
    p = teacher.float().flatten(0, 1).softmax(-1)
    best = p.sort(descending=True)
    return SparseTarget(best.indices.int(), best.values, -torch.xlogy(p, p).sum(-1))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of student and teacher [2, 5, 7], tokens [2, 5], and a mask with true and false of each kind."""
    mask = torch.tensor([[True, True, False, True, False], [False, False, True, True, True]])
    return torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5)), mask


def test_next_token_loss_is_minus_the_log_probability_of_each_target(batch: tuple[Tensor, ...]) -> None:
    student, _, tokens, mask = batch
    expected = 0.0
    for row in range(2):
        for position in range(1, 5):  # the first token is never predicted
            if mask[row, position]:
                probabilities = log_softmax(student[row, position - 1].tolist())
                expected -= probabilities[int(tokens[row, position])]
    assert float(token_loss(student, None, tokens, mask)) == pytest.approx(expected, rel=1e-5)


def test_kl_is_from_the_teacher_to_the_student_at_each_target(batch: tuple[Tensor, ...]) -> None:
    student, teacher, tokens, mask = batch
    expected = 0.0
    for row in range(2):
        for position in range(1, 5):
            if mask[row, position]:
                log_p = log_softmax(teacher[row, position - 1].tolist())
                log_q = log_softmax(student[row, position - 1].tolist())
                expected += math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
    assert float(token_loss(student, whole(teacher), tokens, mask)) == pytest.approx(expected, rel=1e-5)


def test_kl_of_equal_distributions_is_zero_with_zero_gradient(batch: tuple[Tensor, ...]) -> None:
    student, _, tokens, mask = batch
    student.requires_grad_(True)
    loss = token_loss(student, whole(student.detach() + 3.0), tokens, mask)  # the same distribution, shifted logits
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("with_teacher", [False, True])
def test_only_positions_before_a_target_matter(batch: tuple[Tensor, ...], with_teacher: bool) -> None:
    student, teacher, tokens, mask = batch
    student.requires_grad_(True)
    token_loss(student, whole(teacher) if with_teacher else None, tokens, mask).backward()
    assert student.grad is not None
    touched = student.grad.abs().sum(-1) > 0
    expected = torch.cat([mask[:, 1:], torch.zeros(2, 1, dtype=torch.bool)], dim=1)
    assert torch.equal(touched, expected)


@pytest.mark.parametrize("with_teacher", [False, True])
def test_no_target_is_no_loss(batch: tuple[Tensor, ...], with_teacher: bool) -> None:
    student, teacher, tokens, mask = batch
    mask = torch.zeros_like(mask)
    mask[:, 0] = True
    assert float(token_loss(student, whole(teacher) if with_teacher else None, tokens, mask)) == 0


def test_losses_of_bf16_logits_are_computed_in_fp32(batch: tuple[Tensor, ...]) -> None:
    student, teacher, tokens, mask = (t.bfloat16() if t.is_floating_point() else t for t in batch)
    for target in (None, whole(teacher)):
        loss = token_loss(student, target, tokens, mask)
        exact = token_loss(student.float(), target, tokens, mask)
        assert loss.dtype == torch.float32
        assert float(loss) == float(exact)


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for(batch: tuple[Tensor, ...]) -> None:
    """Which tokens count is known on the host: asking the device would wait for the whole forward pass."""
    student, teacher, tokens, mask = batch
    on_device, there = (
        student.cuda().requires_grad_(),
        SparseTarget(*(each.cuda() for each in vars(whole(teacher)).values())),
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = token_loss(on_device, there, tokens, mask, text_weight=0.5)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    student.requires_grad_()
    expected = token_loss(student, whole(teacher), tokens, mask, text_weight=0.5)
    expected.backward()
    torch.testing.assert_close(loss.cpu(), expected)
    torch.testing.assert_close(on_device.grad.cpu(), student.grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("text_weight", [0, 0.3, 1])
def test_gradients_are_those_of_the_definition(text_weight: float) -> None:
    """Over more tokens than one block of rows holds, and a last block that is not full."""
    tokens = torch.randint(0, 11, (3, 2 * ROWS // 3 + 7))
    mask = torch.rand(tokens.shape) < 0.8
    assert int(mask[:, 1:].sum()) > ROWS
    assert int(mask[:, 1:].sum()) % ROWS
    student, teacher = torch.randn(2, *tokens.shape, 11).unbind(0)
    ours = student.clone().requires_grad_(True)
    found = token_loss(ours, whole(teacher) if text_weight < 1 else None, tokens, mask, text_weight=text_weight)
    (found / 7).backward()

    exact = student.double().requires_grad_(True)
    predicted = Categorical(logits=exact[:, :-1][mask[:, 1:]])
    divergence = kl_divergence(Categorical(logits=teacher[:, :-1][mask[:, 1:]].double()), predicted)
    entropy = -predicted.log_prob(tokens[:, 1:][mask[:, 1:]])
    loss = ((1 - text_weight) * divergence + text_weight * entropy).sum()
    (loss / 7).backward()
    assert float(found.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    torch.testing.assert_close(ours.grad, exact.grad, check_dtype=False, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("text_weight", [0, 0.3])
def test_of_some_tokens_the_loss_is_the_cross_entropy_less_the_entropy(text_weight: float) -> None:
    """Tokens that are kept twice count twice."""
    tokens = torch.randint(0, 11, (3, 2 * ROWS // 3 + 7))
    mask = torch.rand(tokens.shape) < 0.8
    student = torch.randn(*tokens.shape, 11)
    kept = torch.randint(0, 11, (tokens.numel(), 4), dtype=torch.int32)
    weights, entropy = torch.rand(tokens.numel(), 4).softmax(-1), torch.rand(tokens.numel())
    ours = student.clone().requires_grad_(True)
    found = token_loss(ours, SparseTarget(kept, weights, entropy), tokens, mask, text_weight=text_weight)
    (found / 7).backward()

    exact = student.double().requires_grad_(True)
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        for position in range(tokens.shape[1] - 1):
            if mask[row, position + 1]:
                at = row * tokens.shape[1] + position
                q = exact[row, position].log_softmax(-1)
                loss = loss - (1 - text_weight) * (entropy[at] + (weights[at] * q[kept[at].long()]).sum())
                loss = loss - text_weight * q[tokens[row, position + 1]]
    (loss / 7).backward()
    assert float(found.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    torch.testing.assert_close(ours.grad, exact.grad, check_dtype=False, rtol=1e-4, atol=1e-6)


def test_relative_error_is_each_tokens_error_over_its_energy() -> None:
    output, target = torch.randn(2, 3, 5), torch.randn(2, 3, 5) * 1000
    found = relative_error(output, target)
    for row in range(2):
        for position in range(3):
            difference = output[row, position] - target[row, position]
            expected = float(difference.norm() / target[row, position].norm()) ** 2
            assert float(found[row, position]) == pytest.approx(expected, rel=1e-5)


def test_downstream_error_is_the_mean_of_relative_errors_as_they_are_read() -> None:
    gains = [torch.randn(5) for _ in range(3)]
    readers = torch.stack([gain.square() for gain in gains])
    output, target = torch.randn(2, 3, 5), torch.randn(2, 3, 5) * 1000
    expected = [relative_error(output * gain, target * gain) for gain in gains]
    torch.testing.assert_close(downstream_error(output, target, readers), torch.stack(expected).mean(0))


def test_downstream_error_of_channels_apart_is_what_linears_make_of_it() -> None:
    """Columns that are orthogonal: the squares of the channels then add up in the outputs."""
    norm, linear = torch.nn.RMSNorm(6), torch.nn.Linear(6, 9, bias=False)
    torch.nn.init.normal_(norm.weight)
    linear.weight.data = torch.linalg.qr(torch.randn(9, 6)).Q * torch.rand(6)
    readers = (norm.weight.square() * linear.weight.square().sum(0))[None].detach()
    target = torch.randn(4, 6)
    output = target.roll(1, -1)  # of the same energy, which norms divide by
    with torch.no_grad():
        expected = relative_error(linear(norm(output)), linear(norm(target)))
    torch.testing.assert_close(downstream_error(output, target, readers), expected)


def test_a_channel_that_is_hardly_read_hides_nothing_from_the_downstream_error_alone() -> None:
    target = torch.randn(4, 6, 16)
    target[..., 3] = 100
    readers = torch.ones(2, 16)
    readers[:, 3] = 1e-4
    everywhere = target * 1.1
    elsewhere = everywhere.clone()
    elsewhere[..., 3] = target[..., 3]
    for error in (squared_error, relative_error):
        assert float(error(elsewhere, target).mean()) < 0.01 * float(error(everywhere, target).mean())
    both = [float(downstream_error(output, target, readers).mean()) for output in (elsewhere, everywhere)]
    assert both[1] == pytest.approx(0.01, rel=1e-4)
    assert both[0] > 0.8 * both[1]


def test_a_token_of_huge_energy_hides_the_others_from_the_plain_mean_alone() -> None:
    target = torch.randn(2, 8, 32)
    target[:, 0] *= 1e4  # a massive activation, as at the first token of many models
    everywhere = target * 1.1
    elsewhere = everywhere.clone()
    elsewhere[:, 0] = target[:, 0]
    assert float(squared_error(elsewhere, target).mean()) < 1e-6 * float(squared_error(everywhere, target).mean())
    for found in (relative_error(elsewhere, target), downstream_error(elsewhere, target, torch.rand(2, 32))):
        assert float(found.mean()) == pytest.approx(0.01 * 7 / 8, rel=1e-3)


def test_errors_are_measured_in_fp32() -> None:
    output, target, readers = torch.randn(3, 4, 8).bfloat16(), torch.randn(3, 4, 8).bfloat16(), torch.rand(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = (
            squared_error(output, target),
            relative_error(output, target),
            downstream_error(output, target, readers),
        )
    o, t = output.double(), target.double()
    relative = (o - t).square().sum(-1) / t.square().sum(-1)
    read = torch.stack([((o - t).square() @ r) / (t.square() @ r) for r in readers.double()]).mean(0)
    for ours, exact in zip(found, ((o - t).square().mean(-1), relative, read), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, exact.float(), rtol=1e-4, atol=0)


def test_errors_of_nothing_are_nothing() -> None:
    zeros = torch.zeros(1, 2, 8)
    for found in (squared_error(zeros, zeros), relative_error(zeros, zeros), downstream_error(zeros, zeros, zeros[0])):
        assert torch.equal(found, torch.zeros(1, 2))
