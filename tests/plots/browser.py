"""What a person sees of a notebook: Debian's Chromium looks at the page that nbconvert makes of it."""

import os
import shutil
from contextlib import contextmanager

from local_plots import Failed
from nbconvert import HTMLExporter
from playwright.sync_api import sync_playwright

WAIT = 120_000  # milliseconds, after which what is waited for will not come

# How many colours there are in what is drawn: an empty canvas has one.
COLOURS = """element => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [200, 150];
  const context = canvas.getContext("2d");
  context.drawImage(element, 0, 0, 200, 150);
  return new Set(new Uint32Array(context.getImageData(0, 0, 200, 150).data.buffer)).size;
}"""

# Where a point of a bokeh plot is in its page: of the renderer with the most points, the middle one.
POINT = """async () => {
  const views = [];
  const walk = view => { views.push(view); for (const child of view.children()) walk(child); };
  for (const root of Bokeh.index.roots) walk(root);
  const glyphs = views.filter(v => v.glyph && v.model.data_source && v.model.data_source.get_length());
  const best = glyphs.sort((a, b) => b.model.data_source.get_length() - a.model.data_source.get_length())[0];
  const half = Math.floor(best.glyph.data_size / 2);
  const [x, y] = best.glyph.scenterxy(half, NaN, NaN);
  const box = best.plot_view.canvas.el.getBoundingClientRect();
  return {x: box.x + x, y: box.y + y};
}"""


@contextmanager
def chromium():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        raise Failed("a browser is missing (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=sandbox)
        try:
            yield browser
        finally:
            browser.close()


def write_page(notebook, path):
    """The executed notebook as a page whose plots are live."""
    html, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook)
    path.write_text(html)
    return path


class Page:
    """A page, with everything that it would fetch from elsewhere refused: its plots may need nothing."""

    def __init__(self, browser, path):
        self.page = browser.new_page(viewport={"width": 1100, "height": 900})
        self.errors = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.route("**/*", lambda route: route.continue_() if route.request.url.startswith("file:") else route.abort())
        self.page.goto(path.resolve().as_uri(), wait_until="domcontentloaded")
        self.plots = [Plot(self.page, one) for one in self.page.query_selector_all(".hail-plot iframe")]

    def picture(self, path):
        """Of the whole page. What is not in view is not painted, so all of it is brought into view."""
        height = self.page.evaluate("document.documentElement.scrollHeight")
        self.page.set_viewport_size({"width": 1100, "height": height})
        for plot in self.plots:
            plot.wait()
        self.page.screenshot(path=str(path))

    def close(self):
        self.page.close()


class Plot:
    """One plot of a page, in its frame."""

    def __init__(self, page, element):
        self.page = page
        self.element = element
        self.frame = element.content_frame()

    @property
    def kind(self):
        return self.frame.evaluate("window.Bokeh ? 'bokeh' : window.Plotly ? 'plotly' : 'picture'")

    def wait(self):
        """Until it has drawn itself. A frame that is not in view draws nothing."""
        self.element.scroll_into_view_if_needed()
        self.frame.wait_for_load_state("load", timeout=WAIT)
        if self.kind == "bokeh":
            self.frame.wait_for_function("Bokeh.documents.length && Bokeh.documents.every(d => d.is_idle)", timeout=WAIT)
        elif self.kind == "plotly":
            self.frame.wait_for_selector(".trace .point", state="attached", timeout=WAIT)

    def colours(self):
        """Of the most colourful canvas or picture of it; plotly draws with SVG, whose marks are counted."""
        self.wait()
        if self.kind == "plotly":
            return self.frame.locator(".trace .point").count()
        return max(one.evaluate(COLOURS) for one in self.frame.locator("canvas, img").element_handles())

    def title(self):
        self.wait()
        if self.kind == "bokeh":
            models = "[...Bokeh.documents[0]._all_models.values()]"
            return self.frame.evaluate(f"{models}.filter(m => m.type == 'Title' && m.text).map(m => m.text)[0]")
        if self.kind == "plotly":
            return self.frame.locator(".gtitle").text_content()
        return self.frame.locator("img").get_attribute("alt")

    def hover(self):
        """What it says when the mouse is on one of its points."""
        self.wait()
        box, point = self.element.bounding_box(), self.frame.evaluate(POINT)
        x, y = box["x"] + point["x"], box["y"] + point["y"]
        self.page.mouse.move(x - 3, y - 3)
        self.page.mouse.move(x, y)
        tooltip = self.frame.locator(".bk-tooltip-content").filter(has_text=":").first
        tooltip.wait_for(state="attached", timeout=WAIT)
        return " ".join(tooltip.text_content().split())
