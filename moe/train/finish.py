"""What happens once the last step is done: the model as a Hugging Face folder, a sample of its text, and the report."""

import json
import sys

import torch
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from moe.models.from_checkpoint import export_checkpoint
from moe.models.generate import sample_text
from moe.train.config import RunConfig
from moe.train.report import write_report
from moe.train.run_folder import MODEL_DIR, SUMMARY_FILE
from moe.train.trainer import Outcome

SAMPLE_TEMPERATURE = 0.8  # a small model's greedy text repeats itself


def finish_run(config: RunConfig, outcome: Outcome, tokenizer: PreTrainedTokenizerFast) -> None:
    """Export, sample, summary.json and report; prints where things are to stderr. For rank 0."""
    summary = dict(outcome.summary, run_dir=str(config.run_dir), finished=outcome.finished)
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    disable_progress_bar()
    if outcome.finished:
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        export_checkpoint(outcome.checkpoint, config.run_dir / MODEL_DIR, dtype, replace=True)
        if config.train.sample_tokens:
            model = AutoModelForCausalLM.from_pretrained(config.run_dir / MODEL_DIR, dtype="auto").eval()
            torch.manual_seed(config.seed)
            prompt, num_tokens = config.train.sample_prompt, config.train.sample_tokens
            summary["sample"] = sample_text(model, tokenizer, prompt, num_tokens, SAMPLE_TEMPERATURE)
    if summary["perplexity"] is not None:
        console.print(f"held-out loss {summary['eval_loss']:.4f}, perplexity {summary['perplexity']:.2f}")
    if "sample" in summary:
        console.print("sample:")
        console.print(Text(summary["sample"]))
    (config.run_dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    report = write_report(config.run_dir)
    console.print(f"run folder {config.run_dir}, report {report}, pictures {config.run_dir / 'pictures'}")
    if not outcome.finished:
        console.print(f"stopped at step {outcome.step}: resumable, run the same command with --resume")
