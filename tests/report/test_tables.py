"""Tables as LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess

import pytest
from recorded_sweeps import make_sweep, score, score_pairs, tasks_of, train

from llamafactory_ext.report.page import write_report
from llamafactory_ext.report.tabular import STRONG, TEXT, Entry, Row, Table

ODD = r"*[=_&%#{}~^\$<>|"  # begins a row, where a star or a bracket would belong to the row before


def table(rows=(), data=()):
    return Table("name", "Title", "Caption.", ("method", "β"), tuple(map(Row, rows)), tuple(data))


def test_latex():
    made = table(
        [
            (Entry("Sr-DPO, sr_lambda = 0.3"), Entry("−0.5")),
            (Entry("100 % {x} ~ ^ \\ # $ &"), Entry("1–2", "failed")),
            (Entry("a"), Entry("1", STRONG)),
        ]
    )
    assert made.as_latex().splitlines() == [
        r"% \usepackage{booktabs}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"method & $\beta$ \\",
        r"\midrule",
        r"Sr-DPO, sr\_lambda = 0.3 & $-$0.5 \\",
        r"100 \% \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \# \$ \& & 1--2 \\",
        r"a & \textbf{1} \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_latex_of_sentences_and_of_several_lines():
    made = table([(Entry("a\nb"), Entry("“c” 5 %", TEXT, (("here", "place"),)))])
    lines = made.as_latex().splitlines()
    assert lines[1] == r"\begin{tabular}{lp{4cm}}"
    assert lines[5] == r"a b & ``c'' 5 \% \\"


def test_csv_has_every_digit_and_quotes_commas():
    rows = [{"method": "a, b", "p": 1 / 3}, {"method": "c", "tau": 0.5}]
    text = table(data=rows).as_csv()
    assert list(csv.DictReader(io.StringIO(text))) == [
        {"method": "a, b", "p": "0.3333333333333333", "tau": ""},
        {"method": "c", "p": "", "tau": "0.5"},
    ]


def test_text_is_no_formula_in_a_csv_file():
    texts = ["=1+1", "+cmd", "-x", "@SUM(A1)", "\t=1", "\r=1", "a=1", "", "-1e-5", "+3"]
    rows = [{"method": text, "p": -0.5} for text in texts]
    read = list(csv.DictReader(io.StringIO(table(data=rows).as_csv(), newline="")))
    assert [row["method"] for row in read] == [*(f"'{text}" for text in texts[:6]), *texts[6:]]
    assert {row["p"] for row in read} == {"-0.5"}


# --- whole reports ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latex(tmp_path_factory):
    """The LaTeX files of a report whose losses, values and cells have every special character in their names."""
    folder = tmp_path_factory.mktemp("latex")
    loss_file = folder / "losses.py"
    loss_file.write_text(
        f"from llamafactory_ext import register_loss\n\n@register_loss({ODD!r})\n"
        "def odd(pairs, *, beta, tau=0.5, name=''):\n    return -tau * beta * pairs.margin\n"
    )
    arguments = [{"tau": 0.5, "name": sign} for sign in "[=_&%#{}~^\\$"]
    axes = [
        {"pref_loss": "sigmoid"},
        {"pref_loss": ODD, "pref_loss_file": str(loss_file), "pref_loss_args": arguments},
        {"pref_loss": "sr_dpo", "sr_lambda": 0.3, "sr_prompt": ["100 % {sure}: ", "$5 & \\more #1_2\n\nLast "]},
    ]
    sweep = make_sweep(folder, axes, pairs={"dataset": "others"})
    tasks = tasks_of(sweep)
    for cell in sweep.cells():
        train(sweep, cell, tasks=tasks)
        score(sweep, cell.name, 5, tasks=tasks)
        score_pairs(sweep, cell, [1, -2], tasks)
    write_report(sweep.output, folder / "report")
    return sorted((folder / "report").glob("*.tex"))


def test_no_special_character_of_a_name_reaches_latex(latex):
    assert [file.stem for file in latex] == ["cells", "claims_sr", "degeneration", "pairs", "tests"]
    commands = ("textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar")
    shown = rf"\\[&%#_$\{{\}}]|\\(?:{'|'.join(commands)})\{{\}}|\$-\$|\$\\beta\$|\\dots\{{\}}|\{{[*\[]\}}"
    for file in latex:
        lines = file.read_text().splitlines()
        heads, *rows = (line for line in lines if line.endswith(r" \\"))
        for row in rows:
            cells = re.sub(shown, "", row.removesuffix(r" \\"))
            cells = re.sub(r"\\textbf\{([^{}]*)\}", r"\1", cells)
            assert not set(cells) & set(r"\%#_${}~^[*"), row
            assert cells.count(" & ") == cells.count("&") == heads.count(" & ")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX: apt-get install texlive-latex-recommended")
def test_latex_compiles(latex):
    folder = latex[0].parents[1]
    tables = "\n\n".join(f"\\input{{report/{file.name}}}" for file in latex)
    document = f"\\documentclass{{article}}\\usepackage{{booktabs}}\n\\begin{{document}}\n{tables}\n\\end{{document}}\n"
    (folder / "all.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    assert run.returncode == 0, run.stdout[-2000:]
    assert "Missing character" not in (folder / "all.log").read_text(errors="replace")
