"""Stands in for the compiled module `detectron2._C`, which this pure-Python build of Detectron2 0.5 does not have.

The three functions that Detectron2's environment report asks for are here. Any other name raises an AttributeError that
says what is missing and which layers need it.
"""


def get_compiler_version():
    return "none (pure-Python build)"


def get_cuda_version():
    return "not available"


def has_cuda():
    return False


def __getattr__(name):
    raise AttributeError(
        f"detectron2._C.{name} is a compiled operator, and this pure-Python build of Detectron2 has none. "
        "Rotated boxes, deformable convolution and the C++ COCO evaluation need a Detectron2 built from source."
    )
