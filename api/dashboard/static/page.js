"use strict";
// Signs in from /#key=…, stops updates of pages that nobody sees, and says what went wrong.
// Everything else is done by htmx, or works without a script.

const said = document.getElementById("said");
const live = document.getElementById("live");

const SHOWN_MS = 8000; // an outage is shown until it ends

function say(text, about) {
  if (said.textContent !== text) said.textContent = text;
  said.dataset.about = about;
  clearTimeout(say.timer);
  if (text && about !== "outage") say.timer = setTimeout(() => say("", ""), SHOWN_MS);
}

document.addEventListener("htmx:before:request", (event) => {
  if (document.hidden && event.detail.ctx.sourceElement === live) event.preventDefault();
});

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && live) htmx.trigger(live, "refresh");
});

document.addEventListener("htmx:error", () => {
  say("The farm does not answer. This page shows its last known state.", "outage");
});

document.addEventListener("htmx:response:error", (event) => {
  const { response, text } = event.detail.ctx;
  if (response.status === 401) return location.reload();
  say(detailOf(text) ?? `The farm answered with status ${response.status}.`, "outage");
});

document.addEventListener("htmx:after:request", (event) => {
  if (event.detail.ctx.response.status < 400 && said.dataset.about === "outage") say("", "");
});

// The server tells the outcome of an action in the header HX-Trigger.
document.addEventListener("said", (event) => say(event.detail.text, "action"));

function detailOf(text) {
  try {
    return JSON.parse(text).detail;
  } catch {
    return null;
  }
}

document.documentElement.classList.add("scripted");
document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const from = document.getElementById(button.dataset.copy);
  const copied = navigator.clipboard?.writeText(from.value ?? from.textContent);
  if (await copied?.then(() => true, () => false)) return say("It is copied.", "copy");
  getSelection().selectAllChildren(from); // an address without TLS has no clipboard
  from.select?.();
  say("It is selected. Copy it with your keyboard.", "copy");
});

// The address that `farm up` prints has the key after the #. Browsers send that part to no server.
async function signIn() {
  const key = new URLSearchParams(location.hash.slice(1)).get("key");
  if (!key) return;
  history.replaceState(null, "", location.pathname + location.search);
  const answer = await fetch("/login", {
    method: "POST", body: new URLSearchParams({ key }), headers: { accept: "application/json" },
  }).catch(() => null);
  if (answer?.ok) return location.reload();
  say(answer ? detailOf(await answer.text()) : "The farm does not answer.", "sign-in");
}

addEventListener("hashchange", signIn);
signIn();
