"""The loop of both stages, on accelerate: one process or many, resumable at every checkpoint."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico_ext.training.batches import BatchOrder, Draw, MicroBatch, loader, seed_of
from vico_ext.training.checkpoints import Checkpoints, TrainingState, full_tensor
from vico_ext.training.export import export
from vico_ext.training.logs import RunLog
from vico_ext.training.options import TrainOptions, to_dict
from vico_ext.training.records import Problem
from vico_ext.training.setup import Run, set_up

__all__ = ["TrainingStoppedError", "learning_rate", "train"]

_KINDS = ("record", "image", "loss")


class TrainingStoppedError(ValueError):
    """A run that its options told to stop; the message says at which lines."""


def learning_rate(options: TrainOptions, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from ``learning_rate`` to ``final_share`` of it; ``step`` counts from 0."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    place = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
    share = options.final_share + (1 - options.final_share) * (0.5 + 0.5 * math.cos(math.pi * min(place, 1.0)))
    return options.learning_rate * share


def train(options: TrainOptions) -> Path:
    """Runs a stage from its last checkpoint, or from the start, to its end.

    Args:
        options: ConsistencyOptions or RouterOptions.

    Returns:
        The folder of the trained model: patched InternVL in the transformers layout, a Flash checkpoint.

    Raises:
        ValueError: options, data or a checkpoint that cannot be used.
        TrainingStoppedError: a bad record, image or loss where the options say stop.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # accelerate keeps one precision per process, and refuses that of a second run
    if AcceleratorState._shared_state.get("_mixed_precision", options.precision) != options.precision:
        AcceleratorState._reset_state()
    trainer = Trainer(Accelerator(mixed_precision=options.precision), options)
    try:
        return trainer.run()
    finally:
        trainer.close()


