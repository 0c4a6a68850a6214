"""`ftk prepare`."""

from typing import Annotated, Any

import typer

from ftk.cli.options import DryRun, Json, Overrides, RunFile, Workspace, load_run, show


def prepare(
    run_file: RunFile,
    overrides: Overrides = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
    json: Json = False,
    part: Annotated[
        str, typer.Option("--part", metavar="I/N", help="Make the I-th of N parts: one job of an array on many machines.")
    ] = "1/1",
    make_class_images: Annotated[
        bool, typer.Option("--make-class-images", help="First draw the class images that are missing, with the base model.")
    ] = False,
) -> None:
    """Bucket, resize and crop images into tar shards with tables; every input is a sample or a reject with a reason."""
    resolved = load_run(run_file, overrides, workspace)
    from ftk.pipeline import stage
    from ftk.pipeline.engine import JobPart

    share = JobPart.parse(part)
    if make_class_images:
        _check_class_images(resolved.config, part)
    if dry_run:
        _show_plan(stage.dry_run(resolved, share), json)
        return
    if make_class_images:
        stage.check(resolved)
        from ftk.deliver import draw_class_images

        draw_class_images.run(resolved)
    show("prepare", stage.run(resolved, share), json)


def _show_plan(plan: dict[str, Any], json: bool) -> None:
    """The plan; for people with its buckets as `ftk inspect` shows those of a finished dataset."""
    if json:
        show("prepare", plan, json)
        return
    from ftk.cli.inspect_tables import print_buckets

    show("prepare", {name: value for name, value in plan.items() if name != "buckets"}, json)
    print_buckets(plan["buckets"])


def _check_class_images(config: Any, part: str) -> None:
    from ftk.errors import ConfigError

    if part != "1/1":
        raise ConfigError(
            f"--part {part} and --make-class-images do not go together: draw the images in one job, then start the parts."
        )
    if not any(source.generate for source in config.data.sources):
        raise ConfigError(
            "--make-class-images: no source says what to draw. Write it beside the `role: class` of a source, for example "
            "generate: {prompt: a photo of a dog, count: 200}"
        )
