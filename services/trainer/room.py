"""How a run fits where it trains, decided before engines give their GPU free for it."""

import msgspec
from loguru import logger

from common import checkpoint, gpus
from common.sizing import memory, shape, training
from common.sizing.cards import CannotSay
from services.trainer.plan import Plan, rows_on_gpu


def on_a_cpu(plan: Plan) -> Plan:
    """The plan in the bits that the CPU computes in. Raises CannotSay where engines have given a GPU free for it."""
    if plan.gpu:
        raise CannotSay("The GPU is lost: PyTorch finds none (nvidia-smi, the driver's log). Engines have theirs back.")
    return msgspec.structs.replace(plan, four_bit=False)


def on_a_gpu(plan: Plan, vocabulary: int, tokens: int) -> Plan:
    """The plan with its numbers of bits and of rows at once, the longest of `tokens` tokens.

    The whole card counts, but for what an engine that sleeps keeps of it. A model or driver that is not known gets what
    fits most cards. Raises CannotSay with what is missing.
    """
    most = rows_on_gpu(plan.micro_batch, vocabulary, tokens)
    four_bit = None if plan.four_bit == "auto" else plan.four_bit
    try:
        known = shape.of_config(checkpoint.config(plan.base, plan.revision), plan.base)
        found = gpus.look()
        memory_bytes = found.gpus[gpus.visible(found)[0]].memory_bytes - memory.ASLEEP_BYTES
    except (CannotSay, gpus.GpusAway, IndexError) as error:
        logger.warning("whether the run fits is not known", error=str(error))
        bits, rows = four_bit is not False, most
    else:
        bits, rows = training.choose(known, memory_bytes, tokens=tokens, most=most, four_bit=four_bit, rank=plan.lora.r)
    return msgspec.structs.replace(plan, four_bit=bits, micro_batch=rows)
