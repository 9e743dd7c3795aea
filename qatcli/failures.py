"""Any exception as the sentence, the hint and the exit code that a command ends with."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback

from qatcli.errors import QatError, ResourceError, UsageError

# What a file system says of a write; files to read are checked where they are opened.
DENIED = (errno.EACCES, errno.EPERM)
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, *DENIED)
SMALLER = (
    "free memory or lower block_ap.cache.host_gb (a GPU's: device_gb), and the same command continues; or lower the "
    "stage's batch_size, micro_batch_size or seq_len and begin it again with --restart"
)


def explain(error: Exception, *, verbose: bool) -> QatError:
    """The error to report for any exception.

    What nobody foresaw is one sentence too; its traceback goes to a file, and with `verbose` to stderr.
    """
    if isinstance(error, QatError):
        return error
    if isinstance(error, MemoryError):
        return ResourceError(f"out of memory: {error}", hint=SMALLER)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        place = f" ({error.filename})" if error.filename else ""
        denied = error.errno in DENIED
        hint = "check its permissions" if denied else "free space or choose another --run directory"
        text = f"cannot {'access' if denied else 'write'}{place}: {os.strerror(error.errno)}"
        return ResourceError(text, hint=f"{hint}; the same command continues")
    if isinstance(error, FileNotFoundError) and not _stands_somewhere():
        return UsageError("the current directory does not exist any more", hint="change into one that does")
    if "out of memory" in str(error) or "can't allocate memory" in str(error):
        return ResourceError(f"out of memory: {str(error).splitlines()[0]}", hint=SMALLER)
    return _unforeseen(error, verbose)


def own_error(error: BaseException | None) -> BaseException | None:
    """The error of this machine's memory or files that a library's is, or was caused by: no fault of what it read."""
    if error is None or isinstance(error, MemoryError):
        return error
    if isinstance(error, OSError) and error.errno in UNWRITABLE and (error.errno not in DENIED or error.filename):
        return error  # without a file's name it was a connection that was denied
    return own_error(error.__cause__)


def _stands_somewhere() -> bool:
    """Whether there is a current directory."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _unforeseen(error: Exception, verbose: bool) -> QatError:
    """The error for what no one foresaw."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="qat-traceback-", suffix=".txt", delete=False) as file:
            file.write(text)
        where = f"the traceback is in {file.name}"
    except OSError:
        where, verbose = "the traceback stands above", True
    if verbose:
        sys.stderr.write(text)
    reason = " ".join(str(error).split())[:500]
    return QatError(
        f"unforeseen {type(error).__name__}: {reason}", hint=f"{where}; please report it together with the recipe"
    )
