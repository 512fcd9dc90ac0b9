r"""Takes a small Llama from scratch to reward optimisation, every stage with Adam-mini and with AdamW.

In progress: the stages run, but with the defaults ``optimize`` does not yet improve on its start, and the time of the
whole path is not measured.

    python examples/align.py                         # all stages
    python examples/align.py --stages sft reward     # some of them, from what earlier ones left in runs/align/

The stages are those of the paper's section 3.2, after a short pre-training:

    pretrain   Trainer: next tokens of the source code of Python's standard library
    sft        TRL's SFTTrainer, with LoRA: a function's first statement, given its signature and docstring
    reward     TRL's RewardTrainer: tell the statement that stands there from one that the fine-tuned model writes
    optimize   ReMax (examples/remax.py): write statements that parse and that the reward model likes

Files, and with them their functions, are held out from all stages; each stage says what it achieved on these and leaves
a plot and figures in ``runs/align/``. All runs of a stage start from the same weights, which the first optimizer and
seed left in the stage before, and nothing differs between optimizers but ``optim``. Pre-training is done once, with the
first optimizer: examples/pretrain.py compares them there.

With a network and a GPU, on a model and a dataset of Python files from the hub:

    python examples/align.py --model Qwen/Qwen3-0.6B-Base --dataset codeparrot/codeparrot-clean-valid \
        --text-column content --bf16 --prompt-tokens 256 --completion-tokens 256 --temperature 1 --lr-sft 2e-4 \
        --lr-reward 1e-5 --lr-optimize 1e-6 --steps-sft 500 --steps-reward 500 --steps-optimize 300
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import datasets
import pretrain
import torch
import transformers
from matplotlib import pyplot as plt
from peft import LoraConfig
from remax import ReMaxConfig, ReMaxTrainer
from rich import box
from rich.console import Console
from rich.table import Column, Table
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer
from transformers.trainer_callback import PrinterCallback
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from adam_mini_plugins.callbacks.hf import OptimizerMemoryCallback

MODEL = pretrain.Size(96, 3, 4, 2, 128, 500, vocab_size=2048, batch_size=8, lr=3e-3, warmup=0.05)
HOLD_OUT_EVERY = 5  # of so many files one is held out
SAMPLING_SEED = 1234  # of the answers that held-out rewards are means over, and of those to beat in preferences
SAMPLING_BATCH = 256


@dataclass(frozen=True)
class Function:
    """A function, cut after its docstring."""

    prompt: str
    completion: str


Writer = Callable[[list[str]], list[str]]  # answers prompts


@dataclass(frozen=True)
class Part:
    """What is trained on, or what is held out."""

    files: list[str]
    functions: list[Function]


@dataclass(frozen=True)
class Figure:
    """Something measured, by its name in the trainer's logs."""

    key: str
    label: str
    unit: str

    def __str__(self) -> str:
        return f"{self.label} ({self.unit})"


@dataclass(frozen=True)
class Stage:
    """How a stage is done and what is measured of it."""

    name: str
    title: str
    rows: Callable[[list[Function], Writer], list[dict[str, str]]]
    trainer: Callable[..., Trainer]
    curve: Figure
    held_out: tuple[Figure, ...]


@dataclass(frozen=True)
class Run:
    """What was measured of one training: the stage's held-out figures by their keys, and its curve by steps."""

    stage: str
    optim: str
    title: str
    seed: int
    before: dict[str, float]
    after: dict[str, float]
    curve: list[tuple[int, float]]
    state_bytes: int
    state_ratio: float
    seconds: float


