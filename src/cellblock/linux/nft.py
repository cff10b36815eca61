"""nftables in this process, through libnftables: one command text is one kernel transaction."""

from __future__ import annotations

import ctypes
import json
import threading
from typing import Any

from ..errors import HostSetupError

_LIBRARY = "libnftables.so.1"
_OUTPUT_JSON = 1 << 4
# The library keeps state of its parser in the process; contexts of several threads take turns.
_turn = threading.Lock()
_loaded: ctypes.CDLL | None = None


class NftError(Exception):
    """The kernel or the library refused a command; the text says which and why."""


class Nft:
    """A context. It stays with the network namespace in which it was made, whoever uses it."""

    def __init__(self) -> None:
        """Raises :class:`HostSetupError` when the library is missing."""
        self._lib = _library()
        with _turn:
            self._context = self._lib.nft_ctx_new(0)
            if not self._context:
                raise NftError("no context could be made: out of memory or descriptors")
            self._lib.nft_ctx_buffer_output(self._context)
            self._lib.nft_ctx_buffer_error(self._context)

    def run(self, commands: str) -> None:
        """Does all of ``commands`` in one transaction, or none of it; raises :class:`NftError`."""
        with _turn:
            self._run(commands, 0)

    def ask(self, command: str) -> list[dict[str, Any]]:
        """The objects of a ``list`` command, each as {kind: fields}; raises :class:`NftError`."""
        with _turn:
            text = self._run(command, _OUTPUT_JSON)
        answer: list[dict[str, Any]] = json.loads(text)["nftables"] if text else []
        return [entry for entry in answer if "metainfo" not in entry]

    def close(self) -> None:
        if self._context:
            with _turn:
                self._lib.nft_ctx_free(self._context)
            self._context = None

    def _run(self, commands: str, flags: int) -> bytes:
        self._lib.nft_ctx_output_set_flags(self._context, flags)
        failed = self._lib.nft_run_cmd_from_buffer(self._context, commands.encode())
        output: bytes = self._lib.nft_ctx_get_output_buffer(self._context) or b""
        error: bytes = self._lib.nft_ctx_get_error_buffer(self._context) or b""
        if failed:
            raise NftError(_first_line(error.decode("utf-8", "replace")))
        return output


def _first_line(text: str) -> str:
    """The complaint, without the place in a text that its reader never wrote."""
    line = text.strip().partition("\n")[0]
    return line.partition("Error: ")[2] or line or "no reason given"


def _library() -> ctypes.CDLL:
    global _loaded
    with _turn:
        if _loaded is None:
            try:
                library = ctypes.CDLL(_LIBRARY)
            except OSError:
                raise HostSetupError(
                    _LIBRARY, "is missing", "install the package libnftables1"
                ) from None
            library.nft_ctx_new.restype = ctypes.c_void_p
            library.nft_ctx_new.argtypes = [ctypes.c_uint32]
            library.nft_ctx_free.restype = None
            library.nft_ctx_free.argtypes = [ctypes.c_void_p]
            library.nft_ctx_output_set_flags.restype = None
            library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
            library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
            for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
                getattr(library, name).restype = ctypes.c_char_p
                getattr(library, name).argtypes = [ctypes.c_void_p]
            for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error"):
                getattr(library, name).argtypes = [ctypes.c_void_p]
            _loaded = library
        return _loaded
