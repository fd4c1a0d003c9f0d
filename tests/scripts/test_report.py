"""The report page: all it shows is in it, its links lead to files, and a browser finds nothing cut."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from scripts import cells, report

PROJECT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """A few committed runs, with a name that HTML must not take for its own."""
    root = tmp_path_factory.mktemp("report") / "results"
    for name in ("smollm-lora-r8-321376", "smollm-lora-r8-flat0.05-f9db6e", "smollm-lora-r8-flat0.15-d339f8"):
        shutil.copytree(PROJECT / "results/study/flatlora_cola" / name, root / "study/flatlora_cola" / name)
    broken = root / "study/flatlora_cola/<b>broken/0"
    broken.mkdir(parents=True)
    (broken / "run.json").write_text("{")
    layouts = yaml.safe_load(cells.LAYOUTS.read_text())
    path = root.with_name("tables.yaml")  # composing all of them takes half a minute
    kept = {name: layouts[name] for name in ("study", "ablation", "flatness")}
    path.write_text(yaml.safe_dump(kept, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "LAYOUTS", path)
        assert report.main(["--results", str(root)]) == 0
    return root


class Page(HTMLParser):
    """Addresses that a page asks for, and its elements."""

    def __init__(self, text):
        super().__init__()
        self.links, self.sources, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        if "href" in found:
            self.links.append(found["href"])
        self.sources += [found[key] for key in ("src", "srcset") if key in found]


def test_the_page_holds_all_it_shows_and_links_to_files_that_are_there(results):
    path = results / "tables/report.html"
    page = Page(path.read_text())
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    files = [link for link in page.links if not link.startswith("#")]
    assert len(files) > 50
    assert all((path.parent / link).is_file() for link in files)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", path.read_text())


def test_every_runs_numbers_configuration_and_machine_are_in_it_with_what_is_left_out(results):
    text = (results / "tables/report.html").read_text()
    for path in results.glob("study/*/smollm*/*/run.json"):
        record = json.loads(path.read_bytes())
        assert f"{record['metrics']['glue/accuracy']:.4g}" in text
        assert record["adapter_sha256"][:12] in text
        assert record["env"]["hardware"]["gpus"][0] in text
    assert "sigma: 0.15" in text
    assert "&lt;b&gt;broken/0 has no valid run.json" in text
    assert "<b>broken" not in text


@pytest.mark.extra
def test_it_is_the_same_each_time(results, monkeypatch):
    monkeypatch.setattr(cells, "LAYOUTS", results.with_name("tables.yaml"))
    home = results / "tables"
    assert report.render(results, home) == (home / "report.html").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")
@pytest.mark.parametrize("width", [1280, 500])
def test_nothing_is_wider_than_the_window(results, width, tmp_path):
    """Every <details> is open, so that what they hold is measured too; 500 is the narrowest that a window may be."""
    text = (results / "tables/report.html").read_text().replace("<details>", "<details open>")
    script = "<script>document.title=[document.documentElement.scrollWidth,innerWidth].join(' ')</script></body>"
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", script))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    found = subprocess.run([CHROMIUM, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    needed, there = map(int, re.search(r"<title>(\d+) (\d+)</title>", found.stdout).groups())
    assert needed <= there