class Bar(pretrain.Monitor):
    """A bar of the optimizer's steps, on a terminal."""

    def on_evaluate(self, *_: Any, **__: Any) -> None:  # noqa: D102
        pass


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=formatter)
    add = parser.add_argument
    add("--stages", nargs="+", choices=[stage.name for stage in STAGES], help="which of them to do; without it all")
    add("--optim", nargs="+", default=["adam_mini", "adamw_torch"], help="optimizers to compare, as Trainer names them")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds that each optimizer trains with")
    add("--model", help="name or folder of a model to start from, in place of pre-training one")
    add("--dataset", help="Python files: a folder, or a dataset of the hub; without it the standard library")
    add("--glob", nargs="+", default=["*.py"], help="which files of a folder are read")
    add("--dataset-config", help="configuration of a hub dataset")
    add("--text-column", default="text", help="column of a hub dataset")
    add("--files", type=int, default=20_000, help="files to read at most")
    add("--prompt-tokens", type=int, default=64, help="longest signature with docstring that is used")
    add("--completion-tokens", type=int, default=24, help="longest statement that is used, or generated")
    add("--eval-functions", type=int, default=256, help="held-out functions at most that figures are means over")
    add("--lora-rank", type=int, default=16, help="of sft")
    add("--temperature", type=float, default=0.5, help="of sampling, in optimize")
    add("--beta", type=float, default=0.02, help="weight of the KL penalty, in optimize")
    add("--reward-weight", type=float, default=0.3, help="of the reward model, in optimize, where parsing has 1")
    defaults = ((MODEL.steps, 60, 100, 16), (MODEL.lr, 5e-3, 1e-3, 5e-4), (MODEL.batch_size, 16, 16, 24))
    for stage, steps, lr, batch in zip(STAGES, *defaults):
        add(f"--steps-{stage.name}", type=int, default=steps, help="optimizer steps")
        add(f"--lr-{stage.name}", type=float, default=lr, help="peak learning rate")
        add(f"--batch-{stage.name}", type=int, default=batch, help="sequences, pairs or prompts a step")
    add("--bf16", action="store_true", help="bfloat16 autocast")
    add("--seed", type=int, default=0, help="of pre-training and of what is held out")
    add("--output-dir", type=Path, default=Path("runs/align"), help="where models, plots and figures are written")
    args = parser.parse_args()
    args.stages = args.stages or [stage.name for stage in STAGES]
    return args


def read_data(args: argparse.Namespace) -> tuple[Part, Part]:
    """What to train on, and what is held out."""
    files: tuple[list[str], list[str]] = [], []
    for number, text in enumerate(islice(pretrain.read_documents(args), args.files)):
        files[number % HOLD_OUT_EVERY == 0].append(text)
    train, held_out = (Part(texts, list(chain(*map(functions_of, texts)))) for texts in files)
    return train, held_out


def functions_of(source: str) -> Iterator[Function]:
    """The functions that have a docstring and then a simple statement, moved to the left margin."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(parsed(source) or ast.Module([], [])):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            start, middle, end = node.lineno - 1, node.body[0].end_lineno, node.body[1].end_lineno
            text = textwrap.dedent("".join(lines[start:end])).rstrip()
            prompt = textwrap.dedent("".join(lines[start:middle])).rstrip()
            # The prompt goes without its line's end, which tokenizers join to the indent of the next line.
            function = Function(prompt, text[len(prompt) :])
            if text.startswith(f"{prompt}\n") and not hasattr(node.body[1], "body") and parses(text):
                yield function


def parsed(source: str) -> ast.Module | None:
    """The syntax tree, if it is Python at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in strings
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def parses(text: str) -> bool:
    """Whether it is a function that does something: a signature with its docstring alone would parse, too."""
    tree = parsed(text)
    return bool(tree and tree.body and isinstance(tree.body[0], ast.FunctionDef) and len(tree.body[0].body) > 1)


def parse_reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """1 for what parses, with its prompt, as a function that does something."""
    return [float(parses(prompt + completion)) for prompt, completion in zip(prompts, completions)]


def some(functions: list[Function], number: int, tokenizer: Any, args: argparse.Namespace) -> list[Function]:
    """So many functions (or all, if there are fewer), drawn from those that are short enough."""

    def fits(function: Function) -> bool:
        prompt, completion = tokenizer([function.prompt, function.completion])["input_ids"]
        return len(prompt) <= args.prompt_tokens and len(completion) < args.completion_tokens

    return list(islice(filter(fits, random.Random(args.seed).sample(functions, len(functions))), number))


def completions(functions: list[Function], writer: Writer) -> list[dict[str, str]]:
    """Prompts with what to answer."""
    return [asdict(function) for function in functions]


def preferences(functions: list[Function], writer: Writer) -> list[dict[str, str]]:
    """What people wrote, preferred to what the fine-tuned model writes in its place."""
    pairs = zip(functions, writer([function.prompt for function in functions]))
    return [
        {"prompt": function.prompt, "chosen": function.completion, "rejected": other}
        for function, other in pairs
        if function.completion != other
    ]


def prompts(functions: list[Function], writer: Writer) -> list[dict[str, str]]:
    """Prompts without answers."""
    return [{"prompt": function.prompt} for function in functions]


