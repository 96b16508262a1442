// Shows the page as it is now, every five seconds while it is looked at.
"use strict";

const EVERY_MS = 5000;
const TIMEOUT_MS = 10000;

// What is selected, open or has the focus is not replaced under the reader's hands.
function isInUse(main) {
  const selection = getSelection();
  const active = document.activeElement;
  return (
    (active !== main && main.contains(active)) ||
    (selection.type === "Range" && main.contains(selection.anchorNode)) ||
    main.querySelector("details[open]") !== null
  );
}

async function refresh() {
  const main = document.querySelector("main");
  const stale = document.getElementById("stale");
  if (document.hidden) return;
  if (isInUse(main)) {
    stale.textContent = " · Not refreshed while something here is selected, open or in use.";
    return;
  }
  try {
    const response = await fetch(location.href, { signal: AbortSignal.timeout(TIMEOUT_MS) });
    if (response.redirected) return location.reload();
    const found = new DOMParser().parseFromString(await response.text(), "text/html");
    const fresh = found.querySelector("main");
    if (fresh === null) throw new Error("no page");
    if (!isInUse(main)) {
      const left = [...main.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
      main.replaceChildren(...fresh.childNodes);
      main.querySelectorAll(".scroll").forEach((box, i) => (box.scrollLeft = left[i] ?? 0));
      document.querySelector("footer time").replaceWith(found.querySelector("footer time"));
      document.title = found.title;
    }
    stale.textContent = "";
  } catch {
    stale.textContent = " · This process does not answer: what you see is old.";
  }
}

async function refreshForever() {
  await refresh();
  setTimeout(refreshForever, EVERY_MS);
}

if (document.body.hasAttribute("data-refreshes")) setTimeout(refreshForever, EVERY_MS);
