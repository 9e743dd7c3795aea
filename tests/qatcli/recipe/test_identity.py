"""Dumping and loading gives the same recipe; the digest depends on its content alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qatcli.recipe import Recipe, digest, dump_recipe, load_recipe


