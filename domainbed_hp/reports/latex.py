"""Tables as LaTeX with booktabs: a complete document, or a fragment for `\\input`."""

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
    # At the start of a row, these two would be read as arguments of the \\ before it.
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


def escape_latex(text: str) -> str:
    """Return text for LaTeX; a character that plain pdflatex cannot print becomes its code, e.g. U+03BB."""

    def escape(c: str) -> str:
        return LATEX.get(c, c if ord(c) < 256 and c not in "«»ÐÞðþ" else f"U+{ord(c):04X}")

    return "".join(map(escape, text))


def to_latex(report: Report) -> str:
    """Return a document with a subsection per selection method and a table per data set."""
    lines = [r"\begin{document}", r"\section{Full DomainBed results}", f"% Total records: {report.num_records}"]
    for method, tables in report.group_by_method():
        lines += ["", rf"\subsection{{Model selection: {escape_latex(method.name)}}}"]
        for table in tables:
            lines += ["", rf"\subsubsection{{{escape_latex(table.title)}}}", *format_table(report, table)]
    for published in report.published:
        lines += ["", rf"\subsection{{{escape_latex(published.title)}}}", r"\begin{center}"]
        lines += [*format_tabular(published.header, published.format_lines()), r"\end{center}"]
        lines += [rf"{{\footnotesize {escape_latex(note)}\par}}" for note in published.list_notes()]
    return DOCUMENT + FIT + "\n".join([*lines, r"\end{document}"]) + "\n"


def to_fragment(report: Report) -> str:
    """Return the same tables as floats with captions, without a preamble."""
    lines = [f"% Total records: {report.num_records}"]
    for table in report.tables:
        caption = rf"\caption{{{escape_latex(table.title)}, model selection: {escape_latex(table.method.name)}.}}"
        lines += ["", r"\begin{table}", caption, *format_table(report, table), r"\end{table}"]
    for published in report.published:
        lines += ["", r"\begin{table}", rf"\caption{{{escape_latex(published.title)}.}}", r"\begin{center}"]
        lines += [*format_tabular(published.header, published.format_lines()), r"\end{center}"]
        lines += [*(rf"{{\footnotesize {escape_latex(note)}\par}}" for note in published.list_notes()), r"\end{table}"]
    return FRAGMENT + FIT + "\n".join(lines) + "\n"


def format_table(report: Report, table: Table) -> list[str]:
    """Return the lines of a centred table and of a note on its missing jobs."""
    ranks = table.rank_cells()

    def format_cell(i: int, j: int, cell: Cell) -> str:
        text = cell.format(r"$\pm$")
        text = {1: rf"\textbf{{{text}}}", 2: rf"\underline{{{text}}}"}.get(ranks[i][j], text)
        return text + r"$^{\dagger}$" if cell.missing else text

    grid = [[escape_latex(row), *cells] for row, *cells in table.format_lines(format_cell)]
    lines = [r"\begin{center}", *format_tabular(table.header, grid, raw=True), r"\end{center}"]
    if notes := report.list_missing(table):
        jobs = "; ".join(escape_latex(note) for note in notes)
        lines.append(rf"{{\footnotesize $^{{\dagger}}$ Incomplete, for want of: {jobs}.\par}}")
    return lines


def format_tabular(header: Sequence[str], grid: Sequence[Sequence[str]], raw: bool = False) -> list[str]:
    """Return the lines of a booktabs table, shrunk if it is wider than the page. Cells are escaped unless `raw`."""
    # DEVIATION: names are escaped and never cut; DomainBed cuts \textbf{...} within its braces.
    head = [rf"\textbf{{{escape_latex(text)}}}" for text in header]
    body = [row if raw else [escape_latex(text) for text in row] for row in grid]
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
