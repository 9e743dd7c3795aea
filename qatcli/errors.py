"""Errors a user can act on.

QatError                 1  something failed while running
 +- RecipeError          2  the recipe is wrong
 +- UsageError           2  the command line is wrong
 +- InputError           3  an input is missing, corrupt or of the wrong kind
 +- VerificationError    4  an artifact does not match what it was made from, or a result what its recipe expects
 +- DivergedError        5  training became non-finite beyond recovery
 +- ResourceError        6  not enough memory or disk

The number is the exit code of the command. A message names what, where and the valid choices; a hint names
the next command or edit. Anything that is not a QatError is a bug of ours; the command line saves its traceback.
"""

from __future__ import annotations


class QatError(Exception):
    """A failure with an explanation; `hint` is what to do next, or None."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(QatError):
    """The recipe does not parse or contradicts itself."""

    exit_code = 2


class UsageError(QatError):
    """The command line is wrong."""

    exit_code = 2


class InputError(QatError):
    """An input is missing, corrupt, or not the kind this stage reads."""

    exit_code = 3


class VerificationError(QatError):
    """A written artifact differs from its source, or a result misses the figures that its recipe expects."""

    exit_code = 4


class DivergedError(QatError):
    """Training became non-finite and every fallback failed."""

    exit_code = 5


class ResourceError(QatError):
    """The machine has too little memory or disk."""

    exit_code = 6


def missing_extra(package: str, extra: str) -> QatError:
    """The error for an optional dependency that is not installed."""
    return QatError(f"this needs the package `{package}`", hint=f"install it with `pip install 'qatcli[{extra}]'`")
