"""What the figures of a large sweep show: readable labels, one color per method, scales that are shared."""

from __future__ import annotations

from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from recorded_sweeps import make_large_sweep, make_sweep, train

from llamafactory_ext.plots import CURVES
from llamafactory_ext.report.curves import TRAINING
from llamafactory_ext.report.look import look_of
from llamafactory_ext.report.sections import draw
from llamafactory_ext.report.table import groups
from llamafactory_ext.sweep.results import read_results


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return read_results(make_large_sweep(tmp_path_factory.mktemp("large")).output)


@pytest.fixture(scope="module")
def found(large):
    return groups([cell for cell in large.cells if cell.recipe])


@pytest.fixture(scope="module")
def look(found):
    return look_of(group.variant for group in found)


@pytest.fixture(scope="module")
def drawn(large, found, look):
    figures = {each.name: each for each in draw(large, found, look)}
    for each in figures.values():
        FigureCanvasAgg(each.figure).draw()
    return figures


def test_all_that_a_sweep_has_is_drawn(drawn):
    assert list(drawn) == [
        "scores",
        "scores_single",
        "rewards_lr1e-05",
        "rewards_lr1e-05_single",
        "training_lr1e-05",
        "rewards_lr0.0001",
        "training_lr0.0001",
        "refinement_lr1e-05_beta0.1",
        "coefficient",
    ]


def texts(figure):
    """Titles, labels of axes and the legend, as boxes by what they say."""
    renderer = figure.canvas.get_renderer()
    found = [each for axes in figure.axes if axes.axison for each in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    found += [each for legend in figure.legends for each in legend.get_texts()]
    for axes in figure.axes:
        found += [
            each
            for each in axes.get_yticklabels()
            if min(axes.get_ylim()) <= each.get_position()[1] <= max(axes.get_ylim())
        ]
    return [(each.get_text(), each.get_window_extent(renderer)) for each in found if each.get_text()]


def shared_area(a, b):
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)


def test_no_text_overlaps_another_or_leaves_the_figure(drawn):
    for name, each in drawn.items():
        boxes = texts(each.figure)
        assert boxes
        for (a, first), (b, second) in combinations(boxes, 2):
            assert shared_area(first, second) <= 1, (name, a, b)
        for text, box in boxes:
            assert each.figure.bbox.x0 - 1 <= box.x0 < box.x1 <= each.figure.bbox.x1 + 1, (name, text)
            assert each.figure.bbox.y0 - 1 <= box.y0 < box.y1 <= each.figure.bbox.y1 + 1, (name, text)


def colors_by_label(figure):
    handles = [axes.get_legend_handles_labels() for axes in figure.axes]
    return {
        (label, to_hex(handle.patches[0].get_facecolor() if hasattr(handle, "patches") else handle.get_color()))
        for found, labels in handles
        for handle, label in zip(found, labels, strict=True)
    }


def test_a_method_has_one_color_in_all_figures(drawn, look):
    expected = {label: look.colors[variant] for variant, label in look.labels.items()}
    shown = set()
    for each in drawn.values():
        for label, color in colors_by_label(each.figure):
            label = label.replace(",\n", ", ")
            if label in expected:
                assert color == expected[label], (each.name, label)
                shown.add((each.name, label))
    for name, label in (
        ("scores", "margin_with_a_floor, tau = 0.5"),
        ("training_lr1e-05", "margin_with_a_floor, tau = 0.5"),
        ("training_lr0.0001", "MinorDPO"),
        ("refinement_lr1e-05_beta0.1", "Sr-DPO, sr_lambda = 0.3"),
        ("coefficient", "MinorDPO"),
    ):
        assert (name, label) in shown
    bars = [to_hex(patch.get_facecolor()) for patch in drawn["scores_single"].figure.axes[0].patches]
    assert bars == [expected["Sr-DPO, sr_lambda = 0.1"], expected["Sr-DPO, sr_lambda = 0.3"]]


def test_colors_of_methods_are_not_those_of_curves(look):
    assert not {*look.colors.values()} & {*CURVES.values()}


@pytest.mark.parametrize("kind", ["rewards_lr1e-05", "rewards_lr1e-05_single", "training_lr1e-05", "scores"])
def test_the_panels_of_a_row_share_a_scale(kind, drawn):
    rows = {}
    for axes in drawn[kind].figure.axes:
        if axes.axison:
            rows.setdefault(axes.get_subplotspec().rowspan.start, set()).add((axes.get_ylim(), axes.get_yscale()))
    assert rows
    assert all(len(scales) == 1 for scales in rows.values())


def test_where_scales_differ_the_caption_says_so(drawn):
    for each in drawn.values():
        scales = {axes.get_ylim() for axes in each.figure.axes if axes.axison}
        if len(scales) > 1:
            assert "scale" in each.caption, each.name


def test_loss_gradient_norm_and_accuracy_are_drawn_per_beta(drawn, look):
    figure = drawn["training_lr1e-05"].figure
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == [label for label, _ in TRAINING.values()]
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["β = 0.02", "β = 0.1", "β = 0.2"]
    assert figure.axes[0].get_yscale() == "log", "IPO's loss is far above the others"
    assert figure.axes[-1].get_yscale() == "linear"
    drawn_labels = [line.get_label() for line in figure.axes[1].get_lines() if not line.get_label().startswith("_")]
    assert drawn_labels == [*dict.fromkeys(look.labels[v] for v in look.labels)], "all methods are on β = 0.1"


def test_a_curve_is_the_mean_of_its_seeds(large, found, drawn):
    group = next(group for group in found if group.method == "MinorDPO" and group.beta == 0.02)
    logs = [cell.log_history for cell in group.cells]
    expected = [(a["grad_norm"] + b["grad_norm"]) / 2 for a, b in zip(*logs, strict=True)]
    axes = drawn["training_lr1e-05"].figure.axes[3]
    (line,) = [line for line in axes.get_lines() if line.get_label() == "MinorDPO"]
    assert list(line.get_ydata()) == pytest.approx(expected)


def test_a_run_that_logged_once_is_visible(tmp_path):
    sweep = make_sweep(tmp_path, {"pref_loss": ["sigmoid"]})
    (cell,) = sweep.cells()
    train(sweep, cell)
    file = cell.model / "trainer_state.json"
    file.write_text('{"log_history": [{"step": 5, "loss": 0.5}]}')
    results = read_results(sweep.output)
    found = groups(results.cells)
    figures = {each.name: each.figure for each in draw(results, found, look_of(group.variant for group in found))}
    (line,) = figures["training_lr5e-05"].axes[0].get_lines()
    assert line.get_marker() == "o"
