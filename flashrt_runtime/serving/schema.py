"""The schema of /predict's body for the OpenAPI page: that body is read by hand, off the event loop."""

from __future__ import annotations

from typing import Any

from .requests import MAX_PROMPT, PredictRequest
from .service import Service

FILE = {"type": "string", "format": "binary"}
BASE64 = {"type": "string", "format": "byte"}


def request_body(service: Service) -> dict[str, Any]:
    """What a request for this policy looks like, in each of the three encodings."""
    message = "A map with the keys of the JSON body, images as NumPy arrays packed as openpi-client does, or "
    return {
        "required": True,
        "content": {
            "application/json": {"schema": _json(service)},
            "multipart/form-data": {"schema": _form(service)},
            "application/msgpack": {"schema": {**FILE, "description": message + "an openpi observation"}},
        },
    }


def _json(service: Service) -> dict[str, Any]:
    """`PredictRequest` with this policy's views and widths."""
    spec = service.worker.spec
    schema = PredictRequest.model_json_schema()
    properties = schema["properties"]
    views = list(spec.views)
    absent = {"anyOf": [BASE64, {"type": "null"}]}
    by_name = {
        "type": "object",
        "properties": {view: absent if view in spec.optional_views else BASE64 for view in views},
        "required": views,
        "additionalProperties": False,
    }
    in_order = {"type": "array", "items": BASE64, "minItems": len(views), "maxItems": len(views)}
    if service.settings.default_prompt is None:
        properties["prompt"] = {"type": "string", "minLength": 1, "maxLength": MAX_PROMPT}
        properties["prompt"]["description"] = "What the robot shall do."
        schema["required"].append("prompt")
    for bound in ("minLength", "maxLength", "minItems", "maxItems"):
        properties["images"].pop(bound, None)
    properties["images"]["anyOf"] = [by_name, in_order]
    if spec.state_dim is not None:
        numbers = {"type": "array", "items": {"type": "number"}}
        exact = {"minItems": spec.state_dim, "maxItems": spec.state_dim}
        properties["state"]["anyOf"] = [numbers | exact, {"type": "null"}]
    return schema


def _form(service: Service) -> dict[str, Any]:
    views = list(service.worker.spec.views)
    fields = {
        "prompt": {"type": "string"},
        "state": {"type": "string", "description": "JSON list of numbers"},
        "seed": {"type": "string", "description": "JSON whole number"},
        "deadline_ms": {"type": "string", "description": "JSON number"},
        **dict.fromkeys(views, FILE),
    }
    return {"type": "object", "properties": fields, "required": views}
