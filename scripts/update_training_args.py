"""Writes distillkit/config/training_args.json from the installed transformers: run it after an upgrade."""

from distillkit.config.transformers_arguments import write_file

if __name__ == "__main__":
    write_file()
