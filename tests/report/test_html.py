"""The report's page: all that a run left, nothing that it did not, and no address of any host."""

import json
import re
from html.parser import HTMLParser

import pytest
from made_runs import EVALUATION, make_demo, make_run, matrix

import limbeck.report
import limbeck_cli
from limbeck import LimbeckError, load_recipe
from limbeck.recipes import to_toml
from limbeck.recipes.stages import Expect
from limbeck.report import write_report
from limbeck.report.charts import comparison, matrix_layers, matrix_png, recall_figures, tokens
from limbeck.report.curves import held_out, loss_figures, means
from limbeck.report.read import read_run
from limbeck.report.svg import Axis, Line, bar_chart, line_chart, short


class Page(HTMLParser):
    """Which headings, addresses and pictures a page has, and whether its elements close."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.addresses, self.unnamed, self.ids, self.open = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        facts = dict(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.addresses += [facts[name] for name in ("src", "href", "srcset") if name in facts]
        if (tag == "img" and not facts.get("alt")) or (tag == "svg" and not facts.get("aria-label")):
            self.unnamed.append(facts)
        self.ids += [facts["id"]] if "id" in facts else []
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "mine")


@pytest.mark.parametrize("make", [make_run, make_demo])
def test_a_page_stands_alone(make, tmp_path):
    path = write_report(make(tmp_path / "mine"))[0]
    assert path == tmp_path / "mine" / "report.html"
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert page.unnamed == []
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert "<script" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "nan" not in re.findall(r"\bnan\b", text.lower())


def test_everything_that_was_measured_is_shown(run):
    text = write_report(run)[0].read_text()
    for words in ("How it learned", "On held-out text", "Along a sample", "Recall", "Speed and memory", "The matrices"):
        assert f">{words}</h2>" in text
    assert "Not in this run" not in text
    assert "12,345" in text
    assert "2.13.0" in text
    assert "hybrid &lt;1&gt;" in text
    assert "/models/&lt;teacher&gt;" in text
    assert "The recipe expects 40 to 50 at the first and 2 to 3 at the last." in text


def test_what_is_missing_is_said_and_not_invented(tmp_path):
    text = write_report(make_run(tmp_path / "mine", evaluation=False, sealed=False))[0].read_text()
    missing = text[text.index("Not in this run") :]
    for words in (
        "Along a sample",
        "Recall",
        "Speed and memory",
        "The matrices",
        "What learned",
        "Versions and device",
    ):
        assert words in missing
        assert f">{words}</h2>" not in text
    (tmp_path / "mine" / "metrics.jsonl").unlink()
    text = write_report(tmp_path / "mine")[0].read_text()
    assert "metrics.jsonl holds no updates yet" in text
    assert "<svg" not in text


def test_a_demo_shows_its_comparison(tmp_path):
    folder = make_demo(tmp_path / "demo")
    text = write_report(folder, tmp_path / "elsewhere" / "page.html")[0].read_text()
    assert "def &lt;b&gt;" in text
    assert "return a &amp; b" in text
    rows = comparison(json.loads((folder / "results.json").read_text()))[1].rows
    assert rows[2] == ["teacher", "31.0", "1.000", ""]
    assert rows[4] == ["student, after logits", "33.0 to 34.0", "1.065 to 1.097", "84 to 88"]


def test_figures_are_those_of_the_files(run):
    found = read_run(run)
    assert [name for name, _ in held_out(found)] == ["converted", "after logits"]
    assert held_out(found)[1][1]["step"] == 200  # whose weights the stage kept, not the last
    matrices, logits = loss_figures(found)
    assert matrices.table.rows[0][:2] == ["1", "45"]
    assert matrices.table.rows[-1][:2] == ["20", "2.25"]
    assert len(logits.table.rows) == 24
    assert logits.table.rows[-1][0] == "400"


def test_a_stage_that_is_under_way_has_no_expected_end(tmp_path):
    folder = make_run(tmp_path / "mine")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:5]))
    (figure,) = loss_figures(read_run(folder))
    assert figure.picture.count('class="gate"') == 1
    assert "40 to 50 at the first." in figure.note


def test_expectations_are_part_of_a_recipe_and_of_no_run():
    recipe = load_recipe("demo")
    assert "[stages.matrix.expect]" in to_toml(recipe)
    assert recipe.stages["matrix"].expect == Expect(start=(42, 63), end=(7.5, 11.5))
    assert recipe.scaled_to(recipe.tokens // 2).stages["matrix"].expect == Expect(start=(42, 63))


def test_folders_and_files_that_are_no_run(tmp_path):
    with pytest.raises(LimbeckError, match="holds no run"):
        write_report(tmp_path)
    folder = make_run(tmp_path / "mine")
    (folder / "evaluation" / "bench.json").write_text("{")
    with pytest.raises(LimbeckError, match=r"bench\.json is no JSON"):
        write_report(folder)
    (folder / "evaluation" / "bench.json").write_text("[1]")
    with pytest.raises(LimbeckError, match=r"bench\.json holds a list"):
        write_report(folder)


def test_without_the_extra(monkeypatch, run):
    monkeypatch.setattr(limbeck.report, "can_report", lambda: False)
    with pytest.raises(LimbeckError, match=r"pip install 'limbeck\[report\]'"):
        write_report(run)


def test_the_command(run, tmp_path, capsys, monkeypatch):
    arguments = ["limbeck", "report", str(run), "--output", str(tmp_path / "page.html"), "--json"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as end:
        limbeck_cli.main()
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "page.html"), "pictures": []}
    monkeypatch.setattr("sys.argv", ["limbeck", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        limbeck_cli.main()
    assert end.value.code == 2
    assert "holds no run" in capsys.readouterr().err


def test_pictures_as_files(tmp_path):
    folder = make_run(tmp_path / "mine", evaluation=False)
    files = write_report(folder, pictures=tmp_path / "pictures")
    assert [file.name for file in files] == ["report.html", "curves.png", "curves.svg"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in files[2].read_text()


def test_charts_bear_strange_numbers():
    for values in ([0.0], [5.0, 5.0], [1e-9, 1e9], [float("nan"), None], [-3.0, 2.0], []):
        for log in (False, True):
            points = list(enumerate(values, start=1))
            chart = line_chart([Line("a", points)], Axis("x"), Axis("y", log=log), title="<&>")
            assert "nan" not in chart
            assert "&lt;&amp;&gt;" in chart
    assert 'width="1.5"' in bar_chart([("nothing", [0.0], "student")], title="t")


@pytest.mark.parametrize(
    ("value", "written"),
    [(None, "–"), (0.0, "0"), (3.14159, "3.14"), (221.3, "221"), (0.0001, "1.0e-4"), (16384, "16.4k"), (2e6, "2M")],
)
def test_numbers_are_short(value, written):
    assert short(value) == written


def test_heads_without_a_partner_are_shown_alone():
    heads = [
        {"head": 0, "distance": None, "decay_length": None, "teacher": None, "student": matrix(4)},
        {"head": 1, "distance": 2.0, "decay_length": 3.0, "teacher": matrix(4), "student": matrix(4)},
        {"head": 2, "distance": None, "decay_length": None, "teacher": None, "student": None},
    ]
    (layer,) = matrix_layers({"layers": [{"layer": 5, "note": "one is attention", "heads": heads}]})
    assert [[side for side, _ in pair["sides"]] for pair in layer["pairs"]] == [["student"], ["teacher", "student"]]
    assert layer["note"] == "one is attention"
    assert len(layer["table"].rows) == 3


def test_small_things():
    assert [tokens(count) for count in (100, 2048, 131072)] == ["100", "2k", "128k"]
    assert means([(1, 2.0), (2, None), (3, 4.0), (4, 6.0)], 2) == [(1, 2.0), (3.5, 5.0)]
    assert matrix_png(matrix(8)).startswith("data:image/png;base64,iVBOR")
    assert [figure.title for figure in recall_figures(EVALUATION["recall"])] == ["Copying", "Needle in a haystack"]
