"""The native kernel library: find it, load it, call it, say what was wrong with a call.

Knows addresses, sizes and status codes; nothing of tensors, formats or files. `quant.formats`
calls it and keeps a torch twin for machines where `get()` is None. Calls release the GIL and block
until their work is done.
`src/mimo.h` is the contract of every entry: layouts, alignment, and what a result depends on.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

from mimo_local.errors import NativeError

ABI_VERSION: Final = 5
BLOCK: Final = 64
"""Weights along a row that share one NF4 scale."""
MAX_THREADS: Final = 256
LIBRARY: Final = "libmimo_kernels.so"
REFERENCE: Final = "reference (slow)"

_CLAMPED: Final = 1
_REFUSED: Final = -1
_NOT_FINITE: Final = -3
_FAILURES: Final = {-2: "no memory for its work area", -4: "an internal failure"}
_REPORT: Final = "This is a bug in mimo-local: please report it with this message."
_REINSTALL: Final = (
    "Install a C++ compiler (g++ 12 or clang 14, or newer), then install mimo-local again."
)

_I32, _I64, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_F32 = ctypes.c_float
_FP8: Final = (_PTR, _I64, _PTR, _I64)
_QUANTIZE: Final = (_I64, _I64, _PTR, _PTR, _I32, _PTR, ctypes.POINTER(_I64))
_SIGNATURES: Final = {
    "mimo_abi_version": (_I32, []),
    "mimo_get_table": (_PTR, [ctypes.c_char_p]),
    "mimo_table_name": (ctypes.c_char_p, [_PTR]),
    "mimo_isa_note": (ctypes.c_char_p, []),
    "mimo_threads": (_I32, []),
    "mimo_default_threads": (_I32, []),
    "mimo_set_threads": (_I32, [_I32]),
    "mimo_matmul": (_I32, [_PTR, _PTR, _PTR, _I64, _I64, _PTR, _I64]),
    "mimo_moe": (_I32, [_PTR, _PTR, _I64, _PTR, _I64, _I64, _PTR, _PTR, _I64, _PTR, _I64, _I32]),
    "mimo_combine": (_I32, [_PTR, _PTR, _PTR, _PTR, _I64, _I64, _I64, _PTR, _I64]),
    "mimo_route": (_I32, [_PTR, _PTR, _PTR, _I64, _I64, _PTR, _PTR]),
    "mimo_attend": (_I32, [_PTR, _PTR, _PTR, _I64, _PTR, _I64, _PTR, _I64]),
    "mimo_rms_norm": (_I32, [_PTR, _PTR, _I64, _I64, _I64, _PTR, _F32, _PTR, _I64]),
    "mimo_attention": (_I32, [_PTR, _PTR, _PTR, _I64, _PTR, _PTR, _PTR, _I64, _PTR]),
    "mimo_mixture": (_I32, [_PTR, _PTR, _PTR, _I64, _PTR]),
    "mimo_layers": (_I32, [_PTR, _PTR, _I64, _PTR, _I64, _PTR, _I64, _PTR, _I64]),
    "mimo_quantize": (_I32, [_PTR, _I64, _PTR, *_QUANTIZE]),
    "mimo_quantize_fp8": (_I32, [_PTR, _I64, _PTR, *_FP8, *_QUANTIZE]),
    "mimo_nf4_feedback": (_I32, [_PTR, *(_PTR, _I64) * 2, _I64, *(_PTR, _I64) * 2, _PTR]),
    "mimo_dequantize": (_I32, [_PTR, _PTR, _PTR]),
    "mimo_read_limit": (_I32, [_PTR, _PTR, _I64, _I64, _PTR]),
    "mimo_product_limit": (_I32, [_PTR, _I64, _PTR, _PTR]),
    "mimo_crc32": (ctypes.c_uint32, [_PTR, ctypes.c_size_t, ctypes.c_uint32]),
}


NF4, MXFP4, INT8, BF16, F32 = range(5)
"""`mimo_format`."""
KV_F32, KV_BF16, KV_INT8 = range(3)
"""`mimo_kv_type`."""
_SCALE_SIZES: Final = {NF4: 2, MXFP4: 1, INT8: 4}


class Matrix(ctypes.Structure):
    """`mimo_matrix`: addresses of a stored matrix W (rows, cols). Keeps no memory alive."""

    _fields_ = (
        ("codes", _PTR),
        ("scales", _PTR),
        ("rows", _I64),
        ("cols", _I64),
        ("format", _I64),
    )

    def facts(self) -> dict[str, int | None]:
        """What an error message may name."""
        return {
            "fmt": self.format,
            "codes_ptr": self.codes,
            "scales_ptr": self.scales,
            "N": self.rows,
            "K": self.cols,
        }


class Mlp(ctypes.Structure):
    """`mimo_mlp`."""

    _fields_ = (("gate", Matrix), ("up", Matrix), ("down", Matrix))


class Router(ctypes.Structure):
    """`mimo_router`."""

    _fields_ = (
        ("weight", _PTR),
        ("bias", _PTR),
        ("E", _I64),
        ("D", _I64),
        ("K", _I64),
        ("n_group", _I64),
        ("topk_group", _I64),
        ("norm", _I64),
        ("scale", _F32),
        ("reserved", _F32),
    )


class Heads(ctypes.Structure):
    """`mimo_heads`."""

    _fields_ = (
        *((name, _I64) for name in ("heads", "kv_heads", "dk", "dv", "window")),
        ("sink", _PTR),
        ("kv_type", _I64),
    )


class Sequence(ctypes.Structure):
    """`mimo_kv`; scales are null where keys and values are floats."""

    _fields_ = (
        *((name, _PTR) for name in ("k", "v", "k_scales", "v_scales")),
        *((name, _I64) for name in ("first", "start", "T")),
    )


class AttentionBlock(ctypes.Structure):
    """`mimo_attention_block`."""

    _fields_ = (
        ("heads", Heads),
        ("qkv", Matrix),
        ("out", Matrix),
        ("norm", _PTR),
        ("eps", _F32),
        ("value_scale", _F32),
        ("rotary", _I64),
    )


class MlpBlock(ctypes.Structure):
    """`mimo_mlp_block`."""

    _fields_ = (
        ("norm", _PTR),
        ("mlps", _PTR),
        ("n_mlps", _I64),
        ("router", _PTR),
        ("eps", _F32),
        ("reserved", _F32),
    )


class Kernels:
    """The library bound to one instruction set.

    Every `*_ptr` is the address of contiguous host memory, sizes are in elements. Wrong arguments
    raise NativeError before anything is read or written; that the memory is as large as the shapes
    say cannot be checked here.
    """

    def __init__(self, library: ctypes.CDLL, path: Path, isa: str | None = None) -> None:
        table = library.mimo_get_table(None if isa is None else isa.encode())
        if not table:
            raise NativeError(
                f"the kernels have no {isa!r} table for this CPU",
                hint=f"This CPU can run: {', '.join(_tables(library))}.",
            )
        self._library = library
        self._table = table
        self.path = path
        self.isa: str = library.mimo_table_name(table).decode()

    @property
    def isas(self) -> tuple[str, ...]:
        """Instruction sets this CPU can run, slowest first, whatever MIMO_ISA says."""
        return _tables(self._library)

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each of MIMO_ISA and MIMO_THREADS that could not be obeyed."""
        isa_note: str = self._library.mimo_isa_note().decode(errors="replace")
        return tuple(note for note in (isa_note, _wished_threads()[1]) if note)

    @property
    def threads(self) -> int:
        """Threads one call may use, the caller's included."""
        return int(self._library.mimo_threads())

    @property
    def default_threads(self) -> int:
        """Physical cores this process may use, cut down to its cgroup's CPU quota."""
        return int(self._library.mimo_default_threads())

    def set_threads(self, n: int) -> None:
        """Use `n` threads, 1..256, from now on in the whole process."""
        if not 1 <= n <= MAX_THREADS:
            raise NativeError(
                f"{n} threads asked of the kernels", hint=f"Choose 1 to {MAX_THREADS} threads."
            )
        if self._library.mimo_set_threads(n) != 0:
            raise NativeError(f"the kernels could not switch to {n} threads", hint=_REPORT)

    def with_isa(self, isa: str) -> Kernels:
        """The library bound to its table `isa`; NativeError if this CPU lacks it."""
        return Kernels(self._library, self.path, isa)

    @property
    def table(self) -> int:
        """Address of the table of this instruction set: first argument of the library's calls."""
        return int(self._table)

    def call(self, name: str, *arguments: object) -> None:
        """`mimo_<name>(table, *arguments)`; NativeError if the library refuses or fails."""
        status = getattr(self._library, "mimo_" + name)(self._table, *arguments)
        if status:
            raise _error(name, status)

    def matmul(self, w: Matrix, x_ptr: int, ldx: int, T: int, y_ptr: int, ldy: int) -> None:
        """y (T, rows) f32 = x (T, cols) f32 @ W^T; ldx, ldy = elements from row to row."""
        status = self._library.mimo_matmul(self._table, ctypes.byref(w), x_ptr, ldx, T, y_ptr, ldy)
        if status:
            raise _error("matmul", status, {**w.facts(), **_without_self(locals())})

    def quantize(
        self, fmt: int, w_ptr: int, N: int, K: int, codes_ptr: int, scales_ptr: int, search: bool,
        *fp8: int, importance_ptr: int | None = None,
    ) -> int:  # fmt: skip
        """w (N, K) -> how many blocks had a weight beyond the scale's range, clamped to it.

        `search` keeps the scale with the least squared error; importance: (K) f32, of columns.
        fp8: w is FP8; grid_ptr, G, row_of_ptr, block. NaN, infinity: a NativeError names the row.
        """
        name, info = "quantize_fp8" if fp8 else "quantize", _I64(0)
        status = getattr(self._library, "mimo_" + name)(
            self._table, fmt, w_ptr, *fp8, N, K, codes_ptr, scales_ptr, search, importance_ptr, info
        )
        if status not in (0, _CLAMPED):
            raise _error(name, status, _without_self(locals()))
        return info.value

    def dequantize(self, w: Matrix, out_ptr: int) -> None:
        """-> out (rows, cols) float32."""
        status = self._library.mimo_dequantize(self._table, ctypes.byref(w), out_ptr)
        if status:
            raise _error("dequantize", status, {**w.facts(), **_without_self(locals())})

    def crc32(self, ptr: int, n: int, seed: int = 0) -> int:
        """zlib.crc32 of `n` bytes; `seed` is the value of the bytes before them."""
        if n < 0 or (n > 0 and not ptr):
            raise _error("crc32", _REFUSED, {"ptr": ptr, "n": n})
        return int(self._library.mimo_crc32(ptr, n, seed))


