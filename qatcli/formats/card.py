"""The model card of an export: what it is, which runtime and release runs it, with the exact command."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from qatcli import __version__
from qatcli.formats.contract import Deployment
from qatcli.packed import PackedCheckpoint

_LIBRARIES = {"gguf": "", "mlx": "mlx"}  # of the hub, where it is not transformers
RUNTIMES_HEADING = "## Which runtime runs this file"


def model_card(
    checkpoint: PackedCheckpoint,
    format_name: str,
    deployments: list[Deployment],
    *,
    others: str = "All other tensors are in half precision.",
) -> str:
    """README.md in Markdown with Hugging Face front matter."""
    config = checkpoint.config
    kinds = Counter(quant.kind for quant in checkpoint.modules.values())
    rows = "\n".join(
        f"| {bits} | {'one per row' if group == -1 else group} | {count} |"
        for (bits, group), count in sorted(kinds.items())
    )
    base = str(config.get("_name_or_path") or "/")
    library = _LIBRARIES.get(format_name, "transformers")
    front = f"library_name: {library}\n" if library else ""
    front += f"base_model: {base}\n" if not base.startswith(("/", ".")) else ""
    architecture = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
    return f"""---
{front}tags: [quantized, efficientqat, {format_name}]
---

# {architecture}, {format_name}

Written by qat {__version__}, which quantizes by EfficientQAT (arXiv 2407.11062). Each weight of a quantized linear is
`(code - zero_point) * scale` with integer codes and zero points and fp16 scales.

| bits | group size | linears |
|---|---|---|
{rows}

{others}

{RUNTIMES_HEADING}

{deployment_table(deployments)}

Commands are given for the folder of this file. `verify.json` beside it says with what code the export was read back and
compared with the checkpoint it was made from, and which libraries ran it; without that file it was not verified.
"""


def deployment_table(deployments: list[Deployment]) -> str:
    """The deployment matrix as a Markdown table."""
    lines = ["| runtime | releases | command | remark |", "|---|---|---|---|"]
    lines += [
        f"| {d.runtime} | {d.releases} | {f'`{d.command}`' if d.command else ''} | {d.remark} |" for d in deployments
    ]
    return "\n".join(lines)


def deployments_of(out: Path) -> str:
    """The deployment matrix in the card of the export `out`, aligned for a terminal: one line per runtime."""
    after = (out / "README.md").read_text(encoding="utf-8").partition(RUNTIMES_HEADING)[2]
    lines = after.strip().partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines]
    width = max(len(f"{runtime} {releases}") for runtime, releases, *_ in rows)
    return "\n".join(
        f"  {f'{runtime} {releases}':<{width}}  {command}{'  # ' if command and remark else ''}{remark}".rstrip()
        for runtime, releases, command, remark in rows
    )
