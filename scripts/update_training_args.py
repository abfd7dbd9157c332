"""Writes distillkit/config/training_args.json from the installed transformers: run it after an upgrade."""

import dataclasses
import importlib.metadata
import json

from distillkit.config.transformers_arguments import FILE, installed_arguments


def main() -> None:
    """One argument per line."""
    lines = []
    for name, argument in installed_arguments().items():
        given = {key: value for key, value in dataclasses.asdict(argument).items() if value}
        lines.append(f"  {json.dumps(name)}: {json.dumps(given, ensure_ascii=False)}")
    version = json.dumps(importlib.metadata.version("transformers"))
    arguments = ",\n".join(lines)
    FILE.write_text(f'{{\n "transformers": {version},\n "arguments": {{\n{arguments}\n }}\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
