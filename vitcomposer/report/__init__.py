"""Tells what became of runs, of one or of several side by side, as one HTML page without network or script."""

from vitcomposer.report.single import has_report, report_at_end, write_report

__all__ = ["has_report", "report_at_end", "write_report"]
