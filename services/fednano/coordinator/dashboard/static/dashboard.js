// The dashboard: who is looking, at which page. `#token=...` is swapped for a cookie that scripts
// can't read and taken out of the address at once; `#run=NAME` names the page.

import { logIn, logOut, whoAmI } from "./api.js";
import { h, setText } from "./dom.js";
import { ListView } from "./list_view.js";
import { RunView } from "./run_view.js";

const main = document.getElementById("main");
const status = document.getElementById("status");
const crumbs = document.getElementById("crumbs");
const who = document.getElementById("who");
const news = document.getElementById("news");
let view = null;

function showState(state) {
  status.dataset.state = state.replace(" ", "-");
  setText(status, state);
}

function fragment() {
  return new URLSearchParams(location.hash.slice(1));
}

/** Removes the token from the address bar, the history and the fragment; returns it. */
function takeToken() {
  const parts = fragment();
  const token = parts.get("token");
  if (!token) return "";
  parts.delete("token");
  const rest = parts.toString();
  history.replaceState(null, "", location.pathname + location.search + (rest ? `#${rest}` : ""));
  return token;
}

/** True when the session is over and the form was shown. */
function refused(error) {
  if (error.status === 401) showForm("Your session has ended.");
  else if (error.status === 403) showForm("This token may not read that page. Sign in with another one.");
  else return false;
  return true;
}

const hooks = { state: showState, refused, tell: (text) => setText(news, text) };

function showPage(caller) {
  view?.stop();
  const run = fragment().get("run");
  document.title = run ? `${run} · FedNano` : "FedNano";
  const here = run ? [h("a", { href: "#" }, "Runs"), h("span", { "aria-current": "page" }, run)] : [h("span", { "aria-current": "page" }, "Runs")];
  crumbs.replaceChildren(...here);
  showState("connecting");
  view = run ? new RunView(main, run, caller, hooks) : new ListView(main, hooks);
  view.start();
}

function enter(caller) {
  who.hidden = false;
  setText(document.getElementById("who-name"), `${caller.name} (${caller.role})`);
  window.onhashchange = () => start();
  showPage(caller);
}

function showForm(reason) {
  view?.stop();
  view = null;
  who.hidden = true;
  crumbs.replaceChildren();
  showState("signed out");
  const input = h("input", { id: "token", type: "password", autocomplete: "off", required: true, spellcheck: "false" });
  const error = h("p", { class: "reason", role: "alert" }, reason);
  const submit = async (event) => {
    event.preventDefault();
    try {
      enter(await logIn(input.value.trim()));
    } catch (problem) {
      setText(error, problem.message);
      input.select();
    }
  };
  main.replaceChildren(h("form", { class: "panel login", onsubmit: submit },
    h("h1", {}, "Sign in"), h("label", { for: "token" }, "Access token"), input,
    h("button", { type: "submit" }, "Sign in"), error,
    h("p", { class: "note" }, "An admin makes tokens with: fednano tokens create --role viewer NAME")));
  input.focus();
}

async function start() {
  const token = takeToken();
  try {
    enter(token ? await logIn(token) : await whoAmI());
  } catch (error) {
    if (error.status === 401) showForm(token ? "That token is not valid." : "");
    else {
      showState("reconnecting");
      setTimeout(start, 3000);
    }
  }
}

document.getElementById("sign-out").addEventListener("click", async () => {
  await logOut().catch(() => null);
  showForm("");
});
start();