@torch.no_grad()
def write(source: str, tokenizer: Any, args: argparse.Namespace, prompts: list[str]) -> list[str]:
    """Answers of a model, sampled with the same seed at every call."""
    device = torch.accelerator.current_accelerator() if pretrain.HAS_ACCELERATOR else "cpu"
    model = AutoModelForCausalLM.from_pretrained(source).to(device)
    written = []
    with torch.random.fork_rng():
        torch.manual_seed(SAMPLING_SEED)
        for first in range(0, len(prompts), SAMPLING_BATCH):
            rows = prompts[first : first + SAMPLING_BATCH]
            batch = tokenizer(rows, return_tensors="pt", padding=True, return_token_type_ids=False).to(device)
            tokens = model.generate(**batch, max_new_tokens=args.completion_tokens, do_sample=True, top_k=0)
            written += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return written


def left_by(stage: str, args: argparse.Namespace) -> str:
    """The model that a stage has saved."""
    folder = args.output_dir / stage
    if not (folder / "config.json").is_file():
        raise SystemExit(f"the stage {stage} has to be done first: it has left nothing in {folder}")
    return str(folder)


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model; sequences are filled up with the token that ends a text, which the losses skip."""
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prepare(stage: Stage, data: tuple[Part, Part], args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """What all runs of a stage have in common: the model that they start from, and the trainer's data."""
    if stage.name == "pretrain":
        return "", prepare_pretrain(data, args)
    source = args.model or left_by("pretrain", args) if stage.name == "sft" else left_by("sft", args)
    tokenizer = load_tokenizer(source)
    number = getattr(args, f"steps_{stage.name}") * getattr(args, f"batch_{stage.name}")
    train = some(data[0].functions, number, tokenizer, args)
    held_out = some(data[1].functions, args.eval_functions, tokenizer, args)
    if not train or not held_out:
        raise SystemExit("the dataset has no functions that --prompt-tokens and --completion-tokens have room for")
    writer = partial(write, source, tokenizer, args)
    train_dataset, eval_dataset = (datasets.Dataset.from_list(stage.rows(part, writer)) for part in (train, held_out))
    return source, {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "processing_class": tokenizer}


def prepare_pretrain(data: tuple[Part, Part], args: argparse.Namespace) -> dict[str, Any]:
    """The files in sequences, and a tokenizer trained on them."""
    end = pretrain.END_OF_TEXT
    bpe = pretrain.train_tokenizer(data[0].files, MODEL.vocab_size)
    encoded = (chain(*(one.ids for one in bpe.encode_batch([text + end for text in part.files]))) for part in data)
    train, held_out = (torch.tensor(list(tokens)).unfold(0, MODEL.seq_len, MODEL.seq_len) for tokens in encoded)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, pad_token=end)
    return {"train_dataset": train, "eval_dataset": held_out[: args.eval_functions], "processing_class": tokenizer}


