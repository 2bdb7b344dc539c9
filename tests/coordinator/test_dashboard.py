"""The dashboard in a real browser, over the real store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from fednano.coordinator.store_members import Spent
from playwright.async_api import Browser, Locator, Page, async_playwright, expect

from tests.coordinator import web
from tests.coordinator.screenshot import FLAGS, find_browser
from tests.coordinator.web import ADMIN, Site, serving

site = web.site
pytestmark = pytest.mark.browser
SLOW = 15_000  # milliseconds, on a busy machine


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium on PATH")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        await browser.close()


@pytest.fixture
async def page(browser: Browser) -> AsyncIterator[Page]:
    """A page of which no script fails and no policy is violated."""
    context = await browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-GB")
    page = await context.new_page()
    page.set_default_timeout(SLOW)
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("console", lambda message: trouble.append(message.text))
    yield page
    await context.close()
    assert [line for line in trouble if "Failed to load resource" not in line] == []


def tile(page: Page, name: str) -> Locator:
    return page.locator(".tile").filter(has=page.get_by_text(name, exact=True)).locator(".value")


async def show(page: Page, site: Site, run: str = "trial", secret: str = ADMIN) -> None:
    await page.goto(f"{site.url}/#token={secret}&run={run}")
    await expect(page.locator("#status")).to_have_text("live", timeout=SLOW)
    await expect(page.locator("h1")).to_have_text(run)


async def test_a_token_in_the_address_becomes_a_cookie_and_is_gone(page: Page, site: Site) -> None:
    await page.goto(f"{site.url}/#token={ADMIN}")
    await expect(page.locator("#who-name")).to_have_text("admin (admin)", timeout=SLOW)
    assert ADMIN not in page.url
    assert ADMIN not in await page.evaluate("document.cookie + JSON.stringify(history.state)")
    await page.go_back()
    assert ADMIN not in page.url
    (cookie,) = await page.context.cookies(site.url)
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")


async def test_without_a_token_there_is_a_form(page: Page, site: Site) -> None:
    await page.goto(site.url)
    await expect(page.locator("#status")).to_have_text("signed out", timeout=SLOW)
    await page.get_by_label("Access token").fill("wrong")
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_role("alert")).to_have_text("a valid bearer token is required")
    await page.get_by_label("Access token").fill(ADMIN)
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.locator("#who-name")).to_have_text("admin (admin)", timeout=SLOW)
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.locator("#status")).to_have_text("signed out")


async def test_values_change_without_a_reload_and_equal_rest(page: Page, site: Site) -> None:
    federation = await site.federation()
    await federation.play(1)
    await show(page, site)
    await page.evaluate("window.unloaded = false")
    for _ in range(3):
        await federation.play(1)
    run = (await site.http.get("/runs/trial")).json()
    rounds = (await site.http.get("/runs/trial/rounds")).json()["items"]
    await expect(page.locator("h1 + span .chip")).to_have_text(run["state"], timeout=SLOW)
    await expect(tile(page, "Round")).to_have_text(f"{run['last_round']} / 3")
    rows = page.get_by_role("region", name="Rounds, as a table").locator("tbody tr")
    await expect(rows).to_have_count(len(rounds))
    for row, one in zip(await rows.all(), reversed(rounds), strict=True):
        cells = await row.locator("th, td").all_text_contents()
        assert cells[:2] == [str(one["number"]), one["state"]]
        assert cells[2] == f"{one['metrics']['accuracy']:.3f}"
        assert cells[5] == str(len(one["clients"]["submitted"]))
    totals = (await site.http.get("/runs/trial/ledger")).json()["totals"]
    exact = f"{sum(totals['sent'].values()):,} bytes"
    await expect(page.locator(f".sum [title='{exact}']").first).to_be_visible()
    assert await page.evaluate("window.unloaded") is False


async def test_the_ledger_unfolds_and_equals_rest(page: Page, site: Site) -> None:
    federation = await site.federation(rounds=5)
    await federation.play(3)
    await show(page, site)
    await page.get_by_text("What each client spent", exact=True).first.click()
    rows = page.get_by_role("region", name="What each client spent").locator("tbody tr")
    chosen = page.get_by_role("combobox", name="round")
    await chosen.select_option("1")
    items = (await site.http.get("/runs/trial/ledger?round=1")).json()["items"]
    await expect(rows).to_have_count(len(items))
    for row, one in zip(await rows.all(), items, strict=True):
        cells = row.locator("th, td")
        await expect(cells.nth(0)).to_have_text(one["client"])
        await expect(cells.nth(3)).to_have_text(f"{one['client_seconds']:.1f} s")
        kind, count = next(iter(one["sent_bytes"].items()))
        await expect(row.locator(f"[title*='{kind} {count:,}']").first).to_be_visible()
    await federation.play(1)
    await expect(chosen.locator("option")).to_have_count(5, timeout=SLOW)
    await expect(chosen).to_have_value("1")


async def test_the_charts_tell_their_values(page: Page, site: Site) -> None:
    await (await site.federation()).play(4)
    await show(page, site)
    chart = page.locator(".chart", has_text="Accuracy")
    await expect(chart.locator(".line.s0 circle")).to_have_count(4)
    plot = chart.locator("svg")
    await plot.focus()
    await page.keyboard.press("ArrowRight")
    await expect(chart.locator(".tip strong")).to_have_text("round 0 (zero-shot)")
    await page.keyboard.press("ArrowRight")
    first = (await site.http.get("/runs/trial/rounds/1")).json()["metrics"]["accuracy"]
    await expect(chart.locator(".tip b").first).to_have_text(f"{first:.3f}")
    assert (await plot.get_attribute("aria-label") or "").startswith("Accuracy per round")


async def test_shadows_have_a_chart_that_says_what_they_are(page: Page, site: Site) -> None:
    shadows = [{"name": "fedadam", "momentum": 0.5}, {"name": "product"}]
    await (await site.federation(shadows=shadows)).play(3)
    await (await site.federation("plain")).play(2)
    await show(page, site)
    chart = page.locator(".chart.shadows")
    await expect(chart).to_contain_text("One-step counterfactuals")
    await expect(chart).to_contain_text("independent runs decide results")
    names = ["fedavg, leads", "fedadam (momentum 0.5), shadow", "product, shadow"]
    await expect(chart.locator(".legend li")).to_have_text(names)
    await chart.locator("svg").focus()
    await page.keyboard.press("ArrowLeft")
    told = (await site.http.get("/runs/trial/rounds/2")).json()
    values = [f"{one['metrics']['accuracy']:.3f}" for one in (told, *told["shadows"])]
    await expect(chart.locator(".tip b")).to_have_text(values)
    await page.get_by_text("Configuration").click()
    await expect(page.locator(".settings")).to_contain_text("shadows.1.nameproduct")
    await page.goto("about:blank")
    await show(page, site, "plain")
    await expect(page.locator(".chart", has_text="Accuracy")).to_be_visible()
    await expect(chart).to_be_hidden()


async def test_failures_are_shown_with_their_reason(page: Page, site: Site) -> None:
    federation = await site.federation(max_attempts=1, round_seconds=5)
    await federation.play(1)
    await federation.submit("site-0", 1)
    site.clock.added += 6
    await federation.settle()
    await show(page, site)
    reason = "attempt 1 of round 1: 1 of 2 updates came in time"
    await expect(page.locator(".banner").first).to_have_text(f"Failed: {reason}")
    await expect(page.locator(".why")).to_contain_text(reason)


async def test_an_admin_pauses_and_a_viewer_can_t(page: Page, site: Site) -> None:
    await site.federation()
    await show(page, site, secret=await site.token("viewer"))
    await expect(page.locator("h1 + span .chip")).to_have_text("running")
    assert await page.locator(".buttons button").count() == 0
    await page.goto("about:blank")
    await show(page, site)
    await page.get_by_role("button", name="pause").click()
    await expect(page.locator("h1 + span .chip")).to_have_text("paused")
    assert (await site.store.run("trial")).state == "paused"
    await page.get_by_role("button", name="resume").click()
    await expect(page.locator("h1 + span .chip")).to_have_text("running")


async def test_it_reconnects_and_shows_what_it_missed(page: Page, site: Site) -> None:
    federation = await site.federation()
    async with serving(site.app) as url:
        port = int(url.rsplit(":", 1)[1])
        await page.goto(f"{url}/#token={ADMIN}&run=trial")
        await expect(page.locator("#status")).to_have_text("live", timeout=SLOW)
    await expect(page.locator("#status")).to_have_text("reconnecting", timeout=SLOW)
    await federation.play(2)
    site.app.state.streams = type(site.app.state.streams)(site.store)
    async with serving(site.app, port):
        await expect(page.locator("#status")).to_have_text("live", timeout=SLOW)
        await expect(tile(page, "Round")).to_have_text("1 / 3", timeout=SLOW)


async def test_a_revoked_viewer_is_signed_out(page: Page, site: Site) -> None:
    await site.federation()
    record, secret = await site.store.create_token("eve", "viewer")
    await show(page, site, secret=secret)
    await site.store.revoke_token(record.id)
    await expect(page.locator("#status")).to_have_text("signed out", timeout=SLOW)
    assert await page.locator(".tile").count() == 0


async def test_a_run_that_is_not_there_is_said_so(page: Page, site: Site) -> None:
    await page.goto(f"{site.url}/#token={ADMIN}&run=none")
    await expect(page.locator(".empty")).to_have_text("no run is named 'none'", timeout=SLOW)


async def test_names_from_the_server_are_text_only(page: Page, site: Site) -> None:
    """A client may call itself anything; none of it becomes markup."""
    federation = await site.federation()
    doing = "<img src=x onerror=alert(1)>"
    told = replace(federation.members["site-0"], doing=doing)
    await site.store.members.beat("trial", told, 0, Spent())
    await show(page, site)
    await expect(page.get_by_role("region", name="Clients, as a table")).to_contain_text(doing)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
async def test_no_width_scrolls_the_page_sideways(
    browser: Browser, site: Site, theme: str, width: int
) -> None:
    await (await site.federation("trial-with-rather-a-long-name")).play(3)
    context = await browser.new_context(
        viewport={"width": width, "height": 700},
        color_scheme=theme,  # type: ignore[arg-type]
    )
    page = await context.new_page()
    for run in ("", "trial-with-rather-a-long-name"):
        await page.goto("about:blank")
        await page.goto(f"{site.url}/#token={ADMIN}{run and '&run='}{run}")
        await expect(page.locator("tbody tr").first).to_be_visible(timeout=SLOW)
        await asyncio.sleep(0.3)
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
    assert await page.evaluate(CONTRAST) >= 4.5
    await context.close()


async def test_the_api_s_page_is_readable(page: Page, site: Site) -> None:
    await page.goto(f"{site.url}/#token={ADMIN}")
    await expect(page.locator("#who-name")).to_be_visible(timeout=SLOW)
    await page.get_by_role("link", name="API").click()
    await expect(page.locator("h1")).to_have_text("FedNano coordinator 0.1.0", timeout=SLOW)
    told = site.app.openapi()["paths"]
    assert await page.locator("article .method").count() == sum(len(one) for one in told.values())


CONTRAST = """() => {
  // The lowest contrast between any text and the surface behind it.
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = numbers(colour).slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if ((numbers(colour)[3] ?? 1) > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const worded = [...document.querySelectorAll("body *")].filter((one) =>
    one.checkVisibility() && [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  return Math.min(...worded.map((one) => {
    const style = getComputedStyle(one);
    const text = one instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(text), light(behind(one))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
}"""


async def test_who_came_late_and_how_many_updates_were_wanted_is_told(
    page: Page, site: Site
) -> None:
    spares = {"cohort": 1, "spares": 1, "min_clients": 1}
    federation = await site.federation(data={"source": "own"}, late_joiners=True, **spares)
    await federation.play(1)
    await federation.join("site-2")
    await federation.submit("site-0", 1)
    await federation.settle()
    await show(page, site)
    clients = page.get_by_role("region", name="Clients, as a table")
    await expect(clients.get_by_role("rowheader", name="site-2")).to_have_text(
        "site-2 since round 1", timeout=SLOW
    )
    await expect(clients.get_by_role("rowheader", name="site-0")).to_have_text("site-0")
    rounds = page.get_by_role("region", name="Rounds, as a table")
    first = rounds.get_by_role("row").filter(
        has=page.get_by_role("rowheader", name="1", exact=True)
    )
    await expect(first.get_by_role("cell", name="1 of 1")).to_be_visible()
