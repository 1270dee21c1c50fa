"""A page to talk to a model: what `vr-jax app` serves.

`Session` asks the models and yields what the page shows; it needs no gradio. `vr_jax.app.page` is the page itself and
the one module that imports gradio.
"""

from vr_jax.app.contract import Answer, Checkpoint, Example, Loader, PageOptions, Settings, Stats, Upload, Variant
from vr_jax.app.models import Models, ModelThread
from vr_jax.app.session import Session
from vr_jax.app.uploads import UploadError, check_uploads

__all__ = [
    "Answer",
    "Checkpoint",
    "Example",
    "Loader",
    "ModelThread",
    "Models",
    "PageOptions",
    "Session",
    "Settings",
    "Stats",
    "Upload",
    "UploadError",
    "Variant",
    "check_uploads",
]
