"""The page in a real browser. Skipped where there is no Chromium."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import run_folders
from browser import NAMES, Browser, find_browser
from run_folders import GROUP, HOSTILE, PROMPTS, metrics_row, rollout_row, rollouts, write_lines, write_run

from fastr1.reporting.compare import write_comparison
from fastr1.reporting.page import write_page
from fastr1.reporting.serve import RunServer

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"no browser here: none of {', '.join(NAMES)}")

SHOWN = "[...document.querySelectorAll('{}')].filter((e) => !e.hidden)"
# of every text that is seen, the smallest contrast (WCAG) with what is behind it, and the text
CONTRAST = """
(() => {
  const parts = (color) => {
    const [r, g, b, a = 1] = color.match(/-?[\\d.e-]+/g).map(Number);
    return color.startsWith("color(") ? [r, g, b, a] : [r / 255, g / 255, b / 255, a];
  };
  const light = (color) => {
    const [r, g, b] = parts(color).map((x) => (x <= 0.04 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    const color = getComputedStyle(e).backgroundColor;
    return parts(color)[3] > 0.5 || !e.parentElement ? color : behind(e.parentElement);
  };
  const ratios = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode, e = text.parentElement;
    if (!text.data.trim() || e.closest("script, .sheet") || !e.checkVisibility()) continue;
    const style = getComputedStyle(e), isSvg = e instanceof SVGElement;
    const [a, b] = [isSvg ? style.fill : style.color, behind(isSvg ? e.closest("figure") : e)].map(light);
    ratios.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text.data.trim()]);
  }
  return ratios.sort((a, b) => a[0] - b[0])[0];
})()
"""
IS_DARK = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((x) => x < 60)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_page(write_run(tmp_path_factory.mktemp("run"))).as_uri()


@pytest.fixture(autouse=True)
def no_errors(browser: Browser) -> Iterator[None]:
    browser.errors.clear()
    browser.requests.clear()
    yield
    assert browser.errors == []


@contextlib.contextmanager
def hurried(browser: Browser) -> Iterator[None]:
    """Pages that are opened meanwhile do fifty times as often what they do every few seconds. They are left behind."""
    source = "const every = setInterval; window.setInterval = (action, ms) => every(action, ms / 50);"
    script = browser.call("Page.addScriptToEvaluateOnNewDocument", source=source)["identifier"]
    try:
        yield
    finally:
        browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
        browser.call("Page.navigate", url="about:blank")
        browser.run("0")  # what the page reported until now has been read


def go_on(run: Path, last: int) -> None:
    """The run has come to update `last`: a page that is built meanwhile does not find one file without the other."""
    write_lines(run / "next" / "rollouts.jsonl", rollouts(last))
    write_lines(run / "next" / "metrics.jsonl", [metrics_row(step) for step in range(1, last + 1)])
    for path in (run / "next").iterdir():
        path.replace(run / path.name)


def rollout_of_reward(best: int, reward: float, step: int, prompt: int, place: int) -> dict[str, Any]:
    return rollout_row(step, prompt, place, **({"reward": reward} if step == best else {}))


def count(browser: Browser, selector: str) -> int:
    found: int = browser.run(SHOWN.format(selector) + ".length")
    return found


def choose(browser: Browser, selector: str, value: str, event: str = "change") -> None:
    control = f"document.querySelector({selector!r})"
    browser.run(f"{control}.value = {value!r}; {control}.dispatchEvent(new Event({event!r}))")


def click(browser: Browser, selector: str) -> None:
    browser.run(f"document.querySelector({selector!r}).click()")


def test_page_shows_all_groups_questions_and_images_and_asks_for_nothing(browser: Browser, page: str) -> None:
    browser.open(page)
    # 12 updates of 3 groups; those of the rankings that are not among them are in further updates
    assert browser.run("document.querySelectorAll('.group').length") >= 12 * PROMPTS
    assert browser.run(
        "[...document.querySelectorAll('.group')].every((g) => g.querySelectorAll('.completion').length === 4)"
    )
    assert browser.run("document.querySelectorAll('.pair').length") == 4
    images = "[...document.querySelectorAll('img')]"
    assert browser.run(f"{images}.length") == browser.run("document.querySelectorAll('.group, .pair').length")
    browser.wait_for(f"{images}.every((i) => i.complete && i.naturalWidth > 0)")
    assert {url.partition(":")[0] for url in browser.requests} == {"file", "data"}
    assert [url for url in browser.requests if url.startswith("file")] == [page]


def test_filters_show_what_they_say(browser: Browser, page: str) -> None:
    browser.open(page)
    assert count(browser, ".group") == PROMPTS  # of the last update
    assert browser.run("document.querySelector('#group-count').textContent") == "3 groups"
    assert browser.run(SHOWN.format(".group") + "[0].dataset.step") == "20"
    choose(browser, "#step", "1")
    assert browser.run(SHOWN.format(".group") + ".map((g) => g.dataset.step)") == ["1"] * PROMPTS
    click(browser, "#signal")
    assert count(browser, ".group") == 1
    click(browser, "#signal")
    for view, expected in (("worst", ["0", "0.25", "1"]), ("best", ["1", "0.25", "0"])):
        click(browser, f"[data-view={view}]")
        order = browser.run(SHOWN.format(".group") + ".map((g) => g.querySelector('summary b').textContent)")
        assert order == expected
    click(browser, "[data-view=surprising]")
    assert count(browser, ".group") == 1
    choose(browser, "#group-text", "no such", "input")
    assert count(browser, ".group") == 0


def test_held_out_questions_are_filtered_by_outcome_and_kind(browser: Browser, page: str) -> None:
    browser.open(page)
    assert count(browser, ".pair") == 4
    for outcome in ("fixed", "broken", "right", "wrong"):
        click(browser, f"[data-outcome={outcome}]")
        assert browser.run(SHOWN.format(".pair") + ".map((p) => p.dataset.outcome)") == [outcome]
    click(browser, "#outcomes button")
    choose(browser, "#kind", "colour")
    assert browser.run(SHOWN.format(".pair") + ".map((p) => p.dataset.kind)") == ["colour", "colour"]


def test_both_themes_are_readable_and_the_button_changes_them(browser: Browser, page: str) -> None:
    for scheme in ("light", "dark"):
        browser.open(page, scheme=scheme)
        browser.run("localStorage.clear(); delete document.documentElement.dataset.theme")
        browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert browser.run(IS_DARK) is (scheme == "dark")
        assert browser.run(CONTRAST)[0] >= 4.5, browser.run(CONTRAST)
        click(browser, "#theme")
        assert browser.run(IS_DARK) is (scheme == "light")
        assert browser.run(CONTRAST)[0] >= 4.5, browser.run(CONTRAST)
        browser.open(page, scheme=scheme)
        assert browser.run(IS_DARK) is (scheme == "light")  # kept
    browser.run("localStorage.clear()")


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(browser: Browser, page: str, width: int) -> None:
    browser.open(page, width=width)
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.run("window.innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_charts_are_read_by_pointer_and_keys_at_the_same_update(browser: Browser, page: str) -> None:
    browser.open(page)
    box = browser.run("document.querySelector('#chart-0 svg').getBoundingClientRect().toJSON()")
    middle = {"x": box["left"] + box["width"] / 2, "y": box["top"] + box["height"] / 2}
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", **middle)
    at = "[...new Set([...document.querySelectorAll('.at')].map((e) => e.textContent))]"
    browser.wait_for(f"{at}[0] !== ''")
    assert browser.run(at) in (["· update 10"], ["· update 11"])
    step = int(browser.run(at)[0].split()[-1])
    assert float(browser.run("document.querySelector('#chart-0 .legend b').textContent")) == step / 20
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    browser.wait_for(f"{at}[0] === ''")
    browser.run("document.querySelector('#chart-0 svg').focus()")
    for key, update in (("ArrowLeft", 20), ("ArrowLeft", 19), ("ArrowRight", 20), ("ArrowRight", 20)):
        browser.press(key)
        assert browser.run(at) == [f"· update {update}"]
        said = browser.run("document.querySelector('#reading').textContent")
        assert said.startswith(f"update {update}: total {update / 20:g}, ")


def test_keyboard_reaches_every_control_in_order_and_shows_where_it_is(browser: Browser, page: str) -> None:
    browser.open(page)
    seen = []
    for _ in range(60):
        browser.press("Tab")
        names = [
            f"document.activeElement.{name}" for name in ("getAttribute('class')", "dataset.view", "id", "tagName")
        ]
        seen.append(browser.run(" || ".join(names)))
        if seen[-1] == "BODY":  # behind the last of the page
            break
        assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid", seen[-1]
    order = [seen.index(name) for name in ("skip", "theme", "update", "best", "step", "signal", "group-text")]
    assert order == sorted(order)
    charts = browser.run(
        "[...document.querySelectorAll('#curves > .charts svg')].map((svg) => svg.classList.value || 'svg')"
    )
    assert [name for name in seen if name in ("svg", "stacked")] == charts
    # Chromium stops at a drawing that listens for its loss of focus; other browsers only where it is said to be a stop.
    assert browser.run("[...document.querySelectorAll('figure svg')].every((svg) => svg.tabIndex === 0)")
    browser.run("document.querySelector('[data-view=best]').focus()")
    browser.press("Enter")
    assert browser.run("document.querySelector('[data-view=best]').getAttribute('aria-pressed')") == "true"


def test_hostile_text_is_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    rows = [rollout_row(1, 0, i, completion=HOSTILE, question=HOSTILE, sample_id=HOSTILE) for i in range(GROUP)]
    write_lines(run / "rollouts.jsonl", rows)
    write_lines(run / "metrics.jsonl", [metrics_row(1, **{f"rewards/{HOSTILE}": 1.0, HOSTILE: 2.0})])
    browser.open(write_page(run).as_uri())
    assert browser.run("window.hacked") is None
    assert browser.run("document.querySelector('.group .piece').textContent").endswith(HOSTILE)
    assert HOSTILE in browser.run("document.querySelector('#chart-0 .legend').textContent")
    assert browser.run("document.querySelectorAll('script').length") == 4


def test_served_page_reloads_when_the_run_goes_on_and_keeps_its_filters(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with hurried(browser):
        with RunServer(run, 0) as server:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            browser.open(server.url)
            click(browser, "[data-view=worst]")
            click(browser, "[data-outcome=fixed]")
            go_on(run, 21)
            browser.wait_for("document.querySelector('.facts')?.textContent.includes('21 of 20')")
            browser.wait_for("document.documentElement?.dataset.ready === '1'")
            assert browser.run("document.querySelector('[data-view=worst]').getAttribute('aria-pressed')") == "true"
            assert count(browser, ".pair") == 1
            assert all(url.startswith((server.url, "data:")) for url in browser.requests)
            server.shutdown()
        browser.wait_for("document.querySelector('#live').textContent.includes('has stopped')")
    assert any("ERR_CONNECTION_REFUSED" in error for error in browser.errors)
    browser.errors.clear()


@pytest.mark.parametrize("reward", [None, 9.0], ids=["it is gone", "only a ranking has it"])
def test_served_page_keeps_what_is_open_though_a_later_page_lacks_it(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: float | None
) -> None:
    if reward is not None:  # update 20 stays among the best when it is no longer among the updates that are listed
        monkeypatch.setattr(run_folders, "rollout_row", partial(rollout_of_reward, 20, reward))
    run = write_run(tmp_path)
    with hurried(browser):
        with RunServer(run, 0) as server:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            browser.open(server.url)
            text = "document.querySelector('.group[open]')?.textContent"
            for selector in (".group:not([hidden])", ".pair", "#same"):
                browser.run(f"document.querySelector({selector!r}).open = true")
            browser.run("document.querySelector('.pair summary').focus()")
            before = browser.run(text)
            assert "update 20" in before
            for last in (40, 60):
                go_on(run, last)
                browser.wait_for(f"document.querySelector('.facts')?.textContent.includes('{last} of 20')")
                browser.wait_for("document.documentElement?.dataset.ready === '1'")
                assert browser.run("document.querySelector('.group[open]').hidden") is False
                assert browser.run(text) == before
                assert browser.run("document.querySelector('.group[open] img').naturalWidth > 0")
                assert count(browser, "details[open]") == 3
                assert browser.run("document.activeElement.parentElement.matches('.pair')")
            steps = browser.run("[...document.querySelectorAll('#step option')].map((option) => option.value)")
            assert steps.count("20") == 1
            browser.run("document.querySelector('.group[open]').open = false")
            go_on(run, 62)
            browser.wait_for("document.querySelector('.facts')?.textContent.includes('62 of 20')")
            browser.wait_for("document.documentElement?.dataset.ready === '1'")
            assert browser.run("document.querySelector('#step').value") == "62"  # the newest again
            server.shutdown()
        browser.wait_for("document.querySelector('#live').textContent.includes('has stopped')")
    browser.errors.clear()


@pytest.mark.parametrize("width", [400, 1280])
def test_comparison_opens_without_errors_and_fits(browser: Browser, tmp_path: Path, width: int) -> None:
    runs = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))]
    browser.open(write_comparison(runs, tmp_path / "compare.html").as_uri(), width=width)
    assert browser.run("document.querySelectorAll('figure').length") > 10
    assert browser.run("window.innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
