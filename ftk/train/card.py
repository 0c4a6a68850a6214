"""What delivered weights say of themselves: metadata in the files, and the model card beside them."""

import ftk
from ftk.configs.load import redact
from ftk.configs.schema import RunConfig


def metadata(config: RunConfig, step: int) -> dict[str, str]:
    """What a delivered file says of itself; secrets redacted."""
    triggers = sorted({source.trigger for source in config.data.sources if source.trigger})
    return {
        "ftk_version": ftk.__version__,
        "ftk_base_model": redact(config.model.path),
        "ftk_family": config.model.family,
        "ftk_method": config.method.name,
        "ftk_step": str(step),
        "ftk_resolutions": ", ".join(map(str, config.data.resolutions)),
        **({"ftk_triggers": redact(", ".join(triggers))} if triggers else {}),
    }


def model_card(config: RunConfig, step: int, usage: str) -> str:
    """README.md: the base model, how to load the weights, and what they were watched with.

    Args:
        usage: Python lines that load the weights into `pipeline`.
    """
    prompts = "".join(f"- {prompt}\n" for prompt in config.sample.prompts)
    trigger = sorted({source.trigger for source in config.data.sources if source.trigger})
    lines = [
        "---",
        f"base_model: {config.model.path}",
        "tags: [ftk, diffusers, text-to-image]",
        "---",
        f"# {config.run}",
        f"A {config.method.name} for {config.model.family}, trained for {step} steps with ftk {ftk.__version__}.",
        "",
        *([f"Trigger: {', '.join(trigger)}", ""] if trigger else []),
        "```python",
        "from diffusers import DiffusionPipeline",
        f'pipeline = DiffusionPipeline.from_pretrained("{config.model.path}")',
        usage,
        "```",
        "",
        *(["Prompts it was watched with:", "", prompts] if prompts else []),
    ]
    return "\n".join(lines)
