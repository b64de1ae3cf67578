"""Triton's interpreter without half of its work: the language that a kernel is read in is prepared once, not anew for
each function that the kernel calls."""

from typing import Any

from triton.runtime import interpreter


class PreparedOnce:
    """In place of `_patch_lang`: the first call for a module prepares its language, later ones do nothing. When the
    kernel, whose call is the first of all, has ended, its language is restored and everything is prepared anew."""

    def __init__(self) -> None:
        self._prepare: Any = interpreter._patch_lang
        self._modules: set[str] = set()

    def __call__(self, function: Any) -> Any:
        if function.__module__ in self._modules:
            return None
        is_kernel = not self._modules
        self._modules.add(function.__module__)
        scope = self._prepare(function)
        if is_kernel and scope is not None:  # older ones undo nothing
            self._forget_after(scope)
        return scope

    def _forget_after(self, scope: Any) -> None:
        restore = scope.restore

        def ended() -> None:
            self._modules.clear()
            restore()

        scope.restore = ended
