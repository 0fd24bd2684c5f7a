"""Tables as LaTeX and CSV."""

from __future__ import annotations

import csv
import io

from llamafactory_ext.report.tables import STRONG, Entry, Row, Table


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


def test_csv_has_every_digit_and_quotes_commas():
    rows = [{"method": "a, b", "p": 1 / 3}, {"method": "c", "tau": 0.5}]
    text = table(data=rows).as_csv()
    assert list(csv.DictReader(io.StringIO(text))) == [
        {"method": "a, b", "p": "0.3333333333333333", "tau": ""},
        {"method": "c", "p": "", "tau": "0.5"},
    ]
