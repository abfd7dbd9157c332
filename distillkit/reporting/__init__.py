"""What was measured, for people: tables, pictures, a report, a model card. Reads result files and nothing else."""

from distillkit.reporting.model_card import write_model_card as write_model_card
from distillkit.reporting.report import report_folder as report_folder
from distillkit.reporting.report import write_cards as write_cards
from distillkit.reporting.report import write_report as write_report
from distillkit.reporting.report import write_run_report as write_run_report
