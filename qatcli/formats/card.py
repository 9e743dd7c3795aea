"""The model card of an export: what it is, which runtime and release runs it, with the exact command."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from qatcli import __version__
from qatcli.formats.contract import Deployment
from qatcli.packed import PackedCheckpoint

RUNTIMES_HEADING = "## Which runtime runs this file"


def model_card(checkpoint: PackedCheckpoint, format_name: str, deployments: list[Deployment]) -> str:
    """README.md in Markdown with Hugging Face front matter."""
    config = checkpoint.config
    kinds = Counter((quant.bits, quant.group_size) for quant in checkpoint.modules.values())
    rows = "\n".join(f"| {bits} | {_group(group)} | {count} |" for (bits, group), count in sorted(kinds.items()))
    base = config.get("_name_or_path") or "unknown"
    front = f"base_model: {base}\n" if base != "unknown" and not base.startswith(("/", ".")) else ""
    architecture = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
    return f"""---
library_name: transformers
{front}tags: [quantized, efficientqat, {format_name}]
---

# {architecture}, {format_name}

Quantized by qat {__version__} with quantization-aware training (EfficientQAT, arXiv 2407.11062).
Each weight is `(code - zero_point) * scale` with integer codes and zero points and fp16 scales.

| bits | group size | linears |
|---|---|---|
{rows}

All other tensors are in half precision.

{RUNTIMES_HEADING}

{deployment_table(deployments)}

The integers of this export were compared with the training checkpoint when `verify.json` lies beside this file.
"""


def deployment_table(deployments: list[Deployment]) -> str:
    """The deployment matrix as a Markdown table."""
    lines = ["| runtime | releases | command | remark |", "|---|---|---|---|"]
    lines += [f"| {d.runtime} | {d.releases} | `{d.command}` | {d.remark} |" for d in deployments]
    return "\n".join(lines)


def deployments_of(out: Path) -> str:
    """The deployment matrix in the card of the export `out`."""
    after = (out / "README.md").read_text(encoding="utf-8").partition(RUNTIMES_HEADING)[2]
    return after.strip().partition("\n\n")[0]


def _group(size: int) -> str:
    return "one per row" if size == -1 else str(size)
