"""The recipe: one YAML file is one experiment. Importing this loads neither torch nor transformers."""

from qatcli.recipe.checks import FORMAT_BITS, check_context, check_group_sizes, check_patterns
from qatcli.recipe.identity import digest, dump_recipe
from qatcli.recipe.load import load_recipe, recipe_name
from qatcli.recipe.methods import METHODS, preset, untrained_gptq
from qatcli.recipe.schema import (
    BlockApSection,
    CacheSection,
    CalibrateSection,
    DataSource,
    E2eQpSection,
    EvalSection,
    Expectation,
    ExportSection,
    ModelSection,
    ModuleOverride,
    PackSection,
    PerplexityText,
    QuantSection,
    Recipe,
    SpeedSection,
    ZeroShotSection,
)

__all__ = [
    "FORMAT_BITS",
    "METHODS",
    "BlockApSection",
    "CacheSection",
    "CalibrateSection",
    "DataSource",
    "E2eQpSection",
    "EvalSection",
    "Expectation",
    "ExportSection",
    "ModelSection",
    "ModuleOverride",
    "PackSection",
    "PerplexityText",
    "QuantSection",
    "Recipe",
    "SpeedSection",
    "ZeroShotSection",
    "check_context",
    "check_group_sizes",
    "check_patterns",
    "digest",
    "dump_recipe",
    "load_recipe",
    "preset",
    "recipe_name",
    "untrained_gptq",
]
