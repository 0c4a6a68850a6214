"""`ftk run`: all stages, each of which skips what is done."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ftk.cli.options import DryRun, Json, Overrides, RunFile, Workspace, load_run, show

if TYPE_CHECKING:
    from ftk.run import Run


def run(
    run_file: RunFile,
    overrides: Overrides = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Prepare, cache and train, skipping what is done."""
    resolved = load_run(run_file, overrides, workspace)
    reports = plan_all(resolved) if dry_run else run_all(resolved)
    if json:
        show("run", reports, as_json=True)
        return
    for title, report in reports.items():
        show(title, report, as_json=False)


def run_all(resolved: "Run") -> dict[str, dict[str, Any]]:
    """One report per stage, by its name. Model folder and optimizer are checked first: a wrong one fails before any work."""
    from ftk.train.inputs import check_optimizer

    check_optimizer(resolved)
    resolved.locate(resolved.all_components)
    from ftk.pipeline import stage as prepare

    reports = {"prepare": asdict(prepare.run(resolved))}
    from ftk.cache import stage as cache

    reports["cache"] = asdict(cache.run(resolved))
    from ftk.deliver.run_delivery import RunDelivery
    from ftk.train import stage as train

    report = train.run(resolved, RunDelivery)
    return reports if report is None else {**reports, "train": asdict(report)}


def plan_all(resolved: "Run") -> dict[str, Any]:
    """The plans of the stages that can be planned yet: a later stage's needs what the one before it writes."""
    from ftk.errors import CacheError, DatasetError
    from ftk.pipeline import stage as prepare

    plans: dict[str, Any] = {"prepare": prepare.dry_run(resolved)}
    from ftk.cache import stage as cache
    from ftk.train import stage as train

    for name, plan in (("cache", cache.dry_run), ("train", train.dry_run)):
        try:
            plans[name] = plan(resolved)
        except (DatasetError, CacheError) as error:
            plans[name] = {"not_yet": str(error)}
            break
    return plans
