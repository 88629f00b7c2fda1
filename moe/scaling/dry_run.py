"""Forward and backward of the real model on the meta device as one rank of a job, with live bytes and collectives counted.

What a step keeps and moves depends on shapes and on the routing only. Both are real here: the model is the one that trains,
sharded and with its exchange, and each router's choice is replaced by given expert ids. Arithmetic is not done, so any size
takes about as long as a small one.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.experts import ExpertBank
from moe.kernels import grouped
from moe.layer import Exchange, MoELayer, moe_layers
from moe.parallel.engine import shard_experts
from moe.parallel.simulated import Transfer, simulated_ranks
from moe.scaling.live_bytes import LiveBytes
from moe.scaling.shape import DTYPES, Layout, ModelShape
from moe.types import NO_INFO, Routing, SoftRouting, TokenInfo

EXCHANGE, SCRATCH = "exchange", "scratch"
Choose = Callable[[int, int], Tensor]
"""(layer, number of tokens) -> expert ids (T, K) int64 on CPU."""


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """What a micro-batch keeps and moves on one rank, without weights, optimizer and the gradients of parameters.

    Attributes:
        saved: bytes that forward keeps for backward.
        exchange: the part of ``saved`` that the expert exchange holds.
        peak: largest number of live bytes during forward and backward, when each parameter's gradient is let go at once.
        later_peak: the same from the first parameter's gradient on, when the buffers of the reduction exist.
        resident: buffers that stay from one micro-batch to the next, in no other number.
        transfers: collectives of forward and backward.
    """

    saved: int
    exchange: int
    peak: int
    later_peak: int
    resident: int
    transfers: tuple[Transfer, ...]


def uniform_choice(num_experts: int, top_k: int, seed: int = 0) -> Choose:
    """K different experts per token, all sets being equally likely."""

    def choose(layer: int, num_tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + layer)
        return torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices

    return choose


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The fused operations that torch chooses on CPU, and where heads of keys and values differ in width, on GPUs.

    On meta it would choose the unfused one, which keeps a matrix of L x L per head.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    if value.shape[-1] != query.shape[-1]:
        bias = None if attn_mask is None else attn_mask.expand(*query.shape[:2], -1, -1)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )[0]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


class _TaggedExchange:
    """Accounts what an exchange keeps to a tag, without what runs inside it: the experts, and what it lets run meanwhile."""

    def __init__(self, exchange: Exchange, live: LiveBytes) -> None:
        self.exchange, self.live = exchange, live

    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: ExpertBank, meanwhile: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """As the exchange."""
        with self.live.tagged(EXCHANGE):
            return self.exchange(x_TD, routing, experts, self._untagged(meanwhile) if meanwhile else None)

    def _untagged(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            with self.live.tagged(""):
                return function(*args)

        return call


def tag_exchanges(model: nn.Module, live: LiveBytes) -> None:
    """Account what the exchanges of a model's layers keep to the tag `EXCHANGE`."""
    for layer in moe_layers(model).values():
        if layer.exchange is not None:
            layer.exchange = tagged = _TaggedExchange(layer.exchange, live)
            layer.experts.forward = tagged._untagged(layer.experts.forward)  # type: ignore[method-assign]


