"""The dashboard in a real browser: signed in, live, safe against HTML in prompts."""

from __future__ import annotations

import gc
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from farm.context import Farm
from farm.services.operations import take_turn
from farm.store import faults, leases, workers
from farm.store.engine import transaction
from farm.store.frames import FailedAttempt, fail
from tests.integration.test_history import recently, store_sample
from tests.support.api_server import Api, render, serving
from tests.support.axe import RULES, RUN, SCRIPT
from tests.support.store import fence, register_worker, sql
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
    "disable-background-networking", "disable-component-update", "disable-sync",
    "disable-dev-shm-usage", "window-size=1280,1400",
)  # fmt: skip
PROMPTS = {
    "arabic": "نجمة حمراء على خلفية زرقاء",
    "hebrew": "כוכב אדום על רקע כחול",
    "chinese": "蓝色背景上的红色星星",
    "emoji": "a 🦊 under the 🌕",
    "script": "<script>document.title='mine'</script><img src=x onerror=\"document.title='mine'\">",
    "long": "with intricate detail, " * 300,
}


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    if not (BROWSER and DRIVER):
        pytest.skip("needs chromium and chromedriver on the PATH")
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chrome: Chrome) -> Iterator[Chrome]:
    yield chrome
    chrome.delete_all_cookies()
    chrome.get("about:blank")  # it asks no API that ends
    assert not complaints(chrome), "the page breaks no rule of its Content-Security-Policy"


def complaints(chrome: Chrome) -> list[str]:
    """Return the errors in the browser's console since the last call, except refused requests."""
    log: list[dict[str, Any]] = chrome.execute("getLog", {"type": "browser"})["value"]
    loud = [str(entry["message"]) for entry in log if entry["level"] == "SEVERE"]
    return [text for text in loud if "Failed to load resource" not in text]


def text_of(browser: Chrome, selector: str) -> str:
    """Return the text of an element, or an empty text if there is none."""
    script = "return document.querySelector(arguments[0])?.innerText ?? ''"
    return str(browser.execute_script(script, selector))


def wait_for(browser: Chrome, selector: str, words: str) -> None:
    wait_until(lambda: words in text_of(browser, selector), 15, f"{selector} shows {words!r}")


def open_page(browser: Chrome, api: Api, role: str = "client") -> None:
    browser.get(f"{api.url}/#key={api.key(role=role)}")
    wait_for(browser, "header", f"ann, {role}")


