"""What `ftk prepare` says of its work: the report, its warnings, and the errors where too little was good."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ftk import storage
from ftk.configs.schema import DataConfig, RunConfig, SourceConfig
from ftk.contracts import PreparedManifest, Reject, RejectReason, ShardRecord
from ftk.errors import SourceError, TooManyRejects
from ftk.pipeline import caption_check, control_kinds, images, shard_writer
from ftk.pipeline.engine import Lost
from ftk.pipeline.outcomes import Reused
from ftk.pipeline.reachability import Reachability
from ftk.pipeline.shard_writer import Made
from ftk.pipeline.sources.base import MOST_EXAMPLES, Notes, Record

LOGGER = logging.getLogger("ftk")
# Measured on photographs of one megapixel; only for the estimate of a dry run.
_BYTES_A_PIXEL = {"auto": 0.6, "jpeg": 0.6, "png": 2.0, "webp": 1.3}
# Of a PNG: edges take a twentieth of that, photographs three times as much.
_CONTROL_BYTES_A_PIXEL = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareReport:
    """What `ftk prepare` did; `buckets` maps WIDTHxHEIGHT to samples, `controls` kinds to control images.

    `num_shards_missing` is of a part of a job array that ended before the others: the dataset is sealed by the last.
    `fallback_captions` are images that took their source's `caption:`, `unmatched_captions` text files that are no image's
    caption: of both the first.
    """

    num_inputs: int
    num_samples: int
    num_rejects: int
    rejects_by_reason: dict[str, int]
    num_shards: int
    num_shards_reused: int
    num_shards_missing: int
    num_upscaled: int
    num_copied: int
    num_long_captions: int
    num_duplicates: int
    num_near_duplicates: int
    num_empty_masks: int
    num_fallback_captions: int
    num_unmatched_captions: int
    num_cut_wildcards: int
    buckets: dict[str, int]
    controls: dict[str, int]
    directory: str
    rejects: list[dict[str, str]]
    fallback_captions: list[str]
    unmatched_captions: list[dict[str, str]]
    hints: list[str]
    caption_findings: list[dict[str, Any]]


def of_dataset(directory: Path, manifest: PreparedManifest, num_reused: int) -> PrepareReport:
    """The report on a committed dataset."""
    rejects = [reject for shard in manifest.shards for reject in shard.rejects]
    same = {field.name for field in fields(PrepareReport)} & {field.name for field in fields(PreparedManifest)}
    plain = {name: getattr(manifest, name) for name in same}
    return PrepareReport(
        **{
            **plain,
            "unmatched_captions": [asdict(one) for one in manifest.unmatched_captions],
            "caption_findings": [asdict(one) for one in manifest.caption_findings],
        },
        num_shards=len(manifest.shards),
        num_shards_reused=num_reused,
        num_shards_missing=0,
        controls=_controls(directory, manifest.shards, manifest.recipe),
        directory=str(directory),
        rejects=[_plain(reject) for reject in rejects],
    )


def of_part(directory: Path, recipe: Mapping[str, Any], made: Sequence[Made], num_missing: int, notes: Notes) -> PrepareReport:
    """The report on the shards that are there while other parts are still at work; duplicates are found at the end."""
    shards = [shard for unit in made for shard in unit.shards]
    rejects = [reject for shard in shards for reject in shard.rejects]
    buckets: Counter[str] = Counter()
    for shard in shards:
        buckets.update(shard.buckets)
    of_captions = notes_of(shards, notes)
    return PrepareReport(
        num_inputs=sum(shard.num_inputs for shard in shards),
        num_samples=sum(shard.num_samples for shard in shards),
        num_rejects=len(rejects),
        rejects_by_reason=dict(sorted(Counter(reject.reason.value for reject in rejects).items())),
        num_shards=len(shards),
        num_shards_reused=sum(unit.num_reused for unit in made),
        num_shards_missing=num_missing,
        num_upscaled=sum(shard.num_upscaled for shard in shards),
        num_copied=sum(shard.num_copied for shard in shards),
        num_long_captions=sum(shard.num_long_captions for shard in shards),
        num_duplicates=0,
        num_near_duplicates=0,
        num_empty_masks=sum(len(shard.empty_masks) for shard in shards),
        buckets=dict(sorted(buckets.items())),
        controls=_controls(directory, shards, recipe),
        directory=str(directory),
        rejects=[_plain(reject) for reject in rejects],
        caption_findings=[],
        **{**of_captions, "unmatched_captions": [asdict(one) for one in notes.unmatched_captions]},
    )


def _controls(directory: Path, shards: Sequence[ShardRecord], recipe: Mapping[str, Any]) -> dict[str, int]:
    """Control images by kind; no table is read where no source has any."""
    if not any(source.get("controls") for source in recipe["sources"].values()):
        return {}
    tables = (storage.read_table(shard_writer.shard_files(directory, shard.name)[1], control_kinds.COLUMNS) for shard in shards)
    return control_kinds.count_tables(tables, recipe)


def notes_of(shards: Sequence[ShardRecord], notes: Notes) -> dict[str, Any]:
    """The manifest's and the report's fields on where captions came from."""
    return {
        "num_fallback_captions": sum(shard.num_fallback_captions for shard in shards),
        "fallback_captions": [name for shard in shards for name in shard.fallback_captions][:MOST_EXAMPLES],
        "num_unmatched_captions": notes.num_unmatched_captions,
        "num_cut_wildcards": sum(shard.num_cut_wildcards for shard in shards),
        "unmatched_captions": list(notes.unmatched_captions),
        "hints": list(notes.hints),
    }


def check_unreachable(report: PrepareReport, data: DataConfig, reachability: Reachability) -> None:
    """Raise when the network is down, or too many remote files cannot be fetched; warn when some cannot."""
    unreachable = report.rejects_by_reason.get(RejectReason.UNREACHABLE.value, 0)
    if unreachable > data.max_unreachable_fraction * report.num_inputs or (unreachable and not report.num_samples):
        if not reachability.num_failed:  # other parts or machines have counted them
            reachability.has_kept = bool(report.num_samples)
            for reject in report.rejects:
                if reject["reason"] == RejectReason.UNREACHABLE.value:
                    reachability.note(RejectReason.UNREACHABLE, reject["detail"])
        raise reachability.error()
    if unreachable:
        LOGGER.warning(
            "%s remote images could not be fetched; %s/rejects.parquet says why for each. Run the command again to ask for "
            "them once more.",
            f"{unreachable:,}",
            report.directory,
        )


def check_rejects(report: PrepareReport, data: DataConfig) -> None:
    """Raise when nothing, or too little, was good."""
    listed = "".join(
        "\n  " + " ".join(f"{row['path']}: {row['reason']} ({row['detail']})".splitlines()) for row in report.rejects[:10]
    )
    more = f"\n  and {report.num_rejects - 10:,} more" if report.num_rejects > 10 else ""
    table, nearby = f"{report.directory}/rejects.parquet", _captions_nearby(report)
    if not report.num_inputs:
        raise SourceError("The sources hold no image: no file, row or tar member that could become one. Check data.sources.")
    if not report.num_samples:
        raise SourceError(f"No image could be used; {table} says why for each:{listed}{more}{nearby}")
    num_rejects = report.num_rejects - report.rejects_by_reason.get(RejectReason.UNREACHABLE.value, 0)
    if num_rejects > data.max_reject_fraction * report.num_inputs:
        raise TooManyRejects(
            f"{num_rejects:,} of {report.num_inputs:,} images were rejected, more than data.max_reject_fraction "
            f"{data.max_reject_fraction:g} allows:{listed}{more}{nearby}\nThe {report.num_samples:,} good samples are kept in "
            f"{report.directory}. Mend the inputs and run the command again, or raise data.max_reject_fraction."
        )


def _captions_nearby(report: PrepareReport) -> str:
    """Where captions are missing: the text files that may be theirs."""
    if "caption_missing" not in report.rejects_by_reason or not report.num_unmatched_captions:
        return ""
    files = "".join(
        f"\n  {file['path']}{', perhaps of ' + file['likely_image'] if file['likely_image'] else ''}: {file['detail']}"
        for file in report.unmatched_captions[:5]
    )
    more = f"\n  and {report.num_unmatched_captions - 5:,} more" if report.num_unmatched_captions > 5 else ""
    return f"\nText files that are no image's caption:{files}{more}"


def warn_of_captions(manifest: PreparedManifest) -> None:
    """Say what captions hold that is probably not meant; what all of them share may well be, and stands in the report."""
    for finding in manifest.caption_findings:
        if finding.kind != "invariant":
            LOGGER.warning("%s", caption_check.sentence(finding))
    if manifest.num_cut_wildcards:
        LOGGER.warning(
            "images: %s with a caption of more variants than the setting captions.wildcards, so that some were left out",
            f"{manifest.num_cut_wildcards:,}",
        )


def warn_of_empty_masks(manifest: PreparedManifest, config: RunConfig) -> None:
    """Name the samples of which a run that trains the masked part alone would learn nothing."""
    if not manifest.num_empty_masks or config.train.loss.unmasked_weight:
        return
    names = list(dict.fromkeys(name for shard in manifest.shards for name in shard.empty_masks))
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    LOGGER.warning(
        "%d samples have a mask that is black all over where the image is used, so train.loss.unmasked_weight 0 leaves nothing "
        "to train: %s%s. Correct their masks, or remove the images from the source.",
        manifest.num_empty_masks,
        ", ".join(names[:10]),
        more,
    )


def _plain(reject: Reject) -> dict[str, str]:
    return {name: str(value) for name, value in asdict(reject).items()}


def _num_pixels(probe: images.Probe) -> int:
    return sum(place.bucket_width * place.bucket_height for place in probe.placements)


class Estimate:
    """What a dry run counts from captions and the headers of images."""

    def __init__(self) -> None:
        self.num_inputs = self.num_shards = 0
        self.notes = Notes()
        self._num_upscaled = self._num_pixels = self._num_control_pixels = self._num_fallback_captions = 0
        self._buckets: Counter[str] = Counter()
        self._controls: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    def add(
        self,
        item: Record | Reject | Reused,
        probe: images.Probe | images.ImageProblem | Lost | None,
        source: SourceConfig,
    ) -> None:
        """Count an input of a source: `probe` is what its header says, or why it has no sample."""
        if isinstance(probe, images.Probe):
            self._add_controls(item, probe, source)
            self._num_fallback_captions += isinstance(item, Record) and item.is_fallback
            self._buckets.update(f"{place.bucket_width}x{place.bucket_height}" for place in probe.placements)
            self._num_upscaled += sum(place.upscales(probe.width, probe.height) for place in probe.placements)
            self._num_pixels += _num_pixels(probe)
            return
        problem = item if isinstance(item, Reject) else probe
        assert problem is not None
        self._rejected[problem.reason.value] += 1

    def _add_controls(self, item: Record | Reject | Reused, probe: images.Probe, source: SourceConfig) -> None:
        assert isinstance(item, Record)
        num_references = len(source.references) if item.num_references is None else item.num_references
        num_controls = len(item.controls) - num_references + len(source.made_controls)
        num_samples = len(probe.placements)
        self._controls += control_kinds.count(num_samples, num_samples * num_controls, source.model_extra or {})
        self._num_control_pixels += num_controls * _num_pixels(probe)

    def report(self, image_format: str) -> dict[str, Any]:
        """The counts, under the names that the report of a real run has."""
        return {
            "num_inputs": self.num_inputs,
            "num_samples": self._buckets.total(),
            "num_rejects": self._rejected.total(),
            "rejects_by_reason": dict(sorted(self._rejected.items())),
            "num_shards": self.num_shards,
            "num_upscaled": self._num_upscaled,
            "num_fallback_captions": self._num_fallback_captions,
            "num_unmatched_captions": self.notes.num_unmatched_captions,
            "unmatched_captions": [asdict(each) for each in self.notes.unmatched_captions],
            "hints": list(self.notes.hints),
            "estimated_bytes": round(
                self._num_pixels * _BYTES_A_PIXEL[image_format] + self._num_control_pixels * _CONTROL_BYTES_A_PIXEL
            ),
            "buckets": dict(sorted(self._buckets.items())),
            "controls": dict(sorted(self._controls.items())),
        }
