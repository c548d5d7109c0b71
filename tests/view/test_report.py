"""The report: one page, whole in itself, that says what the run's figures say."""

import json
import re
from html.parser import HTMLParser

import pytest

from numbabuf.tools import cli
from numbabuf.view import report

SIZES = ["--max-tokens", "64", "--max-seqs", "8", "--dim", "4", "--vocab", "100", "--steps", "20", "--quiet"]
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects the words and what the page would load."""

    def __init__(self, page):
        super().__init__()
        self.open, self.words, self.loads, self.shapes = [], [], [], 0
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href")]
        self.shapes += tag in ("rect", "polygon")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.shapes += tag in ("rect", "polygon")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    code = cli.main(["replay", *SIZES, "--json", str(folder / "a.json"), "--report", str(folder / "a.html")])
    assert code == 0
    return json.loads((folder / "a.json").read_text()), (folder / "a.html").read_text()


def test_the_page_is_whole_in_itself(run):
    _, page = run
    found = Page(page)
    assert found.loads == [] and found.shapes > 10
    assert not re.search(r"https?://|url\(|@import", page)


def test_the_page_says_what_the_figures_say(run):
    data, page = run
    results, text = data["results"], Page(page).text
    assert report.render(data).count("<rect") == page.count("<rect")  # the JSON alone makes the same page
    for part in (
        f"{results['steps']:,} steps",
        "every result equals NumPy's, bit for bit",
        f"Padding: {results['padding_percent']:.1f} %",
        f"live tokens {results['live_tokens']:,}",
        f"steps that found a free block {results['steps'] - results['ring_waits']}",
        data["versions"]["numba"],
    ):
        assert part in text
    assert sum(results["bucket_tokens"].values()) == results["live_tokens"]
    assert sum(results["demand"].values()) == results["steps"]
    assert sum(int(size) * count for size, count in results["demand"].items()) == results["live_tokens"]


def test_a_wrong_result_leads_the_page(run):
    data = json.loads(json.dumps(run[0]))
    data["results"]["mismatch"] = {"step": 3, "sequence": 1, "expected": 1.0, "found": 2.0}
    data["trace"]["name"] = "<script>alert(1)</script>"
    page = report.render(data)
    assert 'class="wrong"' in page and "step 3, sequence 1" in Page(page).text
    assert "<script>" not in page


def leaves(data, path=()):
    """The path of every value in a report, and of every name in it."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield (*path, key)
        if isinstance(value, (dict, list)) and value:
            yield from leaves(value, (*path, key))


def test_no_value_and_no_name_reaches_the_page_unescaped(run):
    data = json.loads(json.dumps(run[0]))
    data["results"]["mismatch"] = {"step": 3, "sequence": 1, "expected": 1.0, "found": 2.0}
    for name in ("tokens_per_step", "host_us_per_step"):
        data["results"][name] = data["results"][name][:2]
    evil, rendered = '"><script>alert(1)</script>', []
    for path in leaves(data):
        for renamed in (False, True):
            changed = json.loads(json.dumps(data))
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            if renamed and isinstance(parent, dict):
                parent[evil] = parent.pop(path[-1])
            else:
                parent[path[-1]] = evil
            try:
                page = report.render(changed)
            except (TypeError, ValueError, KeyError, AttributeError):
                continue  # a name that must be there, a number that is none
            rendered.append(path)
            assert "<script" not in page, path
            Page(page)
    assert ("results", "mismatch", "expected") in rendered and ("trace", "name") in rendered


def test_a_run_without_steps_makes_a_page(run):
    data = json.loads(json.dumps(run[0]))
    data["results"] |= {
        "steps": 0, "live_tokens": 0, "padded_tokens": 0, "buckets": {}, "bucket_tokens": {}, "demand": {},
        "tokens_per_step": [], "host_us_per_step": [],
    }  # fmt: skip
    assert "0 steps" in Page(report.render(data)).text


def test_thin_keeps_the_mean():
    values = list(range(1000))
    found = report.thin(values, most=100)
    assert len(found) == 100 and sum(found) / 100 == sum(values) / 1000
    assert report.thin([]) == [] and report.thin([3]) == [3.0]


def test_a_folder_that_is_not_there_is_refused_before_the_run(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.main(["replay", *SIZES, "--report", str(tmp_path / "no" / "a.html")])
    assert stop.value.code == 2 and "--report" in capsys.readouterr().err
