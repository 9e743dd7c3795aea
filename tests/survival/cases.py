"""Every bad input, by importing the modules that register them."""

import cases_inputs
import cases_models
import cases_runs
from hostile import CASES

__all__ = ["CASES", "cases_inputs", "cases_models", "cases_runs"]
