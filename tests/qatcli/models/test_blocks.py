"""Blocks run one at a time compute what the whole model computes, for every family, and leave nothing in memory."""

from __future__ import annotations

import json
import shutil
from collections import UserDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qatcli.errors import InputError
from qatcli.models.blocks import BlockModel, open_blocks, run_block
from qatcli.models.source import open_source

CPU, FP32 = torch.device("cpu"), torch.float32
GEMMA3 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 5,
    "query_pre_attn_scalar": 8,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2-biases": ("Qwen2Config", {}),
    "qwen3-query-norms": ("Qwen3Config", {}),
    "gemma3-sliding-and-full": ("Gemma3TextConfig", GEMMA3),
    "mistral-sliding": ("MistralConfig", {"sliding_window": 6}),
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
# With the name of their last norm. The blocks of the first two return tuples, of which the model takes the first; the
# checkpoint of the third calls the output layer otherwise than the model does.
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "GPTJConfig": ("ln_f", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    "FalconConfig": ("ln_f", {**SIZES, "alibi": False}),
    "GPTNeoXConfig": ("final_layer_norm", {**SIZES, "intermediate_size": 48}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, save_random_model: Callable[..., Path]) -> Path:
    """A random model of each family."""
    config_class, overrides = FAMILIES[request.param]
    return save_random_model(config_class, **overrides)


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(0, 61, (3, 17), dtype=torch.int32)


def run_all_blocks(model: BlockModel, windows: Tensor) -> Tensor:
    """Hidden states after the last block, all windows in one batch, one block in memory at a time."""
    hidden = torch.cat([first.clone() for first in model.first_inputs(windows, CPU, FP32)])
    arguments = model.block_arguments(windows.shape[1], CPU, FP32)
    with torch.no_grad():
        for index in range(len(model)):
            hidden = run_block(model.load_block(index, CPU, FP32), hidden, arguments[index])
    return hidden


def test_the_blocks_in_turn_are_the_model(family: Path, windows: Tensor) -> None:
    whole = AutoModelForCausalLM.from_pretrained(family, dtype=FP32).eval()
    model = open_blocks(open_source(str(family)))
    assert len(model) == whole.config.num_hidden_layers
    with torch.no_grad():
        expected = whole(input_ids=windows.long()).logits
        logits = whole.lm_head(whole.model.norm(run_all_blocks(model, windows)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("config_class", ODD)
def test_the_blocks_of_odd_families_are_the_model_too(config_class: str, windows: Tensor, tmp_path: Path) -> None:
    norm, sizes = ODD[config_class]
    config = getattr(transformers, config_class)(vocab_size=61, **sizes)
    whole = AutoModelForCausalLM.from_config(config, dtype=FP32).eval()
    whole.save_pretrained(tmp_path)
    model = open_blocks(open_source(str(tmp_path)))
    with torch.no_grad():
        expected = whole(input_ids=windows.long()).logits
        logits = whole.lm_head(whole.base_model.get_submodule(norm)(run_all_blocks(model, windows)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# What some families do to logits after the output layer.
BEHIND = {
    "gemma2-softcap": ("Gemma2Config", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "granite-scale": ("GraniteConfig", {"logits_scaling": 3.0}),
    "cohere-scale": ("CohereConfig", {"logit_scale": 0.25}),
}


@pytest.mark.parametrize("name", [*FAMILIES, *BEHIND])
def test_the_head_makes_the_models_logits(name: str, save_random_model: Callable[..., Path], windows: Tensor) -> None:
    config_class, overrides = {**FAMILIES, **BEHIND}[name]
    folder = save_random_model(config_class, **overrides)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=FP32).eval()
    model = open_blocks(open_source(str(folder)))
    hidden = run_all_blocks(model, windows)
    with torch.no_grad():
        expected = whole(input_ids=windows.long()).logits
        for _ in range(2):  # of a tied head the first leaves nothing behind
            with model.head(CPU, FP32) as head:
                logits = torch.cat([head(each[None]) for each in hidden])
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
            held = [name for name, _ in model.skeleton.named_parameters(remove_duplicate=False)]
            assert [name for name in held if not model.skeleton.get_parameter(name).is_meta] == []


def test_an_output_layer_that_is_stored_is_not_the_embeddings(
    save_random_model: Callable[..., Path], windows: Tensor, tmp_path: Path
) -> None:
    """Though config.json ties them: transformers does not then either."""
    folder = shutil.copytree(save_random_model("LlamaConfig", tie_word_embeddings=True), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=FP32).eval()
    model = open_blocks(open_source(str(folder)))
    hidden = run_all_blocks(model, windows)
    with torch.no_grad(), model.head(CPU, FP32) as head:
        expected = whole(input_ids=windows.long()).logits
        torch.testing.assert_close(head(hidden), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("config_class", ODD)
def test_the_head_of_odd_families(config_class: str, windows: Tensor, tmp_path: Path) -> None:
    config = getattr(transformers, config_class)(vocab_size=61, **ODD[config_class][1])
    whole = AutoModelForCausalLM.from_config(config, dtype=FP32).eval()
    whole.save_pretrained(tmp_path)
    model = open_blocks(open_source(str(tmp_path)))
    hidden = run_all_blocks(model, windows)
    with torch.no_grad(), model.head(CPU, FP32) as head:
        expected = whole(input_ids=windows.long()).logits
        torch.testing.assert_close(head(hidden), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_checkpoint_without_an_output_layer_is_refused(tmp_path: Path, random_llama: Path) -> None:
    folder = shutil.copytree(random_llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = open_blocks(open_source(str(folder)))
    with pytest.raises(InputError, match=r"no tensor `lm_head.weight`"), model.head(CPU, FP32):
        pass
    assert all(parameter.is_meta for parameter in model.skeleton.parameters())


def test_no_parameter_stays_in_memory(family: Path, windows: Tensor) -> None:
    model = open_blocks(open_source(str(family)))
    assert all(parameter.is_meta for parameter in model.skeleton.parameters())
    run_all_blocks(model, windows)
    assert [name for name, parameter in model.skeleton.named_parameters() if not parameter.is_meta] == []


def test_the_blocks_work_again_after_a_failure_in_between(random_llama: Path, windows: Tensor) -> None:
    model = open_blocks(open_source(str(random_llama)))
    expected = run_all_blocks(model, windows)
    started = model.first_inputs(windows, CPU, FP32)
    next(started)
    with pytest.raises(RuntimeError, match="stop"):
        started.throw(RuntimeError("stop"))  # type: ignore[attr-defined]
    assert torch.equal(run_all_blocks(model, windows), expected)
    assert all(parameter.is_meta for parameter in model.skeleton.parameters())


def test_loaded_blocks_are_the_checkpoints_and_independent_copies(random_llama: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(random_llama, dtype=FP32)
    model = open_blocks(open_source(str(random_llama)))
    first, again = (model.load_block(1, CPU, FP32) for _ in range(2))
    state = whole.model.layers[1].state_dict()
    assert len(state) == 9
    assert first.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())
    assert not first.training
    for parameter in first.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert next(model.load_block(1, CPU, torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_linears_have_the_names_of_the_checkpoint(random_llama: Path) -> None:
    model = open_blocks(open_source(str(random_llama)))
    found = model.linears(2)
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert list(found) == [f"model.layers.2.{part}" for part in parts]
    assert all(f"{name}.weight" in model.source.shards for name in found)
    down = found["model.layers.2.mlp.down_proj"]
    assert (down.in_features, down.out_features) == (48, 32)


@pytest.mark.parametrize("tied", [False, True])
def test_outside_names_are_what_no_block_holds(save_random_model: Callable[..., Path], tied: bool) -> None:
    model = open_blocks(open_source(str(save_random_model("LlamaConfig", tie_word_embeddings=tied))))
    expected = {"model.embed_tokens.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    assert set(model.outside_names()) == expected
    inside = {
        f"{model.block_name(i)}.{name}"
        for i in range(len(model))
        for name in model.load_block(i, CPU, FP32).state_dict()
    }
    assert inside | expected == set(model.source.shards)


def test_the_largest_list_of_the_right_length_holds_the_blocks(tmp_path: Path) -> None:
    """Some models keep other lists with one entry for each block: embeddings, projections, adapters."""
    source = open_source(str(custom_model(tmp_path, blocks="blocks", decoy=True)), trust_remote_code=True)
    model = open_blocks(source)
    assert model.prefix == "model.blocks"
    assert len(model) == 2


def test_a_model_without_a_list_of_blocks_is_refused(tmp_path: Path) -> None:
    source = open_source(str(custom_model(tmp_path, blocks="", decoy=False)), trust_remote_code=True)
    with pytest.raises(InputError, match="no list of 2 decoder blocks in OddForCausalLM") as caught:
        open_blocks(source)
    assert caught.value.hint is not None


def test_positional_arguments_to_blocks_are_refused(random_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They could not be replayed by name: better refused than dropped."""
    model = open_blocks(open_source(str(random_llama)))
    base = model.skeleton.base_model

    def forward(self: nn.Module, input_ids: Tensor, **_: object) -> None:
        self.layers[0](self.embed_tokens(input_ids), torch.zeros(1))

    monkeypatch.setattr(type(base), "forward", forward)
    with pytest.raises(InputError, match="positional"):
        model.block_arguments(4, CPU, FP32)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (lambda ids: {"tokens": ids}, "receive `tokens`, which depends on the tokens"),
        (lambda ids: {"shared": UserDict()}, "pass `shared` on to later ones"),
    ],
)
def test_arguments_that_depend_on_the_tokens_are_refused(
    random_llama: Path, monkeypatch: pytest.MonkeyPatch, argument: Callable[[Tensor], dict[str, Any]], message: str
) -> None:
    """Block by block all windows are given the same."""
    model = open_blocks(open_source(str(random_llama)))
    base, calls = model.skeleton.model, model.skeleton.model.forward

    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        for block in base.layers:
            inner = block.forward
            block.forward = partial(inner, **argument(input_ids))
        return calls(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(base, "forward", forward)
    with pytest.raises(InputError, match=message):
        model.block_arguments(4, CPU, FP32)


def test_arguments_that_follow_the_number_of_sequences_are_refused(save_random_model: Callable[..., Path]) -> None:
    """They are recorded for one sequence and passed for many; BLOOM's position biases have a row for every head."""
    source = open_source(str(save_random_model("BloomConfig", n_head=4)))
    with pytest.raises(InputError, match="`alibi` with 4 rows for one sequence and 8 for two"):
        open_blocks(source).block_arguments(4, CPU, FP32)


def test_an_incomplete_checkpoint_names_the_tensor(random_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(random_llama, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        open_blocks(open_source(str(tmp_path / "model")))


def test_a_family_whose_tensors_are_renamed_on_loading_is_refused_at_once(
    save_random_model: Callable[..., Path],
) -> None:
    mixture = save_random_model("MixtralConfig", num_local_experts=2)
    with pytest.raises(InputError, match="has no tensor") as caught:
        open_blocks(open_source(str(mixture)))
    assert "mixtures of experts" in str(caught.value.hint)


def custom_model(folder: Path, *, blocks: str, decoy: bool) -> Path:
    """A folder with a model of its own code: blocks in the list named `blocks`, or one by one if that is empty."""
    code = f"""
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

class OddConfig(PretrainedConfig):
    model_type = "odd"
    def __init__(self, num_hidden_layers=2, **rest):
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**rest)

class OddModel(PreTrainedModel):
    config_class = OddConfig
    def __init__(self, config):
        super().__init__(config)
        layers = [nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(config.num_hidden_layers)]
        if {decoy}:
            self.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in layers)
        if {blocks!r}:
            setattr(self, {blocks!r}, nn.ModuleList(layers))
        else:
            self.first, self.second = layers
        self.post_init()

class OddForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OddConfig
    base_model_prefix = "model"
    def __init__(self, config):
        super().__init__(config)
        self.model = OddModel(config)
        self.post_init()
"""
    folder = folder / "odd"
    folder.mkdir()
    (folder / "modeling_odd.py").write_text(code)
    config = {"model_type": "odd", "num_hidden_layers": 2, "architectures": ["OddForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    model = AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder
