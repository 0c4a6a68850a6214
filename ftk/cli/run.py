"""`ftk run`: all stages, each of which skips what is done."""

from dataclasses import asdict
from typing import Any

from ftk.cli.options import DryRun, Json, Overrides, RunFile, Workspace, load_config, show


def run(
    run_file: RunFile,
    overrides: Overrides = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Prepare, cache and train, skipping what is done."""
    config = load_config(run_file, overrides, workspace)
    reports = plan_all(config) if dry_run else run_all(config)
    if json:
        show("run", reports, as_json=True)
        return
    for title, report in reports.items():
        show(title, report, as_json=False)


def run_all(config: Any) -> dict[str, dict[str, Any]]:
    """One report a stage, by its name. Model folder and optimizer are looked at first: a wrong one fails before any work."""
    from ftk.models import base as models
    from ftk.train import optim

    family = models.get(config.model.family)
    optim.check(config.train)
    models.locate(config.model, (*family.latent_components, *family.text_components, *family.denoiser_components))
    from ftk.pipeline import stage as prepare

    reports = {"prepare": asdict(prepare.run(config))}
    from ftk.cache import stage as cache

    reports["cache"] = asdict(cache.run(config))
    from ftk.deliver.run_delivery import RunDelivery
    from ftk.train import stage as train

    report = train.run(config, RunDelivery)
    return reports if report is None else {**reports, "train": asdict(report)}


def plan_all(config: Any) -> dict[str, Any]:
    """The plans of the stages that can be planned yet: a later stage's needs what the one before it writes."""
    from ftk.errors import CacheError, DatasetError
    from ftk.pipeline import stage as prepare

    plans: dict[str, Any] = {"prepare": prepare.dry_run(config)}
    from ftk.cache import stage as cache
    from ftk.train import stage as train

    for name, plan in (("cache", cache.dry_run), ("train", train.dry_run)):
        try:
            plans[name] = plan(config)
        except (DatasetError, CacheError) as error:
            plans[name] = {"not_yet": str(error)}
            break
    return plans
