"""A method that only the tests hold: a LoRA on captions with new words, which needs class images as well."""

from typing import ClassVar

from pydantic import BaseModel, Field

from ftk.methods.base import CacheNeeds
from ftk.methods.lora import Lora, LoraConfig
from ftk.models.base import Family


class NewWordsConfig(LoraConfig):
    """Settings under `method:`."""

    words: dict[str, str] = Field(description="each new word, and the word that it starts from")
    class_images: bool = Field(default=False, description="whether there must be class images")


class NewWords(Lora):
    """Its texts are encoded with the new words."""

    name = "new-words"
    Config: ClassVar[type[BaseModel]] = NewWordsConfig

    def cache_needs(self, family: Family, settings: NewWordsConfig) -> CacheNeeds:
        """The words, and class images if they are asked for."""
        return CacheNeeds(placeholder_tokens=settings.words, class_images=settings.class_images)


METHOD = NewWords()
