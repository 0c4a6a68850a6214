"""A method that only the tests hold: a LoRA on captions with new words, which needs class images as well."""

from typing import ClassVar

from pydantic import BaseModel, Field

from ftk.methods.base import CacheNeeds
from ftk.methods.lora import Lora, LoraConfig
from ftk.models.base import Family
from ftk.models.components.placeholders import Placeholder


class NewWordsConfig(LoraConfig):
    """Settings under `method:`."""

    words: dict[str, str | None] = Field(description="each new word, and the words that it starts from")
    vectors: int = Field(default=1, description="how many tokens each is")
    class_images: bool = Field(default=False, description="whether there must be class images")


class NewWords(Lora):
    """Its texts are encoded with the new words."""

    name = "new-words"
    Config: ClassVar[type[BaseModel]] = NewWordsConfig

    def cache_needs(self, family: Family, settings: NewWordsConfig) -> CacheNeeds:
        """The words, and class images if they are asked for."""
        words = {word: Placeholder(vectors=settings.vectors, start=start) for word, start in settings.words.items()}
        return CacheNeeds(placeholder_tokens=words, class_images=settings.class_images)


METHOD = NewWords()
