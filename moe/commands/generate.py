"""`moe generate`."""

import json
from typing import Annotated

import typer

from moe.commands.common import DeviceOption, JsonOption, load_model, read_model


def generate(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt; the text goes to stdout.

    Example: `moe generate runs/tiny/model --prompt "def main(" --temperature 0.8`
    """
    import torch

    from moe.models.generate import sample_text

    _, tokenizer = read_model(model)
    loaded = load_model(model, device)
    torch.manual_seed(seed)
    output = sample_text(loaded, tokenizer, prompt, max_new_tokens, temperature)
    print(json.dumps({"model": model, "prompt": prompt, "text": output}) if as_json else output)
