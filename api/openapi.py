"""The OpenAPI document, with the full schema of a job and the real media type of problems."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api import schemas
from api.errors import MEDIA_TYPE
from farm.config import Settings
from farm.context import Farm
from farm.domain.spec import JobSpec, Priority
from farm.pipelines.families import all_families

REFUSALS = {
    400: "The body is not JSON, or has text that cannot be stored.",
    401: "The API key is missing, unknown or revoked.",
    403: "The key's role does not allow this call, or it sees its own tenant only.",
    404: "It does not exist, or it belongs to another tenant.",
    409: "The call conflicts with the stored state.",
    413: "The body is too large.",
    422: "A value is not allowed for its field. `error.param` names the field.",
    429: "The tenant would have more than its operator allows, or sends requests too fast. `limit`"
    " names the limit.",
    500: "The pictures could not be rendered.",
    503: "A server that the farm needs does not answer. Try again.",
    504: "The job did not end while the call waited. It goes on.",
}

Responses = dict[int | str, dict[str, Any]]


def refusals(*statuses: int) -> Responses:
    """Return the OpenAPI responses for the error statuses of a call."""
    return {
        status: {"model": schemas.Problem, "description": REFUSALS[status]} for status in statuses
    }


def schema_of(name: str) -> dict[str, str]:
    """Return a reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def describe(app: FastAPI) -> dict[str, Any]:
    """Build the app's OpenAPI document."""
    document: dict[str, Any] = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        routes=app.routes,
        webhooks=app.webhooks.routes,
    )
    known = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        known.pop(name, None)
    for calls in document["paths"].values():
        for call in calls.values():
            _without_null(call.get("parameters", []))
            _mark_problems(call["responses"])
    farm: Farm = app.state.farm
    known["TenantState"] = schemas.TenantState.model_json_schema()
    known["JobSpec"] = job_schema(sorted(farm.catalog.pipelines), farm.settings)
    document["paths"]["/v1/jobs"]["post"]["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}}},
    }
    return document


def _without_null(parameters: list[dict[str, Any]]) -> None:
    """Drop the form `null` of optional parameters: a query or a header cannot hold it."""
    for parameter in parameters:
        forms = parameter["schema"].pop("anyOf", [])
        for form in forms:
            if form != {"type": "null"}:
                parameter["schema"].update(form)


def _mark_problems(responses: dict[str, Any]) -> None:
    for response in responses.values():
        schema = response.get("content", {}).get("application/json", {}).get("schema", {})
        if schema.get("$ref", "").endswith("/Problem"):
            response["content"] = {MEDIA_TYPE: {"schema": schema}}


def job_schema(pipelines: list[str], settings: Settings) -> dict[str, Any]:
    """Build the JSON Schema of a job as submitted.

    It has the job's own fields with this farm's limits, and the parameters of every family. The
    grid may have these parameters too.
    """
    schema = JobSpec.model_json_schema()
    webhook = schema.pop("$defs")["NamedWebhook"]
    fields, parameters = schema["properties"], _parameters()
    fields.pop("params")
    fields["pipeline"]["enum"] = pipelines
    for name in ("prompts", "input"):  # null means the same as no value, so it is not shown
        fields[name] |= fields[name].pop("anyOf")[0]
        fields[name].pop("default")
    schema["oneOf"] = [{"required": ["prompts"]}, {"required": ["input"]}]
    fields["webhook"] |= {"anyOf": [webhook, {"type": "null"}]}
    fields["prompts"]["maxItems"] = settings.max_job_prompts
    fields["prompts"]["items"]["maxLength"] = settings.max_prompt_chars
    fields["input"]["format"] = "uuid"
    fields["images_per_prompt"]["maximum"] = settings.max_job_frames
    fields["priority"]["enum"] = [priority.wire for priority in Priority]
    parameters["negative_prompt"]["maxLength"] = settings.max_prompt_chars
    fields["grid"]["additionalProperties"] = False
    fields["grid"]["properties"] = {
        name: {"type": "array", "items": parameter, "minItems": 1}
        for name, parameter in parameters.items()
    }
    schema["properties"] = {**fields, **parameters}
    schema["description"] = (
        "A job as submitted. `GET /v1/pipelines` lists the parameters of each pipeline, with its "
        "defaults and limits."
    )
    return schema


def _parameters() -> dict[str, Any]:
    """Return the parameters of every family. If two families differ, both forms are allowed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for family in all_families().values():
        for name, field in family.params.json_schema()["properties"].items():
            forms = found.setdefault(name, [])
            if field not in forms:
                forms.append(field)
    return {
        name: forms[0] if len(forms) == 1 else {"anyOf": forms} for name, forms in found.items()
    }
