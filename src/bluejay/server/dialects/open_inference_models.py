"""What the Open Inference Protocol says of models, over HTTP and gRPC alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bluejay.engine.client import Phase
from bluejay.errors import BluejayError, ModelNotFound, RequestError, Stopped, UnsupportedOption
from bluejay.server.dialects.open_inference_tensors import INPUTS, OUTPUTS
from bluejay.server.models import ServedModel

PLATFORM = "bluejay"
VERSION = "1"  # of every model: there is only what is loaded
EXTENSIONS = ("model_repository", "binary_tensor_data", "generate")


def check_version(model: ServedModel, version: str) -> None:
    """Raises: ModelNotFound for any version but the one that there is; "" leaves the choice to the server."""
    if version not in ("", VERSION):
        raise ModelNotFound(f"{model.name} has no version {version[:100]!r}; there is: {VERSION}", "version")


def model_metadata(model: ServedModel) -> dict[str, Any]:
    """What a model takes and gives."""

    def told(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> list[dict[str, Any]]:
        return [{"name": name, "datatype": datatype, "shape": list(shape)} for name, datatype, shape in tensors]

    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": told(INPUTS),
        "outputs": told(OUTPUTS),
    }


def state_of(model: ServedModel) -> dict[str, str]:
    """A model in the repository's index."""
    if model.ready:
        return {"name": model.name, "version": VERSION, "state": "READY", "reason": ""}
    phase = model.state.phase  # an engine is ready a moment before its model is
    reason = "loading" if phase is Phase.READY else str(phase)
    return {"name": model.name, "version": VERSION, "state": "UNAVAILABLE", "reason": reason}


async def load_model(model: ServedModel) -> None:
    """Load a model. Raises: Stopped if that fails; why is for the log."""
    try:
        await model.load()
    except RequestError:
        raise
    except BluejayError:
        raise Stopped(f"{model.name} could not be loaded; the server's log says why") from None


def check_load(parameters: Mapping[str, Any]) -> None:
    """Raises: UnsupportedOption for parameters of loading and unloading that mean anything here."""
    # No model depends on another: whether those go as well makes no difference.
    if unknown := sorted(set(parameters) - {"unload_dependents"}):
        raise UnsupportedOption(
            f"the parameter {unknown[0][:100]!r} is not supported: a model is loaded as the server's settings say",
            "parameters",
        )
