"""llama.cpp behind the interface of bench/engine_worker.py, by its C functions and token ids.

Batches are as long as the prompt; keys and values have its default type (16 bits). Runs under the
Python that bench/llamacpp_build.py made; knows nothing of this project but its errors.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimo_local.errors import UsageError


class LlamaCpp:
    """llama.cpp by its C interface, with a thread pool of its own as llama-bench uses it."""

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        batch: int,
        threads: int,
        mmap: bool = True,
        repack: bool = True,
    ) -> None:
        """`mmap`: weights stay in the file's pages, which the system may take away meanwhile.

        `repack`: formats with a faster layout for this CPU are copied into it while loading; such
        a copy is memory that the system cannot take away.
        """
        self.lib: Any = importlib.import_module("llama_cpp")
        start = time.perf_counter()
        self.lib.llama_backend_init()
        params = self.lib.llama_model_default_params()
        params.use_mmap, params.use_extra_bufts = mmap, repack
        self.model = self.lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise UsageError(f"llama.cpp cannot load {path}", hint="see the lines above")
        wish = self.lib.llama_context_default_params()
        wish.n_ctx, wish.n_batch, wish.n_ubatch = context, batch, batch
        wish.n_threads = wish.n_threads_batch = threads
        self.ctx = self.lib.llama_init_from_model(self.model, wish)
        if not self.ctx:
            raise UsageError(f"llama.cpp has no context of {context}", hint="see the lines above")
        self.batch = self.lib.llama_batch_init(batch, 0, 1)
        self.pools: dict[int, ctypes.c_void_p] = {}
        self.load_s, self.threads, self.position = 0.0, threads, 0
        vocab = self.lib.llama_model_get_vocab(self.model)
        self.vocab: int = self.lib.llama_vocab_n_tokens(vocab)
        self.set_threads(threads)
        self.load_s = time.perf_counter() - start

    def info(self) -> dict[str, Any]:
        """Engine, binding's version, CPU features of the build, model."""
        text = ctypes.create_string_buffer(256)
        self.lib.llama_model_desc(self.model, text, 256)
        return {
            "engine": "llama.cpp",
            "version": f"llama-cpp-python {self.lib.__version__}",
            "isa": self.lib.llama_print_system_info().decode().strip(),
            "model": text.value.decode(),
            "bytes": self.lib.llama_model_size(self.model),
            "vocab": self.vocab,
            "threads": self.threads,
            "load_s": round(self.load_s, 1),
        }

    def meters(self) -> dict[str, Any]:
        """It has none."""
        return {}

    def set_threads(self, n: int) -> None:
        """A new pool: without one, a build without OpenMP starts threads for every token.

        Through the binding's own handle, which finds ggml's functions as well: the wheel holds
        three copies of each library, and a pool from another copy crashes.
        """
        ggml, params = self.lib.llama_cpp._lib, _ThreadpoolParams()
        if n not in self.pools:  # none is freed: the context pauses the old one when it changes
            ggml.ggml_threadpool_params_init(ctypes.byref(params), ctypes.c_int(n))
            ggml.ggml_threadpool_new.restype = ctypes.c_void_p
            self.pools[n] = ctypes.c_void_p(ggml.ggml_threadpool_new(ctypes.byref(params)))
        context = ctypes.c_void_p(ctypes.cast(self.ctx, ctypes.c_void_p).value)
        ggml.llama_attach_threadpool(context, self.pools[n], self.pools[n])
        self.lib.llama_set_n_threads(self.ctx, n, n)
        self.threads = n

    def reset(self) -> None:
        """Empty the cache."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.ctx), True)
        self.position = 0

    def feed(self, ids: Sequence[int], outputs: str) -> None:
        """One llama_decode of all ids."""
        batch, n = self.batch, len(ids)
        batch.n_tokens = n
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, self.position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = outputs == "all" or i == n - 1
        status = self.lib.llama_decode(self.ctx, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gives {status} at position {self.position}")
        self.lib.llama_get_logits(self.ctx)  # waits for them
        self.position += n


class _ThreadpoolParams(ctypes.Structure):
    """ggml.h, struct ggml_threadpool_params."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )
