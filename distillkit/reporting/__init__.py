"""What was measured, for people: tables, pictures, a report, a model card. Reads result files and nothing else."""

from distillkit.reporting.report import write_report as write_report
