"""Tables as LaTeX with booktabs: a document that compiles alone, or a fragment for `\\input`."""

from __future__ import annotations

from collections.abc import Sequence

from domainbed_hp.reports.report import Report
from domainbed_hp.reports.tables import Cell, Table

LATEX = {character: "\\" + character for character in "%_&#${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # At the start of a row these would be read as arguments of the \\ before it.
    "[": "{[}",
    "*": "{*}",
}
DOCUMENT = r"""\documentclass{article}
\usepackage{booktabs,graphicx}
\usepackage[margin=1in]{geometry}
"""
FRAGMENT = r"""% \input this into a document that has \usepackage{booktabs,graphicx}
"""
# DEVIATION: DomainBed shrinks wide tables with adjustbox, which small TeX installations lack.
FIT = r"""\ifdefined\fitbox\else\newsavebox{\fitbox}\fi
\providecommand{\fit}[1]{\sbox{\fitbox}{#1}%
  \ifdim\wd\fitbox>\textwidth\resizebox{\textwidth}{!}{\usebox{\fitbox}}\else\usebox{\fitbox}\fi}
"""


def escape(text: str) -> str:
    """Text as LaTeX prints it; characters that plain pdflatex has no letter for become their code, e.g. U+03BB."""
    known = [c for c in text if ord(c) < 256 and c not in "«»ÐÞðþ"]
    return "".join(LATEX.get(c, c if c in known else f"U+{ord(c):04X}") for c in text)


def to_latex(report: Report) -> str:
    """A subsection per selection method, a table per dataset."""
    lines = [r"\begin{document}", r"\section{Full DomainBed results}", f"% Total records: {report.num_records}"]
    for method, tables in report.by_method():
        lines += ["", rf"\subsection{{Model selection: {escape(method.name)}}}"]
        for table in tables:
            lines += ["", rf"\subsubsection{{{escape(table.title)}}}", *centred(report, table)]
    for published in report.published:
        lines += ["", rf"\subsection{{{escape(published.title)}}}", r"\begin{center}"]
        lines += [*tabular(published.header, published.lines()), r"\end{center}"]
        lines += [rf"{{\footnotesize {escape(note)}\par}}" for note in published.notes()]
    return DOCUMENT + FIT + "\n".join([*lines, r"\end{document}"]) + "\n"


def to_fragment(report: Report) -> str:
    """The same tables, each a float with a caption and nothing else."""
    lines = [f"% Total records: {report.num_records}"]
    for table in report.tables:
        caption = rf"\caption{{{escape(table.title)}, model selection: {escape(table.method.name)}.}}"
        lines += ["", r"\begin{table}", caption, *centred(report, table), r"\end{table}"]
    for published in report.published:
        lines += ["", r"\begin{table}", rf"\caption{{{escape(published.title)}.}}", r"\begin{center}"]
        lines += [*tabular(published.header, published.lines()), r"\end{center}"]
        lines += [*(rf"{{\footnotesize {escape(note)}\par}}" for note in published.notes()), r"\end{table}"]
    return FRAGMENT + FIT + "\n".join(lines) + "\n"


def centred(report: Report, table: Table) -> list[str]:
    """A table, and under it what its incomplete cells lack."""
    ranks = table.ranks()

    def show(i: int, j: int, cell: Cell) -> str:
        text = cell.format(r"$\pm$")
        text = {1: rf"\textbf{{{text}}}", 2: rf"\underline{{{text}}}"}.get(ranks[i][j], text)
        return text + r"$^{\dagger}$" if cell.missing else text

    grid = [[escape(row), *cells] for row, *cells in table.grid(show)]
    lines = [r"\begin{center}", *tabular(table.header, grid, raw=True), r"\end{center}"]
    if notes := report.lacking(table):
        told = "; ".join(escape(note) for note in notes)
        lines.append(rf"{{\footnotesize $^{{\dagger}}$ Incomplete, for want of: {told}.\par}}")
    return lines


def tabular(header: Sequence[str], grid: Sequence[Sequence[str]], raw: bool = False) -> list[str]:
    """A booktabs table, shrunk where it is wider than the page; cells are escaped unless they are `raw`."""
    # DEVIATION: names are escaped and never cut; DomainBed cuts \textbf{...} within its braces.
    head = [rf"\textbf{{{escape(text)}}}" for text in header]
    body = [row if raw else [escape(text) for text in row] for row in grid]
    return [
        r"\fit{%",
        rf"\begin{{tabular}}{{l{'c' * (len(header) - 1)}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in body),
        r"\bottomrule",
        r"\end{tabular}}",
    ]
