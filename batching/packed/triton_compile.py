"""Compiling Triton kernels on many threads at once, instead of each when it is first launched.

Worker thread only.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime.jit import JITFunction


@contextmanager
def compiled_together() -> Iterator[None]:
    """Kernels that are launched inside do not run; at the end all of them are compiled, or loaded from Triton's cache.

    What they would have written must not decide what is launched after them.
    """
    launch = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(kernel, *args, grid=grid, warmup=True, **options)

    with ThreadPoolExecutor(os.cpu_count()) as threads, triton.AsyncCompileMode(threads):
        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = launch
