"""Prompts that are templates, such as `{red|blue} __animal__`: dynamicprompts fills them in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farm.errors import InvalidRequest

COMBINATIONS = 1000
"""Of a template, at most, unless told otherwise"""


@dataclass(frozen=True)
class Templates:
    """How templates become prompts."""

    way: str
    """combinatorial or random"""
    count: int | None = None
    """of each template: 1 at random unless given; else so many of its combinations"""
    seed: int = 0
    wildcards: Path | None = None
    """a folder of `NAME.txt`, for `__NAME__`"""


def expanded(
    lines: Iterable[tuple[str, dict[str, Any]]], templates: Templates
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Make prompts of templates.

    A line with a key gives lines with `KEY-0`, `KEY-1`, …

    Args:
        lines: fields, each after where they stand.
        templates: how.

    Raises:
        InvalidRequest: a template cannot be read, or names a wildcard that is not there; or its
            combinations repeat, or are more than `COMBINATIONS` and no count is given.
    """
    generate = _generator(templates)
    for where, line in lines:
        try:
            prompts = generate(line["prompt"])
        except RecursionError as error:
            raise InvalidRequest(
                f"{where}: the template never ends: a wildcard of it names itself."
            ) from error
        except InvalidRequest as error:
            raise InvalidRequest(f"{where}: {error.message}") from error
        except Exception as error:  # its parser has errors of several kinds
            raise InvalidRequest(
                f"{where}: the template {line['prompt'][:100]!r} cannot be read: {error}."
            ) from error
        for number, prompt in enumerate(prompts):
            key = {"key": f"{line['key']}-{number}"} if "key" in line else {}
            yield where, {**line, "prompt": prompt, **key}


def _generator(templates: Templates) -> Callable[[str], Sequence[str]]:
    from dynamicprompts.generators import CombinatorialPromptGenerator, RandomPromptGenerator
    from dynamicprompts.wildcards import WildcardManager

    class Wildcards(WildcardManager):
        """Refuses a wildcard without values: the library would leave its name in the prompt."""

        def get_values(self, wildcard: str) -> Any:
            values = super().get_values(wildcard)
            if not values:
                raise _no_wildcard(wildcard, self.get_collection_names(), templates.wildcards)
            return values

    wildcards = Wildcards(templates.wildcards)
    if templates.way == "combinatorial":
        every = CombinatorialPromptGenerator(wildcards)
        return lambda template: _combinations(every.generate, template, templates.count)
    drawn = RandomPromptGenerator(wildcards, seed=templates.seed)
    return lambda template: drawn.generate(template, templates.count or 1)


def _combinations(
    generate: Callable[[str, int], Sequence[str]], template: str, count: int | None
) -> Sequence[str]:
    # One more than are wanted: so it shows whether there are more.
    found = generate(template, (count or COMBINATIONS) + 1)
    if count is None and len(found) > COMBINATIONS:
        raise InvalidRequest(
            f"the template has more than {COMBINATIONS} combinations: say how many are wanted, "
            "with --template-count, or draw some with --templates random."
        )
    found = found[:count]
    if repeated := len(found) - len(set(found)):
        twice = next(prompt for prompt in found if found.count(prompt) > 1)
        raise InvalidRequest(
            f"the template gives {repeated} of its {len(found)} combinations again, such as "
            f"{twice[:100]!r}: remove what is repeated."
        )
    return found


def _no_wildcard(wildcard: str, there: Iterable[str], folder: Path | None) -> InvalidRequest:
    name = wildcard.strip("_")
    if folder is None:
        return InvalidRequest(
            f"the wildcard __{name}__ has no values: give the folder of {name}.txt, with "
            "--wildcards."
        )
    names = ", ".join(sorted(there)[:20]) or "none"
    return InvalidRequest(
        f"the wildcard __{name}__ has no values: {folder} has no {name}.txt, or it is empty; "
        f"there are {names}."
    )
