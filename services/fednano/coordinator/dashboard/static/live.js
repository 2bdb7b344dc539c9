// One run's event stream, kept open: the browser resumes it by Last-Event-ID, and where the browser
// gives up (a refusal, a gateway's error) it is opened anew, unless the session is over.

import { eventsUrl, whoAmI } from "./api.js";

const KINDS = ["run", "round", "client", "update", "evaluation"];
const RETRY_MS = 3000;

/** Calls `opened` each time the stream stands, `heard(kind, data)` per event and
 *  `state("live" | "reconnecting" | "signed out")`. Returns a function that ends it. */
export function follow(run, { opened, heard, state }) {
  let source = null;
  let timer = null;
  let over = false;

  const open = () => {
    source = new EventSource(eventsUrl(run));
    source.onopen = () => {
      state("live");
      opened();
    };
    source.onerror = failed;
    for (const kind of KINDS) {
      source.addEventListener(kind, (event) => heard(kind, JSON.parse(event.data)));
    }
  };

  const failed = async () => {
    if (over) return;
    state("reconnecting");
    if (source.readyState !== EventSource.CLOSED) return;
    clearTimeout(timer);
    try {
      await whoAmI();
    } catch (error) {
      if (error.status === 401) {
        if (!over) state("signed out");
        return;
      }
    }
    if (!over) timer = setTimeout(open, RETRY_MS);
  };

  open();
  return () => {
    over = true;
    clearTimeout(timer);
    source.close();
  };
}
