"""Which families stand for a denoiser: what a method does to one does not depend on what it is shown."""

from ftk.models import base as families


def families_of_each() -> list[str]:
    """Every family but those that are written as another one's subclass, such as an edit model beside its first model."""
    types = {name: type(families.get(name)) for name in families.available()}

    def is_subclass(kind: type) -> bool:
        return any(kind is not other and issubclass(kind, other) for other in types.values())

    return [name for name, kind in types.items() if not is_subclass(kind)]
