"""The trainer's Prometheus metrics: the run that is going on, and how runs ended."""

from typing import Any

from prometheus_client import Counter, Gauge, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]

jobs_running = Gauge("owngpt_training_running", "1 while a run is going on")
jobs_ended = Counter("owngpt_training_jobs", "fine-tuning jobs by how they ended", ["status"])
loss = Gauge("owngpt_training_loss", "training loss at the last step")
valid_loss = Gauge("owngpt_training_validation_loss", "validation loss at the last evaluation")
accuracy = Gauge("owngpt_training_token_accuracy", "share of learnt tokens the model would have said itself, last step")
tokens = Gauge("owngpt_training_tokens_per_second", "tokens trained per second since the run (re)started")
step = Gauge("owngpt_training_step", "step of the run")
steps = Gauge("owngpt_training_steps", "steps the run will have")
eta = Gauge("owngpt_training_eta_seconds", "seconds until the run's last step, at the present speed")

_BY_NAME = {
    "train_loss": loss,
    "full_valid_loss": valid_loss,
    "train_mean_token_accuracy": accuracy,
    "tokens_per_s": tokens,
    "step": step,
    "total_steps": steps,
    "eta_s": eta,
}


def hear(said: dict[str, Any]) -> None:
    """Take in a metrics event of a run."""
    for name, gauge in _BY_NAME.items():
        if name in said:
            gauge.set(said[name])
