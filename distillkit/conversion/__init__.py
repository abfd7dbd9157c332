"""Conversion: a pretrained transformer becomes an untrained student with another mixer in place of attention."""

from distillkit.conversion.convert import build_student as build_student
from distillkit.conversion.convert import convert as convert
from distillkit.conversion.convert import student_on_meta as student_on_meta
from distillkit.conversion.summary import ConversionSummary as ConversionSummary
from distillkit.conversion.summary import summarize as summarize
