"""llama.cpp on the CPU through its C interface: logits and tokens.

The library is the one inside the package `xllamacpp`, whose wheels are built for any Linux; its Python interface is a
server, which does not give logits at every position, so the exported C functions are called with ctypes. Parameter
structures are passed as opaque bytes filled by llama.cpp's own default functions: they grow from release to release,
and only the first three fields of the context's (n_ctx, n_batch, n_ubatch) are set here.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

_OPAQUE_BYTES = 1024  # more than any release's parameters; the callee reads and writes its own size only
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _Opaque(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint32 * (_OPAQUE_BYTES // 4))]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG, ctypes.c_void_p]),
    "llama_model_default_params": (_Opaque, []),
    "llama_context_default_params": (_Opaque, []),
    "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, _Opaque]),
    "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, _Opaque]),
    "llama_set_n_threads": (None, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]),
    "llama_model_get_vocab": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_get_memory": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_memory_clear": (None, [ctypes.c_void_p, ctypes.c_bool]),
    "llama_batch_init": (_Batch, [ctypes.c_int32] * 3),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]),
    "llama_tokenize": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_int32,
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_bool,
            ctypes.c_bool,
        ],
    ),
    "llama_free": (None, [ctypes.c_void_p]),
    "llama_model_free": (None, [ctypes.c_void_p]),
}


_errors: list[str] = []
_ERROR = 4  # ggml_log_level


def _keep_errors(level: int, text: bytes, user: Any) -> None:
    """llama.cpp's messages are not shown; its errors explain a refusal."""
    if level == _ERROR:
        _errors.append(text.decode(errors="replace").strip())


def _library() -> Any:
    import xllamacpp.xllamacpp

    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_LOG_CALLBACK = _LOG(_keep_errors)  # kept alive here: ctypes does not


class LlamaCpp:
    """A GGUF model in llama.cpp; use it as a context manager."""

    def __init__(self, file: Path, *, context: int = 512, threads: int = 1) -> None:
        """Raises ValueError when llama.cpp refuses the file."""
        self._library = library = _library()
        library.llama_log_set(_LOG_CALLBACK, None)
        library.llama_backend_init()
        self._model = library.llama_model_load_from_file(str(file).encode(), library.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp refuses {file.name}: {'; '.join(_errors)}")
        parameters = library.llama_context_default_params()
        parameters.words[0:3] = [context] * 3
        self._context = library.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise ValueError(f"llama.cpp makes no context of {context} tokens for {file.name}")
        library.llama_set_n_threads(self._context, threads, threads)
        self._vocabulary = library.llama_model_get_vocab(self._model)
        self._size: int = library.llama_vocab_n_tokens(self._vocabulary)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids by llama.cpp's own tokenizer, from the file's metadata."""
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 16))()
        count = self._library.llama_tokenize(self._vocabulary, raw, len(raw), ids, len(ids), add_special, False)
        return list(ids[:count])

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits fp32 [T, V] at every position of `ids`, from an empty context. RuntimeError when decoding fails."""
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        batch = library.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            code = library.llama_decode(self._context, batch)
            if code != 0:
                raise RuntimeError(f"llama_decode failed with code {code}")
            values = np.ctypeslib.as_array(library.llama_get_logits(self._context), (len(ids), self._size))
            return values.astype(np.float32, copy=True)
        finally:
            library.llama_batch_free(batch)
