"""Prompt templates, such as `{red|blue} __animal__`, expanded by dynamicprompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from farm.errors import InvalidRequest

if TYPE_CHECKING:
    from dynamicprompts.wildcards.values import WildcardValues

Fields = dict[str, object]
"""A line of an input, as farm.domain.inputs defines it."""

COMBINATIONS = 1000
"""Maximum number of combinations of a template, unless a count is given."""


@dataclass(frozen=True)
class Templates:
    """Options for expanding templates."""

    way: str
    """Either `combinatorial` or `random`."""
    count: int | None = None
    """Number of prompts from each template. Default: 1 if random, else all combinations."""
    seed: int = 0
    wildcards: Path | None = None
    """Folder with a file `NAME.txt` for each wildcard `__NAME__`."""


def expanded(
    lines: Iterable[tuple[str, Fields]], templates: Templates
) -> Iterator[tuple[str, Fields]]:
    """Expand templates to prompts.

    A line with the key `KEY` becomes lines with the keys `KEY-0`, `KEY-1`, …

    Args:
        lines: pairs of a place, such as `a.txt, line 2`, and the fields of its line.
        templates: the options.

    Raises:
        InvalidRequest: a template cannot be read, or a wildcard has no values. Or its combinations
            repeat, or there are more than `COMBINATIONS` and no count is given.
    """
    generate = _generator(templates)
    for where, line in lines:
        template = str(line["prompt"])
        try:
            prompts = generate(template)
        except RecursionError as error:
            raise InvalidRequest(
                f"{where}: the template never ends, because a wildcard refers to itself."
            ) from error
        except InvalidRequest as error:
            raise InvalidRequest(f"{where}: {error.message}") from error
        except Exception as error:  # the parser raises exceptions of several types
            raise InvalidRequest(
                f"{where}: the template {template[:100]!r} cannot be read: {error}."
            ) from error
        for number, prompt in enumerate(prompts):
            copy: Fields = {**line, "prompt": prompt}
            if "key" in line:
                copy["key"] = f"{line['key']}-{number}"
            yield where, copy


def _generator(templates: Templates) -> Callable[[str], Sequence[str]]:
    from dynamicprompts.generators import CombinatorialPromptGenerator, RandomPromptGenerator
    from dynamicprompts.wildcards import WildcardManager

    class Wildcards(WildcardManager):
        """Refuse a wildcard without values: the library would leave its name in the prompt."""

        def get_values(self, wildcard: str) -> WildcardValues:
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
    # Ask for one more than wanted, to see if there are more.
    found = generate(template, (count or COMBINATIONS) + 1)
    if count is None and len(found) > COMBINATIONS:
        raise InvalidRequest(
            f"the template has more than {COMBINATIONS} combinations. Set a number with "
            "--template-count, or use --templates random."
        )
    found = found[:count]
    if repeated := len(found) - len(set(found)):
        twice = next(prompt for prompt in found if found.count(prompt) > 1)
        raise InvalidRequest(
            f"the template repeats {repeated} of its {len(found)} combinations, such as "
            f"{twice[:100]!r}. Remove the repeated variants."
        )
    return found


def _no_wildcard(wildcard: str, there: Iterable[str], folder: Path | None) -> InvalidRequest:
    name = wildcard.strip("_")
    if folder is None:
        return InvalidRequest(
            f"the wildcard __{name}__ has no values. Pass the folder that has {name}.txt with "
            "--wildcards DIR."
        )
    names = ", ".join(sorted(there)[:20]) or "none"
    return InvalidRequest(
        f"the wildcard __{name}__ has no values: {folder} has no {name}.txt, or it is empty. "
        f"Wildcards in that folder: {names}."
    )
