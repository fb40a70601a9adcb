"""What a run leaves behind for people: metrics, progress, tables, plots and the report."""

from minillm_jax.reporting.progress import Progress, print_table
from minillm_jax.reporting.report import write_report
from minillm_jax.reporting.writers import (
    MetricsWriter,
    RowLog,
    read_json,
    read_rows,
    write_json,
    write_rows,
    write_text,
)

__all__ = [
    "MetricsWriter",
    "Progress",
    "RowLog",
    "print_table",
    "read_json",
    "read_rows",
    "write_json",
    "write_report",
    "write_rows",
    "write_text",
]
