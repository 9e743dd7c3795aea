"""What reads the hidden states, and with what weights, in models that arrange norms and linears differently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qatcli.models.blocks import open_blocks
from qatcli.models.readers import readers_behind, stream_readers
from qatcli.models.source import open_source

CPU = torch.device("cpu")
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkv")
MLP = ("mlp.gate_proj", "mlp.up_proj")
# Of every family the norms that linears read through; by themselves where it is None.
FAMILIES: dict[str, tuple[str, dict[str | None, tuple[str, ...]]]] = {
    "llama": ("LlamaConfig", {"input_layernorm": ATTENTION, "post_attention_layernorm": MLP}),
    # norms of queries and keys as well
    "qwen3": ("Qwen3Config", {"input_layernorm": ATTENTION, "post_attention_layernorm": MLP}),
    # and of outputs
    "gemma3": ("Gemma3TextConfig", {"input_layernorm": ATTENTION, "pre_feedforward_layernorm": MLP}),
    # of outputs alone
    "olmo2": ("Olmo2Config", {None: ATTENTION + MLP}),
    # attention and MLP side by side, with means
    "cohere": ("CohereConfig", {"input_layernorm": ATTENTION + MLP}),
    # queries, keys and values in one, with biases everywhere; in front of the blocks embeddings of positions
    "neox": (
        "GPTNeoXConfig",
        {"input_layernorm": ("attention.query_key_value",), "post_attention_layernorm": ("mlp.dense_h_to_4h",)},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_that_read_the_hidden_states(family: str, save_random_model: Callable[..., Path]) -> None:
    config, found_in = FAMILIES[family]
    path = save_random_model(config)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    blocks = open_blocks(open_source(str(path)))

    def squares(norm: torch.nn.Module) -> Tensor:
        gain = norm.weight.detach() + (1.0 if family == "gemma3" else 0.0)
        return gain.square()

    def rows(block: torch.nn.Module) -> list[Tensor]:
        columns = []
        for norm, linears in found_in.items():
            gains = torch.ones(model.config.hidden_size) if norm is None else squares(block.get_submodule(norm))
            columns += [gains * block.get_submodule(name).weight.detach().square().sum(0) for name in linears]
        return columns

    found = stream_readers(blocks, CPU)
    last = model.base_model.final_layer_norm if family == "neox" else model.model.norm
    expected = [rows(block) for block in model.get_submodule(blocks.prefix)] + [[squares(last)]]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (len(theirs), model.config.hidden_size)
        torch.testing.assert_close(ours.sort(0).values, torch.stack(theirs).sort(0).values, rtol=1e-4, atol=1e-6)


def test_readers_behind_a_block() -> None:
    readers = [torch.full((2, 4), 1.0), torch.full((2, 4), 2.0), torch.full((1, 4), 3.0)]
    behind = readers_behind(readers)
    assert [each[:, 0].tolist() for each in behind] == [[2, 2, 3], [3]]
    assert behind[0].untyped_storage().data_ptr() == behind[1].untyped_storage().data_ptr()
    unknown = [torch.empty(0, 4)] * 3
    assert torch.equal(readers_behind(unknown)[0], torch.ones(1, 4)), "then the error is relative to the token"
