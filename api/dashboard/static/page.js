"use strict";
// Updates the dashboard, sends its actions without a page load, and signs in from /#key=….

const PACE = 1000;
const said = document.getElementById("said");
const say = (text) => { if (said.textContent !== text) said.textContent = text; };

// Change only the nodes that differ, so that focus, scroll, selection and loaded pictures stay.
function morph(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeName !== fresh.nodeName || (old.id || "") !== (fresh.id || "")) {
    old.replaceWith(fresh);
    return;
  }
  if (old.nodeType === Node.TEXT_NODE) {
    old.data = fresh.data;
    return;
  }
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  morphChildren(old, [...fresh.childNodes]);
}

function morphChildren(old, wanted) {
  const named = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  wanted.forEach((fresh, place) => {
    const now = old.childNodes[place];
    const same = fresh.id ? named.get(fresh.id) : now && !now.id ? now : null;
    if (!same) return old.insertBefore(fresh, now ?? null);
    if (same !== now) old.insertBefore(same, now);
    morph(same, fresh);
  });
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
}

async function refresh() {
  try {
    const answer = await fetch("/live" + location.search, { headers: { accept: "text/html" } });
    if (answer.status === 401) return location.reload();
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    morph(document.getElementById("live"), page.getElementById("live"));
    if (said.dataset.of === "outage") say("");
  } catch {
    said.dataset.of = "outage";
    say("The farm does not answer. This page shows its last known state.");
  }
}

async function keepFresh() {
  if (!document.hidden) await refresh();
  setTimeout(keepFresh, PACE);
}

const post = (address, fields) =>
  fetch(address, { method: "POST", body: new URLSearchParams(fields), headers: { accept: "application/json" } });

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!("live" in form.dataset)) return;
  event.preventDefault();
  if (form.dataset.ask && !confirm(form.dataset.ask)) return;
  const answer = await post(form.action, {}).catch(() => null);
  said.dataset.of = "action";
  say(!answer ? "The farm does not answer." : answer.ok ? "" : (await answer.json()).detail);
  await refresh();
});

// The address that `farm up` prints has the key after the #. Browsers send that part to no server.
async function signIn() {
  const key = new URLSearchParams(location.hash.slice(1)).get("key");
  if (!key) return;
  history.replaceState(null, "", location.pathname + location.search);
  const answer = await post("/login", { key }).catch(() => null);
  if (answer?.ok) return location.reload();
  said.dataset.of = "sign-in";
  say(answer ? (await answer.json()).detail : "The farm does not answer.");
}

addEventListener("hashchange", signIn);
signIn();
if (document.getElementById("live")) keepFresh();
