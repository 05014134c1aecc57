"""Pictures of matrices from plain dicts: everything is drawn, on one scale, and nothing leaks between pictures."""

import builtins
import json
import math

import pytest

from limbeck import LimbeckError
from limbeck.report.matrices import matrices_picture, write_matrices


def matrix(size, value=0.5):
    return [[value if key <= query else 0.0 for key in range(size)] for query in range(size)]


def inspection(heads=3, size=6, **head):
    given = {"distance": 1.25, "decay_length": 3.0, "teacher": matrix(size), "student": matrix(size, -0.25)} | head
    layer = {"layer": 2, "mixer": "DiscreteMamba2", "note": "", "heads": [{"head": h, **given} for h in range(heads)]}
    return json.loads(json.dumps({"tokens": ["a $", *"bcdef"][:size] * (size // 6), "layers": [layer]}))


def words(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 9, 17])
def test_every_head_is_drawn_inside_the_picture(heads):
    figure = matrices_picture(inspection(heads), 2)
    drawn = [axes for axes in figure.axes if axes.images]
    assert len(drawn) == 2 * heads
    scales = {(axes.images[0].norm.vmin, axes.images[0].norm.vmax) for axes in drawn}
    assert scales == {(-0.5, 0.5)}  # white is zero, for all
    found = words(figure)
    assert all(f"head {head}" in found for head in range(heads))
    assert found.count("distance 1.25") == found.count("fades in 3.0 tokens") == heads
    assert found.count("teacher") == found.count("student") == math.ceil(heads / 8)
    figure.canvas.draw()
    for text in figure.texts:
        box = text.get_window_extent()
        assert box.x0 >= 0, text.get_text()
        assert box.y0 >= 0, text.get_text()
        assert box.x1 <= figure.bbox.width, text.get_text()
        assert box.y1 <= figure.bbox.height, text.get_text()


def test_the_future_is_not_drawn():
    image = matrices_picture(inspection(1), 2).axes[0].images[0].get_array()
    assert [[bool(cell) for cell in row] for row in image.mask] == [[k > q for k in range(6)] for q in range(6)]


def test_what_is_missing_is_said():
    found = words(matrices_picture(inspection(2, student=None, distance=None, decay_length=None), 2))
    assert found.count("no matrix") == found.count("no distance") == 2
    plain = inspection(2, decay_length=None)
    plain["layers"][0] |= {"mixer": None, "note": ""}
    assert "Layer 2: attention kept" in words(matrices_picture(plain, 2))
    plain["layers"][0]["note"] = "8 heads against 4"
    assert any("8 heads against 4" in text for text in words(matrices_picture(plain, 2)))
    with pytest.raises(LimbeckError, match="no layer 5"):
        matrices_picture(plain, 5)


@pytest.mark.parametrize("form", ["png", "svg"])
def test_files(tmp_path, form):
    (file,) = write_matrices(inspection(), tmp_path / "new" / "pictures", form, dpi=50)
    assert file == tmp_path / "new" / "pictures" / f"layer-02.{form}"
    assert file.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    assert list(file.parent.iterdir()) == [file]
    with pytest.raises(LimbeckError, match="did you mean 'png'"):
        write_matrices(inspection(), tmp_path, "pngg")


def test_without_matplotlib(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LimbeckError, match=r"limbeck\[report\]"):
        matrices_picture(inspection(), 2)
