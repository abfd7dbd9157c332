"""`training_args.push_to_hub`: a finished run's folder goes to the hub, once, with everything that was written there.

The student is safe on disk by then. An error of the hub ends in one line, and `--resume` tries again.
"""

from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi, get_token
from rich.console import Console

from distillkit.config import RunConfig, UserError
from distillkit.console import print_line
from distillkit.runs.names import CHECKPOINT, PHASES, UNTRAINED
from distillkit.runs.record import read_record

LEFT_OUT = (f"{PHASES}/*", f"{UNTRAINED}/*", f"{CHECKPOINT}*", "_*", ".*")
"""What a run keeps in its folder that is not its result."""


def check_token(config: RunConfig) -> None:
    """Raises `UserError` where the run is to be pushed, and there is nothing to log in with."""
    if config.training_args.get("push_to_hub") and get_token() is None:
        raise UserError(
            "training_args.push_to_hub",
            "there is no token of the hub; set HF_TOKEN in the environment, or log in with `hf auth login`",
        )


def push(config: RunConfig, console: Console) -> None:
    """Upload the folder of a finished run where `push_to_hub` is set, once. One process does it, last.

    Raises:
        UserError: the hub does not take it, or is not there.
    """
    arguments, folder = config.training_args, Path(config.output_path)
    if not arguments.get("push_to_hub"):
        return
    name, revision = arguments.get("hub_model_id") or folder.name, arguments.get("hub_revision")
    target = {"hub_model_id": name, "hub_revision": revision}
    record = read_record(folder)
    if record is None or record.pushed == target:
        return
    api = HfApi()
    try:
        name = api.create_repo(name, private=arguments.get("hub_private_repo"), exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        print_line(console, f"uploading {folder} to {name}")
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message="A student of distillkit",
            ignore_patterns=list(LEFT_OUT),
        )
    except Exception as error:  # of the network, of the hub, of the name
        raise UserError(
            "training_args.push_to_hub",
            f"{type(error).__name__}: {error}; the student is safe in {str(folder)!r}, and --resume tries again",
        ) from None
    replace(record, pushed=target).write(folder)
    print_line(console, f"the student is on the hub: {name}")
