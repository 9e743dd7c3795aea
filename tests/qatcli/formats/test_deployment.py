"""The deployment matrix: what it says follows the checkpoint, and the card carries it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qatcli.formats import FORMATS, ExportOptions, deployment
from qatcli.formats.card import deployments_of
from qatcli.packed import PackedCheckpoint

Packed = Callable[..., PackedCheckpoint]
MIXED = {"layers.1.mlp.down_proj": (4, 32)}


def _commands(rows: list[deployment.Deployment], runtime: str) -> dict[str, str]:
    return {row.releases: row.command for row in rows if row.runtime == runtime}


def test_asymmetric_gptq_warns_of_the_release_that_is_silently_wrong(packed: Packed) -> None:
    rows = deployment.gptq(packed(2), symmetric=False)
    assert _commands(rows, "vLLM") == {
        "<= 0.11.0": "",
        "0.11.1 to 0.21": "vllm serve . --dtype float16",
        ">= 0.22": "vllm serve . --quantization humming",
    }
    assert "SILENTLY WRONG" in next(row.remark for row in rows if row.releases == "<= 0.11.0")
    assert "T-MAC" in {row.runtime for row in rows}
    assert "T-MAC" not in {row.runtime for row in deployment.gptq(packed(3), symmetric=False)}


def test_symmetric_4_bits_run_everywhere(packed: Packed) -> None:
    rows = deployment.gptq(packed(4, symmetric=True), symmetric=True)
    assert _commands(rows, "vLLM") == {"all": "vllm serve ."}


@pytest.mark.parametrize("options", [{"kinds": MIXED}, {"group_size": -1}])
def test_no_flag_is_promised_for_what_humming_does_not_read(packed: Packed, options: dict[str, object]) -> None:
    rows = deployment.gptq(packed(2, **options), symmetric=False)
    assert not [row for row in rows if "humming" in row.command]
    assert _commands(rows, "vLLM")[">= 0.22"] == ""
    assert "export compressed-tensors" in next(row.remark for row in rows if row.releases == ">= 0.22")


def test_transformers_is_not_promised_for_several_kinds(packed: Packed) -> None:
    for rows in (
        deployment.gptq(packed(2, kinds=MIXED), symmetric=False),
        deployment.compressed_tensors(packed(2, kinds=MIXED), symmetric=False),
    ):
        assert _commands(rows, "transformers") == {"up to 5.23": ""}
        assert "export native or dense" in next(row.remark for row in rows if row.runtime == "transformers")


@pytest.mark.parametrize(
    "options",
    [{"kinds": {"layers.1.self_attn.v_proj": (4, 32)}}, {"skip": ("layers.1.self_attn.v_proj",)}],
)
def test_servers_that_merge_linears_are_not_promised_for_parts_that_differ(
    packed: Packed, options: dict[str, object]
) -> None:
    checkpoint = packed(2, **options)
    for rows in (
        deployment.gptq(checkpoint, symmetric=False),
        deployment.compressed_tensors(checkpoint, symmetric=False),
        deployment.where_merged(checkpoint, deployment.awq(checkpoint)),
        deployment.bitblas(checkpoint, "zeros"),
    ):
        for server in ("vLLM", "SGLang"):
            assert _commands(rows, server) == {"all": ""}
            remark = next(row.remark for row in rows if row.runtime == server)
            assert "merges q_proj, k_proj, v_proj, which differ in model.layers.1.self_attn" in remark
    for options in ({"kinds": MIXED}, {"skip": ("layers.1.self_attn",)}):
        rows = deployment.awq(packed(2))
        assert deployment.where_merged(packed(2, **options), rows) == rows


def test_servers_are_not_promised_in_float16_for_families_that_leave_it(packed: Packed) -> None:
    """Their kernels for these formats have no other type."""
    gemma = replace(packed(4), config={**packed(4).config, "model_type": "gemma3_text"})
    for rows in (
        deployment.gptq(gemma, symmetric=False),
        deployment.awq(gemma),
        deployment.bitblas(gemma, "zeros"),
    ):
        found = [row for row in rows if row.runtime in ("vLLM", "SGLang")]
        assert any("this family's activations leave" in row.remark for row in found)
        assert not any("--dtype float16" in row.command for row in found)
    assert "MLX" in [row.runtime for row in deployment.awq(packed(4))]
    assert "MLX" not in [row.runtime for row in deployment.awq(gemma)]


def test_compressed_tensors_need_the_release_that_reads_zero_points(packed: Packed) -> None:
    first = {
        symmetric: next(iter(_commands(deployment.compressed_tensors(packed(3), symmetric=symmetric), "vLLM")))
        for symmetric in (True, False)
    }
    assert first == {True: ">= 0.25", False: ">= 0.31"}


def test_new_block_type_names_its_release() -> None:
    assert "June 2026" in deployment.gguf("model.gguf", {"Q2_0", "Q4_0"})[0].releases
    assert "2026" not in deployment.gguf("model.gguf", {"Q4_0"})[0].releases


@pytest.mark.parametrize("name", FORMATS)
def test_the_card_gives_the_table_back_aligned(packed: Packed, tmp_path: Path, name: str) -> None:
    FORMATS[name].write(packed(4), tmp_path / "out", ExportOptions(runtimes=False))
    lines = deployments_of(tmp_path / "out").splitlines()
    assert all(line.startswith("  ") and "|" not in line and "`" not in line for line in lines)
    assert len(lines) > 1 or name == "bitblas"
    if name == "awq":
        start, command = lines[0][:34], lines[0][36:]
        assert start.strip() == "vLLM >= 0.11.1"
        assert command == "vllm serve . --dtype float16  # Marlin kernels on Ampere and newer"
        assert [line.split()[0] for line in lines] == [row.runtime for row in deployment.awq(packed(4))]


def test_a_row_without_a_command_is_its_remark(packed: Packed, tmp_path: Path) -> None:
    FORMATS["gptq"].write(packed(2), tmp_path / "out", ExportOptions(runtimes=False))
    assert "| vLLM | <= 0.11.0 |  | do not use: SILENTLY WRONG" in (tmp_path / "out" / "README.md").read_text()
    (line,) = [line for line in deployments_of(tmp_path / "out").splitlines() if "0.11.0" in line]
    assert line.split("  ", 2)[2].strip() == "do not use: SILENTLY WRONG: zero points are read off by one"
