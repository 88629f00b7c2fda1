"""What the data section of a run's configuration may say (`data.*` in YAML and on the command line)."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

HUB_PREFIX = "hub:"


class TokenizerConfig(BaseModel):
    """Which tokenizer turns text into tokens: an existing one (`path`), or one trained on the training documents."""

    model_config = ConfigDict(extra="forbid")

    path: str | None = Field(
        default=None, description="folder or hub name of a Hugging Face tokenizer; None trains one"
    )
    vocab_size: int = Field(
        default=4096, ge=257, description="256 bytes, the end-of-text token, and the learned merges"
    )
    train_bytes: int = Field(
        default=32 << 20, ge=1, description="at most this much text (UTF-8 bytes) is used to train a tokenizer"
    )


class DataConfig(BaseModel):
    """Where text comes from, how it is split, and how it is cut into training windows."""

    model_config = ConfigDict(extra="forbid")

    source: str = Field(
        default="stdlib", description="'stdlib', a path or glob of .txt/.jsonl/.parquet, or 'hub:<dataset>'"
    )
    text_column: str = Field(default="text", description="column that holds the text (jsonl, parquet, hub)")
    split: str = Field(default="train", description="split of the hub dataset")
    streaming: bool = Field(
        default=False, description="hub only: read while training instead of tokenising all beforehand"
    )
    hub_config: str | None = Field(default=None, description="configuration (subset) name of the hub dataset")
    eval_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="share of the documents held out; 0: no evaluation"
    )
    seed: int = Field(default=0, ge=0, description="of the held-out choice and of the order of training")
    seq_len: int = Field(default=256, ge=1, description="tokens in a window")
    in_document_attention: bool = Field(default=False, description="keep attention and prediction inside a document")
    cache_dir: str | None = Field(default=None, description="None: $MOE_CACHE, else ~/.cache/moe")
    tokenizer: TokenizerConfig = TokenizerConfig()

    @model_validator(mode="after")
    def _hub_fields_need_a_hub_source(self) -> "DataConfig":
        if self.source == HUB_PREFIX:
            raise ValueError(f"data.source={self.source!r} names no dataset: write e.g. hub:roneneldan/TinyStories")
        if self.source.startswith(HUB_PREFIX):
            return self
        for field in ("streaming", "hub_config", "split"):
            value = getattr(self, field)
            if value != type(self).model_fields[field].default:
                raise ValueError(
                    f"data.{field}={value!r} applies to hub datasets only, and data.source={self.source!r} is not one: "
                    f"remove data.{field}, or write data.source=hub:<dataset>"
                )
        return self
