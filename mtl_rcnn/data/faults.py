"""Faults in data as values: the loader refuses the first one, `mtl_rcnn.check` lists all and knows how to repair them.

Every rule is written once, as a function that reports what it finds to a `Sink`. What happens then is the sink's
business: `refuse` raises, `list.append` collects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mtl_rcnn.errors import DataError

DROP_ANNOTATION = "annotation"
DROP_IMAGE = "image"


@dataclass(frozen=True)
class Repair:
    """What makes an annotation or an image usable again.

    Attributes:
        name: what is done, such as "clip the box to the image".
        drop: DROP_ANNOTATION, DROP_IMAGE (with its annotations), or "".
        fields: new values of the annotation's fields.
        without: fields that the annotation loses.
    """

    name: str
    drop: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()


DROPPED_ANNOTATION = Repair("leave the annotation out", drop=DROP_ANNOTATION)
DROPPED_IMAGE = Repair("leave the image and its annotations out", drop=DROP_IMAGE)


@dataclass(frozen=True)
class Fault:
    """Something wrong in a dataset.

    Attributes:
        kind: which rule is broken, such as "box outside the image"; faults are counted by it.
        message: where it is, what was found and what was expected, in one line.
        file: annotation or image file; "" until it is known which of several annotation files it is.
        image_id, annotation_id: of what is at fault; None where there is none.
        field: the field of the annotation that is at fault.
        repair: None if only a human can mend it.
        fatal: whether training refuses the data; it copes with the others, not always as one would wish.
    """

    kind: str
    message: str
    file: str = ""
    image_id: int | str | None = None
    annotation_id: int | str | None = None
    field: str = ""
    repair: Repair | None = None
    fatal: bool = True


Sink = Callable[[Fault], None]


def refuse(fault: Fault) -> None:
    """The loader's sink. Raises DataError for a fatal fault, ignores others."""
    if fault.fatal:
        raise DataError(fault.message)