def get() -> Kernels | None:
    """The library with the best table of this CPU (MIMO_ISA may lower it), or None. Cached."""
    return _load()[0]


def loaded() -> Kernels:
    """As `get`, for callers that know it is there; NativeError if it is not after all."""
    kernels = get()
    if kernels is None:
        raise NativeError("the native kernels are not loaded", hint=why_unavailable())
    return kernels


def why_unavailable() -> str:
    """Why get() is None, in one sentence with the next step; "" when it is not."""
    return _load()[1]


def describe() -> str:
    """ "amx", "avx512", "avx_vnni", "avx2", "scalar", or "reference (slow)" without the library."""
    kernels = get()
    return REFERENCE if kernels is None else kernels.isa


@cache
def _load() -> tuple[Kernels | None, str]:
    wish = os.environ.get("MIMO_KERNELS", "").strip().lower()
    if wish in ("off", "0", "no", "false"):
        return None, f"The native kernels are switched off by MIMO_KERNELS={wish}."
    reasons = []
    for path in _candidates():
        try:
            kernels = Kernels(_open(path), path)
        except NativeError as error:
            reasons.append(f"{error.message}. {error.hint}")
            continue
        threads = _wished_threads()[0]
        if threads is not None:
            kernels.set_threads(threads)
        return kernels, ""
    return None, reasons[0] if reasons else f"{LIBRARY} is not installed. {_REINSTALL}"


