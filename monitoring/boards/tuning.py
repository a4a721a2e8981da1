"""How are fine-tuning and batches doing?"""

from monitoring.panels import Board, Panel, q

BOARD = Board(
    "owngpt-tuning", "OwnGPT · Fine-tuning and batches", "The run that is going on, the queue, and batches.",
    {
        "Fine-tuning": (
            Panel("A run is going on", "stat", "short", "1: yes.", q("max(owngpt_training_running)")),
            Panel("Waiting", "stat", "short", "Jobs in the queue.", q("sum(owngpt_tuning_jobs_queued)")),
            Panel("Progress", "gauge", "percentunit", "Steps done.",
                  q("max(owngpt_training_step) / clamp_min(max(owngpt_training_steps), 1)")),
            Panel("Left", "stat", "s", "At the present speed.", q("max(owngpt_training_eta_seconds)")),
            Panel("Speed", "stat", "short", "Tokens trained per second.", q("max(owngpt_training_tokens_per_second)")),
            Panel("Failed today", "stat", "short", "Jobs that ended failed in 24 h; the job's events say why.",
                  q('sum(increase(owngpt_training_jobs_total{status="failed"}[1d])) or vector(0)'), good_below=1),
            Panel("Loss", "timeseries", "short", "Training falls and validation does not: fewer epochs, or more data.",
                  (("owngpt_training_loss", "training"), ("owngpt_training_validation_loss", "validation"))),
            Panel("Accuracy", "timeseries", "percentunit", "Learnt tokens the model would have said itself.",
                  q("owngpt_training_token_accuracy", "accuracy")),
            Panel("Step", "timeseries", "short", "A flat line while a run goes on: stalled.",
                  (("owngpt_training_step", "step"), ("owngpt_training_steps", "of"))),
        ),
        "Batches": (
            Panel("Not over", "stat", "short", "Batches.", q("sum(owngpt_batches_active)")),
            Panel("Lines waiting", "stat", "short", "That nobody has asked yet.", q("sum(owngpt_batch_lines_waiting)")),
            Panel("On their way", "stat", "short", "Requests of batches in the engines.",
                  q("sum(owngpt_batch_requests_in_flight)")),
            Panel("Lines answered", "timeseries", "ops", "Per second: completed or failed.",
                  q("sum by (result) (rate(owngpt_batch_lines_total[$__rate_interval]))", "{{result}}"), stacked=True),
            Panel("Batches ended", "timeseries", "short", "By how.",
                  q("sum by (status) (increase(owngpt_batches_ended_total[$__rate_interval]))", "{{status}}"),
                  stacked=True),
        ),
    },
)  # fmt: skip
