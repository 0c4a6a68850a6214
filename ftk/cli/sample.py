"""`ftk sample`."""

from ftk.cli.export import Best, Dtype, Step, choice_of
from ftk.cli.options import DryRun, Json, Overrides, RunFile, Workspace, load_run, show


def sample(
    run_file: RunFile,
    best: Best = False,
    step: Step = None,
    dtype: Dtype = None,
    overrides: Overrides = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Draw the prompts with the base model and with what was trained, side by side in one PNG."""
    resolved = load_run(run_file, overrides, workspace)
    from ftk.deliver import sample as stage

    choice = choice_of(best, step, dtype)
    show("sample", stage.dry_run(resolved, choice) if dry_run else stage.run(resolved, choice), json)
