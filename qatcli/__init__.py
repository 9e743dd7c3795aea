"""qat: turn a pretrained causal LLM into a 2-, 3- or 4-bit one, and prove that the result is good.

Importing this package lets plain transformers load packed checkpoints. The quantizer is registered when transformers
is imported, before or after, so that the import itself stays light.
"""

import wrapt

__version__ = "0.1.0"


@wrapt.when_imported("transformers.quantizers.auto")
def _register(_module: object) -> None:
    import qatcli.hf  # noqa: F401  (its decorators register the quantizer)
