"""The recipe: one YAML file is one experiment. Importing this loads neither torch nor transformers."""

from qatcli.recipe.checks import FORMAT_BITS, carried_bits, check_context, check_group_sizes, check_patterns
from qatcli.recipe.identity import digest
from qatcli.recipe.load import load_recipe, recipe_name
from qatcli.recipe.methods import METHODS, preset, untrained_gptq
from qatcli.recipe.schema import (
    BlockApSection,
    DataSource,
    E2eQpSection,
    EvalSection,
    ModelSection,
    PerplexityText,
    QuantSection,
    Recipe,
    SpeedSection,
)

__all__ = [
    "FORMAT_BITS",
    "METHODS",
    "BlockApSection",
    "DataSource",
    "E2eQpSection",
    "EvalSection",
    "ModelSection",
    "PerplexityText",
    "QuantSection",
    "Recipe",
    "SpeedSection",
    "carried_bits",
    "check_context",
    "check_group_sizes",
    "check_patterns",
    "digest",
    "load_recipe",
    "preset",
    "recipe_name",
    "untrained_gptq",
]
