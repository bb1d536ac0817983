"""A page of pictures about runs, made from their folders alone."""

from pion_hf.report.page import table, write_report

__all__ = ["table", "write_report"]