def _candidates() -> Iterator[Path]:
    """Beside this file, elsewhere in the package (editable installs), among its resources."""
    paths = [folder / LIBRARY for folder in (Path(__file__).parent, *map(Path, __path__))]
    resource = importlib.resources.files(__name__).joinpath(LIBRARY)
    if isinstance(resource, Path):
        paths.append(resource)
    yield from (path for path in dict.fromkeys(paths) if path.is_file())


def _open(path: Path) -> ctypes.CDLL:
    """Loads the library and checks that it speaks this file's ABI."""
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype = result
            function.argtypes = arguments
            if name == "mimo_abi_version" and (found := function()) != ABI_VERSION:
                raise NativeError(
                    f"{path} has ABI version {found}, this mimo-local needs {ABI_VERSION}",
                    hint="Install mimo-local again: the library is of another version.",
                )
    except (OSError, AttributeError) as error:
        raise NativeError(f"{path} cannot be loaded: {error}", hint=_REINSTALL) from error
    return library


def _tables(library: ctypes.CDLL) -> tuple[str, ...]:
    names = ("scalar", "avx2", "avx_vnni", "avx512", "amx")
    return tuple(name for name in names if library.mimo_get_table(name.encode()))


def _wished_threads() -> tuple[int | None, str]:
    """MIMO_THREADS as a number, and a note if it is not one."""
    wish = os.environ.get("MIMO_THREADS", "").strip()
    if not wish:
        return None, ""
    if wish.isdecimal() and 1 <= int(wish) <= MAX_THREADS:
        return int(wish), ""
    return None, f"MIMO_THREADS={wish[:32]} is not a number from 1 to {MAX_THREADS}; ignored"


