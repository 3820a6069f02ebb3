"""Forms of the pages: their fields, and the verb that they choose, with its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar
from urllib.parse import parse_qs

from fastapi import Depends, Query
from pydantic import BaseModel, ValidationError

from api import schemas
from farm.domain.verbs import Verb
from farm.errors import InvalidRequest, TooLarge

Asked = TypeVar("Asked", bound=BaseModel)

MAX_FORM_BYTES = 65_536
"""Size of a form with a verb. It is parsed on the event loop."""
MAX_FIELDS = 50
MAX_WHY = 500

PAST = {
    Verb.CANCEL: "cancelled",
    Verb.PAUSE: "paused",
    Verb.RESUME: "resumed",
    Verb.RETRY: "tried again",
    Verb.CHANGE: "changed",
    Verb.REMOVE: "removed",
}


class Choice(NamedTuple):
    """A verb and its arguments, as a form has them."""

    verb: Verb | None = None
    reason: str = ""
    priority: str = ""
    """New priority."""
    set_label: str = ""
    """KEY=VALUE."""
    no_label: str = ""
    fault: str = ""

    @property
    def is_complete(self) -> bool:
        """True if nothing more must be chosen."""
        needs = self.verb is Verb.CHANGE and not (self.priority or self.set_label or self.no_label)
        return self.verb is not None and not needs

    def operation(self, wanted: Mapping[str, Any]) -> schemas.OperationAsked:
        """Return the verb on some jobs, as a request of the API.

        Raises:
            InvalidRequest: A field is wrong.
        """
        fields = {
            "verb": self.verb,
            "filter": wanted,
            "reason": self.reason or None,
            "fault": self.fault or None,
            "priority": self.priority or None,
            "labels": self._labels(),
        }
        return checked(schemas.OperationAsked, fields)

    def _labels(self) -> dict[str, str | None]:
        labels: dict[str, str | None] = {}
        if self.set_label:
            key, equals, value = self.set_label.partition("=")
            if not equals:
                raise InvalidRequest(
                    "set_label: type KEY=VALUE, such as team=ann.", param="set_label"
                )
            labels[key.strip()] = value.strip()
        if self.no_label:
            labels[self.no_label] = None
        return labels


Text = Annotated[str, Query(max_length=500)]


def choice(
    verb: Annotated[Verb | Literal[""] | None, Query()] = None,
    reason: Text = "",
    to: Text = "",
    set_label: Text = "",
    no_label: Text = "",
    fault: Text = "",
) -> Choice:
    """Read the verb and its arguments from an address."""
    words = (each.strip() for each in (reason, to, set_label, no_label, fault))
    return Choice(verb or None, *words)


Chosen = Annotated[Choice, Depends(choice)]


def choice_of(verb: Verb, form: Mapping[str, str]) -> Choice:
    """Read the arguments of a verb from a form."""
    named = (
        form.get(name, "").strip() for name in ("reason", "to", "set_label", "no_label", "fault")
    )
    return Choice(verb, *named)


def checked(kind: type[Asked], fields: Mapping[str, Any] | str) -> Asked:
    """Return a request of the API of these fields, or of this JSON.

    Raises:
        InvalidRequest: A field is wrong.
    """
    try:
        if isinstance(fields, str):
            return kind.model_validate_json(fields)
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][-1]) if first["loc"] else "form"
        raise InvalidRequest(f"{name}: {first['msg']}.", param=name) from error


def form_of(body: bytes, most: int = MAX_FORM_BYTES) -> dict[str, str]:
    """Return the fields of a form of `most` bytes, each with its first value.

    Raises:
        TooLarge: The form is too large.
        InvalidRequest: It has too many fields, or a text that cannot be stored.
    """
    if len(body) > most:
        raise TooLarge(f"The form is larger than {most} bytes. Shorten the reason.")
    try:
        fields = parse_qs(body.decode("utf-8", "replace"), max_num_fields=MAX_FIELDS)
    except ValueError as error:
        raise InvalidRequest(f"The form cannot be read: {error}.") from error
    found = {name: values[0] for name, values in fields.items()}
    for name, value in found.items():
        if "\x00" in name + value:
            raise InvalidRequest(
                f"{name.replace(chr(0), '')}: contains the NUL character. Remove it.", param=name
            )
    return found
