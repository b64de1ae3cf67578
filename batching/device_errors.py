"""Which errors leave a device unusable for the rest of the process's life.

A CUDA context keeps an error such as an illegal memory access or a failed device-side assert, and answers every later
call with it ("sticky" in NVIDIA's documentation of cudaGetLastError): only a new process can use the device again.
"""

SHORTAGE = ("out of memory", "ALLOC_FAILED")
"""CUDA errors that pass once memory is free."""


def is_sticky(error: BaseException) -> bool:
    """Whether only a restart helps after this error. Known by name and text, so that torch need not be imported."""
    text = str(error)
    if any(shortage in text for shortage in SHORTAGE):
        return False
    return "CUDA error" in text or any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)
