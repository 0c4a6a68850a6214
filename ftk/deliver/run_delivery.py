"""What a run delivers while it trains: weights with their model card in `adapter/` and `best/`."""

from ftk import storage
from ftk.deliver import card, metadata
from ftk.methods.base import Export
from ftk.models.base import Model
from ftk.train import checkpoint
from ftk.train.inputs import Inputs
from ftk.train.ranks import Ranks


class RunDelivery:
    """Each file is written whole or not at all, and a run that goes on writes them again: equal states give equal bytes."""

    def __init__(self, inputs: Inputs, model: Model, ranks: Ranks) -> None:
        self._run = inputs.run
        self._inputs = inputs
        self._model = model
        self._ranks = ranks
        self._directory = inputs.run.paths.run
        self._is_counted = False

    def export(self, step: int, folder: str) -> None:
        """The weights as they are in the model now, of a step; all processes that have a part of them."""
        self._count()
        method, subject = self._run.method, self._subject(step)
        form, place = self._run.formats[0], self._directory / folder
        export = Export(directory=place, form=form, metadata=metadata.of(subject))
        method.export(self._model, self._run.settings, export)
        if self._ranks.is_main:
            card.write(subject, place, card.loading(subject, form))

    def renew_cards(self, step: int) -> None:
        """Put the sample images of a step on the cards of its weights: they are drawn after those are written."""
        checkpoints = self._directory / "checkpoints"
        is_of_step = {"adapter": (checkpoints / f"{step:08d}").is_dir(), "best": checkpoint.best_step(checkpoints) == step}
        subject = self._subject(step)
        for folder in [name for name, is_it in is_of_step.items() if is_it]:
            card.write(subject, self._directory / folder, card.loading(subject, self._run.formats[0]))

    def _subject(self, step: int) -> metadata.Subject:
        return metadata.Subject(run=self._run, step=step, model=self._inputs.model)

    def _count(self) -> None:
        if self._ranks.is_main and not self._is_counted:
            counted = metadata.trained_on(self._inputs.store, len(self._inputs.order.held_out), self._inputs.sizes.start)
            storage.commit_json(self._directory / metadata.TRAINED_ON, counted)
            self._is_counted = True
