"""Which norms read the hidden states, and with what gains, in models that arrange them differently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qatcli.models.blocks import open_blocks
from qatcli.models.gains import gains_behind, stream_gains
from qatcli.models.source import open_source

CPU = torch.device("cpu")
LLAMA = ("input_layernorm", "post_attention_layernorm")
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "qwen3": ("Qwen3Config", LLAMA),  # norms of queries and keys as well
    "gemma3": ("Gemma3TextConfig", ("input_layernorm", "pre_feedforward_layernorm")),  # and of outputs
    "olmo2": ("Olmo2Config", ()),  # of outputs alone
    "cohere": ("CohereConfig", ("input_layernorm",)),  # attention and MLP side by side, with means
}


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_that_read_the_hidden_states(family: str, save_random_model: Callable[..., Path]) -> None:
    config, names = FAMILIES[family]
    path = save_random_model(config)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def squares(norm: nn.Module) -> torch.Tensor:
        gain = norm.weight.detach() + (1.0 if family == "gemma3" else 0.0)
        return gain.square()

    found = stream_gains(open_blocks(open_source(str(path))), CPU)
    expected = [[squares(block.get_submodule(name)) for name in names] for block in model.model.layers]
    expected.append([squares(model.model.norm)])
    assert len(found) == len(expected)
    for rows, norms in zip(found, expected, strict=True):
        assert rows.shape == (len(norms), model.config.hidden_size)
        for row, norm in zip(rows, norms, strict=True):
            torch.testing.assert_close(row, norm, rtol=1e-4, atol=1e-6)


def test_norms_behind_a_block() -> None:
    gains = [torch.full((2, 4), 1.0), torch.full((2, 4), 2.0), torch.full((1, 4), 3.0)]
    assert gains_behind(gains, 0)[:, 0].tolist() == [2, 2, 3]
    assert gains_behind(gains, 1)[:, 0].tolist() == [3]
    unknown = [torch.empty(0, 4)] * 3
    assert torch.equal(gains_behind(unknown, 0), torch.ones(1, 4)), "then the error is relative to the token"