def _choose_experts(layer: MoELayer, index: int, choose: Choose) -> None:
    """Let the router do its work, and replace its choice."""
    forward = layer.router.forward

    def routed(x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing:
        name = layer.spec.router.get("name", "topk")
        try:
            routing = forward(x_TD, info)
        except NotImplementedError as problem:  # such as nonzero, whose result has no size on meta
            raise ValueError(f"moe.router.name={name} cannot be planned: its choice depends on the data") from problem
        if isinstance(routing, SoftRouting) or routing.top_k is None:
            raise ValueError(f"moe.router.name={name} cannot be planned: only routers with K experts per token can")
        ids_N = choose(index, routing.num_tokens).reshape(-1)
        return dataclasses.replace(
            routing,
            expert_ids_N=ids_N,
            token_ids_N=torch.arange(routing.num_tokens).repeat_interleave(routing.top_k),
            counts_E=torch.bincount(ids_N, minlength=routing.num_experts),
        )

    layer.router.forward = routed  # type: ignore[method-assign]


@contextmanager
def simulated_model(shape: ModelShape, layout: Layout, rank: int = 0) -> Iterator[tuple[nn.Module, list[Transfer]]]:
    """The model as rank ``rank`` has it, sharded and with its exchange, and the growing list of its collectives."""
    with simulated_ranks(rank, layout.world_size) as ranks:
        model = shape.build()
        if layout.activation_checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # transformers will rename it
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.device("meta"):
            shard_experts(model, layout.ep_size, layout.resolved_exchange)
        for layer in moe_layers(model).values():
            if layout.ep_size > 1:
                layer.set_deepspeed_parallelism()  # type: ignore[operator]
        nn.Module.to(model, DTYPES[layout.precision])
        yield model, ranks.transfers


def step_bytes(shape: ModelShape, layout: Layout, choose: Choose | None = None, rank: int = 0) -> StepBytes:
    """Run one micro-batch of ``shape`` as rank ``rank`` of ``layout``, uniformly routed unless ``choose`` says otherwise.

    Raises:
        ValueError: the router's number of assignments depends on the data.
    """
    with simulated_model(shape, layout, rank) as (model, transfers), ExitStack() as stack:
        for index, layer in enumerate(moe_layers(model).values()):
            uniform = uniform_choice(layer.num_experts, round(layer.router.mean_experts_per_token))
            _choose_experts(layer, index, choose or uniform)
        live = stack.enter_context(LiveBytes("meta", "cpu"))
        live.ignore([*model.parameters(), *model.buffers()])
        tag_exchanges(model, live)
        stack.enter_context(tagged_scratch(live))
        stack.enter_context(_meta_like_cpu())
        peaks = _drop_gradients(model, live)
        live.restart_peak()
        transfers.clear()
        loss = _forward(model, shape, layout.micro_batch_size)
        early = live.live_by_tag[SCRATCH]
        saved, exchange = live.live - early, live.live_by_tag[EXCHANGE]
        loss.backward()
        resident = live.live_by_tag[SCRATCH]
        return StepBytes(
            saved=saved,
            exchange=exchange,
            peak=max(*peaks, live.peak, saved + resident) - resident,
            later_peak=live.peak - resident,
            resident=resident,
            transfers=tuple(transfers),
        )


def _forward(model: nn.Module, shape: ModelShape, batch: int) -> Tensor:
    length = shape.seq_len
    ids_BL = torch.empty(batch, length, dtype=torch.int64, device="meta")
    return model(
        input_ids=ids_BL,
        position_ids=torch.arange(length).expand(batch, -1),  # transformers looks at their values
        attention_mask=torch.empty(batch, 1, length, length, dtype=torch.bool, device="meta") if shape.packed else None,
        labels=ids_BL,
        shift_labels=ids_BL,
        num_items_in_batch=torch.tensor(1.0),
    ).loss


class _TaggedScratch(grouped._Scratch):
    """Accounts what the experts' kernel keeps from call to call."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self.live = live

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        with self.live.tagged(SCRATCH):
            return super().take(name, like, *shape)


def tagged_scratch(live: LiveBytes) -> contextlib.AbstractContextManager[Any]:
    """A scratch store of its own for the experts' kernel, so that buffers that it keeps are seen, under the tag `SCRATCH`."""
    return mock.patch.object(grouped, "_scratch", _TaggedScratch(live))


@contextmanager
def _meta_like_cpu() -> Iterator[None]:
    """Functions of torch that refuse the meta device, or choose something else there than anywhere else."""
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled

    def choose(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    def ask(*device_type: str) -> bool:
        return False if device_type == ("meta",) else is_enabled(*device_type)

    with (
        mock.patch.object(torch, "autocast", choose),
        mock.patch.object(torch, "is_autocast_enabled", ask),
        mock.patch.object(F, "scaled_dot_product_attention", _fused_attention),
    ):
        yield


def _drop_gradients(model: nn.Module, live: LiveBytes) -> list[int]:
    """Let each parameter's gradient go at once; the list gets the peak before the first one."""
    peaks: list[int] = []

    def drop(parameter: Tensor) -> None:
        if not peaks:
            peaks.append(live.peak)
            live.restart_peak()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop)
    return peaks
