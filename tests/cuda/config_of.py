"""Inside the CUDA build's environment, under a fake driver: what vLLM makes of command lines. A JSON list of cases comes on standard
input, `{"name": …, "command": [...], "memory": bytes for KV blocks}`; one JSON line a case goes out. It knows vLLM and nothing of ours.
"""

import json
import sys
import tempfile
import traceback


def config(command: list[str]) -> object:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(command)
    validate_parsed_serve_args(parsed)
    return AsyncEngineArgs.from_cli_args(parsed).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def alone() -> None:
    """vLLM's process groups, with one member."""
    import torch
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    if not torch.distributed.is_initialized():
        with tempfile.NamedTemporaryFile(delete=False) as file:
            init_distributed_environment(1, 0, f"file://{file.name}", 0, backend="gloo")
        initialize_model_parallel(1, 1)


def weights(made: object) -> int:
    """Bytes of the parameters of vLLM's own model class, on the meta device: nothing is loaded. One GPU."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_current_vllm_config(made):
        alone()
        with set_default_torch_dtype(made.model_config.dtype), torch.device("meta"):
            model = initialize_model(vllm_config=made)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def blocks(made: object, memory: int) -> dict[str, float]:
    """KV blocks and concurrency that vLLM makes of so much memory."""
    import torch
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs, get_max_concurrency_for_kv_cache_config
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    model, parallel = made.model_config, made.parallel_config
    spec = FullAttentionSpec(
        block_size=made.cache_config.block_size or 16, num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(), dtype=model.dtype if isinstance(model.dtype, torch.dtype) else torch.bfloat16)
    resolve_kv_cache_layout(made, [["LBNHC", "LBHNC"]] * parallel.tensor_parallel_size)  # else workers say what they support
    layers = {f"model.layers.{n}.self_attn.attn": spec for n in range(model.get_num_layers(parallel))}
    found = get_kv_cache_configs(made, [layers] * parallel.tensor_parallel_size, [memory] * parallel.tensor_parallel_size)[0]
    return {"blocks": found.num_blocks, "block_tokens": spec.block_size, "longest": model.max_model_len,
            "concurrency": get_max_concurrency_for_kv_cache_config(made, found)}


def answer(case: dict) -> dict:
    try:
        made = config(case["command"])
        said = {"ok": True, "sequences": made.scheduler_config.max_num_seqs, "step_tokens": made.scheduler_config.max_num_batched_tokens,
                "lora": bool(made.lora_config), "kv_tier": made.kv_transfer_config is not None, "attention": str(made.attention_config.backend),
                "quantization": made.model_config.quantization, "sleeps": made.model_config.enable_sleep_mode}
        said |= blocks(made, case["memory"])
        if case.get("weigh"):
            said["weights"] = weights(made)
        return said
    except BaseException as error:
        last = traceback.format_exc().strip().splitlines()
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:1500], "at": last[-4:]}


if __name__ == "__main__":
    for case in json.load(sys.stdin):
        print("CASE " + json.dumps({"name": case["name"], **answer(case)}), flush=True)
