// Numbers as people read them.

const DASH = "–";

/** 0.8934 -> "0.893". */
export function score(value) {
  return Number.isFinite(value) ? value.toFixed(3) : DASH;
}

/** 1234567 -> "1.23 MB" (powers of ten). */
export function bytes(count) {
  if (!Number.isFinite(count)) return DASH;
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let value = count;
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit ? value.toPrecision(3) : value} ${units[unit]}`;
}

/** 4.21 -> "4.2 s", 200 -> "3 min 20 s". */
export function seconds(value) {
  if (!Number.isFinite(value) || value < 0) return DASH;
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 60) return `${Math.round(value)} s`;
  const whole = Math.round(value);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60)];
  return hours ? `${hours} h ${minutes} min` : `${minutes} min ${whole % 60} s`;
}

/** How long a round took; null while it runs. */
export function duration(round) {
  return round.finished_at === null ? null : round.finished_at - round.opened_at;
}

/** Unix seconds -> local date and time. */
export function moment(time) {
  if (time === null || time === undefined) return DASH;
  const style = { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" };
  return new Date(time * 1000).toLocaleString(undefined, style);
}

/** Unix seconds -> "12 s ago". */
export function ago(time) {
  const passed = Date.now() / 1000 - time;
  return passed < 2 ? "now" : `${seconds(Math.floor(passed))} ago`;
}

/** {a: 1, b: 2} -> 3. */
export function total(byKind) {
  return Object.values(byKind).reduce((sum, value) => sum + value, 0);
}
