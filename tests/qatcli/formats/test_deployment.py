"""The deployment matrix: what it says follows the checkpoint, and the card carries it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qatcli.formats import FORMATS, ExportOptions, deployment
from qatcli.formats.card import deployment_table, deployments_of
from qatcli.packed import PackedCheckpoint

Packed = Callable[..., PackedCheckpoint]
MIXED = {"layers.1.mlp.down_proj": (4, 32)}


def _commands(rows: list[deployment.Deployment], runtime: str) -> dict[str, str]:
    return {row.releases: row.command for row in rows if row.runtime == runtime}


def test_asymmetric_gptq_warns_of_the_release_that_is_silently_wrong(packed: Packed) -> None:
    rows = deployment.gptq(packed(2), symmetric=False)
    assert _commands(rows, "vLLM") == {
        "<= 0.11.0": "do not use",
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
    assert _commands(rows, "vLLM")[">= 0.22"] == "export compressed-tensors"


def test_transformers_is_not_promised_for_several_kinds(packed: Packed) -> None:
    for rows in (
        deployment.gptq(packed(2, kinds=MIXED), symmetric=False),
        deployment.compressed_tensors(packed(2, kinds=MIXED), symmetric=False),
    ):
        assert _commands(rows, "transformers") == {"up to 5.23": "export native or dense"}


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
def test_the_card_gives_the_table_back(packed: Packed, tmp_path: Path, name: str) -> None:
    FORMATS[name].write(packed(4), tmp_path / "out", ExportOptions(runtimes=False))
    table = deployments_of(tmp_path / "out")
    lines = table.splitlines()
    assert lines[0] == "| runtime | releases | command | remark |"
    assert all(line.startswith("| ") for line in lines[2:])
    assert len(lines) > 3 or name == "bitblas"
    if name == "awq":
        assert table == deployment_table(deployment.awq())
