"""Every verb of the pages in a real browser: with the mouse, and with the keyboard alone."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pytest
from selenium.webdriver import Keys
from selenium.webdriver.support.select import Select

from farm.context import Farm
from farm.services.operations import take_turn
from farm.store import faults
from farm.store.engine import transaction
from tests.acceptance.test_page import (
    KeyboardOnly,
    api,
    browser,
    chrome,
    job_of_all_states,
    wait_for,
)
from tests.support.api_server import Api
from tests.support.store import register_worker, sql
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

__all__ = ["api", "browser", "chrome"]

Place = Callable[[Api], str]
"""Prepares a farm, and returns the address of a page."""


@dataclass(frozen=True)
class Verb:
    """A verb of a page, and what it should have done."""

    page: Place
    presses: tuple[str, ...]
    """CSS selectors of what is pressed, in this order. `FIELD=>TEXT` types, chooses or ticks."""
    done: str
    """Query whose value is then true."""
    role: str = "operator"
    given: tuple[str, ...] = ()
    """Steps before that, in the same way."""


TICK = "tick"


def in_parts(step: str) -> tuple[str, str | None]:
    """Split `FIELD=>TEXT` into the field and the text."""
    field, arrow, text = step.partition("=>")
    return field, text if arrow else None


def job_page(api: Api) -> str:
    return f"/jobs/{job_of_all_states(api)}"


def ended_job(api: Api) -> str:
    path = job_page(api)
    api.client().post(f"/v1/jobs/{path.rpartition('/')[2]}/cancel").raise_for_status()
    return path


def paused_job(api: Api) -> str:
    path = job_page(api)
    api.client().post(f"/v1/jobs/{path.rpartition('/')[2]}/pause").raise_for_status()
    return path


def jobs_to_change(query: str) -> Place:
    def made(api: Api) -> str:
        job_of_all_states(api)
        return f"/operations/new?{query}"

    return made


def removable(api: Api) -> str:
    ended_job(api)
    sql(api.farm, "UPDATE jobs SET finished_at = now() - interval '1 hour'")
    return "/operations/new?verb=remove"


def paused_jobs(api: Api) -> str:
    paused_job(api)
    return "/operations/new?verb=resume"


def running_operation(api: Api) -> str:
    job_of_all_states(api)
    asked = {"verb": "change", "filter": {}, "labels": {"set": "autumn"}}
    operator = api.client("ops", "operator")
    answer = operator.post("/v1/operations", params={"tenant": "*"}, json=asked)
    return f"/operations/{answer.json()['id']}"


def ticked_job(api: Api) -> str:
    job_of_all_states(api)
    return "/jobs"


def lane(api: Api) -> str:
    job_of_all_states(api)
    return "/lanes/demo"


def held_lane(api: Api) -> str:
    operator = api.client("ops", "operator")
    operator.post("/v1/lanes/demo/hold", params={"why": "driver"}, json={}).raise_for_status()
    return "/lanes/demo"


def draining_lane(api: Api) -> str:
    path = lane(api)
    sql(api.farm, "UPDATE workers SET draining = true")
    return path


def fault_page(api: Api) -> str:
    job_of_all_states(api)
    with transaction(api.farm.store) as connection:
        faults.note(connection, 400)
    return f"/failures/{sql(api.farm, 'SELECT fault FROM faults')[0][0]}"


def key_page(api: Api) -> str:
    api.key("shop")
    found = sql(
        api.farm,
        "SELECT k.id FROM keys k JOIN tenants t ON t.id = k.tenant_id WHERE t.name = 'shop'",
    )
    return f"/system/keys/{found[0][0]}/revoke"


def fixed(path: str) -> Place:
    def made(api: Api) -> str:
        job_of_all_states(api)
        return path

    return made


def started(verb: str) -> str:
    return f"SELECT count(*) = 1 FROM operations WHERE verb = '{verb}'"


BEGIN = ("#why=>ticket 7", "main button.danger, main form.panel button[type=submit]")
CHANGED = "SELECT labels ->> 'set' = 'autumn' AND priority = 2 FROM jobs"
VERBS = {
    "pause a job": Verb(job_page, ("form[action$='/pause'] button",), "SELECT paused FROM jobs"),
    "resume a job": Verb(
        paused_job, ("form[action$='/resume'] button",), "SELECT NOT paused FROM jobs"
    ),
    "cancel a job": Verb(
        job_page,
        (".actions a[href$='/cancel']", "#why=>ticket 7", "main button.danger"),
        "SELECT status = 'cancelled' FROM jobs",
        "client",
    ),
    "retry a job": Verb(
        job_page, ("form[action$='/retry'] button",), "SELECT dead = 0 FROM jobs", "client"
    ),
    "change a job": Verb(
        job_page,
        (
            "[name=to]=>bulk",
            "[name=set_label]=>set=autumn",
            "form[action$='/change'] button",
        ),
        CHANGED,
    ),
    "remove a job": Verb(
        ended_job,
        (".actions a[href$='/remove']", "main button.danger"),
        "SELECT removed_at IS NOT NULL FROM jobs",
    ),
    "cancel many": Verb(jobs_to_change("verb=cancel"), BEGIN, started("cancel")),
    "pause many": Verb(jobs_to_change("verb=pause"), BEGIN, started("pause")),
    "resume many": Verb(paused_jobs, BEGIN, started("resume")),
    "retry many by reason": Verb(
        jobs_to_change("verb=retry&reason=render_error"), BEGIN, started("retry")
    ),
    "change many": Verb(
        jobs_to_change("verb=change&to=bulk&set_label=set%3Dautumn"), BEGIN, started("change")
    ),
    "remove many": Verb(removable, BEGIN, started("remove")),
    "stop an operation": Verb(
        running_operation,
        ("form[action$='/stop'] button",),
        "SELECT state = 'stopped' FROM operations",
    ),
    "hold a lane": Verb(
        lane,
        (
            "#lane-demo summary",
            "#lane-demo [name=priority]=>bulk",
            "#lane-demo [name=minutes]=>90",
            "#lane-demo [name=why]=>new driver",
            "form[action$='/hold'] button",
        ),
        "SELECT count(*) = 1 FROM lanes WHERE held_from = 2 AND held_until IS NOT NULL",
    ),
    "release a lane": Verb(
        held_lane,
        ("form[action$='/release'] button",),
        "SELECT count(*) = 0 FROM lanes WHERE held_from IS NOT NULL",
    ),
    "drain a worker": Verb(
        lane, ("form[action$='/drain'] button",), "SELECT draining FROM workers"
    ),
    "undrain a worker": Verb(
        draining_lane, ("form[action$='/undrain'] button",), "SELECT NOT draining FROM workers"
    ),
    "give a batch back": Verb(
        lane,
        ("form[action$='/give-back'] button",),
        "SELECT count(*) = 1 FROM actions WHERE verb = 'worker.give_back'",
    ),
    "mute a cause": Verb(
        fault_page,
        ("[name=state]=>muted", "[name=note]=>known", "form[action^='/failures/'] button"),
        "SELECT state = 'muted' AND note = 'known' FROM faults",
    ),
    "create a key": Verb(
        fixed("/system/keys"),
        (
            "main form.filter [name=tenant]=>shop",
            "[name=kind]=>viewer",
            "[name=name]=>wall",
            "main form.filter button",
        ),
        "SELECT count(*) = 1 FROM keys WHERE role = 'viewer' AND name = 'wall'",
    ),
    "revoke a key": Verb(
        key_page,
        ("#why=>it leaked", "main button.danger"),
        "SELECT count(*) = 1 FROM keys WHERE revoked_at IS NOT NULL",
    ),
    "save a view": Verb(
        fixed("/jobs?pipeline=demo"),
        (".views [name=name]=>mine", ".views form:last-child button"),
        "SELECT count(*) = 1 FROM saved_views",
        "client",
    ),
    "delete a view": Verb(
        fixed("/jobs?pipeline=demo"),
        (".views span button",),
        "SELECT count(*) = 0 FROM saved_views",
        "client",
        (".views [name=name]=>mine", ".views form:last-child button"),
    ),
    "submit a job again": Verb(
        lambda api: f"{ended_job(api)}/json",
        ("form.submit button.primary",),
        "SELECT count(*) = 2 FROM jobs",
        "client",
    ),
    "cancel the ticked jobs": Verb(
        ticked_job,
        (
            ".job input[type=checkbox]=>tick",
            "#bulk [value=ticked]",
            "main button.danger",
        ),
        "SELECT count(*) = 1 FROM operations",
    ),
    "sign out": Verb(fixed("/jobs"), (".visitor button",), "SELECT count(*) = 0 FROM sessions"),
}


class Mouse:
    """Clicks, and types where it has clicked."""

    def __init__(self, browser: Chrome) -> None:
        self._browser = browser

    def do(self, selector: str, text: str | None) -> None:
        """Click an element, or choose or type a text in it."""
        found = self._browser.find_element("css selector", selector)
        if text in (None, TICK):
            found.click()
        elif found.tag_name == "select":
            Select(found).select_by_visible_text(
                next(each.text for each in Select(found).options if each.text.startswith(text))
            )
        else:
            found.click()
            found.send_keys(text)


class Keyboard:
    """Moves with Tab, and presses keys."""

    def __init__(self, browser: Chrome) -> None:
        self._browser = browser
        self._keys = KeyboardOnly(browser)

    def do(self, selector: str, text: str | None) -> None:
        """Press Enter on an element, or choose or type a text in it."""
        self._keys.focus(selector)
        if text is None:
            self._keys.press(Keys.ENTER)
        elif text == TICK:
            self._keys.press(Keys.SPACE)
        else:
            self._keys.press(text)


@pytest.fixture(params=[Mouse, Keyboard])
def hand(request: pytest.FixtureRequest, browser: Chrome) -> Mouse | Keyboard:
    chosen: type[Mouse] | type[Keyboard] = request.param
    return chosen(browser)


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_is_done_by_hand(
    api: Api, browser: Chrome, hand: Mouse | Keyboard, name: str
) -> None:
    verb = VERBS[name]
    path = verb.page(api)
    tenant = "ann" if verb.role == "client" else "ops"
    browser.get(f"{api.url}/#key={api.key(tenant, verb.role)}")
    wait_for(browser, "header", f"{tenant}, {verb.role}")
    browser.get(api.url + path)

    def press(steps: tuple[str, ...]) -> None:
        for step in steps:
            selector, text = in_parts(step)
            find = partial(browser.find_elements, "css selector", selector)
            wait_until(find, 15, f"{selector} is there")
            hand.do(selector, text)

    press(verb.given)
    wait_until(lambda: not is_done(api.farm, verb), 15, f"{name} is not done yet")
    press(verb.presses)
    wait_until(lambda: is_done(api.farm, verb), 15, f"{name}: {verb.done}")
    while take_turn(api.farm):
        pass


def is_done(farm: Farm, verb: Verb) -> bool:
    found = sql(farm, verb.done)
    return bool(found and found[0][0])


def test_what_is_typed_stays_when_the_page_is_updated(api: Api, browser: Chrome) -> None:
    path = job_page(api)
    browser.get(f"{api.url}/#key={api.key('ops', 'operator')}")
    wait_for(browser, "header", "ops, operator")
    browser.get(api.url + path)
    typed = browser.find_element("css selector", "[name=set_label]")
    typed.send_keys("set=autumn")
    Select(browser.find_element("css selector", "[name=to]")).select_by_visible_text("bulk")
    browser.execute_script(
        "window.updates = 0; document.addEventListener('htmx:after:swap',"
        " () => { window.updates += 1; })"
    )
    register_worker(api.farm, uuid.uuid4().hex[:8])
    sql(api.farm, "UPDATE jobs SET device_seconds = 7200")
    wait_for(browser, "main", "2 h 0 min")
    assert browser.execute_script("return window.updates") >= 1
    for name, value in (("set_label", "set=autumn"), ("to", "bulk")):
        shown = browser.execute_script(f"return document.querySelector('[name={name}]').value")
        assert shown == value, name