class Trainer:
    """One process of a run.

    Args:
        accelerator: of this process.
        options: of the stage.
    """

    def __init__(self, accelerator: Any, options: TrainOptions) -> None:
        self.accelerator, self.options = accelerator, options
        self.out = Path(options.out)
        processes = accelerator.num_processes
        if (options.batch // options.micro_batch) % processes:
            raise ValueError(
                f"batch / micro_batch = {options.batch // options.micro_batch} micro-batches of a step cannot be "
                f"spread over {processes} processes: make it a multiple"
            )
        self.accumulation = options.batch // options.micro_batch // processes
        self.setup: Run = set_up(options, sharded=accelerator.is_fsdp2)
        self.stage = self.setup.stage
        corpus = self.setup.samples.corpus
        self.log: RunLog | None = None
        self._check(corpus.problems)
        self.order = BatchOrder(
            [item.length for item in corpus.items], options.batch, options.micro_batch, options.seed,
            by_length=options.grouping == "length",
        )  # fmt: skip
        self.steps = options.steps or options.epochs * self.order.steps_per_epoch
        self.settings = {**to_dict(options, all_of_them=False), **self.setup.identity}
        self.checkpoints = Checkpoints(self.out / "checkpoints", options.keep_checkpoints)

    def run(self) -> Path:
        """All steps that are left, then the export."""
        module, optimizer = self.accelerator.prepare(self.stage.module, self._optimizer())
        if self.setup.cache is not None:
            self._fill_cache(module)
        state = self._resumed()
        trained = {n: p for n, p in self._policy(module).named_parameters() if p.requires_grad}
        start, counts = 0, Counter(problem.kind for problem in self.setup.samples.corpus.problems)
        if state is not None:
            state.restore(trained, optimizer.optimizer)
            self.stage.load_state(state.stage)
            start, counts = state.step, Counter(state.counts)
        every = self.options.log_every if self.options.tensorboard else 0
        self.log = RunLog(self.out, self.accelerator.process_index, self.stage.name, start, self.steps, every)
        if state is None and self.accelerator.is_main_process:
            self.log.problems(0, self.setup.samples.corpus.problems)
        module.train()
        batches = iter(loader(self.setup.samples, self._groups(start), self.options.workers))
        for step in range(start, self.steps):
            own = [next(batches).to(self.accelerator.device) for _ in range(self.accumulation)]
            self._step(module, optimizer, step, own, counts)
            done = step + 1
            if done % self.options.save_every == 0 or done == self.steps:
                state = TrainingState.collect(done, trained, optimizer.optimizer, self.stage.state(), counts)
                if self.accelerator.is_main_process:
                    self.checkpoints.save(state, self.settings)
                self.accelerator.wait_for_everyone()
        return export(self.accelerator, self._policy(module), self.options)

    def close(self) -> None:
        """Closes logs."""
        if self.log is not None:
            self.log.close()

    def _policy(self, module: Any) -> Any:
        return self.accelerator.unwrap_model(module).policy

    def _resumed(self) -> TrainingState | None:
        if self.accelerator.is_main_process:
            self.checkpoints.clean()
        self.accelerator.wait_for_everyone()
        if not self.options.resume and self.checkpoints.paths():
            raise ValueError(f"{self.out} holds a run and resume is false: choose another out")
        return self.checkpoints.load(self.settings)

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW; matrices decay, connectors and router have the whole learning rate."""
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in self.setup.policy.named_parameters():
            if parameter.requires_grad:
                whole = name.startswith(("model.vico.", "model.multi_modal_projector."))
                scale = 1.0 if whole else getattr(self.options, "language_lr_scale", 1.0)
                decay = self.options.weight_decay if parameter.dim() > 1 else 0.0
                groups.setdefault((scale, decay), []).append(parameter)
        listed: list[dict[str, Any]] = [
            {"params": params, "weight_decay": decay, "scale": scale} for (scale, decay), params in groups.items()
        ]
        return torch.optim.AdamW(listed, lr=self.options.learning_rate, betas=(self.options.beta1, self.options.beta2))

    def _groups(self, start: int) -> Iterator[list[Draw]]:
        """This process's micro-batches: of each step's, a run of neighbours."""
        first = self.accelerator.process_index * self.accumulation
        for step in range(start, self.steps):
            yield from self.order.step(step)[first : first + self.accumulation]

    def _step(self, module: Any, optimizer: Any, step: int, own: list[MicroBatch], counts: Counter[str]) -> None:
        assert self.log is not None
        ready, figures, found = self.stage.prepare(module, own, self._gather)
        problems = [problem for batch in own for problem in batch.problems] + found
        terms = sum(self.stage.count(batch) for batch in ready)
        rows = sum(batch.rows for batch in own if not batch.blank)
        tokens = sum(int(batch.attention_mask.sum()) for batch in own if not batch.blank)
        kinds = Counter(problem.kind for problem in problems)
        sums = self._sum([terms, rows, tokens, *(kinds[kind] for kind in _KINDS)])
        counts.update({kind: int(n) for kind, n in zip(_KINDS, sums[3:], strict=True)})
        self.log.problems(step + 1, problems)
        self._check(problems, {kind: int(n) for kind, n in zip(_KINDS, sums[3:], strict=True)})
        rate = learning_rate(self.options, step, self.steps)
        loss, norm, extra = self._descend(module, optimizer, step, ready, float(sums[0]), rate, counts)
        counts.update({"samples": int(sums[1]), "tokens": int(sums[2])})
        skipped = {name: counts[name] for name in (*_KINDS, "steps")}
        entry = {"loss": loss, "grad_norm": norm, "lr": rate, "rows": int(sums[1]), "tokens": int(sums[2])}
        self.log.step(step + 1, {**entry, **extra, **figures, "skipped": skipped}, int(sums[1]), int(sums[2]))

    def _descend(
        self, module: Any, optimizer: Any, step: int, ready: list[MicroBatch], terms: float, rate: float,
        counts: Counter[str],
    ) -> tuple[float | None, float | None, dict[str, float]]:  # fmt: skip
        """Forward, backward, optimizer step; loss and norm are None where there was nothing, or not finite."""
        if not terms:
            counts["steps"] += 1
            return None, None, {}
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        figures = dict.fromkeys(self.stage.figures, total)
        bad: list[int] = []
        first = self.accelerator.process_index * self.accumulation
        for place, batch in enumerate(ready):
            torch.manual_seed(seed_of(self.options.seed, "dropout", step, first + place))
            last = place == len(ready) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(module):
                # Data parallel wrappers take the processes' mean.
                share, sums, bad_lines = self.stage.loss(module, batch, self.accelerator.num_processes / terms)
                self.accelerator.backward(share)
            total = total + share.detach().double() / self.accelerator.num_processes
            figures = {name: value + sums.get(name, 0) for name, value in figures.items()}
            if not share.isfinite():
                bad += bad_lines()
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        norm = self.accelerator.clip_grad_norm_(trained, self.options.clip_norm or math.inf)
        loss, *summed = self._sum([total, *figures.values()])
        size = float(full_tensor(norm))
        if math.isfinite(loss) and math.isfinite(size):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            optimizer.step()
            optimizer.zero_grad()
            return loss, size, dict(zip(figures, summed, strict=True))
        optimizer.zero_grad()
        self._not_finite(step, loss, bad, ready, counts)
        return None, None, {}

    def _not_finite(
        self, step: int, loss: float, bad: list[int], ready: list[MicroBatch], counts: Counter[str]
    ) -> None:
        """Reports a step that must not be taken."""
        assert self.log is not None
        if math.isfinite(loss):  # then it is the gradient, which no line can be blamed for
            bad = [line for batch in ready if not batch.blank for line in batch.lines]
        what = "the loss is not finite" if not math.isfinite(loss) else "the gradient of the step is not finite"
        problems = [Problem("loss", line, f"{what}; step {step + 1} is left out") for line in bad]
        self.log.problems(step + 1, problems)
        (number,) = self._sum([len(problems)])
        counts.update({"loss": int(number), "steps": 1})
        self._check(problems, {"loss": max(1, int(number))})

    def _check(self, problems: Any, everywhere: dict[str, int] | None = None) -> None:
        """Stops, in every process, where a kind of problem is to stop the run.

        Args:
            problems: of this process.
            everywhere: their numbers by kind, over all processes.
        """
        numbers = everywhere or Counter(problem.kind for problem in problems)
        options = {"record": "on_bad_record", "image": "on_unreadable_image", "loss": "on_nonfinite_loss"}
        for kind, option in options.items():
            if numbers.get(kind) and getattr(self.options, option) == "stop":
                listed = [str(problem) for problem in problems if problem.kind == kind]
                shown = "; ".join(listed[:3]) or "seen by another process"
                more = f" (and {numbers[kind] - 3} more)" if numbers[kind] > 3 else ""
                raise TrainingStoppedError(f"{self.options.data}: {shown}{more}. {option}: skip goes on without")

    def _sum(self, values: list[Any]) -> list[float]:
        """Sums over all processes."""
        tensors = [torch.as_tensor(v, dtype=torch.float64, device=self.accelerator.device) for v in values]
        return self.accelerator.reduce(torch.stack(tensors), "sum").tolist()

    def _gather(self, values: Tensor) -> Tensor:
        """Values ``[n]`` of all processes, one after another; n may differ."""
        if self.accelerator.num_processes == 1:
            return values
        sizes = self.accelerator.gather(torch.tensor([len(values)], device=values.device)).tolist()
        padded = torch.zeros(max(sizes), dtype=values.dtype, device=values.device)
        padded[: len(values)] = values
        parts = self.accelerator.gather(padded).view(len(sizes), -1) if max(sizes) else padded.new_zeros(len(sizes), 0)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def _fill_cache(self, module: Any) -> None:
        """Runs the reference over every line whose hidden states are not on disk yet; then the data reads them."""
        from tqdm import tqdm

        cache, samples = self.setup.cache, self.setup.samples
        assert cache is not None
        missing = [i for i, item in enumerate(samples.corpus.items) if not all(map(cache.holds, item.lines))]
        processes, rank, size = self.accelerator.num_processes, self.accelerator.process_index, self.options.micro_batch
        rounds = -(-len(missing) // (processes * size))
        padded = missing + missing[:1] * (rounds * processes * size - len(missing))  # every process runs every round
        own = [padded[(r * processes + rank) * size :][:size] for r in range(rounds)]
        draws = [[Draw(item, 0) for item in group] for group in own]
        module.eval()
        bar = tqdm(total=rounds, desc="reference", unit="batch", disable=None if rank == 0 else True)
        for batch in loader(samples, draws, self.options.workers):
            with torch.no_grad():
                hidden = module(batch.to(self.accelerator.device), phase="reference")["hidden"]
            if not batch.blank:
                for line, part in zip(batch.lines, hidden.split(batch.answer_tokens.tolist()), strict=True):
                    cache.write(line, part)
            bar.update(1)
        bar.close()
        self.accelerator.wait_for_everyone()
        samples.cache = cache
