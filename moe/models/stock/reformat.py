"""From one checkpoint format to another: what `moe export` and `moe import` do."""

from moe.models.config import MoEConfig
from moe.models.folder import ModelFolder
from moe.models.stock import FORMATS
from moe.models.stock.write import Conversion


def source_format(source: ModelFolder) -> str:
    """Key of `FORMATS` for a folder.

    Raises:
        ValueError: it is in none; says what to do.
    """
    config = source.config
    if quantization := getattr(config, "quantization_config", None):
        raise ValueError(
            f"{source.path} has quantized weights ({quantization.get('quant_method')}); only plain ones are converted: fetch the "
            "model in bf16"
        )
    name = "moe" if isinstance(config, MoEConfig) else config.model_type
    if name not in FORMATS:
        raise ValueError(
            f"{source.path} has model_type={name!r}, which is none of {', '.join(FORMATS)}; a dense model gets experts by "
            "`moe upcycle` or `moe carve`"
        )
    return name


def reformat(source: ModelFolder) -> Conversion:
    """The same model, ready for `write_model` in any format that can express it.

    Raises:
        ValueError: we cannot express the model; names the property.
    """
    form = FORMATS[source_format(source)]
    stock = source.config
    return Conversion(
        source=source,
        config=form.from_stock(stock),
        layer_weights=lambda layer: form.read_layer(stock, source, f"model.layers.{layer}."),
        replaced=lambda _, name: form.is_moe_tensor(name),
    )
