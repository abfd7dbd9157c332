"""From a teacher to a captured dataset, and from one captured dataset to another."""

from distillkit.capture.run import capture as capture