def settings(stage: str, optim: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of any trainer. Betas, epsilon and weight decay are the paper's."""
    steps = getattr(args, f"steps_{stage}")
    return {
        "output_dir": str(args.output_dir / stage),
        "optim": optim,
        "learning_rate": getattr(args, f"lr_{stage}"),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.1 if stage == "pretrain" else 0.0,
        "max_steps": steps,
        "per_device_train_batch_size": getattr(args, f"batch_{stage}"),
        "per_device_eval_batch_size": 256,
        "bf16": args.bf16,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": pretrain.HAS_ACCELERATOR,
        "logging_steps": max(1, steps // 30),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }


def pretrainer(source: str, common: dict[str, Any], args: argparse.Namespace, data: dict[str, Any]) -> Trainer:
    """A Llama with random weights."""
    size = argparse.Namespace(**asdict(MODEL), seed=common["seed"])
    model = pretrain.build_model(size, data["processing_class"].backend_tokenizer)
    return Trainer(model, transformers.TrainingArguments(**common), pretrain.collate, **data)


def sft_trainer(source: str, common: dict[str, Any], args: argparse.Namespace, data: dict[str, Any]) -> Trainer:
    """LoRA adapters of the pre-trained model. Prompts have no loss."""
    model, config = AutoModelForCausalLM.from_pretrained(source), SFTConfig(**common, completion_only_loss=True)
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=args.lora_rank, lora_alpha=2 * args.lora_rank
    )
    return SFTTrainer(model, config, **data, peft_config=lora)


def reward_trainer(source: str, common: dict[str, Any], args: argparse.Namespace, data: dict[str, Any]) -> Trainer:
    """The fine-tuned model with a head for one number."""
    transformers.set_seed(common["seed"])  # the head's weights are random
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    return RewardTrainer(model, RewardConfig(**common, center_rewards_coefficient=0.01), **data)


def remax_trainer(source: str, common: dict[str, Any], args: argparse.Namespace, data: dict[str, Any]) -> Trainer:
    """The fine-tuned model, with both rewards."""
    judge = left_by("reward", args)
    common["per_device_train_batch_size"] *= 2  # half of the answers are greedy ones, for the baseline
    config = ReMaxConfig(
        **common,
        max_completion_length=args.completion_tokens,
        temperature=args.temperature,
        num_generations_eval=1,
        reward_weights=[1.0, args.reward_weight],
        beta=args.beta,
    )
    rewards = [parse_reward, AutoModelForSequenceClassification.from_pretrained(judge)]
    tokenizers = [None, load_tokenizer(judge)]
    model = AutoModelForCausalLM.from_pretrained(source)
    return ReMaxTrainer(model, rewards, config, **data, reward_processing_classes=tokenizers)


LOSS, STATEMENTS = Figure("loss", "loss", "nats/token"), Figure("loss", "loss of statements", "nats/token")
ACCURACY, SAMPLED = Figure("accuracy", "accuracy", "of pairs"), Figure("reward_sampled", "reward", "weighted sum")
REWARDS = (
    Figure("rewards/parse_reward/mean", "statements that parse", "of all"),
    Figure("rewards/reward/mean", "reward model", "logit"),
    Figure("reward", "reward", "weighted sum"),
)
STAGES = (
    Stage("pretrain", "Pre-training", completions, pretrainer, LOSS, (LOSS,)),
    Stage("sft", "Supervised fine-tuning with LoRA", completions, sft_trainer, STATEMENTS, (STATEMENTS,)),
    Stage("reward", "Reward model: who wrote it?", preferences, reward_trainer, ACCURACY, (ACCURACY,)),
    Stage("optimize", "Reward optimisation with ReMax", prompts, remax_trainer, SAMPLED, REWARDS),
)


def evaluate(trainer: Trainer, figures: tuple[Figure, ...]) -> dict[str, float]:
    """Held-out figures of the model as it is. Answers are sampled with the same seed at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(SAMPLING_SEED)
        measured = trainer.evaluate()
    return {figure.key: measured[f"eval_{figure.key}"] for figure in figures}


def run(stage: Stage, trainer: Trainer, console: Console) -> Run:
    """Trains once."""
    title = pretrain.TITLES.get(trainer.args.optim, str(trainer.args.optim))
    memory = OptimizerMemoryCallback()
    bar = Bar(f"{stage.name}: {title}, seed {trainer.args.seed}", trainer.args.max_steps, console)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(memory)
    trainer.add_callback(bar)
    before = evaluate(trainer, stage.held_out)
    with bar.bar:
        trainer.train()
    after = evaluate(trainer, stage.held_out)
    changes = "   ".join(f"{f.label} {before[f.key]:.3f} -> {after[f.key]:.3f}" for f in stage.held_out)
    seconds = time.perf_counter() - bar.began
    console.print(f"{stage.name:8}  {title:9}  seed {trainer.args.seed}   {changes}  {seconds:4.0f} s", highlight=False)
    return Run(
        stage.name,
        str(trainer.args.optim.value),
        title,
        trainer.args.seed,
        before,
        after,
        [(log["step"], log[stage.curve.key]) for log in trainer.state.log_history if stage.curve.key in log],
        memory.memory.state_bytes,
        memory.memory.state_bytes / memory.memory.adamw_state_bytes,
        seconds,
    )


def do(stage: Stage, data: tuple[Part, Part], args: argparse.Namespace, console: Console) -> list[Run]:
    """All runs of a stage. The first one's model is what the next stage starts from."""
    source, rows = prepare(stage, data, args)
    each = [(optim, seed) for seed in args.seeds for optim in args.optim]
    runs = []
    for optim, seed in [(args.optim[0], args.seed)] if stage.name == "pretrain" else each:
        trainer = stage.trainer(source, settings(stage.name, optim, seed, args), args, rows)
        runs.append(run(stage, trainer, console))
        if len(runs) == 1:
            save(trainer, args.output_dir / stage.name)
    plot(stage, runs, args.output_dir / f"{stage.name}.png")
    return runs


def save(trainer: Trainer, folder: Path) -> None:
    """Writes model and tokenizer, with adapters merged into the weights."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.use_cache = True  # which training does without, and without which sampling is slow
    model.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)


def by_title(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of each optimizer."""
    return {title: [run for run in runs if run.title == title] for title in dict.fromkeys(run.title for run in runs)}


def plot(stage: Stage, runs: list[Run], path: Path) -> None:
    """Draws the training and, beside it, every held-out figure before and after."""
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    panels = len(stage.held_out)
    shape = {"figsize": (4.6 + 3 * panels, 4), "width_ratios": (1.5, *[1] * panels), "layout": "constrained"}
    with plt.rc_context(style):
        figure, (training, *others) = plt.subplots(1, 1 + panels, **shape)
        for (title, mine), colour, line in zip(by_title(runs).items(), cycle(pretrain.COLOURS), cycle(("-", "--"))):
            curves = torch.tensor([run.curve for run in mine], dtype=torch.float64)  # of runs, points, step and value
            for curve in curves:
                training.plot(*curve.T, line, color=colour, lw=0.8, alpha=0.4)
            of = f" (median of {len(mine)} seeds)" if len(mine) > 1 else ""
            training.plot(*curves.quantile(0.5, dim=0).T, line, color=colour, lw=2, label=f"{title}{of}")
        training.set(title="Training", xlabel="optimizer step", ylabel=stage.curve)
        training.grid(alpha=0.25)
        training.legend(frameon=False)
        for axes, measured in zip(others, stage.held_out):
            dots(axes, measured, runs)
        figure.suptitle(stage.title)
        figure.savefig(path, dpi=200)
        plt.close(figure)


def dots(axes: Any, measured: Figure, runs: list[Run]) -> None:
    """Draws a held-out figure before and after: a dot for each seed, a line at the median."""
    groups = {"before": [run.before[measured.key] for run in runs]}
    groups |= {title: [run.after[measured.key] for run in mine] for title, mine in by_title(runs).items()}
    for x, (values, colour) in enumerate(zip(groups.values(), ("#777777", *pretrain.COLOURS))):
        middle = statistics.median(values)
        axes.plot([x] * len(values), values, "o", color=colour, ms=6, alpha=0.7, mec="white")
        axes.plot([x - 0.3, x + 0.3], [middle, middle], color=colour, lw=2)
        axes.annotate(f"{middle:.3f}", (x, max(values)), (0, 8), textcoords="offset points", ha="center", fontsize=9)
    axes.set(title="Held out", ylabel=measured, xlim=(-0.6, len(groups) - 0.4))
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.15)
    axes.grid(axis="y", alpha=0.25)


def table(results: dict[Stage, list[Run]]) -> Table:
    """Every held-out figure of every stage and optimizer, over the seeds."""
    names = ("before\n(median)", "after\n(median)", "after\n(least, most)", "optimizer state\n(bytes)", "of AdamW's")
    columns = ("stage", "held out", "optimizer", *(Column(name, justify="right") for name in names))
    shown = Table(*columns, box=box.SIMPLE_HEAD)
    for stage, runs in results.items():
        for measured in stage.held_out:
            for title, mine in by_title(runs).items():
                before, after = ([getattr(run, when)[measured.key] for run in mine] for when in ("before", "after"))
                spread = f"{min(after):.3f}, {max(after):.3f}" if len(after) > 1 else "one run"
                figures = (f"{statistics.median(before):.3f}", f"{statistics.median(after):.3f}", spread)
                memory = (f"{mine[0].state_bytes:,}", f"{mine[0].state_ratio:.4f}")
                shown.add_row(stage.name, str(measured), title, *figures, *memory)
        shown.add_section()
    return shown


def main() -> None:
    """Does the stages and reports."""
    args = parse_arguments()
    warnings.simplefilter("ignore", FutureWarning)  # TRL uses names that transformers is giving up
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    plt.switch_backend("Agg")
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    data = read_data(args)
    for part, purpose in zip(data, ("to train on", "held out")):
        console.print(f"{purpose:11} {len(part.files):6,} files, {len(part.functions):6,} functions", highlight=False)
    console.print()
    results, seconds = {}, {}
    for stage in STAGES:
        if stage.name not in args.stages or (stage.name == "pretrain" and args.model):
            continue
        began = time.perf_counter()
        results[stage] = do(stage, data, args, console)
        seconds[stage.name] = time.perf_counter() - began
        console.print(f"{stage.name} took {seconds[stage.name]:.0f} s; {args.output_dir}/{stage.name}.png\n")
        record = {
            "environment": {**pretrain.environment(), "peft": version("peft"), "trl": version("trl")},
            "arguments": vars(args),
            "seconds": seconds,
            "runs": [asdict(run) for runs in results.values() for run in runs],
        }
        (args.output_dir / "align.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
    console.print(table(results))
    console.print(f"All figures: {args.output_dir}/align.json")


if __name__ == "__main__":
    main()
