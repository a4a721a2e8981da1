"""What the ledger can be told, read once from the environment. `.env.example` explains each."""

from pydantic import Field

from common.database import DATABASE_URL
from common.settings import StateSettings


class LedgerSettings(StateSettings):
    """The ledger's settings; names are the environment variables in lower case."""

    redis_user: str = "ledger"
    database_url: str = Field(pattern=DATABASE_URL, description="usage and money: SQLite or Postgres")
    hourly_usd: float = Field(0.0, ge=0, description="what the machine costs an hour; 0: not said")
    budget_usd: float = Field(0.0, ge=0, description="what it may cost a calendar month; 0: no budget")
    gpu_exporter_url: str = Field("", description="services/gpu_exporter, for GPU and host in the status")
    prometheus_url: str = Field("", description="Prometheus, for firing alerts in the status; empty: there is none")
