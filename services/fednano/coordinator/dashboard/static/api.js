// The REST API: replies as objects, refusals as errors that carry the problem.

const BASE = "/api/v1";

export class ApiError extends Error {
  constructor(status, problem) {
    super(problem.detail || `the service answered ${status}`);
    this.status = status;
    this.errors = problem.errors || [];
  }
}

async function request(method, path, headers = {}) {
  let reply;
  try {
    reply = await fetch(BASE + path, {
      method,
      headers: { "X-FedNano": "1", ...headers },
      credentials: "same-origin",
    });
  } catch {
    throw new ApiError(0, { detail: "the coordinator can't be reached" });
  }
  const body = reply.status === 204 ? null : await reply.json().catch(() => ({}));
  if (!reply.ok) throw new ApiError(reply.status, body || {});
  return body;
}

export const get = (path) => request("GET", path);
export const post = (path) => request("POST", path);
export const whoAmI = () => get("/login");
export const logIn = (token) => request("POST", "/login", { Authorization: `Bearer ${token}` });
export const logOut = () => request("DELETE", "/login");
export const runPath = (run) => `/runs/${encodeURIComponent(run)}`;
export const roundsUrl = (run) => `${BASE}${runPath(run)}/rounds`;
export const eventsUrl = (run) => `${BASE}${runPath(run)}/events?after=now`;

/** All items of a paged list; `query` chooses among them. */
export async function all(path, query = "") {
  const items = [];
  let cursor = "";
  do {
    const page = await get(`${path}?${query}&limit=1000&cursor=${encodeURIComponent(cursor)}`);
    items.push(...page.items);
    cursor = page.next;
  } while (cursor);
  return items;
}