@pytest.fixture(autouse=True)
def connections_ahead() -> Iterator[None]:
    """Chromium opens connections ahead. Nothing closes those that open while uvicorn ends."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_signing_in_by_hand_and_out_again(api: Api, browser: Chrome) -> None:
    browser.get(api.url)
    browser.find_element("id", "key").send_keys("farm_wrong")
    browser.find_element("css selector", "button[type=submit]").click()
    wait_for(browser, "#problem", "unknown or revoked")
    browser.find_element("id", "key").send_keys(api.key())
    browser.find_element("css selector", "button[type=submit]").click()
    wait_for(browser, "header", "ann, client")
    [cookie] = browser.get_cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Lax")
    browser.find_element("css selector", ".visitor button").click()
    wait_for(browser, "main", "API key")
    assert browser.get_cookies() == []


def test_the_printed_address_signs_in_and_forgets_the_key(api: Api, browser: Chrome) -> None:
    open_page(browser, api)
    assert browser.current_url == f"{api.url}/"
    assert "No jobs yet" in text_of(browser, ".jobs")
    assert "No worker for pipeline demo" in text_of(browser, ".workers")
    browser.get(f"{api.url}/#key=farm_wrong")
    wait_for(browser, "#said", "unknown or revoked")
    assert "key" not in browser.current_url


def test_prompts_in_any_script_are_read_and_never_run(api: Api, browser: Chrome) -> None:
    client = api.client()
    worker = register_worker(api.farm)
    for prompt in PROMPTS.values():
        api.submit(client, prompts=[prompt], labels={"<b>": prompt[:50]})
        render(worker, worker.must_claim())
    open_page(browser, api)
    shown = [each.text for each in browser.find_elements("css selector", ".job .prompt")]
    assert [text.removesuffix("...") for text in shown] == [
        PROMPTS["long"][: len(shown[0]) - 3],  # the list shows the beginning
        *[prompt for name, prompt in reversed(PROMPTS.items()) if name != "long"],
    ]
    assert browser.title == "Jobs"
    by_text = {
        each.text: browser.execute_script("return getComputedStyle(arguments[0]).direction", each)
        for each in browser.find_elements("css selector", ".job .prompt")
    }
    assert by_text[PROMPTS["arabic"]] == by_text[PROMPTS["hebrew"]] == "rtl"
    assert by_text[PROMPTS["chinese"]] == "ltr"
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= browser.execute_script("return innerWidth")


def test_newest_pictures_are_shown(api: Api, browser: Chrome) -> None:
    client = api.client()
    worker = register_worker(api.farm)
    api.submit(api.client("bob"), prompts=["another's"])
    render(worker, worker.must_claim())
    job = api.submit(client, images_per_prompt=2, seed=41, bucket=2)
    render(worker, worker.must_claim())
    open_page(browser, api)
    wait_for(browser, ".pictures", "seed 42")
    assert "another's" not in text_of(browser, "main")
    loaded = "return [...document.querySelectorAll('.pictures img')].map(i => i.naturalWidth)"
    wait_until(lambda: browser.execute_script(loaded) == [64, 64], 15, "both pictures are loaded")
    link = browser.find_element("css selector", ".pictures li a").get_attribute("href")
    assert link == f"{api.url}/jobs/{job['id']}/frames/0"


def test_a_whole_picture_needs_a_session_of_its_tenant(api: Api) -> None:
    job = api.submit(api.client())
    worker = register_worker(api.farm)
    render(worker, worker.must_claim())
    path = f"/pictures/{job['id']}/0"
    whole = signed_in(api).get(path)
    assert whole.headers["content-type"] == "image/png"
    assert "immutable" in whole.headers["cache-control"]
    assert api.bare().get(path).status_code == 401
    assert signed_in(api, tenant="bob").get(path).status_code == 404


def signed_in(api: Api, tenant: str = "ann", role: str = "client") -> httpx.Client:
    visitor = api.bare(Origin=api.url)
    response = visitor.post("/login", data={"key": api.key(tenant, role)})
    assert response.status_code == 204
    return visitor


def test_the_page_is_live_and_keeps_its_place(api: Api, browser: Chrome) -> None:
    client = api.client()
    job = api.submit(client, images_per_prompt=3, bucket=1)
    card = f"[id='job-{job['id']}']"
    open_page(browser, api)
    assert "No worker for pipeline demo is alive." in text_of(browser, card)
    button = browser.find_element("css selector", f"{card} button")
    browser.execute_script("arguments[0].focus(); window.sameElement = arguments[0]", button)
    worker = register_worker(api.farm, "hand")
    lease = worker.must_claim()
    with transaction(api.farm.store) as connection:
        workers.set_state(connection, worker.id, "rendering", device="cpu")
        leases.report_step(connection, lease.id, 12, 25)
    wait_for(browser, ".workers", "step 12 of 25")
    wait_for(browser, card, "1 running")
    wait_for(browser, ".pulse", "1 of 1 worker rendering")
    render(worker, lease)
    wait_for(browser, card, "1 of 3 frames")
    assert browser.execute_script("return document.activeElement === window.sameElement")


def test_buttons_steer_a_job(api: Api, browser: Chrome) -> None:
    job = api.submit(api.client(), images_per_prompt=3)
    card = f"[id='job-{job['id']}']"
    open_page(browser, api)

    def press(action: str) -> None:
        selector = f"{card} form[action$='/{action}'] button"
        wait_until(lambda: browser.find_elements("css selector", selector), 15, f"{action} shows")
        browser.find_element("css selector", selector).click()

    press("pause")
    wait_for(browser, card, "It is paused.")
    press("resume")
    wait_until(lambda: "paused" not in text_of(browser, card), 15, "it is not paused any more")
    wait_for(browser, "#said", "is resumed")
    browser.find_element("css selector", f"{card} a[href$='/cancel']").click()
    wait_for(browser, "h1", f"Cancel job {job['id'][:8]} of ann?")
    assert "3 of 3 frames have not ended" in text_of(browser, "main")
    browser.find_element("id", "why").send_keys("ticket 7")
    browser.find_element("css selector", "main button").click()
    wait_for(browser, card, "3 cancelled")
    assert text_of(browser, f"{card} .actions") == "Remove…"
    why = sql(api.farm, "SELECT why FROM actions WHERE verb = 'job.cancel'")
    assert why == [("ticket 7",)]


def test_a_viewer_sees_no_buttons(api: Api, browser: Chrome) -> None:
    job = api.submit(api.client())
    open_page(browser, api, role="viewer")
    assert text_of(browser, f"[id='job-{job['id']}'] .actions") == ""
    response = signed_in(api, role="viewer").post(f"/jobs/{job['id']}/cancel")
    assert response.status_code == 403


def test_actions_are_taken_from_the_page_only(api: Api) -> None:
    job = api.submit(api.client())
    visitor = signed_in(api)
    path = f"/jobs/{job['id']}/cancel"
    for origin in ("https://elsewhere.example", "null", ""):
        assert visitor.post(path, headers={"Origin": origin}).status_code == 403
    assert visitor.post(path).status_code == 204
    foreign = signed_in(api, tenant="bob").post(path)
    assert foreign.status_code == 404
    assert api.bare(Origin="https://elsewhere.example").post("/login").status_code == 403


def test_jobs_are_shown_by_the_page(api: Api, browser: Chrome) -> None:
    client = api.client()
    for number in range(17):
        api.submit(client, prompts=[f"number {number}"])
    open_page(browser, api)
    assert len(browser.find_elements("css selector", ".job")) == 15
    browser.find_element("link text", "Older jobs").click()
    wait_for(browser, ".jobs", "number 1")
    assert [each.text for each in browser.find_elements("css selector", ".job .prompt")] == [
        "number 1",
        "number 0",
    ]
    browser.find_element("link text", "cancelled").click()
    wait_for(browser, ".jobs", "No cancelled jobs.")


def test_the_page_says_when_the_farm_is_away(api: Api, browser: Chrome) -> None:
    open_page(browser, api)
    browser.execute_cdp_cmd("Network.enable", {})
    conditions: dict[str, Any] = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, **conditions})
    wait_for(browser, "#said", "The farm does not answer")
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": False, **conditions})
    wait_until(lambda: text_of(browser, "#said") == "", 15, "the farm answers again")
    assert all("htmx:error" in text for text in complaints(browser))


def test_docs_need_nothing_from_elsewhere(api: Api, browser: Chrome) -> None:
    browser.get(f"{api.url}/docs")
    wait_for(browser, "main", "/v1/jobs/{job_id}/frames")
    page = httpx.get(f"{api.url}/docs").text
    named = {"http://www.w3.org", "https://shop.example", "s3://BUCKET", "s3://datasets"}
    assert set(re.findall(r"[\w.:-]*//[\w.-]*", page)) <= named


def test_a_browser_gets_problems_as_pages(api: Api, browser: Chrome) -> None:
    browser.get(f"{api.url}/nonesuch")
    wait_for(browser, "main", "Not found")
    browser.get(f"{api.url}/pictures/{uuid.uuid4()}/0")
    wait_for(browser, "main", "Sign in first.")


def test_a_page_without_news_is_not_sent_again(api: Api) -> None:
    visitor = signed_in(api)
    asked = {"HX-Request": "true", "Accept": "text/html"}
    first = visitor.get("/", headers=asked)
    assert first.status_code == 200
    assert "<html" not in first.text
    again = visitor.get("/", headers={**asked, "HX-PTag": first.headers["hx-ptag"]})
    assert (again.status_code, again.content) == (304, b"")
    api.submit(api.client())
    tagged = {**asked, "HX-PTag": first.headers["hx-ptag"]}
    # Tabs of a key share an answer for a second.
    wait_until(lambda: visitor.get("/", headers=tagged).status_code == 200, 10, "there is news")
    news = visitor.get("/", headers=tagged)
    assert news.headers["hx-ptag"] != first.headers["hx-ptag"]
    assert "HX-Request" in news.headers["vary"]


def test_a_hidden_page_asks_for_nothing(api: Api, browser: Chrome) -> None:
    open_page(browser, api)
    hide = "Object.defineProperty(document, 'hidden', {value: arguments[0], configurable: true})"
    count = (
        "return performance.getEntriesByType('resource').filter("
        "each => each.initiatorType === 'fetch').length"
    )
    browser.execute_script(hide, True)
    browser.execute_script(
        "window.held = 0; document.addEventListener('htmx:before:request',"
        " event => { if (event.defaultPrevented) window.held += 1; })"
    )
    before = browser.execute_script(count)
    wait_until(lambda: browser.execute_script("return window.held") >= 2, 15, "two updates are due")
    assert browser.execute_script(count) == before
    browser.execute_script(hide, False)
    browser.execute_script("document.dispatchEvent(new Event('visibilitychange'))")
    wait_until(lambda: browser.execute_script(count) > before, 15, "a shown page is updated")


def test_a_visitor_stops_the_updates(api: Api, browser: Chrome) -> None:
    open_page(browser, api)
    browser.find_element("css selector", "#updates option[value='0']").click()
    browser.find_element("css selector", ".updates button").click()
    trigger = "return document.getElementById('live').getAttribute('hx-trigger')"
    wait_until(
        lambda: browser.execute_script(trigger) == "refresh, changed from:body",
        15,
        "the page has no interval",
    )
    assert signed_in(api).post("/updates", data={"seconds": "1"}).status_code == 422


def test_everything_works_without_a_script(api: Api) -> None:
    visitor = api.bare(Origin=api.url, Accept="text/html")
    visitor.follow_redirects = True
    job = api.submit(api.client(), images_per_prompt=2)
    signed = visitor.post("/login", data={"key": api.key()})
    assert f"job-{job['id']}" in signed.text
    page = "/?status=queued"

    def press(path: str, **fields: str) -> httpx.Response:
        return visitor.post(path, data=fields, headers={"Referer": api.url + page})

    paused = press(f"/jobs/{job['id']}/pause")
    assert (paused.url.raw_path.decode(), "It is paused." in paused.text) == (page, True)
    assert "It is paused." not in press(f"/jobs/{job['id']}/resume").text
    assert "selected" in press("/updates", seconds="60").text
    asked = visitor.get(f"/jobs/{job['id']}/cancel")
    assert "A cancelled job cannot be resumed." in asked.text
    assert "2</b> cancelled" in press(f"/jobs/{job['id']}/cancel", why="ticket 7").text
    for elsewhere in ("http://evil.example/x", f"{api.url}//evil.example", "http://[", "nonsense"):
        back = visitor.post("/updates", data={"seconds": "5"}, headers={"Referer": elsewhere})
        assert back.url.host == "127.0.0.1"


SIZES = [(1280, "light"), (360, "dark"), (1280, "dark"), (360, "light")]


@pytest.mark.full_size
def test_no_page_keeps_anybody_off(api: Api, browser: Chrome) -> None:
    """Rules of WCAG 2.2 AA, by axe-core. `make test` looks at two of the four sizes and colours."""
    if not SCRIPT.is_file():
        pytest.skip("needs axe-core: make chart-tools")
    job = job_of_all_states(api)
    browser.get(f"{api.url}/#key={api.key('ops', 'operator')}")
    wait_for(browser, "header", "ops, operator")
    pages = ("", "/frames", "/attempts", "/frames/0", "/frames/3", "/frames/0?with=3", "/json")
    operation = operation_of(api)
    others = ("/operations", f"/operations/{operation}", "/operations/new", "/lanes", "/jobs")
    asked = [f"/operations/new?verb={verb}" for verb in ("cancel", "remove", "resume")]
    paths = ["/", *(f"/jobs/{job}{path}" for path in (*pages, "/cancel")), "/docs", "/nonesuch"]
    paths += [
        *others,
        *asked,
        "/lanes/demo",
        "/system",
        "/failures",
        "/changes",
        "/pictures",
        "/system/checks",
        "/system/keys",
        f"/system/keys/{key_of(api)}/revoke",
        "/usage?by=tenant&by=day&from=2026-01-01",
    ]
    fill_history(api.farm)
    with transaction(api.farm.store) as connection:
        faults.note(connection, 400)
        [fault] = faults.list_faults(connection, recently(60))
    paths.append(f"/failures/{fault.fault}")
    found = {}
    for width, colours in SIZES[: int(os.environ.get("FARM_TEST_SIZES", "2"))]:
        media = {"features": [{"name": "prefers-color-scheme", "value": colours}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for path in paths:
            browser.get(api.url + path)
            browser.execute_script(SCRIPT.read_text())
            if violations := browser.execute_async_script(RUN, list(RULES)):
                found[width, colours, path] = violations
            overflow = "return document.documentElement.scrollWidth - innerWidth"
            assert browser.execute_script(overflow) <= 0, (width, path)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert found == {}


def key_of(api: Api) -> str:
    api.key("shop")
    [key] = api.client("ops", "operator").get("/v1/keys", params={"tenant": "shop"}).json()["data"]
    return str(key["id"])


def fill_history(farm: Farm) -> None:
    """Store samples of six hours of the lane `demo`, with a gap."""
    for minute in range(360):
        if not 120 < minute < 140:
            done = 40 * (400 - minute)
            waits = [0, 0, 0, 3 * (400 - minute)]
            sums: dict[str, Any] = {
                "succeeded": done,
                "denoise_seconds": 0.5 * done,
                "work_seconds": 0.6 * done,
            }
            store_sample(farm, recently(minute), waiting=[1, 20, 300], wait_buckets=waits, **sums)


def operation_of(api: Api) -> str:
    """Return an operation that has changed a job, while a lane is held."""
    operator = api.client("ops", "operator")
    operator.post("/v1/lanes/demo/hold", params={"why": "new driver"}, json={}).raise_for_status()
    asked = {"verb": "change", "filter": {}, "labels": {"set": "autumn"}}
    answer = operator.post("/v1/operations", params={"tenant": "*", "why": "ticket 7"}, json=asked)
    while take_turn(api.farm):
        pass
    return str(answer.json()["id"])


def test_many_jobs_are_cancelled_by_keyboard_alone(api: Api, browser: Chrome) -> None:
    for _ in range(3):
        api.submit(api.client(), images_per_prompt=2)
    open_page(browser, api)
    keys = KeyboardOnly(browser)
    keys.focus("#bulk button[value=all]")
    keys.press(Keys.ENTER)
    wait_for(browser, "h1", "Cancel 3 jobs?")
    # What is pressed by accident changes nothing.
    assert browser.execute_script("return document.activeElement.id") == "keep"
    keys.focus("#why")
    keys.press("ticket 7")
    keys.focus("main button.danger")
    keys.press(Keys.ENTER)
    wait_for(browser, "h1", "Cancel 3 jobs")
    wait_for(browser, ".chip", "running")
    while take_turn(api.farm):
        pass
    wait_for(browser, ".counts", "3 cancelled")
    wait_for(browser, ".chip", "ended")


def test_an_operator_holds_a_lane_with_the_mouse(api: Api, browser: Chrome) -> None:
    api.submit(api.client())
    browser.get(f"{api.url}/#key={api.key('ops', 'operator')}")
    wait_for(browser, "header", "ops, operator")
    browser.find_element("link text", "Lanes").click()
    wait_for(browser, "#lane-demo", "1 normal waiting")
    browser.find_element("css selector", "#lane-demo summary").click()
    browser.find_element("css selector", "#lane-demo [name=why]").send_keys("new driver")
    browser.find_element("css selector", "#lane-demo details button").click()
    wait_for(browser, "#lane-demo", "new driver")
    wait_for(browser, "#said", "is held")
    browser.find_element("css selector", "#lane-demo .actions button").click()
    wait_until(lambda: "held" not in text_of(browser, "#lane-demo"), 15, "it is released")


class KeyboardOnly:
    """Moves the focus with Tab, and presses keys."""

    def __init__(self, browser: Chrome) -> None:
        self._browser = browser

    def focus(self, selector: str) -> None:
        """Press Tab until an element has the focus."""
        is_there = "return document.activeElement?.matches(arguments[0]) ?? false"
        for _ in range(150):
            if self._browser.execute_script(is_there, selector):
                return
            self.press(Keys.TAB)
        raise AssertionError(f"{selector} is not reached by Tab")

    def press(self, text: str) -> None:
        """Press keys in the element that has the focus."""
        # Not keys to an element: ENTER may lead to another page before the key is up.
        ActionChains(self._browser).send_keys(text).perform()


def job_of_all_states(api: Api) -> str:
    """Return a job of ann with pictures, a dead frame, a running one and waiting ones."""
    job = api.submit(api.client(), images_per_prompt=6, bucket=1, labels={"set": "spring"})
    worker = register_worker(api.farm)
    for _ in range(3):
        render(worker, worker.must_claim())
    lease = worker.must_claim()
    broken = FailedAttempt(fence(lease.frames[0]), "render_error", "broken", False, log="a log")
    with transaction(api.farm.store) as connection:
        fail(connection, lease.id, [broken], 0.0)
    worker.must_claim()
    return str(job["id"])


def test_the_command_of_a_frame_is_copied(api: Api, browser: Chrome) -> None:
    job = job_of_all_states(api)
    open_page(browser, api)
    browser.get(f"{api.url}/jobs/{job}/frames/0")
    browser.find_element("css selector", "[data-copy=replay]").click()
    wait_for(browser, "#said", "It is ")
    selected = browser.execute_script("return getSelection().toString()")
    if "selected" in text_of(browser, "#said"):
        assert selected == f"farm replay {job} 0"


def test_what_a_visitor_opened_stays_open(api: Api, browser: Chrome) -> None:
    job = job_of_all_states(api)
    browser.get(f"{api.url}/#key={api.key('ops', 'operator')}")
    wait_for(browser, "header", "ops, operator")
    browser.get(f"{api.url}/jobs/{job}/frames/3")
    browser.find_element("css selector", "details summary").click()
    browser.execute_script(
        "window.updates = 0; document.addEventListener('htmx:after:swap',"
        " () => { window.updates += 1; })"
    )
    sql(api.farm, "UPDATE attempts SET message = 'broken in another way'")
    wait_for(browser, "main", "broken in another way")
    assert browser.execute_script("return window.updates") >= 1
    assert "a log" in text_of(browser, "details pre")


def test_a_prompt_made_of_htmx_does_nothing(api: Api, browser: Chrome) -> None:
    prompt = '"><div hx-get="/docs" hx-trigger="load" hx-target="body">x</div>'
    job = api.submit(api.client(), prompts=[prompt], labels={"hx-get": "/docs"})["id"]
    open_page(browser, api)
    for path in ("/", f"/jobs/{job}", f"/jobs/{job}/frames", f"/jobs/{job}/json"):
        browser.get(api.url + path)
        script = "return document.querySelectorAll('[hx-get]').length"
        assert browser.execute_script(script) <= 1, path  # the page's own
        assert "hx-get" in text_of(browser, "main") or path.endswith("/json")
