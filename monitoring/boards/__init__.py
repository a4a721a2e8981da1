"""The dashboards, a file each."""

from monitoring.boards import cache, cost, engine, gpu, logs, overview, tuning

BOARDS = (overview.BOARD, engine.BOARD, gpu.BOARD, cache.BOARD, cost.BOARD, tuning.BOARD, logs.BOARD)