def _without_self(arguments: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in arguments.items() if name != "self"}


def _error(name: str, status: int, arguments: dict[str, object] | None = None) -> NativeError:
    """The error for a status: for refused arguments, the first one that cannot be right."""
    arguments = arguments or {}
    given = {k: v for k, v in arguments.items() if isinstance(v, int) or v is None}
    if status == _NOT_FINITE:
        info = arguments["info"]
        row = info.value if isinstance(info, _I64) else -1
        return NativeError(
            f"{name}: row {row} of {given['N']} holds NaN or infinity",
            hint="The source checkpoint is damaged: check its download (sizes, checksums).",
        )
    if status == _REFUSED:
        return NativeError(f"{name}: {_culprit(given)}", hint=_REPORT)
    reason = _FAILURES.get(status, f"status {status}")
    return NativeError(f"{name}: the kernel library reports {reason}", hint=_REPORT)


def _culprit(given: dict[str, int | None]) -> str:
    fmt = given.get("fmt")
    if fmt is not None and not NF4 <= fmt <= F32:
        return f"format {fmt} is unknown"
    scale_size = 0 if fmt is None else _SCALE_SIZES.get(fmt, 0)
    code_size = {BF16: 2, F32: 4}.get(-1 if fmt is None else fmt, 1)
    sizes = {"codes_ptr": code_size, "scales_ptr": scale_size, "ptr": 1}
    for key, value in given.items():
        if key.endswith("ptr"):
            size = sizes.get(key, 4)
            if not size:
                continue
            if not value:
                return f"{key} is null"
            if value % size:
                return f"{key}={value:#x} is not aligned to {size} bytes"
        elif value is not None and value < (1 if key == "K" else 0) and key in "T N K n":
            return f"{key}={value} is out of range"
    K = given.get("K") or 0
    if fmt in (NF4, MXFP4) and K % BLOCK:
        return f"K={K} is not a multiple of {BLOCK}"
    for key, least in (("ldx", K), ("ldy", given.get("N") or 0)):
        if (value := given.get(key)) is not None and value < least:
            return f"{key}={value} is less than a row of {least}"
    if not given:
        return "the library refuses the arguments"
    return "sizes beyond the address space: " + ", ".join(f"{k}={v}" for k, v in given.items())
