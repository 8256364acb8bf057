"use strict";
// The token under the pointer, under a finger, or reached with the arrow keys, in words. Without this script the ids
// below each row say the same.
const said = document.getElementById("token");
let at = null;

function show(token) {
  if (at) at.classList.remove("at");
  at = token;
  if (!token) { said.textContent = ""; return; }
  token.classList.add("at");
  const text = token.closest("pre"), tokens = [...text.querySelectorAll("i")], place = tokens.indexOf(token);
  const message = token.closest(".m"), trained = token.closest("u");
  const ids = text.parentElement.querySelector(".ids code").textContent.split(" ");
  said.textContent = `id ${ids[place]} ${JSON.stringify(token.textContent)} · token ${place + 1} of ${tokens.length} · ` +
    `${message.dataset.role}, turn ${message.dataset.turn} · ` +
    (trained ? `supervised, weight ${trained.dataset.w || 1}` : "not supervised");
}

document.addEventListener("pointerover", event => {
  const token = event.target.closest("pre i");
  if (token) show(token);
});
document.addEventListener("click", event => show(event.target.closest("pre i")));
document.addEventListener("keydown", event => {
  if (event.key === "Escape") show(null);
  const text = document.activeElement.closest("article pre");
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!text || !step) return;
  const tokens = [...text.querySelectorAll("i")], place = tokens.indexOf(at);
  const next = tokens[place < 0 ? (step > 0 ? 0 : tokens.length - 1) : place + step];
  if (next) { show(next); next.scrollIntoView({ block: "nearest" }); event.preventDefault(); }
});
document.getElementById("how").textContent =
  "Point at a token, tap it, or go to a row with Tab and to its tokens with the arrow keys: its id, turn and weight are told below.";
