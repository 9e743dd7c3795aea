"""Runtimes run in forks of a process that has imported what all of them need: `python preloaded.py`.

One JSON object {"arguments", "environment", "output"} per line in, one exit status per line out; stderr of the command
goes to "output". A process of their own each all the same: only seconds of imports are saved.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, NoReturn

import transformers.generation
import transformers.models.llama.modeling_llama  # noqa: F401

from qatcli.formats.runtimes import child


def serve_one(request: dict[str, Any]) -> NoReturn:
    """The command, ending the process as an interpreter would."""
    os.environ.clear()
    os.environ.update(request["environment"])
    errors = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    status = 1
    try:
        child.main(*request["arguments"])
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


for line in sys.stdin:
    process = os.fork()
    if process == 0:
        serve_one(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
